"""The dask task graph of a plan: one task for each handler, compiled once.

Users can look at the graph and draw it. Its keys are the labels of the plan's handlers. Its edges are the edges of the
plan, without those that follow from others. Training runs the strands that are derived from this graph
(`flowtrain_dask.parallel.strands`), because a dask task costs more than most handlers. So the tasks of the graph do
nothing; `EventGraph.tasks` gives ones that run something, and any scheduler of dask runs these with the same results.

`Task` and `TaskRef` are dask's own classes. A task is a node with a key, a function and arguments; a `TaskRef` among
the arguments is an edge. They are imported from a private module of dask, since the public place that its documentation
names does not exist in the versions that are supported. No other module imports private names of dask. (A tuple
``(f, "a")`` would be a node as well, but it is deprecated, and takes any string that equals a key for an edge.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from dask._task_spec import Task, TaskRef

from flowtrain.graph.plan import Plan

__all__ = ["EventGraph", "Task", "TaskRef", "compile_plan", "direct_predecessors"]


class EventGraph(dict[str, Task]):
    """A dask graph, a mapping from key to task. `dask.visualize` and `dask.compute` take it as a collection.

    Attributes:
        plan: The plan that the graph was compiled from.
        before: For each position of the plan, its direct predecessors.
    """

    def __init__(self, plan: Plan, before: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.plan = plan
        self.before = before

    def tasks(self, run: Callable[[int], Any]) -> dict[str, Task]:
        """Return the same graph with tasks that do something, for a scheduler of dask.

        Args:
            run: Called with the position of a handler in the plan, when the tasks of its predecessors are done.
        """
        return {key: Task(key, _run, run, place, *task.args) for place, (key, task) in enumerate(self.items())}

    def __dask_graph__(self) -> dict[str, Task]:
        return dict(self)

    def __dask_keys__(self) -> list[Hashable]:
        return list(self)

    def __dask_layers__(self) -> tuple[str, ...]:
        return (self.__dask_tokenize__(),)

    def __dask_tokenize__(self) -> str:
        return f"{self.plan.event_type.__name__}-{self.plan.phase_type.__name__}-{id(self.plan):x}"

    def __dask_postcompute__(self) -> tuple[Callable[[Any], Any], tuple[()]]:
        return tuple, ()

    def __repr__(self) -> str:
        edges = sum(len(each) for each in self.before)
        return (
            f"EventGraph({self.plan.event_type.__name__}, {self.plan.phase_type.__name__}: "
            f"{len(self)} tasks, {edges} edges)"
        )


def direct_predecessors(plan: Plan) -> tuple[tuple[int, ...], ...]:
    """Return for each position its direct predecessors: the ancestors that are not ancestors of one another."""
    found: list[tuple[int, ...]] = []
    for ancestors in plan.ancestors:
        left = ancestors
        direct: list[int] = []
        while left:
            nearest = left.bit_length() - 1  # the last of the ancestors is an ancestor of none of them
            direct.append(nearest)
            left &= ~(plan.ancestors[nearest] | 1 << nearest)
        found.append(tuple(reversed(direct)))
    return tuple(found)


def compile_plan(plan: Plan) -> EventGraph:
    """Return the task graph of a plan."""
    graph = EventGraph(plan, direct_predecessors(plan))
    keys = [planned.label for planned in plan.handlers]
    if len({*keys}) < len(keys):  # two callbacks may have the same name, and their handlers too
        keys = [f"{key} #{position + 1}" for position, key in enumerate(keys)]
    for position, key in enumerate(keys):
        graph[key] = Task(key, _nothing, *(TaskRef(keys[before]) for before in graph.before[position]))
    return graph


def _nothing(*_: object) -> None: ...  # dask draws the key of a task, not the name of its function


def _run(run: Callable[[int], Any], position: int, *_: object) -> Any:
    return run(position)
