"""Lanes on a cluster of real processes: exact records and state, whatever dies (rules 25, 26, 27)."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # it has no annotations
import pytest
import torch

from flowtrain import BatchEnd, Callback, LearnerView, TrainingPhase, on
from flowtrain.errors import ExecutorError
from flowtrain.logging.backend import Group, LoggerBackend, Value
from flowtrain.logging.records import identity, log
from flowtrain_dask.cluster import connection as connection_module
from flowtrain_dask.cluster import transport as transport_module
from flowtrain_dask.cluster import worker
from flowtrain_dask.cluster.block import Block, BlockPlace, possible
from flowtrain_dask.cluster.calls import Timeouts
from flowtrain_dask.cluster.connect import connect
from flowtrain_dask.cluster.connection import Connection
from flowtrain_dask.cluster.transport import ClusterTransport
from flowtrain_dask.lanes.lane import Lane
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.threads import LaneThreads
from flowtrain_dask.lanes.transport import OnLoss
from flowtrain_dask.lanes.work import BatchResult
from tests.support.lanes import Memory, job_of
from tests.support.transports import MakeTransport, TransportContract
from tests.support.untyped import untyped
from tests.support.waiting import wait_for

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

GROUP: Group = ("Step", "TrainingPhase")


class Summer(Callback):
    """Logs a running sum, which is wrong as soon as an event is lost, doubled or out of order."""

    def __init__(self, backend: LoggerBackend, folder: Path, name: str = "Summer", ballast: int = 0) -> None:
        self.backends = (backend,)
        self.backend = backend  # the same object, also after the state has come home
        self.name = name
        self.folder = folder
        self.total = 0
        self.kept: list[torch.Tensor] = []
        self.own = self.take  # an attribute that refers to the callback
        self.ballast = torch.zeros(ballast)

    @on(BatchEnd, TrainingPhase)
    def take(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Add a number; say which process is at it; take the time that the payload asks for."""
        payload = learner.batch.inputs
        number = payload["number"]
        if "large" in payload:
            number += int(payload["large"][-1])
            self.kept.append(payload["large"])
            assert [int(each[0]) for each in self.kept] == list(range(len(self.kept))), "what it kept has changed"
        if payload.get("raise"):
            raise ValueError(f"number {number}")
        if payload.get("cycle"):
            raise RecursionError("too deep")
        self.total = self.total * 31 % 1_000_003 + number
        (self.folder / "at-work").write_text(f"{os.getpid()} {number}")
        time.sleep(payload.get("sleep", 0))
        if payload.get("exit_in") == os.getpid():
            os._exit(1)
        if self.ballast.numel():
            self.ballast += 1
        me = identity()
        assert me is not None
        log(self.backends, Value(self.total), self.name, me.sequence, GROUP)


def expected(numbers: range, name: str = "Summer") -> list[str]:
    total, records = 0, []
    for sequence, number in enumerate(numbers):
        total = total * 31 % 1_000_003 + number
        records.append(f"{name} {sequence} {total}")
    return records


_THREADS: list[LaneThreads] = []
"""The threads of the lanes that the present test has made."""


@pytest.fixture(autouse=True)
def end_threads() -> Iterator[None]:
    """End the threads of lanes after each test: tests of other files count such threads."""
    yield
    while _THREADS:
        _THREADS.pop().close()


