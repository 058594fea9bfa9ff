"""learner.plot: the drawn lines, their labels, and the files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from flowtrain import TrainingPhase, UsageError, ValidationPhase
from flowtrain.callbacks import Metrics
from flowtrain.learner import Learner
from flowtrain.metrics import mean_absolute_error
from flowtrain.testing import tiny_batches, tiny_learner


@pytest.fixture
def learner() -> Learner:
    data = (tiny_batches(n_batches=5), tiny_batches(n_batches=2))
    learner = tiny_learner(Metrics(mean_absolute_error), data=data)
    learner.fit(3)
    return learner


def lines(axes: Any) -> dict[str, list[list[float]]]:
    """The points of each line by its label."""
    return {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}


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
    """Read back: the colours of both phases are in it, and it is what an empty learner's would not be."""
    path = tmp_path / "new" / "folder" / "loss.png"
    learner.plot("Loss", to=path)
    pixels = torch.from_numpy(imread(path))[..., :3]
    assert tuple(pixels.shape) == (300, 700, 3)
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # C0 and C1
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
    monkeypatch.delitem(sys.modules, "flowtrain.diagnostics.figure", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"^plot\(\) draws with matplotlib, and .* pip install 'flowtrain\[plot\]'$"):
        learner.plot()


def test_a_closed_learner_can_be_plotted(learner: Learner) -> None:
    learner.close()
    assert len(learner.plot().axes) == 2
