"""What flowtrain needs of dask's internals; no other module imports them.

dask's own documentation names other places for these, which do not exist in the versions that are supported.

- `Task` is a node of a graph: a key, a function, and arguments. A `TaskRef` among the arguments is an edge. (A tuple
  ``(f, "a")`` would be one too, but is deprecated, and mistakes any string that equals a key for an edge.)
- `run_graph` is dask's threaded scheduler without its global settings: no callbacks of `dask.diagnostics`, no
  configured cache, chunks of one task. On an error it raises at once and leaves other tasks running, so what it runs
  must not raise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from dask._task_spec import Task, TaskRef
from dask.local import get_async

__all__ = ["Submit", "Task", "TaskRef", "after", "run_graph"]

Submit = Callable[..., "Future[Any]"]
"""Runs ``function(arguments)`` somewhere: the shape of `concurrent.futures.Executor.submit`."""


def after(key: str, function: Callable[..., object], before: Sequence[str] = ()) -> Task:
    """Return a task that runs when the tasks with the keys `before` have run.

    Args:
        key: The key of the new task.
        function: Called with the result of each task in `before`.
        before: The keys of the tasks to wait for.
    """
    return Task(key, function, *(TaskRef(other) for other in before))


def run_graph(graph: Mapping[str, Task], submit: Submit, workers: int) -> None:
    """Run every task of a graph, and return when all have run.

    Args:
        graph: The tasks by key.
        submit: Runs one task. The scheduler itself runs on the calling thread.
        workers: How many tasks may run at the same time.
    """
    get_async(  # type: ignore[no-untyped-call]  # dask leaves it without annotations
        submit,
        workers,
        graph,
        list(graph),
        cache={},
        callbacks=(),
        chunksize=1,
        rerun_exceptions_locally=False,
    )
