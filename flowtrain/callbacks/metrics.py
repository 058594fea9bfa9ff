"""Metrics: the loss and the metrics of each batch, and their values for each epoch.

A function gives a value for each batch, and the value of the epoch is their weighted mean. A torchmetrics object
accumulates the batches itself, and is computed at the end of the epoch (`flowtrain.metrics.metric.Running`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, EpochBegin, EpochEnd
from flowtrain.callback.phases import Phase, has_bundled_step
from flowtrain.callback.resolution import Resolution, Unresolvable
from flowtrain.callback.view import LearnerView
from flowtrain.data.batch_size import lengths, measure
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, whole_number
from flowtrain.errors.describing import describe
from flowtrain.graph.registry import Callbacks
from flowtrain.metrics.means import EpochMeans, exact_parts, joined, mean
from flowtrain.metrics.metric import Metric, check_weight, values_of
from flowtrain.metrics.running import Running, check_mergeable
from flowtrain.metrics.track import Track
from flowtrain.state.by_phase import epoch_of
from flowtrain.training.fit_data import unlimited

__all__ = ["Metrics"]


class Metrics(Callback):
    """Record the loss, as ``"Loss"``, and metrics: each batch in ``metrics_step``, each epoch in ``metrics_epoch``.

    The loss and functions have a value for each batch; the value of an epoch is the mean over its batches, weighted by
    `weight`, or by the size of the batch. The size is the common length of the tensors in ``batch.inputs`` and
    ``batch.targets``, unless the phase defines it (`Phase.batch_size`). If the size is not certain there is a warning
    with the code to write. A torchmetrics object is updated with each batch and computed at the end of the epoch; with
    ``Metric(f, on_step=True)`` it has values for batches too. A metric with several values, a mapping or one number for
    each class, becomes several series: ``"F1.cat"``, ``"F1.dog"``; see `Metric`. An entry of the batch, or a value
    computed from it, is recorded in the same way: ``Metrics("batch.kl")``; see `Track`.

    Metrics are computed without gradients, functions of outputs and targets in phases that have both. An epoch without
    a complete batch records no value. In ``metrics_epoch`` the step is the number of the training epoch; an evaluation
    has the number of the training epoch before it, 0 before the first.

    A learner has one `Metrics` with all metrics, because two of them would both record the loss. On an accelerator the
    host does not wait for the values: they stay on the device, at most 256 of each name, until they are read, at the
    latest for the mean of the epoch.

    In a training of several ranks the value of an epoch is that of the batches of all ranks, equal on every rank: the
    means are bit for bit those of one process with these batches, and the states of a torchmetrics object are merged as
    it declares. Values of batches are those of the rank itself. An object of your own that accumulates batches, and is
    no torchmetrics object, needs the two methods with which a callback merges ranks, ``rank_state()`` and
    ``merge_ranks(states)``.

    Reads ``batch.inputs``, ``batch.targets`` and ``batch.loss``, with metrics or a weight also ``batch.outputs``, and
    the entries that are tracked; ``cbstate.history``, so it runs after `Recorder`; and ``data`` at `EpochBegin`. Writes
    the series of its names in ``cbstate.metrics_step`` and ``cbstate.metrics_epoch``. Costs an entry of the series for
    each batch, and the time of the metrics themselves.

    Args:
        metrics: Functions of ``(outputs, targets)``, `Metric`, torchmetrics objects and collections, paths of entries
            of the batch such as ``"batch.kl"``, or `Track`. A torchmetrics object is cloned for each phase. Outputs
            that are a tensor are passed detached.
        weight: A function of ``(outputs, targets)`` that returns the weight of a batch in the means of an epoch, for
            the loss and for all functions that have no weight of their own.
        keep: How many of the newest values of each series in ``metrics_step`` to keep, so that memory and checkpoints
            stay small in a long run; all by default. Older values are dropped once a series has twice as many. The
            values of epochs do not depend on it.

    Raises:
        UsageError: An argument is no metric, two metrics have one name, `weight` cannot be called, or `keep` is no
            number of values.
        RankError: With several ranks: nothing says how the values that an object has accumulated on them are merged.

    >>> from flowtrain import ValidationPhase
    >>> from flowtrain.metrics import accuracy
    >>> Metrics(accuracy, Metric(lambda outputs, targets: outputs.mean(), name="Bias", phase=ValidationPhase)).metrics
    (Metric(Accuracy), Metric(Bias))
    """

    def __init__(self, *metrics: Any, weight: Callable[[Any, Any], Any] | None = None, keep: int | None = None) -> None:
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
        self.metrics = tuple(map(_metric, metrics))
        self._tracks = [metric for metric in self.metrics if isinstance(metric, Track)]
        self.weight = weight
        self.keep = None if keep is None else whole_number("Metrics(): keep", keep)
        names = ["Loss", *(name for metric in self.metrics for name in metric.names)]
        for name in names:
            if names.count(name) > 1:
                raise UsageError(f"Two metrics are called {name!r}. Give one another name: Metric(f, name='Other').")
        self._reads_late = False  # whether losses on the CPU are read late too, as those of a device
        self._loss_is_written = False  # whether a callback declares to write the loss
        self._copies_losses = False  # whether a loss may be written after it is recorded
        self._no_grad = torch.no_grad()  # one object for all batches: making one costs as much as a metric
        self._means = EpochMeans()
        self._running: dict[tuple[Metric, Phase], Running] = {}
        self._loaded: dict[tuple[str, str], Any] = {}  # by name and phase: states of a checkpoint for `_run` to load
        self._phase_of_known_size: Phase | None = None  # its batch size is the length of its inputs
        self._loader_size: int | None = None  # the batch size of the loader, if it is known
        self._warned: set[Phase] = set()
        self._phase: Phase | None = None  # the phase of the present epoch, or of one that was not complete
        self._series: Callable[[Phase], Any] = lambda phase: {}  # returns the series that `record` writes
        self._of_ranks: Sequence[dict[str, Any]] | None = None  # what each rank has measured in the present epoch

    def _steps(self) -> list[str]:
        """Return the paths of the series with a value for each batch."""
        names = ["Loss", *(name for metric in self.metrics if metric.on_step for name in metric.names)]
        return [f"cbstate.metrics_step.{name}" for name in names]

    def _of_batches(self) -> Access:
        """Declare the state that `record` reads and writes for a batch."""
        entries = ["inputs", "loss", "targets", *(["outputs"] if self.metrics or self.weight is not None else [])]
        batch = {f"batch.{name}": Read(optional=True) for name in entries}
        tracked = {path: kind for track in self._tracks for path, kind in track.access.items()}
        return {"cbstate.history": Read(), **tracked, **batch, **dict.fromkeys(self._steps(), Write())}

    def _of_epochs(self) -> Access:
        """Declare the state that `end` reads and writes for an epoch."""
        names = ["Loss", *(name for metric in self.metrics for name in metric.names)]
        epochs = {f"cbstate.metrics_epoch.{name}": Write() for name in names}
        return {"cbstate.history": Read(), **dict.fromkeys(self._steps(), Read()), **epochs}

    def metric_modes(self) -> dict[str, Literal["min", "max"]]:
        """Return, by the names of metrics, whether small or large values are good, for the metrics that say it."""
        return {name: mode for metric in self.metrics for name, mode in metric.modes.items()}

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Find out whether a callback writes the loss, which may be in place."""
        declared = [node.union for node in callbacks.nodes] if isinstance(callbacks, Callbacks) else []
        written = {path for union in declared for path, kind in union if isinstance(kind, Write)}
        self._loss_is_written = not written.isdisjoint({("batch",), ("batch", "loss")})

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        """Refuse another `Metrics`, because both would record the loss. One takes any number of metrics."""
        return Unresolvable() if isinstance(other, Metrics) else None

    def setup(self, learner: LearnerView) -> None:
        """Keep a way to the series of batches for `rank_state`, which is called between two events."""
        steps = learner.cbstate.metrics_step
        self._series = lambda phase: steps[phase]  # a function, so that a copy of this callback copies no series

    @on(EpochBegin, access={"data": Read()})
    def begin(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Forget the batches of the previous epoch, which may have been cancelled before its end."""
        self._reads_late = learner.lag > 0
        if learner.rank:  # the main rank of several warns
            self._warned.add(phase)
        self._copies_losses = self._loss_is_written or not has_bundled_step(type(phase))
        self._means = EpochMeans(repr(phase))
        self._phase, self._of_ranks = phase, None
        for metric in self.metrics:
            if self._has_run(metric, phase):
                self._run(metric, phase).reset()
        self._loader_size = _samples(learner.data.get(phase))
        self._phase_of_known_size = None

    @on(BatchEnd, access="_of_batches")
    def record(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Record the loss and the metrics of the batch."""
        batch = learner.batch
        loss, inputs = batch.loss, batch.inputs
        shape = inputs.shape if phase is self._phase_of_known_size and type(inputs) is torch.Tensor else None
        size = shape[0] if shape else self._size(phase, inputs, batch.targets)
        if self.weight is not None:
            with self._no_grad:
                size = self._weight(self.weight, "The weight of Metrics", learner, size)
        if loss is not None:
            if loss.is_cpu and not self._reads_late:
                value = loss.item()
            else:
                value = loss.detach().clone() if self._copies_losses else loss.detach()
            cbstate = learner.cbstate
            cbstate.metrics_step[phase].push("Loss", value, cbstate.history[phase].steps)
            self._means.weights["Loss"].append(size)
        if self.metrics:
            self._record_metrics(phase, learner, size)
        if self.keep is not None:
            self._shorten(learner.cbstate.metrics_step[phase], self.keep)

    def _shorten(self, steps: Any, keep: int) -> None:
        """Drop old values of the series of a phase that have become too long."""
        long = [series for name in steps if len(series := steps[name]) >= 2 * keep]
        if long:
            self._means.add_up(steps)
            for series in long:
                series.shorten(keep)

    def _record_metrics(self, phase: Phase, learner: LearnerView, size: Any) -> None:
        batch = learner.batch
        outputs, targets = batch.outputs, batch.targets
        if (outputs is None or targets is None) and not self._tracks:
            return
        if isinstance(outputs, torch.Tensor):
            outputs = outputs.detach()  # a torchmetrics object may keep them for an epoch, which would keep the graphs
        steps, series = learner.cbstate.history[phase].steps, learner.cbstate.metrics_step[phase]
        weights = self._means.weights
        with self._no_grad:
            for metric in self.metrics:
                if not isinstance(phase, metric.phase):
                    continue
                if metric.of_batch:
                    read = _tracked(metric, batch, phase)
                    if read is None:
                        continue
                elif outputs is None or targets is None:
                    continue
                elif metric.accumulates:
                    running = self._run(metric, phase)
                    running.update(outputs, targets)
                    found = values_of(metric, running.value_of(outputs, targets)) if metric.on_step else {}
                    for name, value in found.items():
                        series.push(name, value, steps)
                    continue
                else:
                    read = metric.f(outputs, targets)
                weight = size
                if metric.weight is not None:
                    weight = self._weight(metric.weight, f"The weight of {metric!r}", learner, size)
                for name, value in values_of(metric, read).items():
                    series.push(name, value, steps)
                    weights.setdefault(name, []).append(weight)

    def _weight(self, f: Callable[[Any, Any], Any], what: str, learner: LearnerView, size: Any) -> Any:
        """Return the weight of the batch by a function of the user, or its size in a phase without outputs or targets.

        The caller has entered `_no_grad`. This must not enter it again: it is one object, which remembers only one
        earlier state, so gradients would stay disabled.
        """
        outputs, targets = learner.batch.outputs, learner.batch.targets
        if outputs is None or targets is None:
            return size
        return check_weight(f(outputs, targets), what)

    def _size(self, phase: Phase, inputs: Any, targets: Any) -> Any:
        """Return how many samples a batch has; warn once for each phase if that is not certain."""
        if type(phase).batch_size is not Phase.batch_size:
            return check_weight(phase.batch_size(inputs, targets), f"{phase!r}.batch_size(inputs, targets)")
        size, certain = measure(inputs, targets)
        if certain and self._loader_size not in (None, size) and not self._means.begun:
            # If the loader makes batches of 8 and the tensors have shape (50, 8), samples are the second dimension.
            second = [tuple(getattr(each, "shape", ()))[1:2] for each in (inputs, targets)]
            certain = (self._loader_size,) not in second and (size < self._loader_size or size % self._loader_size == 0)
        if certain and type(inputs) is torch.Tensor:
            self._phase_of_known_size = phase
        if not certain and phase not in self._warned:
            self._warned.add(phase)
            warnings.warn(self._unsure(phase, inputs, targets, size), UserWarning, stacklevel=2)
        return size

    def _unsure(self, phase: Phase, inputs: Any, targets: Any, size: int) -> str:
        """Return the text of the warning that the size of a batch is not certain."""
        found = [*lengths(inputs, "batch.inputs"), *lengths(targets, "batch.targets")]
        known = ", ".join(f"{path} has length {length}" for path, length in found[:6])
        known = known or f"batch.inputs is {describe(inputs)}"
        loader = "" if self._loader_size is None else f", and the loader makes batches of {self._loader_size}"
        base = type(phase).__name__
        return (
            f"How many samples a batch of {phase!r} has cannot be told for certain: {known}{loader}. The means of an "
            f"epoch weigh this batch by {size}. Say it in a phase, and give data={{My{base}: loader}}:\n\n"
            f"    class My{base}({base}):\n"
            f"        def batch_size(self, inputs, targets):\n"
            f"            return len(targets)  # the number of samples\n"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the sums of the current epoch, and the states of torchmetrics objects."""
        if self._phase is not None and self._means.phase == repr(self._phase):
            # A checkpoint has a few sums, however many batches the epoch has had.
            self._means.add_up(self._series(self._phase))
        running = self._running.items()
        kept = [(_key(metric), repr(phase), *each.state_dict()) for (metric, phase), each in running]
        held = [*kept, *((*key, *state) for key, state in self._loaded.items())]
        return {**self._means.state_dict(), "held": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._means = EpochMeans.loaded(state)
        self._running.clear()
        self._loaded = {}
        for name, phase, parts, number in state["held"]:
            if isinstance(number, list):  # early checkpoints have one state, and the number of updates of each part
                parts, number = [(parts, number)], max(number, default=1)
            self._loaded[name, phase] = parts, number

    def _has_run(self, metric: Metric, phase: Phase) -> bool:
        return (metric, phase) in self._running or self._loaded_key(metric, phase) in self._loaded

    def _loaded_key(self, metric: Metric, phase: Phase) -> tuple[str, str]:
        """Return the key of the metric's state in a checkpoint. Early checkpoints have a collection by its own name."""
        key = _key(metric), repr(phase)
        return key if key in self._loaded else (metric.name, repr(phase))

    def _run(self, metric: Metric, phase: Phase) -> Running:
        """Return the running value of a metric in a phase, made at the first call with the state of a checkpoint."""
        running = self._running.get((metric, phase))
        if running is None:
            running = self._running[metric, phase] = Running(metric.f, metric.name, on_step=metric.on_step)
            loaded = self._loaded.pop(self._loaded_key(metric, phase), None)
            if loaded is not None:
                running.load_state_dict(*loaded)
        return running

    def rank_state(self) -> dict[str, Any]:
        """Return the sums that the means of the present epoch consist of, and the states of torchmetrics objects.

        Raises:
            RankError: An object of a user accumulates batches, and does not say how those of several ranks are merged.
        """
        phase, running = self._phase, dict[int, Any]()
        for place, metric in enumerate(self.metrics):
            if metric.accumulates:
                check_mergeable(metric.f, metric.name)
                if phase is not None and self._has_run(metric, phase):
                    running[place] = self._run(metric, phase).rank_state()
        sums = {} if phase is None else self._means.sums(self._series(phase))
        return {"sums": {name: [exact_parts(each) for each in pair] for name, pair in sums.items()}, "running": running}

    def merge_ranks(self, states: Sequence[dict[str, Any]]) -> None:
        """Keep what all ranks have measured, for the end of the epoch. Later batches of this rank may still follow."""
        self._of_ranks = states

    @on(EpochEnd, access="_of_epochs")
    def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Record the values of the epoch."""
        epoch, steps = epoch_of(learner.cbstate.history, phase), learner.cbstate.metrics_step
        results, states = learner.cbstate.metrics_epoch, self._of_ranks
        sums = self._means.sums(steps[phase]) if states is None else joined(state["sums"] for state in states)
        for place, metric in enumerate((None, *self.metrics), start=-1):
            if metric is not None and metric.accumulates:
                found = self._accumulated(place, metric, phase)
            else:
                own = "Loss" if metric is None else metric.name
                found = {name: mean(*each) for name, each in sums.items() if name.partition(".")[0] == own}
            for name, value in found.items():
                results[phase].push(name, value, epoch)
        self._phase, self._of_ranks, self._means = None, None, EpochMeans()
        if learner.cbstate.history[phase].steps_epoch:
            for track in self._tracks:
                # Another rank may have recorded it in its batches.
                track.check_recorded(phase, [*steps.values(), *results.values()])

    def _accumulated(self, place: int, metric: Metric, phase: Phase) -> dict[str, Any]:
        if not isinstance(phase, metric.phase):
            return {}
        running = self._run(metric, phase)  # also in an epoch that resumes at its end, whose state is only loaded
        if self._of_ranks is not None:
            running.merge_ranks([state["running"].get(place) for state in self._of_ranks])
        found = values_of(metric, running.compute()) if running.updates else {}
        running.reset()  # now, because a metric may have kept all outputs of the epoch in memory
        return found


def _tracked(track: Metric, batch: Any, phase: Phase) -> Any:
    """Return the value of a `Track` for a batch."""
    try:
        return track.f(batch)
    except Exception as error:
        error.add_note(
            f"raised by {track!r} in {phase!r}, where an entry that the batch lacks is None; for one kind of epoch "
            f"write Track(f, phase=TrainingPhase)"
        )
        raise


def _metric(given: Any) -> Metric:
    """Return the metric, or a metric or `Track` made of the argument of a user."""
    if isinstance(given, Metric):
        return given
    return Track(given) if is_a(given, str) and given.startswith("batch.") else Metric(given)


def _key(metric: Metric) -> str:
    """Return the name of a metric in checkpoints. Two collections have one name, but none of their members."""
    return "+".join(metric.names)


def _samples(loader: object) -> int | None:
    """Return the batch size of a loader; ``None`` if it is not known, or its only batch may be smaller."""
    loader = unlimited(loader)
    if not isinstance(loader, torch.utils.data.DataLoader):
        return None
    endless = isinstance(loader.dataset, torch.utils.data.IterableDataset)
    return loader.batch_size if endless or len(loader) > 1 else None
