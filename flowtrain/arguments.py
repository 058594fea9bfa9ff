"""What a user passes to a learner, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from flowtrain.callback import Callback
from flowtrain.core import TorchCore
from flowtrain.errors import CallbackError, CoreError, UsageError
from flowtrain.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase
from flowtrain.state import Named

__all__ = ["as_list", "as_phase", "check_core", "check_counts", "check_lossfn", "check_model", "check_phase"]


def check_model(model: Any) -> Any:
    """Return the model, or a mapping of names to models as `Named`.

    Raises:
        CoreError: It is neither, or a name is not one that ``learner.model.<name>`` can have.
    """
    if isinstance(model, torch.nn.Module):
        return model
    if isinstance(model, Mapping) and model and all(isinstance(each, torch.nn.Module) for each in model.values()):
        for name in model:
            if not (isinstance(name, str) and name.isidentifier()) or name.startswith("_") or hasattr(Mapping, name):
                raise CoreError(f"model has the name {name!r}, which learner.model.<name> cannot be. Choose another.")
        return Named("model", model)
    raise CoreError(f"model={model!r} is no torch.nn.Module, nor a mapping of names to modules.")


def check_lossfn(lossfn: Any) -> Any:
    """Return the loss function.

    Raises:
        CoreError: It is a class, or cannot be called.
    """
    if isinstance(lossfn, type) or not callable(lossfn):
        made = f" Write {lossfn.__name__}(), an instance." if isinstance(lossfn, type) else ""
        raise CoreError(f"lossfn={lossfn!r} is not a function of (outputs, targets).{made}")
    return lossfn


def check_core(core: Any) -> TorchCore:
    """Return the core; a new one if it is ``None``.

    Raises:
        CoreError: It is a device, a class, or no core at all.
    """
    if core is None:
        return TorchCore()
    if isinstance(core, TorchCore):
        return core
    if isinstance(core, type):
        raise CoreError(f"core={core.__name__} is a class. Write core={core.__name__}(), an instance.")
    device = str(core) if isinstance(core, (str, torch.device)) else "cuda"
    raise CoreError(f'core={core!r} is no TorchCore. Write core=TorchCore(device="{device}").')


def check_phase(phase: Phase, model: Any, modules: Iterable[torch.nn.Module]) -> None:
    """Check that a step of the library would find one model, and in training something to train.

    Raises:
        CoreError: There are several models, or every parameter is frozen.
    """
    if isinstance(model, Named) and type(phase).step in (AbstractTrainingPhase.step, AbstractValidationPhase.step):
        raise CoreError(
            f"{phase!r} runs one model, and the learner has {', '.join(model)}. Write a phase with "
            f"a step of its own: class MyPhase(AbstractTrainingPhase): def step(self, learner, raw): ..."
        )
    if type(phase).step is AbstractTrainingPhase.step:
        params = [param for module in modules for param in module.parameters()]
        if params and not any(param.requires_grad for param in params):
            raise CoreError(
                f"{phase!r} has nothing to train: no parameter of the model or the loss function requires grad, all "
                f"{len(params)} are frozen. Call requires_grad_(True) on what is to be trained, or pass the data as "
                f"data={{ValidationPhase: loader}}."
            )


def as_list(callbacks: Any) -> list[Callback]:
    """Return the callbacks as a list of its own.

    Raises:
        CallbackError: It is one callback, or nothing that holds several.
    """
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
        raise CallbackError(f"callbacks={callbacks!r} is not a list. Write callbacks=[...].")
    return list(callbacks)


def as_phase(phase: Any, what: str) -> Phase:
    """Return the phase; of a type of phase, an instance.

    Args:
        phase: What the user passed.
        what: The method that it was passed to.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(phase, Phase):
        return phase
    if isinstance(phase, type) and issubclass(phase, Phase):
        return phase()
    raise UsageError(f"{what}() takes a phase first, got {phase!r}. Write learner.{what}(TrainingPhase(), ...).")


def check_counts(epochs: object, steps: object, validate_every: object) -> None:
    """Check what says how long a fit is.

    Raises:
        UsageError: Not exactly one of `epochs` and `steps`, a number that is not whole or below 1, or
            `validate_every` without `steps`.
    """
    if (epochs is None) == (steps is None):
        raise UsageError("fit() takes a number of epochs or a number of steps: fit(10), or fit(steps=1000).")
    for name, value in (("epochs", epochs), ("steps", steps), ("validate_every", validate_every)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UsageError(f"fit({name}={value!r}): {name} is a whole number, at least 1.")
    if validate_every is not None and steps is None:
        raise UsageError("fit(validate_every=...) goes with steps: fit(steps=1000, validate_every=100).")
