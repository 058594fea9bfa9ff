"""The history that `fit` returns: rows, series, table, plot, and their errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from flowtrain import (
    AbstractTrainingPhase,
    History,
    Learner,
    ProtectedException,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
)
from flowtrain.callbacks import Checkpointer, Metric, Metrics, Recorder
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.untyped import untyped


def html_of(history: History) -> str:
    """Return the table that a notebook shows."""
    html: str = getattr(history, "_repr_html_")()  # noqa: B009  # notebooks look it up by this name
    return html


def halves(*callbacks: Any, **options: Any) -> Learner:
    """Return a learner with a metric whose n-th value is n / 2, in validation only."""
    values = iter(range(1, 100))
    metric = Metric(lambda outputs, targets: next(values) / 2, name="Half", phase=ValidationPhase)
    data = (tiny_batches(n_batches=4), tiny_batches(n_batches=1))
    return tiny_learner(Metrics(metric), *callbacks, data=data, **options)


def test_rows_are_in_the_order_of_the_epochs() -> None:
    learner = halves(core=TorchCore(device="cpu", accumulate=2))
    learner.validate()
    history = learner.fit(1)
    learner.validate()
    learner.fit(1)
    rows = history.rows
    assert rows == learner.history.rows
    assert [(row["epoch"], row["update"], row["phase"], row["metric"]) for row in rows] == [
        (0, 0, "ValidationPhase", "Loss"),
        (0, 0, "ValidationPhase", "Half"),
        (1, 2, "TrainingPhase", "Loss"),
        (1, 2, "ValidationPhase", "Loss"),
        (1, 2, "ValidationPhase", "Half"),
        (1, 2, "ValidationPhase", "Loss"),
        (1, 2, "ValidationPhase", "Half"),
        (2, 4, "TrainingPhase", "Loss"),
        (2, 4, "ValidationPhase", "Loss"),
        (2, 4, "ValidationPhase", "Half"),
    ]
    assert [row["value"] for row in rows if row["metric"] == "Half"] == [0.5, 1.0, 1.5, 2.0]
    losses = {phase: [row["value"] for row in rows if row["phase"] == repr(phase()) and row["metric"] == "Loss"]
              for phase in (TrainingPhase, ValidationPhase)}  # fmt: skip
    for phase, values in losses.items():
        assert values == learner.cbstate.metrics_epoch[phase]["Loss"].values


def test_series_by_phase_are_read_only() -> None:
    learner = halves()
    history = learner.fit(2)
    assert list(history) == [TrainingPhase(), ValidationPhase()]
    assert history[ValidationPhase]["Half"].values == history[ValidationPhase()]["Half"].values == [0.5, 1.0]
    assert ValidationPhase() in history
    with pytest.raises(ProtectedException, match=r"Write access to Learner\.cbstate\.metrics_epoch\.Half disallowed"):
        history[ValidationPhase].push("Half", 1.0, 3)
    with pytest.raises(KeyError, match=r"The history has no epoch of AbstractTrainingPhase; .* write history\.get"):
        history[AbstractTrainingPhase]
    with pytest.raises(KeyError, match="Half"):
        history[TrainingPhase]["Half"]
    with pytest.raises(KeyError, match=r"history is kept by phase, and 'val_loss' is not one\. Write history\[phase\]"):
        untyped(history)["val_loss"]


def test_the_text_is_a_table() -> None:
    history = halves().fit(2)
    values = [[f"{value:.4g}" for value in history[phase]["Loss"].values] for phase in (TrainingPhase, ValidationPhase)]
    lines = repr(history).splitlines()
    assert [line.split() for line in lines] == [
        ["epoch", "update", "phase", "Loss", "Half"],
        ["1", "4", "TrainingPhase", values[0][0]],
        ["1", "4", "ValidationPhase", values[1][0], "0.5"],
        ["2", "8", "TrainingPhase", values[0][1]],
        ["2", "8", "ValidationPhase", values[1][1], "1"],
    ]
    assert lines[0].startswith("epoch  update  phase            ")
    assert lines[2].startswith("    1       4  ValidationPhase  ")
    html = html_of(history)
    assert html.startswith("<table><tr><th>epoch</th><th>update</th><th>phase</th><th>Loss</th><th>Half</th></tr>")
    assert f"<td>1</td><td>4</td><td>TrainingPhase</td><td>{values[0][0]}</td><td></td></tr>" in html
    assert html.count("<tr>") == 5


def test_a_long_table_shows_the_newest_lines_and_names_are_escaped() -> None:
    metric = Metric(lambda outputs, targets: 1, name="<b>", phase=ValidationPhase)
    history = tiny_learner(Metrics(metric), n_batches=1).fit(12)
    lines = repr(history).splitlines()
    assert len(lines) == 22
    assert lines[1] == "... 4 earlier lines, all in history.rows"
    assert (lines[2].split()[0], lines[-1].split()[0]) == ("3", "12")
    html = html_of(history)
    assert html.count("<tr>") == 21
    assert "<th>&lt;b&gt;</th>" in html
    assert html.endswith("<p>The newest 20 lines; 4 earlier ones are in <code>rows</code>.</p>")


def test_nothing_recorded_yet() -> None:
    for learner in (tiny_learner(), tiny_learner(default_callbacks=False)):
        history = learner.history
        assert (repr(history), history.rows, list(history)) == ("<History: nothing is recorded yet>", [], [])
        assert html_of(history) == "<p>&lt;History: nothing is recorded yet&gt;</p>"
        with pytest.raises(KeyError, match="it has phases: none yet"):
            history[TrainingPhase]
    assert tiny_learner(default_callbacks=False).fit(1).rows == []


def test_a_fit_that_resumes_has_the_epochs_before(tmp_path: Path) -> None:
    whole = halves().fit(3).rows
    halves(Checkpointer(tmp_path, monitor=None)).fit(2)
    learner = halves(Checkpointer(tmp_path, monitor=None))
    before = learner.history
    history = learner.fit(3, resume=tmp_path)
    assert [row for row in history.rows if row["metric"] == "Loss"] == [row for row in whole if row["metric"] == "Loss"]
    assert before.rows == history.rows, "a history that was taken before shows the same"


def test_checkpoints_without_the_updates_have_the_batches() -> None:
    recorder = Recorder()
    recorder.load_state_dict({"ends": {"TrainingPhase": [(1, 4, 4)], "ValidationPhase": {1: (2, 4)}}})
    assert recorder.ends == {"TrainingPhase": [(1, 4, 4, 4)], "ValidationPhase": [(1, 2, 4, 4)]}


def test_a_closed_learner_can_be_read() -> None:
    with halves() as learner:
        history = learner.fit(1)
    assert learner.history.rows == history.rows
    assert len(history.rows) == 3


def test_plot_draws_the_same_as_the_learner(tmp_path: Path) -> None:
    learner = halves()
    history = learner.fit(2)
    figure = history.plot("Half", to=tmp_path / "half.png")
    [axes] = figure.axes
    [line] = axes.get_lines()
    assert line.get_xydata().tolist() == [[4.0, 0.5], [8.0, 1.0]]
    assert (tmp_path / "half.png").stat().st_size > 1000
    assert [each.get_ylabel() for each in history.plot().axes] == [each.get_ylabel() for each in learner.plot().axes]


def test_rows_become_a_frame() -> None:
    pandas: Any = pytest.importorskip("pandas")
    history = halves().fit(2)
    frame = history.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["epoch", "update", "phase", "metric", "value"]
    assert frame.to_dict("records") == history.rows
    wide = frame[frame.phase == "ValidationPhase"].pivot(index="epoch", columns="metric", values="value")
    assert wide["Half"].tolist() == [0.5, 1.0]
    assert list(tiny_learner().history.to_pandas().columns) == list(frame.columns)


def test_without_pandas_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError) as raised:
        halves().fit(1).to_pandas()
    assert str(raised.value).startswith("History.to_pandas() needs pandas, which cannot be imported (")
    assert str(raised.value).endswith("Install it: pip install 'flowtrain[pandas]'")


def test_a_history_holds_neither_the_model_nor_the_learner() -> None:
    import gc
    import weakref

    learner = halves()
    history = learner.fit(1)
    model = weakref.ref(learner.model)
    learner.close()
    del learner
    gc.collect()
    assert model() is None
    assert isinstance(history, History)
    assert len(history.rows) == 3
