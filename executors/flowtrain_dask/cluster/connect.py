"""A client for the cluster that the user named by ``cluster``, made within a deadline.

The executor always makes a client of its own and closes it. It closes a cluster only if it started it (``"local"``).
The client is never set as dask's default client, so that dask code of the user does not use it.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable

from dask import config
from distributed import Client, LocalCluster, Nanny, Security
from distributed.deploy.cluster import Cluster

from flowtrain.errors import ExecutorError, raise_worst
from flowtrain.errors.arguments import is_a
from flowtrain_dask.cluster.connection import END_SECONDS, SHORT_LOG, Connection, make_client
from flowtrain_dask.cluster.worker import leave_random_numbers_alone
from flowtrain_dask.parallel.threads import Wake, start

__all__ = ["connect", "uninterrupted"]

_START = 'Start one with `dask scheduler` and `dask worker ADDRESS`, or write DaskExecutor("local").'


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


def _reach(
    address: str,
    security: Security | None,
    deadline: float,
    resources: dict[str, float] | None,
    cluster: LocalCluster | None = None,
) -> Connection:
    try:
        try:
            client = make_client(address, deadline, security)
        except AssertionError:  # dask's own thread has not started within 10 s: the machine stood still
            client = make_client(address, deadline, security)
    except ValueError as error:
        raise ExecutorError(
            f"DaskExecutor(cluster={address!r}) is no address of a dask scheduler: {error}. Write one such as "
            f'"tcp://127.0.0.1:8786".'
        ) from error
    except (OSError, TimeoutError) as error:
        raise ExecutorError(
            f"No dask scheduler answers at {address} within {deadline:g} s ({type(error).__name__}). {_START}"
        ) from error
    return Connection(client, address, resources, security, cluster)


def _start(deadline: float, workers: int | None, resources: dict[str, float] | None) -> Connection:
    # The attribute by which multiprocessing refuses to start a process while the main script is imported.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ExecutorError(
            'A process that this program has started imports the main script, which starts DaskExecutor("local") once '
            'more: write what starts training under if __name__ == "__main__":.'
        )
    number = min(4, os.cpu_count() or 1) if workers is None else workers
    try:
        with config.set(SHORT_LOG):
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
        return _reach(cluster.scheduler_address, cluster.security, deadline, resources, cluster)
    except BaseException:
        cluster.close(timeout=5)
        raise


class _PatientNanny(Nanny):
    """Starts and ends the process of one worker.

    It does not wait for a handler that is still at work, because the results come too late when a cluster is closed. So
    the process can end at once. If it takes longer, the machine is busy, and dask's default would kill the process.
    """

    async def kill(self, timeout: float = END_SECONDS, reason: str = "nanny-kill") -> None:
        """End the process."""
        if self.process is not None:
            await self.process.kill(timeout=max(timeout, END_SECONDS), executor_wait=False, reason=reason)


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
