"""The work of a lane: its handlers (`Job`), the events that wait (`Entry`), and their `BatchResult`.

`run_entries` is the only function that runs a deferred handler, in this process or in another. It changes nothing but
the callbacks that it is given: it returns the records that they log and what they write with a lag, and writes to no
sink. It stops at the first event
whose handler fails. `RecordWriter` writes the records in the process that trains.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Context
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch

from flowtrain.callback.access import Declaration
from flowtrain.callback.callback import Callback
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.errors import CancelException, raise_worst
from flowtrain.graph.clock import IN_LANE, Clock, Mark, TimelineRow
from flowtrain.graph.plan import Call, cancel_error
from flowtrain.logging.backend import LoggerBackend
from flowtrain.logging.records import Collector, Identity, collecting, deliver
from flowtrain.state.arrivals import Changes
from flowtrain.state.partial_view import Owner
from flowtrain.state.random_numbers import own_numbers
from flowtrain_dask.lanes.report import LaneCounts
from flowtrain_dask.parallel.torch_state import TorchState
from flowtrain_dask.snapshots.taker import Snapshot
from flowtrain_dask.snapshots.view import SnapshotLearner

__all__ = [
    "BatchResult",
    "Entry",
    "Job",
    "LaneHandler",
    "Record",
    "RecordWriter",
    "leave_stamps",
    "opened",
    "run_entries",
]


@dataclass(frozen=True, eq=False)
class LaneHandler:
    """One handler that a lane runs.

    Attributes:
        callback: The position of its callback in the lane.
        name: The name of its callback.
        handler: The handler, with its event type and phase type.
        declaration: The paths that the handler declares.
        owner: The callback and handler that the error of its view names.
    """

    callback: int
    name: str
    handler: Handler
    declaration: Declaration
    owner: Owner

    @property
    def label(self) -> str:
        """The names of callback and handler, such as ``"LogMetrics.log"``."""
        return f"{self.name}.{self.handler.attribute}"


@dataclass(frozen=True, eq=False)
class Job:
    """The callbacks and handlers of a lane. A job can be sent to other processes.

    Attributes:
        lane: The name of the lane: the names of its callbacks, joined by ``+``.
        run: The run to which the lane belongs.
        callbacks: The names of its callbacks.
        backends: The logging backends that each callback holds; in another process these are copies.
        handlers: Its handlers; `Entry.handler` is a position among them.
        first: The number of its first event for `flowtrain.logging.records.identity`; not 0 in a run that is resumed.
        draws: The callbacks that may draw random numbers, with the reason; empty if none does. Otherwise no thread
            beside training may run the lane.
    """

    lane: str
    run: str
    callbacks: tuple[str, ...]
    backends: tuple[tuple[LoggerBackend, ...], ...]
    handlers: tuple[LaneHandler, ...]
    first: int = 0
    draws: str = ""


class Entry(NamedTuple):
    """An event that waits in a lane.

    Attributes:
        sequence: Its number in the lane, from 0, without gaps.
        handler: The position of its handler in `Job.handlers`.
        event: The event.
        phase: The phase.
        payload: The state that the handler declares to read: a `Snapshot`, or the contents of one.
        nbytes: How many bytes the payload holds that no other object holds.
        seed: The seed of the random numbers that the handler draws; ``None`` if it declares that it draws none.
        total: How many bytes all entries of the lane up to this one hold together.
        number: The number of the result that the late writes of the handler are for; ``None`` if it writes nothing.
        torch: The torch state of the training thread at the event; ``None`` for the one where the handler runs.
        context: The context variables of the training thread at the event. They do not leave the process.
    """

    sequence: int
    handler: int
    event: Event
    phase: Phase
    payload: Any
    nbytes: int
    seed: int | None = None
    total: int = 0
    number: int | None = None
    torch: TorchState | None = None
    context: Context | None = None


Record: TypeAlias = tuple[int, int, int, bytes]
"""The sequence number of the entry, the positions of callback and backend in `Job.backends`, and the bytes.

