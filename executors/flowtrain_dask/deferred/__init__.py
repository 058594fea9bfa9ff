"""Deferred callbacks: which callbacks are deferred, their lanes, and how lanes end.

`policy` decides which callbacks can be deferred and which of them share a lane, and says why another one stays in
place. `placement` measures whether a lane saves time, and moves its callbacks there and back. `deferred_callbacks`
makes the lanes and puts snapshot nodes into the plans. `waiting` brings the events that wait in lanes into a checkpoint
and back. `shutdown` ends the lanes with their learner, or when Python ends.
"""

__all__: list[str] = []
