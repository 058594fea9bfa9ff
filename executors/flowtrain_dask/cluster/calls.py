"""One call to a cluster: submitted, watched, submitted again where it got stuck; the first reply counts.

dask itself runs a task again when its worker is lost. What it does not notice for minutes is a worker that is stopped:
it is still connected and silent. So the scheduler is asked now and then, and when all workers that have the task have
not been heard of for some seconds, it is given to another one. The task is a pure function, so it does not matter how
many run it.

All of this happens on the lane's thread, and every wait has an end.
"""

from __future__ import annotations

import pickle
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from dask import config
from distributed import Future
from distributed.scheduler import KilledWorker

from flowtrain.errors import ExecutorError
from flowtrain_dask.cluster.connect import Connection
from flowtrain_dask.cluster.worker import Reply
from flowtrain_dask.lanes.report import Tally
from flowtrain_dask.lanes.transport import Abandoned

__all__ = ["Calls", "ClusterLost"]

_LOOK = 0.25
"""Seconds between two looks at a call that nothing is heard of."""
_ASK = 1.0
"""Seconds between two questions to the scheduler, beginning after as many seconds."""
_LARGE = 8 << 20
"""Bytes from which on dask may warn of a large graph; there is nothing to be done about an event of that size."""


class ClusterLost(Exception):
    """The scheduler is gone, or nobody is there to work. It never leaves the transport."""


@dataclass
class Patience:
    """How long what is waited for, in seconds.

    Attributes:
        silent: A worker that was not heard of for so long is taken for stopped.
        away: The client has lost the scheduler for so long: it is gone.
        alone: No worker is there for so long: the cluster is gone.
        answer: The scheduler, or a result that is ready, has to answer within this.
        attempts: How often the call may fail before that is an error.
    """

    silent: float = 5.0
    away: float = 3.0
    alone: float = 30.0
    answer: float = 5.0
    attempts: int = 2


class Calls:
    """Makes the calls of one lane, one after the other.

    Args:
        connection: The cluster.
        name: What the keys of tasks begin with, as ``"flowtrain-<run>-<callback>"``.
        patience: How long what is waited for.
    """

    def __init__(self, connection: Connection, name: str, patience: Patience | None = None) -> None:
        self._connection = connection
        self._patience = patience or Patience()
        self._name = name
        self._token = secrets.token_hex(3)  # a resumed run has the same name, and must not meet its earlier results
        self._number = 0

    def make(
        self,
        blob: Callable[[bool], bytes],
        worker: str,
        gate: AbstractContextManager[Any],
        closing: Callable[[], bool],
        tally: Tally,
    ) -> Reply:
        """Make one call and return its reply.

        Args:
            blob: Returns the pickled assignment; with ``True`` one that holds all that any worker needs.
            worker: The worker that should have it, if it is there; empty for any.
            gate: Entered while something is made ready and sent.
            closing: Whether to give up.
            tally: Where restarts are counted.

        Raises:
            Abandoned: `closing` said so.
            ClusterLost: The cluster is gone.
            ExecutorError: The call fails wherever it runs.
        """
        call = _Call(self._connection, self._patience, f"{self._name}-{self._number}.{self._token}")
        self._number += 1
        with gate:
            call.submit(blob(False), [worker] if worker else None)
        while True:
            reply = call.look()
            if reply is not None:
                return reply
            if closing():
                raise Abandoned
            if call.failures > self._patience.attempts:
                raise ExecutorError(
                    f"A batch of lane {self._name.rpartition('-')[2]} failed {call.failures} times on the cluster at "
                    f"{self._connection.address}, the last time with {call.trouble}. If its handlers end the process "
                    f"(memory, a native library), look at the log of the workers."
                )
            if call.can_be_submitted() and (elsewhere := call.wants_another()) is not None:
                tally.restarts += 1
                with gate:
                    call.submit(blob(True), elsewhere)
            call.wait()


