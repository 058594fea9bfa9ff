"""Precision and the scale of the loss: skipped updates are counted, without waiting for the device."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from flowtrain import TorchCore, TrainingPhase
from flowtrain.core.precision import Scaling, autocast, in_precision
from flowtrain.diagnostics.sync_audit import Sync, watching
from flowtrain.testing import tiny_batches, tiny_learner

CPU = torch.device("cpu")


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
    run = in_precision(model, CPU, precision)  # type: ignore[arg-type]
    assert run(torch.ones(1, 2)).dtype == dtype
    assert (run is model) is (precision == "fp32"), "nothing comes between where nothing is to be done"
    with autocast(CPU, precision):  # type: ignore[arg-type]
        assert model(torch.ones(1, 2)).dtype == dtype


def test_bf16_takes_the_short_way() -> None:
    """Only a scaler needs what comes around an update."""
    for precision, plain in (("fp32", True), ("bf16", True), ("fp16", False)):
        core = TorchCore("cpu", precision=precision)  # type: ignore[arg-type]
        tiny_learner(core=core, optimizer=partial(torch.optim.SGD, lr=0.1))
        assert core.plain is plain
