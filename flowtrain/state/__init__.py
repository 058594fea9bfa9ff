"""State: the state of a learner while it trains, and the views through which handlers see it.

`learner_state` has the state as a whole, `batch` the state of one batch, `namespace` that of callbacks, ``cbstate``,
and `series` and `by_phase` the containers in it, whose common protocol is in `container`. `readonly` makes read-only
twins of Python's own containers. `parameters` and `optimizer_view` show modules and optimizers by name, and
`hyperparameters` has the values of an optimizer that schedules set. `views` compiles the view for a declaration, and
`partial_view` shows a part of a container. `accelerator` is the seam to accelerators of all kinds, and `device_values`
reads values of the device a fixed number of batches late. `late_writes` keeps what handlers write with a lag, and
`arrivals` lets it arrive at the event that the lag says. `detached` shows tensors without their graph, `shards` puts
tensors together of which each rank holds a part, `random_numbers` seeds the generators for deferrable callbacks, and
`encoding` makes the plain values of a checkpoint.
"""

__all__: list[str] = []
