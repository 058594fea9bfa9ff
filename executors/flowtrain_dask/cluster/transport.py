"""Lanes on a cluster: events are sent to a worker as bytes, and records and the state of the callbacks come back.

The training process can always begin again, because it holds two things: a *saved state* of the lane's callbacks as
bytes, and a *log* of the events since then. A small state comes back with every batch, so its log is empty. A large
state stays on the worker, and is asked for from time to time. If that worker is lost, another worker gets the saved
state and the log. It runs those events again, and the lane drops their records by their sequence numbers.

If the cluster is lost, the callbacks of this process get the saved state, and this process runs the log and the events
that follow. When the cluster is back, the lane begins there anew with the state of the callbacks of this process.
"""

from __future__ import annotations

import logging
import pickle
import secrets
import time
from collections.abc import Sequence

from flowtrain.callback.callback import Callback
from flowtrain.errors import ExecutorError
from flowtrain_dask.cluster.block import Block, BlockPlace, possible
from flowtrain_dask.cluster.callback_state import check_can_be_sent, dump_job, dump_state, load_state, shared_objects
from flowtrain_dask.cluster.calls import ClusterCalls, ClusterLost, Timeouts
from flowtrain_dask.cluster.codec import Encoded, decode, dump_entries
from flowtrain_dask.cluster.connection import Connection
from flowtrain_dask.cluster.worker import Assignment, Reply, different, versions
from flowtrain_dask.lanes.transport import Abandoned, LaneContext, OnLoss, ThreadTransport
from flowtrain_dask.lanes.work import BatchResult, Entry, Job, run_entries

__all__ = ["ClusterTransport"]

_logger = logging.getLogger("flowtrain")

_SMALL = 64 << 10
"""Bytes. A state up to this size comes back with every batch."""
_LOG_EVENTS = 2_000
_LOG_BYTES = 16 << 20
_LOG_SECONDS = 10.0
"""A larger state is asked for after so many events, bytes of events, or seconds."""

_LARGEST = 32 << 20
"""The most bytes of events in one batch, of which several copies exist on its way to a worker."""
_BLOCK_FROM = 256 << 10
"""Bytes. A batch of at least this size is put into a block and not sent."""


