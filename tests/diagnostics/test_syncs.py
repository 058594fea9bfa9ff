"""What makes the host wait is found, and the default loop has none of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flowtrain import Learner, TorchCore, TrainingPhase
from flowtrain.callbacks import Metrics, SmoothLoss, Traces
from flowtrain.diagnostics.sync_audit import Sync, watching
from flowtrain.metrics import accuracy
from flowtrain.state.device_values import Reading

ONE, MANY = torch.tensor(1.0), torch.arange(4.0)


class Waited(Exception):
    """The host would have waited for the device."""


def refuse(sync: Sync) -> None:
    raise Waited(str(sync))


@pytest.mark.parametrize(
    ("wait", "operation"),
    [
        (lambda: ONE.item(), ".item()"),
        (lambda: float(ONE), "float(tensor)"),
        (lambda: int(ONE), "int(tensor)"),
        (lambda: bool(ONE), "bool(tensor)"),
        (lambda: str(MANY.tolist()), ".tolist()"),
        (lambda: MANY.cpu(), ".cpu()"),
        (lambda: MANY.to("cpu"), ".to('cpu')"),
        (lambda: MANY.numpy(), ".numpy()"),
        (lambda: "abc"[torch.tensor(1)], "a tensor as an index"),
        (lambda: repr(MANY), "repr(tensor)"),
        (lambda: f"{ONE:.3f}", "a tensor in a text"),
        (lambda: 1.0 in MANY, "value in tensor"),
        (lambda: MANY[MANY > 1], "a boolean mask"),
        (lambda: MANY.nonzero(), "nonzero()"),
        (lambda: torch.masked_select(MANY, MANY > 1), "masked_select()"),
        (lambda: torch.equal(MANY, MANY), "equal()"),
        (lambda: max(ONE, ONE + 1), "bool(tensor)"),
    ],
)
def test_each_way_to_wait_is_seen_once(wait: Callable[[], Any], operation: str) -> None:
    found: list[Sync] = []
    with watching(found.append):
        wait()
    assert [each.operation for each in found] == [operation]
    assert found[0].file == __file__
    assert found[0].code in Path(__file__).read_text("utf-8")
    with pytest.raises(Waited, match="waits for "), watching(refuse):
        wait()


@pytest.mark.parametrize(
    "work",
    [
        lambda: MANY + ONE,
        lambda: MANY[1:3],
        lambda: MANY[torch.tensor([0, 1])],
        lambda: torch.where(MANY > 1, MANY, 0.0),
        lambda: MANY.to(torch.float64),
        lambda: MANY.to(ONE.device),
        lambda: (MANY.shape, len(MANY), MANY.dtype, MANY.is_cpu),
        lambda: Reading([ONE, ONE]).numbers(),
        lambda: nn.utils.clip_grad_norm_([nn.Parameter(MANY)], 1.0),
    ],
)
def test_what_does_not_wait_is_not_seen(work: Callable[[], Any]) -> None:
    with watching(refuse):
        work()


def test_the_advice_fits() -> None:
    found: list[Sync] = []
    with watching(found.append):
        if ONE > 0:
            MANY[MANY > 1].cpu()
    assert [each.advice.split(",")[0].split(".")[0] for each in found] == [
        "Choose on the device: torch",
        "The size of the result depends on values",
        "Run the callback rarely (throttle(callback",
    ]


# --- the default loop


def digits_like(core: TorchCore, device: str = "cpu", **options: Any) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(9)]
    optimizer = options.pop("optimizer", partial(torch.optim.AdamW, lr=1e-2))
    return Learner(model, cross_entropy, data=(data, data[:4]), optimizer=optimizer, core=core, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"clip_grad_norm": 1.0}, {"precision": "bf16"}, {"channels_last": True}],
    ids=str,
)
@pytest.mark.parametrize("terminal", [True, False])
def test_the_default_loop_never_waits(options: Any, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero host-device synchronisations in every batch, with all default callbacks, metrics and traces."""
    core = TorchCore("cpu", lag=2, **options)
    traces = Traces({"Norm": lambda view: view.batch.outputs.norm()}, TrainingPhase)
    learner = digits_like(core, callbacks=[Metrics(accuracy), SmoothLoss(), traces])
    console = rich.get_console()
    monkeypatch.setattr(console, "_file", io.StringIO())  # `file` would be put back as what is captured now
    monkeypatch.setattr(console, "_force_terminal", terminal)
    bar = learner.get_callback("ProgressBar")
    assert bar is not None
    bar.redraw = bar.report = 0.0  # type: ignore[attr-defined]  # a bar draws in every batch
    with watching(refuse):
        learner.fit(2)
    expected = digits_like(TorchCore("cpu", **options), callbacks=[Metrics(accuracy), SmoothLoss()])
    expected.fit(2)
    for name in ("metrics_step", "metrics_epoch"):
        late, now = (getattr(each.cbstate, name)[TrainingPhase] for each in (learner, expected))
        assert {key: list(series) for key, series in late.items()} == {key: list(series) for key, series in now.items()}
    assert len(learner.cbstate.tracehistory[TrainingPhase]["Norm"]) == 18


def test_a_loop_that_does_wait_is_caught() -> None:
    """The test above can fail."""
    learner = digits_like(TorchCore("cpu"), default_callbacks="quiet")
    with pytest.raises(Waited, match=r"\.item\(\)"), watching(refuse):
        learner.fit(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"clip_grad_norm": 1.0}, {"precision": "bf16"}, {"precision": "fp16"}],
    ids=str,
)
def test_the_default_loop_never_waits_on_cuda(options: Any) -> None:
    learner = digits_like(TorchCore("cuda", **options), callbacks=[Metrics(accuracy)])
    learner.fit(1)  # states are made, kernels loaded
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    learner.remove_callback("MetricsPrinter")
    try:
        torch.cuda.set_sync_debug_mode("error")
        learner.epoch(TrainingPhase)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_nothing_of_it_stays() -> None:
    with watching(refuse):
        pass
    assert ONE.item() == 1
    assert isinstance(MANY.cpu(), Tensor)
