"""`Learner.audit_syncs`: who makes the host wait, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    EpochEnd,
    Learner,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.testing import tiny_batches, tiny_learner


class Printer(Callback):
    """Reads a number in every batch."""

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
    """Works on the device only."""

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
    """Says that an audit is not to run it."""

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
        "Not run: ProgressBar, MetricsPrinter, which print or write files.\n"
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
        (tiny_learner(Open()), "The audit works on copies, and something cannot be copied: TypeError"),
        (tiny_learner(data=iter(tiny_batches())), "The data for TrainingPhase is an iterator"),
    ]
    for learner, text in cases:
        with pytest.raises(UsageError, match=text):
            learner.audit_syncs()
