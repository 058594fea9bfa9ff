"""Training: the loop over epochs and batches, and what is done around it.

`loop` runs fits and epochs, `step` runs one batch, and `interrupts` ends a fit in good order. `scopes` say what is
open, `dispatch` fires events, `callback_changes` changes the callbacks of a learner. `data` checks the loaders,
`arguments` everything else that a user passes; `sinks` opens and closes the logging backends. `checkpoint` writes the
state of training and reads it back.
"""

__all__: list[str] = []
