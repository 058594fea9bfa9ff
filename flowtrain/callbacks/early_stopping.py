"""EarlyStopping: end training when a metric says that it is time to."""

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
from flowtrain.callbacks.stopping.criteria import Patience
from flowtrain.callbacks.stopping.criterion import Criterion, Disjunction, Mode, direction, several
from flowtrain.errors import CancelFittingException, UsageError, is_a, is_type
from flowtrain.state.by_phase import epoch_of

__all__ = ["EarlyStopping"]


class EarlyStopping(Callback):
    """End training when a criterion says so, after an epoch of the watched phase.

    Raises `CancelFittingException`: `fit` ends normally, and ``learner.stopped`` says which criterion it was, why, and
    after which epoch. Phases that come later in ``data`` are not run in that epoch. Criteria go on over several fits,
    and begin anew with the fit after the one that they have ended. A run that they have ended and that is resumed from
    its last checkpoint ends at once, unless the criteria are changed: then they go on. Outside of `fit`, as in
    ``learner.validate()``, nothing is watched.

    - Reads ``cbstate.metrics_epoch.<monitor>`` and ``cbstate.history`` at `EpochEnd`, so it runs after `Metrics` and
      `Recorder`; and ``data`` at `FitBegin`. Writes nothing.
    - Costs a few microseconds an epoch.

    Args:
        criteria: Of `flowtrain.callbacks.stopping`; any of them ends training. A whole number is a patience.
        patience: For how many epochs there may be no improvement: ``Patience(patience)``.
        monitor: The metric, by its name in ``cbstate.metrics_epoch``; of one with several values, one of these, as
            ``"F1.cat"``.
        phase: The phase. One of its subclasses is watched if that is what ``data`` has.
        mode: ``"min"`` if small values are good, ``"max"`` if large ones are. Without it, what is known of the metric:
            of the loss, the metrics of `flowtrain.metrics`, torchmetrics objects, and ``Metric(f, mode=...)``.

    Raises:
        UsageError: There is no criterion, or an argument means nothing. When the learner is built: without `mode`,
            nothing is known of the metric. At `FitBegin`: `phase` is not in ``data``. At
            the end of an epoch: the metric is not computed in that phase. To watch a metric that is recorded only in
            every n-th epoch write ``throttle(EarlyStopping(3), EpochEnd, every=n)``.
        MissingStateError: When the learner is built: there is no metric of that name.

    >>> from flowtrain.callbacks.stopping import GL, TimeLimit
    >>> EarlyStopping(GL(alpha=5), TimeLimit(3600), monitor="Accuracy", mode="max").criterion
    Disjunction(GL(5), TimeLimit(3600))
    """

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
        if not is_a(monitor, str) or not all(monitor.split(".")):
            raise UsageError(f"EarlyStopping(monitor={monitor!r}): monitor is the name of a metric, such as 'Loss'.")
        if not is_type(phase, Phase):
            raise UsageError(f"EarlyStopping(phase={phase!r}) is no phase type. Write phase=ValidationPhase.")
        if mode not in ("min", "max", None):
            raise UsageError(
                f"EarlyStopping(mode={mode!r}): mode is 'min' if small values of {monitor} are good, otherwise 'max'."
            )
        self.criterion = Disjunction(*map(_criterion, chosen))
        self.monitor = monitor
        self.phase = phase
        self.mode: Mode | None = mode
        self._direction: Mode = mode or "min"  # what is known of the metric, once the learner is built
        self._watched: Phase | None = None  # the phase of `data` that is watched in this fit
        self._training: Phase | None = None
        self._seen = 0  # how many values of training the criterion has been given
        self._ended = ""  # the message with which it has ended the last fit

    def stateful(self) -> Iterator[object]:
        """Yield this callback, its conditions and its criteria."""
        yield from super().stateful()
        yield from self.criterion.parts()

    def _reads(self) -> Access:
        return {f"cbstate.metrics_epoch.{self.monitor}": Read(), "cbstate.history": Read()}

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Find out whether small or large values are good."""
        self._direction = direction("EarlyStopping(...", self.monitor, self.mode, callbacks)

    @on(FitBegin, access={"data": Read()})
    def begin(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Find the watched phase in the data, and let the criteria begin."""
        if self._ended and event.resumed:
            raise CancelFittingException(self._ended)
        phases = list(learner.data)
        self._watched = self._find(self.phase, phases)
        if self.criterion.needs_training:
            self._training = self._find(AbstractTrainingPhase, phases)
        if self._ended:
            self.criterion.reset()
            self._ended = ""
        self.criterion.begin(self._direction)

    @on(EpochEnd, "phase", access="_reads")
    def watch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Give the value of the epoch to the criteria, and end training if one says so."""
        if phase is not self._watched:
            return
        history, metrics = learner.cbstate.history, learner.cbstate.metrics_epoch
        series = metrics[phase].get(self.monitor)
        if not series:
            if history[phase].steps_epoch:
                raise self._not_recorded(metrics, phase)
            return  # an epoch without a completed batch
        epoch, value = series.last()
        if epoch != epoch_of(history, phase) or not history[phase].steps_epoch:
            return  # nothing was recorded in this one
        why = self.criterion.update(value, self._new_of_training(metrics))
        if why is not None:
            self._ended = (
                f"{self.name or 'EarlyStopping'} ends training after epoch {epoch} of {phase!r}. {why}. "
                f"{self.monitor} is {value:.6g}; {self._best(series)}."
            )
            raise CancelFittingException(self._ended)

    @on(FitEnd)
    def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Watch no more."""
        self._watched = self._training = None

    def state_dict(self) -> dict[str, Any]:
        """Return what the criteria remember."""
        ended = {"ended": self._ended, "by": repr(self.criterion)}
        return {"criterion": self.criterion.state_dict(), "seen": self._seen, **ended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            CheckpointError: It is the state of other criteria.
        """
        self.criterion.load_state_dict(state["criterion"])
        self._seen = state["seen"]
        self._ended = state["ended"] if state["by"] == repr(self.criterion) else ""

    def _new_of_training(self, metrics: Any) -> list[float]:
        """Return the values of training that the criteria have not been given."""
        if self._training is None:
            return []
        series = metrics[self._training].get(self.monitor)
        if not series:
            raise self._not_recorded(metrics, self._training)
        seen, self._seen = self._seen, len(series)
        values: list[float] = series.since(seen)
        return values

    def _best(self, series: Any) -> str:
        numbers = [(epoch, value) for epoch, value in series if value == value]  # NaN equals nothing
        if not numbers:
            return "it never was a number"
        epoch, best = (min if self._direction == "min" else max)(numbers, key=itemgetter(1))
        return f"its best value was {best:.6g}, in epoch {epoch}"

    def _not_recorded(self, metrics: Any, phase: Phase) -> UsageError:
        others = ", ".join(repr(other) for other in metrics if metrics[other].get(self.monitor))
        there = f"; it is recorded in {others}" if others else several(self.monitor, metrics[phase])
        return UsageError(
            f"{self.name or 'EarlyStopping'} needs {self.monitor!r} of {phase!r}, and nothing was recorded by the end "
            f"of its first epoch{there}. Give Metrics a metric that is computed in this phase. If it is recorded in "
            f"every n-th epoch only, write throttle(EarlyStopping(...), EpochEnd, every=n)."
        )

    def _find(self, wanted: type[Phase], phases: Sequence[Phase]) -> Phase:
        fitting = [phase for phase in phases if isinstance(phase, wanted)]
        exact = [phase for phase in fitting if type(phase) is wanted]
        found = exact or fitting
        if len(found) == 1:
            return found[0]
        listed = ", ".join(map(repr, phases)) or "nothing"
        if wanted is self.phase:
            missing = "and the data has several of that kind" if found else "which the data does not have"
            raise UsageError(
                f"{self.name or 'EarlyStopping'} watches {wanted.__name__}, {missing}. The data has {listed}. "
                f"Write EarlyStopping(..., phase={phases[-1]!r})."
            )
        raise UsageError(
            f"{self.criterion!r} needs the values of one training phase, and the data has {listed}. "
            f"Use a criterion without them, such as GL."
        )


def _criterion(given: Any) -> Any:
    """Return a criterion; a whole number is a patience, and `Disjunction` refuses what is neither."""
    return Patience(given) if is_a(given, Integral) else given
