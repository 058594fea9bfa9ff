"""From what the user passed as ``cluster`` to a client of our own, within a deadline.

Only what was made here is closed here: the client always, a cluster if ``"local"`` asked for one. The client is never
set as the default one, so the user's own dask code does not notice it.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Any

from dask import config
from distributed import Client, LocalCluster, Nanny, Security
from distributed.deploy.cluster import Cluster

from flowtrain.errors import ExecutorError, is_a
from flowtrain_dask.cluster.worker import leave_random_numbers_alone

__all__ = ["Connection", "connect"]

_FORGETFUL = {"distributed.admin.low-level-log-length": 10}
"""dask keeps the last thousand messages of each connection for its developers, with up to 1 MB of a batch in each."""
_LEAVING = 30.0
"""Seconds that the process of a worker may take to end. On a busy machine the five that dask gives are too few."""
_START = 'Start one with `dask scheduler` and `dask worker ADDRESS`, or write DaskExecutor("local").'


@dataclass
class Connection:
    """A client of our own on a cluster.

    Attributes:
        client: The client.
        address: The scheduler.
        resources: What the tasks of lanes ask of a worker.
        cluster: The cluster, if it was started here.
    """

    client: Client
    address: str
    resources: dict[str, float] | None = None
    cluster: LocalCluster | None = None

    def ask(self, what: str, timeout: float, **arguments: object) -> Any:
        """Ask the scheduler something, by the name of one of its handlers.

        Raises:
            OSError: It does not answer in time, or is gone.
        """
        scheduler = self.client.scheduler
        if scheduler is None:
            raise OSError("the client is closed")
        sync: Any = self.client.sync  # distributed's annotations have no `callback_timeout`
        return sync(getattr(scheduler, what), callback_timeout=timeout, **arguments)

    def workers(self, timeout: float) -> dict[str, Any]:
        """Return what the scheduler knows of the workers that lanes may use, by address.

        Raises:
            OSError: It does not answer in time, or is gone.
        """
        identity = self.ask("identity", timeout, n_workers=-1)
        wanted = self.resources or {}
        return {
            address: worker
            for address, worker in identity["workers"].items()
            if all(worker["resources"].get(name, 0) >= amount for name, amount in wanted.items())
        }

    def close(self) -> None:
        """Close the client, and the cluster if it was started here."""
        client: Any = self.client  # distributed leaves `close` without annotations
        cluster: Any = self.cluster
        with contextlib.suppress(Exception):  # a scheduler that is gone cannot say good-bye
            client.close(timeout=5)
        if cluster is not None:
            with contextlib.suppress(Exception):
                cluster.close(timeout=2 * _LEAVING)


def connect(
    cluster: object,
    deadline: float = 30.0,
    *,
    workers: int | None = None,
    resources: dict[str, float] | None = None,
    security: Security | None = None,
) -> Connection | None:
    """Connect to a cluster and see that it has a worker for lanes.

    Args:
        cluster: ``None``: no cluster; ``"local"``: start one, of processes of this machine; the address of a scheduler,
            a ``distributed.Client``, or a cluster object.
        deadline: The most seconds that it may take.
        workers: How many processes to start, for ``"local"``; as many as cores, but at most 4, if not given.
        resources: What tasks of lanes ask of a worker, such as ``{"flowtrain": 1}``: those started with ``dask worker
            ADDRESS --resources flowtrain=1`` have it, others get no such tasks.
        security: TLS, where `cluster` is an address.

    Raises:
        ExecutorError: It cannot be reached in time, it has no such worker, or `cluster` is none of these.
    """
    if cluster is None:
        return None
    leave_random_numbers_alone()
    end = time.monotonic() + deadline
    if cluster == "local":
        connection = _start(deadline, workers, resources)
    else:
        address, found = _find(cluster)
        connection = _reach(address, security or found, deadline, resources)
    try:
        _wait_for_worker(connection, end, deadline)
    except BaseException:
        connection.close()
        raise
    return connection


def _find(cluster: object) -> tuple[str, Security | None]:
    """Return the scheduler's address, and the security to reach it with."""
    if isinstance(cluster, str):
        return cluster, None
    if isinstance(cluster, Client):
        if cluster.scheduler is None:
            raise ExecutorError(f"DaskExecutor(cluster={cluster!r}): this Client is closed. Pass an open one.")
        return str(cluster.scheduler.address), cluster.security
    if is_a(cluster, Cluster) or isinstance(getattr(cluster, "scheduler_address", None), str):
        address: str = cluster.scheduler_address  # type: ignore[attr-defined]  # asked just now
        if not address or "Not Connected" in address:
            raise ExecutorError(f"DaskExecutor(cluster={cluster!r}): this cluster is closed. Pass a running one.")
        return address, getattr(cluster, "security", None)
    raise ExecutorError(
        f'DaskExecutor(cluster={cluster!r}): pass the address of a scheduler such as "tcp://127.0.0.1:8786", a '
        f'distributed.Client, a cluster object, or "local" for processes of this machine.'
    )


