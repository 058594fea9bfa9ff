"""Timeline: the file of a fit, what is in it, and fits whose file cannot be written."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import (
    BatchBegin,
    BatchEnd,
    Callback,
    CallbackError,
    CancelBatchException,
    EpochEnd,
    Event,
    Learner,
    LearnerView,
    Phase,
    TorchCore,
    TrainingPhase,
    UsageError,
    on,
)
from flowtrain.callbacks import Checkpointer, GradNorm, Profiler, Timeline, Timer, throttle
from flowtrain.diagnostics.trace_file import read_trace
from flowtrain.examples.gan import GANPhase
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.fired import Watch
from tests.support.programs import Programs
from tests.support.traces import Slice, check_nested, events_of, names, slices_of
from tests.support.untyped import untyped


class Fires(Callback):
    """Fires an event of its own at each `BatchEnd`, and handles it."""

    @on(BatchEnd, TrainingPhase)
    def fire(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        learner.fire(Own())

    @on(EpochEnd)
    def fail(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        pass


class Own(Event):
    """An event of a user."""


class AtOwn(Callback):
    """Handles `Own`."""

    @on(Own)
    def see(self, event: Own, phase: Phase, learner: LearnerView) -> None:
        pass


class CancelSecond(Callback):
    """Cancels the second batch of each epoch."""

    number = 0

    @on(BatchBegin, TrainingPhase)
    def cancel(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        self.number += 1
        if self.number % 3 == 2:
            raise CancelBatchException("on purpose")


def batches_of(slices: list[Slice], phase: str = "TrainingPhase") -> list[Slice]:
    return [one for one in slices if one.kind == "batch" and one.args["phase"] == phase]


def inside(batch: Slice, slices: list[Slice]) -> list[str]:
    return [one.name for one in slices if one.within(batch) and one is not batch]


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_each_part_and_each_handler_of_a_batch_is_in_its_batch(tmp_path: Path, *, strict: bool) -> None:
    timeline = Timeline(tmp_path / "new" / "timeline.json")
    learner = tiny_learner(timeline, Timer(), n_batches=3, strict=strict)
    learner.fit(2)
    slices = slices_of(timeline.files[0])
    check_nested(slices)
    assert {(one.process[:6], one.thread) for one in slices} == {("rank 0", "training")}
    (fit,) = (one for one in slices if one.kind == "fit")
    assert all(one.within(fit) for one in slices)
    train, valid = batches_of(slices), batches_of(slices, "ValidationPhase")
    assert [(one.args["epoch"], one.args["batch"]) for one in train] == [(e, b) for e in (1, 2) for b in (1, 2, 3)]
    for batch in train:
        assert inside(batch, slices) == [
            "Timer.begin_batch", "forward", "loss", "StopOnNaNLoss.check", "backward", "update",
            "Recorder.count_batch", "Timer.end_batch", "Metrics.record",
        ]  # fmt: skip
    for batch in valid:
        assert inside(batch, slices) == [
            "Timer.begin_batch", "forward", "loss", "Recorder.count_batch", "Timer.end_batch", "Metrics.record",
        ]  # fmt: skip
    assert names(slices, "epoch") == ["epoch of TrainingPhase", "epoch of ValidationPhase"] * 2
    waits = [one for one in slices if one.name == "data"]
    assert len(waits) == 4 * (3 + 1), "one for each batch, and one that finds the end of each epoch"
    assert not any(one.within(batch) for one in waits for batch in (*train, *valid))


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_each_handler_of_a_plan_is_there_once_for_each_firing(tmp_path: Path, executor: str) -> None:
    watch = Watch()
    timeline = Timeline(tmp_path / "timeline.json")
    learner = tiny_learner(watch, timeline, GradNorm(), Fires(), AtOwn(), n_batches=3, executor=executor)
    learner.fit(2)
    slices = slices_of(timeline.files[0])
    check_nested(slices)
    fired = Counter((type(event).__name__, repr(phase)) for event, phase in watch.log)
    expected: Counter[tuple[str, str, str]] = Counter()
    for event, phase in {(type(event), type(phase)) for event, phase in watch.log}:
        for planned in learner.callbacks.plan(event, phase).handlers:
            key = event.__name__, phase.__name__
            expected[planned.label, *key] = fired[key]
    found = Counter((one.name, one.args["event"], one.args["phase"]) for one in slices if one.kind == "handler")
    assert found == expected
    assert found["AtOwn.see", "Own", "TrainingPhase"] == 6
    learner.close()


def test_a_throttled_handler_is_there_when_it_has_run(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json")
    tiny_learner(timeline, throttle(AtOwn(), Own, every=2), Fires(), n_batches=4).fit(1)
    assert names(slices_of(timeline.files[0]), "handler").count("AtOwn.see") == 2


def test_with_accumulation_an_update_is_in_the_batch_that_fills_its_group(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json")
    tiny_learner(timeline, n_batches=5, core=TorchCore("cpu", accumulate=2)).fit(1)
    slices = slices_of(timeline.files[0])
    check_nested(slices)
    assert [inside(batch, slices).count("update") for batch in batches_of(slices)] == [0, 1, 0, 1, 1]


def test_a_cancelled_batch_and_a_fit_by_steps(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json")
    tiny_learner(timeline, CancelSecond(), n_batches=3).fit(steps=5, validate_every=3)
    slices = slices_of(timeline.files[0])
    check_nested(slices)
    found = [(one.args["batch"], "cancelled" in one.args) for one in batches_of(slices)]
    assert found == [(1, False), (2, True), (3, False), (1, False), (2, True)]
    assert "update" not in inside(batches_of(slices)[1], slices)


def test_a_step_of_a_user_has_its_parts(tmp_path: Path) -> None:
    models = {"gen": torch.nn.Linear(8, 2), "disc": torch.nn.Linear(2, 1)}
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    learner = Learner(
        models,
        loss,
        data={GANPhase: [torch.ones(4, 2)] * 2},
        optimizer=dict.fromkeys(models, partial(torch.optim.SGD, lr=0.1)),
        default_callbacks="quiet",
    )
    learner.fit(1, timeline=tmp_path / "timeline.json")
    slices = slices_of(tmp_path / "timeline.json")
    check_nested(slices)
    first = [one.name for one in slices if one.kind == "part" and one.within(batches_of(slices, GANPhase.__name__)[0])]
    assert first == ["forward and loss", "backward", "update", "forward and loss", "backward", "update"]


def test_without_a_timeline_a_fit_is_as_before(tmp_path: Path) -> None:
    """The runners of a fit without a timeline are those of the executor, also after a fit with one."""
    learner = tiny_learner(n_batches=2)
    plain = learner.loop.dispatch.runner(BatchBegin, TrainingPhase)
    learner.fit(1, timeline=tmp_path / "timeline.json")
    assert plain is learner.loop.dispatch.runner(BatchBegin, TrainingPhase) is None
    assert learner.loop.dispatch.clock is None
    assert learner.loop.checkpoints.writer.clock is None
    learner.fit(1)
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.json"]


def test_a_timeline_changes_no_result(tmp_path: Path) -> None:
    def trained(**options: Any) -> tuple[float, list[float]]:
        learner = tiny_learner(GradNorm(), n_batches=4)
        history = learner.fit(2, **options)
        return learner.model.coeff.item(), list(history[TrainingPhase]["Loss"].values)

    assert trained() == trained(timeline=tmp_path / "timeline.json")


def test_checkpoints_are_there_as_held_and_written(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json")
    tiny_learner(timeline, Checkpointer(tmp_path / "a"), n_batches=2).fit(1)
    slices = [one for one in slices_of(timeline.files[0]) if one.kind == "checkpoint"]
    held = {one.name.removeprefix("checkpoint ") for one in slices if one.thread == "training"}
    written = {one.name.removeprefix("writes ") for one in slices if one.thread != "training"}
    assert held == written
    assert "start.ckpt" in held
    assert len(held) == 2


def test_a_fit_that_resumes_has_a_file_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "timeline.json"

    def learner() -> Learner:
        return tiny_learner(Timeline(path), Checkpointer(tmp_path / "a"), n_batches=2)

    learner().fit(1)
    first = path.read_bytes()
    assert not caplog.messages
    learner().fit(2, resume=tmp_path / "a")
    assert path.read_bytes() == first
    assert caplog.messages == [
        f"flowtrain: {path} exists and is kept: the timeline of this fit is {tmp_path / 'timeline-2.json'}"
    ]
    slices = slices_of(tmp_path / "timeline-2.json")
    assert {one.args["epoch"] for one in batches_of(slices)} == {2}


def test_further_fits_of_a_learner_have_files_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    timeline = Timeline(tmp_path / "timeline.json")
    learner = tiny_learner(timeline, n_batches=1)
    for _ in range(3):
        learner.fit(1)
    assert [path.name for path in timeline.files] == ["timeline.json", "timeline-2.json", "timeline-3.json"]
    learner.fit(1, timeline=str(tmp_path / "other.json"))  # instead of the one among the callbacks
    assert len(timeline.files) == 3
    assert slices_of(tmp_path / "other.json")
    assert not caplog.messages


@pytest.mark.parametrize("below", ["a file/timeline.json", "\0", "a folder"])
def test_a_path_that_cannot_be_written(tmp_path: Path, below: str, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a file").write_text("")
    (tmp_path / "a folder").mkdir()
    timeline = Timeline(tmp_path / below)
    learner = tiny_learner(timeline, n_batches=2)
    history = learner.fit(1)
    assert len(history.rows) == 2
    assert not timeline.files
    (text,) = caplog.messages
    assert text.startswith(f"flowtrain: the timeline {tmp_path / below} cannot be written: ")
    assert text.endswith(". Training runs without it. Choose another path.")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "a folder"]


FULL = """
import resource, signal, sys
from flowtrain.callbacks import Timeline
from flowtrain.testing import tiny_learner
timeline = Timeline(sys.argv[1])
learner = tiny_learner(timeline, n_batches=200)
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
history = learner.fit(1)
print(len(history.rows), learner.cbstate.history)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="it has no limits of resources")
def test_a_full_disk_ends_the_file_and_not_the_training(tmp_path: Path, programs: Programs) -> None:
    done = programs.run(FULL, str(tmp_path / "timeline.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 <CountsMap cbstate.history: {TrainingPhase: Counts(epochs=1, steps=200,")
    (line,) = (line for line in done.stderr.splitlines() if "timeline" in line)
    assert re.fullmatch(
        r"flowtrain: the timeline .*timeline.json ends here, since it cannot be written: File too large. What it has "
        r"can be opened; training is not affected.",
        line,
    )
    found, _ = read_trace(tmp_path / "timeline.json")
    assert len(found) > 5
    assert (tmp_path / "timeline.json").stat().st_size <= 5000


def test_a_file_reaches_its_limit(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json", limit=2000)
    learner = tiny_learner(timeline, n_batches=200)
    learner.fit(2)
    *_, last = events_of(timeline.files[0])
    (times, rest) = last["name"].split(" ", 1)
    assert rest == "times after this are not in the file, which has reached its limit"
    assert int(times.replace(",", "")) > 1000
    assert learner.callbacks.draw(BatchEnd, TrainingPhase).times, "handlers are measured beyond the limit"


def test_a_refused_fit_and_a_dry_run_write_no_file(tmp_path: Path) -> None:
    learner = tiny_learner(Timeline(tmp_path / "runs" / "timeline.json"), n_batches=2)
    with pytest.raises(UsageError, match="fit"):
        learner.fit(0)
    learner.dry_run()
    learner.audit_syncs()
    learner.validate()
    assert not [*tmp_path.iterdir()]


def test_a_fit_that_fails_ends_its_file(tmp_path: Path) -> None:
    class Broken(Callback):
        @on(BatchEnd, TrainingPhase)
        def fail(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            raise ZeroDivisionError("on purpose")

    timeline = Timeline(tmp_path / "timeline.json")
    learner = tiny_learner(timeline, Broken(), n_batches=3)
    with pytest.raises(ZeroDivisionError):
        learner.fit(1)
    slices = slices_of(timeline.files[0])
    check_nested(slices)
    assert names(slices, "handler").count("Broken.fail") == 1
    assert len(batches_of(slices)) == 1
    assert learner.loop.dispatch.clock is None


def test_the_reads_of_a_device_are_there(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json")
    tiny_learner(timeline, n_batches=5, core=TorchCore("cpu", lag=1)).fit(1)
    slices = slices_of(timeline.files[0])
    check_nested(slices)
    assert "waits for the device" in names(slices, "device")


def test_draw_shows_the_times_and_the_longest_path(tmp_path: Path) -> None:
    learner = tiny_learner(Timer(), n_batches=3)
    assert not learner.callbacks.draw(BatchEnd, TrainingPhase).times
    learner.fit(1, timeline=tmp_path / "timeline.json")
    drawing = learner.callbacks.draw(BatchEnd, TrainingPhase)
    assert [*drawing.times] == [0, 1, 2]
    assert all(0 < seconds < 1 for seconds in drawing.times.values())
    assert drawing.critical[0] == 0, "Recorder comes first"
    assert len(drawing.critical) == 2, "the slower one of the others follows it"
    assert " µs" in drawing.svg
    assert 'class="critical"' in drawing.svg
    learner.fit(1)
    assert learner.callbacks.draw(BatchEnd, TrainingPhase).times == drawing.times, "those of the last timeline"


def test_the_strands_of_an_event_are_on_their_threads(tmp_path: Path) -> None:
    class Slow(Callback):
        @on(BatchEnd, TrainingPhase)
        def work(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            torch.ones(8).sum()

    class Other(Slow):
        """The same, of another type."""

    executor = DaskExecutor(workers=2, parallel="always")
    timeline = Timeline(tmp_path / "timeline.json")
    with tiny_learner(timeline, Slow(), Other(), n_batches=3, executor=executor, default_callbacks=False) as learner:
        learner.fit(1)
    slices = slices_of(timeline.files[0])
    check_nested(slices)
    threads = {(one.name, one.thread) for one in slices if one.kind == "handler"}
    assert threads == {("Slow.work", "training"), ("Other.work", "flowtrain-dask_0")}


def test_profiler_and_timeline_are_joined(tmp_path: Path) -> None:
    timeline, profiler = Timeline(tmp_path / "timeline.json"), Profiler(tmp_path, wait=0, warmup=0, active=2)
    tiny_learner(timeline, profiler, n_batches=3).fit(1)
    timeline.join(*profiler.files, to=tmp_path / "both.json")
    events = json.loads((tmp_path / "both.json").read_text("utf-8"))["traceEvents"]
    forward = [each for each in events if each["name"] == "forward"][1]
    ops = [each for each in events if each["name"] == "aten::mul" and each["ph"] == "X"]
    assert any(forward["ts"] <= op["ts"] <= forward["ts"] + forward["dur"] for op in ops), "one clock"
    assert forward["pid"] not in {op["pid"] for op in ops}


def test_a_further_rank_writes_a_file_of_its_own(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path / "timeline.json")
    learner = tiny_learner(timeline, n_batches=1)
    learner.state.rank = 1
    learner.fit(1)
    assert [path.name for path in timeline.files] == ["timeline-rank-1.json"]
    assert {event["pid"] for event in events_of(timeline.files[0])} == {2}
    timeline.ranks = "main"
    learner.fit(1)
    assert len(timeline.files) == 1


def test_wrong_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for wrong in ("", 3, None):
        text = f"Timeline(path={wrong!r}): path is a file to write, such as 'runs/timeline.json'."
        with pytest.raises(UsageError, match=re.escape(text)):
            untyped(Timeline)(wrong)
    with pytest.raises(UsageError, match=r"Timeline\(\): limit, in bytes, .*-1"):
        Timeline("a.json", limit=-1)
    with pytest.raises(CallbackError, match=re.escape("The learner has two Timelines")):
        tiny_learner(Timeline("a.json"), Timeline("b.json"))
    learner = tiny_learner(n_batches=1)
    text = "fit(timeline=True): timeline is a file to write, as fit(10, timeline='a.json')."
    with pytest.raises(UsageError, match=re.escape(text)):
        untyped(learner.fit)(1, timeline=True)
    with pytest.raises(UsageError, match=re.escape("join() needs a timeline, and this callback has written none")):
        Timeline("a.json").join(to=tmp_path / "b.json")
    assert not caplog.messages
