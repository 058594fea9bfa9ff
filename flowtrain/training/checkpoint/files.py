"""Checkpoint files: each is written under a temporary name and renamed, so a file with its final name is complete.

The pointers of a folder, ``latest`` and ``best``, are small text files with the name of a checkpoint in that folder;
they are replaced in the same way. They are not links, because not every file system has links.

A `Writer` writes checkpoints on its own thread, one at a time. The training thread hands over a copy of the state that
nothing else refers to, and continues. It waits only if the previous checkpoint is still being written. If writing
fails, the error is raised on the training thread: before its next batch, or when it waits for the writer.

A folder may also be that of a remote file system (`flowtrain.training.checkpoint.remote`).
"""

from __future__ import annotations

import os
import secrets
import threading
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from flowtrain.callback.view import POINTERS, CheckpointRequest
from flowtrain.errors import CheckpointError
from flowtrain.graph.clock import Clock, spanning
from flowtrain.graph.executor import Mailbox
from flowtrain.training.checkpoint.folder_lock import check_owned
from flowtrain.training.checkpoint.reading import comment, target
from flowtrain.training.checkpoint.remote import Place, Remote, Unreachable, place
from flowtrain.training.checkpoint.shard_files import put_together, remove_shards, with_shards

__all__ = ["Writer", "point", "save", "write_whole"]

_Reached = Callable[[str], None]


def write_whole(path: Place, write: Callable[[IO[bytes]], None], reached: _Reached, what: str) -> None:
    """Write a file under a temporary name, flush it to the disk, and rename it; `Remote.write_whole` if it is remote.

    Args:
        path: The final path of the file.
        write: Writes the content into the open file.
        reached: Called with a text at each point: ``"{what} begun"``, ``"{what} written"`` and ``"{what} renamed"``.
        what: The kind of the file, for those texts.
    """
    if isinstance(path, Remote):
        path.write_whole(write, reached, what)
        return
    # In the same folder, since a rename between file systems is a copy; and under a name that no other process has.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            reached(f"{what} begun")
            write(file)
            file.flush()
            os.fsync(file.fileno())
        reached(f"{what} written")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the new name is an entry of the folder, which needs its own flush to survive a power cut
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    reached(f"{what} renamed")


def point(folder: Place, pointer: str, name: str) -> None:
    """Let a pointer of a folder name a checkpoint of the folder, or remove the pointer if the name is empty.

    Raises:
        CheckpointError: The file cannot be written. The pointer is as it was.
    """
    try:
        if not name:
            (folder / pointer).unlink(missing_ok=True)
        elif name != target(folder, pointer):
            write_whole(folder / pointer, partial(_save_name, name), lambda point: None, pointer)
    except (OSError, Unreachable) as error:
        wanted = f"name {name}" if name else "be removed"
        raise CheckpointError(
            f"The file {folder / pointer} must {wanted} before training continues from that checkpoint, and it cannot "
            f"be written: {error}. Nothing has been trained. Make room, or make the folder writable, and resume again."
        ) from error


