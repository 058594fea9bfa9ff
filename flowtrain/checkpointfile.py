"""Checkpoint files: written beside and renamed, so that what has a checkpoint's name is always complete.

Beside the files of a folder stand ``latest`` and ``best``: small text files, each with the name of one of them, and
replaced in the same way. They are not links, which not every file system has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from flowtrain.errors import CheckpointError

__all__ = ["FORMAT", "JUDGED", "POINTERS", "VERSION", "read", "real_folder", "replace", "resolve", "target"]

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
