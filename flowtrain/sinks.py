"""Sinks: the logging backends of a learner's callbacks, opened before training and closed after it.

The backends of a callback are those that it holds, see `flowtrain.holding`. The process that trains owns them: it opens
each once, before the first event, whoever writes into it later. What a backend raises gets a note that names it and the
callbacks that log to it.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from flowtrain.errors import LoggingError, is_a
from flowtrain.graph import Node
from flowtrain.records import LoggerBackend, Run

__all__ = ["Sinks"]

T = TypeVar("T")


class Sinks:
    """The backends of one learner.

    Attributes:
        run: The run that they are opened for.
    """

    def __init__(self) -> None:
        self.run = Run(uuid.uuid4().hex[:12])
        self._owned: dict[str, _Owned] = {}  # by sink
        self._open: dict[str, _Owned] = {}

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
        _each(gone, "closed", _close)

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
            backend.open(run)
            self._open[backend.sink] = self._owned[backend.sink]

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

    def close(self) -> None:
        """Close all; the first failure is raised when each has been tried."""
        opened, self._open = self._open, {}
        _each(opened, "closed", _close)


class _Owned(NamedTuple):
    """A backend, and the names of the callbacks that log to it."""

    backend: LoggerBackend
    names: list[str]


def _close(backend: LoggerBackend) -> None:
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
