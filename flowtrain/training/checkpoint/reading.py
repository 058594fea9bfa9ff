"""Checkpoint files are found and read, and damaged ones are refused.

A file ends with a checksum of all of its other bytes, which is compared before any of them is used. It stands in the
comment of the zip archive that ``torch.save`` writes, so ``torch.load`` reads the file as it is. Files of earlier
versions have no such comment; of these the checksums of the parts of the archive are compared.
"""

from __future__ import annotations

import os
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from flowtrain.callback.view import POINTERS
from flowtrain.errors import CheckpointError, UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.training.checkpoint.remote import Place, Remote, Unreachable, here, place
from flowtrain.training.checkpoint.shard_files import put_together, with_shards

__all__ = [
    "FORMAT",
    "IN_PIECES",
    "JUDGED",
    "VERSION",
    "comment",
    "find_file",
    "load_weights",
    "number_of",
    "own_version",
    "read",
    "real_folder",
    "target",
]

FORMAT, VERSION = "flowtrain checkpoint", 1
JUDGED = 2
"""The version of a checkpoint with an entry ``trained``. A reader of version 1 would miss it and train ``model``."""
IN_PIECES = 3
"""The version of a checkpoint with sharded tensors in files beside it (`flowtrain.training.checkpoint.shard_files`)."""

_COMMENT, _MAGIC = struct.Struct("<H16s8s"), b"flowtrain crc32 "
"""The comment of a checkpoint: the length of the rest in bytes, the bytes that name its format, and the CRC-32 in
hexadecimal digits."""

_ZIP_END, _END = b"PK\5\6", 22
"""The first bytes of the last record of a zip archive, and the length of that record without the comment."""

_BLOCK = 1 << 20


@cache  # the metadata of a package is a file, which takes 1 ms to find and to parse
def own_version() -> str:
    """Return the version of flowtrain, ``"unknown"`` if it is not installed."""
    try:
        return version("flowtrain")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def target(folder: Place, pointer: str) -> str:
    """Return the name of the file that a pointer names, or an empty string if the folder has no such pointer.

    Raises:
        Unreachable: The folder is remote, and the file system does not answer.
    """
    try:
        return (folder / pointer).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def real_folder(path: str | os.PathLike[str]) -> str:
    """Return the folder that a file is in, or the folder itself: absolute, without symbolic links, or its address."""
    found = place(path)
    if isinstance(found, Remote):
        return str(found if found.is_dir() else found.parent)
    return os.path.realpath(found) if found.is_dir() else os.path.dirname(os.path.realpath(found))


def find_file(path: str | os.PathLike[str]) -> Place:
    """Return the path of the checkpoint file that a user's path means.

    Args:
        path: A checkpoint file; a folder, which means the file that its ``latest`` names; or the pointer ``latest`` or
            ``best`` of a folder.

    Raises:
        CheckpointError: The folder has no ``latest``, or the file does not exist.
    """
    found = place(path)
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
        if not name and found.is_file():
            raise CheckpointError(
                f"The file {found} names no checkpoint: it is empty or damaged. Pass the file of a checkpoint."
            )
        found = found.parent / (name or found.name)
    if not found.is_file():
        raise CheckpointError(
            f"There is no checkpoint {found}: no such file. Pass the folder of a Checkpointer, or a checkpoint's file."
        )
    return found


def read(path: str | os.PathLike[str], *, pieces: bool = False) -> dict[str, Any]:
    """Return the contents of a checkpoint, with all tensors on the CPU.

    If the latest checkpoint of a folder is asked for and is damaged, the one before it is returned, with a warning.

    Args:
        path: As for `find_file`.
        pieces: Whether the sharded tensors of models and optimizers become `flowtrain.state.shards.Pieces`, of which
            only parts are read; otherwise they are put together.

    Raises:
        CheckpointError: The file is missing, damaged, no checkpoint, or of a version that this flowtrain cannot read;
            with a folder, there is no earlier checkpoint either.
    """
    given = place(path)
    try:
        return _read_file(find_file(given), pieces)
    except Unreachable:  # the checkpoint may be there, and whole
        raise
    except CheckpointError as damaged:
        whole = given.is_dir()
        folder = given if whole else given.parent
        if (not whole and given.name != "latest") or not (folder / "latest").is_file():
            raise
        for name in _before(folder, target(folder, "latest")):
            try:
                contents = _read_file(folder / name, pieces)
            except CheckpointError as failure:
                damaged.add_note(f"and the one before: {failure}")
                continue
            if contents.get("finite", True):
                said = f"{damaged} Instead, {folder / name} is used, the one before it."
                warnings.warn(said, UserWarning, stacklevel=2)
                return contents
        raise


def number_of(name: str) -> int | None:
    """Return the number in the name of a file that a `Checkpointer` writes; ``None`` for any other file."""
    found = re.fullmatch(r"(?:epoch-\d{4,}|step-\d{8,})\.ckpt", name)
    return int(re.sub(r"\D", "", name)) if found else None


