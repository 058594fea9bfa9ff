"""Values for the tests of how values are sent to workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flowtrain_dask.cluster.codec import Encoded


def closure(factor: int) -> Callable[[Any], Any]:
    """Return a function that no import finds."""

    def multiply(value: Any) -> Any:
        """Multiply."""
        return value * factor

    return multiply


def memory_of(encoded: Encoded) -> list[int]:
    """Return the addresses of the buffers: the memory that is sent, without the pickle."""
    parts = [part for part in encoded.pieces if isinstance(part, memoryview)]
    return [np.frombuffer(part, np.uint8).ctypes.data for part in parts[1:]]
