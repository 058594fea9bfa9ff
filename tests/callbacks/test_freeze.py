"""Freeze: which parameters are trained in which epoch, the modes of frozen layers, and the fit that resumes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from flowtrain import (
    AbstractTrainingPhase,
    BatchEnd,
    EpochEnd,
    Learner,
    MissingStateError,
    Read,
    StepContext,
    TorchCore,
    TrainingPhase,
    UsageError,
    param_groups,
)
from flowtrain.callbacks import EMA, SWA, Checkpointer, CustomCallback, Freeze, ModelSummary, SanityCheck
from flowtrain.testing import tiny_learner
from tests.support.console import printed

NOT_COMPILED = "torch.compile cannot trace a device that is written in Python"
GRADUAL: Mapping[str, int] = {"body.2.*": 1, "body.*": 2}


class Net(nn.Module):
    """A body of two layers with batch normalisation and dropout, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        last = nn.BatchNorm1d(4, affine=False)
        self.body = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.2), last)
        self.head = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]  # a tensor


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(x, 3 * x) for x in torch.randn(5, 8, 1, generator=generator)]


def learner_with(
    *callbacks: Any, model: Any = None, optimizer: Any = None, executor: str = "serial", **core: Any
) -> Learner:
    return Learner(
        model or Net(),
        mse_loss,
        data=(batches(), batches()),
        optimizer=optimizer or partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        callbacks=callbacks,
        default_callbacks="quiet",
        core=TorchCore("cpu", **core),
        executor=executor,
    )


def changes(learner: Learner, epochs: int) -> list[set[str]]:
    """Return the parameters that each epoch has changed, and the buffers too."""
    found: list[set[str]] = []
    for _ in range(epochs):
        before = {name: value.clone() for name, value in learner.model.state_dict().items()}
        learner.fit(1)
        now = learner.model.state_dict().items()
        found.append({name for name, value in now if not torch.equal(value, before[name])})
    return found


HEAD = {"head.weight", "head.bias"}
FIRST = {"body.0.weight", "body.1.weight", "body.1.bias"}  # the bias before a normalisation gets no gradient
SECOND = {"body.2.weight"}


