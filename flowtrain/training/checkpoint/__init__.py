"""Checkpoints: the whole state of training is saved in one file and restored from it.

`checkpoints` takes a checkpoint when a handler requests one, and resumes a fit from one. `contents` gathers the state
of a learner and restores it. `changes` handles the changes that training has made to modules and optimizers and that no
``state_dict`` holds: `attributes` records attributes, modes and hooks, `parameter_groups` the groups of optimizers.
`files` writes checkpoint files, complete or not at all; `reading` finds and reads them, and refuses damaged ones;
`form` tells which contents are possible; `folder_lock` lets one process at a time train into a folder, whose owner
`lock_file` names. `position` knows how far a fit is in its data, `rng` the states of the random number generators.
`parts` says what all processes that train do together for a checkpoint, and `rank_checkpoints` does it where they are
several; `rank_parts` has the entries of a checkpoint that differ between ranks, and `shard_files` knows the files in
which each rank has its part of a sharded model. `remote` has the folders of object stores.
"""

__all__: list[str] = []
