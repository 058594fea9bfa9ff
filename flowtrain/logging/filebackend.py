"""What the backends that write one file have in common."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from flowtrain.errors import LoggingError
from flowtrain.logging.files import AppendingFile
from flowtrain.records import HOLD, LoggerBackend, Run

__all__ = ["FileBackend", "not_open"]


class FileBackend(LoggerBackend):
    """A backend with one file, that grows at its end. A subclass says where the file is and what a record looks like.

    Args:
        path: The file or folder; made absolute, so that it means the same everywhere.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._file: AppendingFile | None = None
        self._silent = False

    @property
    def sink(self) -> str:
        """The path, without symbolic links."""
        return os.path.realpath(self.path)

    @abstractmethod
    def _open_file(self, run: Run) -> AppendingFile:
        """Open the file of a run."""

    def open(self, run: Run) -> None:
        """Open the file, or make it. What is in it is kept."""
        self.close()
        self._silent = run.rank != 0
        if not self._silent:
            self._file = self._open_file(run)

    def write(self, record: bytes) -> None:
        """Append a record."""
        if self._file is None:
            if self._silent:
                return
            raise not_open(self)
        self._append(self._file, record)

    def _append(self, file: AppendingFile, record: bytes) -> None:
        file.append(record)

    def write_all(self, records: Sequence[bytes]) -> None:
        """Append records."""
        if self._file is None or type(self).write is not FileBackend.write:  # a subclass has a `write` of its own
            super().write_all(records)
        else:
            self._append_all(self._file, records)

    def _append_all(self, file: AppendingFile, records: Sequence[bytes]) -> None:
        for record in records:
            self.write(record)

    def flush(self) -> Any:
        """Bring the file to the disk; return its size in bytes, or ``None`` in a process that writes nothing."""
        return None if self._file is None else self._file.sync()

    def restore(self, position: Any) -> None:
        """Drop what follows a position."""
        if self._file is not None and position is not None:
            self._file.truncate(position)

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None}  # a copy encodes and never writes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"


def not_open(backend: LoggerBackend) -> LoggingError:
    """Make the error for a record that comes before `open`."""
    return LoggingError(
        f"{backend!r} is not open. {HOLD} Without a learner, call open(Run(id)) first."
    )
