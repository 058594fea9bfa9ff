"""Callbacks: the classes that users subclass, and the types with which they say when and on what a handler works.

`events` and `phases` are the types that say when a handler runs, and `access` declares the state that it reads and
writes. `callback` has the base class and the decorator `on`, `handler` the registration of one marked method.
`conditions` decide which events a callback skips (``every=``, `throttle`), `resolution` answers a conflict with another
callback, and `view` is the object that a handler gets as ``learner``. `modes` keeps modules in train or eval mode while
a phase runs, and `batch_size` finds how many samples a batch has. `nested` takes nested data of users apart and puts it
together again, for `batch_size` and for every package that goes through such data.
"""

__all__: list[str] = []
