"""How messages describe the data of users, and the name that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

__all__ = ["describe", "nearest"]


def describe(value: Any, depth: int = 3) -> str:
    """Describe a piece of data for a message: its type, with shape and dtype, or with its length and first parts.

    Args:
        value: The piece of data.
        depth: How many containers within one another are described with their parts; the data may hold itself.

    >>> describe(torch.zeros(2, 3))
    'Tensor of shape (2, 3), float32'
    """
    if isinstance(value, torch.Tensor) and value.is_nested:  # torch raises an error for the shape of some of these
        return f"nested {type(value).__name__} of {value.size(0)} tensors, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, torch.Tensor) or all(hasattr(value, name) for name in ("__array__", "shape", "dtype")):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {', '.join(repr(key) for key in list(value)[:6])}"
    if isinstance(value, (tuple, list)):
        parts = [describe(part, depth - 1) for part in value[:3] if depth] + ["..."] * (len(value) > 3)
        return f"{type(value).__name__} of {len(value)}" + (f": {', '.join(parts)}" if parts else "")
    return f"{type(value).__name__} {value!r:.60}"


def nearest(name: object, known: Iterable[object]) -> str:
    """Return ``" Did you mean 'x'?"`` with the known name closest to `name`, or an empty text if none is close.

    >>> nearest("outptus", ["inputs", "outputs"])
    " Did you mean 'outputs'?"
    """
    matches = difflib.get_close_matches(str(name), map(str, known), n=1, cutoff=0.5)  # a key may be a number
    return f" Did you mean {matches[0]!r}?" if matches else ""