def _before(folder: Place, name: str) -> list[str]:
    """Return the checkpoints of a folder that a `Checkpointer` wrote before one of them, from the newest to the oldest.

    Only one file within an epoch is kept, and the end of the epoch removes it. So such a file is newer than those of
    epochs, that of an interrupt is newer than all others, and that of the beginning is older.

    Args:
        folder: The folder.
        name: The name of the checkpoint. If its name is of another form, all are returned.
    """

    def age(name: str) -> tuple[int, int]:
        """Return a pair that is the greater, the newer the checkpoint is."""
        return ("start", "epoch", "step", "inter").index(name[:5].rstrip("-")), number_of(name) or 0

    def known(name: str) -> bool:
        """Tell whether a `Checkpointer` gives this name to a file."""
        return number_of(name) is not None or name in ("start.ckpt", "interrupted.ckpt")

    found = [each.name for each in folder.glob("*.ckpt") if known(each.name)]
    return sorted((each for each in found if not known(name) or age(each) < age(name)), key=age, reverse=True)


def _read_file(file: Place, pieces: bool) -> dict[str, Any]:
    try:
        with here(file) as local, warnings.catch_warnings():
            _check_sum(local)
            # torch 2.14 says that it checks sparse tensors, which can be slow
            warnings.filterwarnings("ignore", "Validating sparse tensor invariants", UserWarning)
            # A file of others must not run code.
            contents: Any = torch.load(local, map_location="cpu", weights_only=True)
    except Unreachable:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, IndexError, ...
        raise CheckpointError(
            f"{file} cannot be read as a checkpoint: {_first_line(error)}. It is truncated, damaged, or something "
            f"else. Pass another checkpoint: the files of a Checkpointer are complete when they have their name, and "
            f"its folder stands for the latest one."
        ) from error
    if not isinstance(contents, Mapping) or contents.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} is no checkpoint of flowtrain: it holds {type(contents).__name__}. For weights alone call "
            f"learner.model.load_state_dict(torch.load(path))."
        )
    version = contents.get("version")
    if type(version) is not int or version not in (VERSION, JUDGED, IN_PIECES):
        raise CheckpointError(
            f"{file} has version {version} of the format, written by flowtrain {contents.get('flowtrain')}; "
            f"this one reads {VERSION} to {IN_PIECES}. Use the flowtrain that wrote it, or a later one."
        )
    if isinstance(file, Remote):
        if "shards" in contents:
            raise CheckpointError(
                f"The checkpoint {file} is of a sharded model, whose tensors are in the folder {contents['shards']} "
                f"beside it. Copy both into a folder of this machine, and pass the file there."
            )
        return dict(contents)
    return with_shards(dict(contents), file, pieces=pieces, check=_check_sum)


def load_weights(path: str | os.PathLike[str], which: Literal["best", "latest"] = "best") -> dict[str, Any]:
    """Return the weights of a checkpoint on the CPU, for ``model.load_state_dict`` in a program without a learner.

    They are the weights that were evaluated: those of `flowtrain.callbacks.EMA` and its like where these are used.

    Args:
        path: The folder of a `flowtrain.callbacks.Checkpointer`, or the file of a checkpoint.
        which: Which checkpoint of a folder.

    Returns:
        The ``state_dict`` of the model; with several models a mapping from the name of each model to its.

    Raises:
        CheckpointError: The folder has no such checkpoint, or the file cannot be read.
    """
    if not is_a(path, (str, os.PathLike)):
        raise UsageError(f"load_weights({path!r}) takes the folder of a Checkpointer, or the path of a checkpoint.")
    if which not in POINTERS:
        raise UsageError(f"load_weights(which={which!r}): which is 'best' or 'latest'.")
    found = place(path)
    if found.is_dir():
        if which == "best" and not target(found, "best") and target(found, "latest"):
            raise CheckpointError(
                f"No checkpoint of {found} counts as the best: its Checkpointer has no monitor, or has ranked no epoch "
                f"yet. Write load_weights(path, 'latest')."
            )
        found = found / which if target(found, which) else found
    models = put_together(read(found, pieces=True)["model"])
    return dict(models[""] if list(models) == [""] else models)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]


def comment(checksum: int) -> bytes:
    """Return the end of a checkpoint file, which replaces the empty comment of the archive that is before it."""
    return _COMMENT.pack(_COMMENT.size - 2, _MAGIC, b"%08x" % checksum)


def _check_sum(path: Path) -> None:
    """Check that no byte of a checkpoint has changed since it was written. A file that is no zip archive passes.

    Raises:
        ValueError: One has changed.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            return
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END - _COMMENT.size + 2))
        end = file.read()
        length, magic, wanted = _COMMENT.unpack(end[-_COMMENT.size :])
        if end.startswith(_ZIP_END) and (length, magic) == (_COMMENT.size - 2, _MAGIC):
            file.seek(0)
            left, found = size - _COMMENT.size, 0
            while left:
                block = file.read(min(_BLOCK, left))
                left -= len(block)
                found = zlib.crc32(block, found)
            if b"%08x" % zlib.crc32(b"\0\0", found) != wanted:  # these bytes stood where the comment stands now
                raise ValueError(f"it has {size} bytes with another checksum than they were written with")
        elif end[-_END:].startswith(_ZIP_END) and end.endswith(b"\0\0"):  # earlier versions wrote no comment
            damaged = zipfile.ZipFile(file).testzip()
            if damaged is not None:
                raise ValueError(f"its part {damaged} has another checksum than it was written with")
        else:
            raise ValueError("its end is not the end of a checkpoint")
