"""Batches on several ranks: fingerprints that tell equal ones, and the length of an epoch.

The ranks of one training make the same number of updates, so an epoch ends on all of them after the same batch. Where
every loader knows its length, the smallest length decides before the epoch (`agreed_length`). Otherwise the ranks tell
each other before each batch whether they have one, and the epoch ends with the first loader that ends (`check_ends`).
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch

from flowtrain.data.loaders import is_array
from flowtrain.data.nested import PLAIN, leaves
from flowtrain.data.tensor_bytes import tensor_bytes
from flowtrain.errors import RankError

__all__ = ["EpochLength", "agreed_length", "check_ends", "fingerprint"]

_SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def fingerprint(batch: Any) -> str:
    """Return a text that two batches have in common if they have the same content, in the same containers.

    A batch without data gets an empty text, because two of them say nothing about their loaders: a number or ``None``,
    which a loader such as ``range(100)`` gives for a step that makes its own data, or tensors of equal elements.

    Args:
        batch: A batch, nested in any way, with tensors on any device.

    >>> one, other = {"x": torch.tensor([1.0, 2.0])}, {"x": torch.tensor([1.0, 2.5])}
    >>> fingerprint(one) == fingerprint({"x": one["x"].clone()}), fingerprint(one) == fingerprint(other), fingerprint(7)
    (True, False, '')
    """
    hashed, has_data = hashlib.blake2b(digest_size=16), False
    for path, leaf in leaves(batch):
        content, tells = _content(leaf)
        has_data = has_data or tells
        hashed.update(f"{path}:{len(content)}:".encode())
        hashed.update(content)
    return hashed.hexdigest() if has_data else ""


def _content(leaf: Any) -> tuple[bytes, bool]:
    """Return the content of a leaf, and whether it is data, by which one batch can be told from another."""
    if isinstance(leaf, torch.Tensor):
        return _of_tensor(leaf.detach())
    if is_array(leaf):
        array = leaf.__array__()
        if array.dtype.kind != "O":
            differ = array.size > 0 and bool((array != array.flat[0]).any())
            return f"{array.dtype}{array.shape}".encode() + array.tobytes(), differ
    elif type(leaf) in PLAIN:
        return repr(leaf).encode(), isinstance(leaf, (str, bytes)) and len(leaf) > 0
    try:
        file = io.BytesIO()
        _Pickler(file).dump(leaf)
        return file.getvalue(), True
    except Exception:  # an object of the user may refuse it with any error, and then it cannot be compared
        return type(leaf).__qualname__.encode(), False


def _of_tensor(tensor: torch.Tensor) -> tuple[bytes, bool]:
    """Return the content of a tensor, and whether its elements differ."""
    kind = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    if tensor.layout in _SPARSE:
        sparse = tensor.to_sparse_coo().coalesce()
        values, differ = _of_tensor(sparse.values())
        return kind + _of_tensor(sparse.indices())[0] + values, differ or 0 < sparse.values().numel() < tensor.numel()
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized:
        return kind, False
    flat = tensor.reshape(-1)
    return kind + tensor_bytes(tensor), flat.numel() > 0 and bool((flat != flat[0]).any())


class _Pickler(pickle.Pickler):
    """Writes the content of tensors: torch writes the names of their storages too, which are others in each process."""

    def reducer_override(self, obj: Any) -> Any:
        """Return the content of a tensor, and leave all other objects to pickle."""
        return (bytes, (_of_tensor(obj.detach())[0],)) if isinstance(obj, torch.Tensor) else NotImplemented


class EpochLength(NamedTuple):
    """The number of batches of a training epoch, as all ranks know it.

    Attributes:
        most: The smallest known length of the ranks' loaders: no epoch has more batches. ``None`` if none is known.
        certain: Whether every rank has that many batches.
        note: A line for the user that says that some ranks have batches left over; empty if none has.
    """

    most: int | None
    certain: bool
    note: str = ""


def agreed_length(lengths: Sequence[int | None], what: str, uneven: Literal["stop", "error"] = "stop") -> EpochLength:
    """Return the number of batches of a training epoch.

    Args:
        lengths: The length of each rank's loader, in the order of the ranks; ``None`` where it is not known.
        what: The subject of messages, such as ``"The data for TrainingPhase()"``.
        uneven: ``"stop"`` ends the epoch with the shortest loader, ``"error"`` refuses different lengths.

    Raises:
        RankError: The known lengths differ, and `uneven` is ``"error"``.

    >>> agreed_length([3, 3], "The data"), agreed_length([4, None, 3], "The data")[:2]
    (EpochLength(most=3, certain=True, note=''), (3, False))
    """
    known = [each for each in lengths if each is not None]
    certain = len(known) == len(lengths)
    if not known:
        return EpochLength(None, certain=False)
    low, high = min(known), max(known)
    if low == high:
        return EpochLength(low, certain)
    text = f"{what} has {low} batches on rank {lengths.index(low)}, and {high} on rank {lengths.index(high)}"
    if uneven == "error":
        raise RankError(
            f'{text}, which TorchCore(uneven="error") refuses. Give each rank equally many, as a DistributedSampler '
            f'does; or write uneven="stop": then every epoch ends after {low} batches.'
        )
    return EpochLength(low, certain, f'{text}: every epoch ends after {low} on all ranks (uneven="stop").')


def check_ends(ended: Sequence[bool], batches: int, what: str) -> None:
    """Check, after an epoch of loaders without a length, that all of them have ended; for ``uneven="error"``.

    Args:
        ended: For each rank, in their order, whether its loader has no further batch.
        batches: The number of batches of the epoch.
        what: As for `agreed_length`.

    Raises:
        RankError: A loader has ended, and another has not.
    """
    if True in ended and False in ended:
        raise RankError(
            f"{what} has {batches} batches on rank {ended.index(True)}, and more on rank {ended.index(False)}, which "
            f'TorchCore(uneven="error") refuses. Give each rank equally many; or write uneven="stop": then every epoch '
            f"ends with the shortest loader."
        )
