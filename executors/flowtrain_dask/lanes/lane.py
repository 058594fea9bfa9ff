"""A lane: deferred events wait in it, and are processed one at a time and in order.

The training thread puts an event at the end of the queue (`Lane.put`). A thread of `flowtrain_dask.lanes.threads` takes
the events that have gathered for a moment (the linger), hands them over as one batch, writes the records of the result
and counts the events as done (`Lane.work`). One thread at a time works on a lane, and there is never more than one
batch at work, so a slow lane gets large batches.

The training thread may be interrupted between any two instructions, so it takes no lock. The attributes that both
threads see have one writer each. Where one thread changes an attribute and then looks at another one, the other thread
does the same the other way round, so that at least one of them sees the change: `put` appends and then looks whether
the lane sleeps, `due` notes that it sleeps and then looks for events; `pause` asks for a pause and then looks whether
the lane is at work, `work` begins and then looks for a pause.

When a handler fails, the records before the failure are written. Then the failure is left for the training thread. The
entries that are put until the training thread raises it are skipped, since they would not exist if the handler had run
in place. Entries that are put later are processed. `FitEnd` is processed whenever it was put.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import copy_context
from typing import Any

from flowtrain.callback.events import Event, FitEnd
from flowtrain.callback.phases import Phase
from flowtrain_dask.lanes.answers import Answer, Answers
from flowtrain_dask.lanes.event_queue import EventQueue
from flowtrain_dask.lanes.gate import Gate, close_copies, guard
from flowtrain_dask.lanes.limits import Limits
from flowtrain_dask.lanes.report import LaneReport
from flowtrain_dask.lanes.threads import LaneThreads
from flowtrain_dask.lanes.transport import Abandoned, ClockNow, LaneContext, OnError, Transport
from flowtrain_dask.lanes.work import BatchResult, Entry, Job, RecordWriter
from flowtrain_dask.parallel.torch_state import TorchState

__all__ = ["Lane"]

_logger = logging.getLogger("flowtrain")
_POLL = 0.002  # seconds between two looks at a condition: a signal would not end a wait for a lock on every system


class Lane:
    """A bounded queue of events that are processed by one thread at a time.

    Args:
        job: The job of the lane. Its backends must be open while there are entries.
        transport: Runs the batches. It is open already.
        limits: How many events, and how many bytes, may wait.
        threads: The threads that work on the lane.
        raise_on_training_thread: Called with a callable that raises a failure, for the training thread to call soon.
        on_error: ``"raise"``, or ``"warn"``: a failure is logged, and the lane retires.
        stopping: Returns whether training is about to stop; then `put` no longer waits for room.
        clock: Returns the clock of the timeline that is written now; ``None`` without one.
        linger_events: How many waiting events end the linger; half of the limit if that is less.
        holds: Keeps the sinks of the lane open until it is closed, even if the learner is gone.

    Attributes:
        name: The name of the lane.
        answers: What the handlers write with a lag, for the training thread.
        failure: The failure that the training thread is to raise.
        refuses: Whether the lane takes no events: it is closed or retired.
        given_up: Whether the last `wait` has ended before the events were done.
    """

    def __init__(
        self,
        job: Job,
        transport: Transport,
        limits: Limits,
        threads: LaneThreads,
        *,
        raise_on_training_thread: Callable[[Callable[[], None]], None],
        on_error: OnError = "raise",
        stopping: Callable[[], bool] = lambda: False,
        clock: ClockNow = lambda: None,
        linger_events: int = 4000,
        holds: object = None,
    ) -> None:
        self.job = job
        self.name = job.lane
        self._transport = transport
        self._blocks = limits.when_full == "block"
        self._threads = threads
        self._raise_on_training_thread = raise_on_training_thread
        self._on_error: OnError = on_error
        self._stopping = stopping
        self._linger_events = max(1, min(linger_events, limits.pending // 2))  # so that training need not wait for room
        self._queue = EventQueue(limits, transport.largest)
        self._context = context = LaneContext(clock=clock)
        self._records = RecordWriter(job.backends, context.counts)
        self.answers = Answers(context, stopping)
        self.given_up = False
        self._holds = holds
        # The training thread writes these.
        self.refuses = False
        self._woken = -1  # the number of the look for which the lane was woken last
        self._resume_at = 0  # entries before this one were put before the last failure was raised
        # The thread that works on the lane writes these, but the training thread forgets a failure that it raises.
        self.failure: BaseException | None = None
        self._retired = False
        self._resumed_at = 0  # entries before this one have been skipped where they had to be
        self._brought_back = 0  # the callbacks of this process have the state after this many entries
        # Both write this: whether the training thread waits until all entries are done and the state has come back.
        self._flushing = False
        # The leader of the threads writes these.
        self._looks = 0
        self._asleep = True  # whether the lane must be woken when an entry is put
        self._gathers_since = 0.0  # when the linger began
        self._turn = threading.Lock()  # held while the lane is worked on, and from its end on
        self._ended = False
        guard(self)

    @property
    def gate(self) -> Gate:
        """The gate that makes the lane stand still between two events."""
        return self._context.gate

    # --- the training thread: events

    def put(
        self,
        handler: int,
        event: Event,
        phase: Phase,
        payload: Any,
        nbytes: int,
        seed: int | None = None,
        answer: Answer | None = None,
    ) -> bool:
        """Put an event at the end, after waiting for room if there is none. Only the training thread calls this.

        Args:
            handler, event, phase, payload, nbytes, seed: As for `Entry`.
            answer: Gets what the handler writes with a lag.

        Returns:
            Whether the lane took the event; otherwise it was dropped and counted.
        """
        queue = self._queue
        number, total = queue.received
        if (self.refuses or queue.is_full(nbytes, number, total)) and not self._make_room(handler, nbytes):
            return False
        waiting, total = number - queue.done, total + nbytes
        expected = None if answer is None else self.answers.expect(number, answer)
        rest = seed, total, expected, TorchState.of_event(), copy_context()
        queue.put(Entry(number, handler, event, phase, payload, nbytes, *rest))
        room = queue.largest - (total - queue.done_bytes)
        full = waiting + 1 == self._linger_events or -nbytes < room <= 0  # this event completes a full batch
        if full or self._asleep or self._context.pausing or answer is not None:
            self.wake()
        return True

    def put_back(self, entry: Entry, handler: int, recorded: bool, answer: Answer | None = None) -> None:
        """Put an event that has waited in a checkpoint, as `put` does.

        Args:
            entry: The event.
            handler: The position of its handler in the job.
            recorded: Whether its records are in the sinks, and its effect on the callbacks alone is missing.
            answer: Gets what the handler writes with a lag, as for `put`.
        """
        if recorded:
            self._records.skip(self._queue.received[0])
        self.put(handler, entry.event, entry.phase, entry.payload, entry.nbytes, entry.seed, answer)

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all events are done and the callbacks of this process have their state.

        Args:
            timeout: The most seconds to wait; ``None`` for as long as it takes.

        Returns:
            Whether both is so; ``False`` if the time was over. After a failure there is nothing left to wait for: see
            `raise_failure`.

        Raises:
            UsageError: A handler of a lane calls this. It would wait for itself, or for a lane that waits for it.
        """
        self._threads.check_no_lane_here()
        goal, _ = self._queue.received
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        pause = _POLL / 64
        while not self.refuses and (self._queue.done < goal or self._brought_back < goal):
            self.process_soon()  # again each time: the other thread may have reset it before the last event was put
            if time.monotonic() >= deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _POLL)
        self._flushing = False  # the loop may have set it after the last event was done
        return self._queue.done >= goal

    def wait(self, is_over: Callable[[], bool]) -> bool:
        """Wait as `flush` does until it is of no use, or the time is over: then return ``False``, and give up."""
        self.given_up = False
        with self.waited_for():
            while not self.given_up and not self.flush(0.25) and not self.over:
                self.given_up = is_over()
        return not self.given_up

    def waited_for(self) -> AbstractContextManager[None]:
        """Return a context in which training waits for the lane, once or several times: one wait in a timeline."""
        return self._context.wait(f"waits for lane {self.name}")

    def process_soon(self) -> None:
        """Have the events that wait processed now, and not when more have gathered."""
        self._flushing = True
        self.wake()

    @property
    def idle(self) -> bool:
        """Whether there is no event to process and no failure to raise."""
        return self.failure is None and (self.refuses or self._queue.done >= self._queue.received[0])

    @property
    def over(self) -> bool:
        """Whether waiting is of no use: a failure must be raised first, or the lane takes no events."""
        return self.failure is not None or self.refuses

    def report(self) -> LaneReport:
        """Return the counts of the lane. Any thread may call this at any time."""
        events, done, nbytes = self._queue.numbers()
        counts, where = self._context.counts.copy(), self._transport.where
        return LaneReport(self.name, self.job.callbacks, where, events, done, nbytes, self._retired, counts)

    def wake(self) -> None:
        """Have the lane look for events that are to be processed now."""
        self._context.go_on()
        looks = self._looks
        if self._context.closed:
            return
        # A look is to come anyway: nobody has looked since the lane was woken, or the lane is at work.
        if self._woken == looks or self._turn.locked():
            self._threads.relieve()
            return
        self._threads.wake(self)
        self._woken = looks  # last: an interrupt before this wakes the lane once more

    def _make_room(self, handler: int, nbytes: int) -> bool:
        """Wait until there is room, or until something else ends the wait; return whether to take the event."""
        begin, callback = time.perf_counter_ns(), self.job.handlers[handler].name
        # If training is stopping the wait ends, and the few events that are left are taken beyond the limit.
        if not self.refuses and self._blocks:
            while not self.over and self._queue.is_full(nbytes, *self._queue.received) and not self._stopping():
                self.wake()
                time.sleep(_POLL)
            self._context.stalled(self.name, callback, begin)
            if not self.refuses:
                return True
        self._context.counts.dropped[callback] += 1
        return False

    # --- the training thread: failures, checkpoints and the end

    def raise_failure(self) -> None:
        """Raise the failure that is to be raised, if there is one. Events that are put later are processed again."""
        if (failure := self.failure) is None:
            return
        self._resume_at = self._queue.received[0]
        self.failure = None  # last: until then all entries are skipped
        try:
            self.wake()  # `FitEnd` may wait
            raise failure
        finally:
            del failure

    def retire(self, failure: BaseException) -> None:
        """Log a failure and take no more events. The training thread may call this if the lane is empty."""
        text = self._context.counts.failed(failure)
        notes = "; ".join(getattr(failure, "__notes__", ()))
        _logger.warning("flowtrain retires lane %s, its callbacks see no more events: %s (%s)", self.name, text, notes)
        self.refuses = self._retired = True
        self._skip()

    def pause(self, timeout: float) -> bool:
        """Make the lane stand still behind the event that is at work, until `flush` or the next event.

        Args:
            timeout: The most seconds to wait for this event.

        Returns:
            Whether the lane stands still.
        """
        end = time.monotonic() + timeout
        self._context.pause()
        while self._turn.locked() and not self.over:
            if time.monotonic() >= end:
                self._context.go_on()
                return False
            time.sleep(_POLL)
        return not self.over

    def unprocessed(self) -> tuple[list[Entry], int]:
        """Give the callbacks of this process a state, while the lane stands still.

        Returns:
            The events that this state has not seen, and how many of the first of them have their records in the sinks.
        """
        seen = self._transport.restore_state()
        return [*seen, *self._queue.waiting()], sum(entry.sequence < self._records.next for entry in seen)

    def note_saved(self, events: int, nbytes: int) -> None:
        """Take note of how many events of the lane are in the last checkpoint, and of their bytes there."""
        self._context.counts.saved, self._context.counts.saved_bytes = events, nbytes

    def close(self, timeout: float = 5.0) -> None:
        """End the lane and close its transport. Events that are not done are dropped and counted.

        Args:
            timeout: The most seconds to wait for the handler that is at work. A handler of a lane that calls this does
                not wait: it may be the one that is at work.
        """
        if self._context.closed:
            return
        self._context.close()
        self.refuses = True
        end = time.monotonic() + timeout
        while not self._turn.acquire(blocking=False):
            if self._ended:
                break
            if self._threads.lane_here() is not None or time.monotonic() >= end:
                self._records.abandon()  # the thread that works on the lane ends it
                break
            time.sleep(_POLL)
        else:
            self._end()
        for entry in self._queue.drain():
            self._context.counts.dropped[self.job.handlers[entry.handler].name] += 1
        self._holds = None

    def become_forked_copy(self) -> None:
        """Become the copy in a forked child, which has none of the threads: take no events, write no records."""
        self._context.become_forked_copy()
        self.refuses = True
        self._end()
        self._queue.forget()
        close_copies(self.job.backends)

    # --- the thread that works on the lane

    @property
    def is_remote(self) -> bool:
        """Whether the handlers run in another process, so that a thread that works on the lane only waits."""
        return self._transport.is_remote

    def due(self) -> float | None:
        """Return when the lane is to be worked on: now, or when the linger is over; ``None``: not until it is woken."""
        self._looks += 1  # first, see `wake`
        slept, self._asleep = self._asleep, True  # before the look for events: one that is put later wakes the lane
        queue = self._queue
        failing = self.failure is not None or self._retired
        work = queue.has_new if failing else len(queue) > 0  # `FitEnd` waits for the failure to be raised
        wanted = self._flushing and self._brought_back < queue.received[0]  # the state of the callbacks
        if self._context.closed or self._context.pausing or not (work or wanted):
            return None
        self._asleep = False
        if slept:
            self._gathers_since = time.monotonic()
        hurries = self._flushing or failing or queue.done < self.answers.wanted
        if hurries or len(queue) >= self._linger_events or queue.nbytes >= queue.largest:
            return 0.0
        return self._gathers_since + self._transport.linger

    def begin(self) -> bool:
        """Let the calling thread work on the lane, unless another one does or the lane has ended."""
        return self._turn.acquire(blocking=False)

    def work(self) -> None:
        """Process a batch, skip entries after a failure, or bring the state of the callbacks back."""
        try:
            if not self._context.is_stopped():
                self._work()
        except Abandoned:  # the lane is closed, or is to stand still: then the batch is handed over again
            self._queue.put_back()
        except BaseException as failure:  # such as a full sink or a lost cluster: the training thread raises it
            self._fail(failure)
        if self._context.closed:
            self._end()
        else:
            self._turn.release()

    def _work(self) -> None:
        # No batch is taken between a failure and the moment at which the training thread has raised it.
        failing = self.failure is not None or self._retired
        if failing or self._resumed_at < self._resume_at:
            self._skip()
        queue = self._queue
        if not failing and (batch := queue.take()):
            self._gathers_since = begin = time.monotonic()
            result = self._context.run(self._transport, self.job, batch)
            queue.fill(self._transport.largest)
            queue.took(time.monotonic() - begin, max(1, result.done))
            self._accept(result)
        elif self._flushing:
            done, asks_again = queue.done, False
            try:
                self._transport.bring_state_back(self._context)
            except Abandoned:
                asks_again = True  # when the lane no longer stands still
                raise
            finally:  # if the state cannot be brought back now, it is not asked for again and again
                if not asks_again:
                    self._brought_back, self._flushing = done, False

    def _accept(self, result: BatchResult) -> None:
        """Write the records of a result, and count the entries that are done."""
        try:
            # A fork must not copy a sink that is half written.
            with self.gate:
                self._records.write(result.records)
            self.answers.give(result)
        finally:
            # Counted after a failed write too: the records of these entries may be in the sink in part, and a second
            # write would double them.
            self._records.wrote(done := self._queue.finish(result.done))
        if result.failure is not None:
            self._fail(result.failure[1])
            self.answers.give_none(done)  # now that the failure is there for the training thread
        else:
            self._queue.put_back()

    def _fail(self, failure: BaseException) -> None:
        """Leave a failure for the training thread, or log it and retire the lane."""
        if self._on_error == "warn":
            self.retire(failure)
            return
        self._context.counts.failed(failure)
        self.failure = failure
        self._skip()
        self._raise_on_training_thread(self.raise_failure)

    def _skip(self) -> None:
        """Skip the entries that were put before the failure is, or was, raised, `FitEnd` only in a retired lane."""
        put, _ = self._queue.received  # first: if the failure is still there after this, they were put before
        before = put if self.failure is not None or self._retired else self._resume_at
        skipped = self._queue.skip(before, None if self._retired else FitEnd)
        self._context.counts.skipped += len(skipped)
        self.answers.give_none(skipped)
        self._resumed_at = before

    def _end(self) -> None:
        """End the lane for good: `_turn` stays taken, so that no thread works on it."""
        self._transport.close()
        self._ended = True
