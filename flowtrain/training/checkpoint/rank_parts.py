"""The parts of a checkpoint that differ between the ranks of a training: random numbers, position and measurements.

Models and optimizers are the same on all ranks, so the checkpoint holds them once, as the main rank has them. Its entry
``"ranks"`` holds the part of every other rank. A tensor of a part that is equal to that of the main rank, such as an
averaged weight, is not sent and not saved again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from flowtrain.data.tensor_bytes import tensor_bytes
from flowtrain.errors import CheckpointError
from flowtrain.state.encoding import SAME, SHARDED

__all__ = ["check_size", "digests", "part_of", "parts_in", "reduced"]

_LOCAL = ("random", "loaders", "position", "numbers", "passes", "cbstate", "arrivals", "callbacks", "group", "run")
"""The entries of a checkpoint that each rank has for itself."""

_LARGE = 1024
"""The number of elements from which a tensor is compared with that of the main rank."""


def digests(contents: Mapping[str, Any]) -> dict[tuple[Any, ...], str]:
    """Return a digest of each large tensor in the part of this rank, by its place."""
    found: dict[tuple[Any, ...], str] = {}

    def note(tensor: torch.Tensor, place: tuple[Any, ...]) -> Any:
        """Add the digest of one tensor."""
        found[place] = _digest(tensor)
        return tensor

    _changed(_local(contents), note)
    return found


def reduced(contents: Mapping[str, Any], main: Mapping[tuple[Any, ...], str]) -> dict[str, Any]:
    """Return the part of this rank without the large tensors that the main rank has at the same place.

    Args:
        contents: The contents of a checkpoint, as this rank would write it.
        main: The `digests` of the main rank.
    """
    part: dict[str, Any] = _changed(
        _local(contents), lambda tensor, place: {SAME: True} if main.get(place) == _digest(tensor) else tensor
    )
    return part


def parts_in(contents: Mapping[str, Any]) -> int:
    """Return the number of ranks of the training that has written a checkpoint."""
    return 1 + len(contents.get("ranks", ()))


def part_of(contents: Mapping[str, Any], rank: int, size: int) -> dict[str, Any]:
    """Return the contents of a checkpoint as one rank has written them.

    A checkpoint of another number of ranks gives every rank the part of the main rank, but the positions of its own
    logs, and none if it had no logs then.

    Args:
        contents: The contents of the file.
        rank: The rank, from 0.
        size: The number of ranks that read the checkpoint.
    """
    if rank == 0:
        return dict(contents)
    own = contents["ranks"][rank - 1] if rank < parts_in(contents) else {"run": {"positions": {}}}
    part = own if parts_in(contents) == size else {"run": own["run"]} if "run" in own else {}
    # The main rank has noted the folder of the checkpoint beside its own positions.
    run = {**contents["run"], **part.get("run", {})}
    return {**contents, **{name: _filled(part[name], contents[name]) for name in part}, "run": run}


def check_size(contents: Mapping[str, Any], size: int, stacklevel: int | None) -> bool:
    """Tell whether a checkpoint was written by as many ranks as resume from it.

    Args:
        contents: The contents of the checkpoint.
        size: The number of ranks that resume.
        stacklevel: The frame that a warning of another number points to; ``None`` for no warning.

    Raises:
        CheckpointError: It was not, and was taken within an epoch: the position of another number of ranks cannot be
            reached.
    """
    saved, position = parts_in(contents), contents["position"]
    if saved != size and (position["phase"] or position["stream"]):
        raise CheckpointError(
            f"The checkpoint was taken within an epoch by {_ranks(saved)}, and this training has {_ranks(size)}: which "
            f"samples were used is only known for {_ranks(saved)}. Resume with as many, or from a checkpoint of the "
            f"end of an epoch; or take the weights alone, learner.load(path), and train anew. Nothing has been changed."
        )
    if saved != size and stacklevel is not None:
        warnings.warn(
            f"The checkpoint was written by {_ranks(saved)}, and this training has {_ranks(size)}. Models, optimizers "
            f"and callbacks continue exactly. The samples of each rank and the random numbers of further ranks are "
            f"others than there; their seeds follow from the checkpoint.",
            UserWarning,
            stacklevel=stacklevel,
        )
    return saved == size


def _ranks(size: int) -> str:
    return f"{size} ranks" if size > 1 else "one process"


def _local(contents: Mapping[str, Any]) -> dict[str, Any]:
    return {name: contents[name] for name in _LOCAL if name in contents}  # early checkpoints lack some


def _digest(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(tensor_bytes(tensor)).hexdigest()}"


def _changed(item: Any, change: Callable[[torch.Tensor, tuple[Any, ...]], Any], place: tuple[Any, ...] = ()) -> Any:
    """Return the contents of a checkpoint with every large tensor changed; they consist of plain containers."""
    if isinstance(item, torch.Tensor):
        plain = item.layout is torch.strided and not item.is_quantized
        return change(item, place) if plain and item.numel() >= _LARGE else item
    if isinstance(item, dict):
        return {key: _changed(each, change, (*place, key)) for key, each in item.items()}
    if isinstance(item, (list, tuple)):
        return type(item)([_changed(each, change, (*place, number)) for number, each in enumerate(item)])
    return item


def _filled(part: Any, main: Any) -> Any:
    """Return the part of a rank with the tensors of the main rank where it left them out."""
    if isinstance(part, dict):
        if SAME in part or SHARDED in part:
            return main
        return {key: _filled(each, main.get(key) if isinstance(main, dict) else None) for key, each in part.items()}
    if isinstance(part, (list, tuple)):
        known = main if isinstance(main, (list, tuple)) and len(main) == len(part) else [None] * len(part)
        return type(part)([_filled(each, known[number]) for number, each in enumerate(part)])
    return part
