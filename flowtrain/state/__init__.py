"""State: what a learner holds while it trains, and what a handler sees of it.

`learner_state` is all of it; `batch`, `series` and `by_phase` are the containers in it, `readonly` their read-only
twins. `parameters` and `optimizer_view` show the modules and the optimizers by name. `views` compiles the object that a
handler gets as ``learner`` from its declaration, and `partial_view` shows a part of a container. `device_values` reads
values of a device a fixed number of batches late. `detached` shows tensors without their graph, `random_numbers` gives
a callback numbers of its own, and `encoding` turns containers into the plain values of a checkpoint and back.
"""

__all__: list[str] = []
