"""A metric: a function of outputs and targets, or a torchmetrics object, with a name and the phases it is computed in.

A torchmetrics object accumulates. What it has come to in the middle of an epoch is read with `held`, for a checkpoint,
and given to a new one with `hold`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from flowtrain.errors import UsageError, is_a, is_type
from flowtrain.phases import Phase

__all__ = ["Accumulator", "Metric", "held", "hold", "values_of"]


@runtime_checkable
class Accumulator(Protocol):
    """What is used of a torchmetrics object (https://lightning.ai/docs/torchmetrics)."""

    def __call__(self, outputs: Any, targets: Any) -> Any:
        """Take a batch in, and return the value of this batch alone."""

    def clone(self) -> Any:
        """Return a copy that accumulates for itself."""

    def compute(self) -> Any:
        """Return the value over all batches since `reset`."""

    def reset(self) -> None:
        """Forget all batches."""


class Metric:
    """A metric with a name, for some phases.

    Args:
        f: A function of ``(outputs, targets)`` that returns one number, or a torchmetrics object.
        name: What it is called in ``cbstate`` and in logs; without it, the function's name in the form ``TopAccuracy``.
            The values of a torchmetrics collection keep the names that they have in it.
        phase: The phases in which it is computed, subclasses included.
        mode: ``"min"`` if small values are good, ``"max"`` if large ones are, for those that watch it. The metrics of
            `flowtrain.metrics` and torchmetrics objects say it themselves, by their attribute ``higher_is_better``.

    Raises:
        UsageError: `f` cannot be called, there is no name that could be used, `phase` is no phase type, or `mode` is
            something else.

    >>> from flowtrain.metrics import top_k_accuracy
    >>> Metric(top_k_accuracy(3))
    Metric(Top3Accuracy)
    """

    def __init__(
        self,
        f: Callable[[Any, Any], Any],
        name: str | None = None,
        phase: type[Phase] = Phase,
        *,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        if not callable(f) or is_a(f, type):
            made = f" Write {f.__name__}(), an instance." if isinstance(f, type) else ""
            if is_a(f, str) and str(f).isidentifier():
                made = f" Write Metrics({f}), the function itself; flowtrain.metrics has some."
            raise UsageError(f"{f!r} is no metric: a metric is a function of (outputs, targets).{made}")
        if not is_type(phase, Phase):
            raise UsageError(f"Metric(phase={phase!r}) is no phase type. Write Metric(f, phase=ValidationPhase).")
        if mode not in ("min", "max", None):
            raise UsageError(f'Metric(mode={mode!r}): mode is "min" if small values are good, "max" if large ones are.')
        self.mode = mode
        self.f: Any = f
        self.phase = phase
        self.accumulates = isinstance(f, Accumulator)
        self.name = name if name is not None else _name(f)
        for each in self.names:
            if not is_a(each, str) or not each or "." in each or each == "<lambda>":
                raise UsageError(f"The metric {f!r} needs a name without dots. Write Metric(f, name='MyMetric').")

    @property
    def names(self) -> list[str]:
        """The names of its values: several for a torchmetrics collection."""
        return [*self.f.keys()] if self.accumulates and hasattr(self.f, "keys") else [self.name]

    @property
    def modes(self) -> dict[str, Literal["min", "max"]]:
        """Whether small or large values are good, by the names of its values, for those of which it is known."""
        if self.mode is not None:
            return dict.fromkeys(self.names, self.mode)
        parts = self.f.items() if self.accumulates and hasattr(self.f, "items") else [(self.name, self.f)]
        known = {name: getattr(getattr(f, "func", f), "higher_is_better", None) for name, f in parts}
        return {name: "max" if higher else "min" for name, higher in known.items() if higher is not None}

    def __repr__(self) -> str:
        return f"Metric({self.name})"


def values_of(metric: Metric, value: Any) -> dict[str, Any]:
    """Return the values of a metric by name, checked to be single numbers."""
    if type(value) is torch.Tensor and not metric.accumulates and value.numel() == 1:
        return {metric.name: value}  # the usual case, in every batch: it would pass what follows
    values = {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {metric.name: value}
    if set(values) != set(metric.names):
        raise UsageError(
            f"The metric {metric.name} returned values named {', '.join(values) or 'nothing'}; a metric is one number. "
            f"Pass a function for each of them: Metric(f, name='...')."
        )
    for name, item in values.items():
        if isinstance(item, torch.Tensor):
            if item.numel() != 1:
                raise UsageError(
                    f"The metric {name} returned a tensor of shape {tuple(item.shape)}; a metric is one number. "
                    f"Reduce it, as with .mean()."
                )
        elif not isinstance(item, (float, int)):
            try:
                values[name] = float(item)
            except (TypeError, ValueError):
                raise UsageError(
                    f"The metric {name} returned {item!r}; a metric is one number, or a tensor with one element."
                ) from None
    return values


def held(clone: Any) -> tuple[dict[str, Any], list[int]]:
    """Return what a torchmetrics object has accumulated, and after how many batches, for it and each in it."""
    if not isinstance(clone, torch.nn.Module):
        return {}, []
    if isinstance(clone, torch.nn.ModuleDict):
        list(clone.items())  # a collection computes what its members share in one of them; now all have it
    return clone.state_dict(), [getattr(module, "_update_count", 0) for module in clone.modules()]


def hold(clone: Any, state: dict[str, Any], counts: list[int]) -> None:
    """Give a new torchmetrics object what another has accumulated."""
    if state:
        clone.load_state_dict(state)
    for module, count in zip(clone.modules() if counts else (), counts, strict=True):
        if count:
            module._update_count = count


def _name(f: Any) -> str:
    inner = getattr(f, "func", f)  # a functools.partial
    name = str(getattr(inner, "__name__", type(f).__name__))
    if "_" not in name and name[:1].isupper():
        return name
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))
