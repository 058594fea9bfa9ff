"""Profiler: the traces that it writes, and that it is off afterwards, however the fit ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

from flowtrain import (
    BatchEnd,
    Callback,
    CallbackError,
    CancelFittingException,
    FitEnd,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    UsageError,
    on,
)
from flowtrain.callbacks import Profiler
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.untyped import untyped


def batches_in(path: Path) -> int:
    """Return the number of batches in a trace, each of which is a step of torch's profiler with operators in it."""
    events = json.loads(path.read_text("utf-8"))["traceEvents"]
    names = {event.get("name", "") for event in events}
    assert "aten::mul" in names
    return len([name for name in names if re.fullmatch(r"ProfilerStep#\d+", name)])


def traces(profiler: Profiler) -> list[tuple[str, int]]:
    assert sorted(profiler.folder.iterdir()) == sorted(profiler.files), "only complete traces, each under its name"
    return [(path.name.removesuffix(".pt.trace.json"), batches_in(path)) for path in profiler.files]


def is_off() -> bool:
    """Tell whether torch's profiler is off: then it can begin and see an operator."""
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
        torch.ones(2).mul(3)
    return "aten::mul" in {event.name for event in profile.events() or ()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [("batch-000005", 3)]),
        ({"wait": 0, "warmup": 0, "active": 2, "repeat": 2}, [("batch-000002", 2), ("batch-000004", 2)]),
        ({"repeat": 0}, [("batch-000005", 3), ("batch-000010", 3), ("batch-000015", 3)]),
        ({"skip_first": 4, "wait": 2, "active": 1, "repeat": 2}, [("batch-000008", 1), ("batch-000012", 1)]),
        ({"wait": 100}, []),
    ],
    ids=str,
)
def test_the_schedule_is_that_of_torch(
    options: dict[str, Any], expected: list[tuple[str, int]], tmp_path: Path
) -> None:
    profiler = Profiler(tmp_path / "runs" / "profile", **options)
    learner = tiny_learner(profiler, n_batches=8)
    learner.fit(2)
    assert traces(profiler) == expected
    assert is_off()


def test_each_fit_has_its_traces_and_none_is_replaced(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path, active=1)
    learner = tiny_learner(profiler, n_batches=8)
    learner.fit(1)
    state = profiler.state_dict()
    learner.fit(1)
    again = Profiler(tmp_path / "more", active=1)
    again.load_state_dict(state)
    tiny_learner(again, n_batches=8).fit(1)
    assert traces(again) == [("batch-000011", 1)]
    assert [path.name for path in profiler.files] == ["batch-000003.pt.trace.json", "batch-000011.pt.trace.json"]


