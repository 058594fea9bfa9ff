"""The distribution of values: a `Histogram` is counted in bins of equal width.

The values are counted on their own device, and only the counts come to the host. Single precision is used as long as it
is exact enough, because double precision is slow on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from flowtrain.errors import LoggingError
from flowtrain.errors.arguments import whole_number
from flowtrain.errors.describing import describe
from flowtrain.logging.backend import Histogram

__all__ = ["Distribution", "distribution"]

_EXACT = 1 << 24
"""The largest number of values that single precision counts exactly."""

_WIDE = 1e38
"""The largest distance of two values that single precision holds."""


@dataclass(frozen=True)
class Distribution:
    """The distribution of the finite values of a histogram.

    Attributes:
        low: The smallest value; 0 without a finite value.
        high: The largest value; 0 without a finite value.
        counts: The number of values in each bin from `low` to `high`; the last bin includes `high`.
        total: The sum of the values.
        squares: The sum of the squares of the values.
        left_out: The number of values that were NaN or infinite.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    total: float
    squares: float
    left_out: int

    @property
    def edges(self) -> list[float]:
        """The ``len(counts) + 1`` limits of the bins."""
        low, high = self.limits
        width = (high - low) / len(self.counts)
        return [*(low + place * width for place in range(len(self.counts))), high]

    @property
    def limits(self) -> tuple[float, float]:
        """The beginning of the first bin and the end of the last: half a unit around the value if all are equal."""
        return (self.low, self.high) if self.low < self.high else (self.low - 0.5, self.high + 0.5)


def distribution(histogram: Histogram) -> Distribution:
    """Count the values of a histogram.

    Raises:
        LoggingError: The values are no real numbers, or there is no bin.

    >>> distribution(Histogram([0.0, 1.0, 1.0, float("nan")], bins=2)).counts
    (1, 2)
    """
    bins = whole_number("Histogram(): bins", histogram.bins, error=LoggingError)
    values = _values(histogram.values)
    size = values.numel()
    low, high = (float(limit) for limit in values.aminmax()) if size else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):  # `aminmax` gives NaN for both limits if any value is NaN
        values = values[values.isfinite()]
        low, high = (float(limit) for limit in values.aminmax()) if values.numel() else (0.0, 0.0)
    kept = values.numel()
    if kept > _EXACT or high - low > _WIDE:
        values = values.double()
    made = Distribution(low, high, (0,) * bins, 0.0, 0.0, size - kept)
    if not kept:
        return made
    if not math.isfinite(high - low):
        raise LoggingError(
            f"Histogram(...) got values from {low} to {high}: too far apart to be counted in bins. Log the histogram "
            f"of their logarithms: values.abs().log10()."
        )
    counts = torch.histc(values, bins, *made.limits)
    squares = float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    total = float(values.sum(dtype=torch.float64))
    return Distribution(low, high, tuple(int(count) for count in counts.tolist()), total, squares, size - kept)


def _values(values: Any) -> torch.Tensor:
    try:
        found = torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise LoggingError(
            f"Histogram(...) takes a tensor or array of numbers, and got a {describe(values)}: {error}. Join several "
            f"tensors: torch.cat([each.flatten() for each in tensors])."
        ) from error
    if found.is_complex() or found.is_quantized:
        raise LoggingError(f"Histogram(...) got {found.dtype}, and counts real numbers. Log the histogram of .abs().")
    if found.is_meta:
        raise LoggingError(
            f"Histogram(...) got a {describe(found)}, on the device 'meta', which has no values. Give it some first, "
            f"as module.to_empty(device='cpu') does."
        )
    if found.is_nested:
        found = torch.cat([each.flatten() for each in found.unbind()])
    if found.layout is not torch.strided:
        found = found.to_dense()
    # Whole numbers become double precision, because single precision would round large ones.
    exact = found.dtype is torch.float64 or not (found.is_floating_point() or found.dtype is torch.bool)
    return found.flatten().to(torch.float64 if exact else torch.float32)
