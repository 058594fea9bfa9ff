"""The function that runs on a worker: from an `Assignment` as bytes to a `Reply` as bytes.

An assignment holds the next events of a lane, and either the state of the lane's callbacks or only the number of events
that this state has seen. In the second case the worker uses the callbacks that it kept from the assignment before, if
these have seen exactly that number of events. A reply holds the records of the events, and the new state if the lane
asked for it.

Nothing is ever raised. dask would wait for ever for a task that failed by too deep a recursion, and an error during
unpickling would look to dask as if the worker itself had failed.
"""

from __future__ import annotations

import logging
import pickle
import platform
import random
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict
from dataclasses import dataclass, field
from importlib import metadata
from types import BuiltinMethodType, MethodType
from typing import Any, NamedTuple, cast

import torch
from distributed import get_worker

from flowtrain.callback.callback import Callback
from flowtrain.errors import ExecutorError, text_of
from flowtrain_dask.cluster.block import BlockPlace, read
from flowtrain_dask.cluster.callback_state import build, dump_state, load_state
from flowtrain_dask.cluster.codec import encode, load_entries
from flowtrain_dask.cluster.pickling import dumps, loads
from flowtrain_dask.lanes.work import Job, Record, run_entries

__all__ = [
    "Assignment",
    "Reply",
    "Versions",
    "dask_setup",
    "different",
    "leave_random_numbers_alone",
    "run_assignment",
    "versions",
]


class Versions(NamedTuple):
    """The versions that must be equal in both processes, because code and tensors are sent as bytes."""

    python: str
    torch: str
    flowtrain: str

    def differences(self, other: Versions) -> list[str]:
        """Return the names of the versions that differ."""
        return [name for name in self._fields if getattr(self, name) != getattr(other, name)]


def versions() -> Versions:
    """Return the versions of this process: Python's without its last part, torch's without its build."""
    try:
        flowtrain = metadata.version("flowtrain")
    except metadata.PackageNotFoundError:
        flowtrain = "a checkout"
    return Versions(".".join(platform.python_version_tuple()[:2]), torch.__version__.partition("+")[0], flowtrain)


def different(here: Versions, there: Versions, at: str) -> str:
    """Return the sentences that say in what the versions of this process and of a worker differ.

    Args:
        here: The versions of this process.
        there: The versions of the worker.
        at: The worker, as the text is to name it.
    """
    names = here.differences(there)
    ours = ", ".join(f"{name} {getattr(here, name)}" for name in names)
    theirs = ", ".join(f"{name} {getattr(there, name)}" for name in names)
    return (
        f"This process has {ours}, but {at} has {theirs}. Code and tensors travel between them as bytes, so they must "
        f"be the same: install the same version on both."
    )


@dataclass(frozen=True)
class Assignment:
    """A batch of events for a worker.

    Attributes:
        token: Names the lane and the state that the training process began to send from. The worker keeps callbacks
            under this name.
        versions: The versions of the training process.
        job: The job, as bytes of `flowtrain_dask.cluster.callback_state.dump_job`.
        base: How many events the state has seen.
        state: The state of the callbacks after those events; ``None`` if the worker is to use the callbacks that it
            kept.
        entries: The events that follow, as bytes of `flowtrain_dask.cluster.codec.dump_entries`, or the place of
            these bytes in the memory of the training process.
        wants_state: Whether the reply is to hold the new state.
        timed: Whether the reply is to hold the times of the handlers.
    """

    token: str
    versions: Versions
    job: bytes
    base: int
    state: bytes | None
    entries: bytes | BlockPlace
    wants_state: bool
    timed: bool = False


@dataclass
class Reply:
    """The result of an assignment.

    Attributes:
        kind: ``"done"``: the events were run. ``"missing"``: the worker has no callbacks in the state that it was to
            use. ``"not on this machine"``: the memory of the training process cannot be read from here.
            ``"versions"``: the versions differ. ``"not picklable"``: the assignment could not be unpickled, or its
            result not pickled.
        records: The records of the events, see `flowtrain_dask.lanes.work.BatchResult`.
        done: How many events are done, see `flowtrain_dask.lanes.work.BatchResult`.
        ran: How many events the assignment had.
        failure: The number of the event whose handler failed, and the pickled exception.
        changes: The late writes of the handlers by sequence number, as bytes of `flowtrain_dask.cluster.codec.encode`;
            empty if there are none.
        state: The new state of the callbacks, if the assignment asked for it or a handler failed.
        address: The address of the worker.
        versions: The versions of the worker.
        text: For ``"not picklable"``: the error.
        times: When the handler of each event began and ended, in ns of the clock of the worker, if the assignment asked
            for it.
        span: When the worker began with the assignment, and when it had the result, by the same clock.
    """

    kind: str
    records: list[Record] = field(default_factory=list)
    done: int = 0
    ran: int = 0
    failure: tuple[int, bytes] | None = None
    changes: bytes = b""
    state: bytes | None = None
    address: str = ""
    versions: Versions = field(default_factory=versions)
    text: str = ""
    times: list[tuple[int, int]] = field(default_factory=list)
    span: tuple[int, int] = (0, 0)