class Stops(Callback):
    """Raises in the fourth batch, which is an active one."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    @on(BatchEnd, TrainingPhase, access={"cbstate.history": Read()})
    def stop(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        if learner.cbstate.history[phase].steps == 4:
            raise self.error


@pytest.mark.parametrize(
    "error", [CancelFittingException("enough"), ValueError("broken"), KeyboardInterrupt()], ids=repr
)
@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_it_is_off_however_the_fit_ends(error: BaseException, executor: str, tmp_path: Path) -> None:
    profiler = Profiler(tmp_path)
    with tiny_learner(profiler, Stops(error), executor=executor) as learner:
        with nullcontext() if isinstance(error, CancelFittingException) else pytest.raises(type(error)):
            learner.fit(1)
        assert is_off()
        [(_, batches)] = traces(profiler)
        assert batches in (2, 3)  # the third and the fourth batch, and the end of the fit
        learner.fit(1, limit_batches=3)
        assert is_off()


class Busy(Callback):
    """Runs beside the profiler at the end of a batch."""

    def __init__(self) -> None:
        self.seen = 0

    @on(BatchEnd, TrainingPhase)
    def work(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.seen += 1


@pytest.mark.parametrize(
    "options",
    [{"parallel": "always", "workers": 4}, pytest.param({"cluster": "local"}, marks=pytest.mark.slow)],
    ids=["threads", "processes"],
)
def test_beside_handlers_on_other_threads(options: dict[str, Any], tmp_path: Path) -> None:
    """The profiler runs on the training thread, and training has the serial result."""
    plain = tiny_learner()
    plain.fit(1)
    profiler = Profiler(tmp_path)
    with tiny_learner(Busy(), Busy(), profiler, executor=DaskExecutor(**options)) as learner:
        learner.fit(1)
    assert traces(profiler) == [("batch-000005", 3)]
    assert torch.equal(learner.model.coeff, plain.model.coeff)
    assert is_off()


def test_what_is_recorded(tmp_path: Path) -> None:
    profiler = Profiler(
        tmp_path, activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True, with_stack=True
    )
    tiny_learner(profiler).fit(1)
    text = profiler.files[0].read_text("utf-8")
    assert '"Input Dims"' in text
    assert '"[memory]"' in text
    assert "step.py" in text


def test_a_dry_run_writes_no_trace(tmp_path: Path) -> None:
    found = tiny_learner(Profiler(tmp_path / "profile", wait=0, active=1)).dry_run()
    assert {"Profiler.begin", "Profiler.step", "Profiler.end"} <= {each.handler for each in found}
    assert not (tmp_path / "profile").exists()


def test_where_it_cannot_begin(tmp_path: Path) -> None:
    learner = tiny_learner(Profiler(tmp_path / "one"))
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as outer:
        with pytest.raises(UsageError) as caught:
            learner.fit(1)
        torch.ones(2).mul(3)
    assert str(caught.value) == (
        "Profiler cannot begin: another profiler of torch is active, and there can be one at a time. End it before "
        "fit()."
    )
    assert "aten::mul" in {event.name for event in outer.events() or ()}, "the other one was not disturbed"
    assert learner.model.coeff == 0
    (tmp_path / "file").write_text("")
    with pytest.raises(CallbackError, match=r"cannot make the folder .*file/traces: .*Choose another"):
        tiny_learner(Profiler(tmp_path / "file" / "traces")).fit(1)
    with pytest.raises(CallbackError) as refused:
        tiny_learner(Profiler(tmp_path / "a"), Profiler(tmp_path / "b"))
    assert str(refused.value) == (
        "The learner has two Profilers, and torch has one profiler at a time. Give it one; repeat= makes several "
        "traces."
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Profiler(untyped(3)), "Profiler(folder=3): folder is a path, such as 'runs/profile'."),
        (lambda: Profiler(""), "Profiler(folder=''): folder is a path, such as 'runs/profile'."),
        (lambda: Profiler("a", wait=-1), "Profiler(): wait is a whole number, at least 0, got -1."),
        (lambda: Profiler("a", warmup=True), "Profiler(): warmup is a whole number, at least 0, got True."),
        (lambda: Profiler("a", active=0), "Profiler(): active is a whole number, at least 1, got 0."),
        (lambda: Profiler("a", repeat=-1), "Profiler(): repeat is a whole number, at least 0, got -1."),
        (
            lambda: Profiler("a", skip_first=untyped(0.5)),
            "Profiler(): skip_first is a whole number, at least 0, got 0.5.",
        ),
    ],
)
def test_arguments_that_are_refused(make: Callable[[], Profiler], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == message


class BrokenOff(Profiler):
    """Is interrupted at the end of the first fit, so that the profiler stays on."""

    broken = False

    def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        if not self.broken:
            self.broken = True
            raise KeyboardInterrupt
        super().end(event, phase, learner)


def test_the_next_fit_ends_what_an_interrupt_has_left_on(tmp_path: Path) -> None:
    profiler = BrokenOff(tmp_path, wait=0, warmup=1, active=50)
    learner = tiny_learner(profiler, n_batches=4)
    with pytest.raises(KeyboardInterrupt):
        learner.fit(1)
    assert profiler.files == []
    learner.fit(1)
    assert [name for name, _ in traces(profiler)] == ["batch-000004", "batch-000008"]
    assert is_off()


def test_the_traces_of_a_further_rank_have_names_of_their_own(tmp_path: Path) -> None:
    profiler = Profiler(tmp_path)
    learner = tiny_learner(profiler)
    learner.state.rank = 1
    learner.fit(1)
    assert [path.name for path in profiler.files] == ["rank-1-batch-000005.pt.trace.json"]
