"""Rule 35: the plans of all ranks are compared, and the first difference is named."""

from __future__ import annotations

from flowtrain import Access, BatchEnd, EpochEnd, Event, Read, TrainingPhase, ValidationPhase
from flowtrain.callback.callback import Callback
from flowtrain.callbacks import (
    CustomCallback,
    LearningRate,
    LearningRateMonitor,
    Recorder,
    Scheduler,
    Timer,
    one_cycle,
    throttle,
    when,
)
from flowtrain.graph.plan_texts import Description, first_difference
from flowtrain.graph.registry import Callbacks
from flowtrain.graph.shared_state import Peers
from tests.support.meeting import made_state, no_exchange

R = Read()


def at(name: str, access: Access, event: type[Event] = BatchEnd) -> Callback:
    made = CustomCallback(lambda learner: None, event, TrainingPhase, access=access)
    made.name = name
    return made


def build(*callbacks: Callback) -> Callbacks:
    return Callbacks(callbacks, made_state(), (TrainingPhase, ValidationPhase), peers=Peers(0, 2, no_exchange))


# --- the comparison of plans (rule 35)


def test_equal_plans_are_described_alike() -> None:
    def made() -> Description:
        """Return the description of callbacks with conditions, backends and schedules."""
        callbacks = (Recorder(), LearningRateMonitor(), Timer(), Scheduler({LearningRate: one_cycle(0.1)}))
        return build(*callbacks, when(at("Log", {"batch.loss": R}), BatchEnd, lambda number, phase: True)).describe()

    assert first_difference([made(), made(), made()]) == ""
    assert ("(BatchEnd, TrainingPhase)", "Log.call on main rank if When(BatchEnd) {batch.loss: Read()}") in made()


def test_the_first_difference_is_named() -> None:
    one = build(Recorder(), at("Log", {"batch.loss": R}, EpochEnd)).describe()
    other = build(Recorder(), at("Log", {"batch.loss": Read(reduce="sum")}, EpochEnd)).describe()
    less = build(Recorder()).describe()
    assert first_difference([one, one, other]) == (
        'rank 2 has Log.call on main rank {batch.loss: Read(reduce="sum")} at (EpochEnd, TrainingPhase), '
        "the main rank has Log.call on main rank {batch.loss: Read()}"
    )
    assert first_difference([one, less]) == (
        "rank 1 has nothing more at (EpochEnd, TrainingPhase), "
        "the main rank has Log.call on main rank {batch.loss: Read()}"
    )
    assert first_difference([less, one]) == (
        "rank 1 has Log.call on main rank {batch.loss: Read()} at (EpochEnd, TrainingPhase), "
        "the main rank has nothing more"
    )


def test_another_condition_is_a_difference() -> None:
    def made(every: int) -> Description:
        """Return the description of a callback that is throttled."""
        return build(throttle(at("Log", {"batch.loss": R}), BatchEnd, every=every)).describe()

    assert first_difference([made(2), made(3)]).startswith(
        "rank 1 has Log.call on main rank if Every(BatchEnd, every=3) {batch.loss: Read()} at (BatchEnd, TrainingPha"
    )
