"""Several ranks with what one process alone can do, or DDP alone gets wrong: equal models, or an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    BatchBegin,
    BatchEnd,
    Callback,
    CancelBatchException,
    Event,
    Learner,
    LearnerView,
    StepContext,
    TorchCore,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import EMA, Checkpointer, CustomCallback
from flowtrain.errors import DivergedError, RankError
from tests.support.ranks import Ranks, of_complex, rank


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = torch.Generator().manual_seed(rank())
    return [(torch.randn(4, 3, generator=made), torch.randn(4, 1, generator=made)) for _ in range(count)]


def learner(model: nn.Module, *callbacks: Callback, core: TorchCore | None = None, **options: Any) -> Learner:
    return Learner(
        model, mse_loss, data={options.pop("phase", TrainingPhase): options.pop("data", batches())},
        optimizer=partial(options.pop("kind", torch.optim.SGD), lr=0.1), core=core or TorchCore(device="cpu"),
        callbacks=callbacks, default_callbacks="quiet", **options,
    )  # fmt: skip


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def weights(of: nn.Module) -> list[Any]:
    return [param.tolist() for param in of.parameters()]


class Branch(nn.Module):
    """Uses one of its two layers, another on each rank if that is wanted."""

    def __init__(self, *, apart: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 1), nn.Linear(3, 1)
        self.apart = apart

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (self.second if self.apart and rank() else self.first)(inputs)
        return found


def unused(*, find: bool, apart: bool) -> Any:
    made = Branch(apart=apart)
    core = TorchCore(device="cpu", ddp={"find_unused_parameters": True} if find else None)
    learner(made, core=core).fit(1)
    return weights(made)


@pytest.mark.parametrize("apart", [False, True])
def test_a_model_with_unused_parameters_trains_with_the_option_of_ddp(apart: bool, ranks: Ranks) -> None:
    one, two = ranks.values(unused, find=True, apart=apart)
    assert one == two


def test_without_the_option_unused_parameters_are_named(ranks: Ranks) -> None:
    for outcome in ranks.run_on(2, 30, unused, find=False, apart=False):
        assert outcome.ended == "CoreError"
        assert outcome.error is not None
        assert "there is none of second.weight, second.bias: the loss does not depend on it" in outcome.error.text
        assert "TorchCore(ddp={'find_unused_parameters': True})" in outcome.error.text


def refuse_update(learner: LearnerView) -> None:
    if not rank():
        raise CancelBatchException("only here")


def custom() -> Any:
    made = learner(model(), CustomCallback(refuse_update, UpdateBegin, TrainingPhase))
    made.fit(1)
    return weights(made.model), made.state.updates


def test_a_function_of_the_user_that_cancels_an_update_cancels_it_on_all_ranks(ranks: Ranks) -> None:
    one, two = ranks.values(custom)
    assert one == two
    assert one[1] == 0


class Asks(Callback):
    def __init__(self, path: str) -> None:
        self.path = path

    @on(BatchEnd, TrainingPhase)
    def ask(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.request_checkpoint(self.path)


def ask(path: str) -> Any:
    learner(model(), Asks(path)).fit(1)


def test_a_checkpoint_that_the_main_rank_alone_requests_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    one, two = ranks.run_on(2, 30, ask, str(tmp_path / "a.ckpt"))
    assert (one.ended, two.ended) == ("RankError", "RemoteError")
    assert one.error is not None
    assert one.error.text == (
        "Asks requests a checkpoint, in which all ranks take part, and does not say so. Set may_checkpoint = True in "
        "the class: its handlers then run on every rank, and ranks compare what they request, so that no rank waits "
        "for one that requests nothing."
    )


class Thaw(Callback):
    """Trains the first layer from the second batch on: changes it at the end of that batch, or at its begin."""

    def __init__(self, event: type[Event]) -> None:
        self.count, self.event = 0, event

    def state_access(self) -> Access:
        return {"model": Write()}

    @on(Event, TrainingPhase)
    def thaw(self, event: Event, phase: TrainingPhase, learner: LearnerView) -> None:
        self.count += isinstance(event, self.event)
        if self.count == 2:
            learner.model.requires_grad_(self.count == 2)


def thaw(event: type[Event]) -> Any:
    made = model()
    made[0].requires_grad_(False)
    before = weights(made[0])
    learner(made, Thaw(event)).fit(1)
    return before != weights(made[0]), weights(made)


def test_a_layer_that_is_thawed_within_an_epoch_trains_alike(ranks: Ranks) -> None:
    one, two = ranks.values(thaw, BatchEnd)
    assert one[0]
    assert one == two


def test_a_layer_that_is_thawed_after_the_begin_of_a_batch_is_refused(ranks: Ranks) -> None:
    """DDP was made for other parameters, so each rank would have made this update with gradients of its own."""
    for outcome in ranks.run(thaw, BatchBegin):
        assert outcome.ended == "CoreError"
        assert outcome.error is not None
        assert outcome.error.text.startswith("A callback has changed, at the begin of a batch, which parameters the")


def steps() -> Any:
    made = learner(model())
    for raw in batches(2):
        made.step(TrainingPhase, raw)
    made.fit(1)
    return weights(made.model), made.state.updates


def test_single_steps_train_alike(ranks: Ranks) -> None:
    one, two = ranks.values(steps)
    assert one == two
    assert one[1] == 6


class OwnUpdate(AbstractTrainingPhase):
    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
            loss = learner.lossfn(learner.model(batch.inputs), batch.targets)
            loss.backward()
            learner.optimizer.step()
            learner.fire(UpdateEnd(), self)


def own_update() -> Any:
    learner(model(), phase=OwnUpdate).fit(1)


def test_a_step_that_calls_its_optimizer_itself_is_refused(ranks: Ranks) -> None:
    outcomes = ranks.run_on(2, 30, own_update)
    for outcome in outcomes:
        assert outcome.ended == "RankError"
        assert outcome.error is not None
        assert "Write learner.update(self), which averages the gradients over the ranks" in outcome.error.text


class UpdatesApart(AbstractTrainingPhase):
    """Makes an update with the second batch, on one rank alone if that is wanted."""

    batches, apart = 0, True

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
            batch.loss = learner.lossfn(learner.model(batch.inputs), batch.targets)
            learner.backward(self, batch.loss)
            type(self).batches += 1
            if self.batches == 2 and not (self.apart and rank()):
                learner.update(self)


def update_apart(*, apart: bool) -> Any:
    UpdatesApart.apart = apart
    made = learner(model(), phase=UpdatesApart)
    made.fit(1)
    return weights(made.model), made.state.updates


def test_a_step_that_updates_on_one_rank_alone_ends_on_all(ranks: Ranks) -> None:
    for outcome in ranks.run(update_apart, apart=True):
        assert outcome.ended == "RankError"
        assert outcome.error is not None
        assert outcome.error.text.startswith("1 of 2 ranks make an update, and the others do not: they would wait for")
    one, two = ranks.values(update_apart, apart=False)
    assert one == two
    assert one[1] == 1


class Skips(AbstractTrainingPhase):
    """Leaves out every batch of the second rank."""

    def step(self, learner: StepContext, raw: Any) -> None:
        if rank():
            return
        with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
            batch.loss = learner.lossfn(learner.model(batch.inputs), batch.targets)
            learner.backward(self, batch.loss)


def skips() -> Any:
    made = learner(model(), phase=Skips)
    made.fit(2)
    return weights(made.model)


def test_a_step_that_opens_no_batch_makes_no_rank_wait(ranks: Ranks) -> None:
    one, two = ranks.values(skips)
    assert one == two


class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        if rank():
            raise ValueError("in the backward pass")
        return grads[0]


class FailsBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        apply: Any = Fails.apply
        found: torch.Tensor = self.second(apply(self.first(inputs)))
        return found


def backward() -> Any:
    learner(FailsBackward()).fit(1)


def test_an_error_in_the_middle_of_a_backward_pass_ends_all_ranks(ranks: Ranks) -> None:
    """The rank cannot tell the others, so it leaves without them; they notice when its process has ended."""
    one, two = ranks.run_on(2, 30, backward)
    assert (one.ended, two.ended) == ("RemoteError", "ValueError")


class Rotates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turn = nn.Parameter(torch.randn(3, dtype=torch.complex64))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs * self.turn).real.sum(1, keepdim=True)


class Skip(Callback):
    ranks = "every"

    def __init__(self) -> None:
        self.count = 0

    @on(BatchEnd, TrainingPhase)
    def skip(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.count += 1

    @on(UpdateBegin, TrainingPhase)
    def cancel(self, event: UpdateBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        if rank() and self.count == 1:
            raise CancelBatchException("only here")


def rotate() -> Any:
    made = Rotates()
    learner(made, Skip()).fit(1)
    return torch.view_as_real(made.turn).tolist()


def test_complex_parameters_train_alike(ranks: Ranks) -> None:
    one, two = of_complex(ranks.run(rotate))
    assert one == two


def lazy() -> Any:
    learner(nn.LazyLinear(1))


def test_parameters_without_a_shape_are_refused(ranks: Ranks) -> None:
    for outcome in ranks.run_on(2, 30, lazy):
        assert outcome.ended == "CoreError"
        assert outcome.error is not None
        assert outcome.error.text.startswith("Several ranks need parameters whose shapes are known, and weight, bias")


class Stream(torch.utils.data.IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    def __iter__(self) -> Any:
        return iter(batches(4))


def by_steps() -> Any:
    core = TorchCore(device="cpu", uneven="error")
    made = learner(model(), core=core, data=torch.utils.data.DataLoader(Stream(), batch_size=None))
    made.fit(steps=10)
    return weights(made.model), made.state.updates


def test_a_fit_by_steps_over_loaders_without_a_length(ranks: Ranks) -> None:
    one, two = ranks.values(by_steps)
    assert one == two
    assert one[1] == 10


class OwnStep(AbstractTrainingPhase):
    """Trains as a bundled phase does."""

    def step(self, learner: StepContext, raw: Any) -> None:
        """Train on one batch."""
        inputs, targets = raw
        with learner.run_batch(self, inputs=inputs, targets=targets) as batch:
            batch.outputs = learner.model(inputs)
            batch.loss = learner.lossfn(batch.outputs, targets)
            learner.backward(self, batch.loss)
            learner.update(self)


class Uncounted:
    """Batches of which nobody knows the number."""

    def __init__(self, data: list[Any]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self._data)


def nan(how: str) -> Any:
    data: Any = batches()
    if rank():
        data[3 if how == "unfilled" else 1][1].fill_(float("nan"))
    if how == "unfilled":  # the last batch is alone in its group, and no backward pass sends its gradients
        data = Uncounted(data)
    core = TorchCore(device="cpu", lag=2, accumulate=3 if how == "unfilled" else 1)
    phase = OwnStep if how == "own step" else TrainingPhase
    made = learner(model(), core=core, data=data, phase=phase, kind=partial(torch.optim.AdamW, fused=True))
    made.fit(2)
    return weights(made.model), type(made.stopped).__name__


@pytest.mark.parametrize("how", ["bundled", "own step", "unfilled"])
def test_a_loss_that_is_nan_on_one_rank_changes_no_weight_though_it_is_read_late(how: str, ranks: Ranks) -> None:
    one, two = ranks.values(nan, how)
    assert one == two
    assert one[1] == "CancelFittingException"
    assert all(torch.tensor(each).isfinite().all() for each in one[0])


def bare(folder: str) -> Any:
    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("Numpy is not available")  # as torch says in an environment without NumPy

    pytest.MonkeyPatch().setattr(torch.Tensor, "numpy", refuse)
    made = learner(nn.Linear(3, 1), EMA(0.5), Checkpointer(folder))
    made.fit(2)
    return weights(made.model), made.state.updates


def test_no_exchange_needs_numpy(ranks: Ranks, tmp_path: Path) -> None:
    one, two = ranks.values(bare, str(tmp_path))
    assert one == two
    assert one[1] == 8


class Drifts(Callback):
    """Changes a parameter on one rank, through an object that no declaration shows."""

    def __init__(self, made: nn.Module) -> None:
        self.made = made

    @on(BatchEnd, TrainingPhase)
    def drift(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        if rank() == 1:
            with torch.no_grad():
                self.made.get_parameter("1.bias").add_(1e-7)

    ranks = "every"


def drift(check: bool) -> tuple[tuple[str, ...], str]:
    made = model()
    core = TorchCore(device="cpu", check_params=check)
    try:
        learner(made, Drifts(made), core=core).fit(1)
    except DivergedError as error:
        return error.paths, str(error)
    return (), ""


def test_parameters_that_differ_are_noticed_on_request(ranks: Ranks) -> None:
    for paths, text in ranks.values(drift, True):
        assert paths == ("model.1.bias",)
        assert text.startswith("model.1.bias must be the same on all ranks, and differs on rank 1 from the main rank.")
    assert ranks.values(drift, False) == [((), "")] * 2


def load(folder: str, which: str) -> str:
    made = learner(model(), Checkpointer(folder, monitor=None))
    made.fit(2)
    if which == "damaged":
        if not rank():
            (Path(folder) / "latest").write_text("epoch-0009.ckpt\n")
        made.epoch(TrainingPhase)  # in which the ranks meet, so the pointer is written before the other rank reads it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            made.load(folder)
    elif which != "one" or rank():
        made.load(Path(folder) / f"epoch-000{1 + rank() if which == 'others' else 1}.ckpt")
    try:
        made.fit(1)
    except RankError as error:
        return str(error)
    return ""


def test_a_checkpoint_that_one_rank_alone_has_loaded_is_noticed(ranks: Ranks, tmp_path: Path) -> None:
    names = {"one": ("nothing", "epoch-0001.ckpt"), "others": ("epoch-0001.ckpt", "epoch-0002.ckpt")}
    for which, (zero, one) in names.items():
        for text in ranks.values(load, str(tmp_path / which), which):
            assert f"rank 0: {zero}; rank 1: {one}. All ranks must call learner.load with the same file" in text
    assert ranks.values(load, str(tmp_path / "same"), "same") == ["", ""]
    assert ranks.values(load, str(tmp_path / "damaged"), "damaged") == ["", ""]


class Two(nn.Module):
    """A layer that is trained, and one that no optimizer has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.left = nn.Linear(3, 1), nn.Linear(3, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.used(inputs) + self.left(inputs)
        return found


class Extra(Callback):
    """Has a state, which a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}


def warned(folder: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = Two().eval()
        options: Any = {"kind": lambda params, lr: torch.optim.SGD(made.used.parameters(), lr=lr)}
        learner(made, Checkpointer(folder, monitor=None), Extra(), **options).fit(1)
        learner(made, Checkpointer(folder, monitor=None), **options).fit(2, resume=folder)
        learner(model(), phase=ValidationPhase).fit(1)
        data = batches()
        if rank():
            data[-1][1].fill_(float("nan"))
        learner(model(), data=data).fit(1)
    return [str(each.message) for each in caught]


def test_the_main_rank_warns_of_what_is_the_same_everywhere(ranks: Ranks, tmp_path: Path) -> None:
    main, other = ranks.values(warned, str(tmp_path))
    starts = ["The model is in eval mode", "left.weight, left.bias would", "The checkpoint has the state of Extra"]
    starts += ["fit() has no training phase"]
    assert [each for each in starts if not any(text.startswith(each) for text in main)] == []
    assert len(other) == 1
    assert other[0].startswith("The loss is NaN in batch 4 of epoch 1 of TrainingPhase (step 4) on rank 1. Training")
