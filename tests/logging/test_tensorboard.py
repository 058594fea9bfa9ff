"""TensorBoard: its own reader finds the logged values in the files."""

from __future__ import annotations

import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain.errors import LoggingError
from flowtrain.logging import Figure, Histogram, Image, LoggerBackend, Run, Settings, TensorBoardBackend, Text, Value
from flowtrain.testing import BackendContract

STEP = ("Step", "TrainingPhase")


def accumulated(folder: Path) -> Any:
    """Return what TensorBoard's own reader finds, with every event instead of a sample."""
    readers: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

    guidance = dict.fromkeys(("scalars", "images", "histograms", "tensors", "compressedHistograms"), 0)
    return readers.EventAccumulator(str(folder), size_guidance=guidance, purge_orphaned_data=False).Reload()


class TestContract(BackendContract):
    """`TensorBoardBackend` is a backend."""

    def make_backend(self, folder: Path) -> LoggerBackend:
        return TensorBoardBackend(folder / "runs" / "a")

    def read(self, folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
        found = accumulated(folder / "runs" / "a")
        entries: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for tag in found.Tags()["scalars"]:
            group, _, name = tag.rpartition("/")
            entries[group, name] = [(event.step, event.value) for event in found.Scalars(tag)]
        return entries


def test_every_kind_comes_back(tmp_path: Path) -> None:
    from matplotlib.figure import Figure as Drawing
    from PIL import Image as Reader

    picture = torch.linspace(0, 1, 3 * 4 * 5).reshape(3, 4, 5)
    drawing = Drawing((2, 1), dpi=50)
    drawing.subplots().plot([1, 2])
    logged = {
        "Text": Text("**bold** ü"),
        "Histogram": Histogram(torch.tensor([0.0, 1.0, 1.0, 3.0, float("inf")]), bins=3),
        "Image": Image(picture),
        "Figure": Figure(drawing),
        "Settings": Settings({"lr": 0.1, "model": {"name": "a|b", "deep": True}}),
    }
    backend = TensorBoardBackend(tmp_path)
    backend.open(Run("r"))
    for name, loggable in logged.items():
        backend.write(backend.encode(loggable, name, 3, STEP))
    backend.close()
    found = accumulated(tmp_path)
    prefix = "Step/TrainingPhase"
    [text] = found.Tensors(f"{prefix}/Text")
    assert (text.step, text.tensor_proto.string_val[0].decode()) == (3, "**bold** ü")
    [settings] = found.Tensors(f"{prefix}/Settings")
    assert settings.tensor_proto.string_val[0].decode().splitlines()[2:] == [
        "| lr | 0.1 |",
        "| model.name | a\\|b |",
        "| model.deep | True |",
    ]
    [histogram] = found.Histograms(f"{prefix}/Histogram")
    value = histogram.histogram_value
    assert (value.min, value.max, value.num, value.sum, value.sum_squares) == (0, 3, 4, 5, pytest.approx(11))
    assert (list(value.bucket_limit), list(value.bucket)) == ([1, 2, 3], [1, 2, 1])
    [image], [figure] = found.Images(f"{prefix}/Image"), found.Images(f"{prefix}/Figure")
    assert (image.step, image.height, image.width) == (3, 4, 5)
    assert (figure.height, figure.width) == (50, 100)
    pixels = torch.tensor(list(Reader.open(io.BytesIO(image.encoded_image_string)).tobytes())).reshape(4, 5, 3)
    assert torch.equal(pixels, (picture.permute(1, 2, 0) * 255).round().long())


def test_settings_are_hyperparameters(tmp_path: Path) -> None:
    metadata: Any = importlib.import_module("tensorboard.plugins.hparams.metadata")

    backend = TensorBoardBackend(tmp_path)
    backend.open(Run("r"))
    backend.write(backend.encode(Settings({"lr": 0.1, "name": "x", "on": True}), "Settings", 0, ("HyperParams",)))
    backend.close()
    content = accumulated(tmp_path).SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = metadata.parse_session_start_info_plugin_data(content).hparams
    assert hparams["lr"].number_value == 0.1
    assert hparams["name"].string_value == "x"
    assert hparams["on"].bool_value is True


def test_a_run_has_one_file_and_another_run_has_its_own(tmp_path: Path) -> None:
    for run in ("one", "one", "other"):
        backend = TensorBoardBackend(tmp_path)
        backend.open(Run(run))
        backend.write(backend.encode(Value(0.5), "Loss", 1, STEP))
        position = backend.flush()
        backend.close()
    assert sorted(name.rpartition(".")[2] for name in os.listdir(tmp_path)) == ["one", "other"]
    backend = TensorBoardBackend(tmp_path)
    backend.open(Run("one", resumed=True))
    with pytest.raises(LoggingError, match=r"does not have the event file events\.out\.tfevents\.\d+\.other that the"):
        backend.restore(position)
    backend.close()


def test_an_event_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    """TensorBoard's reader stops at an incomplete event, and would not see later ones."""
    backend = TensorBoardBackend(tmp_path)
    backend.open(Run("r"))
    record = backend.encode(Value(0.5), "Loss", 1, STEP)
    backend.write(record)
    backend.close()
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes() + record[:-3])
    backend.open(Run("r"))
    backend.write(backend.encode(Value(0.25), "Loss", 2, STEP))
    backend.close()
    assert [event.step for event in accumulated(tmp_path).Scalars("Step/TrainingPhase/Loss")] == [1, 2]


def test_a_missing_package_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with pytest.raises(LoggingError, match=r"TensorBoardBackend needs tensorboard, which cannot be imported \(.*\)\. "):
        TensorBoardBackend(tmp_path).open(Run("r"))
    assert not list(tmp_path.iterdir())


def test_a_file_where_the_folder_belongs(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    path.write_text("", "utf-8")
    with pytest.raises(LoggingError, match=r"runs.* cannot be written: .*\. Log to a path in a folder"):
        TensorBoardBackend(path).open(Run("r"))
