"""Clusters of real processes for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.dask_processes import DaskProcesses
from tests.support.programs import Programs


@pytest.fixture(autouse=True)
def nothing_measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test begin with what another one has measured."""
    monkeypatch.setattr("flowtrain_dask.parallel.decision._won", {})


@pytest.fixture(scope="session")
def dask_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaskProcesses]:
    """A cluster with the workers ``a`` and ``b``, for the tests that leave it whole."""
    processes = DaskProcesses(tmp_path_factory.mktemp("dask"))
    processes.start_worker("a")
    processes.start_worker("b")
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def schedulers() -> Iterator[Programs]:
    """Forks schedulers, which must work without flowtrain."""
    made = Programs("distributed.cli.dask_scheduler", bare=True)
    yield made
    made.close()


@pytest.fixture
def make_dask_processes(
    tmp_path_factory: pytest.TempPathFactory, schedulers: Programs, programs: Programs
) -> Iterator[Callable[[], DaskProcesses]]:
    """Starts clusters for one test, without workers. Their processes are forked, unlike those of `dask_processes`."""
    made: list[DaskProcesses] = []

    def make() -> DaskProcesses:
        made.append(DaskProcesses(tmp_path_factory.mktemp("dask"), (schedulers, programs)))
        return made[-1]

    yield make
    for processes in made:
        processes.close()