class _Call:
    """The attempts of one call."""

    def __init__(self, connection: Connection, patience: Patience, key: str) -> None:
        self.failures = 0
        self.trouble = ""
        self._connection = connection
        self._patience = patience
        self._key = key
        self._count = 0
        self._attempts: dict[Future[bytes], frozenset[str]] = {}  # with the workers that it was meant for
        self._woken = threading.Event()
        self._asked = time.monotonic()
        self._away: float | None = None
        self._unanswered = 0
        self._alone: float | None = None
        self._heard: dict[str, tuple[float, float]] = {}  # by worker: its last sign of life, and when it changed

    def submit(self, blob: bytes, workers: list[str] | None) -> None:
        """Begin an attempt."""
        key = self._key if not self._count else f"{self._key}.{self._count}"
        self._count += 1
        quiet = {"distributed.admin.large-graph-warning-threshold": "1 PiB"} if len(blob) > _LARGE else {}
        try:
            with config.set(quiet):
                future = self._connection.client.submit(
                    _begin,
                    blob,
                    key=key,
                    pure=False,
                    retries=2,
                    workers=workers,
                    allow_other_workers=bool(workers),
                    resources=self._connection.resources,
                )
        except Exception as error:  # a client that is closed or broken in the middle of it
            raise ClusterLost(f"{type(error).__name__}: {error}") from error
        future.add_done_callback(self._wake)  # type: ignore[no-untyped-call]  # distributed has no annotation
        self._attempts[future] = frozenset(workers or ())

    def look(self) -> Reply | None:
        """Return the reply of an attempt that has finished, if there is one; forget the attempts that failed."""
        for future in list(self._attempts):
            if future.status == "pending":
                continue
            try:
                blob: bytes = future.result(timeout=self._patience.answer)
                return pickle.loads(blob)  # type: ignore[no-any-return]  # what `process` returns
            except ImportError as error:
                raise ExecutorError(
                    f"The workers of {self._connection.address} cannot import flowtrain: {type(error).__name__}: "
                    f"{error}. Install there what is installed here: pip install 'flowtrain[dask]'"
                ) from error
            except Exception as error:  # lost on the way, cancelled, killed: it is tried again
                del self._attempts[future]
                self.trouble = f"{type(error).__name__}: {error}"
                if isinstance(error, KilledWorker) or self._connection.client.status == "running":
                    self.failures += 1
        return None

    def wait(self) -> None:
        """Wait a moment, or until an attempt has finished."""
        self._woken.wait(_LOOK)
        self._woken.clear()

    def can_be_submitted(self) -> bool:
        """Return whether the scheduler is there.

        Raises:
            ClusterLost: It is gone for good.
        """
        status = self._connection.client.status
        now = time.monotonic()
        if status == "running":
            self._away = None
            return True
        self._away = now if self._away is None else self._away
        if status == "connecting" and now - self._away < self._patience.away:
            return False
        raise ClusterLost(f"the scheduler at {self._connection.address} is gone")

    def wants_another(self) -> list[str] | None:
        """Return the workers for a further attempt, ``[]`` for any; ``None`` where there is no need for one."""
        if not self._attempts:
            return []
        now = time.monotonic()
        if now - self._asked < _ASK:
            return None
        self._asked = now
        try:
            workers = self._connection.workers(self._patience.answer)
            at_work = self._at_work()
        except Exception as error:  # a scheduler that is stopped, or about to go
            self._unanswered += 1
            if self._unanswered >= 2:
                raise ClusterLost(f"the scheduler does not answer ({type(error).__name__})") from error
            return None
        self._unanswered = 0
        self._mind_loneliness(workers, now)
        silent = self._silent(workers, now)
        others = [address for address in workers if address not in silent]
        for future, meant in self._attempts.items():
            holding = set(at_work.get(str(future.key), ()))
            # dask forgets to give it to a worker that joins when all those that it was meant for are gone.
            forgotten = bool(meant) and not holding and not meant & workers.keys()
            if not forgotten and not (holding and holding <= silent):
                return None
        return others or None

    def _wake(self, future: object) -> None:
        self._woken.set()

    def _at_work(self) -> dict[str, list[str]]:
        """Return for each key which workers have it."""
        processing = self._connection.ask("processing", self._patience.answer, workers=None)
        found: dict[str, list[str]] = {}
        for address, keys in processing.items():
            for key in keys:
                found.setdefault(str(key), []).append(address)
        return found

    def _mind_loneliness(self, workers: dict[str, Any], now: float) -> None:
        if workers:
            self._alone = None
            return
        self._alone = now if self._alone is None else self._alone
        if now - self._alone >= self._patience.alone:
            raise ClusterLost(f"it has had no worker for {self._patience.alone:g} s")

    def _silent(self, workers: dict[str, Any], now: float) -> set[str]:
        """Return the workers that were not heard of for a while; by our clock, theirs may go wrong."""
        for address, worker in workers.items():
            sign = worker["last_seen"]
            if self._heard.get(address, (None,))[0] != sign:
                self._heard[address] = sign, now
        return {one for one in workers if now - self._heard[one][1] >= self._patience.silent}


def _begin(blob: bytes) -> bytes:
    """Do an assignment. The one function that dask itself gets to see."""
    from flowtrain_dask.cluster.worker import process

    return process(blob)


_begin.__module__ = "__main__"  # pickled by value: the scheduler unpickles it as well, and need not have flowtrain
