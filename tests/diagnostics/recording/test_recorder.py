"""`record`: a recording replays to the records of the training, under every executor, and changes nothing of it."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    Learner,
    LearnerView,
    Phase,
    Read,
    UsageError,
    Write,
    on,
    record,
    replay,
)
from flowtrain.callback.callback import recording_of
from flowtrain.callbacks import Checkpointer, LogHistograms, LogMetrics, Traces, throttle
from flowtrain.diagnostics.recording.command import describe_recording
from flowtrain.errors import LoggingError
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.logs import log_records
from tests.support.recorded import Everything, Updates, texts, values

ACCESS: Access = {
    "batch.inputs": Read(),
    "batch.loss": Read(),
    "batch.nothing": Read(optional=True),
    "cbstate.history": Read(),
    "cbstate.metrics_epoch": Read(),
    "cbstate.metrics_step": Read(full=True),
    "cbstate.tracehistory.Norm": Read(full=True),
    "model": Read(),
    "optimizer.hyperparams": Read(),
    "params": Read(),
}


def norm(learner: LearnerView) -> float:
    return float(learner.batch.inputs.norm())


def everything(folder: Path, name: str, **options: Any) -> Everything:
    return record(Everything(folder / f"{name}.jsonl", ACCESS), to=folder / f"{name}.recording", **options)


@pytest.mark.parametrize("executor", ["serial", "dask", "always"])
def test_the_replay_of_the_recorded_callback_logs_its_records(tmp_path: Path, executor: str) -> None:
    chosen: Any = DaskExecutor(defer="always") if executor == "always" else executor
    callback, updates = everything(tmp_path, "a"), record(Updates(tmp_path / "u.jsonl"), to=tmp_path / "u.recording")
    traces = Traces({"Norm": norm}, Phase, access={"batch": Read()})
    with tiny_learner(callback, updates, traces, n_batches=5, executor=chosen) as learner:
        learner.fit(3)
    again = Everything(tmp_path / "b.jsonl", ACCESS)
    result = replay(tmp_path / "a.recording", again)
    assert (result.events, result.recorded, result.cut) == (36, 36, "")
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "b.jsonl")
    assert again.count == callback.count == 36
    replay(tmp_path / "u.recording", Updates(tmp_path / "v.jsonl"))
    assert texts(tmp_path / "u.jsonl") == texts(tmp_path / "v.jsonl") != []


class Odd(Callback):
    """Write a value that a test has chosen for each batch."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values
        self.number = 0

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.odd = {}

    @on(BatchEnd, access={"batch.odd": Write(), "cbstate.odd": Write()})
    def write(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        learner.batch.odd = self.values[self.number % len(self.values)]
        learner.cbstate.odd = {"number": self.number, "value": learner.batch.odd}
        self.number += 1


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_callback_and_any_values_are_replayed(data: st.DataObject) -> None:
    own: Access = {"batch.odd": Read(), "cbstate.odd": Read(), "batch": Read(), "batch.outputs": Read()}
    paths = data.draw(st.lists(st.sampled_from([*ACCESS, *own]), unique=True, max_size=5))
    access: dict[str, Any] = {path: {**ACCESS, **own}[path] for path in paths if path != "batch"}
    written = data.draw(st.lists(values, min_size=1, max_size=4))
    every, executor = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["serial", "dask"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        callback = record(Everything(folder / "a.jsonl", access), to=folder / "a.recording", every=every)
        traces = Traces({"Norm": norm}, Phase, access={"batch": Read()})
        with tiny_learner(Odd(written), callback, traces, n_batches=4, executor=executor) as learner:
            learner.fit(2)
        replay(folder / "a.recording", Everything(folder / "b.jsonl", access))
        before, again = texts(folder / "a.jsonl"), texts(folder / "b.jsonl")
        kept = [each for each in before if each in again]
        assert again == kept
        assert len(again) == 2 * (8 // every + 2 // every)


def test_bundled_callbacks_are_replayed(tmp_path: Path) -> None:
    metrics = record(LogMetrics(JsonlBackend(tmp_path / "m.jsonl")), to=tmp_path / "m.recording")
    histograms = LogHistograms(JsonlBackend(tmp_path / "h.jsonl"), every=3, gradients=True)
    record(histograms, to=tmp_path / "h.recording")
    with tiny_learner(metrics, histograms, n_batches=7) as learner:
        learner.fit(2)
    replay(tmp_path / "m.recording", LogMetrics(JsonlBackend(tmp_path / "m2.jsonl")))
    replay(tmp_path / "h.recording", LogHistograms(JsonlBackend(tmp_path / "h2.jsonl"), gradients=True))
    for name in "mh":
        assert log_records(tmp_path / f"{name}.jsonl") == log_records(tmp_path / f"{name}2.jsonl") != []


def test_a_recording_changes_nothing_of_training(tmp_path: Path) -> None:
    found = []
    for recorded in (False, True):
        callback = Everything(tmp_path / f"{recorded}.jsonl", ACCESS)
        if recorded:
            record(callback, to=tmp_path / "a.recording")
        torch.manual_seed(3)
        traces = Traces({"Norm": norm}, Phase, access={"batch": Read()})
        with tiny_learner(callback, traces, n_batches=4, strict=True) as learner:
            learner.fit(2)
        found.append((learner.model.state_dict(), torch.rand(2)))
    assert str(found[0]) == str(found[1])
    assert texts(tmp_path / "False.jsonl") == texts(tmp_path / "True.jsonl")


def test_a_thinned_recording_has_the_state_of_each_event(tmp_path: Path) -> None:
    callback = throttle(everything(tmp_path, "a", every=3), BatchEnd, every=2)
    traces = Traces({"Norm": norm}, Phase, access={"batch": Read()})
    with tiny_learner(callback, traces, n_batches=12) as learner:
        learner.fit(2)
    result = replay(tmp_path / "a.recording", Everything(tmp_path / "b.jsonl", ACCESS))
    kept = texts(tmp_path / "b.jsonl")
    assert result.events == len(kept) == 2 * 2 * 2  # of 12 batches the callback handles 6, of which 2 are kept
    assert [each for each in texts(tmp_path / "a.jsonl") if each in kept] == kept


def test_a_recording_of_worker_processes_is_that_of_a_serial_run(tmp_path: Path) -> None:
    for name, executor in ("serial", "serial"), ("local", DaskExecutor("local", workers=1, defer="always")):
        metrics = LogMetrics(JsonlBackend(tmp_path / f"{name}.jsonl"))
        record(metrics, to=tmp_path / f"{name}.recording", every=2)
        with tiny_learner(metrics, n_batches=6, executor=executor) as learner:
            learner.fit(2)
        replay(tmp_path / f"{name}.recording", LogMetrics(JsonlBackend(tmp_path / f"{name}2.jsonl")))
    assert log_records(tmp_path / "local2.jsonl") == log_records(tmp_path / "serial2.jsonl") != []


def test_a_run_that_resumes_has_each_event_once(tmp_path: Path) -> None:
    def make(folder: Path) -> Learner:
        callback = everything(folder, "a", every=2)
        traces = Traces({"Norm": norm}, Phase, access={"batch": Read()})
        return tiny_learner(callback, traces, Checkpointer(folder / "checkpoints"), n_batches=5)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with make(whole) as learner:
        learner.fit(4)
    with make(parts) as learner:
        learner.fit(2)
        shutil.copytree(parts / "checkpoints", tmp_path / "saved")
        learner.fit(1)
    shutil.rmtree(parts / "checkpoints")  # the third epoch is lost, and the recording has its events
    (tmp_path / "saved").rename(parts / "checkpoints")
    with make(parts) as learner:
        learner.fit(4, resume="auto")
    for folder in (whole, parts):
        replay(folder / "a.recording", Everything(folder / "b.jsonl", ACCESS))
    assert texts(whole / "b.jsonl") == texts(parts / "b.jsonl")
    assert texts(whole / "a.jsonl") == texts(parts / "a.jsonl")


def test_a_recording_ends_at_its_most_bytes_and_training_does_not(tmp_path: Path) -> None:
    callback = record(LogMetrics(JsonlBackend(tmp_path / "a.jsonl")), to=tmp_path / "a.recording", max_bytes=4000)
    with tiny_learner(callback, n_batches=20) as learner:
        learner.fit(2)
    assert os.path.getsize(tmp_path / "a.recording") < 4200
    with pytest.warns(UserWarning, match=r"ends before event \d+: it has its most bytes, record\(max_bytes=4000\)"):
        result = replay(tmp_path / "a.recording", LogMetrics(JsonlBackend(tmp_path / "b.jsonl")))
    again = log_records(tmp_path / "b.jsonl")
    assert 0 < result.events < 82
    assert log_records(tmp_path / "a.jsonl")[: len(again)] == again


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_disk_is_an_error_of_the_log(tmp_path: Path) -> None:
    callback = record(LogMetrics(JsonlBackend(tmp_path / "a.jsonl")), to="/dev/full")
    with pytest.raises(LoggingError, match="/dev/full is a device or a pipe"):
        tiny_learner(callback, n_batches=1).fit(1)


def test_a_killed_process_leaves_the_events_before(tmp_path: Path) -> None:
    program = f"""
import os, pathlib
from flowtrain import BatchEnd, TrainingPhase, record
from flowtrain.callbacks import CustomCallback, LogMetrics
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner
folder = pathlib.Path({str(tmp_path)!r})
callback = record(LogMetrics(JsonlBackend(folder / "a.jsonl")), to=folder / "a.recording")
left = iter(range(9))
kill = CustomCallback(lambda learner: next(left, None) is None and os._exit(9), BatchEnd, TrainingPhase)
tiny_learner(callback, kill, n_batches=20).fit(1)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 9
    result = replay(tmp_path / "a.recording", LogMetrics(JsonlBackend(tmp_path / "b.jsonl")))
    assert result.cut == ""
    assert log_records(tmp_path / "b.jsonl") == log_records(tmp_path / "a.jsonl") != []


class Reads(Callback):
    deferrable = True

    def __init__(self, access: Access) -> None:
        self.access = access
        self.access_argument = access

    @on(BatchEnd, access="access")
    def handle(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Read nothing."""


class NotDeferrable(Callback):
    @on(BatchEnd)
    def handle(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Read nothing."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: record(Reads, to=path), r"record\(<class '.*Reads'>\) takes"),  # type: ignore[type-var]  # a class
        (lambda path: record(NotDeferrable(), to=path), "takes a deferrable callback: one that only reads"),
        (lambda path: record(record(Reads({}), to=path), to=path), "recorded already, to .*a.recording"),
        (lambda path: record(Reads({}), to=path, every=0), r"record\(\): every"),
        (lambda path: record(Reads({}), to=path, every=True), r"record\(\): every"),
        (lambda path: record(Reads({}), to=path, max_bytes=0), r"record\(\): max_bytes"),
        (lambda path: record(Reads({}), to=path, append=1), "append"),  # type: ignore[arg-type]  # no bool
        (lambda path: record(Reads({}), to=""), "path is a path"),
        (lambda path: record(Reads({"data": Read()}), to=path), "declares 'data', and a recording does not hold data"),
        (lambda path: record(Reads({"lossfn": Read()}), to=path), "'lossfn', .* the loss function, which is code"),
        (lambda path: record(Reads({"optimizer": Read()}), to=path), "optimizer.hyperparams"),
        (lambda path: record(Reads({"optimizer.state": Read()}), to=path), "optimizer.hyperparams"),
    ],
)
def test_wrong_arguments_are_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, LoggingError), match=message):
        make(tmp_path / "a.recording")
    assert not list(tmp_path.iterdir())


