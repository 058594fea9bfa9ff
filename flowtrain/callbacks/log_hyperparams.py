"""LogHyperParams: the hyperparameters whenever they change, and the settings of the run, in logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flowtrain.callback.access import Access, Read
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, EpochEnd, FitBegin
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.logging.backend import LoggerBackend, Settings, Value
from flowtrain.logging.records import log
from flowtrain.logging.values import checked_backends, settings

__all__ = ["LogHyperParams"]

_GROUP = ("HyperParams",)


class LogHyperParams(Callback):
    """Log the hyperparameters that schedules set, whenever one has changed, and the settings of the run once.

    Reads ``cbstate.hyperparams`` at the end of a training batch and of every epoch, so it runs after `Scheduler`. A
    value is logged if it differs from the last logged value. The settings are logged when the first fit begins, and
    when a run is resumed with other ones, under the name ``Settings``, to the backends that take `Settings`. Writes no
    state. Costs a comparison for each hyperparameter, and a record for each logged value and backend.

    Args:
        backends: The backends to log to.
        settings: The settings that the run was started with, such as ``{"batch_size": 32}``: numbers, texts, ``None``,
            and lists and mappings of these.

    Raises:
        LoggingError: There is no backend, an argument is no backend, or one is given twice; or a setting is not one of
            these types, or no backend takes `Settings`.

    >>> from flowtrain.logging import JsonlBackend
    >>> LogHyperParams(JsonlBackend("runs/a/log.jsonl"), settings={"batch_size": 32})
    <LogHyperParams>
    """

    deferrable = True
    quiet = True

    def __init__(self, *backends: LoggerBackend, settings: Mapping[str, Any] | None = None) -> None:
        self.backends = checked_backends("LogHyperParams", backends, Value)
        self.settings = None if settings is None else _plain(settings)
        # One backend that takes settings is enough; without it this call raises the error that names the backends.
        if settings is not None and not any(issubclass(Settings, backend.accepts) for backend in self.backends):
            checked_backends("LogHyperParams(settings=...)", backends, Settings)
        self._logged: dict[str, Any] | None = None  # the settings that were logged last
        self._last: dict[str, Any] = {}

    def state_access(self) -> Access:
        """Declare a read of ``cbstate.hyperparams``, which exists only if another callback writes it."""
        return {"cbstate.hyperparams": Read(optional=True)}

    def series(self) -> Iterable[tuple[str, type[Phase], str]]:
        """Return the series of all hyperparameters, and of the settings if there are any."""
        names = ("cbstate.hyperparams",) if self.settings is None else ("cbstate.hyperparams", "Settings")
        return [(*_GROUP, Phase, name) for name in names]

    @on(FitBegin, access={}, enabled="settings")
    def log_settings(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Log the settings, once in the life of the run, and again when a run is resumed with other ones."""
        if self.settings is not None and self._logged != self.settings:
            self._logged = self.settings
            log(self.backends, Settings(self.settings), "Settings", 0, _GROUP)

    @on(BatchEnd, AbstractTrainingPhase)
    def log_step(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Log the hyperparameters that have changed in the batch."""
        self._log(learner)

    @on(EpochEnd)
    def log_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Log the hyperparameters that have changed after the last batch."""
        self._log(learner)

    def _log(self, learner: LearnerView) -> None:
        hyperparams = learner.cbstate.hyperparams
        for name, series in hyperparams.items() if hyperparams is not None else ():
            if len(series):
                step, value = series.last()
                if name not in self._last or self._last[name] != value:
                    self._last[name] = value
                    log(self.backends, Value(value), name, step, _GROUP)

    def state_dict(self) -> dict[str, Any]:
        """Return the last logged value of each hyperparameter, and the settings that were logged last."""
        return {"last": dict(self._last), "logged": self._logged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        logged = state["logged"]  # in early checkpoints whether settings were logged, and not which ones
        self._last = dict(state["last"])
        self._logged = self.settings if logged is True else logged or None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return settings(values, "LogHyperParams(settings=...)")
