"""Training: the loop over epochs and batches, and the services that the loop calls.

`calls` has the calls of a user, with their checks, `loop` runs fits and epochs, `step` runs one batch, and `interrupts`
ends a fit at a batch boundary after a signal. `scopes` records which of fit, epoch and batch are open, `dispatch` fires
events, `callback_changes` changes the callbacks of a learner. `fit_data` checks the loaders, `arguments` checks every
other argument of a user; `sinks` opens and closes the logging backends. `checkpoint` writes the state of training to a
file and restores it.

On several ranks, `ranks` has the points at which they agree, and `rank_loop`, `rank_steps` and `rank_data` put these
into the loop, the step and the data; `sharded_evaluation` evaluates a sharded model on all ranks together.
"""

__all__: list[str] = []
