"""Training: the loop over epochs and batches, and what is done around it.

`loop` runs fits, epochs and batches, `step` and `step_site` one batch; `scopes` say what is open, `dispatch` fires
events, `interrupts` end a fit in good order. `data` are the loaders, `arguments` what a user passes, checked; `sinks`
are the logging backends of a learner. `checkpoint` writes the state of training and reads it back.
"""

__all__: list[str] = []
