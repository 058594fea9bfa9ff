"""The task graph of a plan: one task for each handler, the edges that are implied by no others."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any, cast

import dask.base
import dask.local
import dask.threaded
import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowtrain_dask
from flowtrain import BatchEnd, Event, Phase, TrainingPhase
from flowtrain.graph.executor import Executor
from flowtrain.graph.plan import Plan
from flowtrain.testing import ExecutorContract, tiny_learner
from flowtrain_dask import DaskExecutor
from flowtrain_dask.parallel.task_graph import Task, TaskRef, compile_plan
from tests.support.examples import examples
from tests.support.executors import Failures, Threads
from tests.support.handlers import Does, nothing, plan_of

KINDS = [type(f"K{number}", (Does,), {}) for number in range(8)]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    count = draw(st.integers(1, len(KINDS)))
    callbacks = [
        KINDS[number](nothing, [KINDS[other] for other in draw(st.sets(st.integers(0, number - 1)))] if number else ())
        for number in range(count)
    ]
    return plan_of(*draw(st.permutations(callbacks)))


@settings(max_examples=examples(150))
@given(plans())
def test_tasks_are_the_handlers_and_edges_the_transitive_reduction(plan: Plan) -> None:
    graph = compile_plan(plan)
    labels = [planned.label for planned in plan.handlers]
    assert list(graph) == labels
    whole: networkx.DiGraph[str] = networkx.DiGraph()
    whole.add_nodes_from(labels)
    whole.add_edges_from((labels[edge.before], labels[edge.after]) for edge in plan.edges)
    found = {(before, after) for after, task in graph.items() for before in task.dependencies}
    assert found == set(networkx.transitive_reduction(whole).edges)
    assert [{labels[before] for before in each} for each in graph.before] == [
        set(graph[label].dependencies) for label in labels
    ]


def test_the_tasks_of_a_graph_do_nothing() -> None:
    graph = compile_plan(plan_of(KINDS[0](nothing)))
    assert dask.threaded.get(graph, list(graph)) == (None,)


@settings(max_examples=examples(30))
@given(plans())
def test_dask_runs_the_tasks_in_the_order_of_the_edges(plan: Plan) -> None:
    graph, ran = compile_plan(plan), list[int]()  # a list is appended to by one thread at a time
    dask.threaded.get(graph.tasks(ran.append), list(graph), num_workers=2)
    assert sorted(ran) == list(range(len(plan)))
    for place, position in enumerate(ran):
        assert plan.ancestors[position] & ~sum(1 << before for before in ran[:place]) == 0


class RunsGraphs(Threads):
    """An executor that lets the synchronous scheduler of dask run the graph of each event."""

    def run(self, plan: Plan, event: Event, phase: Phase) -> Failures:
        """Run the handlers in the order that dask chooses; return the failures in serial order."""
        failures: dict[int, BaseException] = {}
        skipped = 0

        def run(position: int) -> None:
            nonlocal skipped
            failure = None
            if plan.always or not plan.ancestors[position] & skipped:
                failure = self.call(plan.handlers[position], event, phase)
                if failure is None:
                    return
                failures[position] = failure
            skipped |= 1 << position

        graph = compile_plan(plan)
        dask.local.get_sync(graph.tasks(run), list(graph))
        interrupts = [failure for failure in failures.values() if not isinstance(failure, Exception)]
        if interrupts and not plan.always:
            raise interrupts[0]
        return [(plan.handlers[position], failure) for position, failure in sorted(failures.items())]


class TestRunsGraphs(ExecutorContract):
    """The graph has every edge that an executor needs: a scheduler that knows nothing else keeps the contract."""

    def make_executor(self) -> Executor:
        return RunsGraphs()


def test_the_graph_says_what_it_is_of() -> None:
    callbacks = [KINDS[0](nothing), KINDS[1](nothing, [KINDS[0]])]
    graph = compile_plan(plan_of(*callbacks))
    assert repr(graph) == "EventGraph(BatchEnd, TrainingPhase: 2 tasks, 1 edges)"


def test_dask_takes_it_for_a_collection_that_can_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `dask.visualize` hands to graphviz, which need not be installed here."""
    drawn: list[Any] = []

    def draw(dsk: Any, **_: Any) -> None:
        drawn.append(dsk)

    monkeypatch.setattr(dask.base, "visualize_dsk", draw)
    callbacks = [KINDS[0](nothing), KINDS[1](nothing, [KINDS[0]])]
    graph = compile_plan(plan_of(*callbacks))
    dask.base.visualize(graph)
    [dsk] = drawn
    assert {key: set(task.dependencies) for key, task in dict(dsk).items()} == {
        "K0.batch": set(),
        "K1.batch": {"K0.batch"},
    }


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_dask_draws_the_graph(tmp_path: Path) -> None:
    """Each handler by its label, and an arrow for each edge; dask draws another from each task to its result."""
    pytest.importorskip("graphviz")
    learner = tiny_learner(executor="dask")
    graph = cast(DaskExecutor, learner.executor).graph(BatchEnd, TrainingPhase)
    dask.base.visualize(graph, filename=str(tmp_path / "graph"), format="svg")
    drawn = (tmp_path / "graph.svg").read_text("utf-8")
    boxes = re.findall(r"<text[^>]*>([^<]+)<", drawn)
    assert sorted(box for box in boxes if "." in box) == sorted(graph)
    assert drawn.count('class="edge"') == len(graph) + sum(len(before) for before in graph.before)


def test_a_text_that_is_also_a_key_is_no_edge() -> None:
    """Why the graph is made of dask's tasks, and not of tuples."""
    seen: list[object] = []
    graph = {
        "a": Task("a", lambda: 1),
        "text": Task("text", seen.append, "a"),
        "edge": Task("edge", seen.append, TaskRef("a")),
    }
    dask.threaded.get(graph, list(graph))
    assert sorted(seen, key=str) == [1, "a"]
    assert set(graph["text"].dependencies) == set()


def test_no_other_module_imports_what_dask_calls_its_own() -> None:
    package = Path(flowtrain_dask.__file__).parent
    found = {
        str(path.relative_to(package)): name
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom)
            else [each.name for each in node.names] if isinstance(node, ast.Import)
            else []
        )
        if name == "dask.local" or name.startswith("dask._")
    }  # fmt: skip
    assert set(found) == {str(Path("parallel", "task_graph.py"))}
