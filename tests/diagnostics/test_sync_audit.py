"""`Learner.audit_syncs`: which lines make the host wait for the device, and the advice for each."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import rich
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    EpochEnd,
    Learner,
    LearnerView,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import Metrics, SmoothLoss, Traces
from flowtrain.diagnostics.sync_audit import Sync, watching
from flowtrain.metrics import accuracy
from flowtrain.state.device_values import Reading
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.untyped import untyped


class Printer(Callback):
    """Reads a number of the device in every batch."""

    seen = 0

    def state_access(self) -> Access:
        return {"batch.loss": Read(), "batch.outputs": Read()}

    @on(BatchEnd, TrainingPhase)
    def show(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        Printer.seen += float(learner.batch.loss) > 0  # line of show

    @on(EpochEnd, ValidationPhase)
    def collect(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        _to_host(learner.batch.outputs)


def _to_host(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.detach().cpu()  # line of collect


class Good(Callback):
    """A callback that works on the device only."""

    def state_access(self) -> Access:
        return {"batch.loss": Read()}

    @on(BatchEnd)
    def double(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.last = learner.batch.loss.detach() * 2


def line_of(mark: str) -> int:
    with open(__file__, encoding="utf-8") as source:
        return next(number for number, line in enumerate(source, 1) if line.rstrip().endswith(f"# line of {mark}"))


def test_the_report_names_callback_handler_line_and_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    learner = tiny_learner(Good(), Printer(), data=(tiny_batches(n_batches=3), tiny_batches(n_batches=2)))
    report = learner.audit_syncs()
    assert [(each.where, each.event, each.phase, each.operation, each.line) for each in report] == [
        ("Printer.show", "BatchEnd", "TrainingPhase", "float(tensor)", line_of("show")),
        ("Printer.collect", "EpochEnd", "ValidationPhase", ".cpu()", line_of("collect")),
    ]
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert printed.startswith(
        f"Printer.show at BatchEnd, TrainingPhase, waits for float(tensor):\n    {__file__}:{line_of('show')}: "
        f"Printer.seen += float(learner.batch.loss) > 0  # line of show\n    Record the tensor itself"
    )


def test_the_learner_does_not_change() -> None:
    learner = tiny_learner(Printer(), data=tiny_batches(n_batches=3))
    learner.fit(1)
    before, state = learner.model.coeff.clone(), torch.get_rng_state()
    learner.audit_syncs()
    assert torch.equal(learner.model.coeff, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert learner.cbstate.history[TrainingPhase].steps == 3


class Prints(Printer):
    """A callback that says that an audit must not run it."""

    audited = False


def test_a_callback_may_say_that_an_audit_is_not_to_run_it() -> None:
    report = tiny_learner(Prints(), data=tiny_batches(n_batches=2)).audit_syncs()
    assert not report
    assert report.left_out == ("Prints",)


def test_the_default_callbacks_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    learner = Learner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, data=tiny_batches(n_batches=2))
    assert not learner.audit_syncs()
    assert capsys.readouterr().out == (
        "Nothing makes the host wait for the device.\n"
        "Not run: ProgressBar, MetricsPrinter, which print, write files, or wait on purpose.\n"
    )


def test_a_model_that_waits_is_named_as_such() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coeff = torch.nn.Parameter(torch.zeros(()))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if inputs.sum() > 1e9:
                return inputs
            return inputs * self.coeff

    learner = Learner(Model(), torch.nn.functional.mse_loss, data=tiny_batches(n_batches=2), default_callbacks="quiet")
    [found] = learner.audit_syncs()
    assert found.where == ""
    assert str(found).startswith("The model, the loss or the loader waits for bool(tensor):")
    assert found.advice.startswith("Choose on the device")


def test_what_it_cannot_work_with() -> None:
    class Open(Callback):
        def __init__(self) -> None:
            self.numbers: Iterator[int] = (number for number in range(3))

        @on(BatchEnd)
        def nothing(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None: ...

    cases: list[tuple[Any, str]] = [
        (tiny_learner(Open()), r"learner\.audit_syncs\(\) works on copies, and an object .* cannot be copied: TypeErr"),
        (tiny_learner(data=iter(tiny_batches())), "The data for TrainingPhase is an iterator"),
    ]
    for learner, text in cases:
        with pytest.raises(UsageError, match=text):
            learner.audit_syncs()


# --- the synchronizations themselves


ONE, MANY = torch.tensor(1.0), torch.arange(4.0)


class Waited(Exception):
    """Raised where the host would wait for the device."""


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
    """No batch makes the host wait, with all default callbacks, metrics and traces."""
    core = TorchCore("cpu", lag=2, **options)
    traces = Traces({"Norm": lambda view: view.batch.outputs.norm()}, TrainingPhase)
    learner = digits_like(core, callbacks=[Metrics(accuracy), SmoothLoss(), traces])
    console = rich.get_console()
    monkeypatch.setattr(console, "_file", io.StringIO())  # `file` would later restore pytest's stream
    monkeypatch.setattr(console, "_force_terminal", terminal)
    bar = learner.get_callback("ProgressBar")
    assert bar is not None
    untyped(bar).redraw = untyped(bar).report = 0.0  # a bar draws in every batch
    with watching(refuse):
        learner.fit(2)
    expected = digits_like(TorchCore("cpu", **options), callbacks=[Metrics(accuracy), SmoothLoss()])
    expected.fit(2)
    for name in ("metrics_step", "metrics_epoch"):
        late, now = (getattr(each.cbstate, name)[TrainingPhase] for each in (learner, expected))
        assert {key: list(series) for key, series in late.items()} == {key: list(series) for key, series in now.items()}
    assert len(learner.cbstate.tracehistory[TrainingPhase]["Norm"]) == 18


def test_a_loop_that_does_wait_is_caught() -> None:
    """Proves that the test of the default loop can fail."""
    learner = digits_like(TorchCore("cpu", lag=0), default_callbacks="quiet")
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
    learner.fit(1)  # makes the optimizer's state and loads the kernels
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
