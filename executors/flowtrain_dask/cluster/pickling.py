"""Pickling for other processes: by value what they cannot import, and without what stays where it is."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from typing import Any

import torch

from flowtrain_dask.cluster.reducing import ValuePickler

__all__ = ["dumps", "loads"]


def dumps(value: object, kept: Sequence[object] = ()) -> bytes:
    """Return a value as bytes. Code of ``__main__`` is in it, code of modules is named.

    Args:
        value: What to pickle.
        kept: Objects that are named by their position instead.
    """
    file = io.BytesIO()
    _Pickler(file, kept).dump(value)
    return file.getvalue()


def loads(blob: bytes, kept: Sequence[object] = ()) -> Any:
    """Return the value of `dumps`.

    Args:
        blob: What `dumps` returned.
        kept: What stands here for the objects that were kept there.
    """
    return _Unpickler(io.BytesIO(blob), kept).load()


class _Pickler(ValuePickler):
    waste = math.inf  # what shares memory in a callback shares it when it is home again: it is written to in place

    def __init__(self, file: io.BytesIO, kept: Sequence[object]) -> None:
        super().__init__(file)
        self._places = {id(one): place for place, one in enumerate(kept)}
        if kept:  # else it would be called for every object for nothing
            self.persistent_id = self._place_of

    def _place_of(self, obj: object) -> int | None:
        return self._places.get(id(obj))

    def reducer_override(self, obj: object) -> Any:
        """As for events; but a tensor on a device comes back there, so it is left to torch."""
        if isinstance(obj, torch.Tensor) and not obj.is_cpu:
            return NotImplemented
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, kept: Sequence[object]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_load(self, pid: int) -> object:
        """Return the object that stands at a place."""
        return self._kept[pid]
