"""What both type checkers must reject: each line with the mark, and no other."""

from __future__ import annotations

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    EpochEnd,
    Learner,
    LearnerView,
    Phase,
    Read,
    Resolution,
    RunFirst,
    TrainingPhase,
    ValidationPhase,
    on,
    resolve,
)


class Wrong(Callback):
    def state_access(self) -> Access:
        return {"batch.loss": Read}  # rejected: Read without parentheses

    @on(EpochEnd, TrainingPhase)  # rejected: the handler takes another event
    def other_event(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        pass

    @on(EpochEnd, TrainingPhase)  # rejected: the handler takes another phase
    def other_phase(self, event: EpochEnd, phase: ValidationPhase, learner: LearnerView) -> None:
        pass

    @on(EpochEnd)  # rejected: it is called for every phase
    def one_phase_of_all(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        pass

    @on(EpochEnd, TrainingPhase)  # rejected: an argument is missing
    def too_few(self, event: EpochEnd, phase: TrainingPhase) -> None:
        pass

    @on(EpochEnd, TrainingPhase)  # rejected: an argument too many
    def too_many(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView, more: int) -> None:
        pass

    @on(EpochEnd, TrainingPhase)  # rejected: a view is not the learner
    def whole_learner(self, event: EpochEnd, phase: TrainingPhase, learner: Learner) -> None:
        pass

    @on(TrainingPhase, EpochEnd)  # rejected: phase and event are swapped
    def swapped(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        pass

    @on(EpochEnd, TrainingPhase, access={"batch.loss": Read})  # rejected: Read without parentheses
    def its_own_access(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        pass

    @on(EpochEnd, TrainingPhase)
    def trains(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.fit(1)  # rejected: training inside a handler

    @on(EpochEnd, ValidationPhase)
    def misspells(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        print(learner.bacth)  # rejected: no such attribute
        learner.fire(EpochEnd)  # rejected: the type in place of an event

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        return RunFirst  # rejected: the type in place of a resolution


@on(EpochEnd, TrainingPhase, Wrong)  # rejected: another callback type
def added(self: ValidationPhase, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
    pass


resolve(Wrong(), Wrong, None)  # rejected: a callback in place of its type
