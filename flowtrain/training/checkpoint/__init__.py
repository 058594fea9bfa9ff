"""Checkpoints: the whole state of training in one file, and back.

`manager` takes one when a handler asks for it, and resumes from one; `contents` gathers the state of a learner and puts
it back; `files` writes them, complete or not at all; `position` is how far a fit is in its data, `rng` the states of
the random number generators.
"""

__all__: list[str] = []
