"""The interface of callbacks: the base class of all, and the types with which one says when and on what it works.

The bundled callbacks, which are built on this interface, are in `flowtrain.callbacks`.

`events` and `phases` are the types that say when a handler runs, and `access` declares the state that it reads and
writes. `callback` has the base class and the decorator `on`, `handler` the registration of one marked method.
`conditions` decide which events a callback skips (``every=``, `flowtrain.callbacks.throttle`), `resolution` answers a
conflict with another callback, and `view` has the object that handlers get as ``learner``; steps get the `StepContext`
of `phases`. `modes` sets the train and eval modes of modules while a phase runs.
"""

__all__: list[str] = []
