"""EMA: compared with torch's AveragedModel; what it averages, of which models, and how often."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    Callback,
    EpochEnd,
    FitEnd,
    Learner,
    LearnerView,
    Read,
    TorchCore,
    TrainingPhase,
    UpdateEnd,
    UsageError,
    Write,
    on,
)
from flowtrain.callback.phases import StepContext
from flowtrain.callbacks import EMA, Checkpointer, Recorder, throttle
from flowtrain.testing import TinyModel, record_access, tiny_batches, tiny_learner
from tests.support.merged import ranked
from tests.support.models import mixed_model

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_torchs_averaged_model_to_the_bit(buffers: bool, accumulate: int) -> None:
    ema = EMA(0.9, buffers=buffers)
    core = TorchCore(device="cpu", accumulate=accumulate)
    learner = tiny_learner(ema, model=mixed_model(), optimizer=SGD, core=core, n_batches=6)
    learner.fit(2)

    model = mixed_model()
    optimizer = SGD(model.parameters())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    for number, (x, y) in enumerate(tiny_batches(n_batches=6) * 2, start=1):
        (torch.nn.functional.mse_loss(model(x), y) / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            averaged.update_parameters(model)
    expected = dict(averaged.module.named_parameters())
    if buffers:
        expected |= dict(averaged.module.named_buffers())  # type: ignore[arg-type]  # tensors, both
        del expected["1.num_batches_tracked"]  # an integer counter, which torch averages too
    assert list(ema.averages) == list(expected)
    for name, average in ema.averages.items():
        assert torch.equal(average, expected[name]), name
    for name, weight in learner.model.named_parameters():
        assert torch.equal(weight, model.get_parameter(name)), name  # the averages have not changed training
    with ema.applied():
        for name, value in learner.model.state_dict().items():
            if name != "1.num_batches_tracked" or not buffers:
                assert torch.equal(value, averaged.module.state_dict()[name]), name
        assert learner.model.state_dict()["1.num_batches_tracked"].item() == 12


class Kinds(torch.nn.Module):
    """A model with buffers that cannot be averaged, and one that can."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(1, 3))
        self.norm = torch.nn.BatchNorm1d(3)
        self.last = torch.nn.Linear(3, 1)
        self.mask = torch.nn.Parameter(torch.tensor([0.0, -torch.inf, 0.0]), requires_grad=False)
        self.register_buffer("attention", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs of the last layer, with one value for each sample."""
        if self.training:
            self.seen += len(x)
        outputs: torch.Tensor = self.last(self.norm(self.linear(x)).masked_fill(self.mask < 0, 0.0))
        return outputs


@pytest.mark.parametrize("buffers", [False, True])
def test_what_has_no_mean_is_not_averaged(buffers: bool, tmp_path: Path) -> None:
    """Unit vectors keep length 1, infinities stay infinite, and counters and flags are copied from the model."""
    torch.manual_seed(0)
    ema = EMA(0.5, buffers=buffers)
    learner = tiny_learner(ema, Checkpointer(tmp_path), model=Kinds(), optimizer=SGD, n_batches=6)
    learner.fit(2)
    plain = {name: value.clone() for name, value in learner.model.state_dict().items()}
    assert {name for name in ema.averages if "running_" in name} == (
        {"norm.running_mean", "norm.running_var"} if buffers else set()
    )
    assert not any("_u" in name or "_v" in name.rpartition(".")[2][:2] for name in ema.averages)
    with ema.applied():
        shown = learner.model.state_dict()
        for name, value in shown.items():
            assert not value.isnan().any(), name
        for name in ("attention", "seen", "flags", "mask", "norm.num_batches_tracked"):
            assert torch.equal(shown[name], plain[name]), name
        for name, value in shown.items():
            if name.endswith(("._u", "._v")):
                assert value.norm().item() == pytest.approx(1.0), name
                assert torch.equal(value, plain[name])
        assert torch.equal(shown["norm.running_mean"], plain["norm.running_mean"]) is not buffers
        assert not torch.equal(shown["last.weight"], plain["last.weight"])
    assert plain["seen"].item() == 2 * 6 * 8
    torch.manual_seed(0)
    again = EMA(0.5, buffers=buffers)
    other = tiny_learner(again, Checkpointer(tmp_path), model=Kinds(), optimizer=SGD, n_batches=6)
    other.fit(2, resume=tmp_path / "epoch-0001.ckpt")
    for name, average in ema.averages.items():
        assert torch.equal(again.averages[name], average), name


def test_all_ranks_have_the_averaged_statistics_of_the_main_rank() -> None:
    def make(batches: list[Any], first: Callback) -> Learner:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1))
        return tiny_learner(first, EMA(0.5, buffers=True), model=model, data=batches, optimizer=partial(SGD, lr=0.0))

    def averages(learner: Learner) -> list[tuple[str, Any]]:
        [ema] = [each for each in learner.callbacks if isinstance(each, EMA)]
        return [(name, average.tolist()) for name, average in ema.averages.items()]

    parts = [tiny_batches(n_batches=3), tiny_batches(n_batches=6)[3:]]
    alone = []
    for part in parts:
        alone.append(make(part, Recorder()))
        alone[-1].fit(2)
    both = ranked(make, parts, lambda learner: learner.fit(2))
    assert averages(both[0]) == averages(both[1]) == averages(alone[0])
    assert averages(alone[1]) != averages(alone[0])
    assert EMA(0.5).rank_state() is None


def test_two_halves_are_a_whole() -> None:
    whole, first, second = EMA(0.9), EMA(0.9), EMA(0.9)
    tiny_learner(whole).fit(2)
    learner = tiny_learner(first)
    learner.fit(1)
    second.load_state_dict(first.state_dict())
    learner.replace_callback(second)
    learner.fit(1)
    assert torch.equal(whole.averages["coeff"], second.averages["coeff"])


class Both(AbstractTrainingPhase):
    """Updates two models, one after the other."""

    def step(self, learner: StepContext, raw: torch.Tensor) -> None:
        with learner.run_batch(self, inputs=raw) as batch:
            for name in ("gen", "disc"):
                learner.backward(self, (learner.model[name](batch.inputs) - 1).square().mean(), name)
                learner.update(self, name)


@pytest.mark.parametrize(("model", "names"), [("gen", ["coeff"]), ("", ["gen.coeff", "disc.coeff"])])
def test_several_models_are_averaged_once_a_batch(model: str, names: list[str]) -> None:
    ema = EMA(0.9, model=model)
    learner = tiny_learner(
        ema,
        model={"gen": TinyModel(), "disc": TinyModel()},
        optimizer={"gen": SGD, "disc": SGD},
        data={Both: [torch.ones(2, 1)] * 3},
    )
    learner.fit(1)
    weight = average = 0.0
    for number in range(3):
        weight += 0.1 * 2 * (1 - weight)
        average = 0.9 * average + 0.1 * weight if number else weight
    assert list(ema.averages) == names
    for value in ema.averages.values():
        assert value.item() == pytest.approx(average, rel=1e-6)


def test_throttled_it_averages_now_and_then() -> None:
    ema = throttle(EMA(0.0), UpdateEnd, every=4)
    learner = tiny_learner(ema, n_batches=6)
    learner.epoch(TrainingPhase)
    plain = tiny_learner(n_batches=4)
    plain.epoch(TrainingPhase)
    assert torch.equal(ema.averages["coeff"], plain.model.coeff)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(1.0), "EMA(decay=1.0): decay is at least 0 and below 1, such as 0.999."),
        (lambda: EMA(float("nan")), "EMA(decay=nan): decay is at least 0 and below 1, such as 0.999."),
        (lambda: EMA(model="a.b"), "EMA(model='a.b'): model is the name of one of several models, as in {'gen': ...}."),
        (lambda: EMA().applied().__enter__(), "EMA has no averages yet: fit a learner that has it first."),
    ],
)
def test_what_means_nothing(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == message


def test_a_state_of_another_model() -> None:
    ema = EMA()
    tiny_learner(ema)
    with pytest.raises(UsageError) as caught:
        ema.load_state_dict({"averages": {"coeff": torch.zeros(2)}})
    assert str(caught.value) == (
        "The state of EMA has shape (2,) for 'coeff', of shape (). Load a state of the same model, made with "
        "buffers=False."
    )
    assert ema.averages == {}


def test_declares_exactly_what_it_touches() -> None:
    assert {".".join(path) for path, _ in record_access(EMA()).union} == {"model"}
    ema = EMA()
    learner = tiny_learner(ema, Recorder(), default_callbacks=False, strict=True)
    [node] = [node for node in learner.callbacks.nodes if node.callback is ema]
    shown = {handler.attribute: dict(declaration) for handler, declaration in node.access.items()}
    assert shown["take_in"] == {("model",): Read()}
    assert shown["note_update"] == {}
    learner.fit(1)
    assert FitEnd in {handler.event_type for _, handler in node.handlers}


# --- checkpoints hold the averages that were validated


class Grow(Callback):
    """After the first epoch, replaces a layer without a bias by one with a bias, and trains it."""

    def state_access(self) -> Access:
        return {"model": Write(), "optimizer": Write(), "cbstate.history": Read()}

    @on(EpochEnd, TrainingPhase)
    def grow(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        if learner.cbstate.history[phase].epochs == 1:
            learner.model[1] = torch.nn.Linear(2, 1)
            torch.nn.init.ones_(learner.model[1].weight)
            torch.nn.init.ones_(learner.model[1].bias)
            learner.optimizer.param_groups[0]["params"] = [*learner.model.parameters()]


@pytest.mark.cpu_only("training adds a weight of the CPU")
def test_the_average_of_a_weight_that_training_adds_begins_with_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1, bias=False))
    ema = EMA(0.5)
    learner = tiny_learner(Grow(), ema, model=model, n_batches=1)
    learner.fit(1)
    first = ema.averages["0.weight"].clone()
    assert list(ema.averages) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert ema.averages["1.bias"].tolist() == [1.0]
    learner.fit(1)
    weights = dict(model.named_parameters())
    torch.testing.assert_close(ema.averages["0.weight"], (first + weights["0.weight"]) / 2)
    torch.testing.assert_close(ema.averages["1.bias"], (1 + weights["1.bias"]) / 2)
    assert weights["1.bias"].item() != 1.0