It is a plain tuple, because a named one takes 16 times as long to send from a worker.
"""


@dataclass(slots=True)
class BatchResult:
    """The result of running a batch.

    Attributes:
        records: The records that the handlers logged, in order.
        done: How many entries are done, including one that failed.
        failure: The sequence number of the entry whose handler failed, and the exception.
        changes: The late writes of the handlers, by the sequence number of the entry; of entries that write with a lag.
        times: If they were asked for, when the handler of each done entry began and ended, in ns of the clock of the
            process that trains.
        worker: The worker that has run the handlers; empty if this process has.
    """

    records: list[Record] = field(default_factory=list)
    done: int = 0
    failure: tuple[int, BaseException] | None = None
    changes: dict[int, Changes] = field(default_factory=dict)
    times: list[tuple[int, int]] = field(default_factory=list)
    worker: str = ""


_TOGETHER = 256
"""The most records that are written at once. A lane that is abandoned writes no more than these."""

_callback_of: Callable[[Record], int] = itemgetter(1)


class RecordWriter:
    """Writes the records of a lane, those of each entry once.

    Args:
        backends: The logging backends of each callback.
        counts: Counts the records.

    Attributes:
        next: The records of entries before this one are in the sinks.
    """

    def __init__(self, backends: Sequence[Sequence[LoggerBackend]], counts: LaneCounts) -> None:
        self._backends = backends
        self._counts = counts
        self.next = 0
        self._further: set[int] = set()  # entries after `next` whose records are in the sinks
        self._abandoned = False

    def skip(self, sequence: int) -> None:
        """Write no records of an entry: those are in the sinks, since the fit resumes with this entry."""
        self._further.add(sequence)

    def wrote(self, entries: Sequence[Entry]) -> None:
        """Take note that no further records of these entries, the next ones, are to be written."""
        if entries:
            self.next = entries[-1].sequence + 1

    def abandon(self) -> None:
        """Write nothing more: nobody waits for the lane, and the sinks are being closed. Any thread may call this."""
        self._abandoned = True

    def write(self, records: Sequence[Record]) -> None:
        """Write records, without those that are in the sinks.

        Raises:
            Exception: A sink has failed. It gets no more of these records; the other sinks get theirs. If several have
                failed, the first error is raised with the others attached.
        """
        new = [record for record in records if record[0] >= self.next and record[0] not in self._further]
        failures: dict[int, Exception] = {}  # by backend
        for start in range(0, len(new), _TOGETHER):
            for callback, own in groupby(new[start : start + _TOGETHER], _callback_of):
                if self._abandoned:
                    return
                written = [(position, data) for _, _, position, data in own]
                deliver(self._backends[callback], written, failures)
                self._counts.records += len(written)
        if failures:
            raise_worst([*failures.values()])


_seeding = threading.Lock()
"""Held while the generators are seeded for a handler: a worker may run the handlers of several lanes at once."""


def run_entries(
    callbacks: Sequence[Callback],
    job: Job,
    entries: Sequence[Entry],
    run: str,
    lane: str,
    gate: AbstractContextManager[Any] | None = None,
    enough: Callable[[], bool] | None = None,
    *,
    seeded: bool = False,
    timed: bool = False,
) -> BatchResult:
    """Run handlers for events, one at a time and in order, until one fails.

    Args:
        callbacks: The lane's callbacks, in the state after all earlier events.
        job: The job of the lane.
        entries: The events.
        run: The run, for `flowtrain.logging.records.identity`.
        lane: The name of the lane, for the same function.
        gate: Entered around each event.
        enough: Called after each event; if it returns ``True``, no further event is run.
        seeded: Whether handlers draw random numbers from their seeds, and have the default dtype of their events. It
            must be false in a thread beside training, which has the same generators and default dtype.
        timed: Whether the result is to have the time of each handler.
    """
    result = BatchResult()
    calls = _bound(callbacks, job)
    gate = nullcontext() if gate is None else gate
    with torch.no_grad():
        for entry in entries:
            call, replica, callback = calls[entry.handler]
            identity = Identity(run, lane, job.first + entry.sequence)
            handle = partial(_handle, entry, call, replica, collecting(identity, job.backends[callback]), seeded)
            begin = time.perf_counter_ns() if timed else 0
            # The gate is entered for each event and not for the batch, so that a fork waits for one handler at most.
            with gate:
                records, failure = handle() if entry.context is None else entry.context.run(handle)
            # The records of a handler that failed count too, since a serial run has written them before the exception.
            result.records += [(entry.sequence, callback, position, data) for position, data in records]
            result.done += 1
            if entry.number is not None and failure is None:
                result.changes[entry.sequence] = replica.taken()
            if timed:
                result.times.append((begin, time.perf_counter_ns()))
            # After a failure the lane decides whether later events are run, so they are left to it.
            if failure is not None:
                result.failure = entry.sequence, _explained(failure, job, entry)
                del failure  # it holds the frames that hold the batch
                break
            if enough is not None and enough():
                break
    for _, replica, _ in calls:  # a view would keep its last snapshot in memory until the next batch
        replica.clear()
    return result


def _handle(
    entry: Entry, call: Call, replica: SnapshotLearner, collected: AbstractContextManager[Collector], seeded: bool
) -> tuple[list[tuple[int, bytes]], BaseException | None]:
    """Run a handler for an event, in the torch state of the event; return its records, and the exception if it failed.

    Args:
        entry: The event.
        call: The handler.
        replica: The learner as the handler sees it.
        collected: Keeps the records.
        seeded: As for `run_entries`.
    """
    state = TorchState.capture(deferred=True) if entry.torch is None else entry.torch
    with collected as collector:
        try:
            view = replica.show(opened(entry.payload))
            if not seeded:
                state.call(call, entry.event, entry.phase, view)
            elif entry.seed is None:
                with state.dtype_set():
                    state.call(call, entry.event, entry.phase, view)
            else:
                with state.dtype_set(), _seeding, own_numbers(entry.seed):
                    state.call(call, entry.event, entry.phase, view)
        except BaseException as failure:  # even `SystemExit`: it must not end the thread of lanes unnoticed
            return collector.records, failure
    return collector.records, None


def leave_stamps(clock: Clock, job: Job, entries: Sequence[Entry], result: BatchResult, begin: int) -> None:
    """Leave stamps of a batch of a lane, and of its events.

    Args:
        clock: The clock.
        job: The job of the lane.
        entries: The events of the batch, of which the first ones are done.
        result: The result of the batch, with times.
        begin: When the batch was handed over, in ns of `time.perf_counter_ns`. Its result is there now.
    """
    line = TimelineRow("", f"lane {job.lane}")
    where = {"worker": result.worker} if result.worker else {}
    batch = Mark("1 event" if result.done == 1 else f"{result.done} events", "lane", where)
    clock.add(batch, begin, time.perf_counter_ns(), line)
    line = TimelineRow(f"worker {result.worker}", line.thread) if result.worker else line
    for entry, times in zip(entries, result.times, strict=False):  # a batch may end early
        key = type(entry.event), type(entry.phase)
        clock.add(clock.measured.mark(key, job.handlers[entry.handler].label, IN_LANE), *times, line)


def opened(payload: Any) -> Any:
    """Return the contents of a snapshot, after waiting until its copies are complete; any other payload as it is."""
    if isinstance(payload, Snapshot):
        payload.ready()
        return payload.payload
    return payload


def _bound(callbacks: Sequence[Callback], job: Job) -> list[tuple[Call, SnapshotLearner, int]]:
    replicas = _replicas(job)
    return [
        (each.handler.bind(callbacks[each.callback]), replica, each.callback)
        for each, replica in zip(job.handlers, replicas, strict=True)
    ]


_made: WeakKeyDictionary[Job, list[SnapshotLearner]] = WeakKeyDictionary()
"""The replicas of each job, because binding their views takes longer than most handlers."""


def _replicas(job: Job) -> list[SnapshotLearner]:
    found = _made.get(job)
    if found is None:
        found = _made[job] = [SnapshotLearner(each.declaration, each.owner) for each in job.handlers]
    return found


def _explained(failure: BaseException, job: Job, entry: Entry) -> BaseException:
    """Return the exception to raise for the failure of a handler, with a note of the handler and its event."""
    handler = job.handlers[entry.handler]
    where = f"({type(entry.event).__name__}, {entry.phase!r})"
    if isinstance(failure, CancelException):
        failure = cancel_error(failure, handler.label, handler.owner.type_name, where)
    failure.add_note(f"raised in {handler.label} at {where}, deferred as event {entry.sequence} of lane {job.lane}")
    return failure
