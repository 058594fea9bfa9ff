"""ProgressBar: how far the epoch is.

On a terminal the bar has the last line for itself: the lines above it become the region that scrolls, as when a
package manager installs. So whatever is printed, by whomever and through whichever stream, goes above the bar, and no
stream has to be replaced. Where the output is no terminal, long epochs print plain lines.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import math
import os
import time
from typing import TYPE_CHECKING, Any, ClassVar

from flowtrain.access import Access, Read, Write
from flowtrain.callback import Callback, on
from flowtrain.errors import UsageError
from flowtrain.events import BatchEnd, EpochBegin, EpochCancelled, EpochEnd, FitBegin, FitEnd
from flowtrain.phases import AbstractTrainingPhase, Phase
from flowtrain.protect import LearnerView
from flowtrain.series import Counts

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["ProgressBar"]

_TERMINAL: Access = {"resource.terminal": Write()}


class ProgressBar(Callback):
    """Show a bar for the current epoch: one line for the whole fit, redrawn at most five times a second.

    While the bar is there, what is printed goes above it. Where the output is no terminal there is no bar; an epoch
    that takes long prints a plain line now and then. The terminal is the one of ``rich.get_console()``.

    Args:
        redraw: Seconds between two redraws, at least.
        report: Seconds between two plain lines, at least, where the output is no terminal.

    Raises:
        UsageError: One of the two is negative or no number.
    """

    def __init__(self, redraw: float = 0.2, report: float = 60.0) -> None:
        for name, seconds in (("redraw", redraw), ("report", report)):
            if not isinstance(seconds, (int, float)) or not seconds >= 0:
                raise UsageError(f"ProgressBar({name}={seconds!r}): {name} is a number of seconds, at least 0.")
        self.redraw = redraw
        self.report = report
        self._fit: FitBegin | None = None
        self._before: dict[Phase, Counts] = {}  # where each phase was when the fit met it
        self._title = ""
        self._total: int | None = None
        self._since: int | None = None  # count the steps from this one on, not those of the epoch
        self._line: _BottomLine | None = None  # none: plain lines
        self._progress: Progress | None = None
        self._drawn = -math.inf
        self._next = math.inf  # no epoch is open: nothing to show

    def state_access(self) -> Access:
        return {
            "cbstate.history": Read(),
            "cbstate.metrics_step.Loss": Read(optional=True),
            "data": Read(),
            "resource.terminal": Write(),
        }

    @on(FitBegin, access={})
    def begin_fit(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Remember how long the fit is."""
        self._fit = event

    @on(EpochBegin, access={"cbstate.history": Read(), "data": Read(), **_TERMINAL})
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Begin a new bar on the same line."""
        self._describe(phase, learner.cbstate.history[phase], _length(learner.data.get(phase)))
        self._progress = None
        now = time.monotonic()
        if self._line is None:
            self._line = _bottom_line()
        if self._line is None:
            self._next = now + self.report
        elif now >= self._drawn + self.redraw:
            self._draw(self._line, now, 0, "")
        else:
            self._next = self._drawn + self.redraw

    @on(BatchEnd, access={"cbstate.history": Read(), "cbstate.metrics_step.Loss": Read(optional=True), **_TERMINAL})
    def advance(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Redraw the bar, if it is time to."""
        now = time.monotonic()
        if now < self._next:
            return
        counts = learner.cbstate.history[phase]
        done = counts.steps_epoch if self._since is None else counts.steps - self._since
        series = learner.cbstate.metrics_step[phase]["Loss"]
        loss = f"Loss {series.last()[1]:.4g}" if series is not None and len(series) else ""
        if self._line is not None:
            self._draw(self._line, now, done, loss)
        else:
            self._print(now, done, loss)

    @on(EpochEnd, access=_TERMINAL)
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Take the bar away where no fit is to go on with it."""
        self._close_epoch()

    @on(EpochCancelled, access=_TERMINAL)
    def cancel_epoch(self, event: EpochCancelled, phase: Phase, learner: LearnerView) -> None:
        """Take the bar away where no fit is to go on with it."""
        self._close_epoch()

    @on(FitEnd, access=_TERMINAL)
    def end_fit(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Give the line back to the terminal."""
        self._fit = None
        self._before.clear()
        self._close_epoch()

    def _describe(self, phase: Phase, counts: Counts, length: int | None) -> None:
        """Say what the bar of an epoch counts, and up to what."""
        self._title, self._total, self._since = f"{phase!r} epoch {counts.epochs + 1}", length, None
        if self._fit is None:
            return
        before = self._before.setdefault(phase, counts)
        if self._fit.epochs is not None:
            self._title += f"/{before.epochs + self._fit.epochs}"
        elif isinstance(phase, AbstractTrainingPhase):
            # By steps an epoch is not a pass of the loader: show how far the fit is.
            self._title, self._total, self._since = f"{phase!r} steps", self._fit.steps, before.steps

    def _draw(self, line: _BottomLine, now: float, done: int, loss: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._drawn, self._next = now, now + self.redraw
        if self._progress is None:  # the arithmetic and the columns; it is never started, so it draws nothing itself
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[loss]}", markup=False),
                TimeRemainingColumn(),
                console=line.console,
            )
            self._progress.add_task(self._title, total=self._total, completed=done, loss=loss)
        task = self._progress.task_ids[0]
        self._progress.update(task, completed=done, loss=loss)
        line.show(self._progress.get_renderable())

    def _print(self, now: float, done: int, loss: str) -> None:
        import rich  # only when there is something to print

        self._next = now + self.report
        total = f"/{self._total}" if self._total is not None else ""
        line = f"{self._title}  batch {done}{total}  {loss}".rstrip()
        rich.get_console().print(line, markup=False, highlight=False, soft_wrap=True)

    def _close_epoch(self) -> None:
        self._next = math.inf
        self._progress = None
        if self._fit is None and self._line is not None:
            self._line.close()
            self._line = None


