"""The files of a checkpoint of a sharded model: each rank writes the pieces that it has, in a folder beside the file.

The file of the checkpoint, ``epoch-0002.ckpt``, has a mapping with the key `SHARDED` where there was a sharded tensor,
and the name of the folder, ``epoch-0002.4f21b2d0.shards``, in which the file ``rank-1.pt`` has the pieces of rank 1.
The name of the folder is drawn anew for each checkpoint, so a checkpoint that replaces one of the same name writes
beside its files, and a file with its final name is complete at any moment: the file is written when all ranks have
written their pieces.

Pieces are read by any number of ranks. `torch.distributed.checkpoint` would write such a folder too. It is not used,
because it reads its metadata and all values beside tensors with pickle, which runs the code that a file contains, and
because its collectives need NumPy.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from flowtrain.errors import CheckpointError
from flowtrain.state.encoding import SHARDED
from flowtrain.state.shards import Pieces

__all__ = ["put_together", "remove_shards", "shard_folder", "shard_name", "with_shards"]

_BY_PART = ("model", "trained", "optimizer")
"""The entries of a checkpoint of which a rank needs only its own parts."""


def shard_folder(path: Path, token: str) -> Path:
    """Return the folder for the shards of a checkpoint; the token distinguishes checkpoints of one path."""
    return path.with_name(f"{path.stem}.{token}.shards")


def shard_name(rank: int) -> str:
    """Return the name of the file in that folder with the pieces of one rank."""
    return f"rank-{rank}.pt"


def remove_shards(path: Path, keep: str | None = None) -> None:
    """Remove the shards of a checkpoint, but for the folder of this name."""
    for folder in path.parent.glob(f"{glob.escape(path.stem)}.*.shards"):
        if folder.name != keep:
            shutil.rmtree(folder, ignore_errors=True)


def with_shards(
    contents: dict[str, Any], path: Path, *, pieces: bool, check: Callable[[Path], None] | None = None
) -> dict[str, Any]:
    """Return the contents of a checkpoint with its sharded tensors.

    Args:
        contents: The contents of the file.
        path: The file.
        pieces: As for `flowtrain.training.checkpoint.reading.read`.
        check: A function that checks the checksum of a file before it is used; ``None`` for files just written.

    Raises:
        CheckpointError: The files of the shards are missing or damaged.
    """
    if "shards" not in contents:
        return contents
    folder, files = path.parent / os.path.basename(contents["shards"]), list[Any]()  # never outside of that folder

    def found(item: Mapping[str, Any], lazily: bool) -> Any:
        """Return the tensor for a mapping that stands for one."""
        own = [piece for file in files for piece in file[item[SHARDED]]]
        tensor = Pieces(item["shape"], item["dtype"], own)
        return tensor if lazily else tensor.whole()

    try:
        for rank in range(contents["shard count"]):
            file = folder / shard_name(rank)
            if check is not None:
                check(file)
            # The memory of the tensors is the file, of which only the parts are read that are used.
            files.append(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        return {
            name: entry if name == "ranks" else _replaced(entry, found, pieces and name in _BY_PART)
            for name, entry in contents.items()
            if name not in ("shards", "shard count")
        }
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, OSError, ...
        raise CheckpointError(
            f"The checkpoint {path} is of a sharded model, whose tensors are in the folder {folder}, and that cannot "
            f"be used: {error}. Keep the folder beside the file, also when you move it, or pass another checkpoint."
        ) from error


def put_together(contents: Any) -> Any:
    """Return the contents of a checkpoint with whole tensors instead of `Pieces`."""
    return _replaced(contents, lambda item, lazily: item, lazily=False)


def _replaced(item: Any, found: Callable[[Mapping[str, Any], bool], Any], lazily: bool) -> Any:
    """Return plain containers with the tensors that mappings or `Pieces` in them stand for."""
    if isinstance(item, Pieces):
        return item.whole()
    if isinstance(item, dict):
        if SHARDED in item:
            return found(item, lazily)
        return {key: _replaced(each, found, lazily) for key, each in item.items()}
    if isinstance(item, (list, tuple)):
        return type(item)([_replaced(each, found, lazily) for each in item])
    return item
