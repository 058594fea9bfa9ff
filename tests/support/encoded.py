"""Values for the tests of how values are encoded for workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flowtrain_dask.cluster.codec import Encoded


def closure(factor: int) -> Callable[[Any], Any]:
    """Return a function that a worker cannot import by name."""

    def multiply(value: Any) -> Any:
        """Return the product."""
        return value * factor

    return multiply


def memory_of(encoded: Encoded) -> list[int]:
    """Return the addresses of the buffers, which are sent beside the pickle."""
    parts = [part for part in encoded.pieces if isinstance(part, memoryview)]
    return [np.frombuffer(part, np.uint8).ctypes.data for part in parts[1:]]
