"""The number of samples in a batch, found from the shapes of its inputs and targets.

`Phase.batch_size` returns it, and `Metrics` weights the means of an epoch with it. A batch may be one tensor, a
container of tensors, or a list of samples, so there may be several candidates: `measure` takes the length that inputs
and targets have in common, and tells whether it is certain of it.
"""

from __future__ import annotations

from collections import UserString
from collections.abc import Iterator, Sequence, Set
from enum import Enum
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

from flowtrain.data.nested import items, place_text
from flowtrain.errors.arguments import is_whole

__all__ = ["lengths", "measure", "samples_given", "shape_of"]


_SINGLE = (str, bytes, UserString, Enum)
"""Types of sequences that are one value each."""


def measure(inputs: Any, targets: Any) -> tuple[int, bool]:
    """Return how many samples a batch has, and whether that is certain.

    A candidate is the first dimension of an array, or the number of items in a list. The result is the first candidate
    that inputs and targets have in common. Where only one of the two has candidates, the result is certain if its
    arrays agree. A batch without any array or list, such as a text or a number, is one sample.

    Args:
        inputs: A tensor or array of shape ``(samples, ...)``, or a container of these.
        targets: As `inputs`.

    >>> measure({"scale": torch.zeros(3), "x": torch.zeros(8, 2)}, torch.zeros(8))
    (8, True)
    >>> measure(torch.zeros(50, 8, 2), torch.zeros(8))  # time comes first
    (8, False)
    """
    of_inputs, of_targets = _sizes(inputs), _sizes(targets)
    if of_inputs and of_targets:
        common = [size for size in of_targets if size in of_inputs]
        return (common or of_targets)[0], bool(common)
    sizes = of_inputs or of_targets
    if not sizes:
        return 1, _is_single(inputs) and _is_single(targets)
    return sizes[0], len(_sizes(inputs, lists=False) or _sizes(targets, lists=False)) <= 1


def samples_given(loader: Any, batches: int) -> int | None:
    """Return how many samples a loader has given in some batches; ``None`` if it does not say it.

    Args:
        loader: A loader, which says it if it has a ``batch_size``, as a ``torch.utils.data.DataLoader`` has.
        batches: The number of batches from the beginning of a pass, of which the last one may be smaller.

    >>> loader = torch.utils.data.DataLoader(range(10), batch_size=4)
    >>> samples_given(loader, 2), samples_given(loader, 3), samples_given(loader, 4), samples_given([torch.zeros(4)], 1)
    (8, 10, 14, None)
    """
    size: Any = getattr(loader, "batch_size", None)
    if not is_whole(size) or not batches:
        return None
    try:
        length, most = len(loader), len(loader.sampler)
    except (AttributeError, TypeError):  # a stream
        return int(batches * size)
    passes, rest = divmod(batches, length)
    return int(passes * min(length * size, most) + min(rest * size, most))


def _sizes(value: Any, lists: bool = True, above: tuple[int, ...] = ()) -> list[int]:
    """Return the numbers that may be the size of a batch, the likeliest first.

    A number that all parts of a container have in common is likelier than one that only some of them have.

    Args:
        value: Inputs or targets.
        lists: Whether the length of a list is a candidate where the list holds arrays: it may be a list of samples, or
            a list of tensors that each hold all samples.
        above: The ids of the containers around the value, so that a container that holds itself ends the search.
    """
    shape = shape_of(value)
    if shape is not None:
        return [int(shape[0])] if shape else []
    if isinstance(value, PackedSequence):
        return [int(value.batch_sizes[0])]  # every sequence has a first step
    inner = items(value)
    if not inner or id(value) in above:
        return [len(value)] if inner is None and _is_list(value) else []  # a range has a length and no items here
    parts = [_sizes(item, lists, (*above, id(value))) for _, item in inner]
    parts = [part for part in parts if part]
    common = [size for size in parts[0] if all(size in part for part in parts)] if parts else []
    sizes = common or list(dict.fromkeys(size for part in parts for size in part))
    # The length of a mapping or a named tuple is its number of fields, and never a number of samples.
    if not _is_list(value) or hasattr(value, "_fields") or (sizes and not lists):
        return sizes
    # Parts of different lengths are samples, so the length of the list goes first; equal ones each hold all samples.
    return [*common, len(value)] if common else [len(value), *sizes]


def shape_of(value: Any) -> tuple[Any, ...] | None:
    """Return the shape of an array or tensor; of a nested tensor without a shape its length alone; else ``None``.

    >>> shape_of(torch.zeros(2, 3)), shape_of([1, 2])
    (torch.Size([2, 3]), None)
    """
    if isinstance(value, torch.Tensor) and value.is_nested and value.layout is torch.strided:
        return (value.size(0),)  # its tensors differ in size, and torch raises an error for its shape
    shape = getattr(value, "shape", None)
    return shape if isinstance(shape, tuple) else None


def _is_list(value: Any) -> bool:
    """Tell whether a container has items without names, so that its length may be a number of samples."""
    return isinstance(value, (Sequence, Set)) and not isinstance(value, _SINGLE)


def _is_single(value: Any, above: tuple[int, ...] = ()) -> bool:
    """Tell whether a value without a length can be one sample; an unknown object may be a whole batch."""
    inner = items(value)
    if inner is not None:
        return id(value) in above or all(_is_single(item, (*above, id(value))) for _, item in inner)
    return value is None or isinstance(value, (*_SINGLE, int, float, complex)) or shape_of(value) == ()


def lengths(value: Any, path: str, above: tuple[int, ...] = ()) -> Iterator[tuple[str, int]]:
    """Yield the path and the length of each array and list in a piece of data; that of an array is its first dimension.

    Args:
        value: Inputs or targets.
        path: The path of `value` itself.
        above: The ids of the containers around the value, so that a container that holds itself ends the search.

    >>> list(lengths({"x": torch.zeros(8, 2)}, "batch.inputs"))
    [("batch.inputs['x']", 8)]
    """
    shape = shape_of(value)
    if shape is not None:
        if shape:
            yield path, int(shape[0])
        return
    if id(value) in above:
        return
    if _is_list(value):
        yield path, len(value)
    for where, item in items(value) or ():
        yield from lengths(item, path + place_text(where), (*above, id(value)))
