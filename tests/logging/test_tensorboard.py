"""TensorBoard: its own reader finds the logged values in the files."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import TrainingPhase, ValidationPhase
from flowtrain.callbacks import LearningRate, LogHyperParams, LogMetrics, Scheduler, one_cycle
from flowtrain.errors import LoggingError, UsageError
from flowtrain.logging import Figure, Histogram, Image, LoggerBackend, Run, Settings, TensorBoardBackend, Text, Value
from flowtrain.testing import BackendContract, tiny_learner
from tests.support.untyped import untyped

STEP = ("Step", "TrainingPhase")


def accumulated(folder: Path) -> Any:
    """Return what TensorBoard's own reader finds, with every event instead of a sample."""
    readers: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

    guidance = dict.fromkeys(("scalars", "images", "histograms", "tensors", "compressedHistograms"), 0)
    return readers.EventAccumulator(str(folder), size_guidance=guidance, purge_orphaned_data=False).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the values in a folder by their tag, as TensorBoard's own reader finds them."""
    found = accumulated(folder)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


class TestContract(BackendContract):
    """`TensorBoardBackend` is a backend."""

    def make_backend(self, folder: Path) -> LoggerBackend:
        return TensorBoardBackend(folder / "runs" / "a")

    def read(self, folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
        entries: dict[tuple[str, str], list[tuple[int, float]]] = {}
        for phase in sorted((folder / "runs" / "a").iterdir()):
            for tag, values in scalars(phase).items():
                group, _, name = tag.rpartition("/")
                entries[f"{group}/{phase.name}", name] = values
        return entries


class TestContractOfOneRun(BackendContract):
    """`TensorBoardBackend` is a backend with the phase in the tags too."""

    def make_backend(self, folder: Path) -> LoggerBackend:
        return TensorBoardBackend(folder / "runs" / "a", by_phase=False)

    def read(self, folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
        found = scalars(folder / "runs" / "a")
        return {(tag.rpartition("/")[0], tag.rpartition("/")[2]): values for tag, values in found.items()}


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
    found = accumulated(tmp_path / "TrainingPhase")
    prefix = "Step"
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


def test_training_and_validation_of_a_metric_are_two_runs_with_one_tag(tmp_path: Path) -> None:
    """TensorBoard draws one chart for each tag, with a line for each run."""
    multiplexer: Any = importlib.import_module("tensorboard.backend.event_processing.plugin_event_multiplexer")

    board = TensorBoardBackend(tmp_path / "a")
    callbacks = LogMetrics(board), LogHyperParams(board, settings={"a": 1}), Scheduler({LearningRate: one_cycle(0.1)})
    with tiny_learner(*callbacks, n_batches=2) as learner:
        learner.fit(2)
    found = multiplexer.EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload().Runs()
    assert {run: sorted(tags["tensors"]) for run, tags in found.items()} == {
        "a": ["HyperParams/LearningRate", "HyperParams/Settings", "_hparams_/session_start_info"],
        "a/TrainingPhase": ["Epoch/Loss", "Step/Loss"],
        "a/ValidationPhase": ["Epoch/Loss", "Step/Loss"],
    }
    for phase in (TrainingPhase, ValidationPhase):
        logged = scalars(tmp_path / "a" / phase.__name__)["Epoch/Loss"]
        series = learner.cbstate.metrics_epoch[phase]["Loss"]
        assert [step for step, _ in logged] == series.steps
        assert [value for _, value in logged] == pytest.approx(series.values)


def test_a_phase_that_logs_first_after_the_checkpoint_is_removed_with_its_records(tmp_path: Path) -> None:
    def write(phase: str, step: int) -> None:
        backend.write(backend.encode(Value(step), "Loss", step, ("Epoch", phase)))

    backend = TensorBoardBackend(tmp_path)
    backend.open(Run("r"))
    write("TrainingPhase", 1)
    position = backend.flush()
    write("ValidationPhase", 1)
    write("TrainingPhase", 2)
    backend.close()
    backend = TensorBoardBackend(tmp_path)
    backend.open(Run("r", resumed=True))
    backend.restore(position)
    assert not list((tmp_path / "ValidationPhase").iterdir())
    write("ValidationPhase", 3)
    write("TrainingPhase", 4)
    backend.close()
    assert scalars(tmp_path / "TrainingPhase") == {"Epoch/Loss": [(1, 1.0), (4, 4.0)]}
    assert scalars(tmp_path / "ValidationPhase") == {"Epoch/Loss": [(3, 3.0)]}


def test_a_log_with_the_phase_in_its_tags_is_continued_so(tmp_path: Path) -> None:
    """Early checkpoints have the name and the size of the only file of the run."""
    old = TensorBoardBackend(tmp_path, by_phase=False)
    old.open(Run("r"))
    for step in (1, 2):
        old.write(old.encode(Value(step), "F1.cat/dog", step, ("Epoch", "ValidationPhase")))
    [(name, size)] = old.flush()["sizes"].items()
    old.write(old.encode(Value(9), "F1.cat/dog", 9, ("Epoch", "ValidationPhase")))
    old.close()
    position = {"file": name, "size": size}
    picture = Image(torch.zeros(3, 2, 2))
    for step in (3, 4):
        backend = TensorBoardBackend(tmp_path)
        backend.open(Run("r", resumed=True))
        backend.restore(position)
        records = [
            backend.encode(Value(step), "F1.cat/dog", step, ("Epoch", "ValidationPhase")),
            backend.encode(picture, "Picture", step, STEP),
            backend.encode(Settings({"a": 1}), "Settings", step, STEP),
            backend.encode(Value(step), "LearningRate", step, ("HyperParams",)),
        ]
        backend.write_all(records)
        position = json.loads(json.dumps(backend.flush()))
        backend.close()
        backend.open(Run("r"))  # as when a learner gets the backend a second time
        backend.write(backend.encode(Value(0), "Again", step, STEP))
        backend.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert scalars(tmp_path) == {
        "Epoch/ValidationPhase/F1.cat/dog": [(step, float(step)) for step in (1, 2, 3, 4)],
        "HyperParams/LearningRate": [(3, 3.0), (4, 4.0)],
        "Step/TrainingPhase/Again": [(4, 0.0)],
    }
    found = accumulated(tmp_path)
    assert [event.step for event in found.Images("Step/TrainingPhase/Picture")] == [3, 4]
    assert [event.step for event in found.Tensors("Step/TrainingPhase/Settings")] == [3, 4]
    assert found.SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"
    other = TensorBoardBackend(tmp_path, append=True)
    other.open(Run("other"))  # another run begins in the usual way
    other.write(other.encode(Value(1), "Loss", 1, STEP))
    other.close()
    assert scalars(tmp_path / "TrainingPhase") == {"Step/Loss": [(1, 1.0)]}


@pytest.mark.parametrize(
    ("group", "folder", "tag"),
    [
        (("Step", "TrainingPhase"), "TrainingPhase", "Step/x"),
        (("Step", "../up"), "%2E.%2Fup", "Step/x"),
        (("Step", ".."), "%2E.", "Step/x"),
        (("Step", "\u00e4%"), "%C3%A4%25", "Step/x"),
        (("Evaluation",), "", "Evaluation/x"),
        (("a", "b", "c"), "", "a/b/c/x"),
        (("a/b", "c"), "", "a/b/c/x"),
    ],
)
def test_the_folder_and_the_tag_of_a_group(group: tuple[str, ...], folder: str, tag: str, tmp_path: Path) -> None:
    backend = TensorBoardBackend(tmp_path / "runs" / "a")
    backend.open(Run("r"))
    backend.write(backend.encode(Value(0.5), "x", 1, group))
    position = backend.flush()
    backend.close()
    assert scalars(tmp_path / "runs" / "a" / folder) == {tag: [(1, 0.5)]}
    backend.open(Run("r", resumed=True))
    backend.restore(position)
    assert backend.flush() == position
    backend.close()
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


@pytest.mark.parametrize("inner", ["TrainingPhase", "Pictures"])
def test_a_backend_in_the_folder_of_another_keeps_its_files(inner: str, tmp_path: Path) -> None:
    """The folder of one backend may lie in that of another, and even have the name of a phase."""
    backends = [TensorBoardBackend(tmp_path), TensorBoardBackend(tmp_path / inner)]
    for backend in backends:
        backend.open(Run("r"))
    position = backends[0].flush()
    for backend in backends:
        backend.write(backend.encode(Value(0.5), "Loss", 1, STEP))
        backend.write(backend.encode(Value(0.5), "x", 1, ("Evaluation",)))
    backends[0].restore(position)
    for backend in backends:
        backend.close()
    assert scalars(tmp_path / inner) == {"Evaluation/x": [(1, 0.5)]}
    assert scalars(tmp_path / inner / "TrainingPhase") == {"Step/Loss": [(1, 0.5)]}


def test_by_phase_is_true_or_false(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^TensorBoardBackend\(by_phase='no'\): by_phase is True or False"):
        TensorBoardBackend(tmp_path, by_phase=untyped("no"))


def test_a_run_has_one_file_and_another_run_has_its_own(tmp_path: Path) -> None:
    for run in ("one", "one", "other"):
        backend = TensorBoardBackend(tmp_path, append=run == "other")
        backend.open(Run(run))
        backend.write(backend.encode(Value(0.5), "Loss", 1, STEP))
        position = backend.flush()
        backend.close()
    assert sorted(name.split(".")[4] for name in os.listdir(tmp_path / "TrainingPhase")) == ["one", "other"]
    backend = TensorBoardBackend(tmp_path, append=True)
    backend.open(Run("one", resumed=True))
    with pytest.raises(LoggingError, match=r"the event file TrainingPhase/events\.out\.tfevents\.\d+\.other\.Tr"):
        backend.restore(position)
    backend.close()


def test_a_run_that_resumes_is_told_of_the_event_files_of_others(tmp_path: Path) -> None:
    """Records of another run in a table go with the position of the checkpoint, and event files are other files."""
    for run, append in (("one", False), ("other", True)):
        backend = TensorBoardBackend(tmp_path, append=append)
        backend.open(Run(run))
        position = backend.flush()
        backend.write(backend.encode(Value(0.5), "Loss", 1, STEP))
        backend.close()
    text = r"has 1 event file of another run beside .* joins their curves: TrainingPhase/events\.out\..*other\.Tr"
    for append in (False, True):
        backend = TensorBoardBackend(tmp_path, append=append)
        with nullcontext() if append else pytest.warns(UserWarning, match=text):
            backend.open(Run("one", resumed=True))
        backend.restore(position)
        backend.close()
    assert [name.split(".")[4] for name in os.listdir(tmp_path / "TrainingPhase")] == ["other"]


def test_an_event_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    """TensorBoard's reader stops at an incomplete event, and would not see later ones."""
    backend = TensorBoardBackend(tmp_path)
    backend.open(Run("r"))
    record = backend.encode(Value(0.5), "Loss", 1, STEP)
    backend.write(record)
    backend.close()
    [path] = (tmp_path / "TrainingPhase").iterdir()
    path.write_bytes(path.read_bytes() + record.partition(b"\n")[2][:-3])
    backend.open(Run("r"))
    backend.write(backend.encode(Value(0.25), "Loss", 2, STEP))
    backend.close()
    assert scalars(tmp_path / "TrainingPhase") == {"Step/Loss": [(1, 0.5), (2, 0.25)]}


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


def test_numbers_that_no_float_holds(tmp_path: Path) -> None:
    backend = TensorBoardBackend(tmp_path)
    with pytest.raises(LoggingError, match="got a int that is larger than any float"):
        backend.encode(Value(10**400), "Loss", 1, ("Step", "TrainingPhase"))
    record = backend.encode(Settings({"seed": 10**400, "width": 8}), "Settings", 0, ("HyperParams",))
    assert b"1" + b"0" * 400 in record