def _reach(address: str, security: Security | None, deadline: float, resources: dict[str, float] | None) -> Connection:
    options: dict[str, Any] = {} if security is None else {"security": security}
    try:
        try:
            client = _client(address, deadline, options)
        except AssertionError:  # its thread did not begin within dask's own ten seconds: the machine stood still
            client = _client(address, deadline, options)
    except ValueError as error:
        raise ExecutorError(
            f"DaskExecutor(cluster={address!r}) is no address of a dask scheduler: {error}. Write one such as "
            f'"tcp://127.0.0.1:8786".'
        ) from error
    except (OSError, TimeoutError) as error:
        raise ExecutorError(
            f"No dask scheduler answers at {address} within {deadline:g} s ({type(error).__name__}). {_START}"
        ) from error
    return Connection(client, address, resources)


def _client(address: str, deadline: float, options: dict[str, Any]) -> Client:
    with config.set(_FORGETFUL):
        return Client(  # type: ignore[no-untyped-call]  # distributed leaves it without annotations
            address, timeout=deadline, set_as_default=False, name="flowtrain", **options
        )


def _start(deadline: float, workers: int | None, resources: dict[str, float] | None) -> Connection:
    number = min(4, os.cpu_count() or 1) if workers is None else workers
    try:
        with config.set(_FORGETFUL):
            cluster = LocalCluster(  # type: ignore[no-untyped-call]  # distributed leaves it without annotations
                n_workers=number,
                threads_per_worker=1,
                processes=True,
                worker_class=_Keeper,
                dashboard_address="127.0.0.1:0",  # any free port; 8787 may be in use, which is a warning
                resources=dict(resources or {}),
                preload=["flowtrain_dask.cluster.worker"],  # for its `dask_setup`
            )
    except Exception as error:  # what a process cannot be started for is many things
        raise ExecutorError(
            f'DaskExecutor("local") could not start {number} worker processes ({type(error).__name__}: {error}). They '
            f'import the main script: write what starts training under if __name__ == "__main__":.'
        ) from error
    try:
        connection = _reach(cluster.scheduler_address, cluster.security, deadline, resources)
    except BaseException:
        cluster.close(timeout=5)
        raise
    connection.cluster = cluster
    return connection


class _Keeper(Nanny):
    """Starts and ends the process of one worker.

    A handler that is still at work is not waited for: when a cluster is closed, its results are too late. So a process
    ends at once, and where it takes longer the machine is busy, which is no reason to kill it.
    """

    async def kill(self, timeout: float = _LEAVING, reason: str = "nanny-kill") -> None:
        """End the process."""
        if self.process is not None:
            await self.process.kill(timeout=max(timeout, _LEAVING), executor_wait=False, reason=reason)


def _wait_for_worker(connection: Connection, end: float, deadline: float) -> None:
    while True:
        try:
            if connection.workers(max(0.1, end - time.monotonic())):
                return
        except (OSError, TimeoutError) as error:
            raise ExecutorError(
                f"The dask scheduler at {connection.address} does not answer within {deadline:g} s "
                f"({type(error).__name__}). Look at its log."
            ) from error
        if time.monotonic() >= end:
            break
        time.sleep(0.1)
    if connection.resources:
        asked = " ".join(f"{name}={amount:g}" for name, amount in connection.resources.items())
        raise ExecutorError(
            f"The cluster at {connection.address} has no worker with the resources {connection.resources} within "
            f"{deadline:g} s. Start one: dask worker {connection.address} --resources {asked!r}"
        )
    raise ExecutorError(
        f"The cluster at {connection.address} has no workers within {deadline:g} s. Start one: "
        f"dask worker {connection.address}"
    )
