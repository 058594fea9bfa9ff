"""Batches on several ranks: fingerprints that tell equal ones, the length of an epoch, and which batch is the last.

The ranks of one training make the same number of updates, so an epoch ends on all of them after the same batch. Where
every loader knows its length, the smallest length decides before the epoch (`agreed_length`). A loader without a length
is asked for the next batch while the present one is trained, so that its rank can say in time that it has no other
(`RankBatches.last`).
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch

from flowtrain.data.loaders import is_array
from flowtrain.data.nested import PLAIN, leaves
from flowtrain.errors import DataError, RankError

__all__ = ["EpochLength", "RankBatches", "agreed_length", "check_ends", "fingerprint"]

_END = object()
"""Stands for the end of a loader, since a batch may be ``None``."""


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
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().view(-1)
    if not flat.numel():
        return kind, False
    return kind + ctypes.string_at(flat.data_ptr(), flat.nbytes), bool((flat != flat[0]).any())


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


class RankBatches:
    """The batches of an epoch on one rank, which can be asked whether a batch is the last one.

    A batch is taken from the loader when it is trained, and earlier only if `last` asks for it, or the consumer is
    ahead itself (prefetch). A loader that is asked early draws its random numbers before the model draws those of the
    batch before. For an exact resume a checkpoint holds the generators as they were before that (`before`).

    Args:
        batches: The batches that are left in the epoch.
        total: How many there are; ``None`` if that is not known.
        states: Returns the states of the generators from which the loader draws in this process. Leave it out for a
            loader that draws nothing here, such as one with workers.

    Raises:
        DataError: While iterating: the loader gives fewer than `total` batches.
    """

    def __init__(self, batches: Iterable[Any], total: int | None, states: Callable[[], Any] | None = None) -> None:
        self._batches, self._total, self._states = batches, total, states
        self._source: Iterator[Any] | None = None
        self._held: list[Any] = []  # the batch that was taken early; popped, so that nothing here keeps its memory
        self._failure: list[BaseException] = []  # raised when the batch is wanted: the batches before it are trained
        self._taken = 0
        self._ended = self._failed = False
        self._before: Any = None  # the states before the newest batch was taken

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._failure:
            try:
                raise self._failure[0]
            finally:
                self._failure.clear()  # the frames of the exception hold this object
        if self._held:
            return self._held.pop()
        raw = self._take()
        if raw is _END:
            raise StopIteration
        return raw

    def _take(self) -> Any:
        """Return the next batch of the loader, or `_END`."""
        if self._ended or self._taken == self._total:
            return _END
        if self._source is None:
            self._source = iter(self._batches)
        if self._states is not None:
            self._before = self._states()
        self._failed = True
        raw = next(self._source, _END)
        self._failed = False
        if raw is not _END:
            self._taken += 1
            return raw
        self._ended = True
        if self._total is not None:
            raise DataError(
                f"The loader has {self._total} batches by its length, and has given {self._taken}. Several ranks need "
                f"the true length, because they end an epoch together: correct __len__, or leave it out."
            )
        return _END

    def last(self, number: int) -> bool:
        """Tell whether a batch is the last one on this rank; without a length, take the next batch from the loader.

        An exception of the loader is kept until that batch is wanted, and the batch before it is not the last one.

        Args:
            number: The number of the batch among those of this object, from 1. The batch has been given.
        """
        if self._total is not None:
            return number >= self._total
        if self._taken == number and not self._ended and not self._failed:
            try:
                raw = self._take()
                if raw is not _END:
                    self._held.append(raw)
                del raw
            except Exception as failure:
                self._failure.append(failure)
        return self._ended and self._taken <= number

    def before(self, number: int) -> Any:
        """Return the states of the generators from which `replay` takes the batch that has been taken early.

        Args:
            number: The number of batches of this object that are complete.

        Returns:
            The states; ``None`` if no batch was taken early, or there is no function `states`.
        """
        return self._before if self._taken > number or self._ended else None
