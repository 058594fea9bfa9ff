"""flowtrain on dask: independent callbacks of one event run at the same time, with the serial result.

::

    learner = Learner(..., executor="dask")
    learner = Learner(..., executor=DaskExecutor(workers=4))
    print(learner.callbacks.explain())                               # what runs in parallel, and why
    learner.executor.graph(BatchEnd, TrainingPhase)                  # the task graph of one event

Five folders hold the parts, each importing only from those before it.

- `parallel`: from a plan to a dask task graph and to strands; one firing on several threads; when that pays.
- `snapshots`: what a deferred handler reads, copied at its place in the plan, and the view that shows the copy.
- `lanes`: where deferred events wait and are processed, one at a time and in order, in a thread.
- `cluster`: the same in another process: what travels there and back, and what is done when a worker is lost.
- `deferred`: which callbacks are deferred, the lanes that are made for them, and how these end.
- `executor`, beside them, is what a learner sees; it says how each plan is run, and why.
"""

from flowtrain_dask.executor import DaskExecutor, Parallel
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.report import Report
from flowtrain_dask.parallel.task_graph import EventGraph
from flowtrain_dask.snapshots.copiers import register_copier

__all__ = ["DaskExecutor", "EventGraph", "Limits", "Parallel", "Report", "register_copier"]
