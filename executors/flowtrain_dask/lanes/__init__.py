"""Lanes: deferred events wait in them and are processed, one at a time and in order.

`lane` is one lane, and `event_queue` the events that wait in it. `lane_set` has all lanes of a learner, and `threads`
the few threads that work on them. `work` runs handlers, and `transport` is the interface to the place where they run,
with the one for this process. `limits` bounds the events that may wait, and `report` holds the counts that users see.
`answers` brings what handlers write with a lag to the training thread.
`gate` makes a lane stand still, for instance while this process forks.
"""

__all__: list[str] = []
