"""Phases: types that say what kind of epoch runs, and own its step.

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
from flowtrain.errors import UsageError
from flowtrain.state.batch import BatchState
from flowtrain.training.step import CLOSED, CLOSING, check_graph, forward, measure, no_pair

__all__ = [
    "AbstractTrainingPhase",
    "AbstractValidationPhase",
    "Phase",
    "StepContext",
    "TrainingPhase",
    "ValidationPhase",
]

_BACKWARD_BEGIN, _BACKWARD_END, _BATCH_END = BackwardBegin(), BackwardEnd(), BatchEnd()
_UPDATE_BEGIN, _UPDATE_END = UpdateBegin(), UpdateEnd()


class StepContext(Protocol):
    """What a step may use of the learner.

    A step of your own needs ``model``, ``lossfn``, ``optimizer``, ``batch`` and ``cbstate``, and the methods.
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
    def batch(self) -> BatchState:
        """The state of the current, or last, batch."""
        ...

    @property
    def cbstate(self) -> Any:
        """What callbacks share with each other."""

    @property
    def loop(self) -> Any:
        """What runs training; the bundled steps use it in place of the methods."""

    def run_batch(self, phase: Phase, **state: Any) -> AbstractContextManager[BatchState]:
        """Give the batch state, with `state` moved to the device, between `BatchBegin` and `BatchEnd`."""
        ...

    def forward(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass: autocast, if the precision asks for it."""
        ...

    def backward(self, phase: Phase, loss: torch.Tensor, name: str | None = None) -> None:
        """Run the backward pass with its events, scaled and divided as the core is set up.

        With `name`, only the parameters of that one of several optimizers get gradients.
        """

    def update(self, phase: Phase, name: str | None = None) -> None:
        """Step the optimizer, or the one of that name, with its events, clipping and accumulation."""

    def fire(self, event: Event, phase: Phase) -> None:
        """Fire an event of your own."""


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
            raise no_pair(self, raw)
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
        """Run one batch: forward, loss, backward, update. What handlers put into the batch counts from then on."""
        loop = learner.loop
        on, core, scopes = loop.runners[self], loop.core, loop.scopes
        batch = forward(self, loop, on, raw, True)
        scopes.backward = True
        if on.backward_begin is not None:
            on.backward_begin(_BACKWARD_BEGIN, self)
        try:
            core.backward(batch.loss)
        except RuntimeError as error:
            check_graph(self, "batch.loss", batch.loss, error)
            raise
        if on.watched:  # otherwise the loop does it when the batch can be looked at: it costs most of a microsecond
            batch.loss = batch.loss.detach()
        batch.grads = core.grads
        if on.backward_end is not None:
            on.backward_end(_BACKWARD_END, self)
        if core.plain:
            if on.update_begin is not None:
                on.update_begin(_UPDATE_BEGIN, self)
            core.optimizer.step()
            loop.state.updates += 1
            if on.update_end is not None:
                on.update_end(_UPDATE_END, self)
        else:
            learner.update(self)
        scopes.batch = CLOSING
        if on.batch_end is not None:
            on.batch_end(_BATCH_END, self)
        scopes.batch = CLOSED
        scopes.completed = batch


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
        """Run one batch: forward and loss."""
        loop = learner.loop
        on, scopes = loop.runners[self], loop.scopes
        batch = forward(self, loop, on, raw, False)
        scopes.batch = CLOSING
        if on.batch_end is not None:
            on.batch_end(_BATCH_END, self)
        scopes.batch = CLOSED
        scopes.completed = batch


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
