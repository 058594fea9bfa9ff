"""What both type checkers must accept: every way to write a handler that works at run time."""

# pyright: strict, reportUnknownMemberType=false, reportUnknownLambdaType=false

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    BatchEnd,
    Callback,
    EpochEnd,
    Event,
    History,
    Learner,
    LearnerView,
    NoConflict,
    Phase,
    Read,
    Resolution,
    RunFirst,
    StepContext,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
    resolve,
    seed_everything,
)
from flowtrain.callbacks import (
    SWA,
    CustomCallback,
    LearningRate,
    Metrics,
    Profiler,
    Scheduler,
    cosine,
    per_epoch,
    swa_lr,
    throttle,
)
from flowtrain.metrics import accuracy


@dataclass(frozen=True)
class Improved(Event):
    """An event with a field."""

    loss: float


class Printer(Callback):
    """Handlers of every form."""

    def state_access(self) -> Access:
        return {"batch.loss": Read(), "cbstate": {"best": Write(), "seen": Read(optional=True)}}

    def run_after(self) -> tuple[type[Callback], ...]:
        return (Metrics,)

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        return RunFirst(other) if isinstance(other, Metrics) else None

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.best = 0.0

    @on(EpochEnd, TrainingPhase)
    def show(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        print(float(learner.batch.loss), learner.cbstate.history[phase].steps)

    @on(BatchEnd)
    def any_phase(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        learner.fire(Improved(0.5))

    @on(Improved, ValidationPhase, access={"batch.loss": Read()})
    def wider(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.show(EpochEnd(), TrainingPhase(), learner)


@on(Improved, TrainingPhase, Printer, access={"cbstate.best": Write()})
def added(self: Printer, event: Improved, phase: TrainingPhase, learner: LearnerView) -> None:
    learner.cbstate.best = event.loss


class TwoSteps(AbstractTrainingPhase):
    """A phase with a step of its own."""

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self, inputs=raw) as batch:
            with learner.forward():
                batch.loss = learner.model(batch.inputs).mean()
            learner.backward(self, batch.loss)
            learner.update(self)


resolve(Printer, Metrics, NoConflict())

printer: Printer = throttle(Printer(), BatchEnd, every=10)

with Learner(
    torch.nn.Linear(2, 2),
    F.cross_entropy,
    data={TrainingPhase: [], ValidationPhase(): []},
    optimizer=partial(torch.optim.AdamW, lr=1e-3),
    callbacks=[
        printer,
        Metrics(accuracy),
        CustomCallback(lambda learner: learner.batch, EpochEnd),
        SWA(10, data=[torch.zeros(2, 2)]),
        Profiler("runs/profile", activities=[torch.profiler.ProfilerActivity.CPU]),
        Scheduler({LearningRate: per_epoch(swa_lr(cosine(0.1), 0.05, start=9, shape="linear"))}),
    ],
    default_callbacks="quiet",
) as learner:
    history: History = learner.fit(10)
    values: list[float] = history[ValidationPhase]["Loss"].values
    measured: dict[str, float] = learner.evaluate([(torch.ones(1, 1), torch.ones(1, 1))], ValidationPhase)
    learner.fit(steps=100, validate_every=10)
    learner.fit(10, validate_every=2, limit_batches=0.1)
    learner.fit(10, limit_batches={TrainingPhase: 100, ValidationPhase(): 0.5})
    slowest = max(learner.dry_run(), key=lambda each: each.milliseconds)
    print(slowest.handler, seed_everything(0, deterministic="warn"))
    learner.epoch(TrainingPhase, [])
    print(learner.step(TrainingPhase(), None).loss, learner.stopped, learner.callbacks.explain())
