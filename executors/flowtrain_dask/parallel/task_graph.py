"""The dask task graph of a plan: one task for each handler, compiled once.

Users can look at the graph, draw it and run it. Its keys are the labels of the plan's steps. Its edges are the edges of
the plan, without those that follow from others. A task has no other arguments than its edges: it finds the event and
the phase in a `Cell` that all tasks of one plan share, and that is filled for each firing.

Training runs the strands that are derived from this graph (`flowtrain_dask.parallel.strands`), and not the graph
itself, because a dask task costs more than most handlers.

`Task` and `TaskRef` are dask's own classes. A task is a node with a key, a function and arguments; a `TaskRef` among
the arguments is an edge. They are imported from a private module of dask, since the public place that its documentation
names does not exist in the versions that are supported. No other module imports private names of dask. (A tuple
``(f, "a")`` would be a node as well, but it is deprecated, and takes any string that equals a key for an edge.)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

from dask._task_spec import Task, TaskRef

from flowtrain.graph.plan import Plan

__all__ = ["Cell", "EventGraph", "HandlerRun", "Task", "TaskRef", "compile_plan", "direct_predecessors"]


class HandlerRun(Protocol):
    """One firing of a plan, as the tasks of a graph use it."""

    def run(self, position: int) -> None:
        """Run the handler at a position of the plan. Nothing is raised."""


class Cell:
    """Tells the tasks of a graph which firing they belong to.

    Attributes:
        firing: The current firing; ``None`` between two firings, when the tasks do nothing.
    """

    __slots__ = ("firing",)

    def __init__(self) -> None:
        self.firing: HandlerRun | None = None


class EventGraph(dict[str, Task]):
    """A dask graph, a mapping from key to task. `dask.visualize` and `dask.compute` take it as a collection.

    Attributes:
        plan: The plan that the graph was compiled from.
        before: For each position of the plan, its direct predecessors.
        cell: Tells the tasks which firing they belong to.
    """

    def __init__(self, plan: Plan, before: tuple[tuple[int, ...], ...], cell: Cell) -> None:
        super().__init__()
        self.plan = plan
        self.before = before
        self.cell = cell

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
    cell = Cell()
    graph = EventGraph(plan, direct_predecessors(plan), cell)
    keys = [step.label for step in plan.steps]
    if len({*keys}) < len(keys):  # two callbacks may have the same name, and their handlers too
        keys = [f"{key} #{position + 1}" for position, key in enumerate(keys)]
    for position, key in enumerate(keys):
        task = partial(_run, cell, position)
        task.__name__ = key  # type: ignore[attr-defined]  # dask draws this name
        graph[key] = Task(key, task, *(TaskRef(keys[before]) for before in graph.before[position]))
    return graph


def _run(cell: Cell, position: int, *_: object) -> None:
    if cell.firing is not None:
        cell.firing.run(position)
