"""State: what a learner holds while it trains, and what a handler sees of it.

`learner_state` is all of it. `container` says what a container of ``cbstate`` can do; `series`, `by_phase` and
`learner_state` have the containers, and `batch` what is known about one batch. `readonly` has the read-only twins of
Python's own containers. `parameters` and `optimizer_view` show the modules and the optimizers by name. `views` compiles
the object that a handler gets as ``learner`` from its declaration, and `partial_view` shows a part of a container.
`device_values` reads values of a device a fixed number of batches late. `detached` shows tensors without their graph,
`random_numbers` gives a callback numbers of its own, and `encoding` makes the plain values of a checkpoint.
"""

__all__: list[str] = []
