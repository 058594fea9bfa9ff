# pyright: reportPrivateUsage=false
# The test reads the tables of advice, which are private, entry by entry.
"""The arguments of a learner and of its methods, and the errors for those that make no sense."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
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
    CheckpointError,
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
from flowtrain.training.arguments import _ARGUMENTS, _ATTRIBUTES
from tests.support.models import Tempered
from tests.support.untyped import untyped


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
        CoreError, "model=<built-in function print> is no torch.nn.Module, nor a mapping of names to modules. Pass a "
        "module, or several by name, as in model={'gen': generator, 'disc': discriminator}.",
    ),
    "no modules": (lambda: tiny_learner(model={"a": 1}), CoreError, "model={'a': 1} is no torch.nn.Module, nor a map"),
    "no models": (lambda: Learner({}, mse_loss), CoreError, "model={} is no torch.nn.Module"),
    "loss class": (
        lambda: tiny_learner(lossfn=nn.MSELoss),
        CoreError, "MSELoss'> is not a function of (outputs, targets). Write MSELoss(), an instance.",
    ),
    "no loss": (lambda: Learner(TinyModel(), None), CoreError, "lossfn=None is not a function of (outputs, targets)."),
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
        (16, 'core=16 is no TorchCore. Write core=TorchCore(device="cuda").'),
    ],
)
def test_what_is_no_core(core: Any, text: str) -> None:
    with pytest.raises(CoreError) as raised:
        tiny_learner(core=core)
    assert str(raised.value) == text


# --- models without a parameter to train


class OwnStep(AbstractTrainingPhase):
    """A phase whose own step might unfreeze parameters."""

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
    without.validate()  # as the message advises
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


TAKES = "fit() takes a number of epochs or a number of steps"
WRITE = "Write fit(10), or fit(steps=1000)."


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {}, f"{TAKES}, got neither. {WRITE}"),
        ((1,), {"steps": 2}, f"{TAKES}, got both, epochs=1 and steps=2. {WRITE}"),
        ((0,), {}, "fit(): epochs is a whole number, at least 1, got 0."),
        ((-3,), {}, "fit(): epochs is a whole number, at least 1, got -3."),
        ((1.5,), {}, "fit(): epochs is a whole number, at least 1, got 1.5."),
        ((True,), {}, "fit(): epochs is a whole number, at least 1, got True."),
        (("3",), {}, "fit(): epochs is a whole number, at least 1, got '3'."),
        ((), {"steps": 0}, "fit(): steps is a whole number, at least 1, got 0."),
        ((), {"steps": 5, "validate_every": 0}, "fit(): validate_every is a whole number, at least 1, got 0."),
        ((2,), {"validate_every": 0}, "fit(): validate_every is a whole number, at least 1, got 0."),
    ],
)
def test_counts_that_mean_nothing(args: tuple[Any, ...], kwargs: dict[str, Any], text: str) -> None:
    learner = tiny_learner()
    with pytest.raises(UsageError) as raised:
        learner.fit(*args, **kwargs)
    assert str(raised.value) == text
    assert learner.model.coeff == 0, "nothing ran"


# --- the habits of other libraries


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("lr", "optimizer=partial(torch.optim.AdamW, lr=1e-3) in Learner"),
        ("learning_rate", "optimizer=partial(torch.optim.AdamW, lr=1e-3) in Learner"),
        ("loss_fn", "Learner(model, lossfn, ...), the loss function second"),
        ("criterion", "Learner(model, lossfn, ...), the loss function second"),
        ("train_dataloaders", "data=(train_loader, valid_loader) in Learner or fit"),
        ("dls", "data=(train_loader, valid_loader) in Learner or fit"),
        ("metrics", "callbacks=[Metrics(accuracy)] in Learner"),
        ("accelerator", "core=TorchCore(device=..."),
        ("accumulate_grad_batches", "core=TorchCore(device=..."),
        ("max_epochs", "learner.fit(10)"),
        ("val_check_interval", "learner.fit(steps=1000), with validate_every=100"),
        ("check_val_every_n_epoch", "learner.fit(10, validate_every=2) to evaluate after every second epoch"),
        ("limit_train_batches", "learner.fit(10, limit_batches=100), or limit_batches={TrainingPhase: 0.1, "),
        ("fast_dev_run", "learner.dry_run() before fit"),
        ("profiler", "callbacks=[Profiler('runs/profile')] in Learner"),
        ("seed", "flowtrain.seed_everything(0) before the model is made"),
        ("ckpt_path", "learner.fit(10, resume=folder)"),
        ("cbs", "callbacks=[...] in Learner"),
        ("verbose", 'default_callbacks="quiet" in Learner'),
    ],
)
def test_arguments_of_other_libraries(name: str, advice: str) -> None:
    unknown: dict[str, Any] = {name: 1}
    with pytest.raises(UsageError) as raised:
        Learner(TinyModel(), **unknown)
    assert str(raised.value).startswith(f"Learner() takes no argument {name!r}. Write {advice}")
    assert str(raised.value).endswith("default_callbacks, executor, core, strict.")
    learner = tiny_learner()
    before = learner.model.coeff.item()
    with pytest.raises(UsageError) as raised:
        learner.fit(**unknown)
    assert str(raised.value).startswith(f"fit() takes no argument {name!r}. Write {advice}")
    assert str(raised.value).endswith("It takes epochs, steps, validate_every, limit_batches, data, resume, timeline.")
    assert learner.model.coeff.item() == before


def test_arguments_that_nobody_has() -> None:
    unknown: dict[str, Any] = {"executer": "serial"}
    with pytest.raises(UsageError) as raised:
        Learner(TinyModel(), mse_loss, **unknown)
    assert str(raised.value) == (
        "Learner() takes no argument 'executer'. Did you mean 'executor'? It takes model, lossfn, data, optimizer, "
        "callbacks, default_callbacks, executor, core, strict."
    )
    with pytest.raises(CoreError, match=r"lossfn=None is not a function of .* Write Learner\(model, lossfn\)"):
        Learner(TinyModel())
    with pytest.raises(UsageError, match=r"fit\(\) takes no argument 'zzz'\. It takes epochs"):
        tiny_learner().fit(1, zzz=untyped(1))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("get_preds", "Write learner.predict(loader)."),
        ("recorder", "Write learner.history[ValidationPhase]['Loss'].values for the values of a metric, and"),
        ("test", "Write learner.evaluate(loader)."),
        ("callback_metrics", "Write learner.history[ValidationPhase]['Loss'].values"),
        ("save", "Write torch.save(learner.model.state_dict(), path), or Checkpointer(folder)"),
        ("load_checkpoint", "Write learner.load(path)."),
        ("fit_one_cycle", "Write learner.fit(10)."),
        ("lr_find", "Write flowtrain.find_learning_rate(learner)."),
        ("to", "Write TorchCore(device=...) as Learner(core=...)."),
        ("freeze", "Write Freeze({'body.*': None}) among the callbacks"),
        ("validat", "Did you mean 'validate'?"),
    ],
)
def test_attributes_of_other_libraries(name: str, advice: str) -> None:
    learner = tiny_learner()
    with pytest.raises(AttributeError) as raised:
        getattr(learner, name)
    assert str(raised.value).startswith(f"A Learner has no attribute {name!r}. {advice}")
    assert not hasattr(learner, name)


def test_what_is_advised_is_there() -> None:
    """Each attribute that an advice names exists, and none of the names that it corrects does."""
    learner = tiny_learner()
    for advice, names in _ATTRIBUTES.items():
        for called in re.findall(r"learner\.(\w+)", advice):
            assert hasattr(learner, called), called
        assert not [name for name in names.split() if hasattr(learner, name)]
    own = {*signature(Learner.__init__).parameters, *signature(Learner.fit).parameters}
    known = [name for names in _ARGUMENTS.values() for name in names.split()]
    assert sorted(known) == sorted(set(known))
    assert {*known} & own == {"callbacks", "epochs"}, "these two are arguments of one call and mistakes in the other"


def test_the_error_of_a_property_is_its_own() -> None:
    class Broken(Learner):
        @property
        def score(self) -> object:
            return untyped({}).nothing

    learner = Broken(TinyModel(), mse_loss, default_callbacks=False)
    with pytest.raises(AttributeError, match="'dict' object has no attribute 'nothing'"):
        _ = learner.score
    with pytest.raises(AttributeError, match="_private"):
        _ = untyped(learner)._private


RESUME = (
    "takes the path of a checkpoint, or of a folder of them: write fit(10, resume='runs/a') with the folder of a "
    "Checkpointer. Leave it out for a fit that begins anew."
)


@pytest.mark.parametrize("resume", [True, False, 1, b"runs", ["runs"], ""])
def test_what_a_fit_resumes_from_is_a_path(resume: Any) -> None:
    with pytest.raises(UsageError) as raised:
        tiny_learner().fit(1, resume=resume)
    assert str(raised.value) == f"fit(resume={resume!r}) {RESUME}"


@pytest.mark.parametrize("path", [None, True, 1])
def test_what_is_loaded_is_a_path(path: Any) -> None:
    with pytest.raises(UsageError) as raised:
        tiny_learner().load(path)
    text = f"load({path!r}) takes the path of a checkpoint, or of a folder of them: write load('runs/a') with the"
    assert str(raised.value).startswith(text)


def test_a_fit_without_a_checkpoint_begins_anew() -> None:
    learner = tiny_learner(n_batches=1)
    learner.fit(1, resume=None)
    assert learner.cbstate.history[TrainingPhase].epochs == 1


def test_paths_without_a_checkpoint_say_what_is_there(tmp_path: Path) -> None:
    empty, other, weights = tmp_path / "empty", tmp_path / "other", tmp_path / "weights.pt"
    empty.mkdir()
    other.mkdir()
    (other / "notes.txt").write_text("notes")
    torch.save(TinyModel().state_dict(), weights)
    nothing = "The folder {} has no checkpoint that is complete: there is no file 'latest' in it (it holds: "
    said = {
        empty: nothing + "nothing). Pass the folder of a Checkpointer, or a checkpoint's file.",
        other: nothing + "notes.txt). Pass the folder",
        tmp_path / "none": "There is no checkpoint {}: no such file.",
        weights: "{} is no checkpoint of flowtrain: it holds OrderedDict. For weights alone call ",
        other / "notes.txt": "{} cannot be read as a checkpoint: ",
    }
    learner = tiny_learner(n_batches=1)
    for path, text in said.items():
        with pytest.raises(CheckpointError) as raised:
            learner.fit(1, resume=path)
        assert str(raised.value).startswith(text.format(path))
    learner.fit(1)


@pytest.mark.parametrize(
    "counts",
    [
        {"epochs": "3"},
        {"epochs": 3.0},
        {"epochs": True},
        {"steps": True},
        {"steps": "3"},
        {"steps": 3, "validate_every": "1"},
    ],
)
def test_counts_of_a_fit_are_whole_numbers(counts: dict[str, Any]) -> None:
    name, value = list(counts.items())[-1]
    with pytest.raises(UsageError) as raised:
        tiny_learner().fit(**counts)
    assert str(raised.value) == f"fit(): {name} is a whole number, at least 1, got {value!r}."
