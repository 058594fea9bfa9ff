"""Deferred callbacks: which callbacks are deferred, their lanes, and how lanes end.

`policy` decides which callbacks are deferred and which of them share a lane, and says why another one stays in place.
`deferred_callbacks` makes the lanes and puts snapshot nodes into the plans. `shutdown` ends the lanes with their
learner, or when Python ends.
"""

__all__: list[str] = []
