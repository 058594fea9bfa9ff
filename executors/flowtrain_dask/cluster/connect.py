"""A client for the cluster that the user named by ``cluster``, made within a deadline.

The executor always makes a client of its own and closes it. It closes a cluster only if it started it (``"local"``).
The client is never set as dask's default client, so that dask code of the user does not use it.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dask import config
from distributed import Client, LocalCluster, Nanny, Scheduler, Security
from distributed.deploy.cluster import Cluster

from flowtrain.errors import ExecutorError, is_a, raise_worst
from flowtrain_dask.cluster.worker import leave_random_numbers_alone
from flowtrain_dask.parallel.threads import Wake, start

__all__ = ["Connection", "connect", "uninterrupted"]

_SHORT_LOG = {"distributed.admin.low-level-log-length": 10}
"""dask keeps the last thousand messages of each connection for its developers, each with up to 1 MB of a batch."""

# Newer schedulers name five workers unless they are asked for all; that of dask 2025.1 has no such argument.
_ALL_WORKERS = {"n_workers": -1} if "n_workers" in inspect.signature(Scheduler.identity).parameters else {}
_END_SECONDS = 30.0
"""Seconds that the process of a worker may take to end. dask's default of 5 is too short on a busy machine."""
_START = 'Start one with `dask scheduler` and `dask worker ADDRESS`, or write DaskExecutor("local").'


@dataclass
class Connection:
    """The executor's client on a cluster.

    Attributes:
        client: The client.
        address: The address of the scheduler.
        resources: The resources that a worker must have for the tasks of lanes, as amounts by name.
        cluster: The cluster, if the executor started it.
    """

    client: Client
    address: str
    resources: dict[str, float] | None = None
    cluster: LocalCluster | None = None

    def ask(self, what: str, timeout: float, **arguments: object) -> Any:
        """Call a handler of the scheduler by its name, and return the answer.

        Raises:
            OSError: The scheduler does not answer in time, or is gone.
        """
        scheduler = self.client.scheduler
        if scheduler is None:
            raise OSError("the client is closed")
        sync: Any = self.client.sync  # distributed's annotations have no `callback_timeout`
        return sync(getattr(scheduler, what), callback_timeout=timeout, **arguments)

    def workers(self, timeout: float) -> dict[str, Any]:
        """Return the scheduler's data on the workers that lanes may use, by address.

        Raises:
            OSError: The scheduler does not answer in time, or is gone.
        """
        identity = self.ask("identity", timeout, **_ALL_WORKERS)
        wanted = self.resources or {}
        return {
            address: worker
            for address, worker in identity["workers"].items()
            if all(worker["resources"].get(name, 0) >= amount for name, amount in wanted.items())
        }

    def close(self) -> None:
        """Close the client, and the cluster if the executor started it. Nothing is raised."""
        client: Any = self.client  # distributed leaves `close` without annotations
        cluster: Any = self.cluster
        with contextlib.suppress(Exception):  # closing fails if the scheduler is gone already
            client.close(timeout=5)
        if cluster is not None:
            with contextlib.suppress(Exception):
                cluster.close(timeout=2 * _END_SECONDS)


def connect(
    cluster: object,
    deadline: float = 30.0,
    *,
    workers: int | None = None,
    resources: dict[str, float] | None = None,
) -> Connection | None:
    """Connect to a cluster, and check that it has a worker for lanes.

    Args:
        cluster: ``None`` for no cluster, ``"local"`` to start one of processes on this machine, the address of a
            scheduler, a ``distributed.Client``, or a cluster object.
        deadline: The most seconds to wait for the scheduler and a worker.
        workers: How many processes ``"local"`` starts; by default one for each core, at most 4.
        resources: The resources that a worker must have for the tasks of lanes, such as ``{"flowtrain": 1}``. Workers
            started with ``dask worker ADDRESS --resources flowtrain=1`` have it; others get no such tasks.

    Returns:
        The connection; ``None`` if `cluster` is ``None``.

    Raises:
        ExecutorError: The cluster cannot be reached in time or has no such worker, or `cluster` is of another type.
    """
    if cluster is None:
        return None
    leave_random_numbers_alone()

    def make() -> Connection:
        """Make the connection, and wait for a worker."""
        end = time.monotonic() + deadline
        if cluster == "local":
            connection = _start(deadline, workers, resources)
        else:
            address, security = _find(cluster)
            connection = _reach(address, security, deadline, resources)
        try:
            _wait_for_worker(connection, end, deadline)
        except BaseException:
            connection.close()
            raise
        return connection

    return uninterrupted(make)


def uninterrupted(make: Callable[[], Connection]) -> Connection:
    """Make a connection on another thread, because an interrupt of the main thread would leave processes behind.

    After an interrupt the connection is closed as soon as it is made, and this function does not wait for that.
    """
    made, failures, left = list[Connection](), list[BaseException](), list[bool]()
    ended = Wake()

    def run() -> None:
        """Make the connection. This thread looks for an interrupt last, and the other one for the connection."""
        try:
            made.append(make())
        except BaseException as failure:
            failures.append(failure)
        ended.set()
        if left and made:
            made[0].close()

    try:
        start(run, "flowtrain connects")
        while not made and not failures:
            ended.wait()
        if failures:
            raise_worst(failures)
        return made[0]
    except BaseException:
        left.append(True)
        if made:
            made[0].close()
        raise


def _find(cluster: object) -> tuple[str, Security | None]:
    """Return the address of the scheduler, and the certificates to reach it with."""
    if isinstance(cluster, str):
        return cluster, None
    if isinstance(cluster, Client):
        if cluster.scheduler is None:
            raise ExecutorError(f"DaskExecutor(cluster={cluster!r}): this Client is closed. Pass an open one.")
        return str(cluster.scheduler.address), cluster.security
    if is_a(cluster, Cluster) or isinstance(getattr(cluster, "scheduler_address", None), str):
        address: str = cluster.scheduler_address  # type: ignore[attr-defined]  # the test above has found it
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
        except AssertionError:  # dask's own thread has not started within 10 s: the machine stood still
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
    with config.set(_SHORT_LOG):
        return Client(  # type: ignore[no-untyped-call]  # distributed leaves it without annotations
            address, timeout=deadline, set_as_default=False, name="flowtrain", **options
        )


def _start(deadline: float, workers: int | None, resources: dict[str, float] | None) -> Connection:
    number = min(4, os.cpu_count() or 1) if workers is None else workers
    try:
        with config.set(_SHORT_LOG):
            cluster = LocalCluster(  # type: ignore[no-untyped-call]  # distributed leaves it without annotations
                n_workers=number,
                threads_per_worker=1,
                processes=True,
                worker_class=_PatientNanny,
                dashboard_address="127.0.0.1:0",  # any free port: dask warns if its default 8787 is in use
                resources=dict(resources or {}),
                preload=["flowtrain_dask.cluster.worker"],  # dask calls its `dask_setup`
            )
    except Exception as error:  # the start of a process can fail in many ways
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


class _PatientNanny(Nanny):
    """Starts and ends the process of one worker.

    It does not wait for a handler that is still at work, because the results come too late when a cluster is closed. So
    the process can end at once. If it takes longer, the machine is busy, and dask's default would kill the process.
    """

    async def kill(self, timeout: float = _END_SECONDS, reason: str = "nanny-kill") -> None:
        """End the process."""
        if self.process is not None:
            await self.process.kill(timeout=max(timeout, _END_SECONDS), executor_wait=False, reason=reason)


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
