"""flowtrain on dask: independent callbacks of one event run at the same time, with the serial result.

::

    learner = Learner(..., executor="dask")
    learner = Learner(..., executor=DaskExecutor(workers=4))
    print(learner.callbacks.explain())                               # which callbacks run in parallel, and why
    learner.executor.graph(BatchEnd, TrainingPhase)                  # the task graph of one event

Deferrable callbacks run beside training, in threads or on a dask cluster, also with the serial result.

Each of the five folders imports only from those before it:

- `parallel`: the task graph of a plan, its strands, their threads, and the decision whether running them is faster.
- `snapshots`: copies of the state that a deferred handler declares to read, and the view that shows them.
- `lanes`: queues of deferred events, which few threads process; those of one lane one at a time and in order.
- `cluster`: lanes whose handlers run in other processes.
- `deferred`: the decision which callbacks are deferred, their lanes, and how lanes end.

`executor`, beside them, has the class that a learner uses. It chooses how each plan is run, and `route` holds the
choice and says why. `what_if` estimates what it would save.
"""

from flowtrain_dask.executor import DaskExecutor
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.report import Report
from flowtrain_dask.parallel.task_graph import EventGraph
from flowtrain_dask.route import Parallel
from flowtrain_dask.snapshots.copiers import register_copier

__all__ = ["DaskExecutor", "EventGraph", "Limits", "Parallel", "Report", "register_copier"]
