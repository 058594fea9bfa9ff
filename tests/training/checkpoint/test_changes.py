"""A checkpoint restores the changes that training made beside all ``state_dict``, or refuses them by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import (
    BatchEnd,
    Callback,
    CheckpointError,
    EpochBegin,
    EpochEnd,
    Event,
    Learner,
    LearnerView,
    Phase,
    TrainingPhase,
    UndeclaredWriteError,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import Checkpointer, Recorder
from flowtrain.testing import tiny_learner
from tests.support.changed import CHANGES, Do, Net, all_of, head_alone, learner_of, put_head, unfreeze


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("event", [EpochBegin, BatchEnd, EpochEnd])
def test_rule_28_what_training_changed_goes_on(change: str, event: type[Event], tmp_path: Path) -> None:
    """Rule 28: the change is restored to the bit, by resuming and by ``load``."""
    do, options = CHANGES[change]
    number = 5 if event is BatchEnd else 2

    def learner(*callbacks: Callback) -> Learner:
        lossfn = nn.SmoothL1Loss() if "lossfn" in options else nn.functional.mse_loss
        return learner_of(Do(do, event, number), *callbacks, **{**options, "lossfn": lossfn})

    torch.manual_seed(1)
    whole = learner(Checkpointer(tmp_path))
    whole.fit(4)
    for stop in (3, 2) if event is EpochBegin else (2,):
        resumed = learner(Checkpointer(tmp_path / f"resumed {stop}"))
        resumed.fit(4, resume=tmp_path / f"epoch-000{stop}.ckpt")
        assert all_of(resumed) == all_of(whole), stop
    loaded = learner()
    loaded.load(tmp_path / "epoch-0004.ckpt")
    assert all_of(loaded) == all_of(whole)


@pytest.mark.parametrize("change", CHANGES)
def test_within_an_epoch_and_before_the_change(change: str, tmp_path: Path) -> None:
    """Load a checkpoint from the epoch of the change, or from before it, into a learner that has trained further."""
    do, options = CHANGES[change]
    if change == "loss module":
        options = {"lossfn": nn.SmoothL1Loss()}
    torch.manual_seed(1)
    learner = learner_of(Do(do, BatchEnd, 6), Checkpointer(tmp_path, every_steps=7), **options)
    learner.fit(1)
    before = all_of(learner)
    learner.fit(1)
    changed = all_of(learner)
    assert {**changed, "weights": 0, "buffers": 0} != {**before, "weights": 0, "buffers": 0} or "buffer" in change
    if change == "buffer in place":
        with pytest.raises(CheckpointError, match=r"^model\.scale was changed in place since training began, and the"):
            learner.load(tmp_path / "epoch-0001.ckpt")
        assert all_of(learner) == changed
        return
    learner.load(tmp_path / "epoch-0001.ckpt")
    assert all_of(learner) == before
    learner.load(tmp_path / "epoch-0002.ckpt")
    assert all_of(learner) == changed


def test_within_the_epoch_of_the_change(tmp_path: Path) -> None:
    class Ask(Callback):
        count = 0

        @on(BatchEnd)
        def ask(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            self.count += 1
            learner.request_checkpoint(tmp_path / f"{self.count}.ckpt")

    def learner(*callbacks: Callback) -> Learner:
        return learner_of(Do(unfreeze, BatchEnd, 6), *callbacks)

    whole = learner(Ask())
    whole.fit(3)
    for number in (10, 11, 13, 15):  # in training and in validation, each after the change
        resumed = learner()
        resumed.fit(3, resume=tmp_path / f"{number}.ckpt")
        assert all_of(resumed) == all_of(whole), number


@pytest.mark.cpu_only("calls the model with tensors of the CPU")
def test_a_model_without_shapes_is_refused(tmp_path: Path) -> None:
    learner_of(Checkpointer(tmp_path), model=nn.Linear(1, 1)).fit(1)
    learner = learner_of(model=nn.LazyLinear(1))
    with pytest.raises(
        CheckpointError, match="its weight has a shape, the learner's has none yet: call the model once"
    ):
        learner.load(tmp_path)
    learner.model(torch.ones(1, 1))
    learner.load(tmp_path)


# --- changes that the user made when building the learner


def test_what_the_learner_is_built_with_stays(tmp_path: Path) -> None:
    """Only attributes that training changed are restored, so a next stage of training can build the model anew."""
    learner_of(Do(lambda learner: setattr(learner.model.drop, "p", 0.25)), Checkpointer(tmp_path)).fit(2)
    model = Net()
    unfreeze(type("Holder", (), {"model": model}))
    model.factor, model.drop.p = 7.0, 0.9
    learner = learner_of(model=model)
    learner.load(tmp_path)
    assert model.back[0].weight.requires_grad
    assert model.back.training
    assert (model.factor, model.drop.p) == (7.0, 0.25)


def test_a_resumed_fit_says_what_is_built_otherwise(tmp_path: Path) -> None:
    learner_of(Checkpointer(tmp_path)).fit(1)
    model = Net()
    unfreeze(type("Holder", (), {"model": model}))
    with pytest.warns(UserWarning, match="was built differently") as caught:
        learner_of(Checkpointer(tmp_path), model=model).fit(2, resume=tmp_path)
    assert str(caught[0].message) == (
        "The learner of the checkpoint was built differently: model.back.0.weight was frozen there and is trained "
        "here, model.back.0.bias was frozen there and is trained here, model.back.1.weight was frozen there and is "
        "trained here, and 4 more. The fit continues with this learner. For the same result build it as the other one "
        "was built."
    )


# --- values that a file cannot hold


def replace_act(learner: Any) -> None:
    learner.model.act = nn.GELU()


def remove_act(learner: Any) -> None:
    learner.model.back.add_module("extra", nn.Identity())


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (replace_act, r"training left a GELU at model\.act, and the learner has a ReLU there\. Build the lear"),
        (remove_act, r"training left a Identity at model\.back\.extra, and the learner has nothing there"),
        (lambda learner: put_head(learner, bias=False), r"has no head\.bias"),
    ],
)
def test_a_module_that_training_put_there_is_asked_for(do: Any, message: str, tmp_path: Path) -> None:
    def take_out_too(learner: Any) -> None:
        do(learner)
        kept = {id(param) for param in learner.model.parameters()}
        group = learner.optimizer.param_groups[0]
        for param in group["params"]:
            if id(param) not in kept:
                learner.optimizer.state.pop(param, None)
        group["params"] = [param for param in group["params"] if id(param) in kept]

    whole = learner_of(Do(take_out_too), Checkpointer(tmp_path))
    whole.fit(2)
    learner = learner_of(Do(take_out_too))
    before = all_of(learner)
    for take in (partial(learner.load, tmp_path), partial(learner.fit, 3, resume=tmp_path)):
        with pytest.raises(CheckpointError, match=message):
            take()
        assert all_of(learner) == before
    if do is replace_act:
        learner.model.act = nn.GELU()
        learner.load(tmp_path)  # this learner is built as the error asks
        with pytest.raises(CheckpointError, match=r"training left a ReLU at model\.act, and the learner has a GELU"):
            whole.load(tmp_path / "epoch-0001.ckpt")


def test_an_object_that_training_replaced_is_refused(tmp_path: Path) -> None:
    def other(learner: Any) -> None:
        learner.model.function = torch.sigmoid

    learner = learner_of(Do(other), Checkpointer(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        learner.fit(2)
    assert str(caught.value).startswith(
        "model.function cannot be in a checkpoint: training has replaced it by <built-in method sigmoid of type"
    )
    assert "from it, or define get_extra_state() and set_extra_state() in Net. If a forward" in str(caught.value)
    learner.load(tmp_path)  # the learner has the function that it had when training began
    assert learner.model.function is torch.tanh


# --- several models, compiled parts, and strict mode


def test_several_models_and_optimizers(tmp_path: Path) -> None:
    class Both(TrainingPhase):
        """Trains both models on the sum of their losses."""

        def step(self, learner: Any, raw: Any) -> None:
            with learner.run_batch(self, x=raw[0], y=raw[1]) as batch:
                out = learner.model.one(batch.x) + learner.model.two(batch.x)
                batch.loss = (out - batch.y).square().mean()
                learner.backward(self, batch.loss)
                learner.update(self)

    def change(learner: Any) -> None:
        learner.model.two.back.requires_grad_(True).train()
        learner.optimizer.two.add_param_group({"params": list(learner.model.two.back.parameters())})
        learner.model.one.drop.p = 0.5

    def learner() -> Learner:
        optimizer = {"one": head_alone, "two": head_alone}
        data = {Both: [(torch.ones(3, 1), torch.zeros(3, 1))] * 3}
        models = {"one": Net(), "two": Net()}
        keep = Checkpointer(tmp_path, monitor=None)
        return tiny_learner(Do(change, phase=Both), keep, Recorder(), model=models, optimizer=optimizer, data=data,
                            default_callbacks=False)  # fmt: skip

    whole = learner()
    whole.fit(4)
    resumed = learner()
    resumed.fit(4, resume=tmp_path / "epoch-0002.ckpt")
    for name in ("one", "two"):
        assert str(resumed.model[name].state_dict()) == str(whole.model[name].state_dict())
    assert [len(group["params"]) for group in resumed.optimizer.two.param_groups] == [2, 4]
    assert resumed.model.one.drop.p == 0.5
    assert resumed.model.two.back.training


@pytest.mark.cpu_only("torch.compile cannot trace a device that is written in Python")
@pytest.mark.usefixtures("forget_compilations")
def test_compiled_parts_have_the_names_of_those_that_are_not(tmp_path: Path) -> None:
    model = Net()
    model.back = torch.compile(model.back, backend="eager")
    learner_of(Do(unfreeze), Checkpointer(tmp_path), model=model).fit(2)
    learner = learner_of()
    learner.load(tmp_path)
    assert learner.model.back[0].weight.requires_grad
    assert learner.model.back.training


def test_strict_mode_sees_a_layer_that_is_unfrozen() -> None:
    class Sly(Callback):
        @on(EpochBegin, TrainingPhase, access={"params": Write()})
        def ok(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
            learner.params["back.0.weight"].requires_grad_(True)

        @on(EpochEnd, ValidationPhase, access={"batch": Write()})
        def sly(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
            model.back[0].weight.requires_grad_(False)

    model = Net()
    with pytest.raises(UndeclaredWriteError, match=r"changed model\.back\.0\.weight"):
        learner_of(Sly(), model=model, strict=True).fit(1)
