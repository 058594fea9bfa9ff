"""`replay`: other callbacks, parts of a recording, models, files that are cut off or of others, and what is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import (
    BatchEnd,
    Callback,
    EpochEnd,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    UsageError,
    on,
    record,
    replay,
)
from flowtrain.callbacks import CustomCallback, LogMetrics, Metrics
from flowtrain.diagnostics.recording.command import describe_recording
from flowtrain.diagnostics.recording.file import pack_frame
from flowtrain.errors import LoggingError, ProtectedException
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner
from tests.support.logs import log_records

DATA = Path(__file__).parent / "data"


class Keep(Callback):
    """Keep the outputs and targets: nothing else is done with them in training."""

    deferrable = True

    @on(BatchEnd, access={"batch.outputs": Read(), "batch.targets": Read(), "model": Read()})
    def keep(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Do nothing."""


class Error(Callback):
    """A metric that was forgotten."""

    deferrable = True

    def __init__(self) -> None:
        self.values: list[float] = []

    @on(BatchEnd, TrainingPhase, access={"batch.outputs": Read(), "batch.targets": Read()})
    def add(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.values.append(float((learner.batch.outputs - learner.batch.targets).abs().mean()))


class Greedy(Error):
    @on(BatchEnd, TrainingPhase, access={"batch.outputs": Read(), "batch.loss": Read(), "params": Read()})
    def add(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.values.append(len(learner.params))


class Forward(Error):
    @on(BatchEnd, TrainingPhase, access={"batch.outputs": Read(), "model": Read()})
    def add(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.values.append(float(learner.model(torch.ones(1, 1))))


class Weights(Error):
    @on(BatchEnd, TrainingPhase, access={"model": Read(), "params": Read()})
    def add(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        model = learner.model
        [(name, weight)] = model.named_parameters()
        assert [*learner.params] == [*model.state_dict()] == [name]
        assert learner.params[name] is weight
        assert model.training
        self.values.append(float(weight))


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a recording of `Keep` in six batches of training and of validation."""
    path = tmp_path_factory.mktemp("recorded") / "keep.recording"
    wanted: list[float] = []

    def error(outputs: Any, targets: Any) -> Any:
        return (outputs - targets).abs().mean()

    def weight(learner: LearnerView) -> None:
        wanted.append(float(learner.model.coeff.detach()))

    look = CustomCallback(weight, BatchEnd, TrainingPhase, access={"model": Read()})
    with tiny_learner(record(Keep(), to=path), Metrics(error), look, n_batches=3) as learner:
        learner.fit(2)
    errors = [value for _, value in learner.cbstate.metrics_step[TrainingPhase]["Error"]]
    path.with_suffix(".json").write_text(json.dumps([errors, wanted]), "utf-8")
    return path


def expected(recording: Path) -> Any:
    return json.loads(recording.with_suffix(".json").read_text("utf-8"))


def test_a_forgotten_metric_is_filled_in(recording: Path) -> None:
    callback = Error()
    assert replay(recording, callback).events == 6
    assert callback.values == expected(recording)[0]


def test_events_are_chosen_by_type_and_number(recording: Path) -> None:
    errors = expected(recording)[0]
    for options, wanted in [
        ({"first": 2, "last": 3}, errors[1:3]),
        ({"last": 1}, errors[:1]),
        ({"first": 7}, errors[3:]),
        ({"event": BatchEnd}, errors),
        ({"event": "BatchEnd"}, errors),
        ({"event": "EpochEnd"}, []),
        ({"first": 100}, []),
    ]:
        callback = Error()
        replay(recording, callback, **options)  # type: ignore[arg-type]  # the options have different types
        assert callback.values == wanted, options


def test_declarations_that_were_not_recorded_are_named(recording: Path) -> None:
    with pytest.raises(UsageError, match=r"Greedy declares batch\.loss, which .* was recorded, Keep, declares "):
        replay(recording, Greedy())


def test_events_that_were_not_recorded_are_named(recording: Path, tmp_path: Path) -> None:
    class AtEpochs(Callback):
        deferrable = True

        @on(EpochEnd)
        def show(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
            """Do nothing."""

    with pytest.raises(UsageError, match=r"AtEpochs handles EpochEnd, and .* has events of the handlers for BatchEnd"):
        replay(recording, AtEpochs())


def test_a_view_allows_what_the_handler_declares(recording: Path) -> None:
    class Curious(Error):
        @on(BatchEnd, TrainingPhase, access={"batch.outputs": Read()})
        def add(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            print(learner.batch.targets)

    with pytest.raises(ProtectedException, match=r"batch\.targets") as raised:
        replay(recording, Curious())
    assert "event 1 of a recording" in str(raised.value.__notes__)


def test_a_model_shows_its_state_and_computes_with_the_module(recording: Path) -> None:
    callback = Weights()
    replay(recording, callback)
    assert callback.values == expected(recording)[1]
    with pytest.raises(UsageError, match=r"calls the model, and a recording has .*model=TinyModel\(\.\.\.\)"):
        replay(recording, Forward())
    with pytest.raises(UsageError, match=r"cannot be loaded into it: .*Pass a module that is built as"):
        replay(recording, Forward(), model=nn.Linear(2, 2))
    with tiny_learner() as learner:
        module = learner.model
    forward = Forward()
    replay(recording, forward, model=module)
    assert forward.values == pytest.approx(expected(recording)[1])


def test_wrong_arguments_are_refused(recording: Path, tmp_path: Path) -> None:
    refused: Any = replay  # whose arguments no type checker sees
    for call, message in [
        (lambda: refused(recording, Error), "takes a callback second"),
        (lambda: refused(recording, Metrics()), "Metrics is not deferrable"),
        (lambda: refused(recording, record(Error(), to=tmp_path / "x")), "the callback is recorded itself"),
        (lambda: refused(recording, Error(), event=3), "event is an event type or its name"),
        (lambda: refused(recording, Error(), first=0), "first"),
        (lambda: refused(recording, Error(), last="9"), "last"),
        (lambda: refused(recording, Error(), model="net"), "model is a torch.nn.Module"),
    ]:
        with pytest.raises(UsageError, match=message):
            call()  # type: ignore[no-untyped-call]  # it is of `Any`


def test_a_file_that_is_no_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(LoggingError, match="a cannot be read: No such file"):
        replay(path, Error())
    with pytest.raises(LoggingError, match="cannot be read: Is a directory"):
        replay(tmp_path, Error())
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(LoggingError, match="so it is no recording"):
        replay(path, Error())
    path.write_bytes(b"flowtrain recording 2\n")
    with pytest.raises(LoggingError, match="of version 2 of the format, and this flowtrain reads versions up to 1"):
        replay(path, Error())
    path.write_bytes(b"flowtrain recording 1\n" + pack_frame({"kind": "event"}, b""))
    with pytest.raises(LoggingError, match="a frame 'event' where none belongs"):
        replay(path, Error())
    for content, message in (b"{x}\n", r"begins with '.x..n', so it is no"), (b"flowtrain recording 2\n", "of another"):
        path.write_bytes(content)
        with pytest.raises(LoggingError, match=message):
            tiny_learner(record(Error(), to=path, append=True), n_batches=1).fit(1)
        assert path.read_bytes() == content


def test_a_recording_that_is_cut_anywhere_is_read_up_to_there(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    metrics = record(LogMetrics(JsonlBackend(tmp_path / "a.jsonl")), to=whole)
    with tiny_learner(metrics, n_batches=1) as learner:
        learner.fit(1)
    data, records = whole.read_bytes(), log_records(tmp_path / "a.jsonl")
    ends = frame_ends(data)
    for size in range(len(data)):
        path, log = tmp_path / "cut", tmp_path / "b.jsonl"
        path.write_bytes(data[:size])
        log.unlink(missing_ok=True)
        with pytest.warns(UserWarning, match="is cut off|has no event") if size not in ends[2:] else nothing():
            result = replay(path, LogMetrics(JsonlBackend(log)))
        whole_events = max(sum(end <= size for end in ends[2:]), 0)
        assert result.recorded == result.events == whole_events
        assert bool(result.cut) == (size not in ends[2:])
        again = log_records(log) if log.exists() else []
        assert again == records[: len(again)]


def frame_ends(data: bytes) -> list[int]:
    """Return the places where the first line, the beginning and each event end."""
    ends = [data.index(b"\n") + 1]
    while ends[-1] < len(data):
        ends.append(ends[-1] + 21 + int.from_bytes(data[ends[-1] + 1 : ends[-1] + 9], "little"))
    return ends


class nothing:  # noqa: N801  # used as pytest.warns is
    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, *failure: object) -> None:
        """Do nothing."""


@pytest.mark.filterwarnings("ignore:.*(damaged|cut off|no event)")
def test_a_damaged_recording_is_read_up_to_there(recording: Path, tmp_path: Path) -> None:
    data, path = recording.read_bytes(), tmp_path / "damaged"
    draws = random.Random(0)
    for _ in range(150):
        place = draws.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << draws.randrange(8))]) + data[place + 1 :])
        callback = Error()
        try:
            replay(path, callback)
        except LoggingError:
            assert place < 30  # the first line
        assert callback.values == expected(recording)[0][: len(callback.values)]


FORGED: list[Any] = [
    {"t": "object", "class": "os:system", "own": {"k": [], "v": []}},
    {"t": "object", "class": "subprocess:Popen", "own": {"k": [], "v": []}},
    {"t": "object", "class": "not.loaded:Thing", "own": {"k": [], "v": []}},
    {"t": "enum", "class": "flowtrain.callback.events:BatchEnd", "v": "x"},
    {"t": "dict", "class": "pathlib:Path", "k": [], "v": []},
    {"t": "dict", "k": [[]], "v": [1]},
    {"t": "list", "class": "builtins:tuple", "v": []},
    {"t": "tensor", "dtype": "float32", "shape": [1], "at": [0, 1 << 60]},
    {"t": "tensor", "dtype": "float32", "shape": [1 << 40], "at": [0, 0]},
    {"t": "tensor", "dtype": "load", "shape": [1], "at": [0, 0]},
    {"t": "tensor", "dtype": "float32", "shape": [3], "at": [-4, 4]},
    {"t": "array", "dtype": "|O", "shape": [1], "at": [0, 0]},
    {"t": "series", "path": "a", "from": 5, "total": 1, "dropped": 0, "steps": [0, 0], "code": "d", "values": [0, 0]},
    {"t": "series", "path": "a", "from": 0, "total": 0, "dropped": 0, "steps": [0, 0], "code": "u", "values": [0, 0]},
    {"t": "phases", "path": "a", "new": {"v": 1, "content": "zz"}, "v": {}},
    {"t": "phase", "v": "NoPhase"},
    {"t": "pickle", "v": "gASVCg=="},
    {"t": ["list"]},
    {"no": "word"},
    {"t": "device", "v": "nowhere"},
]


@pytest.mark.parametrize("document", FORGED, ids=lambda each: str(each.get("t")))
def test_forged_contents_are_refused_and_run_nothing(document: Any, tmp_path: Path) -> None:
    event = {"t": "object", "class": "flowtrain.callback.events:BatchEnd", "own": {"k": [], "v": []}}
    for reads in ([[["batch", "outputs"], document]], [[["batch", "outputs"], 1], [["resource", "x"], 1]], 3):
        frames = [begin(), {"kind": "event", "number": 1, "event": event, "phase": "TrainingPhase", "reads": reads}]
        path = tmp_path / "forged"
        path.write_bytes(b"flowtrain recording 1\n" + b"".join(pack_frame(each, b"1234") for each in frames))
        with pytest.raises(LoggingError, match=r"impossible contents|which is not loaded|no phase of that name"):
            replay(path, Error())


def test_a_forged_beginning_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "forged"
    for frame in ({"kind": "begin"}, {**begin(), "handlers": 3}, {**begin(), "handlers": {"a": {"event": 1}}}):
        path.write_bytes(b"flowtrain recording 1\n" + pack_frame(frame, b""))
        with pytest.raises(LoggingError, match="impossible contents"):
            replay(path, Error())


def begin() -> dict[str, Any]:
    types = {"event": "flowtrain.callback.events:BatchEnd", "phase": "flowtrain.callback.phases:Phase"}
    handler = {**types, "reads": [["batch", "outputs"], ["batch", "targets"]]}
    return {"kind": "begin", "callback": "a:B", "every": 1, "handlers": {"h": handler}}


def test_a_recording_of_the_first_version_is_read(tmp_path: Path) -> None:
    """The files in ``data`` were made with the first version of the format, by a LogMetrics in two epochs."""
    shutil.copy(DATA / "version-1.recording", tmp_path)
    result = replay(tmp_path / "version-1.recording", LogMetrics(JsonlBackend(tmp_path / "b.jsonl")))
    assert (result.events, result.cut) == (20, "")
    assert log_records(tmp_path / "b.jsonl") == log_records(DATA / "version-1.jsonl")
    assert describe_recording(DATA / "version-1.recording")[1:3] == [
        "  log_step (BatchEnd, Phase) reads cbstate.metrics_step",
        "  log_epoch (EpochEnd, Phase) reads cbstate.metrics_epoch",
    ]
