"""One call to the cluster: submitted, watched, and submitted again if it is stuck. The first reply counts.

dask runs a task again when its worker is lost. It takes minutes to notice a worker that is stopped, because that worker
is still connected and only silent. So a call asks the scheduler about once a second, and when no worker that has the
task was heard of for some seconds, the task goes to another worker. A task is a pure function, so any number of workers
may run it.

Everything here runs on the thread that works on the lane, and every wait has a limit.
"""

from __future__ import annotations

import pickle
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dask import config
from distributed import Future
from distributed.scheduler import KilledWorker

from flowtrain.errors import ExecutorError
from flowtrain_dask.cluster.connection import Connection
from flowtrain_dask.cluster.worker import Reply
from flowtrain_dask.lanes.transport import Abandoned, LaneContext

__all__ = ["ClusterCalls", "ClusterLost", "Timeouts"]

_LOOK = 0.25
"""The most seconds of one wait for a reply."""
_ASK = 1.0
"""Seconds between two questions to the scheduler, and before the first one."""
_LARGE = 8 << 20
"""Bytes. dask's warning of a large graph is switched off for a larger call: the user cannot make an event smaller."""


class ClusterLost(Exception):
    """The scheduler is gone, or the cluster has no workers. The transport catches this."""


@dataclass
class Timeouts:
    """How long a call waits, in seconds.

    Attributes:
        silent: After this time without a sign of life a worker is taken for stopped.
        away: After this time without a connection to the scheduler the cluster is taken for lost.
        alone: After this time without any worker the cluster is taken for lost.
        answer: The scheduler, and a result that is ready, must arrive within this time.
        attempts: How often a call may fail and still be tried again.
    """

    silent: float = 5.0
    away: float = 3.0
    alone: float = 30.0
    answer: float = 5.0
    attempts: int = 2


class ClusterCalls:
    """Makes the calls of one lane, one after another.

    Args:
        connection: The cluster.
        run: The id of the run.
        lane: The name of the lane.
        patience: How long a call waits.
    """

    def __init__(self, connection: Connection, run: str, lane: str, patience: Timeouts | None = None) -> None:
        self._connection = connection
        self._patience = patience or Timeouts()
        self._lane = lane
        # dask's dashboard groups and colours tasks by their keys up to the first "-" before a number.
        self._name = f"{lane.replace('-', '_')}@{run}"
        self._token = secrets.token_hex(3)  # the same run, resumed, must not get results of its earlier tasks
        self._number = 0

    def make(self, blob: Callable[[bool], bytes], worker: str, context: LaneContext) -> Reply:
        """Make one call and return its reply.

        Args:
            blob: Returns the pickled assignment; for ``True`` a complete one, which any worker can do.
            worker: The worker that gets the first attempt if it is still there; empty for any worker.
            context: The context of the lane. Its gate is entered while the call is pickled and sent.

        Raises:
            Abandoned: `LaneContext.is_stopped` returned ``True``.
            ClusterLost: The cluster is gone.
            ExecutorError: The call has failed on several workers, or the workers cannot import flowtrain.
        """
        call = _Call(self._connection, self._patience, f"{self._name}-{self._number}.{self._token}")
        self._number += 1
        with context.gate:
            call.submit(blob(False), [worker] if worker else None)
        while True:
            reply = call.look()
            if reply is not None:
                return reply
            if context.is_stopped():
                raise Abandoned
            if call.failures > self._patience.attempts:
                raise ExecutorError(
                    f"A batch of lane {self._lane} failed {call.failures} times on the cluster at "
                    f"{self._connection.address}, the last time with {call.trouble}. If its handlers end the process "
                    f"(memory, a native library), look at the log of the workers."
                )
            if call.can_be_submitted() and (elsewhere := call.workers_for_another()) is not None:
                context.counts.restarts += 1
                with context.gate:
                    call.submit(blob(True), elsewhere)
            call.wait()


