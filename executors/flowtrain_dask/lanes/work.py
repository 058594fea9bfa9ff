"""The work of a lane: which handlers it has, which events wait, and what running them gives.

`run_entries` is the one place that runs a deferred handler, in this process or in another. It is a function of the
callbacks and the events: it changes the callbacks, hands back the records that they logged, and touches no sink.
It stops at the first event whose handler fails.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import torch

from flowtrain.callback.access import Declaration
from flowtrain.callback.callback import Callback
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.errors import CancelException, DeferredCancelError
from flowtrain.graph.plan import Call
from flowtrain.logging.backend import Identity, LoggerBackend, collecting
from flowtrain.state.partial_view import Owner
from flowtrain.state.random_numbers import own_numbers
from flowtrain_dask.snapshots.taker import Snapshot
from flowtrain_dask.snapshots.view import Replica

__all__ = ["Duty", "Entry", "Job", "Outcome", "Record", "Surroundings", "opened", "run_entries"]


@dataclass(frozen=True, eq=False)
class Duty:
    """One handler that a lane runs.

    Attributes:
        callback: The position of its callback in the lane.
        name: The callback's name.
        handler: Its registration.
        declaration: What it declares to touch.
        owner: In whose name its view refuses.
    """

    callback: int
    name: str
    handler: Handler
    declaration: Declaration
    owner: Owner

    @property
    def label(self) -> str:
        """The callback's name and the handler's, as ``"LogMetrics.log"``."""
        return f"{self.name}.{self.handler.attribute}"


@dataclass(frozen=True)
class Surroundings:
    """What torch keeps for the process or the thread, and results depend on.

    Attributes:
        threads: The number of intra-op threads: a sum over another number of threads differs in its last bits.
        dtype: The default dtype.
    """

    threads: int = field(default_factory=torch.get_num_threads)
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)

    @contextlib.contextmanager
    def applied(self) -> Generator[None, None, None]:
        """Run a block in them, without gradients."""
        threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
        if threads != self.threads:
            torch.set_num_threads(self.threads)
        if dtype != self.dtype:
            torch.set_default_dtype(self.dtype)
        try:
            with torch.no_grad():
                yield
        finally:
            # The number of threads is what later threads start with, so the one of the training thread stays.
            if dtype != self.dtype:
                torch.set_default_dtype(dtype)


@dataclass(frozen=True, eq=False)
class Job:
    """What a lane is there for. It travels to other processes as it is.

    Attributes:
        lane: The lane's name: those of its callbacks, joined by ``+``.
        run: The run that it belongs to.
        callbacks: The names of its callbacks.
        backends: The logging backends that each callback holds; elsewhere these are copies.
        duties: Its handlers; `Entry.duty` is a position among them.
        first: The number of its first event for `flowtrain.logging.backend.identity`; not 0 in a run that is resumed.
        surroundings: What its handlers run in.
        draws: Which of its callbacks may draw random numbers, and what says so; then it runs in no thread beside
            training.
    """

    lane: str
    run: str
    callbacks: tuple[str, ...]
    backends: tuple[tuple[LoggerBackend, ...], ...]
    duties: tuple[Duty, ...]
    surroundings: Surroundings = field(default_factory=Surroundings)
    first: int = 0
    draws: str = ""


class Entry(NamedTuple):
    """An event that waits in a lane.

    Attributes:
        sequence: Its number in the lane, from 0, without gaps.
        duty: The position of its handler in `Job.duties`.
        event: The event.
        phase: The phase.
        payload: What the handler declared to read, as it was: a `Snapshot`, or what it holds.
        nbytes: How many bytes the payload holds that nobody else does.
        seed: The seed of the random numbers that its handler draws; ``None`` if it says that it draws none.
    """

    sequence: int
    duty: int
    event: Event
    phase: Phase
    payload: Any
    nbytes: int
    seed: int | None = None


Record: TypeAlias = tuple[int, int, int, bytes]
"""The sequence number, the callback's position in the lane, the backend's among `Job.backends` of it, and the bytes."""


@dataclass(slots=True)
class Outcome:
    """What running a batch gave.

    Attributes:
        records: What was logged, in order.
        done: How many entries are done with; the one that failed is among them.
        failure: The sequence number of the entry whose handler failed, and what it raised.
    """

    records: list[Record] = field(default_factory=list)
    done: int = 0
    failure: tuple[int, BaseException] | None = None


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
) -> Outcome:
    """Run handlers for events, one at a time and in order, until one fails.

    Args:
        callbacks: The lane's callbacks, in the state after all earlier events.
        job: What the lane is there for.
        entries: The events.
        run: The run, for `flowtrain.logging.backend.identity`.
        lane: The lane, for the same.
        gate: Entered around each event.
        enough: Asked after each event; what comes after it says so is not run.
        seeded: Whether handlers are given the random numbers of their seeds. Not beside training: its draws, which come
            in between, would be put back with theirs.
    """
    outcome = Outcome()
    calls = _bound(callbacks, job)
    gate = nullcontext() if gate is None else gate
    with job.surroundings.applied():
        for entry in entries:
            call, replica, callback = calls[entry.duty]
            identity = Identity(run, lane, job.first + entry.sequence)
            numbers = own_numbers(entry.seed) if seeded and entry.seed is not None else nullcontext()
            with gate, collecting(identity, job.backends[callback]) as collector:
                try:
                    with numbers:
                        call(entry.event, entry.phase, replica.show(opened(entry.payload)))
                except BaseException as failure:  # an exit of a handler must not end the lane's thread unseen
                    outcome.failure = entry.sequence, _explained(failure, job, entry)
            outcome.records += [(entry.sequence, callback, position, data) for position, data in collector.records]
            outcome.done += 1
            if outcome.failure is not None or (enough is not None and enough()):
                break
    for _, replica, _ in calls:
        replica.clear()
    return outcome


def opened(payload: Any) -> Any:
    """Return what a snapshot holds, when its copies are complete."""
    if isinstance(payload, Snapshot):
        payload.ready()
        return payload.payload
    return payload


def _bound(callbacks: Sequence[Callback], job: Job) -> list[tuple[Call, Replica, int]]:
    replicas = _replicas(job)
    return [
        (duty.handler.bind(callbacks[duty.callback]), replica, duty.callback)
        for duty, replica in zip(job.duties, replicas, strict=True)
    ]


_made: WeakKeyDictionary[Job, list[Replica]] = WeakKeyDictionary()


def _replicas(job: Job) -> list[Replica]:
    found = _made.get(job)
    if found is None:
        found = _made[job] = [Replica(duty.declaration, duty.owner) for duty in job.duties]
    return found


def _explained(failure: BaseException, job: Job, entry: Entry) -> BaseException:
    """Return what is raised for a failure, with a note on where it was."""
    duty = job.duties[entry.duty]
    where = f"({type(entry.event).__name__}, {entry.phase!r})"
    if isinstance(failure, CancelException):
        cancel = f"{type(failure).__name__}({str(failure)!r})"
        error = DeferredCancelError(
            f"{duty.label} raised {cancel} at {where}, but it is deferred: training has gone on, and there is no "
            f"{failure.scope or 'scope'} left to end. Set deferrable = False in {duty.owner.type_name}, or write "
            f"DaskExecutor(defer=False)."
        )
        error.__cause__ = failure
        failure = error
    failure.add_note(f"raised in {duty.label} at {where}, deferred as event {entry.sequence} of lane {job.lane}")
    return failure
