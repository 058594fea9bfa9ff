"""One call to a cluster of real processes: who gets it, when it is given out again, and what ends it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowtrain.errors import ExecutorError
from flowtrain_dask.cluster.calls import ClusterCalls, ClusterLost, Timeouts
from flowtrain_dask.cluster.connect import connect
from flowtrain_dask.cluster.connection import Connection
from flowtrain_dask.cluster.worker import Assignment, Reply, versions
from flowtrain_dask.lanes.transport import Abandoned
from tests.support.transports import StoppedBy
from tests.support.waiting import wait_for

OTHER = versions()._replace(torch="0.0")
REFUSED = pickle.dumps(Assignment("token", OTHER, b"", 0, None, b"", False))
"""The assignment that is answered the quickest: the versions differ."""


class Script:
    """Is some lines of Python when it is unpickled, as the first that a worker does with a blob."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return exec, ("\n".join(self.lines), {})


def script(*lines: str) -> bytes:
    return pickle.dumps(Script(*lines))


class Rig:
    """The calls of one lane, with what a test looks at."""

    def __init__(self, connection: Connection, run: str = "run", lane: str = "Summer", **patience: Any) -> None:
        self.connection = connection
        self.calls = ClusterCalls(connection, run, lane, Timeouts(**patience))
        self.context = StoppedBy()
        self.context.gate = self  # type: ignore[assignment]  # it counts who enters
        self.asked: list[bool] = []
        self.inside = 0
        self.entered = 0

    def __enter__(self) -> None:
        self.inside += 1
        self.entered += 1

    def __exit__(self, *exc: object) -> None:
        self.inside -= 1

    def make(
        self, blob: bytes, whole: bytes = REFUSED, worker: str = "", stopped: Callable[[], bool] = lambda: False
    ) -> Reply:
        def give(all_of_it: bool) -> bytes:
            assert self.inside == 1, "a fork must not interrupt this"
            self.asked.append(all_of_it)
            return whole if all_of_it else blob

        self.context.stopped = stopped
        return self.calls.make(give, worker, self.context)


