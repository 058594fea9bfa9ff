"""The weighted means of an epoch, exact to the last bit however its batches are divided.

The mean of a series is the quotient of two sums, each rounded once. So neither the order of the batches matters, nor
whether several ranks have had them, nor how often the sums so far were replaced by a few numbers (`exact_parts`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import mul
from typing import Any, Self, TypeAlias

import torch

from flowtrain.metrics.metric import check_weight
from flowtrain.state.device_values import Reading

__all__ = ["EpochMeans", "Sums", "exact_parts", "joined", "mean"]

Sums: TypeAlias = tuple[list[float], list[float]]
"""The values of batches times their weights, and the weights, or numbers with the same sums."""


class EpochMeans:
    """The weights of the batches of one epoch, by the series that have the values.

    Args:
        phase: The name of the phase of the epoch; empty if it is not known.

    Attributes:
        phase: The name of the phase.
        weights: The weights of the newest values of each series. A weight on a device is read when it is needed.
    """

    def __init__(self, phase: str = "") -> None:
        self.phase = phase
        self.weights: dict[str, list[Any]] = {"Loss": []}
        self._added: dict[str, Sums] = {}  # the sums of the values before those

    @property
    def begun(self) -> bool:
        """Whether the epoch has had a batch."""
        return bool(self.weights["Loss"] or self._added)

    def sums(self, steps: Mapping[str, Any]) -> dict[str, Sums]:
        """Return the weighted values and the weights of the epoch, or numbers with the same sums, by series.

        A value with weight 0 is left out, because it may be NaN: so is the loss of a batch whose tokens are all
        ignored.

        Args:
            steps: The series, with a value for each batch.
        """
        found: dict[str, Sums] = {}
        for name, weights in self.weights.items():
            if name in self._added or weights:
                products, counted = self._added.get(name, ([], []))
                new = zip(steps[name].since(-len(weights)), _numbers(weights), strict=True) if weights else ()
                pairs = [pair for pair in new if pair[1]]
                found[name] = [*products, *(mul(*pair) for pair in pairs)], [*counted, *(pair[1] for pair in pairs)]
        return found

    def add_up(self, steps: Mapping[str, Any]) -> None:
        """Replace the values so far by a few numbers with exactly the same sums. The series may drop them then."""
        for name, (products, weights) in self.sums(steps).items():
            self._added[name] = exact_parts(products), exact_parts(weights)
            self.weights[name].clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and the sums."""
        weights = {name: _numbers(each) for name, each in self.weights.items()}
        return {"phase": self.phase, "weights": weights, "sums": {name: [*each] for name, each in self._added.items()}}

    @classmethod
    def loaded(cls, state: Mapping[str, Any]) -> Self:
        """Return the means of an epoch with the state that `state_dict` returned."""
        made = cls(state.get("phase", ""))
        saved = state["weights"] if "weights" in state else state["sizes"]  # early checkpoints have weights alone
        made.weights |= {name: list(weights) for name, weights in saved.items()}
        sums = state.get("sums", {})
        made._added = {name: (list(products), list(weights)) for name, (products, weights) in sums.items()}
        return made


def joined(states: Iterable[Mapping[str, Sums]]) -> dict[str, Sums]:
    """Return the sums of all ranks by series; the ranks need not have the same series."""
    found: dict[str, Sums] = {}
    for state in states:
        for name, (products, weights) in state.items():
            mine = found.setdefault(name, ([], []))
            mine[0].extend(products)
            mine[1].extend(weights)
    return found


def mean(products: Sequence[float], weights: Sequence[float]) -> float:
    """Return the quotient of two sums, each rounded once, so that it does not depend on the order of the batches."""
    try:
        total = math.fsum(weights)
        return math.fsum(products) / total if total else math.nan
    except (OverflowError, ValueError):  # fsum refuses sums that are too large, and infinities of both signs
        return float(sum(products)) / sum(weights)


def exact_parts(numbers: Sequence[float]) -> list[float]:
    """Return a few numbers with exactly the same sum, by which ranks exchange the sum of any number of batches.

    >>> exact_parts([0.1, 0.2, 1e17])
    [1e+17, 0.30000000000000004, -2.7755575615628914e-17]
    """
    parts: list[float] = []
    try:
        # Each part is the rounded sum of what the parts before it leave, so the rest soon is zero.
        while rest := math.fsum([*numbers, *(-part for part in parts)]):
            parts.append(rest)
            if not math.isfinite(rest):
                break
    except (OverflowError, ValueError):  # as in `mean`
        return [float(sum(numbers))]
    return parts


def _numbers(weights: Sequence[Any]) -> list[float]:
    """Return the weights as numbers, and wait for the device if some of them are tensors."""
    places = [place for place, weight in enumerate(weights) if isinstance(weight, torch.Tensor)]
    found = list(weights)
    if places:
        for place, number in zip(places, Reading([weights[place] for place in places]).numbers(), strict=True):
            found[place] = check_weight(number, "The weight of a batch")
    return found
