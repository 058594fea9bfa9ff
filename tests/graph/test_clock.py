"""The clock: the parts of batches that it finds between events, the times of handlers, and what it holds."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from flowtrain import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    Callback,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    LearnerView,
    LossBegin,
    Phase,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    on,
)
from flowtrain.graph.clock import HAND_OVER, HANDLER, IN_LANE, Clock, Mark, Measured, TimelineRow, spanning
from flowtrain.testing import tiny_learner

STEP: list[type[Event]] = [BatchBegin, LossBegin, BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd]


class Two(Callback):
    """Has two handlers."""

    @on(BatchEnd, TrainingPhase)
    def work(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        pass

    @on(BatchBegin, TrainingPhase)
    def begin(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        pass


def fired(*events: type[Event]) -> list[tuple[str, Any]]:
    """Return the name and the further values of each stamp that events of these types leave, without handlers."""
    clock = Clock(lambda: (3, 7))
    for event_type in events:
        runner = clock.runner(event_type, TrainingPhase, None)
        assert runner is not None
        runner(event_type(), TrainingPhase())
    assert all(begin <= end for _, begin, end, _, _ in clock.stamps)
    return [(mark.name, args) for mark, _, _, _, args in clock.stamps]


def names(*events: type[Event]) -> list[str]:
    return [name for name, _ in fired(*events)]


def test_the_parts_of_a_bundled_step() -> None:
    assert fired(*STEP) == [
        ("forward", None), ("loss", None), ("backward", None), ("update", None), ("batch", (3, 7))
    ]  # fmt: skip


def test_the_parts_of_a_validation_step_and_of_steps_of_users() -> None:
    assert names(BatchBegin, LossBegin, BatchEnd) == ["forward", "loss", "batch"]
    assert names(BatchBegin, BatchEnd) == ["forward and loss", "batch"]
    again = [BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd]
    assert names(BatchBegin, *again, *again, BatchEnd) == [
        "forward and loss", "backward", "update", "forward and loss", "backward", "update", "batch",
    ]  # fmt: skip


def test_a_batch_that_only_accumulates_or_is_cancelled() -> None:
    assert names(BatchBegin, LossBegin, BackwardBegin, BackwardEnd, BatchEnd) == [
        "forward", "loss", "backward", "batch",
    ]  # fmt: skip
    assert names(BatchBegin, LossBegin, BatchCancelled) == ["forward", "batch"]


def test_an_update_after_the_last_batch() -> None:
    assert names(BatchBegin, BatchEnd, UpdateBegin, UpdateEnd) == ["forward and loss", "batch", "update"]


def test_an_epoch() -> None:
    assert fired(EpochBegin, EpochEnd) == [("epoch of TrainingPhase", {"epoch": 3})]


def test_an_event_that_bounds_nothing_has_its_runner_unchanged() -> None:
    clock = Clock(lambda: (0, 0))

    def runner(event: Event, phase: Phase) -> None: ...

    assert clock.runner(FitBegin, Phase, runner) is runner
    assert clock.runner(FitBegin, Phase, None) is None


def test_a_handler_that_raises_leaves_its_stamp_and_that_of_the_batch() -> None:
    clock = Clock(lambda: (1, 1))

    def fail(event: Event, phase: Phase) -> None:
        raise ZeroDivisionError

    runner = clock.runner(BatchEnd, TrainingPhase, fail)
    assert runner is not None
    with pytest.raises(ZeroDivisionError):
        runner(BatchEnd(), TrainingPhase())
    assert [mark.name for mark, *_ in clock.stamps] == ["batch"]

    def handler(event: Event, phase: Phase, view: Any) -> None:
        raise ZeroDivisionError

    mark = Mark("Mine.fail", HANDLER)
    with pytest.raises(ZeroDivisionError):
        clock.timed(mark, handler)(BatchEnd(), TrainingPhase(), None)  # type: ignore[arg-type]  # it looks at no view
    assert clock.stamps[-1][0] is mark
    assert clock.stamps[-1][3] == threading.get_ident()


def test_no_batch_is_held_while_the_next_one_is_computed() -> None:
    class Batch:
        pass

    held: list[weakref.ref[Batch]] = []

    def loader() -> Iterator[Batch]:
        for _ in range(3):
            assert all(ref() is None for ref in held)
            yield Batch()

    clock = Clock(lambda: (0, 0))
    for batch in clock.batches(loader()):
        held.append(weakref.ref(batch))
        del batch
    assert len(held) == 3
    assert [mark.name for mark, *_ in clock.stamps] == ["data"] * 4


def test_an_error_of_a_loader_is_raised_as_it_is() -> None:
    def loader() -> Iterator[int]:
        yield 1
        raise KeyError("broken")

    clock = Clock(lambda: (0, 0))
    with pytest.raises(KeyError, match="broken"):
        list(clock.batches(loader()))


def test_the_median_of_a_handler_is_of_the_kind_with_most_times() -> None:
    learner = tiny_learner(Two(), default_callbacks=False)
    plan = learner.callbacks.plan(BatchEnd, TrainingPhase)
    measured = Measured()
    key = BatchEnd, TrainingPhase
    assert measured.of(plan) == {}
    assert measured.count(plan) == 0
    for kind, times in ((HANDLER, [3.0]), (HAND_OVER, [0.2, 0.1, 0.3]), (IN_LANE, [2.0] * 9)):
        seconds = measured.mark(key, "Two.work", kind).seconds
        assert seconds is not None
        seconds.extend(times)
    assert measured.of(plan) == {0: 0.2}
    assert measured.median(plan, 0, HANDLER, IN_LANE) == 2.0
    assert measured.count(plan) == 9
    assert measured.of(learner.callbacks.plan(BatchBegin, TrainingPhase)) == {}
    assert measured.mark(key, "Two.work", HANDLER) is measured.mark(key, "Two.work", HANDLER)


def test_the_last_thousand_times_are_kept() -> None:
    seconds = Measured().mark((BatchEnd, TrainingPhase), "Two.work", HANDLER).seconds
    assert seconds is not None
    seconds.extend(itertools.repeat(1.0, 5000))
    assert len(seconds) == 1000


def test_spans_have_their_values_and_their_line() -> None:
    clock = Clock(lambda: (0, 0))
    with spanning(clock, "waits", "stall", lane="Log"), spanning(None, "nothing", "stall"):
        pass
    track = TimelineRow("worker tcp://a", "lane Log")
    clock.add(Mark("batch of 3", "lane"), 1, 2, track, {"events": 3})
    (waits, _, _, thread, _), (_, begin, end, other, args) = clock.stamps
    assert (waits.name, waits.kind, waits.args) == ("waits", "stall", {"lane": "Log"})
    assert thread == threading.get_ident()
    assert (begin, end, other, args) == (1, 2, track, {"events": 3})
