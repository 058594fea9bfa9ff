"""Lanes on a cluster: batches go out as bytes, records and state come back, and the driver can always begin again.

The driver holds a state of the lane's callbacks as bytes (*home*), and the events since then (*the log*). A small
state comes home with every batch, so the log is empty. A large one stays on the worker, which is asked for it now and
then. If that worker is lost, another one gets home and the log: it runs those events again, and the lane drops their
records by sequence number.

If the cluster is lost, the callbacks get what is at home, and this process goes on from there.
"""

from __future__ import annotations

import pickle
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from flowtrain.callback.callback import Callback
from flowtrain.errors import ExecutorError
from flowtrain_dask.cluster.block import Block, Place, possible
from flowtrain_dask.cluster.callback_state import check_travels, dump_job, dump_state, load_state, stays
from flowtrain_dask.cluster.calls import Calls, ClusterLost, Patience
from flowtrain_dask.cluster.codec import Encoded
from flowtrain_dask.cluster.connect import Connection
from flowtrain_dask.cluster.entries import dump_entries
from flowtrain_dask.cluster.worker import Assignment, Reply, Versions, versions
from flowtrain_dask.lanes.report import Tally
from flowtrain_dask.lanes.transport import Abandoned, OnLoss, ThreadTransport
from flowtrain_dask.lanes.work import Entry, Job, Outcome, run_entries

__all__ = ["ClusterTransport"]

_SMALL = 64 << 10
"""Bytes of state that travel with every batch."""
_LOG_EVENTS = 2_000
_LOG_BYTES = 16 << 20
_LOG_SECONDS = 10.0
"""When a large state is asked for: so many events, bytes of events, or seconds after the last time."""

_LARGEST = 32 << 20
"""Bytes of events in a batch, which is in memory several times on its way."""
_WORTH = 256 << 10
"""Bytes of a batch from which on it is put into a block and not sent."""


