"""Tracked values: their means, where they are recorded and shown, and the errors for values that are missing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import (
    AbstractTrainingPhase,
    BatchEnd,
    Callback,
    CancelBatchException,
    LearnerView,
    LossBegin,
    MissingStateError,
    Phase,
    Read,
    StepContext,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import (
    Checkpointer,
    CustomCallback,
    EarlyStopping,
    LogMetrics,
    Metric,
    Metrics,
    MetricsPrinter,
    Track,
)
from flowtrain.logging import JsonlBackend
from flowtrain.testing import TinyModel, tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.console import printed
from tests.support.fired import Raise
from tests.support.logs import log_records
from tests.support.untyped import untyped

EXECUTORS: list[Callable[[], Any]] = [lambda: "serial", lambda: DaskExecutor(parallel="always")]


class Kl(Callback):
    """Writes the mean of the inputs into the batch, as a training step would write a part of its loss."""

    def __init__(self, entry: str = "kl", phase: type[Phase] = TrainingPhase) -> None:
        self.entry, self.phase = entry, phase

    def state_access(self) -> Any:
        return {"batch.inputs": Read(), f"batch.{self.entry}": Write()}

    @on(BatchEnd, "phase")
    def write(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        setattr(learner.batch, self.entry, learner.batch.inputs.mean().requires_grad_())


def uneven() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.arange(10.0).reshape(10, 1) / 10
    return [(part, 3 * part) for part in x.split([6, 3, 1])]


@pytest.mark.parametrize("executor", EXECUTORS, ids=["serial", "dask"])
@pytest.mark.parametrize("strict", [False, True])
def test_the_mean_of_an_epoch_is_weighted_by_the_size_of_batches(executor: Callable[[], Any], strict: bool) -> None:
    gap = Track(
        lambda batch: (batch.outputs - batch.targets).abs().max(),
        name="Gap",
        access={"batch.outputs": Read(), "batch.targets": Read()},
    )
    with tiny_learner(Metrics("batch.kl", gap), Kl(), data=uneven(), executor=executor(), strict=strict) as learner:
        history = learner.fit(2)
    series = history[TrainingPhase]
    assert series["Kl"].values == [pytest.approx(0.45), pytest.approx(0.45)]
    each = learner.cbstate.metrics_step[TrainingPhase]
    assert each["Kl"].values == [pytest.approx(value) for value in (0.25, 0.7, 0.9)] * 2
    assert each["Kl"].steps == [1, 2, 3, 4, 5, 6]
    gaps = each["Gap"].values[:3]
    assert gaps[0] == pytest.approx(1.5)
    assert series["Gap"].values[0] == pytest.approx((6 * gaps[0] + 3 * gaps[1] + gaps[2]) / 10)


def test_the_writer_goes_first_and_the_graph_says_why() -> None:
    learner = tiny_learner(Metrics("batch.kl"), Kl())
    plan = "\n".join(learner.callbacks.plan(BatchEnd, TrainingPhase).explain())
    assert "Kl writes batch.kl, Metrics reads it" in plan


def test_both_losses_of_a_gan() -> None:
    class GANPhase(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw) as batch:
                batch.critic_loss = learner.model.critic(batch.inputs).square().mean()
                learner.backward(self, batch.critic_loss, "critic")
                learner.update(self, "critic")
                batch.generator_loss = (learner.model.generator(batch.inputs) - 1).square().mean()
                learner.backward(self, batch.generator_loss, "generator")
                learner.update(self, "generator")

    models = {"critic": nn.Linear(1, 1), "generator": nn.Linear(1, 1)}
    sgd = partial(torch.optim.SGD, lr=0.1)
    learner = tiny_learner(
        Metrics("batch.critic_loss", "batch.generator_loss", "batch.grad_norm"),
        model=models,
        optimizer=dict.fromkeys(models, sgd),
        data={GANPhase: [torch.ones(4, 1), 2 * torch.ones(2, 1)]},
    )
    history = learner.fit(1)
    steps = learner.cbstate.metrics_step[GANPhase]
    for name in ("CriticLoss", "GeneratorLoss"):
        first, second = steps[name].values
        assert history[GANPhase][name].values == [pytest.approx((4 * first + 2 * second) / 6)]
    assert list(history[GANPhase]) == ["CriticLoss", "GeneratorLoss", "GradNorm"]


def test_the_norm_of_the_gradients() -> None:
    """It is computed because it is declared; a batch that only accumulates has none and is left out."""
    norms: list[float] = []
    look = CustomCallback(
        lambda learner: norms.append(torch.stack([g.norm() for g in learner.batch.grads.values()]).norm().item()),
        BatchEnd,
        TrainingPhase,
        {"batch.grads": Read()},
    )
    learner = tiny_learner(Metrics("batch.grad_norm"), look, n_batches=4)
    assert learner.fit(1)[TrainingPhase]["GradNorm"].values == [pytest.approx(sum(norms) / 4)]
    assert "GradNorm" not in learner.history[ValidationPhase]
    grouped = tiny_learner(Metrics("batch.grad_norm"), core=TorchCore(device="cpu", accumulate=2), n_batches=4)
    grouped.fit(1)
    assert grouped.cbstate.metrics_step[TrainingPhase]["GradNorm"].steps == [2, 4]
    # The update of a group that is not full follows the last batch if that is cancelled, and no batch has the norm.
    core = TorchCore(device="cpu", accumulate=8)
    long = tiny_learner(Metrics("batch.grad_norm"), Raise(LossBegin, CancelBatchException(), 4), core=core, n_batches=4)
    assert list(long.fit(1)[TrainingPhase]) == ["Loss"]
    assert long.cbstate.history[TrainingPhase].updates == 1


def test_a_function_of_the_batch_may_read_the_norm_of_the_gradients() -> None:
    """Rule 4: a declaration of the whole batch covers the norm, so the norm is computed for it."""
    by_path = tiny_learner(Metrics("batch.grad_norm"), n_batches=4).fit(2)
    by_function = tiny_learner(Metrics(Track(lambda batch: batch.grad_norm, "Norm")), n_batches=4).fit(2)
    assert by_function[TrainingPhase]["Norm"].values == by_path[TrainingPhase]["GradNorm"].values
    assert len(by_path[TrainingPhase]["GradNorm"].values) == 2


def test_a_function_may_return_several_numbers_or_none() -> None:
    def parts(batch: Any) -> Any:
        assert not torch.is_grad_enabled()
        if batch.kl is None:
            return None
        return {"double": 2 * batch.kl, "plain": batch.kl}

    learner = tiny_learner(Metrics(Track(parts)), Kl(), data=(uneven(), uneven()))
    history = learner.fit(1)
    assert {name: series.values for name, series in history[TrainingPhase].items() if name != "Loss"} == {
        "Parts.double": [pytest.approx(0.9)],
        "Parts.plain": [pytest.approx(0.45)],
    }
    assert list(history[ValidationPhase]) == ["Loss"]


def test_a_weight_of_its_own() -> None:
    track = Track("batch.kl", weight=lambda outputs, targets: 1 if len(targets) == 1 else 0)
    learner = tiny_learner(Metrics(track), Kl(), data=uneven())
    assert learner.fit(1)[TrainingPhase]["Kl"].values == [pytest.approx(0.9)]


def test_it_is_printed_logged_and_watched(tmp_path: Path) -> None:
    stop = EarlyStopping(patience=1, monitor="Kl", phase=TrainingPhase, mode="min")
    lines = JsonlBackend(tmp_path / "log.jsonl")
    with (
        printed(80) as output,
        tiny_learner(Metrics("batch.kl"), Kl(), MetricsPrinter(), LogMetrics(lines), stop, data=uneven()) as learner,
    ):
        learner.fit(5)
    assert ["  Kl 0.45" in line for line in output.getvalue().splitlines()[:3]] == [True, True, False]
    assert "Kl is 0.45" in str(learner.stopped)
    logged = [each for each in log_records(tmp_path / "log.jsonl") if each["name"] == "Kl"]
    assert [each["group"] for each in logged].count("Epoch/TrainingPhase") == 2
    assert [each["group"] for each in logged].count("Step/TrainingPhase") == 6


def test_an_epoch_that_resumes_has_the_same_mean(tmp_path: Path) -> None:
    class Stop(Callback):
        stop_at = 2

        @on(BatchEnd, TrainingPhase)
        def end(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            self.stop_at -= 1
            if not self.stop_at:
                raise KeyboardInterrupt

    def make(*more: Callback) -> Any:
        saves = Checkpointer(tmp_path, every_steps=1, phase=TrainingPhase, monitor=None)
        return tiny_learner(Metrics("batch.kl"), Kl(), saves, *more, data=uneven())

    with pytest.raises(KeyboardInterrupt):
        make(Stop()).fit(1)
    assert make().fit(1, resume=tmp_path)[TrainingPhase]["Kl"].values == [pytest.approx(0.45)]


def test_a_value_that_no_batch_has() -> None:
    learner = tiny_learner(Metrics("batch.kll"), Kl())
    assert list(learner.validate()) == ["Loss"]  # an evaluation that lacks the value may come first
    with pytest.raises(MissingStateError) as raised:
        learner.fit(1)
    assert str(raised.value).splitlines()[0] == (
        "Metrics tracks batch.kll, and no batch of this epoch of TrainingPhase had it when it ended. The step of a "
        "phase or a callback puts it there, as batch.kl = ...; if another phase has it, write Track('batch.kll', "
        "phase=OtherPhase)."
    )
    named = tiny_learner(Metrics(Track("batch.kl", phase=ValidationPhase)), Kl())
    with pytest.raises(MissingStateError, match="no batch of this epoch of ValidationPhase had it"):
        named.fit(1)
    with pytest.raises(MissingStateError, match=r"tracks Nothing, .* write Track\(f, phase=OtherPhase\)"):
        tiny_learner(Metrics(Track(lambda batch: None, name="Nothing"))).fit(1)


def test_values_that_only_evaluations_have() -> None:
    track = Track("batch.kl", phase=ValidationPhase)
    history = tiny_learner(Metrics(track), Kl(phase=ValidationPhase)).fit(1)
    assert [list(series) for series in history.values()] == [["Loss"], ["Loss", "Kl"]]


def test_an_epoch_without_a_complete_batch_is_no_mistake() -> None:
    def cancel(learner: LearnerView) -> None:
        raise CancelBatchException

    learner = tiny_learner(Metrics("batch.kl"), Kl(), CustomCallback(cancel, LossBegin, TrainingPhase))
    assert list(learner.fit(1)) == [ValidationPhase()]


def test_an_error_of_the_function_says_where() -> None:
    learner = tiny_learner(Metrics(Track(lambda batch: batch.grads["coeff"].norm(), name="Norm")), n_batches=1)
    with pytest.raises(TypeError) as raised:
        learner.fit(1)
    assert raised.value.__notes__[0] == (
        "raised by Track(Norm) in ValidationPhase, where an entry that the batch lacks is None; for one kind of epoch "
        "write Track(f, phase=TrainingPhase)"
    )
    with pytest.raises(UsageError, match=r"The metric Norm returned a tensor of shape \(8, 1\)"):
        tiny_learner(Metrics(Track(lambda batch: batch.inputs, name="Norm"))).fit(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Track("kl"), "Track('kl'): a path is that of an entry of the batch, such as 'batch.kl'. For a part"),
        (lambda: Track("batch.outputs.kl"), "Track('batch.outputs.kl'): a path is that of an entry of the batch"),
        (lambda: Track("batch._kl"), "Track('batch._kl'): a path is that of an entry of the batch, such as 'batch.kl'"),
        (lambda: Track(""), "Track('') takes the path of an entry, such as 'batch.kl', or a function of the batch."),
        (
            lambda: Track(untyped(3)),
            "Track(3) takes the path of an entry, such as 'batch.kl', or a function of the batch.",
        ),
        (
            lambda: Track(untyped(TinyModel)),
            "Track(<class 'flowtrain.testing.tiny.TinyModel'>) takes the path of an entry",
        ),
        (
            lambda: Track("batch.kl", access={"batch.kl": Read()}),
            "Track('batch.kl', access=...): the path says what is read. Leave access out.",
        ),
        (
            lambda: Track(len, access={"batch.kl": Write()}),
            "Track(access={'batch.kl': Write()}): the function gets the batch, and reads it. Write access=",
        ),
        (lambda: Track(len, access={"cbstate.a": Read()}), "Track(access={'cbstate.a': Read()}): the function gets"),
        (lambda: Track(lambda batch: 1), "The metric <function <lambda>.<locals>.<lambda> at"),
        (lambda: Metrics("batch.kl", Track("batch.kl")), "Two metrics are called 'Kl'. Give one another name"),
        (lambda: Metrics("batch.loss"), "Two metrics are called 'Loss'."),
        (lambda: Metrics("accuracy"), "'accuracy' is no metric: a metric is a function of (outputs, targets). Write"),
    ],
)  # fmt: skip
def test_mistakes(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        make()
    text = str(raised.value)
    assert text.startswith(message) or ("<lambda>" in message and "needs a name without dots" in text)


def test_names_and_texts() -> None:
    assert repr(Metrics("batch.grad_norm", Track(len)).metrics) == "(Track(GradNorm), Track(Len))"
    assert (Track("batch.kl", mode="min").modes, Metric(len).of_batch) == ({"Kl": "min"}, False)
