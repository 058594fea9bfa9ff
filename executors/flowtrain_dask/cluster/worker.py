"""What runs on a worker: one function from bytes to bytes.

An `Assignment` holds a lane's next events, and its state or the number of events after which that state is: then the
callbacks are taken that stayed here from the last assignment, if they are in exactly that state. The `Reply` holds the
records, and the new state if that is wanted. Nothing is ever raised: dask would wait for ever for a task that failed
by too deep a recursion, and whatever goes wrong in unpickling would look as if the worker itself had failed.
"""

from __future__ import annotations

import logging
import pickle
import platform
import random
import signal
import sys
import threading
import traceback
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from distributed import get_worker

from flowtrain.callback.callback import Callback
from flowtrain.errors import ExecutorError
from flowtrain_dask.cluster.block import Place, read
from flowtrain_dask.cluster.callback_state import build, dump_state, load_state
from flowtrain_dask.cluster.entries import load_entries
from flowtrain_dask.cluster.pickling import dumps, loads
from flowtrain_dask.lanes.work import Job, Record, run_entries

__all__ = ["Assignment", "Reply", "Versions", "dask_setup", "leave_random_numbers_alone", "process", "versions"]


class Versions(NamedTuple):
    """What must be the same here and there, because code and tensors travel as bytes."""

    python: str
    torch: str
    flowtrain: str

    def differences(self, other: Versions) -> list[str]:
        """Return the names of what differs."""
        return [name for name in self._fields if getattr(self, name) != getattr(other, name)]


def versions() -> Versions:
    """Return the versions of this process: Python's without its last part, torch's without its build."""
    try:
        flowtrain = metadata.version("flowtrain")
    except metadata.PackageNotFoundError:
        flowtrain = "a checkout"
    return Versions(".".join(platform.python_version_tuple()[:2]), torch.__version__.partition("+")[0], flowtrain)


@dataclass(frozen=True)
class Assignment:
    """A batch for a worker.

    Attributes:
        token: The lane, and the driver's state that it started from: callbacks that stayed are told apart by it.
        versions: The driver's.
        job: The job, see `flowtrain_dask.cluster.callback_state.dump_job`.
        base: How many events the state has seen.
        state: The callbacks' state after those; ``None``: the callbacks that stayed here.
        entries: The events after those, see `flowtrain_dask.cluster.entries.dump_entries`; or where they are, in memory
            of the driver's machine.
        want: Whether the new state is to be sent back.
    """

    token: str
    versions: Versions
    job: bytes
    base: int
    state: bytes | None
    entries: bytes | Place
    want: bool


@dataclass
class Reply:
    """What came of an assignment.

    Attributes:
        kind: ``"done"``; ``"missing"``: no callbacks in that state are here; ``"far"``: the driver's memory is
            not found; ``"versions"``: they differ; ``"broken"``: it could not be unpickled, or its result not pickled.
        records: See `flowtrain_dask.lanes.work.Outcome`.
        done: The same.
        ran: How many entries the assignment had.
        failure: The same, the exception pickled.
        state: The callbacks' new state, if it was wanted, or a handler failed.
        address: The worker.
        versions: The worker's.
        text: What is broken.
    """

    kind: str
    records: list[Record] = field(default_factory=list)
    done: int = 0
    ran: int = 0
    failure: tuple[int, bytes] | None = None
    state: bytes | None = None
    address: str = ""
    versions: Versions = field(default_factory=versions)
    text: str = ""


def dask_setup(worker: Any) -> None:
    """Leave Ctrl-C and SIGTERM to the process that trains; dask calls it in the processes of ``DaskExecutor("local")``.

    A terminal and a batch system send them to all processes of a program. That one stops training in good order, and
    needs its workers for what is still pending; they end when it closes them, and when it dies.

    A handler that is at work when it closes them is given up. The executor says so; dask need not say it again.
    """
    logging.getLogger("distributed.worker.state_machine").setLevel(logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


class _Generator(random.Random):
    """Stands for the module ``random`` in the modules of dask."""

    Random = random.Random


@cache
def leave_random_numbers_alone() -> None:
    """Have dask draw from a generator of its own; called once in the process that trains, and once on each worker.

    Its event loops run in threads and draw from Python's global generator whenever they estimate a size, or wait. So
    they would change what training draws in the one process, and what handlers draw in the other.
    """
    own = _Generator()
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("dask", "distributed", "tornado"):
            for attribute, value in list(vars(module).items()):
                if value is random:
                    setattr(module, attribute, own)
                elif isinstance(value, MethodType) and value.__self__ is _global:
                    setattr(module, attribute, getattr(own, value.__name__))


_global = cast("MethodType", random.randint).__self__


def process(blob: bytes) -> bytes:
    """Run a pickled `Assignment`, return a pickled `Reply`."""
    leave_random_numbers_alone()
    try:
        reply = _process(pickle.loads(blob))
        reply.address = _address()
        return pickle.dumps(reply)
    except BaseException as failure:  # see the module's docstring
        return pickle.dumps(Reply("broken", text="".join(traceback.format_exception_only(failure)).strip()))


@dataclass
class _Resident:
    """The callbacks of a lane that stayed here."""

    seen: int
    job: Job
    callbacks: list[Callback]
    kept: list[object]


_MOST_RESIDENTS = 32

_residents: OrderedDict[str, _Resident] = OrderedDict()
_lock = threading.Lock()


def _process(assignment: Assignment) -> Reply:
    if versions() != assignment.versions:
        return Reply("versions")
    events: bytes | memoryview | Place | None = assignment.entries
    if isinstance(events, Place):
        events = read(events)
    if events is None:
        return Reply("far")
    resident = _take(assignment)
    if resident is None:
        return Reply("missing")
    job, entries = resident.job, load_entries(events)
    outcome = run_entries(resident.callbacks, job, entries, job.run, job.lane, seeded=True)
    resident.seen += outcome.done
    reply = Reply("done", outcome.records, outcome.done, len(entries))
    if outcome.failure is not None:
        sequence, failure = outcome.failure
        reply.failure = sequence, _portable(failure)
    if assignment.want or outcome.failure is not None:
        reply.state = dump_state(resident.callbacks, resident.kept)
    with _lock:
        _residents[assignment.token] = resident
        while len(_residents) > _MOST_RESIDENTS:
            _residents.popitem(last=False)
    return reply


def _take(assignment: Assignment) -> _Resident | None:
    """Take the callbacks out of where they stay, so that nobody else uses them, or make them anew."""
    with _lock:
        resident = _residents.pop(assignment.token, None)
    if resident is not None and resident.seen == assignment.base:
        return resident
    if assignment.state is None:
        return None
    job, callbacks, kept = build(assignment.job)
    load_state(callbacks, kept, assignment.state)
    return _Resident(assignment.base, job, callbacks, kept)


def _portable(failure: BaseException) -> bytes:
    """Return an exception as bytes, with its traceback in a note.

    The traceback itself stays here: Python does not pickle it, and what dask adds for it fails where it is very deep.
    """
    failure.add_note("on the worker:\n" + "".join(traceback.format_tb(failure.__traceback__)).rstrip())
    failure.__traceback__ = None
    try:
        blob: bytes = dumps(failure)
        loads(blob)
    except Exception:  # whatever its class does when it is pickled
        replaced = ExecutorError(f"{type(failure).__name__}: {failure}")
        for note in getattr(failure, "__notes__", ()):
            replaced.add_note(note)
        blob = dumps(replaced)
    return blob


def _address() -> str:
    try:
        worker: Any = get_worker()
    except ValueError:  # not on a worker: a test
        return ""
    return str(worker.address)
