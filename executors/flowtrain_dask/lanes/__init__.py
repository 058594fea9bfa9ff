"""Lanes: where deferred events wait and are processed, one at a time and in order.

`lane` is the training thread's side and `driver` the lane's thread; `work` runs handlers, and `transport` is the seam
to where they run, with the one that runs them in this process. `limits` and `report` say how much may wait and how it
went; `gate` makes a lane stand still, also while the process forks.
"""
