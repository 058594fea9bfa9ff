"""Checkpoint files: written beside and renamed, so that what has a checkpoint's name is always complete.

Beside the files of a folder stand ``latest`` and ``best``: small text files, each with the name of one of them, and
replaced in the same way. They are not links, which not every file system has.

The writer: checkpoints go to the disk on a thread of their own, one at a time.

The training thread hands over a staged checkpoint that nobody else holds, and goes on. It waits only if the one before
is still being written. What fails is raised on the training thread: before its next batch, or when it waits.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from flowtrain.callback.view import CheckpointRequest
from flowtrain.errors import CheckpointError
from flowtrain.graph.executor import Mailbox

__all__ = [
    "FORMAT",
    "JUDGED",
    "POINTERS",
    "VERSION",
    "Writer",
    "read",
    "real_folder",
    "replace",
    "resolve",
    "target",
]

FORMAT, VERSION = "flowtrain checkpoint", 1
JUDGED = 2
"""The version of a checkpoint whose ``model`` is not what is trained: a reader of version 1 would train on with it."""

POINTERS = ("latest", "best")

Reached = Callable[[str], None]


def replace(path: Path, write: Callable[[IO[bytes]], None], reached: Reached, what: str) -> None:
    """Write a file under a temporary name, bring it to the disk, and rename it.

    Args:
        path: The file.
        write: Writes the content.
        reached: Called at each named point: ``"{what} begun"``, ``"written"`` and ``"renamed"``.
        what: What the file is, in the names of the points.
    """
    temporary = path.with_name(f".{path.name}.tmp")
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
    if os.name == "posix":  # the rename itself is in the folder, which is written by its own
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    reached(f"{what} renamed")


def target(folder: Path, pointer: str) -> str:
    """Return the name of the file that ``latest`` or ``best`` names; empty where there is no such pointer."""
    try:
        return (folder / pointer).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def real_folder(path: str | os.PathLike[str]) -> str:
    """Return the folder that a file is in, absolute and without symbolic links."""
    return os.path.dirname(os.path.realpath(path))


def resolve(path: str | os.PathLike[str]) -> Path:
    """Return the file of a checkpoint.

    Args:
        path: The file, a folder (then what its ``latest`` names), or the ``latest`` or ``best`` of a folder.

    Raises:
        CheckpointError: There is none.
    """
    found = Path(path)
    if found.is_dir():
        if not (found / "latest").is_file():
            kept = ", ".join(sorted(each.name for each in found.iterdir() if not each.name.startswith("."))[:5])
            raise CheckpointError(
                f"The folder {found} has no checkpoint that is complete: there is no file 'latest' in it (it holds: "
                f"{kept or 'nothing'}). Pass the folder of a Checkpointer, or a checkpoint's file."
            )
        found = found / "latest"
    if found.name in POINTERS:
        name = target(found.parent, found.name)
        if name:
            found = found.parent / name
    if not found.is_file():
        raise CheckpointError(f"There is no checkpoint {found}: no such file.")
    return found


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what is in a checkpoint, on the CPU.

    Raises:
        CheckpointError: It is missing, not complete, no checkpoint, or of a version that is not known here.
    """
    file = resolve(path)
    try:
        contents: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, IndexError, ...
        raise CheckpointError(
            f"{file} cannot be read as a checkpoint: {_first_line(error)}. It is truncated, or it is "
            f"something else. A Checkpointer's own files are complete whenever they have their name."
        ) from error
    if not isinstance(contents, Mapping) or contents.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} is no checkpoint of flowtrain: it holds {type(contents).__name__}. For weights alone call "
            f"learner.model.load_state_dict(torch.load(path))."
        )
    if contents["version"] not in (VERSION, JUDGED):
        raise CheckpointError(
            f"{file} has version {contents['version']} of the format, written by flowtrain {contents['flowtrain']}; "
            f"this one reads {VERSION} and {JUDGED}. Use the flowtrain that wrote it, or a later one."
        )
    return dict(contents)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


class Writer:
    """Writes checkpoints.

    Args:
        mailbox: Gets what the training thread is to do: raise what went wrong.

    Attributes:
        reached: Called, on the writing thread, at each named point of a write. A test stops there.
    """

    def __init__(self, mailbox: Mailbox) -> None:
        self.reached: Callable[[str], None] = lambda point: None
        self._mailbox = mailbox
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def submit(self, contents: dict[str, Any], request: CheckpointRequest) -> None:
        """Begin to write a checkpoint; the one before is finished first.

        Where ``contents["finite"]`` is false no pointer will name it.

        Raises:
            CheckpointError: The one before could not be written.
        """
        self.wait()
        job = partial(self._write, contents, request)
        self._thread = threading.Thread(target=job, name="flowtrain-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            CheckpointError: The last checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, contents: dict[str, Any], request: CheckpointRequest) -> None:
        path = Path(request.path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, partial(_save, contents), self.reached, "checkpoint")
            if request.weights:
                tensors = _weights(contents["model"])
                beside = path.with_suffix(".safetensors")
                replace(beside, lambda file: _save_weights(tensors, file), self.reached, "weights")
            if contents["finite"]:
                for pointer in POINTERS if request.best else POINTERS[:1]:
                    replace(path.with_name(pointer), lambda file: _put(file, path.name), self.reached, pointer)
            else:
                self._mailbox.put(partial(_warn, path))
            _remove(path.parent, request.remove)
            self.reached("removed")
        except BaseException as error:
            kept = target(path.parent, "latest")
            still = f"The last one that is complete is {path.parent / kept}." if kept else "There is none before it."
            failure = CheckpointError(
                f"The checkpoint {path} could not be written: {_cause(error)}. {still} Make room, or choose another "
                f"folder, and go on with fit(..., resume=...)."
            )
            failure.__cause__ = error
            self._failure = failure
            self._mailbox.put(self._raise)


def _put(file: Any, name: str) -> None:
    file.write(name.encode() + b"\n")


def _save(contents: dict[str, Any], file: Any) -> None:
    torch.save(contents, file)


def _weights(model: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the tensors of all models by name, none of which shares its memory with another: safetensors asks that."""
    return {
        f"{name}.{key}" if name else key: value.contiguous().clone()
        for name, state in model.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def _save_weights(tensors: dict[str, torch.Tensor], file: Any) -> None:
    from safetensors.torch import save  # an extra; who asks for it has it

    file.write(save(tensors))


def _remove(folder: Path, names: tuple[str, ...]) -> None:
    """Remove what is not wanted any more, except what a pointer names."""
    kept = {target(folder, pointer) for pointer in POINTERS}
    for name in names:
        if name not in kept and os.path.basename(name) == name:
            (folder / name).unlink(missing_ok=True)
            (folder / name).with_suffix(".safetensors").unlink(missing_ok=True)


def _warn(path: Path) -> None:
    kept = target(path.parent, "latest")
    warnings.warn(
        f"The checkpoint {path} holds values that are not finite (a parameter that is trained, or the last loss), so "
        f"it does not become the latest; that is {kept or 'none'}.",
        RuntimeWarning,
        stacklevel=2,
    )


def _cause(error: BaseException) -> str:
    """Say what went wrong, by what the operating system said, which torch covers with errors of its own."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError):
            return str(at)
        at = at.__cause__ or at.__context__
    return f"{type(error).__name__}: {error}"
