"""Precision, the scale of the loss, and NaN: bad updates are skipped and counted without waiting for the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import (
    AbstractTrainingPhase,
    Callback,
    CancelFittingException,
    EpochEnd,
    Learner,
    LearnerView,
    Phase,
    StepContext,
    TorchCore,
    TrainingPhase,
    on,
)
from flowtrain.callbacks import StopOnNaNLoss
from flowtrain.core.optimizers import takes_found_inf
from flowtrain.core.precision import NaNGuard, Scaling, all_finite, autocast, in_precision
from flowtrain.diagnostics.sync_audit import Sync, watching
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.accelerator import DEVICE, needs_accelerator
from tests.support.loaders import batches_with
from tests.support.untyped import untyped

CPU = torch.device("cpu")
NAN = float("nan")
FUSED = partial(torch.optim.AdamW, lr=0.1, fused=True)


def test_skipped_updates_are_counted_and_survive_a_checkpoint() -> None:
    core = TorchCore("cpu", precision="fp16", init_scale=1024.0)
    learner = tiny_learner(core=core)
    [(inputs, targets)] = tiny_batches(n_batches=1)
    assert core.skipped == 0
    for factor, skipped in ((1.0, 0), (1e38, 1), (1e38, 2), (1.0, 2)):
        learner.step(TrainingPhase, (inputs * factor, targets))
        assert core.skipped == skipped
    state = core.state_dict()
    assert state["scaler"]["skipped"] == 2
    other = TorchCore("cpu", precision="fp16")
    tiny_learner(core=other)
    other.load_state_dict(state)
    assert other.skipped == 2
    assert other.state_dict()["scaler"] == state["scaler"]
    assert TorchCore("cpu").settings.precision == "fp32"


def test_a_state_from_before_skipped_updates_were_counted() -> None:
    scaling = Scaling(CPU, 64.0)
    scaling.load_state_dict({name: value for name, value in scaling.state_dict().items() if name != "skipped"})
    assert scaling.skipped == 0


def test_counting_does_not_wait() -> None:
    found: list[Sync] = []
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=True)
    scaling = Scaling(CPU, 8.0)
    with watching(found.append):
        for _ in range(2):
            scaling.scale(parameter.sum()).backward()
            scaling.unscale(optimizer)
            scaling.step(optimizer)
            scaling.update([])
            optimizer.zero_grad()
    assert not found, "a fused optimizer finds out by itself whether to step"
    assert scaling.skipped == 0


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_is_there_where_it_is_asked_for(precision: str, dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    run = in_precision(model, CPU, untyped(precision))
    assert run(torch.ones(1, 2)).dtype == dtype
    assert (run is model) is (precision == "fp32"), "in fp32 the core calls the model itself, without autocast"
    with autocast(CPU, untyped(precision)):
        assert model(torch.ones(1, 2)).dtype == dtype


def test_bf16_takes_the_short_way() -> None:
    """Only fp16 has a gradient scaler, and only with a scaler does an update need more than the optimizer's step."""
    for precision, plain in (("fp32", True), ("bf16", True), ("fp16", False)):
        core = TorchCore("cpu", precision=untyped(precision))
        tiny_learner(core=core, optimizer=partial(torch.optim.SGD, lr=0.1))
        assert core.plain is plain


# --- a NaN that is seen late reaches no parameter of an optimizer that takes ``found_inf``


def trained_until_nan(at: int, lag: int, optimizer: Any, **options: Any) -> Any:
    core = TorchCore(device="cpu", lag=lag, **options)
    learner = tiny_learner(data=batches_with(NAN, at, n_batches=8), core=core, optimizer=optimizer)
    with pytest.warns(RuntimeWarning, match="NaN"):
        learner.fit(2)
    assert isinstance(learner.stopped, CancelFittingException)
    return learner


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("at", [1, 3, 7, 8])
def test_the_parameters_are_those_before_the_nan_whatever_the_lag(make: Any, at: int) -> None:
    optimizer = partial(make, lr=0.1, fused=True)
    if not takes_found_inf(optimizer([torch.nn.Parameter(torch.ones(1))])):
        pytest.skip("Adagrad of torch 2.6 does not say that it takes found_inf, so that no scaler of torch uses it")
    expected = trained_until_nan(at, 0, optimizer)
    for lag in (1, 2, 5):
        learner = trained_until_nan(at, lag, optimizer)
        assert torch.equal(learner.model.coeff, expected.model.coeff)
        history = learner.cbstate.history[TrainingPhase]
        assert history.steps == min(at - 1 + lag, 8), "training ends exactly `lag` batches later, or with the epoch"
        assert f"The loss was NaN in batch {at} of epoch 1" in str(learner.stopped)


def test_a_group_with_a_nan_in_it_is_not_stepped_with() -> None:
    expected = trained_until_nan(6, 0, FUSED, accumulate=2)
    assert torch.equal(trained_until_nan(6, 2, FUSED, accumulate=2).model.coeff, expected.model.coeff)


def test_the_next_fit_trains_again() -> None:
    learner = trained_until_nan(3, 2, FUSED)
    before = learner.model.coeff.clone()
    learner.fit(1, data=tiny_batches(n_batches=4))
    assert not torch.equal(learner.model.coeff, before)
    assert learner.stopped is None


def test_an_optimizer_without_found_inf_has_made_updates_with_nan() -> None:
    learner = trained_until_nan(3, 2, partial(torch.optim.SGD, lr=0.1))
    assert torch.isnan(learner.model.coeff)
    assert not learner.core.finite()


