"""How many samples a batch has, found from its inputs and targets; `Phase.batch_size` and `Metrics` ask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from flowtrain.callback.nested import items, step

__all__ = ["lengths", "measure"]


def measure(inputs: Any, targets: Any) -> tuple[int, bool]:
    """Return how many samples a batch has, and whether that is certain.

    The number is the length that something in the inputs and something in the targets agree on: the first dimension of
    arrays, or the number of items in a list. Where only one of the two has arrays, its own must agree. A batch without
    any array or list, such as one text or a number, is one sample.

    >>> measure({"scale": torch.zeros(3), "x": torch.zeros(8, 2)}, torch.zeros(8))
    (8, True)
    >>> measure(torch.zeros(50, 8, 2), torch.zeros(8))  # time comes first
    (8, False)
    """
    ours, theirs = _sizes(inputs), _sizes(targets)
    if ours and theirs:
        common = [size for size in theirs if size in ours]
        return (common or theirs)[0], bool(common)
    found = ours or theirs
    if not found:
        return 1, _is_single(inputs) and _is_single(targets)
    return found[0], len(_sizes(inputs, lists=False) or _sizes(targets, lists=False)) <= 1


def _sizes(value: Any, lists: bool = True, above: tuple[int, ...] = ()) -> list[int]:
    """Return the numbers that may be the size of a batch, the likeliest first: those that all parts have in common.

    Args:
        value: Inputs or targets.
        lists: Whether the length of a list counts where it holds arrays. Either may be the batch: a list of samples, or
            a list of tensors that each have all samples.
        above: The ids of the containers around it; one that holds itself says nothing there.
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, (tuple, torch.Size)):
        return [int(shape[0])] if shape else []
    if isinstance(value, PackedSequence):
        return [int(value.batch_sizes[0])]  # every sequence has a first step
    inner = items(value)
    if not inner or id(value) in above:
        return [len(value)] if inner is None and _is_list(value) else []  # such as a range
    parts = [_sizes(item, lists, (*above, id(value))) for _, item in inner]
    parts = [part for part in parts if part]
    common = [size for size in parts[0] if all(size in part for part in parts)] if parts else []
    found = common or list(dict.fromkeys(size for part in parts for size in part))
    if not _is_list(value) or hasattr(value, "_fields") or (found and not lists):
        return found
    return [*common, len(value)] if common else [len(value), *found]  # parts that differ are samples, not inputs


def _is_list(value: Any) -> bool:
    """Tell whether the items of a container have numbers, and no names; of others the length says nothing."""
    return isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes))


def _is_single(value: Any) -> bool:
    """Tell whether a value without a length may be one sample, and not a batch of an unknown kind."""
    inner = items(value)
    if inner is not None:
        return all(_is_single(item) for _, item in inner)
    return value is None or isinstance(value, (str, bytes, int, float, complex)) or getattr(value, "shape", None) == ()


def lengths(value: Any, path: str, above: tuple[int, ...] = ()) -> Iterator[tuple[str, int]]:
    """Yield each array or list in a piece of data, by its path, with its length.

    Args:
        value: Inputs or targets.
        path: Where they are.
        above: The ids of the containers around the value, into which it leads no more.

    >>> list(lengths({"x": torch.zeros(8, 2)}, "batch.inputs"))
    [("batch.inputs['x']", 8)]
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, (tuple, torch.Size)):
        if shape:
            yield path, int(shape[0])
        return
    if id(value) in above:
        return
    if _is_list(value):
        yield path, len(value)
    for where, item in items(value) or ():
        yield from lengths(item, path + step(where), (*above, id(value)))
