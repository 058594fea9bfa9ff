"""MetricsPrinter: the metrics of each epoch, and the reason of an early end of training, as text or as a table.

On a terminal, in a file or a pipe each epoch is a line. In a notebook all epochs of a fit are one table, an output of
the cell that grows (`flowtrain.callbacks.terminal.CellOutput`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import EpochBegin, EpochEnd, FitBegin, FitEnd
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.callbacks.terminal import CellOutput, console, say
from flowtrain.data.batch_size import samples_given
from flowtrain.state.by_phase import epoch_of

__all__ = ["MetricsPrinter", "number_text", "rate_text"]

_ROWS = 100
"""The most rows of a table in a notebook, which is sent to the browser again after each epoch."""


class MetricsPrinter(Callback):
    """Print the metrics of each epoch in one line, on a terminal or into a file; in a notebook show them in a table.

    A line also has the time of the epoch, from `EpochBegin` on, and the number of samples a second, of all ranks
    together, if the loader has a ``batch_size``. If a callback such as `EarlyStopping` ends the fit, or Ctrl-C does,
    the last line says why, where, and with which checkpoint to continue. The number in a line is the number of the
    training epoch; an evaluation has the number of the training epoch before it. In a notebook a fit has one table,
    with a row for each of these numbers.

    Reads ``cbstate.metrics_epoch``, ``cbstate.history`` and ``data`` at `EpochEnd`, so it runs after `Metrics` and
    `Recorder`. Writes to the terminal, ``resource.terminal``, and no state. Costs a line of output for each epoch.

    >>> from flowtrain.testing import tiny_learner
    >>> history = tiny_learner(MetricsPrinter()).fit(1)  # doctest: +ELLIPSIS
    epoch   1  TrainingPhase     Loss ... s
    epoch   1  ValidationPhase   Loss ... s
    """

    audited = False

    def __init__(self) -> None:
        self._begun = (0.0, 0)  # when the epoch began, and how many batches there were before
        self._table: _Table | None = None  # the table of the fit, in a notebook

    def state_access(self) -> Access:
        """Declare reads of the counts, of the metrics of epochs and of the loaders, and the terminal."""
        reads: Access = {"cbstate.history": Read(), "cbstate.metrics_epoch": Read(), "data": Read()}
        return {**reads, "resource.terminal": Write()}

    @on(FitBegin, access={})
    def begin_fit(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Begin a new table in a notebook."""
        self._table = _Table() if console().is_jupyter else None

    @on(EpochBegin, access={"cbstate.history": Read()})
    def begin_epoch(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        """Start the time of the epoch."""
        # The clock of the day may be set back during an epoch. The batches before are noted too, because a resumed
        # epoch runs only its last ones.
        self._begun = time.monotonic(), learner.cbstate.history[phase].steps

    @on(EpochEnd)
    def show(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Print the line or add to the table, if the epoch has recorded a metric."""
        (begun, before), self._begun = self._begun, (0.0, 0)  # no time stays in what executors must agree on
        history = learner.cbstate.history
        if not history[phase].steps_epoch:
            return  # an epoch without a complete batch records no value, so the newest values are of an earlier one
        # A metric that this epoch has not recorded keeps the value of an earlier one, and that value must not be shown.
        epochs = epoch_of(history, phase)
        newest = {name: series.last() for name, series in learner.cbstate.metrics_epoch[phase].items() if len(series)}
        values = {name: number_text(value) for name, (epoch, value) in newest.items() if epoch == epochs}
        if not values:
            return
        seconds = time.monotonic() - begun
        if self._table is not None:
            self._table.add(epochs, repr(phase), values, seconds)
            return
        given = samples_given(learner.data.get(phase), history[phase].steps - before)
        rate = rate_text(given, seconds, learner.world_size)
        texts = [*(f"{name} {value}" for name, value in values.items()), _time_text(seconds), *rate]
        line = f"epoch {epochs:3}  {phase!r:16}  {'  '.join(texts)}"
        say(line)

    @on(FitEnd, access={"resource.terminal": Write()})
    def show_reason(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Print the reason if a callback or an interrupt has ended the fit."""
        self._table = None
        if event.stopped:
            say(event.stopped)


class _Table:
    """The metrics of the epochs of one fit, as an output of a notebook's cell."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._output = CellOutput(console())
        self._rows: dict[int, dict[tuple[str, str], str]] = {}  # by epoch: the text of each metric of each phase
        self._seconds: dict[int, float] = {}

    def add(self, epoch: int, phase: str, values: Mapping[str, str], seconds: float) -> None:
        """Add the metrics of a phase, and show the table. After many rows it continues in an output of its own."""
        if epoch not in self._rows and len(self._rows) == _ROWS:
            self._begin()
        self._rows.setdefault(epoch, {}).update({(phase, name): value for name, value in values.items()})
        self._seconds[epoch] = self._seconds.get(epoch, 0.0) + seconds
        self._output.show(self._drawn)

    def _drawn(self) -> Any:
        # Only a notebook has tables, so rich's are imported when the first one is drawn.
        from rich import box
        from rich.table import Column, Table
        from rich.text import Text

        # A set would lose the order in which the metrics were recorded first, and the columns would change their
        # places.
        columns = list(dict.fromkeys(column for row in self._rows.values() for column in row))
        titles = ["Epoch", *(f"{phase.removesuffix('Phase')}\n{name}" for phase, name in columns), "Time"]
        # Text: a string would be read as markup, and metrics may have any name.
        table = Table(*(Column(Text(title), justify="right", overflow="fold") for title in titles), box=box.SIMPLE_HEAD)
        for epoch, row in self._rows.items():
            cells = [str(epoch), *(row.get(column, "") for column in columns), _time_text(self._seconds[epoch])]
            table.add_row(*map(Text, cells))
        return table


def number_text(value: object) -> str:
    """Return a value of a metric with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rate_text(samples: int | None, seconds: float, world_size: int) -> list[str]:
    """Return how many samples there are in a second, as a list of one text, or an empty list if it is not known.

    Args:
        samples: The samples of this rank; ``None`` if their number is not known.
        seconds: The time.
        world_size: The number of ranks, each of which has about as many samples.
    """
    if not samples or seconds <= 0:
        return []
    rate = samples * world_size / seconds
    return [f"{rate:,.0f} samples/s" if rate >= 100 else f"{rate:.3g} samples/s"]


def _time_text(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
