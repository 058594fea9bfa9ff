"""The executor's client on a cluster: it is lost with the cluster, and made again when the cluster is back.

A cluster is lost for all lanes together. The first lane that notices calls `Connection.lose`, which closes the client
and so ends the calls of the other lanes; all of them continue in this process. Meanwhile a thread of the connection
looks for a scheduler at the same address, at growing intervals. It makes a new client as soon as a scheduler answers
there, has workers, and these have the versions of this process. Each lane then goes back with its next batch.

A scheduler that was started again knows nothing of earlier tasks, and lanes do not depend on them: a lane that goes
back begins with the state that its callbacks have in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import pickle
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from dask import config
from distributed import Client, Future, LocalCluster, Scheduler, Security
from distributed.core import rpc

from flowtrain.errors import ExecutorError
from flowtrain_dask.cluster.worker import Assignment, Reply, different, versions
from flowtrain_dask.lanes.report import Outage
from flowtrain_dask.parallel.threads import Wake

__all__ = ["END_SECONDS", "SHORT_LOG", "Connection", "make_client", "pauses"]

_logger = logging.getLogger("flowtrain")

# Newer schedulers name five workers unless they are asked for all; that of dask 2025.1 has no such argument.
_ALL_WORKERS = {"n_workers": -1} if "n_workers" in inspect.signature(Scheduler.identity).parameters else {}
SHORT_LOG = {"distributed.admin.low-level-log-length": 10}
"""dask keeps the last thousand messages of each connection for its developers, each with up to 1 MB of a batch."""
END_SECONDS = 30.0
"""Seconds that the process of a worker may take to end. dask's default of 5 is too short on a busy machine."""

_FIRST, _LONGEST = 1.0, 120.0
"""Seconds from a loss to the first look, and the most between two looks; each wait is twice as long as the one before.
"""
_HELD = 600.0
"""Seconds. If a cluster is lost again sooner than this after its return, it flaps: the first look comes later."""
_ANSWER = 5.0
"""Seconds for which one look waits for the scheduler."""
_TASKS = 30.0
"""Seconds for which one look waits for the workers, which may be busy with the tasks of others."""


