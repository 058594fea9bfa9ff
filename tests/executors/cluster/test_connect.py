"""Connecting to a cluster: what is accepted, what is refused, and that it ends within its deadline."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from distributed import Client
from distributed.core import Status

from flowtrain.errors import ExecutorError
from flowtrain_dask.cluster.connect import connect, uninterrupted
from flowtrain_dask.cluster.connection import Connection
from tests.support.interrupts import interrupted
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow


class Known(Connection):
    """Has no client, and knows whether it is closed."""

    closed = False

    def __init__(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_an_interrupt_closes_what_is_connected_meanwhile() -> None:
    """Ctrl-C while a local cluster started left its processes until Python ended."""
    made, kept = list[Known](), list[Connection]()

    def make() -> Connection:
        made.append(Known())
        return made[-1]

    interrupts = [*interrupted(lambda: kept.append(uninterrupted(make)), "cluster/connect.py", "parallel/threads.py")]
    assert sum(interrupts) > 20
    wait_for(lambda: not [each for each in threading.enumerate() if each.name == "flowtrain connects"])
    wait_for(lambda: [each for each in made if not each.closed] == kept)


def test_no_cluster() -> None:
    assert connect(None) is None


def test_an_address_and_a_client(dask_processes: Any) -> None:
    """A client of the user is asked where its scheduler is, and left alone."""
    connection = connect(dask_processes.address, 60)
    assert connection is not None
    with pytest.raises(ValueError, match="No clients found"):
        Client.current()  # type: ignore[no-untyped-call]  # distributed leaves it without annotations
    stream: Any = connection.client.scheduler_comm
    assert stream.recent_message_log.maxlen == 10  # not a thousand, with a batch in each
    connection.close()
    assert connection.client.status == "closed"
    with Client(dask_processes.address, set_as_default=False) as client:  # type: ignore[no-untyped-call]  # as above
        through = connect(client, 60)
        assert through is not None
        assert through.client is not client
        assert through.workers(10)
        through.close()
        assert client.status == "running"


def test_nobody_answers() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(ExecutorError, match=rf"No dask scheduler answers at {address} within 1 s .* Start one"):
            connect(address, 1.0)
        assert time.monotonic() - begin < 20


def test_no_workers(make_dask_processes: Callable[[], Any]) -> None:
    processes = make_dask_processes()
    with pytest.raises(ExecutorError, match=rf"no workers within 0.5 s. Start one: dask worker {processes.address}"):
        connect(processes.address, 0.5)


def test_no_worker_with_the_resources(dask_processes: Any) -> None:
    with pytest.raises(ExecutorError, match=r"has no worker with the resources .* --resources 'flowtrain=1'"):
        connect(dask_processes.address, 0.5, resources={"flowtrain": 1})


@pytest.mark.parametrize(("value", "message"), [(3, "pass the address of a scheduler"), ("nonsense://x", "is no addr")])
def test_what_is_no_cluster(value: object, message: str) -> None:
    with pytest.raises(ExecutorError, match=message):
        connect(value, 1.0)


def test_local_processes() -> None:
    """ "local" starts worker processes and ends them."""
    connection = connect("local", 60, workers=1, resources={"flowtrain": 1})
    assert connection is not None
    assert connection.cluster is not None
    assert len(connection.workers(10)) == 1
    through = connect(connection.cluster, 60)  # a cluster object; its owner closes it
    assert through is not None
    through.close()
    assert len(connection.workers(10)) == 1
    with urlopen(connection.cluster.dashboard_link, timeout=60) as page:
        assert b"bokeh.min.js" in page.read()
    connection.close()
    assert connection.cluster.status == Status.closed


def test_a_worker_that_is_slow_to_end_is_left_to_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """On a busy machine the end of a process takes seconds: dask would kill it after four, and say so."""
    connection = connect("local", 60, workers=1)
    assert connection is not None

    def end_slowly(path: str) -> int:
        def end() -> None:
            time.sleep(5)
            Path(path).write_text("ended", "utf-8")

        atexit.register(end)
        return os.getpid()

    client: Any = connection.client
    [process] = client.run(end_slowly, str(tmp_path / "ended")).values()
    connection.close()
    assert (tmp_path / "ended").read_text("utf-8") == "ended"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "WARNING" not in capfd.readouterr().err  # of the process that ended
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_worker_at_work_is_not_waited_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rule 29: nothing that a handler still does keeps a process from ending."""
    connection = connect("local", 60, workers=1)
    assert connection is not None

    def work(path: str) -> None:
        Path(path).write_text(str(os.getpid()), "utf-8")
        time.sleep(600)

    future = connection.client.submit(work, str(tmp_path / "begun"))
    while not (tmp_path / "begun").exists() or not (tmp_path / "begun").read_text("utf-8"):
        time.sleep(0.01)
    connection.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "WARNING" not in capfd.readouterr().err  # of the process that ended
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "begun").read_text("utf-8")), 0)
    del future


def test_a_process_that_imports_the_main_script_starts_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script without ``if __name__ == "__main__":`` would start a cluster in each of its workers."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(ExecutorError, match=r"imports the main script.* under if __name__ == ."):
        connect("local", 60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_local_processes_leave_signals_to_the_process_that_trains(number: signal.Signals) -> None:
    """A terminal sends Ctrl-C to all of them, and what waits in the lanes is still to be done. Killed they are gone."""
    connection = connect("local", 60, workers=2)
    assert connection is not None
    client: Any = connection.client
    before: dict[str, int] = client.run(os.getpid)
    assert len(before) == 2
    for process in before.values():
        os.kill(process, number)
    assert client.submit(abs, -1).result(timeout=30) == 1
    assert client.run(os.getpid) == before
    connection.close()
    for process in before.values():
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
