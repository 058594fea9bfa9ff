"""Phases: types that say what kind of epoch runs, which events it fires, and what happens in one batch, its step.

A phase has no data of its own: there is one instance of each type, and the type works as a key wherever the instance
does. A phase of your own is a subclass. To run the usual supervised step on other data, subclass and write nothing::

    class OODPhase(AbstractValidationPhase):
        "Validate on data from elsewhere."

To run a step of your own, override `step` (see `StepContext` for what it may use)::

    class GANPhase(AbstractTrainingPhase):
        def step(self, learner, raw):
            with learner.run_batch(self, real=raw) as batch:
                ...
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Protocol, Self

import torch

from flowtrain.callback.batch_size import measure
from flowtrain.callback.events import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    EpochBegin,
    EpochCancelled,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    LossBegin,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.callback.modes import Modes
from flowtrain.errors import DataError, UsageError, describe

__all__ = [
    "AbstractTrainingPhase",
    "AbstractValidationPhase",
    "Phase",
    "StepContext",
    "TrainingPhase",
    "ValidationPhase",
]


class StepContext(Protocol):
    """What a step gets as ``learner``: the state of training, and the parts of a batch.

    `train` and `evaluate` are the steps of the bundled phases in one piece; a step of your own is written with the
    other methods.
    """

    @property
    def model(self) -> Any:
        """The model, or all of them by name."""

    @property
    def lossfn(self) -> Any:
        """The loss function."""

    @property
    def optimizer(self) -> Any:
        """The optimizer, or all of them by name."""

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters by name."""
        ...

    @property
    def data(self) -> Any:
        """The loaders by phase."""

    @property
    def batch(self) -> Any:
        """The state of the current, or last, batch."""

    @property
    def cbstate(self) -> Any:
        """What callbacks share with each other."""

    def run_batch(self, phase: Phase, **state: Any) -> AbstractContextManager[Any]:
        """Give the batch state, with `state` moved to the device, between `BatchBegin` and `BatchEnd`.

        An exception in its body closes the batch with `BatchCancelled` and is raised again, so a step may catch it.

        Raises:
            UsageError: A batch is open.
        """
        ...

    def forward(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass: autocast, if the precision asks for it."""
        ...

    def backward(self, phase: Phase, loss: torch.Tensor, name: str | None = None) -> None:
        """Run the backward pass between `BackwardBegin` and `BackwardEnd`, scaled and divided as the core is set up.

        Args:
            phase: The phase whose step calls this.
            loss: A tensor with one element. If it is ``batch.loss``, that is detached afterwards.
            name: Which of several optimizers the loss is for: only its parameters get gradients. Without a name all
                parameters that the loss depends on do, also those of a model that it only passes through.

        Raises:
            CoreError: The loss is no tensor with one element, or there is no optimizer of that name.
            LossError: The loss has no graph.
            UsageError: No batch is open.
        """

    def update(self, phase: Phase, name: str | None = None) -> None:
        """Clip and step an optimizer, or all, between `UpdateBegin` and `UpdateEnd`, once its group is complete.

        Args:
            phase: The phase whose step calls this.
            name: Which of several optimizers.

        Raises:
            CoreError: There is no optimizer of that name.
            UsageError: No batch is open.
        """

    def fire(self, event: Event, phase: Phase) -> None:
        """Fire an event of your own."""

    def train(self, phase: AbstractTrainingPhase, raw: Any) -> None:
        """Run one batch: forward, loss, backward, update. What handlers put into the batch is used from then on."""

    def evaluate(self, phase: AbstractValidationPhase, raw: Any) -> None:
        """Run one batch: forward and loss."""


class Phase:
    """What kind of epoch runs. `FitBegin` and `FitEnd` are fired with `Phase()` itself.

    Attributes:
        events: The library's events that the phase fires, in order; ``None`` where that is not known.
        provides: What the phase puts into the batch state, each entry with the event from which on it is there.
            ``None`` where that is not known: then a missing entry is found when it is read, not before.
    """

    events: ClassVar[tuple[type[Event], ...] | None] = (FitBegin, FitEnd)
    provides: ClassVar[Mapping[str, type[Event]] | None] = None
    _instance: ClassVar[Any]

    def __new__(cls) -> Self:
        instance = cls.__dict__.get("_instance")
        if instance is None:
            instance = cls._instance = super().__new__(cls)
        return instance

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            raise UsageError(
                f"{cls.__name__} defines __init__, but a phase has no fields: there is one instance of each type. "
                f"Keep such values in the learner's cbstate or in a callback."
            )
        # A step of its own fires events and fills the batch in its own way: what is inherited would be wrong.
        if "step" in cls.__dict__:
            for name in ("events", "provides"):
                if name not in cls.__dict__:
                    setattr(cls, name, None)

    def step(self, learner: StepContext, raw: Any) -> None:
        """Run one batch. `raw` is what the loader gave."""
        raise UsageError(
            f"{self!r} has no step. Subclass TrainingPhase, ValidationPhase or their abstract bases, or define step()."
        )

    def batch_size(self, inputs: Any, targets: Any) -> Any:
        """Return how many samples a batch has, which is its weight in the means of an epoch (`Metrics`).

        What is not overridden takes the length that the tensors of both have in common, and `Metrics` warns where it
        cannot be told. Override it for data whose first dimension is no batch, as ``return targets.shape[1]`` for time
        first, or ``return (targets != -100).sum()`` where a sample is a token.

        Args:
            inputs: ``batch.inputs``; ``None`` where a step of one's own puts nothing there.
            targets: ``batch.targets``, likewise.
        """
        return measure(inputs, targets)[0]

    def mode(self, modules: Iterable[torch.nn.Module]) -> AbstractContextManager[Modes | None]:
        """Return the context in which an epoch of this phase runs, handlers included; it may give what sets modes."""
        return nullcontext()

    def __reduce__(self) -> tuple[type[Phase], tuple[()]]:
        return type(self), ()

    def __repr__(self) -> str:
        return type(self).__name__


class _Supervised(Phase):
    """What training and validation on pairs have in common."""

    def split(self, raw: Any) -> tuple[Any, Any]:
        """Return ``(inputs, targets)`` of what the loader gave. Override it for data that is no pair.

        Raises:
            DataError: `raw` is not a tuple or list of two.
        """
        if not isinstance(raw, (tuple, list)) or len(raw) != 2:
            raise DataError(
                f"{self!r} needs (inputs, targets) from its loader and got {describe(raw)}. "
                f"Let the dataset return pairs, or override {self!r}.split(raw) to return (inputs, targets)."
            )
        return raw[0], raw[1]


class AbstractTrainingPhase(_Supervised):
    """Train: train mode, gradients, an update. The events of one batch, in order, and what each makes available:

    - `BatchBegin`: ``batch.inputs``, ``batch.targets``, on the device
    - `LossBegin`: ``batch.outputs``
    - `BackwardBegin`: ``batch.loss``, with its graph, not divided by the size of the accumulation group
    - `BackwardEnd`: ``batch.grads``; from here on ``batch.loss`` is detached
    - `UpdateBegin`: gradients accumulated and unscaled, before clipping (not fired where a batch only accumulates; for
      a group that waits for more batches when the epoch ends it comes after the last batch)
    - `UpdateEnd`: ``batch.grad_norm``, before clipping (where clipping or a declaration asks for it)
    - `BatchEnd`, or `BatchCancelled`

    The whole epoch lies between `EpochBegin` and `EpochEnd` (or `EpochCancelled`).
    """

    events: ClassVar[tuple[type[Event], ...] | None] = (
        EpochBegin, BatchBegin, LossBegin, BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd,
        BatchCancelled, EpochEnd, EpochCancelled,
    )  # fmt: skip
    provides: ClassVar[Mapping[str, type[Event]] | None] = {
        "inputs": BatchBegin,
        "targets": BatchBegin,
        "outputs": LossBegin,
        "loss": BackwardBegin,
        "grads": BackwardEnd,
        "grad_norm": UpdateEnd,
    }

    def mode(self, modules: Iterable[torch.nn.Module]) -> AbstractContextManager[Modes | None]:
        """Train mode for all modules but those that were put into eval mode; their modes before are put back.

        A whole model in eval mode stays there if all its parameters are frozen. What a handler sets stays.
        """
        return _mode(modules, training=True)

    def step(self, learner: StepContext, raw: Any) -> None:
        """Run one batch: forward, loss, backward, update (`StepContext.train`)."""
        learner.train(self, raw)


class TrainingPhase(AbstractTrainingPhase):
    """Train on the first loader. See `AbstractTrainingPhase` for its events and state."""


class AbstractValidationPhase(_Supervised):
    """Evaluate: eval mode, no gradients. The events of one batch, in order, and what each makes available:

    - `BatchBegin`: ``batch.inputs``, ``batch.targets``, on the device
    - `LossBegin`: ``batch.outputs``
    - `BatchEnd`: ``batch.loss``, or `BatchCancelled`

    The whole epoch lies between `EpochBegin` and `EpochEnd` (or `EpochCancelled`).
    """

    events: ClassVar[tuple[type[Event], ...] | None] = (
        EpochBegin, BatchBegin, LossBegin, BatchEnd, BatchCancelled, EpochEnd, EpochCancelled,
    )  # fmt: skip
    provides: ClassVar[Mapping[str, type[Event]] | None] = {
        "inputs": BatchBegin,
        "targets": BatchBegin,
        "outputs": LossBegin,
        "loss": BatchEnd,
    }

    def mode(self, modules: Iterable[torch.nn.Module]) -> AbstractContextManager[Modes | None]:
        """Eval mode for all modules and no gradients; their modes before are put back, but for what a handler set."""
        return _mode(modules, training=False)

    def step(self, learner: StepContext, raw: Any) -> None:
        """Run one batch: forward and loss (`StepContext.evaluate`)."""
        learner.evaluate(self, raw)


class ValidationPhase(AbstractValidationPhase):
    """Evaluate on the second loader. See `AbstractValidationPhase` for its events and state."""


@contextmanager
def _mode(roots: Iterable[torch.nn.Module], *, training: bool) -> Generator[Modes]:
    modes = Modes(roots, training=training)
    try:
        with torch.set_grad_enabled(training):
            yield modes
    finally:
        modes.end()
