"""Metrics: the loss and metrics of each batch, and their means for each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch

from flowtrain.access import Access, Read, Write
from flowtrain.callback import Callback, on
from flowtrain.errors import UsageError
from flowtrain.events import BatchEnd, EpochBegin, EpochEnd
from flowtrain.phases import Phase
from flowtrain.protect import LearnerView

__all__ = ["Metric", "Metrics"]


@runtime_checkable
class _Accumulator(Protocol):
    """What is used of a torchmetrics object (https://lightning.ai/docs/torchmetrics)."""

    def __call__(self, outputs: Any, targets: Any) -> Any: ...
    def clone(self) -> Any: ...
    def compute(self) -> Any: ...
    def reset(self) -> None: ...


class Metric:
    """A metric with a name, for some phases.

    Args:
        f: A function of ``(outputs, targets)`` that returns one number, or a torchmetrics object.
        name: What it is called in ``cbstate`` and in logs; without it, the function's name in the form ``TopAccuracy``.
        phase: The phases in which it is computed, subclasses included.

    Raises:
        UsageError: `f` cannot be called, or there is no name that could be used.
    """

    def __init__(self, f: Callable[[Any, Any], Any], name: str | None = None, phase: type[Phase] = Phase) -> None:
        if not callable(f) or isinstance(f, type):
            made = f" Write {f.__name__}(), an instance." if isinstance(f, type) else ""
            raise UsageError(f"{f!r} is no metric: a metric is a function of (outputs, targets).{made}")
        self.f = f
        self.phase = phase
        self.accumulates = isinstance(f, _Accumulator)
        self.name = name if name is not None else _name(f)
        if not self.name or "." in self.name or self.name == "<lambda>":
            raise UsageError(f"The metric {f!r} needs a name without dots. Write Metric(f, name='MyMetric').")

    @property
    def names(self) -> list[str]:
        """The names of its values: several for a torchmetrics collection."""
        keys = getattr(self.f, "keys", None)
        return [str(key) for key in keys()] if self.accumulates and callable(keys) else [self.name]

    def __repr__(self) -> str:
        return f"Metric({self.name})"


def _name(f: Any) -> str:
    inner = getattr(f, "func", f)  # a functools.partial
    name = str(getattr(inner, "__name__", type(f).__name__))
    return name if "_" not in name and name[:1].isupper() else "".join(part[:1].upper() + part[1:] for part in name.split("_"))


class Metrics(Callback):
    """Record the loss, as ``"Loss"``, and metrics: each batch in ``metrics_step``, each epoch in ``metrics_epoch``.

    The value of an epoch is the mean over its batches, weighted by batch size (the length of ``batch.inputs``); for a
    torchmetrics object it is what that object computes over the epoch. Metrics are computed without gradients, in
    phases that have outputs and targets. An epoch without a completed batch records nothing.

    Args:
        metrics: Functions of ``(outputs, targets)``, `Metric`, or torchmetrics objects and collections. A
            torchmetrics object is cloned for each phase.

    Raises:
        UsageError: Something that is no metric, or two with one name.
    """

    def __init__(self, *metrics: Any) -> None:
        self.metrics = tuple(metric if isinstance(metric, Metric) else Metric(metric) for metric in metrics)
        names = ["Loss", *(name for metric in self.metrics for name in metric.names)]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"Two metrics are called {name!r}. Give one another name: Metric(f, name='Other').")
        self._names = names
        self._sizes: dict[str, list[int]] = {name: [] for name in names}
        self._clones: dict[tuple[str, Phase], Any] = {}

    def state_access(self) -> Access:
        access: dict[str, Read | Write] = {
            "batch.inputs": Read(optional=True),
            "batch.loss": Read(optional=True),
            "cbstate.history": Read(),
        }
        if self.metrics:
            access |= {"batch.outputs": Read(optional=True), "batch.targets": Read(optional=True)}
        for name in self._names:
            access |= {f"cbstate.metrics_step.{name}": Write(), f"cbstate.metrics_epoch.{name}": Write()}
        return access

    @on(EpochBegin)
    def begin(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        for sizes in self._sizes.values():
            sizes.clear()
        for (_, owner), clone in self._clones.items():
            if owner is phase:
                clone.reset()

    @on(BatchEnd)
    def record(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        batch = learner.batch
        loss, inputs = batch.loss, batch.inputs
        size = inputs.shape[0] if type(inputs) is torch.Tensor and inputs.ndim else _size(inputs)
        if loss is not None:
            value = loss.item() if loss.device.type == "cpu" else loss.detach()
            learner.cbstate.metrics_step[phase].push("Loss", value, learner.cbstate.history[phase].steps)
            self._sizes["Loss"].append(size)
        if self.metrics:
            self._record_metrics(phase, learner, size)

    def _record_metrics(self, phase: Phase, learner: LearnerView, size: int) -> None:
        outputs, targets = learner.batch.outputs, learner.batch.targets
        if outputs is None or targets is None:
            return
        steps, series = learner.cbstate.history[phase].steps, learner.cbstate.metrics_step[phase]
        with torch.no_grad():
            for metric in self.metrics:
                if not isinstance(phase, metric.phase):
                    continue
                f = self._clone(metric, phase, outputs) if metric.accumulates else metric.f
                for name, value in _values(metric, f(outputs, targets)).items():
                    series.push(name, value, steps)
                    self._sizes[name].append(size)

    def _clone(self, metric: Metric, phase: Phase, outputs: Any) -> Any:
        clone = self._clones.get((metric.name, phase))
        if clone is None:
            clone = metric.f.clone()  # type: ignore[attr-defined]  # an _Accumulator
            if isinstance(outputs, torch.Tensor) and hasattr(clone, "to"):
                clone = clone.to(outputs.device)
            self._clones[metric.name, phase] = clone
        return clone

    @on(EpochEnd)
    def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        epochs, steps, means = learner.cbstate.history[phase].epochs, learner.cbstate.metrics_step, learner.cbstate.metrics_epoch
        accumulated: dict[str, Any] = {}
        for metric in self.metrics:
            clone = self._clones.get((metric.name, phase))
            if clone is not None and self._sizes[metric.names[0]]:
                accumulated |= _values(metric, clone.compute())
        for name in self._names:
            sizes = self._sizes[name]
            if name in accumulated:
                means[phase].push(name, accumulated[name], epochs)
            elif sizes:
                series = steps[phase][name]
                values = series.since(len(series) - len(sizes))
                weighted = math.fsum(value * size for value, size in zip(values, sizes, strict=True))
                means[phase].push(name, weighted / sum(sizes), epochs)


def _values(metric: Metric, value: Any) -> dict[str, Any]:
    """Return the values of a metric by name, checked to be single numbers."""
    values = {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {metric.name: value}
    for name, item in values.items():
        if isinstance(item, torch.Tensor) and item.numel() != 1:
            raise UsageError(
                f"The metric {name} returned a tensor of shape {tuple(item.shape)}; a metric is one number. "
                f"Reduce it, as with .mean()."
            )
    return values


def _size(inputs: Any) -> int:
    """Return the batch size: the length of the first tensor, wherever it is; 1 where there is none."""
    if isinstance(inputs, torch.Tensor):
        return inputs.shape[0] if inputs.ndim else 1
    if isinstance(inputs, Mapping):
        inputs = list(inputs.values())
    if isinstance(inputs, (list, tuple)) or hasattr(inputs, "__iter__"):
        for item in inputs:
            if isinstance(item, (torch.Tensor, Mapping, list, tuple)):
                return _size(item)
    return 1
