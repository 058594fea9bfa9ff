"""Sinks: the logging backends of a learner's callbacks are opened before training and closed after it.

`flowtrain.graph.held_backends` finds the backends of a callback. The process that trains opens each backend once,
before the first event, also if another thread or process makes its records. An error of a backend gets a note that
names the backend and the callbacks that log to it.

The backends stay open as long as any object refers to `Sinks.lease`: the learner does, and so does every lane that may
still write. If a learner is deleted without being closed, its backends are closed when the last reference is gone.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from flowtrain.errors import CancelException, LoggingError, RankError, text_of
from flowtrain.errors.arguments import is_a
from flowtrain.graph.nodes import Node
from flowtrain.logging.backend import LoggerBackend, Outcome, Run
from flowtrain.logging.files import process_rank

__all__ = ["Sinks"]

T = TypeVar("T")

_logger = logging.getLogger("flowtrain")

_PATIENCE = 30.0
"""Seconds for which the garbage collector waits until the backends of a deleted learner are closed."""


class Sinks:
    """The backends of one learner.

    Attributes:
        run: The run that the backends are opened for.
        lease: An object without content; the backends stay open while anything refers to it.
    """

    def __init__(self) -> None:
        self.run = Run(uuid.uuid4().hex[:12])
        self._used: dict[str, _Used] = {}  # by sink
        self._opened = _Opened()
        self._open = self._opened.backends
        self.lease = _Lease()
        self._abandon = weakref.finalize(self.lease, _abandon, self._opened)

    def name_run(self, name: str) -> None:
        """Give the run the id that all ranks share."""
        self.run = Run(name)

    @staticmethod
    def check(nodes: Iterable[Node]) -> None:
        """Check the backends of callbacks that a learner is about to use.

        Raises:
            LoggingError: Two backends write to the same place, or a callback logs to an object that is no backend.
        """
        _used_by(nodes)

    def use(self, nodes: Iterable[Node]) -> None:
        """Use the backends of these callbacks from now on, and close open backends that none of them has.

        Raises:
            LoggingError: As for `check`. A backend that cannot be closed raises its own error; all are replaced then.
        """
        self._used = _used_by(nodes)
        unused: dict[str, _Used] = {}
        for sink, opened in self._open.items():
            if sink not in self._used or self._used[sink].backend is not opened.backend:
                unused[sink] = opened
        self._close(unused)

    def open(self, continued: Collection[str] | None = None) -> None:
        """Open the backends that are not open yet. Training has not begun when this raises.

        Args:
            continued: The sinks in which an earlier run is continued; all by default. A run that resumes begins anew in
                every other one, which its checkpoint does not know.

        Raises:
            LoggingError: Another learner has a backend open. A backend that cannot be opened raises its own error.
        """
        new = {sink: used for sink, used in self._used.items() if sink not in self._open}
        if not new:
            return
        run = replace(self.run, rank=process_rank())

        def begin(backend: LoggerBackend) -> None:
            """Open a backend for this learner."""
            _check_free(backend, self.lease)
            known = continued is None or backend.sink in continued
            self._change(backend, partial(self._begin, backend, run if known else replace(run, resumed=False)))

        try:
            _each(new, "opened", begin)
        finally:
            # When Python ends, the backends are closed before the trackers that they use end by themselves: functions
            # that were registered last run first.
            atexit.unregister(self._abandon)
            atexit.register(self._abandon)

    def flush(self) -> dict[str, Any]:
        """Flush the open backends; return the position of each by its sink.

        A backend that cannot be flushed raises its own error, after the other backends are flushed.
        """
        return _each(self._open, "flushed", lambda backend: backend.flush())

    def relocated_positions(self, positions: Mapping[str, Any], before: str, here: str) -> dict[str, Any]:
        """Return positions by the present sinks, if the log files were moved together with the checkpoint.

        A position whose sink the learner does not have goes to the sink that has, relative to the present folder of
        the checkpoint, the same path as the old sink relative to the old folder. A position without such a sink is
        left out, with a warning if the learner logs to a place that the run did not log to.

        Args:
            positions: The positions that `flush` returned.
            before: The folder of the checkpoint when it was written.
            here: The present folder of the checkpoint.
        """
        found = {sink: position for sink, position in positions.items() if sink in self._used}
        left = {sink: position for sink, position in positions.items() if sink not in found}
        for sink, position in list(left.items()):
            if os.path.isabs(sink):  # a file; the sink of a tracker is no path, and cannot be moved
                place = os.path.normpath(os.path.join(here, os.path.relpath(sink, before)))
                if place in self._used and place not in found:
                    found[place] = position
                    del left[sink]
        new = [repr(used.backend) for sink, used in self._used.items() if sink not in found]
        if left and new:
            warnings.warn(
                f"The run of the checkpoint logged to {', '.join(left)}, and the learner does not: its "
                f"records stay, even those after the checkpoint. New records go to {', '.join(new)}.",
                UserWarning,
                stacklevel=6,
            )
        return found

    def restore(self, run: Run, positions: Mapping[str, Any]) -> None:
        """Continue an earlier run: open the backends for it, and bring its sinks back to their positions.

        Args:
            run: The earlier run.
            positions: The positions by sink. In a sink without a position the run begins anew, after what it has.

        Raises:
            LoggingError: A backend is open for another learner, or its sink has changed since the checkpoint.
        """
        self.close()
        before, self.run = self.run, run
        try:
            self.open(continued=positions.keys())
            known = {sink: used for sink, used in self._open.items() if sink in positions}
            # All are asked before one is changed: otherwise a refusal would come when records of others are gone.
            _each(known, "compared with a checkpoint", lambda backend: backend.check(positions[backend.sink]))
            _each(known, "brought back to a checkpoint", lambda backend: backend.restore(positions[backend.sink]))
        except BaseException:
            self.run = before  # a later fit of this learner continues its own run
            self.close()
            raise

    @contextmanager
    def noting_outcome(self, *, trains: bool = True) -> Generator[None]:
        """Give a context that notes, for the backends, whether its body ended with an exception.

        Args:
            trains: Whether the body trains. If the body only evaluates, its failure is noted, but its success does not
                replace the noted failure of a training before it.
        """
        if trains:
            self._opened.outcome = "killed"  # the outcome if the process dies within this context
        try:
            yield
        except BaseException as failure:
            self.note_failure(failure)
            raise
        if trains:
            self._opened.outcome = "finished"

    def note_failure(self, failure: BaseException) -> None:
        """Note that the run has ended with this exception."""
        if not isinstance(failure, Exception):
            self._opened.outcome = "killed"
        else:
            self._opened.outcome = "finished" if isinstance(failure, CancelException) else "failed"

    def close(self) -> None:
        """Close every open backend, and then raise the first failure, if any."""
        self._close(dict(self._open))

    def _close(self, opened: Mapping[str, _Used]) -> None:
        try:
            _each(opened, "closed", lambda backend: self._change(backend, partial(self._end, backend)))
        finally:
            if not self._open:
                atexit.unregister(self._abandon)

    def _begin(self, backend: LoggerBackend, run: Run) -> None:
        self._opened.process = os.getpid()  # another one than made the learner, if that was forked since
        self._open[backend.sink] = self._used[backend.sink]
        _leases[id(backend)] = weakref.ref(self.lease)
        backend.open(run)

    def _end(self, backend: LoggerBackend) -> None:
        _close(backend, self._opened.outcome)
        del self._open[backend.sink]

    def _change(self, backend: LoggerBackend, change: Callable[[], None]) -> None:
        """Open or close a backend. It is closed after a failure, and after an interrupt, which may come at any line."""
        try:
            change()
        except BaseException as failure:
            if not isinstance(failure, Exception):
                backend.close()
            _leases.pop(id(backend), None)
            self._open.pop(backend.sink, None)
            raise


class _Lease:
    """The learner, and every lane that writes to its backends, refer to the lease; the backends are open meanwhile."""


@dataclass
class _Opened:
    """The open backends, in an object that outlives their `Sinks`, so that `_abandon` can still close them.

    Attributes:
        backends: The open backends by sink.
        outcome: How the run has ended, or would have ended if the process died now.
        process: The process that opened the backends. A forked child has copies of them, which it must not close.
    """

    backends: dict[str, _Used] = field(default_factory=dict)
    outcome: Outcome = "finished"
    process: int = field(default_factory=os.getpid)


_leases: dict[int, weakref.ref[_Lease]] = {}
"""The lease that each open backend belongs to, by the `id` of the backend."""


def _check_free(backend: LoggerBackend, lease: _Lease) -> None:
    """Check that no other learner has the backend open.

    Raises:
        LoggingError: Another learner has the backend open.
    """
    for last in (False, True):
        reference = _leases.get(id(backend))
        other = None if reference is None else reference()
        if other is None or other is lease:
            return
        del other
        if not last:
            gc.collect()  # the other learner may have been deleted without being closed: collecting it closes it
    raise LoggingError(
        f"{backend!r} is open for another learner, and the records of the two would be mixed. Close that one first: "
        f"write `with Learner(...) as learner:`, or learner.close(). Or make a backend for each learner."
    )


def _abandon(opened: _Opened) -> None:
    """Close the backends of a learner that was not closed. The garbage collector calls this, or Python when it exits.

    Another thread closes them, and this one waits for it at most `_PATIENCE`, because the collector may interrupt a
    thread that holds a lock which a backend needs.
    """
    if not opened.backends or os.getpid() != opened.process:
        return

    def close() -> None:
        """Close the backends, and log an error, which no caller could catch."""
        try:
            _each(opened.backends, "closed", lambda backend: _close(backend, opened.outcome))
        except Exception:
            _logger.exception("flowtrain: a logging backend of a learner that was not closed could not be closed")

    thread = threading.Thread(target=close, name="flowtrain closes backends", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # Python is exiting and starts no more threads
        close()
    else:
        thread.join(_PATIENCE)


class _Used(NamedTuple):
    """A backend, and the names of the callbacks that log to it."""

    backend: LoggerBackend
    names: list[str]


def _close(backend: LoggerBackend, outcome: Outcome) -> None:
    _leases.pop(id(backend), None)
    backend.ended(outcome)
    backend.close()


def _each(used: Mapping[str, _Used], what: str, call: Callable[[LoggerBackend], T]) -> dict[str, T]:
    """Call a function with every backend, and then raise the first failure, with notes about all failures.

    Args:
        used: The backends by sink.
        what: The past participle of the call, for the notes: ``"flushed"``.
        call: The function.

    Returns:
        The result of each call by sink.
    """
    failure: Exception | None = None
    done: dict[str, T] = {}
    for sink, (backend, names) in used.items():
        try:
            done[sink] = call(backend)
        except Exception as error:
            error.add_note(f"raised when {backend!r} of {', '.join(names)} was {what}")
            if failure is None:
                failure = error
            else:
                failure.add_note(f"and {backend!r} of {', '.join(names)} could not be {what}: {text_of(error)}")
    if failure is not None:
        raise failure
    return done


def _processes() -> int:
    """Return the number of processes that torch has joined."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if joined else 1