class _Call:
    """The attempts of one call.

    Attributes:
        failures: How many attempts have failed.
        trouble: The last failure, as text.
    """

    def __init__(self, connection: Connection, patience: Timeouts, key: str) -> None:
        self.failures = 0
        self.trouble = ""
        self._connection = connection
        self._patience = patience
        self._key = key
        self._count = 0
        self._attempts: dict[Future[bytes], frozenset[str]] = {}  # each with the workers that it was submitted to
        self._finished = threading.Event()
        self._asked = time.monotonic()
        self._away: float | None = None  # since when the scheduler is not connected
        self._unanswered = 0
        self._alone: float | None = None  # since when there is no worker
        self._heard: dict[str, tuple[float, float]] = {}  # by worker: its last sign of life, and when that arrived here

    def submit(self, blob: bytes, workers: list[str] | None) -> None:
        """Begin an attempt, on one of these workers if one of them is there; ``None`` for any worker."""
        key = self._key if not self._count else f"{self._key}.{self._count}"
        self._count += 1
        quiet = {"distributed.admin.large-graph-warning-threshold": "1 PiB"} if len(blob) > _LARGE else {}
        try:
            with config.set(quiet):
                future = self._connection.submit(blob, key, workers)
        except Exception as error:  # the client may be closed or lose its connection at any point of this
            raise ClusterLost(f"{type(error).__name__}: {error}") from error
        future.add_done_callback(self._finish)  # type: ignore[no-untyped-call]  # distributed has no annotation
        self._attempts[future] = frozenset(workers or ())

    def look(self) -> Reply | None:
        """Return the reply of a finished attempt, or ``None`` if there is none; forget the attempts that failed."""
        for future in list(self._attempts):
            if future.status == "pending":
                continue
            try:
                blob: bytes = future.result(timeout=self._patience.answer)
                reply: Reply = pickle.loads(blob)  # `run_assignment` has pickled it
                return reply
            except ImportError as error:
                raise ExecutorError(
                    f"The workers of {self._connection.address} cannot import flowtrain: {type(error).__name__}: "
                    f"{error}. Install there what is installed here: pip install 'flowtrain[dask]'"
                ) from error
            except Exception as error:  # lost on the way, cancelled, or its worker was killed: another attempt follows
                del self._attempts[future]
                self.trouble = f"{type(error).__name__}: {error}"
                # While the client is not connected, dask cancels all futures: that is no failure of this call.
                if isinstance(error, KilledWorker) or self._connection.client.status == "running":
                    self.failures += 1
        return None

    def wait(self) -> None:
        """Wait until an attempt has finished, but only a moment."""
        self._finished.wait(_LOOK)
        self._finished.clear()

    def can_be_submitted(self) -> bool:
        """Return whether the scheduler is connected.

        Raises:
            ClusterLost: The scheduler is gone for good.
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

    def workers_for_another(self) -> list[str] | None:
        """Return the workers for another attempt, ``[]`` for any worker, ``None`` if no other attempt is needed.

        Raises:
            ClusterLost: The scheduler does not answer, or there has been no worker for too long.
        """
        if not self._attempts:
            return []
        now = time.monotonic()
        if now - self._asked < _ASK:
            return None
        self._asked = now
        try:
            workers = self._connection.workers(self._patience.answer)
            at_work = self._at_work()
        except Exception as error:  # the scheduler is stopped, or about to end
            self._unanswered += 1
            if self._unanswered >= 2:
                raise ClusterLost(f"the scheduler does not answer ({type(error).__name__})") from error
            return None
        self._unanswered = 0
        self._check_alone(workers, now)
        silent = self._silent(workers, now)
        others = [address for address in workers if address not in silent]
        for future, meant in self._attempts.items():
            holding = set(at_work.get(str(future.key), ()))
            # If all workers that a task was submitted to are gone, dask does not give it to workers that join later.
            forgotten = bool(meant) and not holding and not meant & workers.keys()
            if not forgotten and not (holding and holding <= silent):
                return None
        return others or None

    def _finish(self, future: object) -> None:
        self._finished.set()

    def _at_work(self) -> dict[str, list[str]]:
        """Return for each key the workers that have the task."""
        processing = self._connection.ask("processing", self._patience.answer, workers=None)
        found: dict[str, list[str]] = {}
        for address, keys in processing.items():
            for key in keys:
                found.setdefault(str(key), []).append(address)
        return found

    def _check_alone(self, workers: dict[str, Any], now: float) -> None:
        if workers:
            self._alone = None
            return
        self._alone = now if self._alone is None else self._alone
        if now - self._alone >= self._patience.alone:
            raise ClusterLost(f"it has had no worker for {self._patience.alone:g} s")

    def _silent(self, workers: dict[str, Any], now: float) -> set[str]:
        """Return the workers that were silent for too long, by this machine's clock: theirs may be wrong."""
        for address, worker in workers.items():
            sign = worker["last_seen"]
            if self._heard.get(address, (None,))[0] != sign:
                self._heard[address] = sign, now
        return {one for one in workers if now - self._heard[one][1] >= self._patience.silent}