def dask_setup(worker: Any) -> None:
    """Leave Ctrl-C and SIGTERM to the training process. dask calls this in the processes of ``DaskExecutor("local")``.

    A terminal and a batch system send these signals to all processes of a program. The training process then ends
    training in good order, and needs its workers for pending events. It ends the workers itself, and they also end when
    it dies.

    dask logs an error for a handler that is at work when its worker is ended. That is silenced, because the executor
    reports the events that were not done.
    """
    logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


class _Generator(random.Random):
    """Takes the place of the module ``random`` in the modules of dask."""

    Random = random.Random


_own = _Generator()

_searched: set[str] = set()
"""The names of the modules that were there when `leave_random_numbers_alone` was last called."""


def leave_random_numbers_alone() -> None:
    """Have dask draw from a generator of its own. Called in the training process, and on a worker for each batch.

    dask's event loops run in threads and draw from Python's global generator whenever they estimate a size or wait.
    That would change the numbers that training draws in one process and handlers in the other.
    """
    modules = dict(sys.modules)
    for name in modules.keys() - _searched:  # dask imports some of its modules late
        if name.partition(".")[0] in ("dask", "distributed", "tornado"):
            for attribute, value in list(vars(modules[name]).items()):
                if value is random:
                    setattr(modules[name], attribute, _own)
                elif isinstance(value, (MethodType, BuiltinMethodType)) and value.__self__ is _global:
                    setattr(modules[name], attribute, getattr(_own, value.__name__))
    _searched.update(modules)


_global = cast("MethodType", random.randint).__self__


def run_assignment(blob: bytes) -> bytes:
    """Run a pickled `Assignment` and return a pickled `Reply`."""
    leave_random_numbers_alone()
    begin = time.perf_counter_ns()
    try:
        reply = _reply_to(pickle.loads(blob))
        reply.address = _address()
        reply.span = begin, time.perf_counter_ns()
        return pickle.dumps(reply)
    except BaseException as failure:  # nothing may be raised here, see the module docstring
        return pickle.dumps(Reply("not picklable", text="".join(traceback.format_exception_only(failure)).strip()))


@dataclass
class _Kept:
    """The callbacks of a lane that this worker keeps from one assignment to the next.

    Attributes:
        seen: How many events they have seen.
        job: The job of the lane.
        callbacks: The callbacks.
        shared: The objects that are not sent with their state.
    """

    seen: int
    job: Job
    callbacks: list[Callback]
    shared: list[object]


_MOST_KEPT = 32
"""For how many lanes callbacks are kept. Those used longest ago are dropped; their lanes send the state again."""

_kept: OrderedDict[str, _Kept] = OrderedDict()
_lock = threading.Lock()  # guards `_kept`: a worker may run several tasks at the same time


def _reply_to(assignment: Assignment) -> Reply:
    if versions() != assignment.versions:
        return Reply("versions")
    events: bytes | memoryview | BlockPlace | None = assignment.entries
    if isinstance(events, BlockPlace):
        events = read(events)
    if events is None:
        return Reply("not on this machine")
    kept = _take(assignment)
    if kept is None:
        return Reply("missing")
    job, entries = kept.job, load_entries(events)
    result = run_entries(kept.callbacks, job, entries, job.run, job.lane, seeded=True, timed=assignment.timed)
    kept.seen += result.done
    reply = Reply("done", result.records, result.done, len(entries), times=result.times)
    if result.changes:
        reply.changes = encode(result.changes)
    if result.failure is not None:
        sequence, failure = result.failure
        reply.failure = sequence, _portable(failure)
    # A failure usually ends training, which wants the state then.
    if assignment.wants_state or result.failure is not None:
        reply.state = dump_state(kept.callbacks, kept.shared)
    with _lock:
        _kept[assignment.token] = kept
        while len(_kept) > _MOST_KEPT:
            _kept.popitem(last=False)
    return reply


def _take(assignment: Assignment) -> _Kept | None:
    """Take out the callbacks that were kept, or make them from the state; ``None`` if there is neither.

    They are taken out so that no other attempt at the same assignment uses them at the same time.
    """
    with _lock:
        kept = _kept.pop(assignment.token, None)
    if kept is not None and kept.seen == assignment.base:
        return kept
    if assignment.state is None:
        return None
    job, callbacks, shared = build(assignment.job)
    load_state(callbacks, shared, assignment.state)
    return _Kept(assignment.base, job, callbacks, shared)


def _portable(failure: BaseException) -> bytes:
    """Return an exception as bytes, with its traceback in a note.

    The traceback itself is dropped: Python does not pickle it, and dask's way of pickling fails for a very deep one.
    """
    failure.add_note("on the worker:\n" + "".join(traceback.format_tb(failure.__traceback__)).rstrip())
    failure.__traceback__ = None
    try:
        blob: bytes = dumps(failure)
        loads(blob)
    except Exception:  # the class of the exception may do anything when it is pickled or unpickled
        replaced = ExecutorError(text_of(failure))
        for note in getattr(failure, "__notes__", ()):
            replaced.add_note(note)
        blob = dumps(replaced)
    return blob


def _address() -> str:
    try:
        worker: Any = get_worker()
    except ValueError:  # not on a worker, as in a test
        return ""
    return str(worker.address)
