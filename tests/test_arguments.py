"""What a user passes to a learner and to its methods, and what is said of what means nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from flowtrain import (
    AbstractTrainingPhase,
    BatchEnd,
    Callback,
    CallbackError,
    CoreError,
    FlowtrainError,
    Learner,
    StepContext,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
)
from flowtrain.testing import TinyModel, tiny_batches, tiny_learner


class Some(Callback): ...


# --- model, loss function and callbacks


@pytest.mark.parametrize("name", ["keys", "items", "_hidden", "two words", 3, "a.b", ""])
def test_a_model_needs_a_name_that_can_be_written(name: Any) -> None:
    with pytest.raises(CoreError) as raised:
        tiny_learner(model={name: TinyModel()}, data=None)
    assert str(raised.value).startswith(f"model has the name {name!r}, which learner.model.<name> cannot be.")


BAD: dict[str, tuple[Callable[[], object], type[FlowtrainError], str]] = {
    "no module": (
        lambda: tiny_learner(model=print),
        CoreError, "model=<built-in function print> is no torch.nn.Module, nor a mapping of names to modules.",
    ),
    "no modules": (lambda: tiny_learner(model={"a": 1}), CoreError, "model={'a': 1} is no torch.nn.Module, nor a map"),
    "no models": (lambda: Learner({}, mse_loss), CoreError, "model={} is no torch.nn.Module"),
    "loss class": (
        lambda: tiny_learner(lossfn=nn.MSELoss),
        CoreError, "MSELoss'> is not a function of (outputs, targets). Write MSELoss(), an instance.",
    ),
    "no loss": (lambda: Learner(TinyModel(), None), CoreError, "lossfn=None is not a function of (outputs, targets)."),  # type: ignore[arg-type]  # what is tested
    "callbacks no list": (
        lambda: tiny_learner(callbacks=Some()),
        CallbackError, "callbacks=<Some> is not a list. Write callbacks=[...].",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "text"), BAD.values(), ids=BAD)
def test_what_bad_input_gets(make: Callable[[], object], error: type[FlowtrainError], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    ("core", "text"),
    [
        ("cuda", "core='cuda' is no TorchCore. Write core=TorchCore(device=\"cuda\")."),
        ("cpu", "core='cpu' is no TorchCore. Write core=TorchCore(device=\"cpu\")."),
        (torch.device("cpu"), "core=device(type='cpu') is no TorchCore. Write core=TorchCore(device=\"cpu\")."),
        (TorchCore, "core=TorchCore is a class. Write core=TorchCore(), an instance."),
        (16, "core=16 is no TorchCore. Write core=TorchCore(device=\"cuda\")."),
    ],
)
def test_what_is_no_core(core: Any, text: str) -> None:
    with pytest.raises(CoreError) as raised:
        tiny_learner(core=core)
    assert str(raised.value) == text


# --- what can be trained


class Tempered(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return mse_loss(outputs * self.factor, targets)


class OwnStep(AbstractTrainingPhase):
    """A step that may thaw what it trains."""

    def step(self, learner: StepContext, raw: Any) -> None: ...


def test_a_frozen_model_has_nothing_to_train() -> None:
    model = nn.Linear(1, 1).requires_grad_(False)
    text = (
        "TrainingPhase has nothing to train: no parameter of the model or the loss function requires grad, all 2 are "
        "frozen. Call requires_grad_(True) on what is to be trained, or pass the data as data={ValidationPhase: loader}"
        "."
    )
    with pytest.raises(CoreError) as raised:
        tiny_learner(model=model)
    assert str(raised.value) == text
    without = tiny_learner(model=model, data={ValidationPhase: tiny_batches()})
    without.validate()  # what the message says works
    for train in (lambda: without.fit(1, data=tiny_batches()), lambda: without.step(TrainingPhase, tiny_batches()[0])):
        with pytest.raises(CoreError) as raised:
            train()
        assert str(raised.value) == text


def test_what_may_have_something_to_train() -> None:
    frozen = nn.Linear(1, 1).requires_grad_(False)
    tiny_learner(model=frozen, lossfn=Tempered()).fit(1)
    tiny_learner(model=frozen, data={OwnStep: tiny_batches()}).fit(1)
    half = nn.Sequential(frozen, nn.Linear(1, 1))
    tiny_learner(model=half).fit(1)


# --- phases and counts


@pytest.mark.parametrize("what", ["epoch", "step"])
@pytest.mark.parametrize("phase", ["train", None, BatchEnd])
def test_epoch_and_step_take_a_phase(what: str, phase: Any) -> None:
    learner = tiny_learner()
    with pytest.raises(UsageError) as raised:
        getattr(learner, what)(phase, [])
    expected = f"{what}() takes a phase first, got {phase!r}. Write learner.{what}(TrainingPhase(), ...)."
    assert str(raised.value) == expected


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, "fit() takes a number of epochs or a number of steps: fit(10), or fit(steps=1000)."),
        ((1,), {"steps": 2}, "fit() takes a number of epochs or a number of steps: fit(10), or fit(steps=1000)."),
        ((0,), {}, "fit(epochs=0): epochs is a whole number, at least 1."),
        ((-3,), {}, "fit(epochs=-3): epochs is a whole number, at least 1."),
        ((1.5,), {}, "fit(epochs=1.5): epochs is a whole number, at least 1."),
        ((True,), {}, "fit(epochs=True): epochs is a whole number, at least 1."),
        (("3",), {}, "fit(epochs='3'): epochs is a whole number, at least 1."),
        ((), {"steps": 0}, "fit(steps=0): steps is a whole number, at least 1."),
        ((), {"steps": 5, "validate_every": 0}, "fit(validate_every=0): validate_every is a whole number, at least 1."),
        ((2,), {"validate_every": 5}, "fit(validate_every=...) goes with steps: fit(steps=1000, validate_every=100)."),
    ],
)
def test_counts_that_mean_nothing(args: tuple[Any, ...], kwargs: dict[str, Any], text: str) -> None:
    learner = tiny_learner()
    with pytest.raises(UsageError) as raised:
        learner.fit(*args, **kwargs)
    assert str(raised.value) == text
    assert learner.model.coeff == 0, "nothing ran"