def test_writes_with_a_lag_are_refused(tmp_path: Path) -> None:
    late = Reads({"batch.loss": Read(), "cbstate.scores": Write(lag=1)})
    text = r"Reads writes cbstate\.scores with a lag"
    with pytest.raises(UsageError, match=rf"record\(Reads\(\)\): {text}"):
        record(late, to=tmp_path / "a.recording")
    with pytest.raises(UsageError, match=rf"replay\(path, Reads\(\)\): {text}"):
        replay(tmp_path / "a.recording", late)


def test_a_value_that_is_no_data_is_refused_at_its_event(tmp_path: Path) -> None:
    class Writer(Callback):
        @on(BatchEnd, access={"batch.odd": Write()})
        def write(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            learner.batch.odd = {"here": [object()]}

    callback = record(Reads({"batch.odd": Read()}), to=tmp_path / "a.recording")
    with pytest.raises(UsageError, match=r"batch\.odd\['here'\]\[0\] is a object, which cannot be recorded"):
        tiny_learner(Writer(), callback, n_batches=1).fit(1)


def test_one_file_holds_one_callback(tmp_path: Path) -> None:
    one, other = (record(Reads({}), to=tmp_path / "a.recording") for _ in range(2))
    with pytest.raises(LoggingError, match=r"a\.recording"):
        tiny_learner(one, other)


def test_another_run_is_warned_of_unless_it_is_expected(tmp_path: Path) -> None:
    for append in (False, True):
        callback = record(LogMetrics(JsonlBackend(tmp_path / f"{append}.jsonl")), to=tmp_path / "a", append=append)
        with tiny_learner(callback, n_batches=2) as learner:
            learner.fit(1)
    with pytest.warns(UserWarning, match="a already has .* of another run"):
        tiny_learner(record(LogMetrics(JsonlBackend(tmp_path / "c.jsonl")), to=tmp_path / "a"), n_batches=2).fit(1)
    result = replay(tmp_path / "a", LogMetrics(JsonlBackend(tmp_path / "b.jsonl")))
    assert result.events == 18
    runs = [log_records(tmp_path / f"{append}.jsonl") for append in ("False", "True", "c")]
    assert log_records(tmp_path / "b.jsonl") == [*runs[0], *runs[1], *runs[2]]


def test_each_rank_can_have_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = record(Reads({}), to=tmp_path / "a-{rank}.recording")
    with tiny_learner(callback, n_batches=1) as learner:
        learner.fit(1)
    assert describe_recording(tmp_path / "a-0.recording")[-1].endswith("numbers 2 to 2")


def test_a_copy_records_to_a_file_of_its_own_name(tmp_path: Path) -> None:
    callback = record(Reads({}), to=tmp_path / "a.recording")
    assert recording_of(copy.deepcopy(callback)) is not recording_of(callback) is not None