class Writer:
    """Writes checkpoints on its own thread, one at a time.

    Args:
        mailbox: The mailbox of the training thread, which gets a call that raises the error of a failed write.

    Attributes:
        reached: Called on the writing thread at each point of a write, with a text that names the point. Tests replace
            it to stop a write there.
        clock: Times the writes; ``None`` without a timeline.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self.reached: Callable[[str], None] = lambda point: None
        self.clock: Clock | None = None
        self._mailbox = mailbox
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def time(self, clock: Clock | None) -> None:
        """Time the writes from now on, or no longer for ``None``."""
        self.clock = clock

    def submit(
        self,
        contents: dict[str, Any] | None,
        request: CheckpointRequest,
        around: AbstractContextManager[None] | None = None,
    ) -> None:
        """Begin to write a checkpoint, after waiting for the previous one.

        If ``contents["finite"]`` is false no pointer will name the checkpoint.

        Args:
            contents: The contents, which the writer owns from now on; ``None`` if another rank writes them.
            request: The path, and the pointers and files to change after the write.
            around: A context on the writing thread, in which the file is written.

        Raises:
            CheckpointError: The previous checkpoint could not be written.
        """
        self.wait()
        job = partial(self._write, contents, request, around or nullcontext())
        self._thread = threading.Thread(target=job, name="flowtrain-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            CheckpointError: The last checkpoint could not be written.
        """
        if self._thread is not None:
            while self._thread.is_alive():  # false if an interrupt in `submit` came before the thread was started
                self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        """Raise the error of the last write once: the mailbox and `wait` both call this."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(
        self, contents: dict[str, Any] | None, request: CheckpointRequest, around: AbstractContextManager[None]
    ) -> None:
        path = place(request.path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with around, spanning(self.clock, f"writes {path.name}", "checkpoint"):
                if contents is not None:
                    self._complete(path, contents, request)
        except BaseException as error:  # any exception, since it would be lost with this thread
            kept = _latest(path.parent)
            still = f"The last complete one is {path.parent / kept}." if kept else "There is no earlier checkpoint."
            if kept is None:
                still = "The file system does not answer now; an earlier checkpoint is as it was."
            failure = CheckpointError(
                f"The checkpoint {path} could not be written: {_cause(error)}. {still} Make room, or choose another "
                f"folder, and continue with fit(..., resume=...)."
            )
            failure.__cause__ = error
            self._failure = failure
            self._mailbox.put(self._raise)

    def _complete(self, path: Place, contents: dict[str, Any], request: CheckpointRequest) -> None:
        """Write the file of a checkpoint, then the files that name it, and remove those that it replaces."""
        if isinstance(path, Path):
            check_owned(path.parent)
        write_whole(path, partial(save, contents), self.reached, "checkpoint")
        if isinstance(path, Path):
            remove_shards(path, keep=contents.get("shards"))
        if request.weights:
            whole = with_shards(contents, path, pieces=True) if isinstance(path, Path) else contents
            tensors = _weights(put_together(whole["model"]))
            beside = path.with_suffix(".safetensors")
            write_whole(beside, lambda file: _save_weights(tensors, file), self.reached, "weights")
        if contents["finite"]:
            for pointer in POINTERS if request.best else POINTERS[:1]:
                beside = path.with_name(pointer)
                write_whole(beside, lambda file: _save_name(path.name, file), self.reached, pointer)
        else:
            self._mailbox.put(partial(_warn, path))  # on the training thread, where the user's filters apply
        try:
            _remove(path.parent, request.remove)
        except OSError as error:  # the new checkpoint is complete, so nothing is lost
            self._mailbox.put(partial(_warn_left, path.parent, request.remove, error))
        self.reached("removed")


def _save_name(name: str, file: Any) -> None:
    file.write(name.encode() + b"\n")


class _Summed:
    """A file that is open for writing, and the CRC-32 of all bytes that were written into it.

    The last two bytes are held back, so that they can be replaced in a file that nobody can go back in.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self.sum = 0
        self._file = file
        self._held = b""

    def write(self, data: Any) -> int:
        """Write bytes."""
        self.sum = zlib.crc32(data, self.sum)
        view = memoryview(data)
        if len(view) < 2:
            view, self._held = memoryview(self._held + bytes(view)), b""
        self._file.write(self._held)
        self._file.write(view[:-2])
        self._held = bytes(view[-2:])
        return len(data)

    def flush(self) -> None:
        """Pass the bytes to the operating system."""
        self._file.flush()


def save(contents: Any, file: IO[bytes]) -> None:
    """Write plain values and tensors, and their checksum as the comment of the archive, after its length."""
    summed: Any = _Summed(file)  # torch needs `write` and `flush` of a file alone
    torch.save(contents, summed)
    file.write(comment(summed.sum))  # instead of the last two bytes


def _weights(model: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the tensors of all models by name, each with its own memory, because safetensors refuses shared memory."""
    found: dict[str, torch.Tensor] = {}
    used: set[int] = set()
    for name, state in model.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                own = value.contiguous()
                own = own.clone() if own.untyped_storage().data_ptr() in used else own  # only then: it may be large
                used.add(own.untyped_storage().data_ptr())
                found[f"{name}.{key}" if name else key] = own
    return found


def _save_weights(tensors: dict[str, torch.Tensor], file: Any) -> None:
    from safetensors.torch import save  # an optional dependency, whose presence Checkpointer has checked

    file.write(save(tensors))


def _remove(folder: Place, names: tuple[str, ...]) -> None:
    """Remove the checkpoints of these names and their weights, except those that a pointer names."""
    kept = {target(folder, pointer) for pointer in POINTERS}
    for name in names:
        # The names may come from the state in a checkpoint, so they must not lead out of the folder.
        if name not in kept and os.path.basename(name) == name:
            (folder / name).unlink(missing_ok=True)
            (folder / name).with_suffix(".safetensors").unlink(missing_ok=True)
            if isinstance(folder, Path):
                remove_shards(folder / name)


def _warn_left(folder: Place, names: tuple[str, ...], error: OSError) -> None:
    warnings.warn(
        f"Of the older checkpoints {', '.join(names)} in {folder} at least one could not be removed: {error}. "
        f"All newer ones are complete. Remove it by hand, and let this process delete files in that folder.",
        RuntimeWarning,
        stacklevel=5,
    )


def _latest(folder: Place) -> str | None:
    """Return the name of the latest checkpoint of a folder for a message; empty if there is none, ``None`` unknown."""
    try:
        return target(folder, "latest")
    except Unreachable:
        return None


def _warn(path: Place) -> None:
    kept = _latest(path.parent)
    warnings.warn(
        f"The checkpoint {path} holds values that are not finite (a parameter that is trained, or the last loss), so "
        f"it does not become the latest; that is {kept or 'none'}.",
        RuntimeWarning,
        stacklevel=2,
    )


def _cause(error: BaseException) -> str:
    """Describe the error of a write, with the text of the operating system where torch has wrapped its error."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError):
            return str(at)
        at = at.__cause__ or at.__context__
    return f"{type(error).__name__}: {error}"