class ClusterTransport:
    """Runs the batches of one lane on a cluster.

    Args:
        job: What the lane is there for.
        callbacks: The callbacks themselves; their attributes are replaced when the state comes home.
        connection: The cluster. It is the caller's: several lanes share it.
        on_loss: What happens when the cluster is lost: ``"local"`` goes on in this process, ``"raise"`` is an error.
        linger: For how many seconds a lane lets events gather: each call costs this process milliseconds.
        patience: How long the cluster is waited for.
    """

    def __init__(
        self,
        job: Job,
        callbacks: Sequence[Callback],
        connection: Connection,
        on_loss: OnLoss = "local",
        linger: float = 1.0,
        patience: Patience | None = None,
    ) -> None:
        self.linger = linger
        self._job = job
        self._callbacks = callbacks
        self._connection = connection
        self._on_loss = on_loss
        self._calls = Calls(connection, f"flowtrain-{job.run}-{job.lane}", patience)
        self._kept = stays(job, callbacks)
        self._packed = b""
        self._versions = versions()
        self._local: ThreadTransport | None = None
        # Where the state is: after `_seen` events on `_holder`, after `_seen - len(_log)` events at home.
        self._token = ""
        self._seen = 0
        self._home: bytes | None = None  # None: the callbacks themselves have it
        self._log: list[Entry] = []
        self._log_bytes = 0
        self._asked = 0.0
        self._holder = ""
        self._block: Block | None = None
        self._near = possible()  # whether workers are taken to be on this machine

    @property
    def largest(self) -> int:
        """How many bytes of events it takes at once."""
        return _LARGEST if self._local is None else self._local.largest

    @property
    def where(self) -> str:
        """The scheduler, and the worker that had the last batch."""
        if self._local is not None:
            return f"thread ({self._connection.address} was lost)"
        kind = "process" if self._connection.cluster is not None else self._connection.address
        sent = "" if self._near else " (batches are sent)"
        return f"{kind}, worker {self._holder}{sent}" if self._holder else kind

    def open(self, timeout: float) -> None:
        """See that the callbacks can travel, and that a worker has the same versions."""
        check_travels(self._job, self._callbacks)
        end = time.monotonic() + timeout
        tally = Tally()
        try:
            self._exchange((), True, nullcontext(), lambda: time.monotonic() > end, tally)
        except ClusterLost as lost:
            raise ExecutorError(f"The cluster at {self._connection.address} was lost: {lost}.") from lost
        except Abandoned as late:
            raise ExecutorError(
                f"No worker of the cluster at {self._connection.address} did a first task for lane {self._job.lane} "
                f"within {timeout:g} s. Look at the log of the workers, or whether others keep them busy."
            ) from late
        self._home = None

    def process(
        self, entries: Sequence[Entry], gate: AbstractContextManager[Any], closing: Callable[[], bool], tally: Tally
    ) -> Outcome:
        """Run a batch on a worker, or in this process if the cluster is lost.

        Raises:
            ExecutorError: The cluster is lost and that is to be an error, or the workers do not fit.
        """
        if self._local is None:
            try:
                return self._exchange(entries, self._is_due(entries), gate, closing, tally)
            except ClusterLost as lost:
                return self._go_on_here(lost, entries, gate, closing, tally)
        tally.local += len(entries)
        return self._local.process(entries, gate, closing, tally)

    def collect(self, closing: Callable[[], bool], tally: Tally) -> None:
        """Replace the attributes of the callbacks by what they are on the worker."""
        if self._local is not None or self._home is None:
            return
        try:
            if self._log:
                self._exchange((), True, nullcontext(), closing, tally)
        except ClusterLost as lost:
            failure = self._go_on_here(lost, (), nullcontext(), closing, tally).failure
        else:
            load_state(self._callbacks, self._kept, self._home)
            self._home = None  # whoever changes a callback now changes the one that counts
            return
        if failure is not None:  # of an event that had been done: the state is not what it was
            failure[1].add_note("raised when the event was run again for the state, since the cluster was lost")
            raise failure[1]

    def close(self) -> None:
        """Give back the memory of the block; the connection is the caller's."""
        if self._block is not None:
            self._block.close()

    def _is_due(self, entries: Sequence[Entry]) -> bool:
        """Return whether the next batch should bring the state home."""
        if self._home is None or len(self._home) <= _SMALL:
            return True
        late = time.monotonic() - self._asked > _LOG_SECONDS
        nbytes = self._log_bytes + sum(entry.nbytes for entry in entries)
        return late or len(self._log) >= _LOG_EVENTS or nbytes >= _LOG_BYTES

    def _exchange(
        self,
        entries: Sequence[Entry],
        want: bool,
        gate: AbstractContextManager[Any],
        closing: Callable[[], bool],
        tally: Tally,
    ) -> Outcome:
        """Have entries run, and keep book of where the state is."""
        if self._home is None:
            self._home = dump_state(self._callbacks, self._kept)
            self._packed = dump_job(self._job, self._callbacks)
            self._token = secrets.token_hex(8)
            self._log, self._log_bytes, self._holder = [], 0, ""
        complete = not self._holder or (not self._log and len(self._home) <= _SMALL)
        while True:
            whole = complete

            def blob(again: bool, whole: bool = whole) -> bytes:
                """Return the assignment, with home and the log or with neither."""
                if again and not whole:
                    tally.replays += len(self._log)
                # Further attempts are sent: what is in the block stays as it is, for the worker that has the first.
                return self._assignment(entries, again or whole, want, send=again)

            try:
                reply = self._calls.make(blob, "" if complete else self._holder, gate, closing, tally)
            finally:
                if self._block is not None:
                    self._block.shrink()
            if reply.kind == "done":
                return self._settle(reply, entries)
            self._refuse(reply)
            if reply.kind == "far":  # the worker is on another machine, and has not touched anything
                self._near = False
                continue
            complete = True
            tally.restarts += 1
            tally.replays += len(self._log)

    def _assignment(self, entries: Sequence[Entry], everything: bool, want: bool, *, send: bool) -> bytes:
        log: list[Entry] = self._log if everything else []
        events = dump_entries([*log, *entries])
        call = Assignment(
            self._token,
            self._versions,
            self._packed,
            self._seen - len(log),
            self._home if everything else None,
            bytes(events) if send else self._left(events),
            want,
        )
        return pickle.dumps(call)

    def _left(self, events: Encoded) -> bytes | Place:
        """Put events into the block if a worker is taken to find them there, and it is worth it; else return them."""
        if self._near and events.nbytes >= _WORTH:
            try:
                self._block = self._block or Block(_LARGEST)
                return self._block.fill(events.pieces)
            except OSError:  # no memory, or too many open files
                pass
        return bytes(events)

    def _settle(self, reply: Reply, entries: Sequence[Entry]) -> Outcome:
        """Take a reply that is done; what was run again is not counted again."""
        again = reply.ran - len(entries)
        outcome = Outcome(reply.records, max(0, reply.done - again))
        if reply.failure is not None:
            outcome.failure = reply.failure[0], pickle.loads(reply.failure[1])
        done = entries[: outcome.done]
        self._seen += len(done)
        self._holder = reply.address
        self._log += done
        self._log_bytes += sum(entry.nbytes for entry in done)
        if reply.state is not None:
            self._home = reply.state
            self._log, self._log_bytes, self._asked = [], 0, time.monotonic()
        return outcome

    def _refuse(self, reply: Reply) -> None:
        """Raise for a reply that no other attempt would make better.

        Raises:
            ExecutorError: The versions differ, or something cannot be unpickled there.
        """
        at = f"worker {reply.address} of {self._connection.address}" if reply.address else self._connection.address
        if reply.kind == "versions":
            raise ExecutorError(_different(self._versions, reply.versions, at))
        if reply.kind == "broken":
            raise ExecutorError(
                f"Lane {self._job.lane} cannot run on {at}: {reply.text}. What its callbacks import must be installed "
                f"there."
            )

    def _go_on_here(
        self,
        lost: ClusterLost,
        entries: Sequence[Entry],
        gate: AbstractContextManager[Any],
        closing: Callable[[], bool],
        tally: Tally,
    ) -> Outcome:
        """Go on in this process from what is at home.

        Raises:
            ExecutorError: That is not wanted.
        """
        if self._on_loss == "raise" or self._job.draws:
            remedy = 'With DaskExecutor(on_cluster_loss="local") they are processed in this process.'
            if self._job.draws:
                remedy = (
                    f"They may draw random numbers ({self._job.draws}), so no thread of this process may process them: "
                    f"it would take those of training. Resume from the last checkpoint, or set stochastic = False on a "
                    f"callback that draws none."
                )
            raise ExecutorError(
                f"The cluster at {self._connection.address} was lost during training ({lost}), and with it "
                f"{len(entries) + len(self._log)} events of lane {self._job.lane}. {remedy}"
            ) from lost
        if self._home is not None:
            load_state(self._callbacks, self._kept, self._home)
        self._home = None
        self.close()
        self._local = ThreadTransport(self._job, self._callbacks)
        self.linger = self._local.linger
        again = len(self._log)
        # All of it, however long it takes: what is in the log is not handed over again.
        job = self._job
        outcome = run_entries(self._callbacks, job, [*self._log, *entries], job.run, job.lane, gate)
        outcome.done = max(0, outcome.done - again)
        tally.replays += again
        tally.local += len(entries)
        self._log = []
        return outcome


def _different(here: Versions, there: Versions, at: str) -> str:
    names = here.differences(there)
    ours = ", ".join(f"{name} {getattr(here, name)}" for name in names)
    theirs = ", ".join(f"{name} {getattr(there, name)}" for name in names)
    return (
        f"This process has {ours}, but {at} has {theirs}. Code and tensors travel between them as bytes, so they must "
        f"be the same: install the same version on both."
    )
