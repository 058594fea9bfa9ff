"""Callbacks: what users write, and the words in which they say what it touches.

`events` and `phases` are the types that say when a handler runs; `access` is what it declares to read and write;
`callback` is the base class with `on`, `handler` one marked method; `conditions` skip events (``every=``, `throttle`),
`resolution` answers a conflict with another callback, `view` is the object that a handler gets as ``learner``, and
`modes` keeps modules in train or eval mode while a phase runs.
"""

__all__: list[str] = []
