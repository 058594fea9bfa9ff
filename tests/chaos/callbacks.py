"""Callbacks whose log tells what happened to them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

import torch

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CancelFittingException,
    EpochEnd,
    LearnerView,
    Phase,
    Read,
    UpdateEnd,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callback.conditions import Every
from flowtrain.callback.phases import TrainingPhase
from flowtrain.logging import JsonlBackend
from flowtrain.logging.backend import Text, Value
from flowtrain.logging.records import log

__all__ = ["Chain", "Enough", "Hang", "Losses", "Pace", "Paint"]


class Chain(Callback):
    """Logs at each batch a digest of all so far, so that one that is lost, doubled or swapped changes all later ones.

    Its state is four megabytes, which do not travel with every batch of events. Every 50th record is a long one.
    """

    deferrable = True

    def __init__(self, backend: JsonlBackend) -> None:
        self.backends = (backend,)
        self.digest = ""
        self.count = 0
        self.window = torch.zeros(1 << 20)

    def state_access(self) -> Access:
        return {"batch.loss": Read(), self.backends[0].resource: Write()}

    @on(BatchEnd, TrainingPhase)
    def link(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Add a batch to the chain."""
        loss = float(learner.batch.loss)
        self.count += 1
        self.digest = hashlib.sha256(f"{self.digest} {loss!r}".encode()).hexdigest()
        self.window[self.count % len(self.window)] += loss
        text = self.digest * (400 if self.count % 50 == 0 else 1)
        log(self.backends, Text(text), "Chain", self.count, ("Step", repr(phase)))


class Losses(Callback):
    """Logs the loss of each batch and keeps nothing."""

    deferrable = True

    def __init__(self, backend: JsonlBackend) -> None:
        self.backends = (backend,)
        self.count = 0

    def state_access(self) -> Access:
        return {"batch.loss": Read(), self.backends[0].resource: Write()}

    @on(BatchEnd, TrainingPhase)
    def record(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Log the loss."""
        self.count += 1
        log(self.backends, Value(learner.batch.loss), "Loss", self.count, ("Step", repr(phase)))


class Paint(Callback):
    """Fills a large tensor with the number of the batch, where it is."""

    def state_access(self) -> Access:
        return {"cbstate.canvas": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.canvas = torch.zeros(1 << 19)
        self.count = 0

    @on(BatchEnd, TrainingPhase)
    def fill(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Fill it."""
        self.count += 1
        learner.cbstate.canvas.fill_(self.count)


class Hang(Callback):
    """Logs the least and the largest of that tensor, which differ if a snapshot is torn.

    Two megabytes are enough for a batch that a worker copies out of the memory of this process.
    """

    deferrable = True

    def __init__(self, backend: JsonlBackend, every: int) -> None:
        self.backends = (backend,)
        self.conditions = (Every(BatchEnd, every),)

    def state_access(self) -> Access:
        return {"cbstate.canvas": Read(), self.backends[0].resource: Write()}

    @on(BatchEnd, TrainingPhase)
    def look(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Log it, several times: a snapshot that somebody overwrites meanwhile is not always the same."""
        canvas = learner.cbstate.canvas
        step = int(canvas[0])
        for look in range(4):
            low, high = canvas.aminmax()
            log(self.backends, Text(f"{float(low)} {float(high)}"), f"Canvas{look}", step, ("Step", repr(phase)))


class Pace(Callback):
    """Makes a batch take some time: what is looked for here does not depend on how fast a line can be written."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    @on(UpdateEnd)
    def wait(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
        """Sleep."""
        time.sleep(self.seconds)


class Enough(Callback):
    """Ends the fit after the validation of an epoch.

    Args:
        is_enough: Is asked, with the number of epochs so far.
    """

    def __init__(self, is_enough: Callable[[int], bool]) -> None:
        self.is_enough = is_enough
        self.epochs = 0

    @on(EpochEnd, ValidationPhase)
    def ask(self, event: EpochEnd, phase: ValidationPhase, learner: LearnerView) -> None:
        """Ask."""
        self.epochs += 1
        if self.is_enough(self.epochs):
            raise CancelFittingException("enough")