class ClusterTransport:
    """Runs the batches of one lane on a cluster.

    Args:
        job: The job of the lane.
        callbacks: The callbacks of the lane. Their attributes are replaced when the state comes back.
        connection: The cluster. Several lanes share it, so `close` leaves it open.
        on_loss: ``"local"``: if the cluster is lost, this process runs the events. ``"raise"``: that is an error.
        linger: For how many seconds a lane lets events gather, because each call costs this process milliseconds.
        patience: How long a call waits for the cluster.
    """

    def __init__(
        self,
        job: Job,
        callbacks: Sequence[Callback],
        connection: Connection,
        on_loss: OnLoss = "local",
        linger: float = 1.0,
        patience: Timeouts | None = None,
    ) -> None:
        self.linger = self._linger = linger
        self._job = job
        self._callbacks = callbacks
        self._connection = connection
        self._on_loss = on_loss
        self._calls = ClusterCalls(connection, job.run, job.lane, patience)
        self._shared_objects = shared_objects(job, callbacks)
        self._packed_job = b""
        self._versions = versions()
        self._local: ThreadTransport | None = None  # runs the events while the cluster is lost
        self._refused: object = None  # the client with which the lane could not go back
        # The state after `_seen` events is on `_worker`, the saved state is that after `_seen - len(_log)` events.
        self._token = ""
        self._seen = 0
        self._saved: bytes | None = None  # None: the callbacks of this process have the state
        self._log: list[Entry] = []
        self._log_bytes = 0
        self._saved_at = 0.0
        self._worker = ""
        self._shifts: dict[str, tuple[int, int]] = {}  # by worker: how far its clock is off, in ns, and for how sure
        self._block: Block | None = None
        self._same_machine = possible()  # whether workers are taken to be on this machine

    @property
    def largest(self) -> int:
        """How many bytes of events one batch may have."""
        return _LARGEST if self._local is None else self._local.largest

    @property
    def is_remote(self) -> bool:
        """Whether a worker runs the batches, and not this process because the cluster is lost."""
        return self._local is None

    @property
    def where(self) -> str:
        """The scheduler and the worker that had the last batch, as the report shows them."""
        if self._local is not None:
            return f"thread ({self._connection.address} was lost)"
        kind = "process" if self._connection.cluster is not None else self._connection.address
        sent = "" if self._same_machine else " (batches are sent)"
        return f"{kind}, worker {self._worker}{sent}" if self._worker else kind

    def open(self, timeout: float) -> None:
        """Check that the callbacks can be sent, and that a worker has the same versions.

        Raises:
            ExecutorError: A callback does not pickle, the versions differ, or no worker does a first task in time.
        """
        check_can_be_sent(self._job, self._callbacks)
        if self._connection.lost and self._on_loss == "local":
            return  # the lane begins in this process, and has its first task when the cluster is back
        try:
            self._exchange((), LaneContext(time.monotonic() + timeout), wants_state=True)
        except _OtherVersions as other:
            raise ExecutorError(str(other)) from other
        except ClusterLost as lost:
            raise ExecutorError(
                f"The cluster at {self._connection.address} was lost before training began: {lost}. Start the "
                f"scheduler and a worker again, and build the learner anew."
            ) from lost
        except Abandoned as late:
            raise ExecutorError(
                f"No worker of the cluster at {self._connection.address} did a first task for lane {self._job.lane} "
                f"within {timeout:g} s. Look at the log of the workers, or whether others keep them busy."
            ) from late
        self._saved = None

    def run_batch(self, entries: Sequence[Entry], context: LaneContext) -> BatchResult:
        """Run a batch on a worker, or in this process if the cluster is lost.

        Raises:
            ExecutorError: The cluster is lost and this process must not run the events.
        """
        if self._local is not None and not self._goes_back(context):
            result = self._local.run_batch(entries, context)
            context.counts.local += result.done
            return result
        client = self._connection.client
        try:
            return self._exchange(entries, context, wants_state=self._wants_state(entries))
        except ClusterLost as lost:
            return self._continue_here(lost, client, entries, context)

    def bring_state_back(self, context: LaneContext) -> None:
        """Give the callbacks the attributes that they have on the worker.

        Raises:
            ExecutorError: The cluster is lost and this process must not run the events.
        """
        if self._local is not None or self._saved is None:
            return
        client = self._connection.client
        try:
            if self._log:
                self._exchange((), context, wants_state=True)
        except ClusterLost as lost:
            failure = self._continue_here(lost, client, (), context).failure
        else:
            load_state(self._callbacks, self._shared_objects, self._saved)
            self._saved = None  # the next batch starts from the callbacks, which the user may change meanwhile
            return
        if failure is not None:  # an event that was done before has failed now, so the state is another one
            failure[1].add_note("raised when the event was run again for the state, since the cluster was lost")
            raise failure[1]

    def restore_state(self) -> Sequence[Entry]:
        """Give the callbacks the saved state; return the log of the events since then."""
        if self._local is None and self._saved is not None:
            load_state(self._callbacks, self._shared_objects, self._saved)
        return tuple(self._log)

    def close(self) -> None:
        """Free the memory of the block. The connection stays open."""
        if self._block is not None:
            self._block.close()
            self._block = None

    def _wants_state(self, entries: Sequence[Entry]) -> bool:
        """Return whether the state is to come back with the next batch."""
        if self._saved is None or len(self._saved) <= _SMALL:
            return True
        late = time.monotonic() - self._saved_at > _LOG_SECONDS
        nbytes = self._log_bytes + sum(entry.nbytes for entry in entries)
        return late or len(self._log) >= _LOG_EVENTS or nbytes >= _LOG_BYTES

    def _exchange(self, entries: Sequence[Entry], context: LaneContext, *, wants_state: bool) -> BatchResult:
        """Have entries run on a worker, and take note of where the state is afterwards."""
        if self._connection.lost:
            raise ClusterLost(self._connection.lost)
        if self._saved is None:
            self._saved = dump_state(self._callbacks, self._shared_objects)
            self._packed_job = dump_job(self._job, self._callbacks)
            self._token = secrets.token_hex(8)
            self._log, self._log_bytes, self._worker = [], 0, ""
        # Whether the first attempt is complete: any worker can do it. Otherwise `_worker` alone has the state.
        complete = not self._worker or (not self._log and len(self._saved) <= _SMALL)
        while True:
            first = complete

            def blob(again: bool, first: bool = first) -> bytes:
                """Return the assignment, complete or without saved state and log."""
                if again and not first:
                    context.counts.replays += len(self._log)
                # Further attempts do not use the block: the worker of the first attempt may be reading it.
                complete = again or first
                return self._assignment(entries, complete, wants_state=wants_state, send=again, timed=context.timed)

            sent = time.perf_counter_ns()
            try:
                reply = self._calls.make(blob, "" if complete else self._worker, context)
            finally:
                if self._block is not None:
                    self._block.shrink()
            if reply.kind == "done":
                reply.times = self._on_own_clock(reply, sent, time.perf_counter_ns())
                return self._accept(reply, entries)
            self._raise_for(reply)
            if reply.kind == "not on this machine":  # the worker has run nothing, and still has the state
                self._same_machine = False
                continue
            complete = True  # the worker no longer has the state
            context.counts.restarts += 1
            context.counts.replays += len(self._log)

    def _on_own_clock(self, reply: Reply, sent: int, received: int) -> list[tuple[int, int]]:
        """Return the times of a reply, which are by the clock of the worker, by the clock of this process.

        The worker began after the call was sent, and ended before its reply was received, which bounds the difference
        of the clocks. The best estimate is from the call that has the narrowest bounds, within those of this call.

        Args:
            reply: The reply.
            sent: When the call was sent, in ns of `time.perf_counter_ns`.
            received: When the reply was received.
        """
        least, most = sent - reply.span[0], received - reply.span[1]
        width, shift = self._shifts.get(reply.address, (most - least + 1, 0))
        if most - least < width:
            width, shift = self._shifts[reply.address] = most - least, (least + most) // 2
        shift = min(max(shift, least), most)
        return [(begin + shift, end + shift) for begin, end in reply.times]

    def _assignment(
        self, entries: Sequence[Entry], complete: bool, *, wants_state: bool, send: bool, timed: bool
    ) -> bytes:
        log: list[Entry] = self._log if complete else []
        events = dump_entries([*log, *entries])
        call = Assignment(
            self._token,
            self._versions,
            self._packed_job,
            self._seen - len(log),
            self._saved if complete else None,
            bytes(events) if send else self._put_into_block(events),
            wants_state,
            timed,
        )
        return pickle.dumps(call)

    def _put_into_block(self, events: Encoded) -> bytes | BlockPlace:
        """Put events into the block and return the place; return the bytes if they are few or no worker finds it."""
        if self._same_machine and events.nbytes >= _BLOCK_FROM:
            try:
                self._block = self._block or Block(_LARGEST)
                return self._block.fill(events.pieces)
            except OSError:  # no memory, or too many open files: sending still works
                pass
        return bytes(events)

    def _accept(self, reply: Reply, entries: Sequence[Entry]) -> BatchResult:
        """Take note of the state after a reply, and return its result without the events that were run again."""
        again = reply.ran - len(entries)
        result = BatchResult(reply.records, max(0, reply.done - again), times=reply.times[again:], worker=reply.address)
        if reply.changes:
            result.changes = decode(reply.changes)
        if reply.failure is not None:
            result.failure = reply.failure[0], pickle.loads(reply.failure[1])
        done = entries[: result.done]
        self._seen += len(done)
        self._worker = reply.address
        self._log += done
        self._log_bytes += sum(entry.nbytes for entry in done)
        if reply.state is not None:
            self._saved = reply.state
            self._log, self._log_bytes, self._saved_at = [], 0, time.monotonic()
        return result

    def _raise_for(self, reply: Reply) -> None:
        """Raise for a reply that another attempt would give again.

        Raises:
            ClusterLost: The versions differ.
            ExecutorError: The worker cannot unpickle the assignment.
        """
        at = f"worker {reply.address} of {self._connection.address}" if reply.address else self._connection.address
        if reply.kind == "versions":
            raise _OtherVersions(different(self._versions, reply.versions, at))
        if reply.kind == "not picklable":
            raise ExecutorError(
                f"Lane {self._job.lane} cannot run on {at}: {reply.text}. What its callbacks import must be installed "
                f"there."
            )

    def _continue_here(
        self, lost: ClusterLost, client: object, entries: Sequence[Entry], context: LaneContext
    ) -> BatchResult:
        """Continue in this process from the saved state, until the cluster is back.

        Raises:
            ExecutorError: This process must not run the events.
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
        self._connection.lose(str(lost), client)
        if self._saved is not None:
            load_state(self._callbacks, self._shared_objects, self._saved)
        self._saved = None
        self.close()
        self._local = ThreadTransport(self._job, self._callbacks)
        self.linger = self._local.linger
        again = len(self._log)
        # All at once, and not for about a second as otherwise: the lane would not hand over the log a second time.
        job = self._job
        result = run_entries(self._callbacks, job, [*self._log, *entries], job.run, job.lane, context.gate)
        result.done = max(0, result.done - again)
        context.counts.replays += again
        context.counts.local += result.done
        self._log = []
        return result

    def _goes_back(self, context: LaneContext) -> bool:
        """Go back to the cluster if it is back, with a first task as when the lane was opened; return whether it went.

        The callbacks of this process have the state after all events so far, so the lane begins anew with it.
        """
        client = self._connection.client
        if self._connection.lost or client is self._refused:
            return False
        self._same_machine = possible()
        try:
            check_can_be_sent(self._job, self._callbacks)
            self._exchange((), context, wants_state=True)
        except BaseException as failure:
            self._saved = None  # the callbacks of this process have the state, as before
            if isinstance(failure, ClusterLost):
                self._connection.lose(str(failure), client)
            elif isinstance(failure, ExecutorError):
                self._refused = client
                _logger.warning("flowtrain: lane %s does not go back to the cluster: %s", self._job.lane, failure)
            else:
                raise
            return False
        self._local, self.linger = None, self._linger
        return True


class _OtherVersions(ClusterLost):
    """A worker has other versions. Before training that is an error; in training its cluster is taken for lost."""
