"""ProgressBar: the progress of the current epoch.

On a terminal the bar has the last line for itself (`flowtrain.callbacks.terminal.BottomLine`), in a notebook it is an
output of the cell (`flowtrain.callbacks.terminal.CellOutput`). Into files and pipes a long epoch prints plain lines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, EpochBegin, EpochCancelled, EpochEnd, FitBegin, FitEnd
from flowtrain.callback.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.callbacks.metrics_printer import MetricsPrinter, number_text, rate_text
from flowtrain.callbacks.terminal import BottomLine, CellOutput, console, place_for, say
from flowtrain.data.batch_size import samples_given
from flowtrain.data.loaders import length
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.state.by_phase import Counts, epoch_of
from flowtrain.state.device_values import Reading

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["ProgressBar"]

_TERMINAL: Access = {"resource.terminal": Write()}


class ProgressBar(Callback):
    """Show a bar for the current epoch: one line for the whole fit, redrawn at most five times a second.

    While the bar is shown, all other output of the program appears above it. In a notebook the bar is an output of the
    cell. If the output is a file or a pipe there is no bar, and a long epoch prints a plain line every minute. The
    terminal is the one of ``rich.get_console()``. Without a `MetricsPrinter` the bar prints why a fit has ended early.

    The bar has the loss, and the metrics that callbacks of the learner monitor, such as `EarlyStopping` and
    `Checkpointer`: the value of the batch, or of the last epoch of this phase for a metric that batches do not have. It
    has the number of samples a second in this epoch, of all ranks together, if the loader has a ``batch_size``. Of
    several ranks the main rank has the bar, with the values of its own batches. On an accelerator the values
    are requested from the device at a redraw, and shown at a redraw that is ``TorchCore(lag=2)`` batches later or more.

    Reads ``data`` and ``cbstate.history``, and ``cbstate.metrics_step`` and ``cbstate.metrics_epoch`` if a callback
    writes them, so it runs after `Recorder` and `Metrics`. Writes to the terminal, ``resource.terminal``, and no state.
    Costs a look at the clock for each batch, and the drawing of a line for each redraw.

    Args:
        redraw: The least time between two redraws, in seconds.
        report: The least time between two plain lines, in seconds, if the output is no terminal.

    Raises:
        UsageError: `redraw` or `report` is negative or no number.

    >>> from flowtrain.testing import tiny_learner
    >>> history = tiny_learner(ProgressBar()).fit(1)  # no line: no terminal, and a short epoch
    """

    audited = False

    def __init__(self, redraw: float = 0.2, report: float = 60.0) -> None:
        for name, seconds, usual in (("redraw", redraw, 0.2), ("report", report, 60.0)):
            if not is_a(seconds, Real) or is_a(seconds, bool) or not seconds >= 0:
                raise UsageError(
                    f"ProgressBar({name}={seconds!r}): {name} is a number of seconds, at least 0, such as {usual}."
                )
        self.redraw = redraw
        self.report = report
        self._fit: FitBegin | None = None
        self._before: dict[Phase, Counts] = {}  # the counts of each phase before its first epoch in this fit
        self._title = ""
        self._total: int | None = None
        self._since: int | None = None  # show the steps since this one; None shows the steps of the epoch
        self._line: BottomLine | CellOutput | None = None  # None prints plain lines
        self._progress: Progress | None = None
        self._drawn = -math.inf  # when the bar was last drawn
        self._next = math.inf  # when to draw or print next; never outside of an epoch
        self._tells = True  # whether to print why a fit has ended
        self._names = ["Loss"]  # the metrics in the bar, which `check_callbacks` finds
        self._begun = (0.0, 0)  # when the epoch began, and how many batches there were before
        self._values: dict[str, Any] = {}  # the values to show, by name
        # Values of the device, all values by name, and the step at which to read them.
        self._requested: tuple[Reading, dict[str, Any], int] | None = None

    def state_access(self) -> Access:
        """Declare reads of the counts, the loaders and the metrics, and the terminal."""
        return {
            "cbstate.history": Read(),
            "cbstate.metrics_epoch": Read(optional=True),
            "cbstate.metrics_step": Read(optional=True),
            "data": Read(),
            "resource.terminal": Write(),
        }

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Find out which metrics the callbacks monitor, and whether a `MetricsPrinter` says why a fit has ended."""
        # The reason for an early end is printed once, by the callback that prints the results, or else by this one.
        self._tells = not any(isinstance(callback, MetricsPrinter) for callback in callbacks)
        monitored: list[Any] = [getattr(callback, "monitor", None) for callback in callbacks]
        self._names = list(dict.fromkeys(["Loss", *(name for name in monitored if is_a(name, str))]))

    @on(FitBegin, access={"cbstate.history": Read()})
    def begin_fit(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Remember the length of the fit, and the counts of training before it if the fit resumes."""
        self._fit = event
        # `done` is a number of epochs or of steps, and `_describe` reads only the count of the same unit.
        before: dict[Phase, Counts] = {
            each: Counts((counts.epochs - event.done, counts.steps - event.done, 0, 0))
            for each, counts in learner.cbstate.history.items()
            if isinstance(each, AbstractTrainingPhase)
        }
        self._before = before if event.resumed else {}

    @on(EpochBegin, access={"cbstate.history": Read(), "data": Read(), **_TERMINAL})
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Begin a new bar on the same line."""
        self._describe(phase, learner.cbstate.history, length(learner.data.get(phase)))
        self._progress = None
        now = time.monotonic()
        self._begun = now, learner.cbstate.history[phase].steps
        if self._line is None:
            self._line = place_for(console())
        if self._line is None:
            self._next = now + self.report
        elif now >= self._drawn + self.redraw:
            self._draw(self._line, now, 0 if self._since is None else self._begun[1] - self._since, [])
        else:
            self._next = self._drawn + self.redraw

    @on(BatchEnd)
    def advance(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Redraw the bar or print a line, if the least time since the last one has passed."""
        now = time.monotonic()
        if now < self._next:
            return
        counts = learner.cbstate.history[phase]
        self._update_values(phase, learner, counts.steps)
        done = counts.steps_epoch if self._since is None else counts.steps - self._since
        begun, before = self._begun
        given = samples_given(learner.data.get(phase), counts.steps - before)
        rate = rate_text(given, now - begun, learner.world_size)
        texts = [*(f"{name} {number_text(value)}" for name, value in self._values.items()), *rate]
        if self._line is not None:
            self._draw(self._line, now, done, texts)
        elif self._requested is None:
            self._print(now, done, texts)
        else:  # a line is printed once, so it waits for its values
            self._next = -math.inf

    def _update_values(self, phase: Phase, learner: LearnerView, steps: int) -> None:
        """Update the values to show. Those on a device are requested, and read `lag` batches later at the earliest."""
        if self._requested is None:
            values = self._newest(phase, learner.cbstate)
            tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
            if tensors:
                self._requested = Reading(tensors), values, steps + learner.lag
            else:
                self._values = values
            return
        reading, values, due = self._requested
        # Reading earlier would wait for the device, which may still compute the batches in between.
        if steps >= due:
            late = [name for name, value in values.items() if isinstance(value, torch.Tensor)]
            values.update(zip(late, reading.numbers(), strict=True))
            self._values, self._requested = values, None

    def _newest(self, phase: Phase, cbstate: Any) -> dict[str, Any]:
        """Return the newest value of each metric that the bar shows, without waiting for the device."""
        found: dict[str, Any] = {}
        for container in (cbstate.metrics_epoch, cbstate.metrics_step):  # a value of the batch replaces one of an epoch
            by_name = {} if container is None else container[phase]
            found.update({name: by_name[name].newest() for name in self._names if by_name.get(name)})
        return {name: found[name] for name in self._names if name in found}

    @on(EpochEnd, access=_TERMINAL)
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """End the bar of the epoch. Outside of a fit the line is given back, since no further epoch may come."""
        self._close_epoch()

    @on(EpochCancelled, access=_TERMINAL)
    def cancel_epoch(self, event: EpochCancelled, phase: Phase, learner: LearnerView) -> None:
        """End the bar of the epoch. Outside of a fit the line is given back, since no further epoch may come."""
        self._close_epoch()

    @on(FitEnd, access=_TERMINAL)
    def end_fit(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Give the last line back to the terminal, and print why the fit has ended if nothing else does."""
        self._fit = None
        self._before.clear()
        self._close_epoch()
        if event.stopped and self._tells:
            say(event.stopped)

    def _describe(self, phase: Phase, history: Mapping[Phase, Counts], length: int | None) -> None:
        """Set the title of the bar of an epoch, the number that it counts, and the total."""
        counts, evaluates = history[phase], isinstance(phase, AbstractValidationPhase)
        number = epoch_of(history, phase) if evaluates else counts.epochs + 1
        self._title, self._total, self._since = f"{phase!r} epoch {number}", length, None
        if self._fit is None:
            return
        before = self._before.setdefault(phase, counts)
        if self._fit.epochs is not None:
            trained = [each.epochs for other, each in self._before.items() if isinstance(other, AbstractTrainingPhase)]
            begun = max(trained, default=None) if evaluates else before.epochs
            self._title += "" if begun is None else f"/{begun + self._fit.epochs}"
        elif isinstance(phase, AbstractTrainingPhase):
            # In a fit by steps an epoch need not be a pass of the loader, so the bar shows the steps of the whole fit.
            self._title, self._total, self._since = f"{phase!r} steps", self._fit.steps, before.steps

    def _draw(self, line: BottomLine | CellOutput, now: float, done: int, texts: Sequence[str]) -> None:
        self._drawn, self._next = now, now + self.redraw
        line.show(lambda: self._bar(line, done, texts))

    def _bar(self, line: BottomLine | CellOutput, done: int, texts: Sequence[str]) -> Any:
        """Return the bar, which rich draws on a terminal and in a notebook.

        On a terminal it is one line, which has as many of the texts as have room. In a notebook, where the width of the
        cell is not known, the texts are below the bar.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column, Table
        from rich.text import Text

        one_line, shown = isinstance(line, BottomLine), list(texts)
        room = line.console.width - len(self._title) - 2 * len(str(self._total)) - 18  # beside a bar of 4 columns
        # The loss is the first of the texts, so it is the last one that a narrow terminal loses.
        while one_line and len("  ".join(shown)) > room and shown:
            shown.pop()
        if self._progress is None:  # used for its columns and its estimate; it is not started, so it never draws itself
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(30),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),  # so that only the bar shrinks
                *([TextColumn("{task.fields[text]}", markup=False)] if one_line else []),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                console=line.console,
            )
            self._progress.add_task(self._title, total=self._total, completed=done, text="")
        self._progress.update(self._progress.task_ids[0], completed=done, text="  ".join(shown))
        bar = self._progress.make_tasks_table(self._progress.tasks)
        if one_line:
            return bar
        lines = Table.grid()
        lines.add_row(bar)
        lines.add_row(Text("  ".join(shown)))
        return lines

    def _print(self, now: float, done: int, texts: Sequence[str]) -> None:
        self._next = now + self.report
        total = f"/{self._total}" if self._total is not None else ""
        line = "  ".join([self._title, f"batch {done}{total}", *texts])
        say(line)

    def _close_epoch(self) -> None:
        # A step outside of an epoch fires `BatchEnd` too, and has no bar: with this time no redraw is due at it.
        self._next = math.inf
        self._values, self._requested = {}, None
        self._begun = (0.0, 0)
        self._progress = None
        if self._fit is None and self._line is not None:
            self._line.close()
            self._line = None
