"""Deferred callbacks: which they are, their lanes, and how these end.

`policy` says which callbacks are deferred, which share a lane, and why one stays in place; `manager` opens their lanes
and puts snapshot nodes into the plans; `shutdown` ends lanes with their learner, or with Python.
"""

__all__: list[str] = []