def test_a_scaler_needs_no_guard() -> None:
    core = TorchCore(device="cpu", lag=2, precision="fp16", init_scale=1.0)
    learner = tiny_learner(
        data=batches_with(NAN, 3, n_batches=8), core=core, optimizer=partial(torch.optim.SGD, lr=0.1)
    )
    with pytest.warns(RuntimeWarning, match="was NaN in batch 3"):
        learner.fit(1)
    assert torch.isfinite(learner.model.coeff)
    assert core.skipped == 1


class Watches(Callback):
    """A callback of a user which says that it stops training at NaN."""

    stops_at_nan = True

    @on(EpochEnd)
    def look(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...


@pytest.mark.cpu_only("the CPU has no lag")
def test_only_where_somebody_watches_and_values_are_late() -> None:
    def guarded(learner: Any) -> bool:
        return hasattr(learner.optimizer, "found_inf")

    late = tiny_learner(core=TorchCore(device="cpu", lag=2), optimizer=FUSED)
    assert guarded(late)
    late.remove_callback(StopOnNaNLoss)
    assert not guarded(late)
    assert late.core.backward is torch.Tensor.backward
    assert not guarded(tiny_learner(core=TorchCore(device="cpu"), optimizer=FUSED))
    late.add_callback(Watches())
    assert guarded(late)


def test_direct_steps_are_looked_at_at_once() -> None:
    learner = tiny_learner(core=TorchCore(device="cpu", lag=2), optimizer=FUSED)
    [bad, good] = batches_with(NAN, 1, n_batches=2)
    with pytest.warns(RuntimeWarning, match="is NaN"), pytest.raises(CancelFittingException):
        learner.step(TrainingPhase, bad)
    before = learner.model.coeff.clone()
    learner.step(TrainingPhase, good)
    assert not torch.equal(learner.model.coeff, before)


def test_an_epoch_that_fails_leaves_no_loss_on_its_way() -> None:
    def broken() -> Any:
        yield from tiny_batches(n_batches=1)
        yield batches_with(NAN, 1, n_batches=8)[0]
        raise OSError("gone")

    learner = tiny_learner(core=TorchCore(device="cpu", lag=2), optimizer=FUSED)
    with pytest.raises(OSError, match="gone"):
        learner.fit(1, data=broken())
    learner.fit(1, data=tiny_batches(n_batches=4))
    assert learner.stopped is None
    assert learner.core.finite()


def test_the_guard_by_itself() -> None:
    param = torch.nn.Parameter(torch.ones(2))
    fused, plain = torch.optim.SGD([param], fused=True), torch.optim.SGD([param])
    assert [takes_found_inf(each) for each in (fused, plain)] == [True, False]
    guard = NaNGuard([fused, plain], torch.device("cpu"))
    param.grad = torch.ones(2)
    for loss, moved in ((1.0, True), (NAN, False), (1.0, False), (float("inf"), False)):
        before = param.detach().clone()
        guard.see(torch.tensor([loss]))
        fused.step()
        assert torch.equal(before, param) is not moved, "one NaN blocks updates until the flag is cleared"
    guard.clear()
    guard.see(torch.tensor(float("inf")))
    fused.step()
    assert not torch.equal(before, param)
    guard.release()
    assert not hasattr(fused, "found_inf")


def test_all_finite() -> None:
    module = torch.nn.BatchNorm1d(2)
    assert all_finite([module, torch.nn.ReLU()])
    assert all_finite([])
    assert module.running_mean is not None
    module.running_mean[0] = float("inf")
    assert all_finite([module]), "buffers may hold infinities"
    for tiny in (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.complex64):
        for value in (1.0, float("nan")):
            holder = torch.nn.Module()
            holder.weight = torch.nn.Parameter(torch.tensor([value]).to(tiny))
            assert all_finite([holder]) is (value == 1.0)
    with torch.no_grad():
        module.weight[0] = float("-inf")
    assert not all_finite([module])
    assert all_finite([module.requires_grad_(False)]), "frozen parameters are not checked"


@needs_accelerator
@pytest.mark.parametrize("at", [1, 4, 8])
def test_on_an_accelerator_the_parameters_are_those_before_the_nan(at: int) -> None:
    found = []
    for lag in (0, 2):
        learner = tiny_learner(
            data=batches_with(NAN, at, n_batches=8),
            core=TorchCore(DEVICE, lag=lag),
            optimizer=partial(torch.optim.AdamW, lr=0.1),
        )
        with pytest.warns(RuntimeWarning, match="NaN"):
            learner.fit(1)
        found.append(learner.model.coeff.item())
    assert found[0] == found[1]


def test_fp16_with_an_update_for_each_optimizer() -> None:
    """An overflow in one model changes the scale between the updates; the other model's gradients stay correct."""

    class Both(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, x=raw) as batch:
                learner.backward(self, (learner.model.one(batch.x) * 1e38).sum(), "one")
                learner.backward(self, learner.model.other(batch.x).sum(), "other")
                learner.update(self, "one")
                learner.update(self, "other")

    sgd = partial(torch.optim.SGD, lr=0.5)
    models = {name: torch.nn.Linear(1, 1, bias=False) for name in ("one", "other")}
    for model in models.values():
        torch.nn.init.ones_(model.weight)
    learner = Learner(
        models,
        torch.nn.functional.mse_loss,
        data={Both: [torch.ones(1, 1)]},
        optimizer={"one": sgd, "other": sgd},
        core=TorchCore(device="cpu", precision="fp16"),
        default_callbacks=False,
    )
    learner.fit(1)
    assert [model.weight.item() for model in models.values()] == [1.0, 0.5]  # skipped after its overflow
