"""`learner.plot`: the lines of the drawing, their labels, and the files."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from flowtrain import TrainingPhase, UsageError, ValidationPhase
from flowtrain.callbacks import Metric, Metrics, Recorder
from flowtrain.diagnostics.plots import Curve, curves, draw, find_names
from flowtrain.learner import Learner
from flowtrain.metrics import mean_absolute_error
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.loaders import Failing
from tests.support.phases import OtherTraining
from tests.support.untyped import untyped


@pytest.fixture
def learner() -> Learner:
    data = (tiny_batches(n_batches=5), tiny_batches(n_batches=2))
    learner = tiny_learner(Metrics(mean_absolute_error), data=data)
    learner.fit(3)
    return learner


def lines(axes: Any) -> dict[str, list[list[float]]]:
    """Return the points of each line by its label."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


def test_each_metric_has_a_panel_and_each_phase_a_colour() -> None:
    train, valid = TrainingPhase(), ValidationPhase()
    batches = Curve("Loss", train, "batch", [1, 2, 3], [3.0, 2.0, 1.0])
    means = Curve("Loss", train, "epoch", [3], [2.0])
    values = Curve("Accuracy", valid, "epoch", [3, 6], [0.5, 0.75])
    loss, accuracy = draw([[batches, means], [values]], "batches").axes
    assert list(lines(loss).items()) == [
        ("TrainingPhase, each batch", [[1, 3.0], [2, 2.0], [3, 1.0]]),
        ("TrainingPhase", [[3, 2.0]]),
    ]
    assert {line.get_color() for line in loss.lines} == {"C0"}
    assert [line.get_color() for line in accuracy.lines] == ["C1"]
    assert [line.get_marker() for line in accuracy.lines] == ["o"]
    assert (loss.get_ylabel(), accuracy.get_ylabel(), accuracy.get_xlabel()) == ("Loss", "Accuracy", "batches")


def test_the_drawn_lines_are_the_recorded_values(learner: Learner) -> None:
    figure = learner.plot("Loss", "MeanAbsoluteError")
    assert isinstance(figure, Figure)
    loss, error = figure.axes
    steps, epochs = learner.cbstate.metrics_step, learner.cbstate.metrics_epoch
    for axes, name in ((loss, "Loss"), (error, "MeanAbsoluteError")):
        means = {phase: [value for _, value in epochs[phase][name]] for phase in (TrainingPhase, ValidationPhase)}
        assert lines(axes) == {
            "TrainingPhase, each batch": [[float(step), value] for step, value in steps[TrainingPhase][name]],
            "TrainingPhase": [[x, y] for x, y in zip((5.0, 10.0, 15.0), means[TrainingPhase], strict=True)],
            "ValidationPhase": [[x, y] for x, y in zip((5.0, 10.0, 15.0), means[ValidationPhase], strict=True)],
        }
        assert axes.get_ylabel() == name
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == list(lines(axes))
    assert (loss.get_xlabel(), error.get_xlabel()) == ("", "training batches")


def test_a_phase_has_one_colour(learner: Learner) -> None:
    figure = learner.plot()
    colours = {line.get_label(): line.get_color() for axes in figure.axes for line in axes.get_lines()}
    assert colours == {"TrainingPhase, each batch": "C0", "TrainingPhase": "C0", "ValidationPhase": "C1"}


def test_names_in_any_case_in_the_order_that_was_asked_for(learner: Learner) -> None:
    assert [axes.get_ylabel() for axes in learner.plot("meanabsoluteerror", "loss").axes] == [
        "MeanAbsoluteError",
        "Loss",
    ]
    with pytest.raises(
        UsageError, match=r"^There is no metric 'Lost' to plot; recorded are Loss, MeanAbsoluteError\. D"
    ):
        learner.plot("Lost")


def test_no_pyplot_and_no_figure_left_behind(learner: Learner) -> None:
    before = "matplotlib.pyplot" in sys.modules
    learner.plot()
    assert ("matplotlib.pyplot" in sys.modules) is before


