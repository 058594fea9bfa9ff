"""Files of backends: a file to which whole records are appended, a file that is replaced as a whole, and their backend.

`AppendingFile` passes every record to the operating system at once, so a process that is killed loses no record. It
removes a record that does not fit on the disk, so the file always ends with a whole record. `FileBackend` is the base
of backends that append to one file.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from flowtrain.errors import LoggingError
from flowtrain.errors.arguments import is_a, switch
from flowtrain.logging.backend import HOLD, File, LoggerBackend, Run

__all__ = [
    "AppendingFile",
    "FileBackend",
    "given_path",
    "impossible",
    "not_open",
    "of_rank",
    "process_rank",
    "read_file",
    "remove_temporary",
    "replace_file",
    "unwritable",
    "warn_of_others",
]


class AppendingFile:
    """An open file to which records are appended.

    Args:
        path: The path; file and folders are made if they do not exist.
        whole: A function of the descriptor of the open file that returns how many of its first bytes are whole
            records, or refuses a file of other content. The bytes after these, a record that a power failure has cut
            off, are removed.

    Attributes:
        size: The size of the file in bytes.

    Raises:
        LoggingError: The file cannot be opened for writing, or is no regular file, such as ``/dev/null``.
    """

    def __init__(self, path: str, whole: Callable[[int], int]) -> None:
        self.path = path
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise LoggingError(
                f"{path} is a device or a pipe, and a log is a file that is read again when a run is resumed. Log to a "
                f"file, or leave the backend out."
            )
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            self._file = io.FileIO(path, "a+")  # an object, so that an interrupt here cannot lose an open descriptor
        except OSError as error:
            raise unwritable(path, error) from error
        self._descriptor = self._file.fileno()
        try:
            self.size = whole(self._descriptor)
            os.ftruncate(self._descriptor, self.size)
        except BaseException:
            self._file.close()
            raise

    def append(self, data: bytes) -> None:
        """Write a record at the end of the file.

        Raises:
            LoggingError: The record cannot be written, as when the disk is full. The file is as it was before.
        """
        written = 0
        try:
            while written < len(data):
                written += os.write(self._descriptor, data[written:] if written else data)
        except BaseException as error:  # an interrupt too, after which the file must not have a part of the record
            os.ftruncate(self._descriptor, self.size)
            if not isinstance(error, OSError):
                raise
            raise LoggingError(
                f"{self.path}: a record of {len(data)} bytes cannot be written: {error.strerror}. The file keeps the "
                f"{self.size} bytes before it, all of them whole records. Make room, and resume from a checkpoint."
            ) from error
        self.size += written

    def append_all(self, records: Sequence[bytes]) -> None:
        """Write records at the end of the file, with one system call if they all fit.

        Raises:
            LoggingError: A record cannot be written. The records before it are in the file.
        """
        try:
            self.append(b"".join(records))
        except LoggingError:
            for record in records:  # one by one, so that the file keeps as many records as fit
                self.append(record)

    def check(self, size: Any) -> None:
        """Check that the file has at least `size` bytes.

        Raises:
            LoggingError: It has fewer, or `size` is no number of bytes.
        """
        if type(size) is not int or size < 0:
            raise impossible(self.path, size)
        if size > self.size:
            raise LoggingError(
                f"{self.path} has {self.size} bytes, and had {size} when the checkpoint was made: it is not the same "
                f"file, or has been cut. Put it back, or log this run to another path."
            )

    def truncate(self, size: int) -> None:
        """Remove all bytes after the first `size` bytes.

        Raises:
            LoggingError: As for `check`.
        """
        self.check(size)
        os.ftruncate(self._descriptor, size)
        self.size = size

    def sync(self) -> int:
        """Wait until the whole file is on the disk; return its size in bytes.

        Raises:
            LoggingError: The disk has failed, or the file was deleted.
        """
        try:
            os.fsync(self._descriptor)
            deleted = not os.fstat(self._descriptor).st_nlink and not os.path.exists(self.path)
        except OSError as error:
            raise LoggingError(f"{self.path} cannot be brought to the disk: {error.strerror}.") from error
        if deleted:  # the system takes records all the same, and nobody could read them
            raise LoggingError(
                f"{self.path} was deleted while it was open, so its {self.size} bytes are lost. The last checkpoint is "
                f"not changed. Resume from it with a log of another path, which begins there; or delete the "
                f"checkpoints too, and begin anew."
            )
        return self.size

    def close(self) -> None:
        """Bring the file to the disk and close it, unless an interrupt has come after it was closed."""
        if self._file.closed:
            return
        try:
            self.sync()
        finally:
            self.leave()

    def leave(self) -> None:
        """Close the file, which another one has replaced, so that it need not be on the disk."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def replace_file(path: str, data: bytes, *, sync: bool = True) -> None:
    """Write a whole file under another name and rename it, so that a file with this path is never incomplete.

    Args:
        path: The path.
        data: The content.
        sync: Whether to wait for the disk, so that this also holds after a power failure.

    Raises:
        LoggingError: The file cannot be written. An earlier file with this path is still there.
    """
    beside = f"{path}.{os.getpid()}.tmp"  # `remove_temporary` knows this name
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            with open(beside, "wb") as file:
                file.write(data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            if os.path.exists(beside):
                os.unlink(beside)
            raise
    except OSError as error:
        raise LoggingError(f"{path} cannot be written: {error.strerror}. Nothing of it is left.") from error


def remove_temporary(path: str, *, within: bool = False) -> None:
    """Remove the unfinished files that processes have left which were killed in `replace_file`.

    Args:
        path: The path of the whole file.
        within: Whether `path` is a folder, and the files in it and in its folders are meant.
    """
    found = f"{glob.escape(path)}/**/*.tmp" if within else f"{glob.escape(path)}.*.tmp"
    for beside in glob.iglob(found, recursive=True):
        if re.search(r"\.\d+\.tmp$", beside):
            with contextlib.suppress(OSError):  # it is of no use, and does no harm
                os.unlink(beside)


def read_file(file: File) -> bytes:
    """Return the content of a file that a callback logs.

    Raises:
        LoggingError: The file cannot be read.
    """
    if not is_a(file.path, (str, os.PathLike)):
        raise LoggingError(f"File({file.path!r}): path is a path, such as 'runs/a/model.onnx'.")
    try:
        with open(file.path, "rb") as opened:
            return opened.read()
    except OSError as error:
        raise LoggingError(f"File({os.fspath(file.path)!r}) cannot be read: {error.strerror}.") from error


def unwritable(path: str, error: OSError) -> LoggingError:
    """Return the error for a path that cannot be written."""
    reason = error.strerror or str(error)
    if error.filename not in (None, path):  # such as a file that has the path of a folder
        reason = f"{reason}: {error.filename}"
    return LoggingError(f"{path} cannot be written: {reason}. Log to a path in a folder that you may write to.")


def of_rank(path: str) -> str:
    """Return a path with the rank of this process instead of ``{rank}``; it is 0 in a training of one process."""
    return path.replace("{rank}", str(process_rank()))


def process_rank() -> int:
    """Return the rank of this process in a distributed run; 0 in a run of one process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    # torchrun sets all of these. A RANK alone is the variable of another program, and this process writes its log.
    started = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["RANK"]) if started else 0


def given_path(owner: str, path: Any) -> str:
    """Return the path of a log as an absolute one, so that it does not depend on the working directory.

    Args:
        owner: The name of the backend's type, for the message.
        path: The argument of the user.

    Raises:
        LoggingError: `path` is no path that is a text.
    """
    given: object = os.fspath(path) if is_a(path, os.PathLike) else path
    if not isinstance(given, str) or not given or "\0" in given:  # an empty path would be the working directory
        raise LoggingError(f"{owner}(path={path!r}): path is a path, such as 'runs/a/log.jsonl'.")
    return os.path.abspath(given)


class FileBackend(LoggerBackend):
    """The base of backends that append to one file. A subclass opens the file and defines the format of a record.

    Args:
        path: The file or its folder. It is made absolute, so that it does not depend on the working directory. With
            ``{rank}`` in it, as in ``"log-{rank}.jsonl"``, each rank writes a file of its own.
        append: Whether records of another run are expected there. Otherwise `open` warns of them.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        self._given = given_path(type(self).__name__, path)
        self.path = of_rank(self._given)
        self.per_rank = self.path != self._given
        self.append = switch(type(self).__name__, "append", append, LoggingError)
        self._file: AppendingFile | None = None
        self._silent = False
        self._run = ""  # the run that this backend was last opened for

    @property
    def sink(self) -> str:
        """The path without symbolic links. It is the same on every rank, so a ``{rank}`` in it stays."""
        return os.path.realpath(self._given)

    @abstractmethod
    def _open_file(self, run: Run) -> AppendingFile:
        """Open the file of a run."""

    def open(self, run: Run) -> None:
        """Open the file, or make it. Records in it are kept, with a warning if they are of another run."""
        self.close()
        self._silent = run.rank != 0 and not self.per_rank
        if self._silent:
            return
        if not self.append and not run.resumed and run.id != self._run:
            size = os.path.getsize(self.path) if os.path.isfile(self.path) else 0
            warn_of_others(self, f"{size} bytes" if size else "")
        self._file = self._open_file(run)
        self._run = run.id

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
        if self._file is None or type(self).write is not FileBackend.write:  # a user's subclass may override `write`
            super().write_all(records)
        else:
            self._append_all(self._file, records)

    def _append_all(self, file: AppendingFile, records: Sequence[bytes]) -> None:
        for record in records:
            self.write(record)

    def flush(self) -> Any:
        """Bring the file to the disk; return its size in bytes, or ``None`` if no file is open in this process."""
        return None if self._file is None else self._file.sync()

    def check(self, position: Any) -> None:
        """Check that the file reaches to a position.

        Raises:
            LoggingError: The file is shorter than at that position, or the position is impossible.
        """
        if self._file is not None and position is not None:
            self._file.check(position)

    def restore(self, position: Any) -> None:
        """Remove the records that were written after a position.

        Raises:
            LoggingError: The file is shorter than at that position.
        """
        if self._file is not None and position is not None:
            self._file.truncate(position)

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None}  # a copy in another process encodes and never writes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"


def warn_of_others(backend: Any, before: str) -> None:
    """Warn of records that this run does not continue, after which its own records come.

    They are of another run, or of a process that was killed before a checkpoint had a position in this log.

    Args:
        backend: The backend, which has a `path`.
        before: A description of the records, such as ``"90 bytes"``; empty if there is nothing.
    """
    if before:
        warnings.warn(
            f"{backend.path} already has {before} of another run or of a killed process, and this fit has no "
            f"checkpoint that continues them: its records come after those. Write fit(..., resume=...) with a "
            f"checkpoint of the other run to continue it, log this one to a path of its own, or write "
            f"{type(backend).__name__}(..., append=True).",
            UserWarning,
            stacklevel=3,
        )


def impossible(path: str, position: Any) -> LoggingError:
    """Return the error for a position in a file that no `flush` has returned."""
    return LoggingError(
        f"{path}: the checkpoint has the position {position!r:.60} in this file, which is impossible. It was changed "
        f"after flowtrain wrote it. Pass another checkpoint. The file has not been changed."
    )


def not_open(backend: LoggerBackend) -> LoggingError:
    """Return the error for a record that is written before `open`."""
    return LoggingError(f"{backend!r} is not open. {HOLD} Without a learner, call open(Run(id)) first.")
