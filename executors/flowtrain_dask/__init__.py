"""flowtrain on dask: independent callbacks of one event run at the same time, with the serial result.

::

    learner = Learner(..., executor="dask")
    learner = Learner(..., executor=DaskExecutor(workers=4))
    print(learner.callbacks.explain())                               # what runs in parallel, and why
    learner.executor.graph(BatchEnd, TrainingPhase)                  # the task graph of one event

A plan goes through these modules: `compile` (a task for each handler), `strands` (which handlers on which thread),
`firing` (one event: the barrier, failures), `ways` and `race` (inline or parallel), `executor` (all of it). `compat`
is the only one that imports dask's internals, and `torch_state` the only one that knows what torch keeps for a thread.
"""

from flowtrain_dask.compile import EventGraph
from flowtrain_dask.executor import DaskExecutor, Parallel

__all__ = ["DaskExecutor", "EventGraph", "Parallel"]
