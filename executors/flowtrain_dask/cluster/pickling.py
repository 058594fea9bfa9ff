"""Pickling of callbacks for other processes.

Classes and functions of ``__main__`` are sent by value, because another process cannot import them. Objects that the
other process has already are sent as a position in a list of such objects.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from typing import Any

import torch

from flowtrain_dask.cluster.reducing import ValuePickler

__all__ = ["dumps", "loads"]


def dumps(value: object, fixed: Sequence[object] = ()) -> bytes:
    """Return a value as bytes. They contain the code of ``__main__``, and the names of code in modules.

    Args:
        value: The value to pickle.
        fixed: Objects that are not pickled: the bytes hold their position in this list.
    """
    file = io.BytesIO()
    _Pickler(file, fixed).dump(value)
    return file.getvalue()


def loads(blob: bytes, fixed: Sequence[object] = ()) -> Any:
    """Return the value from the bytes of `dumps`.

    Args:
        blob: The bytes.
        fixed: The objects of this process in the order of the list that `dumps` was given.
    """
    return _Unpickler(io.BytesIO(blob), fixed).load()


class _Pickler(ValuePickler):
    # Tensors of a callback that share memory must share it again after the way back, because they are written in place.
    waste = math.inf

    def __init__(self, file: io.BytesIO, fixed: Sequence[object]) -> None:
        super().__init__(file)
        self._places = {id(one): place for place, one in enumerate(fixed)}
        if fixed:  # pickle calls this for every object, which is slow
            self.persistent_id = self._place_of

    def _place_of(self, obj: object) -> int | None:
        return self._places.get(id(obj))

    def reducer_override(self, obj: object) -> Any:
        """Reduce tensors as for events, except those on a device: torch pickles these, and they come back there."""
        if isinstance(obj, torch.Tensor) and not obj.is_cpu:
            return NotImplemented
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, fixed: Sequence[object]) -> None:
        super().__init__(file)
        self._fixed = fixed

    def persistent_load(self, pid: int) -> object:
        """Return the object at a position of the list."""
        return self._fixed[pid]
