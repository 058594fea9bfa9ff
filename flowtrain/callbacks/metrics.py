"""Metrics: the loss and metrics of each batch, and their values for each epoch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import mul
from typing import Any, Literal

import torch

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.batch_size import lengths, measure
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, EpochBegin, EpochEnd
from flowtrain.callback.phases import Phase
from flowtrain.callback.resolution import Resolution, Unresolvable
from flowtrain.callback.view import LearnerView
from flowtrain.errors import UsageError, describe
from flowtrain.metrics.metric import Metric, Running, check_weight, values_of
from flowtrain.state.by_phase import epoch_of
from flowtrain.state.device_values import Reading

__all__ = ["Metrics"]


class Metrics(Callback):
    """Record the loss, as ``"Loss"``, and metrics: each batch in ``metrics_step``, each epoch in ``metrics_epoch``.

    The loss and functions have a value for each batch; the value of an epoch is the mean over its batches, weighted by
    `weight`, or by batch size, which the phase says (`Phase.batch_size`): the length that the tensors in
    ``batch.inputs`` and ``batch.targets`` have in common. Where that cannot be told for certain there is a warning that
    says what to write. A torchmetrics object takes in each batch and is computed at the end of the epoch; it has values
    of batches with ``Metric(f, on_step=True)``. A metric with several values, a mapping or one number for each class,
    becomes several series: ``"F1.cat"``, ``"F1.dog"``; see `Metric`.

    Metrics are computed without gradients, in phases that have outputs and targets. An epoch without a completed batch
    records nothing. In ``metrics_epoch`` the step is the number of the training epoch; an evaluation has that of the
    one after which it ran, 0 before the first.

    A learner has one of them, with all metrics: two would both record the loss. On an accelerator nothing waits for
    the values: they stay there, at most 256 of each name, until they are read, at the latest for the mean of the epoch.

    Reads ``batch.inputs``, ``batch.targets`` and ``batch.loss``, with metrics or a weight also ``batch.outputs``;
    ``cbstate.history``, so it runs after `Recorder`; and ``data`` at `EpochBegin`. Writes the series of its names in
    ``cbstate.metrics_step`` and ``cbstate.metrics_epoch``. Costs a microsecond or two for each batch, and what the
    metrics themselves do.

    Args:
        metrics: Functions of ``(outputs, targets)``, `Metric`, or torchmetrics objects and collections. A
            torchmetrics object is cloned for each phase. Outputs that are a tensor come without their graph.
        weight: What a batch counts in the means of an epoch, of the loss and of all functions without a weight of their
            own: a function of ``(outputs, targets)`` that returns a number.

    Raises:
        UsageError: Something that is no metric, two with one name, or a weight that cannot be called.

    >>> from flowtrain import ValidationPhase
    >>> from flowtrain.metrics import accuracy
    >>> Metrics(accuracy, Metric(lambda outputs, targets: outputs.mean(), name="Bias", phase=ValidationPhase)).metrics
    (Metric(Accuracy), Metric(Bias))
    """

    def __init__(self, *metrics: Any, weight: Callable[[Any, Any], Any] | None = None) -> None:
        for metric in metrics:
            if isinstance(metric, (list, tuple)):
                each = ", ".join(str(getattr(one, "__name__", one)) for one in metric)
                raise UsageError(
                    f"Metrics takes its metrics one by one, and got a {type(metric).__name__} of {len(metric)}. "
                    f"Write Metrics({each})."
                )
        if weight is not None and not callable(weight):
            raise UsageError(
                f"Metrics(weight={weight!r}): weight is a function of (outputs, targets) that returns what a batch "
                f"counts, such as lambda outputs, targets: (targets != -100).sum()."
            )
        self.metrics = tuple(metric if isinstance(metric, Metric) else Metric(metric) for metric in metrics)
        self.weight = weight
        names = ["Loss", *(name for metric in self.metrics for name in metric.names)]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"Two metrics are called {name!r}. Give one another name: Metric(f, name='Other').")
        self._late = False  # whether tensors on the CPU are treated as those of a device
        self._no_grad = torch.no_grad()  # used again and again: to make one costs as much as a metric
        self._weights: dict[str, list[Any]] = {"Loss": []}  # of the batches of the epoch, by series
        self._running: dict[tuple[Metric, Phase], Running] = {}
        self._held: dict[tuple[str, str], Any] = {}  # by name and phase: what those that are yet to be made begin with
        self._quick: Phase | None = None  # the phase whose batch size is the length of its inputs, as was found
        self._each: int | None = None  # how many samples the loader puts into a batch, where it says so
        self._warned: set[Phase] = set()

    def _steps(self) -> list[str]:
        """Return the paths of the series with a value for each batch."""
        names = ["Loss", *(name for metric in self.metrics if metric.on_step for name in metric.names)]
        return [f"cbstate.metrics_step.{name}" for name in names]

    def _of_batches(self) -> Access:
        entries = ["inputs", "loss", "targets", *(["outputs"] if self.metrics or self.weight is not None else [])]
        batch = {f"batch.{name}": Read(optional=True) for name in entries}
        return {"cbstate.history": Read(), **batch, **dict.fromkeys(self._steps(), Write())}

    def _of_epochs(self) -> Access:
        names = ["Loss", *(name for metric in self.metrics for name in metric.names)]
        epochs = {f"cbstate.metrics_epoch.{name}": Write() for name in names}
        return {"cbstate.history": Read(), **dict.fromkeys(self._steps(), Read()), **epochs}

    def metric_modes(self) -> dict[str, Literal["min", "max"]]:
        """Return what the metrics say of themselves."""
        return {name: mode for metric in self.metrics for name, mode in metric.modes.items()}

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        """Refuse another `Metrics`: both would record the loss. One takes any number of metrics."""
        return Unresolvable() if isinstance(other, Metrics) else None

    @on(EpochBegin, access={"data": Read()})
    def begin(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Forget the batches of the epoch before, also of one that was cancelled."""
        self._late = learner.lag > 0
        self._weights = {"Loss": []}
        for metric in self.metrics:
            if (metric, phase) in self._running or (metric.name, repr(phase)) in self._held:
                self._run(metric, phase).reset()
        self._each = _samples(learner.data.get(phase))
        self._quick = None

    @on(BatchEnd, access="_of_batches")
    def record(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Record the loss and the metrics of the batch."""
        batch = learner.batch
        loss, inputs = batch.loss, batch.inputs
        shape = inputs.shape if phase is self._quick and type(inputs) is torch.Tensor else None
        size = shape[0] if shape else self._size(phase, inputs, batch.targets)
        if self.weight is not None:
            with self._no_grad:
                size = self._weight(self.weight, "The weight of Metrics", learner, size)
        if loss is not None:
            value = loss.item() if loss.is_cpu and not self._late else loss.detach()
            cbstate = learner.cbstate
            cbstate.metrics_step[phase].push("Loss", value, cbstate.history[phase].steps)
            self._weights["Loss"].append(size)
        if self.metrics:
            self._record_metrics(phase, learner, size)

    def _record_metrics(self, phase: Phase, learner: LearnerView, size: Any) -> None:
        outputs, targets = learner.batch.outputs, learner.batch.targets
        if outputs is None or targets is None:
            return
        if isinstance(outputs, torch.Tensor):
            outputs = outputs.detach()  # a torchmetrics object may keep them for the epoch, but not with their graph
        steps, series = learner.cbstate.history[phase].steps, learner.cbstate.metrics_step[phase]
        weights = self._weights
        with self._no_grad:
            for metric in self.metrics:
                if not isinstance(phase, metric.phase):
                    continue
                if metric.accumulates:
                    running = self._run(metric, phase)
                    running.update(outputs, targets)
                    found = values_of(metric, running.value_of(outputs, targets)) if metric.on_step else {}
                    for name, value in found.items():
                        series.push(name, value, steps)
                    continue
                weight = size
                if metric.weight is not None:
                    weight = self._weight(metric.weight, f"The weight of {metric!r}", learner, size)
                for name, value in values_of(metric, metric.f(outputs, targets)).items():
                    series.push(name, value, steps)
                    weights.setdefault(name, []).append(weight)

    def _weight(self, f: Callable[[Any, Any], Any], what: str, learner: LearnerView, size: Any) -> Any:
        """Return what a function says that the batch counts; its size in a phase without outputs or targets.

        It is called under `_no_grad`, which must not be entered twice: then it would leave gradients disabled.
        """
        outputs, targets = learner.batch.outputs, learner.batch.targets
        if outputs is None or targets is None:
            return size
        return check_weight(f(outputs, targets), what)

    def _size(self, phase: Phase, inputs: Any, targets: Any) -> Any:
        """Return how many samples a batch has; warn, once for each phase, where that is not certain."""
        if type(phase).batch_size is not Phase.batch_size:
            return check_weight(phase.batch_size(inputs, targets), f"{phase!r}.batch_size(inputs, targets)")
        size, certain = measure(inputs, targets)
        if certain and self._each not in (None, size) and not self._weights["Loss"]:
            # The loader makes batches of 8, and the tensors have shape (50, 8): samples are in the second dimension.
            second = [tuple(getattr(each, "shape", ()))[1:2] for each in (inputs, targets)]
            certain = (self._each,) not in second and (size < self._each or size % self._each == 0)
        if certain and type(inputs) is torch.Tensor:
            self._quick = phase
        if not certain and phase not in self._warned:
            self._warned.add(phase)
            warnings.warn(self._unsure(phase, inputs, targets, size), UserWarning, stacklevel=2)
        return size

    def _unsure(self, phase: Phase, inputs: Any, targets: Any, size: int) -> str:
        found = [*lengths(inputs, "batch.inputs"), *lengths(targets, "batch.targets")]
        known = ", ".join(f"{path} has length {length}" for path, length in found[:6])
        known = known or f"batch.inputs is {describe(inputs)}"
        loader = "" if self._each is None else f", and the loader makes batches of {self._each}"
        base = type(phase).__name__
        return (
            f"How many samples a batch of {phase!r} has cannot be told for certain: {known}{loader}. The means of an "
            f"epoch weigh this batch by {size}. Say it in a phase, and give data={{My{base}: loader}}:\n\n"
            f"    class My{base}({base}):\n"
            f"        def batch_size(self, inputs, targets):\n"
            f"            return len(targets)  # the number of samples\n"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what the current epoch has come to: the weights of its batches, and what torchmetrics objects hold."""
        sizes = {name: _numbers(weights) for name, weights in self._weights.items()}
        running = {(metric.name, repr(phase)): each for (metric, phase), each in self._running.items()}
        kept = [(*key, *each.state_dict()) for key, each in running.items()]
        return {"sizes": sizes, "held": [*kept, *((*key, *state) for key, state in self._held.items())]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._weights = {"Loss": [], **{name: list(weights) for name, weights in state["sizes"].items()}}
        self._running.clear()
        self._held = {}
        for name, phase, parts, number in state["held"]:
            if isinstance(number, list):  # a checkpoint of the first format: a state, and how often each part has it
                parts, number = [(parts, number)], max(number, default=1)
            self._held[name, phase] = parts, number

    def _run(self, metric: Metric, phase: Phase) -> Running:
        running = self._running.get((metric, phase))
        if running is None:
            running = self._running[metric, phase] = Running(metric)
            held = self._held.pop((metric.name, repr(phase)), None)
            if held is not None:
                running.load_state_dict(*held)
        return running

    @on(EpochEnd, access="_of_epochs")
    def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Record the values of the epoch."""
        epoch, steps = epoch_of(learner.cbstate.history, phase), learner.cbstate.metrics_step
        results = learner.cbstate.metrics_epoch[phase]
        for metric in (None, *self.metrics):
            if metric is not None and metric.accumulates:
                found = self._accumulated(metric, phase)
            else:
                own = "Loss" if metric is None else metric.name
                weights = {name: each for name, each in self._weights.items() if name.partition(".")[0] == own and each}
                found = {name: _mean(steps[phase][name].since(-len(each)), each) for name, each in weights.items()}
            for name, value in found.items():
                results.push(name, value, epoch)

    def _accumulated(self, metric: Metric, phase: Phase) -> dict[str, Any]:
        if not isinstance(phase, metric.phase):
            return {}
        running = self._run(metric, phase)  # one that a checkpoint holds, if no batch has come since
        found = values_of(metric, running.compute()) if running.updates else {}
        running.reset()  # what it has kept of the outputs is not needed until the next epoch
        return found


def _samples(loader: object) -> int | None:
    """Return how many samples a loader puts into a batch, where it says so and an epoch has several batches."""
    if not isinstance(loader, torch.utils.data.DataLoader):
        return None
    endless = isinstance(loader.dataset, torch.utils.data.IterableDataset)
    return loader.batch_size if endless or len(loader) > 1 else None


def _mean(values: Sequence[float], weights: Sequence[Any]) -> float:
    """Return the mean of values weighted by weights; rounded once, so that it does not depend on their order.

    A batch that counts nothing has no part in it, whatever its value is: the loss of no token is NaN.
    """
    counted = [(value, weight) for value, weight in zip(values, _numbers(weights), strict=True) if weight]
    total = sum(weight for _, weight in counted)
    products = [mul(*each) for each in counted]
    try:
        return math.fsum(products) / total if total else math.nan
    except (OverflowError, ValueError):  # too large, or infinite with both signs
        return float(sum(products)) / total


def _numbers(weights: Sequence[Any]) -> list[float]:
    """Return weights as numbers; waits for a device that has some."""
    places = [place for place, weight in enumerate(weights) if isinstance(weight, torch.Tensor)]
    found = list(weights)
    if places:
        for place, number in zip(places, Reading([weights[place] for place in places]).numbers(), strict=True):
            found[place] = check_weight(number, "The weight of a batch")
    return found
