"""Checkpoints with impossible contents are refused before a learner or a log is touched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import BatchEnd, Callback, CheckpointError, Learner, LoggingError, TrainingPhase
from flowtrain.callbacks import LogMetrics
from flowtrain.logging import CsvBackend, JsonlBackend
from flowtrain.training.checkpoint.form import check_form
from tests.support.resumed import Ask, everything, learner_of

MISSING = object()
LOGS = ("log.jsonl", "values.csv")


def learner_in(folder: Path, *callbacks: Callback) -> Learner:
    log = LogMetrics(JsonlBackend(folder / LOGS[0], append=True), CsvBackend(folder / LOGS[1], append=True))
    return learner_of(log, *callbacks)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the logs of a run, and a checkpoint within its second epoch."""
    folder = tmp_path_factory.mktemp("run")
    with learner_in(folder, Ask(folder / "a.ckpt", BatchEnd, TrainingPhase, 7)) as learner:
        learner.fit(2)
    return folder


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value in nested containers."""
    if place:
        yield place
    if isinstance(value, dict):
        for name, each in value.items():
            yield from places(each, (*place, name))
    elif isinstance(value, (list, tuple)) and len(value) < 20:
        for number, each in enumerate(value):
            yield from places(each, (*place, number))


def replaced(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """Return nested containers with another value at a place, or without it."""
    at, *rest = place
    if rest:
        new = replaced(value[at], tuple(rest), new)
    if isinstance(value, dict):
        return {name: each for name, each in {**value, at: new}.items() if each is not MISSING}
    return type(value)(each for each in (*value[:at], new, *value[at + 1 :]) if each is not MISSING)


@pytest.mark.filterwarnings("ignore:The (run|learner) of the checkpoint:UserWarning")
@pytest.mark.parametrize("entry", ["position", "numbers", "passes", "run", "loaders", "random", "structure", "other"])
def test_impossible_values_are_refused_or_change_nothing(entry: str, run: Path, tmp_path: Path) -> None:
    """Every part of an entry is emptied, made negative, given another type, or left out; of deep ones two by turns."""
    contents = torch.load(run / "a.ckpt", weights_only=True)
    logs = {name: (run / name).read_bytes() for name in LOGS}
    for name, log in logs.items():
        (tmp_path / name).write_bytes(log)
    learner, refused = learner_in(tmp_path), 0
    untouched = everything(learner)
    known = ("position", "numbers", "passes", "run", "loaders", "random", "structure")
    values: tuple[Any, ...] = ({}, -1, None, "", MISSING)
    for number, place in enumerate(places(contents)):
        if (place[0] != entry and (entry != "other" or place[0] in known)) or len(place) > 3:
            continue
        is_deep = len(place) > (1 if entry == "other" else 2)
        for new in (values[number % 5], values[(number + 2) % 5]) if is_deep else values:
            torch.save(replaced(contents, place, new), tmp_path / "bad.ckpt")
            generators = torch.get_rng_state()
            try:
                learner.loop.resume(tmp_path / "bad.ckpt", learner.data, "epochs")
            except (CheckpointError, LoggingError):
                refused += 1
                assert torch.equal(torch.get_rng_state(), generators), place
                assert everything(learner)["model"] == untouched["model"], place
                assert {name: (tmp_path / name).read_bytes() for name in LOGS} == logs, place
                learner.loop.checkpoints.leave_fit()
            else:  # a value that may be so, such as that of a user's callback
                learner.close()
                for name, log in logs.items():
                    (tmp_path / name).write_bytes(log)
                learner = learner_in(tmp_path)
    assert refused > 5
    learner.close()


@pytest.mark.parametrize(
    ("place", "new", "text"),
    [
        (("position",), {}, "position has no 'unit'"),
        (("position", "rounds"), -1, r"position\['rounds'\] is -1"),
        (("position", "batches"), True, r"position\['batches'\] is True"),
        (("position", "begun"), None, r"position\['batches'\] is \d, and no epoch has begun"),
        (("position", "unit"), "", r"position\['unit'\] is '', and a fit is open"),
        (("numbers", "TrainingPhase"), 0, r"an epoch of TrainingPhase is open, and numbers\['TrainingPhase'\] is 0"),
        (("passes", "TrainingPhase"), 0, r"an epoch of TrainingPhase is open, and passes\['TrainingPhase'\] is 0"),
        (("run", "positions"), None, r"run\['positions'\] is None"),
        (("run", "id"), "", r"run\['id'\] is ''"),
        (("random", "torch"), torch.zeros(3), r"random\['torch'\] is tensor\(\[0\., 0\., 0\.\]\)"),
        (("random", "python"), (3, (1, 2), None), r"random\['python'\] is \(3, \(1, 2\), None\)"),
        (("cbstate", "history"), {}, r"cbstate\['history'\] is \{\}"),
        (("model",), [], r"model is \[\], and no mapping"),
    ],
)
def test_what_is_impossible_is_named(place: tuple[Any, ...], new: Any, text: str, run: Path) -> None:
    contents = torch.load(run / "a.ckpt", weights_only=True)
    check_form(contents)
    with pytest.raises(CheckpointError, match=f"has impossible contents: {text}.*Nothing has been changed"):
        check_form(replaced(contents, place, new))


def test_a_stream_that_has_not_begun_gave_nothing(run: Path) -> None:
    contents = torch.load(run / "a.ckpt", weights_only=True)
    stream = {"begun": None, "count": 2}
    with pytest.raises(CheckpointError, match=r"position\['stream'\]\['count'\] is 2, and no pass has begun"):
        check_form({**contents, "position": {**contents["position"], "stream": stream}})


@pytest.mark.parametrize("log", LOGS)
@pytest.mark.parametrize("position", [-1, "3", {}, {"columns": ["group", "step"], "rows": -1, "last": []}, 10**9])
def test_a_position_of_a_log_that_is_impossible_changes_no_log(
    log: str, position: Any, run: Path, tmp_path: Path
) -> None:
    """The other log, which could be brought back, is not."""
    logs = {name: (run / name).read_bytes() for name in LOGS}
    for name, each in logs.items():
        (tmp_path / name).write_bytes(each)
    contents = torch.load(run / "a.ckpt", weights_only=True)
    positions = {str(tmp_path / Path(sink).name): each for sink, each in contents["run"]["positions"].items()}
    changed = {**positions, str(tmp_path / log): position}
    torch.save({**contents, "run": {**contents["run"], "positions": changed}}, tmp_path / "a.ckpt")
    with learner_in(tmp_path) as learner, pytest.raises(LoggingError, match=r"which is impossible|has been cut"):
        learner.fit(2, resume=tmp_path / "a.ckpt")
    assert {name: (tmp_path / name).read_bytes() for name in LOGS} == logs


def test_the_state_of_a_module_that_cannot_be_loaded_is_an_error_of_the_checkpoint(run: Path, tmp_path: Path) -> None:
    contents = torch.load(run / "a.ckpt", weights_only=True)
    torch.save(replaced(contents, ("model", "", "0.bias"), None), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"contents that cannot be loaded: RuntimeError: Error\(s\) in"):
        learner_of().load(tmp_path / "a.ckpt")