class _BottomLine:
    """The last line of a terminal, kept out of what scrolls while something is shown on it.

    There is one such line, so showing something takes it from whoever had it, as when a handler trains another
    learner; the other one takes it back when it next has something to show.

    Args:
        console: The terminal.
    """

    _holder: ClassVar[_BottomLine | None] = None

    def __init__(self, console: Console) -> None:
        self.console = console
        self._file = console.file  # may be replaced meanwhile; the terminal is the same
        self._size: tuple[int, int] | None = None

    def show(self, content: Any) -> None:
        """Show one line of content, cut at the width of the terminal. The cursor stays where it is."""
        if _BottomLine._holder is not self:
            if _BottomLine._holder is not None:
                _BottomLine._holder.close()
            _BottomLine._holder = self
            atexit.register(self.close)  # a terminal must not keep a smaller region when the program has ended
        width, height = self.console.size
        reserve = self._reserve(width, height)
        self._file.write(f"{reserve}\x1b7\x1b[{height};1H\x1b[2K{self._render(content, width)}\x1b8")
        self._file.flush()

    def _reserve(self, width: int, height: int) -> str:
        """Return what makes the lines above the last one the region that scrolls; nothing if they are already."""
        before, self._size = self._size, (width, height)
        if before == self._size:
            return ""
        # Down and up again: if the cursor is on the last line, its line moves up. Setting a region moves the cursor
        # to its top, so the position is saved around it.
        region = f"\x1bD\x1b[A\x1b7\x1b[1;{height - 1}r\x1b8"
        return region if before is None else f"\x1b7\x1b[r\x1b8\x1b[J{region}"  # the window has another size now

    def _render(self, content: Any, width: int) -> str:
        from rich.console import Console

        output = io.TextIOWrapper(io.BytesIO(), self.console.encoding, errors="replace", newline="")
        painter = Console(
            file=output,
            force_terminal=True,
            color_system=self.console.color_system,  # type: ignore[arg-type]  # a str; one of those it takes
            no_color=self.console.no_color,
            legacy_windows=False,
            width=width - 1,  # a full line would wrap on some terminals
        )
        painter.print(content, no_wrap=True, overflow="ellipsis", crop=True)
        output.seek(0)
        return output.read().split("\n", 1)[0]

    def close(self) -> None:
        """Clear the line and let the whole terminal scroll again."""
        if _BottomLine._holder is self:
            _BottomLine._holder = None
            atexit.unregister(self.close)
        if self._size is None:
            return
        height = self._size[1]
        self._size = None
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone needs no cleaning
            self._file.write(f"\x1b7\x1b[{height};1H\x1b[2K\x1b[r\x1b8")
            self._file.flush()


def _bottom_line() -> _BottomLine | None:
    """Return the last line of the terminal, or ``None`` where the output is none that can move its cursor."""
    import rich  # only when there is something to show

    console = rich.get_console()
    # FORCE_COLOR makes rich take a file for a terminal; it asks for colours, not for a cursor that moves.
    only_colours = "FORCE_COLOR" in os.environ and not console.file.isatty()
    able = console.is_interactive and console.is_terminal and not console.legacy_windows and not only_colours
    return _BottomLine(console) if able and console.size.height > 2 else None


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