def test_a_notebook_shows_a_picture(learner: Learner, tmp_path: Path) -> None:
    figure = learner.plot("Loss")
    shown = tmp_path / "shown.png"
    shown.write_bytes(figure._repr_png_())
    assert imread(shown).shape == (300, 700, 4)


def test_a_png_holds_the_drawing(learner: Learner, tmp_path: Path) -> None:
    """The file shows the colours of both phases, and differs from the file of an empty learner."""
    path = tmp_path / "new" / "folder" / "loss.png"
    learner.plot("Loss", to=path)
    pixels = torch.from_numpy(imread(path))[..., :3]
    assert tuple(pixels.shape) == (300, 700, 3)
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # the first two colours of matplotlib
        near = (pixels - torch.tensor(colour) / 255).abs().amax(-1) < 0.02
        assert near.sum() > 20


def test_an_svg_holds_the_drawing(learner: Learner, tmp_path: Path) -> None:
    path = tmp_path / "all.svg"
    learner.plot(to=str(path))
    text = path.read_text("utf-8")
    assert text.count("<!-- MeanAbsoluteError -->") == 1
    assert text.count("<!-- ValidationPhase -->") == 2
    assert text.count("stroke: #ff7f0e") >= 2


@pytest.mark.parametrize("name", ["loss", "loss.text", "loss.pt"])
def test_a_file_of_no_known_kind_is_refused(learner: Learner, tmp_path: Path, name: str) -> None:
    path = tmp_path / "folder" / name
    with pytest.raises(UsageError) as refused:
        learner.plot(to=path)
    said = str(refused.value)
    assert said.startswith(f"plot(to={str(path)!r}): the ending says in which format the file is written, and ")
    assert f"{path.suffix!r} is none of " in said
    assert said.endswith("Write plot(to='loss.png').")
    assert not path.parent.exists()


def test_before_fit_there_is_nothing_to_plot() -> None:
    with pytest.raises(UsageError, match=r"^There is nothing to plot: no metric has been recorded yet\. Call fit"):
        tiny_learner().plot()


def test_without_matplotlib_it_says_what_to_install(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"^plot\(\) draws with matplotlib, and .* pip install 'flowtrain\[plot\]'$"):
        learner.plot()


def test_a_closed_learner_can_be_plotted(learner: Learner) -> None:
    learner.close()
    assert len(learner.plot().axes) == 2


# --- the curves of a plot


def drawn(learner: Learner, metric: str = "Loss") -> dict[tuple[str, str], Curve]:
    recorder = learner.get_callback(Recorder)
    assert isinstance(recorder, Recorder)
    return {(repr(curve.phase), curve.each): curve for curve in curves(metric, learner.cbstate, recorder.ends)}


def test_epochs_lie_where_training_stood_when_they_ended() -> None:
    """Epochs are drawn at their last training batch, of 5 each; the 2 validation batches are not counted."""
    learner = tiny_learner(data=(tiny_batches(n_batches=5), tiny_batches(n_batches=2)))
    learner.fit(3)
    found = drawn(learner)
    assert list(found) == [("TrainingPhase", "batch"), ("TrainingPhase", "epoch"), ("ValidationPhase", "epoch")]
    assert found["TrainingPhase", "batch"].x == list(range(1, 16))
    assert found["TrainingPhase", "epoch"].x == found["ValidationPhase", "epoch"].x == [5, 10, 15]
    steps, epochs = learner.cbstate.metrics_step, learner.cbstate.metrics_epoch
    assert found["TrainingPhase", "batch"].y == [loss for _, loss in steps[TrainingPhase]["Loss"]]
    assert found["ValidationPhase", "epoch"].y == [loss for _, loss in epochs[ValidationPhase]["Loss"]]


