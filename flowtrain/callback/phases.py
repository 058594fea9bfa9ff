"""Phases: types that say what kind of epoch runs, which events it fires, and what its step does with one batch.

A phase has no fields: there is one instance of each type, and the type works as a key wherever the instance does. A
user's phase is a subclass. To run the usual supervised step on other data, subclass and override nothing::

    class OODPhase(AbstractValidationPhase):
        "Validate on data from elsewhere."

To run another step, override `Phase.step`, which works with the methods of `StepContext`::

    class GANPhase(AbstractTrainingPhase):
        def step(self, learner, raw):
            with learner.run_batch(self, real=raw) as batch:
                ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
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
from flowtrain.callback.modes import Modes, phase_modes
from flowtrain.data.batch_size import measure
from flowtrain.errors import DataError, UsageError
from flowtrain.errors.arguments import is_a, is_type, runs_nothing, switch
from flowtrain.errors.describing import describe

__all__ = [
    "AbstractTrainingPhase",
    "AbstractValidationPhase",
    "Phase",
    "StepContext",
    "TrainingPhase",
    "ValidationPhase",
    "as_phase",
    "has_bundled_step",
]


class StepContext(Protocol):
    """The object that a step gets as ``learner``: the state of training, and the parts that a step consists of.

    `train` and `evaluate` are the complete steps of the bundled phases; the step of a user's phase is written with the
    other methods.
    """

    @property
    def model(self) -> Any:
        """The model, or all models by name."""

    @property
    def lossfn(self) -> Any:
        """The loss function."""

    @property
    def optimizer(self) -> Any:
        """The optimizer, or all optimizers by name."""

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters of the models by name."""
        ...

    @property
    def data(self) -> Any:
        """The loaders by phase."""

    @property
    def batch(self) -> Any:
        """The state of the current batch, or of the last one if no batch is open."""

    @property
    def cbstate(self) -> Any:
        """The state that callbacks share with each other."""

    def run_batch(self, phase: Phase, **state: Any) -> AbstractContextManager[Any]:
        """Return the context of one batch; it gives the batch state, and fires `BatchBegin` and `BatchEnd`.

        An exception in its body closes the batch with `BatchCancelled` and is raised again, so a step may catch it.

        Args:
            phase: The phase whose step calls this.
            state: The first entries of the batch state; their tensors are moved to the device.

        Raises:
            UsageError: A batch is open already.
        """
        ...

    def forward(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass, which is autocast if the precision of the core asks for it."""
        ...

    def backward(self, phase: Phase, loss: torch.Tensor, name: str | None = None) -> None:
        """Run the backward pass between `BackwardBegin` and `BackwardEnd`.

        The core divides the loss by the size of the accumulation group, and with fp16 multiplies it by the scale.

        Args:
            phase: The phase whose step calls this.
            loss: A tensor with one element. If it is ``batch.loss``, ``batch.loss`` is detached afterwards.
            name: The name of one of several optimizers: only its parameters get gradients. Without a name all
                parameters that the loss depends on get gradients, also those of a model that the loss only passes
                through.

        Raises:
            CoreError: The loss is no tensor with one element, or there is no optimizer of that name.
            LossError: The loss has no graph.
            UsageError: No batch is open.
        """

    def update(self, phase: Phase, name: str | None = None) -> None:
        """Count a batch for the optimizers, and update where an accumulation group is complete.

        An update clips the gradients and calls the optimizer, between `UpdateBegin` and `UpdateEnd`.

        Args:
            phase: The phase whose step calls this.
            name: The name of one of several optimizers; without a name all optimizers are meant.

        Raises:
            CoreError: There is no optimizer of that name.
            UsageError: No batch is open.
        """

    def fire(self, event: Event, phase: Phase) -> None:
        """Fire an event, such as one that the step of a user's phase adds to those of the library."""

    def train(self, phase: AbstractTrainingPhase, raw: Any) -> None:
        """Run one batch: forward, loss, backward, update. An entry that a handler replaces is used from then on."""

    def evaluate(self, phase: AbstractValidationPhase, raw: Any) -> None:
        """Run one batch: forward and loss. An entry that a handler replaces is used from then on."""


class Phase:
    """A kind of epoch. `FitBegin` and `FitEnd` are fired with `Phase()` itself.

    Attributes:
        events: The library's events that the phase fires, in order; ``None`` where they are not known. Every event in
            `provides` must be among them.
        provides: The entries that the phase puts into the batch state, each with the first event at which it exists.
            ``None`` where the entries are not known: a missing entry is then an error when a handler reads it, and not
            already when the learner is built.
    """

    events: ClassVar[tuple[type[Event], ...] | None] = (FitBegin, FitEnd)
    provides: ClassVar[Mapping[str, type[Event]] | None] = None
    _instance: ClassVar[Any]

    def __new__(cls) -> Self:
        instance = cls.__dict__.get("_instance")  # an inherited attribute would be the instance of the base class
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
        if runs_nothing(cls.step):
            raise UsageError(
                f"{cls.__name__}.step has async or yield in it, so calling it runs nothing of it. Write a plain "
                f"function def step(self, learner, raw) that runs the batch and returns None."
            )
        # A new step may fire other events and provide other entries, so the inherited lists would be wrong.
        if "step" in cls.__dict__:
            for name in ("events", "provides"):
                if name not in cls.__dict__:
                    setattr(cls, name, None)
        switch(cls.__name__, "unpack", getattr(cls, "unpack", False))
        cls._check_lists()

    @classmethod
    def _check_lists(cls) -> None:
        """Check `events` and `provides` where the class is defined: a learner looks the events up in one another.

        Raises:
            UsageError: One of them holds something else than types of events, or `events` lacks one of `provides`.
        """
        events, provides, name = cls.events, cls.provides, cls.__name__
        if events is not None and not (is_a(events, (tuple, list)) and all(is_type(each, Event) for each in events)):
            raise UsageError(
                f"{name}.events is {events!r}. It is a tuple of types of events, in the order in which they are fired: "
                f"events = (EpochBegin, BatchBegin, BatchEnd, EpochEnd)."
            )
        if provides is not None and not is_a(provides, Mapping):
            raise UsageError(
                f"{name}.provides is {provides!r}. It is a mapping from entries of the batch to types of events: "
                f'provides = {{"inputs": BatchBegin}}.'
            )
        for entry, event in (provides or {}).items():
            if not is_a(entry, str) or not is_type(event, Event):
                raise UsageError(
                    f"{name}.provides has {event!r} for {entry!r}. Write the name of an entry and a type of events: "
                    f'{{"inputs": BatchBegin}}.'
                )
            if events is not None and event not in events:
                raise UsageError(
                    f"{name}.provides has {entry!r} from {event.__name__} on, and {name}.events lacks that event. Add "
                    f"it to events, or define provides in {name} with the events that its step fires."
                )

    def step(self, learner: StepContext, raw: Any) -> None:
        """Run one batch.

        Args:
            learner: The state of training, and the parts of a step.
            raw: One item of the loader, as the loader gave it.

        Raises:
            UsageError: The phase defines no step.
        """
        raise UsageError(
            f"{self!r} has no step. Subclass TrainingPhase, ValidationPhase or their abstract bases, or define step()."
        )

    def batch_size(self, inputs: Any, targets: Any) -> Any:
        """Return the number of samples in a batch, which is the weight of the batch in the means of an epoch.

        The base class returns the length that the tensors of inputs and targets have in common; `Metrics` warns where
        that is not certain. Override this for data whose first dimension is not the batch: ``return targets.shape[1]``
        for data of shape ``(time, batch, ...)``, or ``return (targets != -100).sum()`` where a sample is a token.

        Args:
            inputs: ``batch.inputs``, or ``None`` if the step puts none into the batch.
            targets: ``batch.targets``, or ``None`` if the step puts none into the batch.
        """
        return measure(inputs, targets)[0]

    def mode(self, modules: Iterable[torch.nn.Module]) -> AbstractContextManager[Modes | None]:
        """Return the context in which an epoch of this phase runs, handlers included.

        It gives the object that has set the modes of the modules, or ``None`` if the phase leaves the modes alone.

        Args:
            modules: The models, and the loss function where it is a module.
        """
        return nullcontext()

    def __reduce__(self) -> tuple[type[Phase], tuple[()]]:
        return type(self), ()  # a copy is the one instance of the type

    def __repr__(self) -> str:
        return type(self).__name__


class _Supervised(Phase):
    """The base of the phases whose loaders give pairs of inputs and targets.

    Attributes:
        unpack: Whether the model has several inputs, so that the items of a tuple or mapping are its arguments:
            ``model(*inputs)`` or ``model(**inputs)``.
    """

    unpack: ClassVar[bool] = False

    def split(self, raw: Any) -> tuple[Any, Any]:
        """Return the inputs and the targets in one item of the loader. Override this for items of another form.

        With `unpack` the item may also be a longer tuple, whose last part is the targets, or a mapping. A mapping is
        the inputs as a whole, and its entry ``labels``, if it has one, is the targets too.

        Args:
            raw: The item, as the loader gave it.

        Raises:
            DataError: `raw` has another form.
        """
        if self.unpack and isinstance(raw, Mapping):
            return raw, raw.get("labels")
        parts = len(raw) if isinstance(raw, (tuple, list)) else 0
        if parts < 2 or (parts > 2 and not self.unpack):
            raise DataError(
                f"{self!r} needs (inputs, targets) from its loader and got {describe(raw)}. Let the dataset return "
                f"pairs, or override {self!r}.split(raw) to return (inputs, targets). For a model of several inputs "
                f"set unpack = True in a phase of your own."
            )
        return (raw[0] if parts == 2 else tuple(raw[:-1])), raw[-1]

    def call_model(self, model: Callable[..., Any], inputs: Any) -> Any:
        """Return the outputs of the model. Override this for a model that takes its inputs in another way.

        Args:
            model: The model, as the core runs it: compiled, or under autocast, if the core does that.
            inputs: ``batch.inputs``. With `unpack` a tuple, a list or a mapping becomes the arguments of the model.
        """
        if self.unpack and isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if self.unpack and isinstance(inputs, (tuple, list)) else model(inputs)


class AbstractTrainingPhase(_Supervised):
    """Train: train mode, gradients, an update. The events of one batch, in order, and the entries that each one adds:

    - `BatchBegin`: ``batch.inputs``, ``batch.targets``, on the device
    - `LossBegin`: ``batch.outputs``
    - `BackwardBegin`: ``batch.loss``, with its graph, not divided by the size of the accumulation group
    - `BackwardEnd`: ``batch.grads``; from here on ``batch.loss`` is detached
    - `UpdateBegin`: the gradients are accumulated and unscaled, not clipped yet (not fired where a batch only
      accumulates; fired after the last batch for a group that the epoch leaves incomplete)
    - `UpdateEnd`: ``batch.grad_norm``, the norm before clipping (if the core clips by norm, or a handler declares
      the norm or the whole batch)
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
        """Return a context in which all modules are in train mode, except those that the user put into eval mode.

        A whole model in eval mode stays there if all its parameters are frozen. The modules get their own modes back
        at the end; a mode that a handler sets is the module's own from then on.
        """
        return phase_modes(modules, training=True)

    def step(self, learner: StepContext, raw: Any) -> None:
        """Run one batch: forward, loss, backward, update (`StepContext.train`)."""
        learner.train(self, raw)


class TrainingPhase(AbstractTrainingPhase):
    """Train on the first loader. See `AbstractTrainingPhase` for its events and state."""


class AbstractValidationPhase(_Supervised):
    """Evaluate: eval mode, no gradients. The events of one batch, in order, and the entries that each one adds:

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
        """Return a context in which all modules are in eval mode and no gradients are recorded.

        The modules get their own modes back at the end, except those that a handler has put into train mode.
        """
        return phase_modes(modules, training=False)

    def step(self, learner: StepContext, raw: Any) -> None:
        """Run one batch: forward and loss (`StepContext.evaluate`)."""
        learner.evaluate(self, raw)


class ValidationPhase(AbstractValidationPhase):
    """Evaluate on the second loader. See `AbstractValidationPhase` for its events and state."""


def as_phase(value: object) -> Phase | None:
    """Return a phase; for a phase type, its instance; for any other value, ``None``."""
    phase = value() if isinstance(value, type) and issubclass(value, Phase) else value
    return phase if isinstance(phase, Phase) else None


def has_bundled_step(phase_type: type[Phase], kind: type[Phase] = Phase) -> bool:
    """Tell whether the step of a phase type is that of an abstract phase: of any, or only of the phase in `kind`."""
    step = getattr(phase_type, "step", None)
    if step is AbstractTrainingPhase.step:
        return issubclass(AbstractTrainingPhase, kind)
    return step is AbstractValidationPhase.step and issubclass(AbstractValidationPhase, kind)
