"""EarlyStopping: end training when a criterion finds that a metric does not improve any more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from operator import itemgetter
from typing import Any

from flowtrain.callback.access import Access, Read
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import EpochEnd, FitBegin, FitEnd
from flowtrain.callback.phases import AbstractTrainingPhase, Phase, ValidationPhase
from flowtrain.callback.view import LearnerView
from flowtrain.callbacks.monitoring import (
    UNKNOWN_METRIC,
    Mode,
    check_monitor,
    direction,
    not_recorded,
    value_of_epoch,
    watched_phase,
)
from flowtrain.callbacks.stopping.criteria import Patience
from flowtrain.callbacks.stopping.criterion import Criterion, Disjunction
from flowtrain.errors import CancelFittingException, UsageError
from flowtrain.errors.arguments import is_a, is_whole

__all__ = ["EarlyStopping"]

_CALL = "EarlyStopping(..."


class EarlyStopping(Callback):
    """End training after an epoch of the watched phase, when a criterion is met.

    Raises `CancelFittingException`: `fit` ends normally, and the text of ``learner.stopped`` names the criterion, its
    reason, and the epoch. Phases that come later in ``data`` do not run in that epoch. Criteria continue over several
    fits, and are reset by the fit after the one that they have ended. A run that they have ended ends at once if it is
    resumed from its last checkpoint, unless its criteria are changed: then the fit continues. Outside of `fit`, as in
    ``learner.validate()``, no metric is watched. In a training of several ranks the main rank decides for all of them,
    so that there is one clock for `flowtrain.callbacks.stopping.TimeLimit`.

    - Reads ``cbstate.metrics_epoch.<monitor>`` and ``cbstate.history`` at `EpochEnd`, so it runs after `Metrics` and
      `Recorder`; and ``data`` at `FitBegin`. Writes no state.
    - Costs a comparison an epoch.

    Args:
        criteria: Criteria of `flowtrain.callbacks.stopping`; any of them ends training. A whole number is a patience.
        patience: The number of epochs without an improvement that ends training: ``Patience(patience)``.
        monitor: The metric, by its name in ``cbstate.metrics_epoch``. For a metric with several values name one of
            these, as ``"F1.cat"``.
        phase: The phase whose epochs are watched. If ``data`` has no phase of exactly this type, the only
            phase of a subclass is watched.
        mode: ``"min"`` if small values of the metric are good, ``"max"`` if large values are. Needed only for metrics
            that do not say it themselves; the loss, the metrics of `flowtrain.metrics`, torchmetrics objects and
            ``Metric(f, mode=...)`` do.

    Raises:
        UsageError: There is no criterion, or an argument is out of its range. When the learner is built: `mode` is
            needed. At `FitBegin`: ``data`` has not `phase`, or several of its subclasses. At the end of an epoch: the
            metric is not computed in that phase. To watch a metric that is recorded only in every n-th epoch write
            ``throttle(EarlyStopping(3), EpochEnd, every=n)``.
        MissingStateError: When the learner is built: there is no metric of that name.

    >>> from flowtrain.callbacks.stopping import GL, TimeLimit
    >>> EarlyStopping(GL(alpha=5), TimeLimit(3600), monitor="Accuracy", mode="max").criterion
    Disjunction(GL(5), TimeLimit(3600))
    """

    ranks = "main"
    missing = UNKNOWN_METRIC

    def __init__(
        self,
        *criteria: Criterion | int,
        patience: int | None = None,
        monitor: str = "Loss",
        phase: type[Phase] = ValidationPhase,
        mode: Mode | None = None,
    ) -> None:
        chosen = [*criteria, *([] if patience is None else [patience])]
        if not chosen:
            raise UsageError(
                "EarlyStopping() has no criterion. Write EarlyStopping(patience=5) or EarlyStopping(GL())."
            )
        check_monitor("EarlyStopping", monitor, phase, mode)
        if patience is not None and not (is_whole(patience) and patience >= 1):
            raise UsageError(
                f"EarlyStopping(patience={patience!r}): patience is a whole number, at least 1; with 1 the first epoch "
                f"without an improvement ends training, as with 0 in Keras."
            )
        self.criterion = Disjunction(*map(_criterion, chosen))
        self.monitor = monitor
        self.phase = phase
        self.mode: Mode | None = mode
        self._direction: Mode = mode or "min"  # `check_callbacks` replaces it by the mode of the metric
        self._watched: Phase | None = None  # the phase of `data` that is watched in this fit
        self._training: Phase | None = None  # the training phase, if a criterion needs its values
        self._seen = 0  # how many values of the training phase the criterion has been given
        self._ended = ""  # the message with which a criterion has ended the last fit

    def stateful(self) -> Iterator[object]:
        """Yield this callback, its conditions and its criteria."""
        yield from super().stateful()
        yield from self.criterion.parts()

    def _reads(self) -> Access:
        return {f"cbstate.metrics_epoch.{self.monitor}": Read(), "cbstate.history": Read()}

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Find out whether small or large values of the metric are good."""
        self._direction = direction(_CALL, self.monitor, self.mode, callbacks)

    @on(FitBegin, access={"data": Read()})
    def begin(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Find the watched phase in the data, and tell the criteria that a fit begins."""
        if self._ended and event.resumed:
            raise CancelFittingException(self._ended)
        phases = list(learner.data)
        self._watched = watched_phase(self.name or "EarlyStopping", _CALL, self.phase, phases)
        if self.criterion.needs_training:
            self._training = self._only_training(phases)
        if self._ended:
            self.criterion.reset()
            self._ended = ""
        self.criterion.begin(self._direction)

    @on(EpochEnd, "phase", access="_reads")
    def watch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Give the value of the epoch to the criteria, and end training if one of them is met."""
        if phase is not self._watched:
            return
        metrics, who = learner.cbstate.metrics_epoch, self.name or "EarlyStopping"
        found = value_of_epoch(who, _CALL, self.monitor, phase, metrics, learner.cbstate.history)
        if found is None:
            return
        epoch, value = found
        why = self.criterion.update(value, self._new_of_training(metrics))
        if why is not None:
            self._ended = (
                f"{who} ends training after epoch {epoch} of {phase!r}. {why}. "
                f"{self.monitor} is {value:.6g}; {self._best(metrics[phase][self.monitor])}."
            )
            raise CancelFittingException(self._ended)

    @on(FitEnd)
    def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Stop watching: epochs outside of a fit do not count."""
        self._watched = self._training = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the criteria, and the message with which one of them has ended the last fit."""
        ended = {"ended": self._ended, "by": repr(self.criterion)}
        return {"criterion": self.criterion.state_dict(), "seen": self._seen, **ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            CheckpointError: `state` is of criteria of other types.
        """
        self.criterion.load_state_dict(state["criterion"])
        self._seen = state["seen"]
        self._ended = state["ended"] if state["by"] == repr(self.criterion) else ""

    def _new_of_training(self, metrics: Any) -> list[float]:
        """Return the values of the training phase that the criteria have not been given yet."""
        if self._training is None:
            return []
        series = metrics[self._training].get(self.monitor)
        if not series:
            raise not_recorded(self.name or "EarlyStopping", _CALL, self.monitor, self._training, metrics)
        seen, self._seen = self._seen, len(series)
        values: list[float] = series.since(seen)
        return values

    def _best(self, series: Any) -> str:
        numbers = [(epoch, value) for epoch, value in series if value == value]  # NaN is not equal to itself
        if not numbers:
            return "it never was a number"
        epoch, best = (min if self._direction == "min" else max)(numbers, key=itemgetter(1))
        return f"its best value was {best:.6g}, in epoch {epoch}"

    def _only_training(self, phases: Sequence[Phase]) -> Phase:
        found = [phase for phase in phases if isinstance(phase, AbstractTrainingPhase)]
        if len(found) == 1:
            return found[0]
        raise UsageError(
            f"{self.criterion!r} needs the values of one training phase, and the data has "
            f"{', '.join(map(repr, phases))}. Use a criterion without them, such as GL."
        )


def _criterion(given: Any) -> Any:
    """Return the criterion; for a whole number, a `Patience`. `Disjunction` refuses any other value."""
    if is_a(given, str):
        raise UsageError(
            f"EarlyStopping({given!r}): a metric is named by monitor=. Write EarlyStopping(patience=5, monitor='Loss')."
        )
    return Patience(given) if is_a(given, Integral) else given