def stats(layer: int) -> set[str]:
    return {f"body.{layer}.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_layers_are_unfrozen_one_after_the_other() -> None:
    found = changes(learner_with(Freeze(GRADUAL)), 3)
    assert found[0] == HEAD
    assert found[1] - {"body.2.bias"} == HEAD | SECOND
    assert found[2] - {"body.2.bias", "body.0.bias"} == HEAD | SECOND | FIRST | stats(1) | stats(4)


def test_norms_of_frozen_parts_may_keep_counting() -> None:
    learner = learner_with(Freeze(GRADUAL, norms=False))
    assert changes(learner, 1) == [HEAD | stats(1) | stats(4)]
    assert learner.model.body[1].training


def test_modes_of_a_frozen_part() -> None:
    """Normalisation is in eval mode while it is frozen, dropout drops as ever, and a mode of the user's stays."""
    modes: list[list[bool]] = []
    watch = CustomCallback(
        lambda learner: modes.append([module.training for module in learner.model.body]), BatchEnd, TrainingPhase,
        access={"model": Read()},
    )  # fmt: skip
    learner = learner_with(Freeze({"body.*": 1}), watch)
    learner.model.body[3].eval()
    learner.fit(2)
    assert modes[0] == [True, False, True, False, False]
    assert modes[-1] == [True, True, True, False, True]


@pytest.mark.parametrize(
    ("epochs", "frozen"),
    [
        (0, [False] * 4),
        (2, [True, True, False, False]),
        (None, [True] * 4),
        ((1, 3), [False, True, True, False]),
        ((2, None), [False, False, True, True]),
    ],
)
def test_the_epochs_in_which_parameters_are_frozen(epochs: Any, frozen: list[bool]) -> None:
    learner = learner_with(Freeze({"head.weight": epochs}))
    assert ["head.weight" not in changed for changed in changes(learner, 4)] == frozen


def test_parameters_without_a_pattern_are_left_alone() -> None:
    learner = learner_with(Freeze({"head.*": 1}))
    learner.model.body[0].requires_grad_(False)
    found = changes(learner, 2)
    assert not (found[0] | found[1]) & {"body.0.weight", "body.0.bias"}
    assert found[1] >= HEAD


def test_several_models_have_their_names_before_the_parameters() -> None:
    class Both(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, x=raw[0]) as batch:
                batch.loss = learner.model.a(batch.x).square().mean() + learner.model.b(batch.x).square().mean()
                learner.backward(self, batch.loss)
                learner.update(self)

    models = {"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)}
    tiny_learner(Freeze({"a.*": None}), model=models, data={Both: batches()}, lossfn=mse_loss).fit(1)
    assert not any(param.requires_grad for param in models["a"].parameters())
    assert all(param.requires_grad for param in models["b"].parameters())


def test_a_frozen_part_is_seen_when_a_fit_begins() -> None:
    with printed(100) as text:
        learner_with(Freeze({"body.*": 1}), ModelSummary(), SanityCheck()).fit(1)
    assert "Parameters: 41, of them frozen: 36." in text.getvalue()


def test_a_direct_epoch_is_frozen_too() -> None:
    learner = learner_with(Freeze({"body.*": 1}))
    before = learner.model.body[0].weight.clone()
    learner.epoch(TrainingPhase)
    assert torch.equal(learner.model.body[0].weight, before)
    learner.epoch(TrainingPhase)
    assert not torch.equal(learner.model.body[0].weight, before)


def test_beside_averages_of_the_weights() -> None:
    learner = learner_with(Freeze({"body.*": 1}), EMA(0.5))
    assert changes(learner, 1)[0] == HEAD


@pytest.mark.parametrize("executor", ["serial", "dask"])
@pytest.mark.parametrize("freeze_first", [True, False])
@pytest.mark.parametrize(
    ("epochs", "tracked"),
    [(None, {1: 0, 4: 0}), (2, {1: 5, 4: 5})],
    ids=["for ever", "for two epochs"],
)
def test_the_mean_of_weights_that_are_frozen(
    epochs: Any, tracked: dict[int, int], freeze_first: bool, executor: str
) -> None:
    """Training is as without the mean, in either order; frozen norms keep their statistics, others renew them."""
    weights: list[dict[str, Tensor]] = []
    watch = CustomCallback(
        lambda learner: weights.append({name: value.clone() for name, value in learner.model.named_parameters()}),
        EpochEnd, TrainingPhase, access={"model": Read()},
    )  # fmt: skip
    learner_with(Freeze({"body.*": epochs}), watch).fit(4)
    swa, freeze = SWA(2), Freeze({"body.*": epochs})
    callbacks = [freeze, swa] if freeze_first else [swa, freeze]
    with learner_with(*callbacks, executor=executor) as learner:
        learner.fit(4)
        trained = dict(learner.model.named_parameters())
        assert [name for name, value in weights[-1].items() if not torch.equal(trained[name], value)] == []
        for name, average in swa.averages.items():
            torch.testing.assert_close(average, sum(each[name] for each in weights[1:]) / 3)
        with swa.applied():
            for layer, number in tracked.items():
                norm = learner.model.body[layer]
                assert (norm.num_batches_tracked.item(), bool(norm.running_mean.any())) == (number, number > 0)


GROUPS = {"head.*": {"lr": 0.05}, "body.*": {"lr": 0.01}}


def with_groups() -> tuple[Net, Any]:
    model = Net()
    return model, torch.optim.SGD(param_groups(model, GROUPS, no_decay=True), lr=0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.usefixtures("forget_compilations")
@pytest.mark.parametrize(
    ("core", "place"),
    [
        *(({}, place) for place in ("epoch-0001.ckpt", "epoch-0002.ckpt", "middle.ckpt")),
        *(({"accumulate": 2}, place) for place in ("epoch-0001.ckpt", "epoch-0002.ckpt", "middle.ckpt")),
        # A compilation takes seconds.
        pytest.param({"compile": {"backend": "aot_eager"}}, "middle.ckpt", marks=pytest.mark.cpu_only(NOT_COMPILED)),
    ],
    ids=str,
)
def test_a_fit_that_resumes_is_frozen_as_the_first_one(tmp_path: Path, core: Any, place: str) -> None:
    def middle(learner: Any) -> None:
        if learner.cbstate.history[TrainingPhase].steps == 8:  # within the second epoch, and an accumulation group
            learner.request_checkpoint(tmp_path / "middle.ckpt")

    def make() -> Learner:
        model, optimizer = with_groups()
        asks = CustomCallback(middle, BatchEnd, TrainingPhase, access={"cbstate.history": Read()})
        callbacks = Freeze(GRADUAL), asks, Checkpointer(tmp_path)
        return learner_with(*callbacks, model=model, optimizer=optimizer, **core)

    whole = make()
    whole.fit(4)
    resumed = make()
    resumed.fit(4, resume=tmp_path / place)
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    assert [group["name"] for group in resumed.optimizer.param_groups] == [
        "head.*", "head.*, no decay", "body.*", "body.*, no decay",
    ]  # fmt: skip
    assert all(param.requires_grad for param in resumed.model.parameters())
    assert [module.training for module in resumed.model.body] == [True] * 5


@pytest.mark.cpu_only(NOT_COMPILED)
@pytest.mark.usefixtures("forget_compilations")
def test_a_compiled_model_trains_the_layers_that_are_unfrozen() -> None:
    found = changes(learner_with(Freeze(GRADUAL), compile={"backend": "aot_eager"}), 3)
    assert [bool(changed & SECOND) for changed in found] == [False, True, True]
    assert [bool(changed & FIRST) for changed in found] == [False, False, True]


@pytest.mark.parametrize("executor", ["dask"])
def test_the_dask_executor_freezes_the_same(executor: str) -> None:
    serial = learner_with(Freeze(GRADUAL), EMA(0.5))
    serial.fit(3)
    with Learner(
        Net(), mse_loss, data=(batches(), batches()), optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        callbacks=[Freeze(GRADUAL), EMA(0.5)], default_callbacks="quiet", core=TorchCore("cpu"), executor=executor,
    ) as learner:  # fmt: skip
        torch.manual_seed(0)
        learner.fit(3)
    assert {name for name, param in learner.model.named_parameters() if param.requires_grad} == {
        name for name, param in serial.model.named_parameters() if param.requires_grad
    }


# --- bad input


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            "body.*",
            "Freeze('body.*') takes a mapping from patterns of names to epochs: Freeze({'backbone.*': 2}) freezes for "
            "two epochs, and Freeze({'backbone.*': None}) for ever.",
        ),
        ({}, "Freeze({}) takes a mapping"),
        ({"a": 1.5}, "Freeze(): the number of epochs for 'a' is a whole number, at least 0, got 1.5."),
        ({"a": (2, 2)}, "Freeze(): the number of epochs for 'a' is the pair (2, 2): the second"),
        ({"a": (1, 2, 3)}, "Freeze(): the number of epochs for 'a' is a number, None, or a pair (first, last); got"),
    ],
)
def test_patterns_that_are_refused(patterns: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Freeze(patterns)
    assert str(caught.value).startswith(message)


def test_a_pattern_that_fits_no_parameter() -> None:
    with pytest.raises(UsageError) as caught:
        learner_with(Freeze({"boddy.*": 1}))
    assert str(caught.value) == (
        "Freeze: the pattern 'boddy.*' fits no parameter: names are body.0.weight, body.0.bias, body.1.weight and 5 "
        "more. Patterns are compared with whole names of parameters, in order: 'head.*', '*.bias', '*'."
    )
    with pytest.raises(UsageError, match=r"pattern 'body\.2\.\*' fits no parameter: an earlier pattern fits body\.2"):
        learner_with(Freeze({"body.*": 2, "body.2.*": 1}))


def test_epochs_must_be_counted() -> None:
    with pytest.raises(MissingStateError, match=r"reads cbstate\.history.*Recorder"):
        Learner(Net(), mse_loss, callbacks=[Freeze({"body.*": 1})], default_callbacks=False)
