"""From a plan to a dask task graph: one task for each handler, made once.

The graph is what a user can look at, draw and even run. Its keys are the labels of the plan's steps, and its edges are
the plan's edges without those that others imply. The tasks take nothing but these edges: the event and the phase come
from a `Cell` that all tasks of one plan share, and which is filled for each firing. What an event really runs is
derived from it, see `flowtrain_dask.parallel.strands`: a dask task for every handler costs more than most handlers do.

`Task` and `TaskRef` are dask's own: a task is a node, with a key, a function and arguments, and a `TaskRef` among the
arguments is an edge. dask's documentation names another place for them, which does not exist in the versions that are
supported. (A tuple ``(f, "a")`` would be a node too, but is deprecated, and mistakes any string that equals a key for
an edge.) No other module imports what dask keeps for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol

from dask._task_spec import Task, TaskRef

from flowtrain.graph.plan import Plan

__all__ = ["Cell", "EventGraph", "HandlerRun", "Task", "TaskRef", "compile_plan", "direct_predecessors"]


class HandlerRun(Protocol):
    """One firing of a plan, as far as the tasks of its graph need it."""

    def run(self, position: int) -> None:
        """Run the handler at a position of the plan; does not raise."""


class Cell:
    """Where the tasks of a graph find the firing that they work for.

    Attributes:
        firing: The current firing; ``None`` between two.
    """

    __slots__ = ("firing",)

    def __init__(self) -> None:
        self.firing: HandlerRun | None = None


class EventGraph(dict[str, Task]):
    """A dask graph that `dask.visualize` and `dask.compute` take as a collection: key to task.

    Attributes:
        plan: The plan that it was compiled from.
        before: For each position of the plan, the positions with an edge to it.
        cell: What the tasks share.
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
    """Return for each position the positions that it waits for, without those that another of them waits for."""
    found: list[tuple[int, ...]] = []
    for ancestors in plan.ancestors:
        left = ancestors
        direct: list[int] = []
        while left:
            nearest = left.bit_length() - 1  # no other ancestor comes after it, so no other edge implies this one
            direct.append(nearest)
            left &= ~(plan.ancestors[nearest] | 1 << nearest)
        found.append(tuple(reversed(direct)))
    return tuple(found)


def compile_plan(plan: Plan) -> EventGraph:
    """Return the task graph of a plan."""
    cell = Cell()
    graph = EventGraph(plan, direct_predecessors(plan), cell)
    keys = [step.label for step in plan.steps]
    if len({*keys}) < len(keys):  # two callbacks of one name, each with a handler of one name
        keys = [f"{key} #{position + 1}" for position, key in enumerate(keys)]
    for position, key in enumerate(keys):
        task = partial(_run, cell, position)
        task.__name__ = key  # type: ignore[attr-defined]  # what dask draws
        graph[key] = Task(key, task, *(TaskRef(keys[before]) for before in graph.before[position]))
    return graph


def _run(cell: Cell, position: int, *_: object) -> None:
    if cell.firing is not None:
        cell.firing.run(position)
