"""A NaN that is seen late reaches no parameter of an optimizer that takes ``found_inf``."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from flowtrain import Callback, CancelFittingException, EpochEnd, LearnerView, Phase, TorchCore, TrainingPhase, on
from flowtrain.callbacks import StopOnNaNLoss
from flowtrain.core.nan_guard import Guard, all_finite
from flowtrain.core.optimizers import takes_found_inf
from flowtrain.testing import tiny_batches, tiny_learner

NAN = float("nan")
FUSED = partial(torch.optim.AdamW, lr=0.1, fused=True)


def batches_with_nan(at: int, n_batches: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    batches = tiny_batches(n_batches=n_batches)
    inputs, targets = batches[at - 1]
    batches[at - 1] = (inputs, torch.full_like(targets, NAN))
    return batches


def trained_until_nan(at: int, lag: int, optimizer: Any, **options: Any) -> Any:
    core = TorchCore(device="cpu", lag=lag, **options)
    learner = tiny_learner(data=batches_with_nan(at), core=core, optimizer=optimizer)
    with pytest.warns(RuntimeWarning, match="NaN"):
        learner.fit(2)
    assert isinstance(learner.stopped, CancelFittingException)
    return learner


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
@pytest.mark.parametrize("at", [1, 3, 7, 8])
def test_the_parameters_are_those_before_the_nan_whatever_the_lag(make: Any, at: int) -> None:
    optimizer = partial(make, lr=0.1, fused=True)
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


def test_an_optimizer_that_takes_none_has_made_updates_with_nan() -> None:
    learner = trained_until_nan(3, 2, partial(torch.optim.SGD, lr=0.1))
    assert torch.isnan(learner.model.coeff)
    assert not learner.core.finite()


def test_a_scaler_needs_no_guard() -> None:
    core = TorchCore(device="cpu", lag=2, precision="fp16", init_scale=1.0)
    learner = tiny_learner(data=batches_with_nan(3), core=core, optimizer=partial(torch.optim.SGD, lr=0.1))
    with pytest.warns(RuntimeWarning, match="was NaN in batch 3"):
        learner.fit(1)
    assert torch.isfinite(learner.model.coeff)
    assert core.skipped == 1


class Watches(Callback):
    """A user's own, which says that it stops at NaN."""

    stops_at_nan = True

    @on(EpochEnd)
    def look(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...


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
    [bad, good] = batches_with_nan(1, n_batches=2)
    with pytest.warns(RuntimeWarning, match="is NaN"), pytest.raises(CancelFittingException):
        learner.step(TrainingPhase, bad)
    before = learner.model.coeff.clone()
    learner.step(TrainingPhase, good)
    assert not torch.equal(learner.model.coeff, before)


def test_an_epoch_that_fails_leaves_no_loss_on_its_way() -> None:
    def broken() -> Any:
        yield from tiny_batches(n_batches=1)
        yield batches_with_nan(1)[0]
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
    guard = Guard([fused, plain], torch.device("cpu"))
    param.grad = torch.ones(2)
    for loss, moved in ((1.0, True), (NAN, False), (1.0, False), (float("inf"), False)):
        before = param.detach().clone()
        guard.see(torch.tensor([loss]))
        fused.step()
        assert torch.equal(before, param) is not moved, "and once is enough, until it is cleared"
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
    assert all_finite([module.requires_grad_(False)]), "a frozen parameter is as it was before training"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("at", [1, 4, 8])
def test_on_cuda_the_parameters_are_those_before_the_nan(at: int) -> None:
    found = []
    for lag in (0, 2):
        learner = tiny_learner(
            data=batches_with_nan(at), core=TorchCore("cuda", lag=lag), optimizer=partial(torch.optim.AdamW, lr=0.1)
        )
        with pytest.warns(RuntimeWarning, match="NaN"):
            learner.fit(1)
        found.append(learner.model.coeff.item())
    assert found[0] == found[1]
