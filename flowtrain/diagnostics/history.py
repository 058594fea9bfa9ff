"""The history of a learner: the values of all epochs, as a table, as rows, as series, and as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from os import PathLike
from typing import Any

from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.diagnostics.plots import Ends, plot
from flowtrain.errors import UsageError
from flowtrain.logging.extras import needed
from flowtrain.state.by_phase import phase_key
from flowtrain.state.readonly import readonly
from flowtrain.state.series import SeriesMap

__all__ = ["History"]

_SHOWN = 20
"""The most lines of the table that `repr` shows: the newest ones."""


class History(Mapping[Phase, SeriesMap]):
    """The metrics of all epochs of a learner, in all fits and evaluations. It grows as the learner runs.

    It is a mapping from phases to series by name: ``history[ValidationPhase]["Loss"].values`` is a list of numbers. Its
    text is a short table, also in a notebook.

    Args:
        cbstate: The shared state of the callbacks.
        ends: The ends of the epochs of each phase; see `flowtrain.callbacks.Recorder`.

    >>> from flowtrain import TrainingPhase
    >>> from flowtrain.testing import tiny_learner
    >>> history = tiny_learner(n_batches=4).fit(2)
    >>> history.rows[-1]["epoch"], history.rows[-1]["phase"], history.rows[-1]["metric"]
    (2, 'ValidationPhase', 'Loss')
    >>> history[TrainingPhase]["Loss"].steps
    [1, 2]
    """

    def __init__(self, cbstate: Any, ends: Mapping[str, Ends]) -> None:
        self._cbstate, self._ends = cbstate, ends

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dictionary for each value, in the order of the epochs.

        Its keys are ``epoch``, the number of the training epoch that the value belongs to, 0 before the first;
        ``update``, the updates of all optimizers until the end of that epoch, ``None`` if no `Recorder` counts them;
        ``phase``, by its name; ``metric``, by its name; and ``value``.
        """
        return [
            {"epoch": epoch, "update": update, "phase": phase, "metric": name, "value": value}
            for epoch, update, phase, values in self._epochs()
            for name, value in values.items()
        ]

    def to_pandas(self) -> Any:
        """Return the rows as a ``pandas.DataFrame``.

        Raises:
            UsageError: pandas is not installed.
        """
        pandas = needed("pandas", "History.to_pandas()", "pandas", UsageError)
        return pandas.DataFrame(self.rows, columns=["epoch", "update", "phase", "metric", "value"])

    def plot(self, *metrics: str, to: str | PathLike[str] | None = None) -> Any:
        """Draw the named metrics, or all recorded ones; return a matplotlib figure (`flowtrain.diagnostics.plots`)."""
        return plot(metrics, self._cbstate, self._ends, to)

    def _recorded(self) -> Mapping[Phase, SeriesMap]:
        # A learner without `Metrics` has no such entry, and its history is empty.
        recorded: Mapping[Phase, SeriesMap] = self._cbstate.metrics_epoch if "metrics_epoch" in self._cbstate else {}
        return recorded

    def __getitem__(self, phase: Phase | type[Phase]) -> SeriesMap:
        key, recorded = phase_key(phase, "history"), self._recorded()
        if key not in recorded:
            known = ", ".join(map(repr, recorded)) or "none yet"
            raise KeyError(
                f"The history has no epoch of {key!r}; it has phases: {known}. Where one may be missing, write "
                f"history.get({key!r})."
            )
        # These are the series that callbacks read, so a user who changed them would change the next fit.
        series: SeriesMap = readonly(recorded[key], "history")
        return series

    def __iter__(self) -> Iterator[Phase]:
        return iter(list(self._recorded()))

    def __len__(self) -> int:
        return len(self._recorded())

    def _epochs(self) -> list[tuple[int, int | None, str, dict[str, Any]]]:
        """Return, for each epoch of each phase, its number, the updates until its end, its phase, and its values."""
        found: list[tuple[int, bool, int, int | None, str, dict[str, Any]]] = []
        for place, (phase, series) in enumerate(self.items()):
            ends: dict[int, list[int]] = {}
            for epoch, _, _, updates in self._ends.get(repr(phase), ()):
                ends.setdefault(epoch, []).append(updates)
            # False sorts before True, so that an evaluation stands behind the training epoch with the same number.
            evaluates = not isinstance(phase, AbstractTrainingPhase)
            # Backwards, because of several values of one epoch the newest belongs to its newest end.
            for epoch, values in reversed(_by_epoch(series)):
                update = ends[epoch].pop() if ends.get(epoch) else None
                found.append((epoch, evaluates, place, update, repr(phase), values))
        found.reverse()
        found.sort(key=lambda each: each[:3])  # stable: several evaluations of one epoch stay in their order
        return [(epoch, update, phase, values) for epoch, _, _, update, phase, values in found]

    def _table(self) -> list[list[str]]:
        """Return the cells of the table line by line, with the names of the columns first."""
        epochs = self._epochs()
        names = list(dict.fromkeys(name for *_, values in epochs for name in values))
        lines = [["epoch", "update", "phase", *names]]
        for epoch, update, phase, values in epochs:
            numbers = [_text(values[name]) if name in values else "" for name in names]
            lines.append([str(epoch), "" if update is None else str(update), phase, *numbers])
        return lines

    def __repr__(self) -> str:
        head, *lines = self._table()
        if not lines:
            return "<History: nothing is recorded yet>"
        left = len(lines) - _SHOWN
        shown = [head, *lines[-_SHOWN:]]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        text = [
            "  ".join(cell.ljust(width) if place == 2 else cell.rjust(width) for place, (cell, width) in pairs).rstrip()
            for pairs in (enumerate(zip(line, widths, strict=True)) for line in shown)
        ]
        return "\n".join(text if left <= 0 else [text[0], f"... {left} earlier lines, all in history.rows", *text[1:]])

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        head, *lines = self._table()
        if not lines:
            return f"<p>{escape(repr(self))}</p>"
        left = len(lines) - _SHOWN
        note = "" if left <= 0 else f"<p>The newest {_SHOWN} lines; {left} earlier ones are in <code>rows</code>.</p>"
        rows = [_html_row("th", head), *(_html_row("td", line) for line in lines[-_SHOWN:])]
        return f"<table>{''.join(rows)}</table>{note}"


def _by_epoch(series: SeriesMap) -> list[tuple[int, dict[str, Any]]]:
    """Return the values by name of each epoch that one phase has ended, with its number, in order.

    Several epochs may have one number, as evaluations between two training epochs have.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    places: dict[tuple[int, int], int] = {}
    for name in series:
        counts: dict[int, int] = {}
        for epoch, value in series[name]:
            # The number alone would merge two evaluations of one epoch; the place among them keeps these apart.
            key = epoch, counts.get(epoch, 0)
            counts[epoch] = key[1] + 1
            if key not in places:
                places[key] = len(found)
                found.append((epoch, {}))
            found[places[key]][1][name] = value
    return sorted(found, key=lambda each: each[0])


def _html_row(kind: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{kind}>{escape(cell)}</{kind}>' for cell in cells)}</tr>"


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
