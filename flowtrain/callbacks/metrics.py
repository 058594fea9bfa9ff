"""Metrics: the loss and metrics of each batch, and their means for each epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import mul
from typing import Any, Literal

import torch

from flowtrain.access import Access, Read, Write
from flowtrain.callback import Callback, on
from flowtrain.errors import UsageError
from flowtrain.events import BatchEnd, EpochBegin, EpochEnd
from flowtrain.handler import Handler
from flowtrain.metric import Metric, held, hold, values_of
from flowtrain.phasemap import epoch_of
from flowtrain.phases import Phase
from flowtrain.protect import LearnerView
from flowtrain.resolution import Resolution, Unresolvable

__all__ = ["Metrics"]


class Metrics(Callback):
    """Record the loss, as ``"Loss"``, and metrics: each batch in ``metrics_step``, each epoch in ``metrics_epoch``.

    The value of an epoch is the mean over its batches, weighted by batch size (the length of the first tensor in
    ``batch.inputs``); for a torchmetrics object it is what that object computes over the epoch. Metrics are computed
    without gradients, in phases that have outputs and targets. An epoch without a completed batch records nothing. In
    ``metrics_epoch`` the step is the number of the training epoch; an evaluation has that of the one after which it
    ran, 0 before the first.

    A learner has one of them, with all metrics: two would both record the loss. On an accelerator nothing waits for
    the values: they stay there, at most 256 of each name, until they are read, at the latest for the mean of the epoch.

    Reads ``batch.inputs`` and ``batch.loss``, with metrics also ``batch.outputs`` and ``batch.targets``, and
    ``cbstate.history``; so it runs after `Recorder`. Writes the series of its names in ``cbstate.metrics_step`` and
    ``cbstate.metrics_epoch``. Costs a microsecond or two for each batch, and what the metrics themselves do.

    Args:
        metrics: Functions of ``(outputs, targets)``, `Metric`, or torchmetrics objects and collections. A
            torchmetrics object is cloned for each phase. Outputs that are a tensor come without their graph.

    Raises:
        UsageError: Something that is no metric, or two with one name.

    >>> from flowtrain import ValidationPhase
    >>> from flowtrain.metrics import accuracy
    >>> Metrics(accuracy, Metric(lambda outputs, targets: outputs.mean(), name="Bias", phase=ValidationPhase)).metrics
    (Metric(Accuracy), Metric(Bias))
    """

    def __init__(self, *metrics: Any) -> None:
        for metric in metrics:
            if isinstance(metric, (list, tuple)):
                each = ", ".join(str(getattr(one, "__name__", one)) for one in metric)
                raise UsageError(
                    f"Metrics takes its metrics one by one, and got a {type(metric).__name__} of {len(metric)}. "
                    f"Write Metrics({each})."
                )
        self.metrics = tuple(metric if isinstance(metric, Metric) else Metric(metric) for metric in metrics)
        names = ["Loss", *(name for metric in self.metrics for name in metric.names)]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"Two metrics are called {name!r}. Give one another name: Metric(f, name='Other').")
        self._names = names
        self._late = False  # whether tensors on the CPU are treated as those of a device
        self._no_grad = torch.no_grad()  # used again and again: to make one costs as much as a metric
        self._sizes: dict[str, list[int]] = {name: [] for name in names}
        self._clones: dict[tuple[Metric, Phase], Any] = {}
        self._held: dict[tuple[str, str], Any] = {}  # by name and phase: what clones that are yet to be made begin with

    def handlers(self) -> Iterator[tuple[type, Handler]]:
        """Yield the handlers, each with what it touches: that depends on the metrics."""
        batch = ("inputs", "loss", "outputs", "targets") if self.metrics else ("inputs", "loss")
        steps = [f"cbstate.metrics_step.{name}" for name in self._names]
        epochs = [f"cbstate.metrics_epoch.{name}" for name in self._names]
        history: Access = {"cbstate.history": Read()}
        entries: Access = {f"batch.{name}": Read(optional=True) for name in batch}
        access: dict[str, Access] = {
            "begin": {},
            "record": {**history, **entries, **dict.fromkeys(steps, Write())},
            "end": {**history, **dict.fromkeys(steps, Read()), **dict.fromkeys(epochs, Write())},
        }
        for owner, handler in super().handlers():
            yield owner, replace(handler, access=access.get(handler.attribute, handler.access))

    def metric_modes(self) -> dict[str, Literal["min", "max"]]:
        """Return what the metrics say of themselves."""
        return {name: mode for metric in self.metrics for name, mode in metric.modes.items()}

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        """Refuse another `Metrics`: both would record the loss. One takes any number of metrics."""
        return Unresolvable() if isinstance(other, Metrics) else None

    @on(EpochBegin)
    def begin(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Forget the batches of the epoch before, also of one that was cancelled."""
        self._late = learner.lag > 0
        for sizes in self._sizes.values():
            sizes.clear()
        for (_, owner), clone in self._clones.items():
            if owner is phase:
                clone.reset()
        self._held = {key: kept for key, kept in self._held.items() if key[1] != repr(phase)}

    @on(BatchEnd)
    def record(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Record the loss and the metrics of the batch."""
        batch = learner.batch
        loss, inputs = batch.loss, batch.inputs
        shape = inputs.shape if type(inputs) is torch.Tensor else None
        size = shape[0] if shape else _size(inputs)
        if loss is not None:
            value = loss.item() if loss.is_cpu and not self._late else loss.detach()
            cbstate = learner.cbstate
            cbstate.metrics_step[phase].push("Loss", value, cbstate.history[phase].steps)
            self._sizes["Loss"].append(size)
        if self.metrics:
            self._record_metrics(phase, learner, size)

    def _record_metrics(self, phase: Phase, learner: LearnerView, size: int) -> None:
        outputs, targets = learner.batch.outputs, learner.batch.targets
        if outputs is None or targets is None:
            return
        if isinstance(outputs, torch.Tensor):
            outputs = outputs.detach()  # a torchmetrics object may keep them for the epoch, but not with their graph
        steps, series = learner.cbstate.history[phase].steps, learner.cbstate.metrics_step[phase]
        with self._no_grad:
            for metric in self.metrics:
                if not isinstance(phase, metric.phase):
                    continue
                f = self._clone(metric, phase, outputs) if metric.accumulates else metric.f
                for name, value in values_of(metric, f(outputs, targets)).items():
                    series.push(name, value, steps)
                    self._sizes[name].append(size)

    def state_dict(self) -> dict[str, Any]:
        """Return what the current epoch has come to: the sizes of its batches, and what torchmetrics objects hold."""
        kept = [(metric.name, repr(phase), *held(clone)) for (metric, phase), clone in self._clones.items()]
        return {"sizes": {name: list(sizes) for name, sizes in self._sizes.items()}, "held": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        for name, sizes in self._sizes.items():
            sizes[:] = state["sizes"].get(name, [])
        self._clones.clear()
        self._held = {(name, phase): kept for name, phase, *kept in state["held"]}

    def _clone(self, metric: Metric, phase: Phase, outputs: Any) -> Any:
        clone = self._clones.get((metric, phase))
        if clone is None:
            clone = metric.f.clone()
            clone.reset()  # the user's may have seen data
            if hasattr(clone, "persistent"):
                clone.persistent(mode=True)  # what it has accumulated belongs to a checkpoint
            if isinstance(outputs, torch.Tensor) and hasattr(clone, "to"):
                clone = clone.to(outputs.device)
            self._clones[metric, phase] = clone
            hold(clone, *self._held.pop((metric.name, repr(phase)), ({}, [])))
        return clone

    @on(EpochEnd)
    def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Record the values of the epoch."""
        epochs, steps = epoch_of(learner.cbstate.history, phase), learner.cbstate.metrics_step
        means = learner.cbstate.metrics_epoch[phase]
        accumulated: dict[str, Any] = {}
        for metric in self.metrics:
            clone = self._clones.get((metric, phase))
            if clone is None and (metric.name, repr(phase)) in self._held:  # the last batch was before a checkpoint
                clone = self._clone(metric, phase, None)
            if clone is not None and any(self._sizes[name] for name in metric.names):
                accumulated |= values_of(metric, clone.compute())
        for name, sizes in self._sizes.items():
            if name in accumulated:
                means.push(name, accumulated[name], epochs)
            elif sizes:
                series = steps[phase][name]
                means.push(name, _mean(series.since(len(series) - len(sizes)), sizes), epochs)


def _mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the mean of values weighted by sizes; rounded once, so that it does not depend on their order."""
    total = sum(sizes)
    products = list(map(mul, values, sizes))
    try:
        return math.fsum(products) / total if total else math.nan
    except (OverflowError, ValueError):  # too large, or infinite with both signs
        return float(sum(products)) / total


def _size(inputs: Any) -> int:
    """Return the batch size: the length of the first array, wherever it is; of the list where there is none; or 1."""
    shape = getattr(inputs, "shape", None)
    if isinstance(shape, (tuple, torch.Size)):
        return int(shape[0]) if shape else 1
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if not isinstance(parts, Sequence) or isinstance(parts, (str, bytes)):
        return 1
    for part in parts:
        if hasattr(part, "shape") or (isinstance(part, (Mapping, Sequence)) and not isinstance(part, (str, bytes))):
            return _size(part)
    return max(len(parts), 1) if parts is inputs else 1
