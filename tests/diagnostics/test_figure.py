"""The figure of plots: what is drawn of a curve."""

from __future__ import annotations

import numpy as np
import pytest

from flowtrain import TrainingPhase, ValidationPhase
from flowtrain.diagnostics.plots import Curve

pytest.importorskip("matplotlib")

from flowtrain.diagnostics.figure import CurveFigure

TRAIN, VALID = TrainingPhase(), ValidationPhase()


def test_each_metric_has_a_panel_and_each_phase_a_colour() -> None:
    batches = Curve("Loss", TRAIN, "batch", [1, 2, 3], [3.0, 2.0, 1.0])
    means = Curve("Loss", TRAIN, "epoch", [3], [2.0])
    valid = Curve("Accuracy", VALID, "epoch", [3, 6], [0.5, 0.75])
    figure = CurveFigure([[batches, means], [valid]], "batches")
    loss, accuracy = figure.axes
    assert [np.asarray(line.get_xdata()).tolist() for line in loss.lines] == [[1, 2, 3], [3]]
    assert [np.asarray(line.get_ydata()).tolist() for line in loss.lines] == [[3.0, 2.0, 1.0], [2.0]]
    assert [line.get_label() for line in loss.lines] == ["TrainingPhase, each batch", "TrainingPhase"]
    assert {line.get_color() for line in loss.lines} == {"C0"}
    assert [line.get_color() for line in accuracy.lines] == ["C1"]
    assert [line.get_marker() for line in accuracy.lines] == ["o"]
    assert (loss.get_ylabel(), accuracy.get_ylabel(), accuracy.get_xlabel()) == ("Loss", "Accuracy", "batches")


def test_a_notebook_shows_a_picture() -> None:
    figure = CurveFigure([[]], "batches")
    assert figure._repr_png_().startswith(b"\x89PNG")  # pyright: ignore[reportPrivateUsage]  # what a notebook calls