def _used_by(nodes: Iterable[Node]) -> dict[str, _Used]:
    """Return the backends of callbacks by sink, each with the names of the callbacks that log to it.

    Raises:
        LoggingError: Two backends write to the same place, or a callback logs to an object that is no backend.
        RankError: Several ranks would write to one place.
    """
    found: dict[str, _Used] = {}
    for node in nodes:
        name, stated = node.name, node.callback.backends
        for backend in stated if is_a(stated, (list, tuple)) else (stated,):
            if not is_a(backend, LoggerBackend):
                raise LoggingError(
                    f"{name} logs to {backend!r}, which is no LoggerBackend. Write "
                    f'{type(node.callback).__name__}(TensorBoardBackend("runs/a")).'
                )
        for backend in node.backends:
            if node.callback.ranks == "every" and not backend.per_rank and _processes() > 1:
                raise RankError(
                    f"{name} has ranks = 'every' and logs to {backend!r}, which has one sink for all ranks: "
                    f"{_processes()} processes would mix their records. Log to a path with the rank in it, as in "
                    f'JsonlBackend("runs/log-{{rank}}.jsonl"), or leave ranks out: then only the main rank writes.'
                )
            other, names = found.setdefault(backend.sink, _Used(backend, []))
            if other is not backend:
                raise LoggingError(
                    f"{names[0]} logs to {other!r} and {name} to {backend!r}, which is the same place, and two "
                    f"writers would mix their records. Make one backend and give it to both."
                )
            names.append(name)
    return found
