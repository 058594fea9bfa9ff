"""A training in which one rank alone cancels, fails or gets a signal, and what it looks like on each rank."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flowtrain import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    Event,
    Learner,
    LearnerView,
    Phase,
    TrainingPhase,
    ValidationPhase,
    on,
)
from tests.ranks.by_hand import Batches, classes, differing, train, trained
from tests.support.fired import short
from tests.support.ranks import Failure, rank, send

__all__ = ["ACTIONS", "BATCHES", "EPOCHS", "SGD", "Alone", "End", "Everywhere", "by_hand", "fit", "model"]

EPOCHS, BATCHES = 2, 4
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)

ACTIONS: dict[str, Callable[[], BaseException | None]] = {
    "batch": lambda: CancelBatchException("only here"),
    "epoch": lambda: CancelEpochException("only here"),
    "fit": lambda: CancelFittingException("only here"),
    "error": lambda: ValueError("only here"),
    "SIGTERM": lambda: send(signal.SIGTERM, rank()),
    "SIGINT": lambda: send(signal.SIGINT, rank()),
    "SIGTERM to all": lambda: send(signal.SIGTERM, 0, 1),
    "SIGINT to all": lambda: send(signal.SIGINT, 0, 1),
    "SIGKILL": lambda: send(signal.SIGKILL, rank()),
    "SIGSTOP": lambda: send(signal.SIGSTOP, rank()),
}
"""What a rank can do alone: return an exception to raise, or send a signal."""


class Everywhere(Callback):
    """Records every event of training on every rank."""

    ranks = "every"

    def __init__(self) -> None:
        self.names: list[str] = []

    @on(Event)
    def note(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if not isinstance(phase, ValidationPhase):
            self.names.append(type(event).__name__)


class Alone(Callback):
    """Acts on one rank, at the n-th firing of an event in a phase."""

    ranks = "every"

    def __init__(self, event: type[Event], phase: type[Phase], action: str, nth: int, on_rank: int = 1) -> None:
        self.event, self.phase, self.action, self.left, self.on_rank = event, phase, action, nth, on_rank

    @on(Event)
    def maybe(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if type(event) is self.event and isinstance(phase, self.phase) and rank() == self.on_rank:
            self.left -= 1
            if not self.left:
                failure = ACTIONS[self.action]()
                if failure is not None:
                    raise failure


@dataclass
class End:
    """What a rank has after its fit: all but `error` and `stopped` must be equal on all ranks.

    Attributes:
        weights: The result of training, by path and as bits.
        counts: Epochs, batches and updates of the training phase.
        rows: The text of the metrics of all epochs.
        events: The events of training that begin and end, in short.
        stopped: The text of the cancel that has ended the fit.
        error: The exception that `fit` has raised.
    """

    weights: dict[str, Any] = field(repr=False)
    counts: tuple[int, ...]
    rows: str
    events: str
    stopped: str | None
    error: Failure | None

    def unlike(self, other: End) -> list[str]:
        """Return which parts differ on another rank."""
        names = [name for name in ("counts", "rows") if getattr(self, name) != getattr(other, name)]
        return names + differing(self.weights, other.weights)


def model() -> nn.Module:
    """Return a model that is equal on all ranks."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def fit(
    *callbacks: Callback,
    model: Any = None,
    raises: bool = False,
    phase: type[Phase] = TrainingPhase,
    run: Callable[[Learner], object] = lambda learner: learner.fit(EPOCHS),
    **options: Any,
) -> End:
    """Train for two epochs of four batches each, with validation, and return the end on this rank.

    Args:
        callbacks: The callbacks, before one that records events.
        model: The model, if it is not the usual one; or several by name.
        raises: Whether an error of the fit is raised, and not returned.
        phase: The phase that trains.
        run: The function that trains.
        options: Arguments of the learner that replace the usual ones.
    """
    watch, error = Everywhere(), None
    chosen: dict[str, Any] = {
        "data": {phase: classes(BATCHES), ValidationPhase: classes(2)},
        "optimizer": SGD,
        "default_callbacks": "quiet",
        "lossfn": cross_entropy,
        **options,
    }
    models = model or globals()["model"]()
    with Learner(models, callbacks=[*callbacks, watch], **chosen) as learner:
        try:
            run(learner)
        except BaseException as failure:
            if raises:
                raise
            error = Failure.of(failure)
        counts = tuple(learner.cbstate.history[phase])
        rows = "\n".join(map(repr, learner.history.rows))
        stopped = None if learner.stopped is None else str(learner.stopped)
        pairs = [(models, learner.optimizer)]
        if isinstance(models, dict):
            pairs = [(models[name], learner.optimizer[name]) for name in models]
        weights = {f"{n}{path}": bits for n, pair in enumerate(pairs) for path, bits in trained(*pair).items()}
        return End(weights, counts, rows, short(watch.names), stopped, error)


def by_hand(*epochs: Batches) -> dict[str, Any]:
    """Return the result of a training by hand over these batches, as `End.weights` has it."""
    made = model()
    optimizer = train(made, SGD, [batches for batches in epochs if batches])
    return {f"0{path}": bits for path, bits in trained(made, optimizer).items()}


class FailingLoader:
    """A loader that raises when it is asked for its third batch, on rank 1, and has a length or not."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(self.batches):
            if number == 2 and rank() == 1:
                raise ValueError("only here")
            yield batch


class SizedFailingLoader(FailingLoader):
    def __len__(self) -> int:
        return len(self.batches)


class Unsized:
    """A loader that does not know its length."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.batches


class FailingModel(nn.Module):
    """The usual model; raises in its n-th call in training on rank 1."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.inner, self.left = model(), nth

    def forward(self, inputs: Tensor) -> Any:
        if self.training and rank() == 1:
            self.left -= 1
            if not self.left:
                raise ValueError("only here")
        return self.inner(inputs)


class FailingLoss:
    """Cross entropy; raises in its n-th call on rank 1."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if rank() == 1:
            self.left -= 1
            if not self.left:
                raise ValueError("only here")
        return cross_entropy(outputs, targets)


class FailingOptimizer(torch.optim.SGD):
    """Raises in its second step on rank 1."""

    left = 2

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # this one takes no closure
        if rank() == 1:
            self.left -= 1
            if not self.left:
                raise ValueError("only here")
        super().step()
