"""Files: one that grows at its end, one whole record after the other; and whole ones.

Every record goes to the operating system at once: a process that is killed loses none. A record that does not fit on
the disk is taken back, so that the file always ends with a whole one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Self

from flowtrain.errors import LoggingError
from flowtrain.records import File

__all__ = ["AppendingFile", "read_file", "replace_file", "unwritable"]


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
