"""Lanes: where deferred events wait and are processed, one at a time and in order.

`lane` is the training thread's side and `driver` the lane's thread; `work` runs handlers, and `transport` is the seam
to where they run, with the one that runs them in this process. `batches`, `limits` and `report` say how much is handed
over, how much may wait, and how it went; `gate` makes a lane stand still, and `forks` does so while a process forks.
"""