@pytest.fixture
def own(make_dask_processes: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cluster of this test's own, which gives a task up when one worker has died of it."""
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES", "0")
    return make_dask_processes()


def reach(processes: Any) -> Connection:
    made = connect(processes.address, 60)
    assert made is not None
    return made


def addresses(connection: Connection) -> dict[str, str]:
    """Return the addresses of the workers by name."""
    return {worker["name"]: address for address, worker in connection.workers(10).items()}


def test_a_call_goes_to_the_worker_that_should_have_it(connection: Connection) -> None:
    rig = Rig(connection)
    for address in [*addresses(connection).values()] * 2:
        reply = rig.make(REFUSED, worker=address)
        assert (reply.kind, reply.address, reply.versions) == ("versions", address, versions())
    assert set(rig.asked) == {False}, "all that any worker needs was not needed"
    assert rig.entered == len(rig.asked)
    assert rig.context.counts.restarts == 0


def test_a_call_to_nobody_in_particular_is_answered_by_somebody(connection: Connection) -> None:
    assert Rig(connection).make(REFUSED).address in addresses(connection).values()


def test_a_call_for_a_worker_that_is_gone_is_answered_by_another(connection: Connection) -> None:
    reply = Rig(connection).make(REFUSED, worker="tcp://127.0.0.1:9")
    assert reply.address in addresses(connection).values()


def test_each_call_runs_also_in_a_lane_of_the_same_name(connection: Connection, tmp_path: Path) -> None:
    """dask takes tasks of one key for one task; a resumed run must not meet its earlier results."""
    path = tmp_path / "ran"
    for rig in (Rig(connection), Rig(connection)):
        for _ in range(2):
            rig.make(script(f"open({str(path)!r}, 'a').write('x')"))
    assert path.read_text() == "xxxx"


def test_the_tasks_of_a_lane_of_a_run_are_one_group(connection: Connection) -> None:
    """dask's dashboard draws each group of tasks as a bar of its own, in a colour of its own."""
    for run in ("0a1b2c3d4e5f", "abcdefabcdef"):
        for lane in ("LogMetrics", "LogTraces#2+my-own"):
            rig = Rig(connection, run, lane)
            for _ in range(2):
                rig.make(REFUSED)
    groups: list[str] = connection.client.run_on_scheduler(_groups)  # type: ignore[no-untyped-call]  # no annotations
    assert {group for group in groups if group.endswith(("@0a1b2c3d4e5f", "@abcdefabcdef"))} == {
        f"{lane}@{run}" for run in ("0a1b2c3d4e5f", "abcdefabcdef") for lane in ("LogMetrics", "LogTraces#2+my_own")
    }


def _groups(dask_scheduler: Any) -> list[str]:
    return list(dask_scheduler.task_prefixes)


_groups.__module__ = "__main__"  # pickled by value, since the scheduler cannot import this module


def test_what_goes_wrong_in_an_assignment_is_an_answer(connection: Connection) -> None:
    """dask would run it again elsewhere, and take the worker for broken."""
    rig = Rig(connection)
    for line in ("raise ValueError('bad')", "raise SystemExit(3)", "raise ImportError('nothing here')"):
        reply = rig.make(script(line))
        assert reply.kind == "not picklable"
        assert reply.text in ("ValueError: bad", "SystemExit: 3", "ImportError: nothing here")
    assert rig.make(b"no pickle").kind == "not picklable"
    assert rig.asked == [False] * 4


def test_a_lane_that_is_closed_does_not_wait_for_the_answer(connection: Connection, tmp_path: Path) -> None:
    rig, gone = Rig(connection), tmp_path / "gone"
    waits = script("import os, time", f"while not os.path.exists({str(gone)!r}): time.sleep(0.01)")
    with pytest.raises(Abandoned):
        rig.make(waits, stopped=lambda: True)
    gone.write_text("")
    assert rig.make(REFUSED, stopped=lambda: False).kind == "versions", "the next call is one like any other"


def test_a_client_that_is_closed_has_lost_its_cluster(dask_processes: Any) -> None:
    connection = reach(dask_processes)
    connection.close()
    with pytest.raises(ClusterLost):
        Rig(connection).make(REFUSED)


def test_a_stopped_worker_is_not_waited_for_and_another_gets_all_of_it(dask_processes: Any, tmp_path: Path) -> None:
    """The first answer counts, and what the stopped one says later is nobody's."""
    connection = reach(dask_processes)
    rig = Rig(connection, silent=1.5)
    who = tmp_path / "who"
    text = f"open({str(who)!r}, 'w').write(str(os.getpid()))"
    stop = script("import os, signal", text, "os.kill(os.getpid(), signal.SIGSTOP)")
    try:
        reply = rig.make(stop)
    finally:
        pid = int(who.read_text())
        os.kill(pid, signal.SIGCONT)
    assert reply.kind == "versions"
    assert reply.address != addresses(connection)[dask_processes.pids()[pid]]
    assert rig.asked == [False, True]
    assert rig.entered == 2
    assert rig.context.counts.restarts == 1
    assert rig.make(REFUSED).kind == "versions"
    connection.close()


def test_a_worker_that_only_takes_long_is_waited_for(connection: Connection, tmp_path: Path) -> None:
    """It is heard of, whatever a handler is at: nothing is given out again."""
    rig, seen, go = Rig(connection, silent=1.5), tmp_path / "seen", tmp_path / "go"
    waits = script(
        "import os, time", f"open({str(seen)!r}, 'w')", f"while not os.path.exists({str(go)!r}): time.sleep(0.01)"
    )
    begun = time.monotonic()

    def stopped() -> bool:
        if time.monotonic() > begun + 4:
            go.write_text("")
        return False

    assert rig.make(waits, stopped=stopped).kind == "not picklable", "what it is pickled from is no assignment"
    assert seen.exists()
    assert rig.asked == [False]


def test_a_batch_that_ends_a_worker_is_tried_again_with_all_of_it(own: Any, tmp_path: Path) -> None:
    own.start_worker("a")
    own.start_worker("b")
    connection = reach(own)
    wait_for(lambda: len(connection.workers(10)) == 2)
    rig = Rig(connection, attempts=2)
    reply = rig.make(script("import os", "os._exit(1)"))
    assert reply.kind == "versions"
    assert rig.asked == [False, True]
    assert rig.context.counts.restarts == 1
    assert len(own.pids()) == 1
    connection.close()


def test_a_batch_that_ends_every_worker_is_an_error(own: Any) -> None:
    own.start_worker("a")
    own.start_worker("b")
    connection = reach(own)
    wait_for(lambda: len(connection.workers(10)) == 2)
    rig, end = Rig(connection, attempts=1), script("import os", "os._exit(1)")
    with pytest.raises(ExecutorError) as caught:
        rig.make(end, end)
    text = str(caught.value)
    assert text.startswith(f"A batch of lane Summer failed 2 times on the cluster at {own.address}, the last time")
    assert "KilledWorker" in text
    assert text.endswith("If its handlers end the process (memory, a native library), look at the log of the workers.")
    assert rig.asked == [False, True]
    connection.close()


def test_workers_without_flowtrain_are_an_error_that_says_what_to_install(own: Any, tmp_path: Path) -> None:
    """Here they find a package of that name which is broken."""
    package = tmp_path / "flowtrain_dask"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('no such thing')")
    command = [sys.executable, "-m", "dask", "worker", own.address, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
    own.workers["bare"] = subprocess.Popen(
        [*command, "--local-directory", str(tmp_path), "--death-timeout", "10"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    connection = reach(own)
    with pytest.raises(ExecutorError) as caught:
        Rig(connection).make(REFUSED)
    assert str(caught.value) == (
        f"The workers of {own.address} cannot import flowtrain: ImportError: no such thing. "
        f"Install there what is installed here: pip install 'flowtrain[dask]'"
    )
    connection.close()


def test_a_cluster_without_workers_is_lost_after_a_while(own: Any) -> None:
    own.start_worker("a")
    connection = reach(own)
    own.kill("a")
    wait_for(lambda: not connection.workers(10))
    rig = Rig(connection, alone=0.5)
    with pytest.raises(ClusterLost, match=r"^it has had no worker for 0\.5 s$"):
        rig.make(REFUSED)
    own.start_worker("b")
    wait_for(lambda: connection.workers(10))
    assert rig.make(REFUSED).kind == "versions", "and it is found again"
    connection.close()


def test_a_call_that_was_meant_for_a_worker_that_is_gone_goes_to_one_that_joins(own: Any) -> None:
    """dask forgets it when nobody is there at that moment."""
    own.start_worker("a")
    connection = reach(own)
    [address] = addresses(connection).values()
    own.kill("a")
    wait_for(lambda: not connection.workers(10))
    started: list[object] = []

    def stopped() -> bool:
        started.extend([] if started else [own.start_worker("b")])
        return False

    rig = Rig(connection)
    reply = rig.make(REFUSED, worker=address, stopped=stopped)
    assert reply.kind == "versions"
    assert reply.address == addresses(connection)["b"]
    connection.close()


def test_a_scheduler_that_is_gone_is_not_waited_for(own: Any, tmp_path: Path) -> None:
    own.start_worker("a")
    connection = reach(own)
    gone, seen = tmp_path / "gone", tmp_path / "seen"
    waits = script(
        "import os, time", f"open({str(seen)!r}, 'w')", f"while not os.path.exists({str(gone)!r}): time.sleep(0.01)"
    )

    def kill() -> None:
        wait_for(seen.exists)
        own.scheduler.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ClusterLost, match=f"the scheduler at {own.address} is gone"):
        Rig(connection, away=0.5).make(waits)
    killer.join(20)
    connection.close()


def test_a_scheduler_that_is_stopped_does_not_answer(own: Any) -> None:
    own.start_worker("a")
    connection = reach(own)
    own.scheduler.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(ClusterLost, match=r"^the scheduler does not answer \(TimeoutError\)$"):
            Rig(connection, answer=0.3).make(REFUSED)
    finally:
        own.scheduler.send_signal(signal.SIGCONT)
    connection.close()
