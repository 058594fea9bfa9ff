"""A training that is killed again and again, and resumes to the result of the training that nobody killed.

::

    python -m tests.kill --runs 100

Each run trains one variant (`training`). Its process meets up to four faults (`faults`): it is killed at a random
moment, at a random file operation, in a checkpoint, a flush, a resume or an interrupt; or the disk is full, read-only,
or its folder is gone. Then the program is started again, with a random executor, until it ends by itself. What it
leaves is compared (`compare`) with the same training without faults: parameters, optimizer, histories, state of
callbacks, generators, and every log.
"""
