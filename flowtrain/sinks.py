"""Sinks: the logging backends of a learner's callbacks, opened before training and closed after it.

A callback names its backends in ``backends``. The process that trains owns them: it opens each once, before the first
event, whoever writes into it later.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from flowtrain.callback import Callback
from flowtrain.errors import LoggingError, is_a
from flowtrain.records import LoggerBackend, Run

__all__ = ["Sinks"]


class Sinks:
    """The backends of one learner.

    Attributes:
        run: The run that they are opened for.
    """

    def __init__(self) -> None:
        self.run = Run(uuid.uuid4().hex[:12])
        self._backends: list[LoggerBackend] = []
        self._open: list[LoggerBackend] = []

    @staticmethod
    def check(callbacks: Iterable[Callback]) -> None:
        """Check the backends of callbacks that a learner is about to use.

        Raises:
            LoggingError: Two of them write to the same place, or one is no backend.
        """
        _backends(callbacks)

    def use(self, callbacks: Iterable[Callback]) -> None:
        """Use the backends of these callbacks from now on; those that are open and not among them are closed."""
        backends = _backends(callbacks)
        gone = [backend for backend in self._open if not any(backend is one for one in backends)]
        self._backends = backends
        self._open = [backend for backend in self._open if not any(backend is one for one in gone)]
        for backend in gone:
            backend.close()

    def open(self) -> None:
        """Open the backends that are not open yet.

        Raises:
            LoggingError: A backend cannot be opened; nothing has been trained then.
        """
        for backend in self._backends:
            if any(backend is one for one in self._open):
                continue
            backend.open(self.run)
            self._open.append(backend)

    def flush(self) -> dict[str, Any]:
        """Flush the open backends; return the position of each by its sink."""
        return {backend.sink: backend.flush() for backend in self._open}

    def restore(self, run: Run, positions: Mapping[str, Any]) -> None:
        """Go on with an earlier run: open the backends for it, and bring those that it had back to their positions."""
        self.close()
        self.run = run
        self.open()
        for backend in self._open:
            if backend.sink in positions:
                backend.restore(positions[backend.sink])

    def close(self) -> None:
        """Close all; the first failure is raised when each has been tried."""
        opened, self._open = self._open, []
        failure: BaseException | None = None
        for backend in opened:
            try:
                backend.close()
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure


def _backends(callbacks: Iterable[Callback]) -> list[LoggerBackend]:
    found: dict[str, tuple[LoggerBackend, str]] = {}
    for callback in callbacks:
        name = callback.name or type(callback).__name__
        for backend in callback.backends:
            if not is_a(backend, LoggerBackend):
                raise LoggingError(
                    f"{name} logs to {backend!r}, which is no LoggerBackend. Write "
                    f'{type(callback).__name__}(TensorBoardBackend("runs/a")).'
                )
            other, owner = found.setdefault(backend.sink, (backend, name))
            if other is not backend:
                raise LoggingError(
                    f"{owner} and {name} each have a {type(backend).__name__} for {backend.sink}, and two writers "
                    f"would mix their records. Make one backend and give it to both."
                )
    return [backend for backend, _ in found.values()]
