"""Deferred callbacks: which callbacks are deferred, where they run, and how lanes end.

`policy` decides which callbacks can be deferred and which of them share a lane, and says why another one stays in
place. `preparing` checks them and makes the parts of a lane. `placement` measures whether a lane saves time, in a
`race`, and moves its callbacks there and back. `plans` puts snapshot nodes into the plans. `deferred_callbacks` has all
of these for one executor. `waiting` brings the events that wait in lanes into a checkpoint and back. `shutdown` ends
the lanes with their learner, or when Python ends.
"""

__all__: list[str] = []
