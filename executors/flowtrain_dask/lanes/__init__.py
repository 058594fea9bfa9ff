"""Lanes: where deferred events wait and are processed, one at a time and in order.

`lane` is the training thread's side and `driver` the lane's thread; `work` runs handlers, `transport` is the seam to
where they run, and `threads` runs them in this process. `batches`, `limits` and `report` say how much is handed over,
how much may wait, and how it went; `gate`, `forks` and `leaving` are about standing still, forking and ending.
"""