class Connection:
    """The executor's client on a cluster.

    Args:
        client: The client.
        address: The address of the scheduler.
        resources: The resources that a worker must have for the tasks of lanes, as amounts by name.
        security: The certificates with which the client was made.
        cluster: The cluster, if the executor started it.

    Attributes:
        client: The client. It is another one after the cluster was lost and is back.
        address: The same.
        resources: The same.
        cluster: The same.
        lost: Why the cluster cannot be used now; empty if it can be used.
        outages: The times without the cluster.
    """

    def __init__(
        self,
        client: Client,
        address: str,
        resources: dict[str, float] | None = None,
        security: Security | None = None,
        cluster: LocalCluster | None = None,
    ) -> None:
        self.client = client
        self.address = address
        self.resources = resources
        self.cluster = cluster
        self.lost = ""
        self.outages: list[Outage] = []
        self._security = security
        self._losing = threading.Lock()  # held by lanes' threads alone, which no interrupt ends
        self._search: threading.Thread | None = None
        self._wake = Wake()
        self._closed = False
        self._losses = self._flaps = 0
        self._back_at = float("-inf")
        self._refused: set[str] = set()  # the reasons that were logged

    def ask(self, what: str, timeout: float, **arguments: object) -> Any:
        """Call a handler of the scheduler by its name, and return the answer.

        Raises:
            OSError: The scheduler does not answer in time, or is gone.
        """
        client: Any = self.client  # distributed's annotations have no `callback_timeout`
        scheduler = client.scheduler
        if scheduler is None:
            raise OSError("the client is closed")
        return client.sync(getattr(scheduler, what), callback_timeout=timeout, **arguments)

    def workers(self, timeout: float) -> dict[str, Any]:
        """Return the scheduler's data on the workers that lanes may use, by address.

        Raises:
            OSError: The scheduler does not answer in time, or is gone.
        """
        return self._usable(self.ask("identity", timeout, **_ALL_WORKERS))

    def submit(self, blob: bytes, key: str, workers: list[str] | None) -> Future[bytes]:
        """Have a worker do a pickled `Assignment`.

        Args:
            blob: The assignment.
            key: The name of the task, which no other task may have.
            workers: The addresses of the workers that should do it, if one of them is there; ``None`` for any worker.
        """
        return self._task(self.client, blob, key, workers, allow_other_workers=bool(workers))

    def lose(self, why: str, client: object) -> None:
        """Take the cluster for lost, and look for it from now on, unless this is known. A lane's thread calls this.

        Args:
            why: The reason, for the report.
            client: The client that the lane has used. If there is a new one meanwhile, nothing is lost.
        """
        with self._losing:
            if self._closed or self.lost or client is not self.client:
                return
            self._flaps = self._flaps + 1 if time.monotonic() - self._back_at < _HELD else 0
            self._losses += 1
            self.outages.append(Outage(self.address, time.time(), why))
            self._refused.add(why)
            self.lost = why
            self._say("was lost (%s): until it is back, this process runs the events of its lanes", why)
            self._search = threading.Thread(target=self._look_again, name="flowtrain looks for a cluster", daemon=True)
            self._search.start()

    def close(self) -> None:
        """Stop looking, close the client, and the cluster if the executor started it. Nothing is raised."""
        self._closed = True
        self._wake.set()
        search = self._search
        if search is not None and search is not threading.current_thread():
            search.join(2 * _ANSWER)
        cluster: Any = self.cluster  # distributed leaves `close` without annotations
        _close(self.client)
        if cluster is not None:
            with contextlib.suppress(Exception):
                cluster.close(timeout=2 * END_SECONDS)

    def _task(self, client: Client, blob: bytes, key: str, workers: list[str] | None, **options: Any) -> Future[bytes]:
        retries, resources = 2, self.resources
        return client.submit(
            _begin, blob, key=key, pure=False, retries=retries, workers=workers, resources=resources, **options
        )

    def _usable(self, identity: Any) -> dict[str, Any]:
        """Return the workers that lanes may use, of those that a scheduler has named."""
        wanted = self.resources or {}
        return {
            address: worker
            for address, worker in identity["workers"].items()
            if all(worker["resources"].get(name, 0) >= amount for name, amount in wanted.items())
        }

    def _say(self, text: str, *values: object) -> None:
        """Log a change, but of a cluster that is lost again and again only the first, second, fourth, eighth time."""
        if not self._losses & (self._losses - 1):
            _logger.warning("flowtrain: the cluster at %s " + text, self.address, *values)

    # --- the thread that looks for the cluster

    def _look_again(self) -> None:
        """Look for the cluster until it is back or the connection is closed."""
        _close(self.client)  # this ends the calls of other lanes, and the client's own attempts to connect again
        for pause in pauses(self._flaps):
            self._wake.wait(pause)
            if self._closed:
                return
            try:
                client = self._look()
            except ExecutorError as refused:
                self.outages[-1].refused = text = str(refused)
                if text not in self._refused:
                    self._refused.add(text)
                    self._say("is back and is not used: %s", text)
            except Exception:  # nobody answers, or a scheduler that is about to end: the next look comes later
                pass
            else:
                if client is not None:
                    self._take(client)
                    return

    def _look(self) -> Client | None:
        """Look for the cluster once, and return a client on it if it can be used.

        Raises:
            ExecutorError: A worker has other versions than this process.
        """
        # Without a scheduler no client is made, because each one that fails to connect leaves a thread behind.
        identity = asyncio.run(self._identity())
        if identity is None or not (workers := self._usable(identity)):
            return None
        client = make_client(self.address, _ANSWER, self._security)
        try:
            if self._answers(client, workers):
                return client
        except BaseException:
            _close(client)
            raise
        _close(client)
        return None

    async def _identity(self) -> Any:
        """Return the scheduler's data on itself and its workers; ``None`` if the connection is closed meanwhile."""

        async def ask() -> Any:
            """Ask the scheduler."""
            security: Any = self._security  # distributed's annotations are incomplete, also those of `rpc`
            options = {} if security is None else security.get_connection_args("client")
            called: Any = rpc
            async with called(self.address, timeout=_ANSWER, connection_args=options) as scheduler:
                return await scheduler.identity(**_ALL_WORKERS)

        asking, end = asyncio.create_task(ask()), time.monotonic() + _ANSWER
        while not self._closed and time.monotonic() < end:
            if (await asyncio.wait([asking], timeout=0.1))[0]:
                return asking.result()
        return None  # `asyncio.run` cancels the task

    def _answers(self, client: Client, workers: Iterable[str]) -> bool:
        """Have each worker do a first task, as when a learner is built; return whether one has done it in time.

        Raises:
            ExecutorError: A worker has other versions than this process, or cannot import flowtrain.
        """
        here, name = versions(), f"flowtrain_versions-{secrets.token_hex(8)}"
        blob = pickle.dumps(Assignment("", here, b"", 0, None, b"", False))
        waiting = [self._task(client, blob, f"{name}.{number}", [each]) for number, each in enumerate(workers)]
        answered, end = False, time.monotonic() + _TASKS
        while waiting and not self._closed and time.monotonic() < end:
            for future in [each for each in waiting if each.status != "pending"]:
                waiting.remove(future)
                try:
                    reply: Reply = pickle.loads(future.result(timeout=_ANSWER))  # `run_assignment` has pickled it
                except ImportError as error:
                    raise ExecutorError(f"a worker cannot import flowtrain: {error}") from error
                except Exception:  # its worker is gone
                    continue
                if reply.kind == "versions":
                    raise ExecutorError(different(here, reply.versions, "a worker there"))
                if reply.kind == "not picklable":  # its versions cannot even read the assignment
                    raise ExecutorError(f"a worker there cannot do tasks of flowtrain: {reply.text}")
                answered = True
            time.sleep(0.02)
        return answered and not self._closed

    def _take(self, client: Client) -> None:
        """Use a new client from now on."""
        self.client = client
        if self._closed:  # after this assignment: either `close` closes the new client, or this thread does
            _close(client)
            return
        self.outages[-1].back = time.time()
        self._back_at = time.monotonic()
        self.lost = ""  # last: from here on lanes go back
        self._say("is back and is used again")


