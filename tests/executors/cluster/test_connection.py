"""A connection that is lost, and looks for its cluster until it is back or closed."""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from distributed import LocalCluster, Security

from flowtrain_dask.cluster import connection as connection_module
from flowtrain_dask.cluster.connect import connect
from flowtrain_dask.cluster.connection import Connection, pauses
from flowtrain_dask.cluster.worker import Assignment, versions
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow

TASK = pickle.dumps(Assignment("token", versions()._replace(torch="0.0"), b"", 0, None, b"", False))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert looking() == []


@pytest.fixture(autouse=True)
def sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_FIRST", 0.05)


def looking() -> list[threading.Thread]:
    """Return the threads that look for a cluster."""
    return [each for each in threading.enumerate() if each.name == "flowtrain looks for a cluster"]


def dask_threads() -> int:
    """Return how many clients and clusters have a thread in this process."""
    return sum(each.name.startswith("IO loop") for each in threading.enumerate())


def works(connection: Connection) -> bool:
    """Tell whether a worker does a task."""
    blob = connection.submit(TASK, f"test-{time.monotonic_ns()}", None).result(timeout=30)
    return bool(pickle.loads(blob).kind == "versions")


def test_each_look_comes_later_and_later_still_after_each_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "_FIRST", 1.0)
    assert [*itertools.islice(pauses(0), 9)] == [1, 2, 4, 8, 16, 32, 64, 120, 120]
    assert [*itertools.islice(pauses(3), 5)] == [8, 16, 32, 64, 120]
    assert [*itertools.islice(pauses(100_000), 2)] == [120, 120]


def test_a_cluster_that_flaps(dask_processes: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Each loss is in the report; the log has the first, the second, the fourth, and so on."""
    connection = connect(dask_processes.address, 60)
    assert connection is not None
    assert connection.lost == ""
    before = dask_threads()
    for number in range(1, 6):
        client = connection.client
        connection.lose(f"reason {number}", client)
        connection.lose("known already", client)
        assert connection.lost == f"reason {number}"
        wait_for(lambda: not connection.lost)
        assert connection.client is not client
        connection.lose("of the client before", client)
        assert connection.lost == ""
        assert works(connection)
    assert dask_threads() == before
    assert [each.why for each in connection.outages] == [f"reason {number}" for number in range(1, 6)]
    assert all(each.back is not None for each in connection.outages)
    connection.close()
    said = [each.getMessage() for each in caplog.records if each.name == "flowtrain"]
    head = f"flowtrain: the cluster at {dask_processes.address}"
    assert said == [
        line
        for number in (1, 2, 4)
        for line in (
            f"{head} was lost (reason {number}): until it is back, this process runs the events of its lanes",
            f"{head} is back and is used again",
        )
    ]


def test_it_is_closed_while_it_looks(make_dask_processes: Callable[[], Any]) -> None:
    """Nobody answers at the address any more, or somebody who is no scheduler."""
    for silent in (False, True):
        processes = make_dask_processes()
        processes.start_worker("a")
        before = dask_threads()
        connection = connect(processes.address, 60)
        assert connection is not None
        processes.kill_scheduler()
        with socket.create_server(("127.0.0.1", int(processes.address.rpartition(":")[2]))) as other:
            if silent:
                connection.lose("a test", connection.client)
                other.accept()[0].close()
            else:
                other.close()
                connection.lose("a test", connection.client)
                time.sleep(0.3)
            assert len(looking()) == 1
            connection.close()
        assert looking() == []
        assert connection.lost == "a test"
        assert dask_threads() == before
        connection.lose("closed", connection.client)
        assert looking() == []


def test_a_cluster_without_workers_is_not_back(make_dask_processes: Callable[[], Any]) -> None:
    processes = make_dask_processes()
    processes.start_worker("a")
    connection = connect(processes.address, 60)
    assert connection is not None
    before = dask_threads()
    processes.kill("a")
    connection.lose("it has no worker", connection.client)
    time.sleep(1)
    assert connection.lost
    assert dask_threads() == before - 1, "no client is made for it"
    processes.start_worker("b")
    wait_for(lambda: not connection.lost)
    assert works(connection)
    connection.close()


def test_local_processes_are_used_again() -> None:
    connection = connect("local", 60, workers=1)
    assert connection is not None
    client: Any = connection.client
    [process] = client.run(os.getpid).values()
    connection.lose("a test", client)
    wait_for(lambda: not connection.lost)
    assert works(connection)
    connection.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_certificates_are_used_again() -> None:
    security: Any = Security
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0", protocol="tls://",
        security=security.temporary(),
    ) as cluster:  # type: ignore[no-untyped-call]  # distributed leaves it without annotations  # fmt: skip
        connection = connect(cluster, 60)
        assert connection is not None
        connection.lose("a test", connection.client)
        wait_for(lambda: not connection.lost)
        assert works(connection)
        connection.close()
