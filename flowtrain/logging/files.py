"""Files: one that grows at its end, one whole record after the other; and whole ones.

Every record goes to the operating system at once: a process that is killed loses none. A record that does not fit on
the disk is taken back, so that the file always ends with a whole one.

What the backends that write one file have in common.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

from flowtrain.errors import LoggingError
from flowtrain.logging.backend import HOLD, File, LoggerBackend, Run

__all__ = [
    "AppendingFile",
    "FileBackend",
    "not_open",
    "read_file",
    "replace_file",
    "unwritable",
]


class AppendingFile:
    """An open file.

    Args:
        path: Where it is; made, with its folders, if it is not there.
        whole: Returns how many bytes of the open file are whole records; what follows them was cut off when the
            power failed or the disk was full, and is dropped.

    Raises:
        LoggingError: It cannot be opened for writing.
    """

    def __init__(self, path: str, whole: Callable[[int], int]) -> None:
        self.path = path
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise unwritable(path, error) from error
        self.size = whole(self._descriptor)
        os.ftruncate(self._descriptor, self.size)

    def append(self, data: bytes) -> None:
        """Write at the end.

        Raises:
            LoggingError: It cannot be written, as when the disk is full; the file is as it was before.
        """
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:] if written else data)
        except OSError as error:
            os.ftruncate(self._descriptor, self.size)
            raise LoggingError(
                f"{self.path}: a record of {len(data)} bytes cannot be written: {error.strerror}. The file keeps the "
                f"{self.size} bytes before it, all of them whole records. Make room, and go on from a checkpoint."
            ) from error
        self.size += written

    def append_all(self, records: Sequence[bytes]) -> None:
        """Write records at the end, with one call of the system; where they do not all fit, as many as do.

        Raises:
            LoggingError: One cannot be written; those before it are in the file.
        """
        try:
            self.append(b"".join(records))
        except LoggingError:
            for record in records:
                self.append(record)

    def truncate(self, size: int) -> None:
        """Drop what follows the first `size` bytes.

        Raises:
            LoggingError: There are not that many.
        """
        if size > self.size:
            raise LoggingError(
                f"{self.path} has {self.size} bytes, and had {size} when the checkpoint was made: it is not the same "
                f"file, or has been cut. Put it back, or log this run to another path."
            )
        os.ftruncate(self._descriptor, size)
        self.size = size

    def sync(self) -> int:
        """Wait until all of it is on the disk; return the size in bytes.

        Raises:
            LoggingError: The disk has failed.
        """
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise LoggingError(f"{self.path} cannot be brought to the disk: {error.strerror}.") from error
        return self.size

    def close(self) -> None:
        """Bring it to the disk and close it."""
        try:
            self.sync()
        finally:
            os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def replace_file(path: str, data: bytes) -> None:
    """Write a whole file beside where it belongs and rename it: it is never there in part.

    Raises:
        LoggingError: It cannot be written; what was there before is still there.
    """
    beside = f"{path}.{os.getpid()}.tmp"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            if os.path.exists(beside):
                os.unlink(beside)
            raise
    except OSError as error:
        raise LoggingError(f"{path} cannot be written: {error.strerror}. Nothing of it is left.") from error


def read_file(file: File) -> bytes:
    """Return the content of a file that is logged.

    Raises:
        LoggingError: It cannot be read.
    """
    try:
        with open(file.path, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise LoggingError(f"File({os.fspath(file.path)!r}) cannot be read: {error.strerror}.") from error


def unwritable(path: str, error: OSError) -> LoggingError:
    """Make the error for a place that cannot be written to."""
    reason = error.strerror or str(error)
    if error.filename not in (None, path):  # what is in the way, such as a file in place of a folder
        reason = f"{reason}: {error.filename}"
    return LoggingError(f"{path} cannot be written: {reason}. Log to a path in a folder that you may write to.")


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
    return LoggingError(f"{backend!r} is not open. {HOLD} Without a learner, call open(Run(id)) first.")