def pauses(flaps: int) -> Iterator[float]:
    """Yield the seconds to wait before each look for a cluster.

    Args:
        flaps: How often the cluster was lost again soon after a return.
    """
    pause = min(_LONGEST, _FIRST * 2.0 ** min(flaps, 20))
    while True:
        yield pause
        pause = min(_LONGEST, 2 * pause)


def make_client(address: str, deadline: float, security: Security | None) -> Client:
    """Return a client of the executor's own, which dask code of the user does not use.

    Raises:
        OSError: No scheduler answers within so many seconds.
        ValueError: The address is none.
    """
    options: dict[str, Any] = {} if security is None else {"security": security}
    with config.set(SHORT_LOG):
        return Client(  # type: ignore[no-untyped-call]  # distributed leaves it without annotations
            address, timeout=deadline, set_as_default=False, name="flowtrain", **options
        )


def _close(client: Any) -> None:
    """Close a client; distributed leaves `close` without annotations."""
    log = logging.getLogger("distributed.client")  # in which a client that tries to connect again is a traceback
    log.addFilter(_is_no_cancel)
    try:
        with contextlib.suppress(Exception):  # closing fails if the scheduler is gone already
            client.close(timeout=5)
    finally:
        log.removeFilter(_is_no_cancel)


def _is_no_cancel(record: logging.LogRecord) -> bool:
    return record.exc_info is None or record.exc_info[0] is not asyncio.CancelledError


def _begin(blob: bytes) -> bytes:
    """Do an assignment. dask pickles this function and the bytes, and none of the types in the assignment."""
    from flowtrain_dask.cluster.worker import run_assignment

    return run_assignment(blob)


# Pickled by value: the scheduler unpickles the function as well, and may not have flowtrain.
_begin.__module__ = "__main__"
