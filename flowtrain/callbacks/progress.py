"""ProgressBar: how far the epoch is."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from flowtrain.access import Access, Read, Write
from flowtrain.callback import Callback, on
from flowtrain.events import BatchEnd, EpochBegin, EpochCancelled, EpochEnd, FitBegin, FitEnd
from flowtrain.phases import AbstractTrainingPhase, Phase
from flowtrain.protect import LearnerView
from flowtrain.terminal import console

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["ProgressBar"]


class ProgressBar(Callback):
    """Show a bar for the current epoch: one line for the whole fit, redrawn at most five times a second.

    While the bar is there, what is printed goes above it. Where the output is no terminal there is no bar; an epoch
    that takes long prints a plain line now and then.

    Args:
        redraw: Seconds between two redraws, at least.
        report: Seconds between two plain lines, at least, where the output is no terminal.
    """

    def __init__(self, redraw: float = 0.2, report: float = 60.0) -> None:
        self.redraw = redraw
        self.report = report
        self._progress: Progress | None = None
        self._task: Any = None
        self._within_fit = False
        self._epochs: int | None = None
        self._steps: int | None = None
        self._next = 0.0
        self._terminal = False

    def state_access(self) -> Access:
        return {
            "cbstate.history": Read(),
            "cbstate.metrics_step.Loss": Read(optional=True),
            "data": Read(),
            "resource.terminal": Write(),
        }

    @on(FitBegin, access={"resource.terminal": Write()})
    def begin_fit(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        self._within_fit = True
        self._epochs, self._steps = event.epochs, event.steps
        self._start()

    @on(EpochBegin, access={"cbstate.history": Read(), "data": Read(), "resource.terminal": Write()})
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        self._start()
        done = learner.cbstate.history[phase].epochs
        total = f"/{self._epochs}" if self._epochs is not None and done < self._epochs else ""
        self._title = f"{phase!r} epoch {done + 1}{total}"
        self._total = _length(learner.data.get(phase))
        if self._steps is not None and isinstance(phase, AbstractTrainingPhase):
            self._total = None  # an epoch is not a pass of the loader then
        self._next = time.monotonic() + (0 if self._terminal else self.report)
        if self._progress is not None:
            self._progress.reset(self._task, description=self._title, total=self._total, loss="")
            self._progress.refresh()

    @on(BatchEnd, access={"cbstate.history": Read(), "cbstate.metrics_step.Loss": Read(optional=True), "resource.terminal": Write()})
    def advance(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (self.redraw if self._terminal else self.report)
        steps = learner.cbstate.history[phase].steps_epoch
        series = learner.cbstate.metrics_step[phase]["Loss"]
        loss = f"Loss {series.last()[1]:.4g}" if series is not None and len(series) else ""
        if self._progress is not None:
            self._progress.update(self._task, completed=steps, loss=loss, refresh=True)
        elif not self._terminal:
            total = f"/{self._total}" if self._total is not None else ""
            line = f"{self._title}  batch {steps}{total}  {loss}".rstrip()
            console().print(line, markup=False, highlight=False, soft_wrap=True)

    @on(EpochEnd, access={"cbstate.history": Read(), "resource.terminal": Write()})
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=learner.cbstate.history[phase].steps_epoch, refresh=True)
        if not self._within_fit:
            self._stop()

    @on(EpochCancelled, access={"resource.terminal": Write()})
    def cancel_epoch(self, event: EpochCancelled, phase: Phase, learner: LearnerView) -> None:
        if not self._within_fit:
            self._stop()

    @on(FitEnd, access={"resource.terminal": Write()})
    def end_fit(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        self._within_fit = False
        self._epochs = self._steps = None
        self._stop()

    def _start(self) -> None:
        terminal = console()
        self._terminal = terminal.is_terminal
        if self._progress is not None or not self._terminal:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=terminal,
            auto_refresh=False,  # no thread beside the training: handlers redraw
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, loss="")
        self._progress.start()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
