"""What looks at a learner without changing its training.

`strict` compares the state around every handler; `suggest_access` runs a callback to find what it must declare;
`sync_audit` finds what makes the host wait for a device; `lr_finder` trains a copy with growing learning rates; all of
them work on a `scratch_learner`. `plots` draws what was recorded, `figure` with matplotlib.
"""

__all__: list[str] = []
