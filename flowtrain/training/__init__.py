"""Training: the loop over epochs and batches, and the services that the loop calls.

`calls` has the calls of a user, with their checks, `loop` runs fits and epochs, `step` runs one batch, and `interrupts`
ends a fit at a batch boundary after a signal. `scopes` records which of fit, epoch and batch are open, `dispatch` fires
events, `failures` collects what is raised on the way, `step_errors` says what is wrong with a step that fails.
`callback_changes` changes the callbacks of a learner. `fit_data` checks the loaders, `arguments` checks every other
argument of a user; `sinks` opens and closes the logging backends. `checkpoint` writes the state of training to a file
and restores it.

`together` says what the loop asks of all processes that train together, and `sync` what a step asks of them; `ranks`
does it where they are several.
"""

__all__: list[str] = []
