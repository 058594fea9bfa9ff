"""What is used of dask's internals does what its documentation here says, whatever dask is set to elsewhere."""

from __future__ import annotations

import ast
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import dask.callbacks
import dask.config
import pytest

import flowtrain_dask
from flowtrain_dask.parallel.task_graph import Task, TaskRef, after, run_graph

TIMEOUT = 20.0
"""Seconds after which a test that waits for another thread has failed."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


def graph_of(*tasks: Task) -> dict[str, Task]:
    return {str(task.key): task for task in tasks}


def test_a_task_runs_after_those_before_it_and_gets_their_results_in_order(pool: ThreadPoolExecutor) -> None:
    seen: list[tuple[object, ...]] = []
    graph = graph_of(
        after("last", lambda *results: seen.append(results), ["b", "a"]),
        after("a", lambda: 1),
        after("b", lambda *results: 1 + len(results), ["a"]),
    )
    assert set(graph["last"].dependencies) == {"a", "b"}
    assert set(graph["a"].dependencies) == set()
    run_graph(graph, pool.submit, 2)
    assert seen == [(2, 1)]


def test_a_text_that_is_also_a_key_is_no_edge(pool: ThreadPoolExecutor) -> None:
    seen: list[object] = []
    graph = graph_of(after("a", lambda: 1), Task("text", seen.append, "a"), Task("edge", seen.append, TaskRef("a")))
    run_graph(graph, pool.submit, 1)
    assert sorted(seen, key=str) == [1, "a"]
    assert set(graph["text"].dependencies) == set()


def test_all_tasks_have_run_when_it_returns(pool: ThreadPoolExecutor) -> None:
    """Also those whose results nobody asks for, and of the same graph each time."""
    ran: list[int] = []
    graph = graph_of(*(after(f"t{number}", partial(ran.append, number)) for number in range(50)))
    for _ in range(2):
        run_graph(graph, pool.submit, 4)
        assert sorted(ran) == list(range(50))
        ran.clear()


def test_as_many_tasks_as_there_are_workers_run_at_the_same_time_and_no_more(pool: ThreadPoolExecutor) -> None:
    meet = threading.Barrier(2, timeout=TIMEOUT)
    handed: list[Future[Any]] = []
    most: list[int] = []

    def submit(function: Any, tasks: Any) -> Future[Any]:
        most.append(1 + sum(not each.done() for each in handed))
        handed.append(pool.submit(function, tasks))
        return handed[-1]

    run_graph(graph_of(*(after(f"t{number}", meet.wait) for number in range(8))), submit, 2)
    assert max(most) == 2


def test_tasks_are_handed_out_one_by_one_by_the_thread_that_calls(pool: ThreadPoolExecutor) -> None:
    calls: list[tuple[int, int]] = []

    def submit(function: Any, tasks: Any) -> Future[Any]:
        calls.append((threading.get_ident(), len(tasks)))
        return pool.submit(function, tasks)

    run_graph(graph_of(*(after(f"t{number}", lambda: None) for number in range(5))), submit, 4)
    assert calls == [(threading.get_ident(), 1)] * 5


def test_an_error_is_raised_at_once_while_others_run(pool: ThreadPoolExecutor) -> None:
    """So what it runs must not raise."""
    opened, ended = threading.Event(), threading.Event()

    def fail() -> None:
        raise ValueError("broken")

    def slow() -> None:
        assert opened.wait(TIMEOUT)
        ended.set()

    with pytest.raises(ValueError, match="broken"):
        run_graph(graph_of(after("fail", fail), after("slow", slow)), pool.submit, 2)
    assert not ended.is_set()
    opened.set()
    assert ended.wait(TIMEOUT)


def test_settings_and_callbacks_of_dask_do_not_reach_it(pool: ThreadPoolExecutor) -> None:
    """``chunksize=-1`` would crash dask's scheduler, and a global progress bar would count our tasks."""
    tasks: list[str] = []

    class Watches(dask.callbacks.Callback):
        def _pretask(self, key: str, dsk: Any, state: Any) -> None:
            tasks.append(key)

    ran: list[str] = []
    graph = graph_of(after("a", lambda: ran.append("A")), after("b", lambda: ran.append("B")))
    watches = Watches()  # type: ignore[no-untyped-call]  # dask's own has no annotations
    with dask.config.set(chunksize=-1, scheduler="processes", num_workers=1), watches:
        run_graph(graph, pool.submit, 2)
    assert sorted(ran) == ["A", "B"]
    assert tasks == []


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
    assert set(found) == {str(Path("parallel", "compat.py"))}
