"""Sinks: the logging backends of a learner's callbacks, opened before training and closed after it.

The backends of a callback are those that it holds, see `flowtrain.graph.held_backends`. The process that trains owns
them: it opens each once, before the first event, whoever writes into it later. What a backend raises gets a note that
names it and the callbacks that log to it.

The backends are open as long as somebody holds `Sinks.held`: the learner, and the lanes that have yet to write. When a
learner is dropped that nobody closed, they are closed by the last of these.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch

from flowtrain.errors import CancelException, LoggingError, is_a
from flowtrain.graph.nodes import Node
from flowtrain.logging.backend import LoggerBackend, Outcome, Run

__all__ = ["Sinks"]

T = TypeVar("T")

_logger = logging.getLogger("flowtrain")

_PATIENCE = 30.0
"""Seconds for which the garbage collector waits until backends are closed."""


class Sinks:
    """The backends of one learner.

    Attributes:
        run: The run that they are opened for.
        held: What keeps them open.
    """

    def __init__(self) -> None:
        self.run = Run(uuid.uuid4().hex[:12])
        self._owned: dict[str, _Owned] = {}  # by sink
        self._books = _Books()
        self._open = self._books.open
        self.held = _Held()
        weakref.finalize(self.held, _abandon, self._books)

    @staticmethod
    def check(nodes: Iterable[Node]) -> None:
        """Check the backends of callbacks that a learner is about to use.

        Raises:
            LoggingError: Two of them write to the same place, or one is no backend.
        """
        _owned(nodes)

    def use(self, nodes: Iterable[Node]) -> None:
        """Use the backends of these callbacks from now on; those that are open and not among them are closed."""
        self._owned = _owned(nodes)
        gone: dict[str, _Owned] = {}
        for sink, opened in list(self._open.items()):
            if sink not in self._owned or self._owned[sink].backend is not opened.backend:
                gone[sink] = self._open.pop(sink)
        self._end(gone)

    def open(self) -> None:
        """Open the backends that are not open yet.

        Raises:
            LoggingError: A backend cannot be opened; nothing has been trained then.
        """
        new = {sink: owned for sink, owned in self._owned.items() if sink not in self._open}
        if not new:
            return
        run = replace(self.run, rank=_rank())

        def begin(backend: LoggerBackend) -> None:
            _check_free(backend, self.held)
            backend.open(run)
            self._open[backend.sink] = self._owned[backend.sink]
            _holders[id(backend)] = weakref.ref(self.held)

        _each(new, "opened", begin)

    def flush(self) -> dict[str, Any]:
        """Flush the open backends; return the position of each by its sink.

        Raises:
            LoggingError: One cannot be flushed; the others have been.
        """
        return _each(self._open, "flushed", lambda backend: backend.flush())

    def moved(self, positions: Mapping[str, Any], before: str, here: str) -> dict[str, Any]:
        """Return positions by the sinks of now, where files were moved together with the checkpoint.

        A sink that is not among the learner's is looked for where it is seen from the checkpoint as it was then. Warns
        of positions that no backend takes back, while there is one that logs to another place.

        Args:
            positions: As `flush` returned them.
            before: The folder of the checkpoint when it was written.
            here: The folder where it is now.
        """
        found = {sink: position for sink, position in positions.items() if sink in self._owned}
        left = {sink: position for sink, position in positions.items() if sink not in found}
        for sink, position in list(left.items()):
            if os.path.isabs(sink):
                place = os.path.normpath(os.path.join(here, os.path.relpath(sink, before)))
                if place in self._owned and place not in found:
                    found[place] = position
                    del left[sink]
        new = [repr(owned.backend) for sink, owned in self._owned.items() if sink not in found]
        if left and new:
            warnings.warn(
                f"The run of the checkpoint logged to {', '.join(left)}, and the learner does not: that stays as it "
                f"is, also what was logged after the checkpoint. What follows goes to {', '.join(new)}.",
                UserWarning,
                stacklevel=4,
            )
        return found

    def restore(self, run: Run, positions: Mapping[str, Any]) -> None:
        """Go on with an earlier run: open the backends for it, and bring those that it had back to their positions.

        Raises:
            LoggingError: A backend cannot be opened, or its sink is not what it was.
        """
        self.close()
        before, self.run = self.run, run
        try:
            self.open()
            known = {sink: owned for sink, owned in self._open.items() if sink in positions}
            _each(known, "brought back to a checkpoint", lambda backend: backend.restore(positions[backend.sink]))
        except BaseException:
            self.run = before  # what trains next goes on with its own run
            self.close()
            raise

    @contextmanager
    def noting(self, *, trains: bool = True) -> Generator[None]:
        """Note for the backends how what runs in this context ended.

        Args:
            trains: Whether it trains. If it only evaluates, its failure counts, and its success does not make up for
                an earlier failure.
        """
        if trains:
            self._books.outcome = "killed"  # if nobody comes to say otherwise
        try:
            yield
        except BaseException as failure:
            self.note(failure)
            raise
        if trains:
            self._books.outcome = "finished"

    def note(self, failure: BaseException) -> None:
        """Note that the run ended with an exception."""
        if not isinstance(failure, Exception):
            self._books.outcome = "killed"
        else:
            self._books.outcome = "finished" if isinstance(failure, CancelException) else "failed"

    def close(self) -> None:
        """Close all; the first failure is raised when each has been tried."""
        opened = dict(self._open)
        self._open.clear()
        self._end(opened)

    def _end(self, opened: Mapping[str, _Owned]) -> None:
        _each(opened, "closed", lambda backend: _close(backend, self._books.outcome))


class _Held:
    """Held by everybody who writes to the backends."""


@dataclass
class _Books:
    """What is known of the open backends, also when their `Sinks` are gone.

    Attributes:
        open: The open backends by sink.
        outcome: How the run has ended, or would if it ended now.
        process: The process that opened them; a forked child has copies, and closes none.
    """

    open: dict[str, _Owned] = field(default_factory=dict)
    outcome: Outcome = "finished"
    process: int = field(default_factory=os.getpid)


_holders: dict[int, weakref.ref[_Held]] = {}
"""Who has opened a backend, by the id of the backend."""


def _check_free(backend: LoggerBackend, held: _Held) -> None:
    """Check that no other learner has the backend open.

    Raises:
        LoggingError: One has.
    """
    for last in (False, True):
        reference = _holders.get(id(backend))
        holder = None if reference is None else reference()
        if holder is None or holder is held:
            return
        del holder
        if not last:
            gc.collect()  # a learner that was dropped and not closed
    raise LoggingError(
        f"{backend!r} is open for another learner, and the records of the two would be mixed. Close that one first: "
        f"write `with Learner(...) as learner:`, or learner.close(). Or make a backend for each learner."
    )


def _abandon(books: _Books) -> None:
    """Close the backends of a learner that nobody closed; called by the garbage collector, or when Python ends.

    They are closed in another thread, which is waited for: the collector may come while this one holds a lock that a
    backend needs.
    """
    if not books.open or os.getpid() != books.process:
        return

    def close() -> None:
        try:
            _each(books.open, "closed", lambda backend: _close(backend, books.outcome))
        except Exception:
            _logger.exception("flowtrain: a logging backend could not be closed, whose learner nobody had closed")

    thread = threading.Thread(target=close, name="flowtrain closes backends", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # Python is ending
        close()
    else:
        thread.join(_PATIENCE)


class _Owned(NamedTuple):
    """A backend, and the names of the callbacks that log to it."""

    backend: LoggerBackend
    names: list[str]


def _close(backend: LoggerBackend, outcome: Outcome) -> None:
    _holders.pop(id(backend), None)
    backend.ended(outcome)
    backend.close()


def _each(owned: Mapping[str, _Owned], what: str, do: Callable[[LoggerBackend], T]) -> dict[str, T]:
    """Do something with each backend, whatever the others raise; then raise the first failure, with a note."""
    failure: Exception | None = None
    done: dict[str, T] = {}
    for sink, (backend, names) in owned.items():
        try:
            done[sink] = do(backend)
        except Exception as error:
            error.add_note(f"raised when {backend!r} of {', '.join(names)} was {what}")
            if failure is None:
                failure = error
            else:
                failure.add_note(f"and {backend!r} of {', '.join(names)} could not be {what}: {error}")
    if failure is not None:
        raise failure
    return done


def _rank() -> int:
    """Return the number of this process in a distributed run; 0 where there is one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0") or 0)  # set by torchrun


def _owned(nodes: Iterable[Node]) -> dict[str, _Owned]:
    """Return the backends of callbacks by sink, each with the names of those that log to it."""
    found: dict[str, _Owned] = {}
    for node in nodes:
        name, stated = node.name, node.callback.backends
        for backend in stated if is_a(stated, (list, tuple)) else (stated,):
            if not is_a(backend, LoggerBackend):
                raise LoggingError(
                    f"{name} logs to {backend!r}, which is no LoggerBackend. Write "
                    f'{type(node.callback).__name__}(TensorBoardBackend("runs/a")).'
                )
        for backend in node.backends:
            other, names = found.setdefault(backend.sink, _Owned(backend, []))
            if other is not backend:
                raise LoggingError(
                    f"{names[0]} logs to {other!r} and {name} to {backend!r}, which is the same place, and two "
                    f"writers would mix their records. Make one backend and give it to both."
                )
            names.append(name)
    return found
