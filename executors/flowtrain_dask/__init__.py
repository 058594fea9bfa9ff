"""flowtrain on dask: independent callbacks of one event run at the same time, with the serial result.

::

    learner = Learner(..., executor="dask")
    learner = Learner(..., executor=DaskExecutor(workers=4))
    print(learner.callbacks.explain())                               # what runs in parallel, and why
    learner.executor.graph(BatchEnd, TrainingPhase)                  # the task graph of one event

A plan goes through these modules: `compile` (a task for each handler), `strands` (which handlers on which thread),
`firing` (one event: the barrier, failures), `ways` and `race` (inline or parallel), `executor` (all of it). `compat`
is the only one that imports dask's internals, and `torch_state` the only one that knows what torch keeps for a thread.

What deferred callbacks read goes through these: `snapshots` (what a handler reads, copied at its place in the plan),
`copies` (how each type is copied; `register_copier` for your own), `pool` (memory that is used again), `frozen` (the
view that the handler gets of it) and `codec` (all of it as bytes, for another process).
"""

from flowtrain_dask.executor import DaskExecutor, Parallel
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.report import Report
from flowtrain_dask.parallel.compile import EventGraph
from flowtrain_dask.snapshots.copies import register_copier

__all__ = ["DaskExecutor", "EventGraph", "Limits", "Parallel", "Report", "register_copier"]
