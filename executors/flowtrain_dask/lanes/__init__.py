"""Lanes: deferred events wait in them and are processed, one at a time and in order.

`lane` is the training thread's side of a lane, and `driver` the lane's thread. `work` runs handlers, and `transport` is
the interface to the place where they run, with the one for this process. `limits` bounds the events that may wait, and
`report` holds the counts that users see. `gate` makes a lane stand still, for instance while this process forks.
"""

__all__: list[str] = []
