"""LogHyperParams: hyperparameters as they change, and the settings of the run, in logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flowtrain.callback.access import Access, Read
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, EpochEnd, FitBegin
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.logging.backend import LoggerBackend, Settings, Value, log
from flowtrain.logging.values import checked_backends, settings

__all__ = ["LogHyperParams"]

_GROUP = ("HyperParams",)


class LogHyperParams(Callback):
    """Log the hyperparameters that schedules set, whenever one has changed, and the settings of the run once.

    Reads ``cbstate.hyperparams`` at the end of a training batch and of every epoch, and runs after whoever writes it.
    A value is logged if it is not the one that was logged last. The settings are logged when the first fit begins,
    under the name ``Settings``, to the backends that take `Settings`. Costs a comparison for each hyperparameter, and
    about 20 microseconds for each value that is logged and backend of files.

    Args:
        backends: Where to log to.
        settings: What the run was started with, such as ``{"batch_size": 32}``: numbers, texts, ``None``, and lists
            and mappings of these.

    Raises:
        LoggingError: No backend, something that is none, or one twice; settings that are not plain, or that no
            backend takes.

    >>> from flowtrain.logging import JsonlBackend
    >>> LogHyperParams(JsonlBackend("runs/a/log.jsonl"), settings={"batch_size": 32})
    <LogHyperParams>
    """

    deferrable = True
    quiet = True

    def __init__(self, *backends: LoggerBackend, settings: Mapping[str, Any] | None = None) -> None:
        self.backends = checked_backends("LogHyperParams", backends, Value)
        self.settings = None if settings is None else _plain(settings)
        if settings is not None and not any(issubclass(Settings, backend.accepts) for backend in self.backends):
            checked_backends("LogHyperParams(settings=...)", backends, Settings)
        self._logged = False
        self._last: dict[str, Any] = {}

    def state_access(self) -> Access:
        return {"cbstate.hyperparams": Read(optional=True)}

    def series(self) -> Iterable[tuple[str, type[Phase], str]]:
        names = ("cbstate.hyperparams",) if self.settings is None else ("cbstate.hyperparams", "Settings")
        return [(*_GROUP, Phase, name) for name in names]

    @on(FitBegin, access={}, enabled="settings")
    def log_settings(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Log the settings, if that has not been done yet."""
        if self.settings is not None and not self._logged:
            self._logged = True
            log(self.backends, Settings(self.settings), "Settings", 0, _GROUP)

    @on(BatchEnd, AbstractTrainingPhase)
    def log_step(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Log what has changed in the batch."""
        self._log(learner)

    @on(EpochEnd)
    def log_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Log what has changed after the last batch."""
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
        """Return what was logged last, and whether the settings were."""
        return {"last": dict(self._last), "logged": self._logged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._last, self._logged = dict(state["last"]), bool(state["logged"])


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return settings(values, "LogHyperParams(settings=...)")