def test_epochs_of_any_length_and_one_that_did_not_end() -> None:
    """An epoch of 4 batches, one of 3, one that fails after 5 and has no mean, and one of 2."""
    batches = tiny_batches(n_batches=12)
    learner = tiny_learner(data=(batches, batches[:1]))
    learner.validate()  # before any training
    learner.fit(steps=7, validate_every=4)
    with pytest.raises(ZeroDivisionError):
        learner.fit(1, data=Failing(batches[:5]))
    learner.fit(1, data=(batches[:2], batches[:1]))
    found = drawn(learner)
    assert found["TrainingPhase", "batch"].x == list(range(1, 15))
    assert found["TrainingPhase", "epoch"].x == [4, 7, 14]
    assert found["ValidationPhase", "epoch"].x == [0, 4, 7, 14]


def test_two_training_phases_share_the_axis() -> None:
    """Epochs of 3 and of 2 batches take turns at the numbers 1 2 3, 4 5, 6 7 8, 9 10."""
    data = {TrainingPhase: tiny_batches(n_batches=3), OtherTraining: tiny_batches(n_batches=2)}
    learner = tiny_learner(data=data)
    learner.fit(2)
    found = drawn(learner)
    assert found["TrainingPhase", "batch"].x == [1, 2, 3, 6, 7, 8]
    assert found["OtherTraining", "batch"].x == [4, 5, 9, 10]
    assert found["TrainingPhase", "epoch"].x == [3, 8]
    assert found["OtherTraining", "epoch"].x == [5, 10]


def test_where_nothing_is_trained_a_phases_own_batches_count() -> None:
    learner = tiny_learner(data={ValidationPhase: tiny_batches(n_batches=3)})
    learner.validate()
    learner.validate()
    found = drawn(learner)
    assert found["ValidationPhase", "batch"].x == [1, 2, 3, 4, 5, 6]
    assert found["ValidationPhase", "epoch"].x == [3, 6]


def test_where_epochs_ended_is_in_the_recorders_state() -> None:
    """Rule 28: the recorder's state has the batch numbers at which epochs ended."""
    learner = tiny_learner(data=(tiny_batches(n_batches=5), tiny_batches(n_batches=2)))
    learner.fit(2)
    first, second = learner.get_callback(Recorder), Recorder()
    assert isinstance(first, Recorder)
    assert first.ends == {
        "TrainingPhase": [(1, 5, 5, 5), (2, 10, 10, 10)],
        "ValidationPhase": [(1, 2, 5, 5), (2, 4, 10, 10)],
    }
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    learner.replace_callback(second)
    learner.fit(1)
    assert drawn(learner)["ValidationPhase", "epoch"].x == [5, 10, 15]


def test_names() -> None:
    learner = tiny_learner(Metrics(Metric(lambda outputs, targets: outputs.mean(), name="Bias", phase=ValidationPhase)))
    with pytest.raises(UsageError, match=r"^There is nothing to plot: no metric has been recorded yet\. Call fit\(\)"):
        find_names([], learner.cbstate)
    learner.epoch(TrainingPhase)
    assert find_names([], learner.cbstate) == ["Loss"]
    learner.fit(1)
    assert find_names([], learner.cbstate) == ["Loss", "Bias"]
    assert find_names(["bias", "Loss"], learner.cbstate) == ["Bias", "Loss"]
    with pytest.raises(UsageError) as unknown:
        find_names(["Los"], learner.cbstate)
    assert str(unknown.value) == ("There is no metric 'Los' to plot; recorded are Loss, Bias. Did you mean 'Loss'?")
    with pytest.raises(UsageError, match=r"^There is no metric 3 to plot; recorded are Loss, Bias\.$"):
        find_names([untyped(3)], learner.cbstate)


def test_names_that_differ_in_capital_letters_alone_are_not_guessed() -> None:
    learner = tiny_learner(
        Metrics(Metric(lambda o, t: o.mean(), name="bias"), Metric(lambda o, t: o.mean(), name="BIAS"))
    )
    learner.fit(1)
    assert find_names(["BIAS"], learner.cbstate) == ["BIAS"]
    with pytest.raises(UsageError, match=r"^There is no metric 'Bias' to plot; recorded are Loss, bias, BIAS\."):
        find_names(["Bias"], learner.cbstate)