class Rig:
    """A lane on a cluster, with what a test looks at."""

    def __init__(self, connection: Connection, *callbacks: Summer, on_loss: OnLoss = "local", **kwargs: Any) -> None:
        self.callbacks = callbacks
        self.job = job_of(*callbacks)
        self.transport = ClusterTransport(self.job, callbacks, connection, on_loss, linger=0.02, **kwargs)
        self.transport.open(60)
        self.urgent: list[Callable[[], None]] = []
        _THREADS.append(LaneThreads())
        self.lane = Lane(self.job, self.transport, Limits(), _THREADS[-1], raise_on_training_thread=self.urgent.append)

    def wait_for(self, records: int) -> None:
        """Wait until so many records are written; a failure of the lane ends it."""
        memory = self.callbacks[0].backend
        assert isinstance(memory, Memory)
        deadline = time.monotonic() + 60
        while len(memory.records) < records:
            self.lane.raise_failure()
            assert time.monotonic() < deadline, f"{len(memory.records)} records of {records}: {self.lane.report()}"
            time.sleep(0.005)

    def put(self, number: int, handler: int = 0, **payload: Any) -> None:
        inputs = {"number": number, **payload}
        self.lane.put(handler, BatchEnd(), TrainingPhase(), {("batch", "inputs"): inputs}, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def at_work(folder: Path) -> int:
    """Return the process that was at work on the last event; 0 if none was yet."""
    try:
        return int((folder / "at-work").read_text().split()[0])
    except (FileNotFoundError, IndexError):
        return 0


def blocks() -> int:
    """Return how many blocks this process has open."""
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return sum("memfd:flowtrain" in os.readlink(link) for link in links if os.path.islink(link))


class TestContract(TransportContract):
    @pytest.fixture
    def make(self, connection: Connection) -> MakeTransport:
        return lambda job, callbacks: ClusterTransport(job, callbacks, connection)


def test_records_and_state_come_home(connection: Connection, folder: Path) -> None:
    """Rule 25: workers hand back records, the driver writes them. Rule 26: the attributes come home, backends stay."""
    backend = Memory()
    one, two = Summer(backend, folder, "one"), Summer(backend, folder, "two")
    rig = Rig(connection, one, two)
    for number in range(300):
        rig.put(number, handler=number % 2)
    assert rig.lane.flush(60)
    rig.lane.raise_failure()
    assert at_work(folder) not in (0, os.getpid())
    assert len(backend.records) == 300
    assert [int(record.split()[1]) for record in backend.records] == list(range(300))
    assert one.total == int(backend.records[298].split()[2])
    assert two.total == int(backend.records[299].split()[2])
    assert one.backend is backend
    assert one.backends == (backend,)
    assert getattr(one.own, "__self__", None) is one
    report = rig.lane.report()
    assert report.where.startswith(connection.address)
    assert (report.done, report.pending, report.counts.records) == (300, 0, 300)
    rig.lane.close()


def test_a_large_state_stays_on_the_worker(
    connection: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue: large state does not travel with every batch; it is at home after a flush."""
    sent: list[int] = []
    make = ClusterTransport._assignment  # pyright: ignore[reportPrivateUsage]  # what is sent is what is tested

    def watch(self: ClusterTransport, *args: Any, **more: Any) -> bytes:
        blob = make(self, *args, **more)
        sent.append(len(blob))
        return blob

    monkeypatch.setattr(ClusterTransport, "_assignment", watch)
    backend = Memory()
    summer = Summer(backend, folder, ballast=1_000_000)
    rig = Rig(connection, summer)
    for batch in range(5):
        rig.put(batch)
        rig.wait_for(batch + 1)
    assert rig.lane.flush(60)
    rig.lane.raise_failure()
    assert backend.records == expected(range(5))
    assert float(summer.ballast[0]) == 5.0
    assert [size > 4_000_000 for size in sent].count(True) <= 3  # to open, to begin, and after the first came home
    assert len(sent) >= 6
    rig.lane.close()


@pytest.mark.skipif(not possible(), reason="this system has no memfd_create")
@pytest.mark.parametrize("near", [True, False])
def test_large_events_are_left_in_memory_for_workers_that_find_them(
    connection: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch, near: bool
) -> None:
    """They are sent to a worker that does not: it says so, and nothing has been run."""
    sent: list[int] = []
    make, fill = ClusterTransport._assignment, Block.fill  # pyright: ignore[reportPrivateUsage]  # as above

    def watch(self: ClusterTransport, entries: Any, *args: Any, **more: Any) -> bytes:
        blob = make(self, entries, *args, **more)
        if entries:
            sent.append(len(blob))
        return blob

    def misplace(self: Block, pieces: Any) -> BlockPlace:
        return fill(self, pieces)._replace(process=2**22 + 1)  # as if it were on another machine

    monkeypatch.setattr(ClusterTransport, "_assignment", watch)
    if not near:
        monkeypatch.setattr(Block, "fill", misplace)
    backend = Memory()
    rig = Rig(connection, Summer(backend, folder))
    for number in range(6):
        rig.put(0, large=torch.full((200_000,), number))
        if number % 2:
            rig.wait_for(number + 1)
    assert rig.lane.flush(60)
    rig.lane.raise_failure()
    assert backend.records == expected(range(6))
    assert rig.lane.report().counts.restarts == 0
    large = [size > 800_000 for size in sent]
    wanted = [False] * len(large) if near else [False, *[True] * (len(large) - 1)]
    assert large == wanted, "tried once where it is not near, and from then on sent"
    assert len(large) >= 3, "it was waited for after each two"
    assert ("batches are sent" in rig.lane.report().where) is not near
    assert blocks() == 1, "it is kept for the next batch"
    rig.lane.close()
    assert blocks() == 0


@pytest.mark.skipif(not possible(), reason="this system has no memfd_create")
def test_where_there_is_no_memory_batches_are_sent(
    connection: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a block is full in the middle of a batch; the next batch is tried again."""
    fill, rest = Block.fill, iter([False, True, False])

    def refuse(self: Block, pieces: Any) -> BlockPlace:
        place = fill(self, pieces)
        if next(rest):
            raise OSError(28, "No space left on device")
        return place

    monkeypatch.setattr(Block, "fill", refuse)
    backend = Memory()
    rig = Rig(connection, Summer(backend, folder))
    for number in range(3):
        rig.put(0, large=torch.full((200_000,), number))
        rig.wait_for(number + 1)
    assert backend.records == expected(range(3))
    assert "batches are sent" not in rig.lane.report().where
    assert next(rest, None) is None
    rig.lane.close()
    assert blocks() == 0


@pytest.mark.parametrize("ballast", [0, 1_000_000])
def test_a_killed_worker_loses_and_doubles_nothing(dask_processes: Any, folder: Path, ballast: int) -> None:
    """Rule 25: SIGKILL with a batch in flight; a worker joins meanwhile."""
    connection = connect(dask_processes.address, 60)
    assert connection is not None
    backend = Memory()
    summer = Summer(backend, folder, ballast=ballast)
    rig = Rig(connection, summer)
    for number in range(20):
        rig.put(number)
    rig.wait_for(20)
    for kill in range(2 if ballast else 1):
        (folder / "at-work").unlink(missing_ok=True)
        rig.put(20 + 2 * kill, sleep=0.3)
        rig.put(21 + 2 * kill)
        pids = dask_processes.pids()
        wait_for(lambda pids=pids: at_work(folder) in pids)  # type: ignore[misc]  # a default argument
        name = pids[at_work(folder)]
        dask_processes.start_worker(f"{name}-{kill}-{ballast}")
        dask_processes.kill(name)
        rig.wait_for(22 + 2 * kill)
    assert rig.lane.flush(60)
    rig.lane.raise_failure()
    assert backend.records == expected(range(24 if ballast else 22))
    assert summer.total == int(backend.records[-1].split()[2])
    if ballast:
        assert float(summer.ballast[0]) == 24.0
    rig.lane.close()
    connection.close()


def test_a_retiring_worker_takes_its_state_along(dask_processes: Any, connection: Connection, folder: Path) -> None:
    """Rule 25: a large state that was on a worker which leaves is made again from home and the events since."""
    backend = Memory()
    summer = Summer(backend, folder, ballast=1_000_000)
    rig = Rig(connection, summer)
    for number in range(6):
        rig.put(number)
        rig.wait_for(number + 1)
    holder = rig.lane.report().where.rpartition(" ")[2]
    name = dask_processes.pids()[at_work(folder)]
    dask_processes.start_worker(f"{name}-next")
    wait_for(lambda: len(connection.workers(10)) >= 3)
    connection.client.retire_workers([holder])
    rig.put(6)
    assert rig.lane.flush(60)
    rig.lane.raise_failure()
    assert backend.records == expected(range(7))
    assert float(summer.ballast[0]) == 7.0
    report = rig.lane.report()
    assert report.counts.replays >= 1
    assert report.counts.records == 7
    rig.lane.close()


def test_a_stopped_worker_is_not_waited_for(dask_processes: Any, folder: Path) -> None:
    """Rule 25: SIGSTOP: another worker does it; when the stopped one goes on, its result changes nothing."""
    connection = connect(dask_processes.address, 60)
    assert connection is not None
    backend = Memory()
    summer = Summer(backend, folder)
    rig = Rig(connection, summer, patience=Timeouts(silent=2.0))
    rig.put(0, sleep=0.5)
    pids = dask_processes.pids()
    wait_for(lambda: at_work(folder) in pids)
    name = pids[at_work(folder)]
    dask_processes.stop(name)
    try:
        rig.put(1)
        rig.wait_for(2)
    finally:
        dask_processes.go_on(name)
    rig.put(2)
    assert rig.lane.flush(60)
    rig.lane.raise_failure()
    assert backend.records == expected(range(3))
    assert rig.lane.report().counts.restarts == 1
    assert "1 batches given out again" in "\n".join(rig.lane.report().troubles())
    rig.lane.close()
    connection.close()


def test_a_handler_that_raises_on_a_worker(connection: Connection, folder: Path) -> None:
    """Rule 27: with its event, its traceback there, and the records before it; deep recursion is an error as others."""
    backend = Memory()
    summer = Summer(backend, folder)
    rig = Rig(connection, summer)
    rig.put(0)
    rig.put(1)
    rig.put(2, **{"raise": True})
    rig.put(3)
    assert rig.lane.flush(60)
    assert backend.records == expected(range(2))
    with pytest.raises(ValueError, match="number 2") as caught:
        rig.urgent[0]()
    where, trace = caught.value.__notes__
    assert where == "raised in Summer.take at (BatchEnd, TrainingPhase), deferred as event 2 of lane Summer"
    assert trace.startswith("on the worker:\n")
    assert "in take" in trace
    rig.put(4, cycle=True)
    assert rig.lane.flush(60)
    with pytest.raises(RecursionError, match="too deep"):
        rig.lane.raise_failure()
    rig.put(2)
    assert rig.lane.flush(60)
    assert [record.split()[2] for record in backend.records] == [e.split()[2] for e in expected(range(3))]
    rig.lane.close()


def test_the_scheduler_dies(make_dask_processes: Callable[[], Any], folder: Path) -> None:
    """Issue: the pending events are processed in this process, and the report says so; or it is an error."""
    processes = make_dask_processes()
    processes.start_worker("a")
    connection = connect(processes.address, 60)
    assert connection is not None
    backend, other = Memory(), Memory()
    local, strict = Summer(backend, folder, ballast=1_000_000), Summer(other, folder, "strict")
    rig = Rig(connection, local, patience=Timeouts(away=0.5))
    raising = Rig(connection, strict, patience=Timeouts(away=0.5), on_loss="raise")
    for number in range(10):
        rig.put(number)
        rig.wait_for(number + 1)
    rig.put(10, sleep=0.2, large=torch.full((200_000,), 0))
    rig.put(11)
    processes.scheduler.kill()
    processes.scheduler.wait(20)
    raising.put(0)
    assert rig.lane.flush(60)
    rig.lane.raise_failure()
    assert backend.records == expected(range(12))
    assert float(local.ballast[0]) == 12.0
    assert blocks() == 0, "no worker is there to read it"
    report = rig.lane.report()
    assert report.where == f"thread ({connection.address} was lost)"
    assert report.counts.local >= 1
    assert "the cluster was lost" in "\n".join(report.troubles())
    raising.lane.flush(60)
    with pytest.raises(ExecutorError, match=r"was lost during training \(.*on_cluster_loss=\"local\""):
        raising.lane.raise_failure()
    rig.lane.close()
    raising.lane.close()
    connection.close()


def test_what_fails_in_the_replay_for_the_state_is_raised(
    make_dask_processes: Callable[[], Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large state was on the worker and is lost; where an event cannot be run again, that state cannot be had."""
    processes = make_dask_processes()
    processes.start_worker("a")
    connection = connect(processes.address, 60)
    assert connection is not None
    backend = Memory()
    rig = Rig(connection, Summer(backend, folder, ballast=1_000_000), patience=Timeouts(away=0.5))
    for number in range(4):
        rig.put(number)
        rig.wait_for(number + 1)

    def fail(*args: Any) -> BatchResult:
        return BatchResult([], 1, (2, ValueError("gone")))

    monkeypatch.setattr(transport_module, "run_entries", fail)
    processes.scheduler.kill()
    processes.scheduler.wait(20)
    rig.lane.flush(60)
    with pytest.raises(ValueError, match="gone"):
        rig.lane.raise_failure()
    assert backend.records == expected(range(4))
    rig.lane.close()
    connection.close()


def test_other_versions_are_refused_when_a_lane_opens(
    connection: Connection, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport_module, "versions", lambda: worker.versions()._replace(torch="1.0"))
    torch_here = worker.versions().torch
    with pytest.raises(ExecutorError, match=rf"This process has torch 1.0, but worker tcp.* has torch {torch_here}\."):
        Rig(connection, Summer(Memory(), folder))


def test_what_does_not_pickle_is_named(connection: Connection, folder: Path) -> None:
    """Rule 19: a callback must pickle for a cluster; the attribute is named."""
    summer = Summer(Memory(), folder)
    untyped(summer).guard = threading.Lock()  # it cannot be pickled
    with pytest.raises(ExecutorError, match=r"Summer cannot be sent .* its attribute 'guard', a lock, does not pickle"):
        Rig(connection, summer)


@pytest.mark.parametrize("ballast", [0, 1_000_000])
def test_a_lane_goes_back_to_a_cluster_that_is_back(
    make_dask_processes: Callable[[], Any], folder: Path, caplog: pytest.LogCaptureFixture, ballast: int
) -> None:
    """Two times the scheduler is another one at the same address; records and state are those of one process."""
    processes = make_dask_processes()
    processes.start_worker("0")
    connection = connect(processes.address, 60)
    assert connection is not None
    backend = Memory()
    summer = Summer(backend, folder, ballast=ballast)
    rig = Rig(connection, summer, patience=Timeouts(away=0.5))
    for turn in range(3):
        for number in range(20 * turn, 20 * turn + 10):
            rig.put(number)
        rig.wait_for(20 * turn + 10)
        assert at_work(folder) in processes.pids()
        assert rig.lane.report().where.startswith(connection.address)
        if turn == 2:
            break
        rig.put(20 * turn + 10, sleep=0.2)
        processes.kill_scheduler()
        for number in range(20 * turn + 11, 20 * turn + 20):
            rig.put(number)
        rig.wait_for(20 * turn + 20)
        assert at_work(folder) == os.getpid()
        assert rig.lane.report().where == f"thread ({connection.address} was lost)"
        assert not [each for each in caplog.records if each.name == "distributed.client" and each.exc_info]
        processes.start_scheduler()
        processes.start_worker(f"{turn + 1}")
        wait_for(lambda: not connection.lost)
    assert rig.lane.flush(60)
    rig.lane.raise_failure()
    assert backend.records == expected(range(50))
    assert summer.total == int(backend.records[-1].split()[2])
    assert float(summer.ballast.sum()) == 50.0 * ballast
    assert getattr(summer.own, "__self__", None) is summer
    assert rig.lane.report().counts.local in range(18, 21), "the event at work may have been done"
    assert [each.back is not None and each.back >= each.lost for each in connection.outages] == [True, True]
    rig.lane.close()
    connection.close()


def test_a_cluster_that_is_back_with_other_versions_is_not_used(
    make_dask_processes: Callable[[], Any],
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is said once why. A worker with other versions that joins later has the same effect."""
    monkeypatch.setattr(connection_module, "_LONGEST", 1.0)
    (folder / "other.py").write_text("import torch\ntorch.__version__ = '0.1'\n")
    processes = make_dask_processes()
    processes.start_worker("a")
    connection = connect(processes.address, 60)
    assert connection is not None
    backend = Memory()
    rig = Rig(connection, Summer(backend, folder), patience=Timeouts(away=0.5))
    processes.kill_scheduler()
    rig.put(0)
    rig.wait_for(1)
    processes.start_scheduler()
    processes.start_worker("wrong", "--preload", str(folder / "other.py"))
    wait_for(lambda: connection.outages[0].refused)
    processes.start_worker("right")
    rig.put(1)
    rig.wait_for(2)
    assert at_work(folder) == os.getpid()
    here = worker.versions().torch
    assert connection.outages[0].refused.startswith(f"This process has torch {here}, but a worker there has torch 0.1.")
    processes.kill("wrong")
    wait_for(lambda: not connection.lost)
    rig.put(2)
    rig.wait_for(3)
    assert at_work(folder) in processes.pids()
    processes.start_worker("wrong again", "--preload", str(folder / "other.py"))
    wait_for(lambda: len(connection.workers(10)) == 2)
    processes.kill("right")
    rig.put(3)
    rig.wait_for(4)
    assert at_work(folder) == os.getpid()
    assert [each.back is None for each in connection.outages] == [False, True]
    assert "has torch 0.1" in connection.outages[1].why
    rig.lane.close()
    connection.close()
    said = [each.getMessage() for each in caplog.records if each.name == "flowtrain"]
    assert sum("is back and is not used" in each for each in said) == 1
    assert backend.records == expected(range(4))


def test_a_lane_whose_callback_does_not_pickle_any_more_stays(
    connection: Connection, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In this process it could take a lock; the other lane goes back, and the first one after the next loss."""
    backend, other = Memory(), Memory()
    summer, fine = Summer(backend, folder, "locked"), Summer(other, folder, "fine")
    rig, second = Rig(connection, summer), Rig(connection, fine)
    for lose in range(2):
        connection.lose("a test", connection.client)
        rig.put(2 * lose)
        second.put(2 * lose)
        rig.wait_for(2 * lose + 1)
        second.wait_for(2 * lose + 1)
        if lose == 0:
            untyped(summer).guard = threading.Lock()
        wait_for(lambda: not connection.lost)
        rig.put(2 * lose + 1)
        second.put(2 * lose + 1)
        rig.wait_for(2 * lose + 2)
        second.wait_for(2 * lose + 2)
        assert rig.lane.report().where.startswith("thread" if lose == 0 else connection.address)
        assert second.lane.report().where.startswith(connection.address)
        vars(summer).pop("guard", None)
    for each, name in ((backend, "locked"), (other, "fine")):
        assert each.records == expected(range(4), name)
    for lane in (rig.lane, second.lane):
        assert lane.flush(60)
        lane.close()
    said = [each.getMessage() for each in caplog.records if "does not go back" in each.getMessage()]
    assert len(said) == 1
    assert "lane locked does not go back to the cluster: locked cannot be sent to another process" in said[0]
