"""Accumulation groups: when an update is due, how a short group is scaled, and when gradients are set to zero.

The first part tests the groups alone; the second trains a learner, in which every group becomes an update unless rule
16 discards it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFittingException,
    EpochEnd,
    Event,
    Learner,
    LearnerView,
    Phase,
    Read,
    StepContext,
    TorchCore,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import EMA, GradNorm, LearningRate, LogHistograms, Scheduler, constant
from flowtrain.core.accumulation import Groups
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_batches, tiny_learner

Params = dict[str, nn.Parameter]


def groups_of(size: int, *names: str) -> tuple[Groups, Params]:
    """Return the accumulation groups of one optimizer for each name, each with one parameter."""
    params = {name: nn.Parameter(torch.ones(1)) for name in names}
    return Groups({name: torch.optim.SGD([param], lr=1.0) for name, param in params.items()}, size), params


def backward(params: Params) -> None:
    for param in params.values():
        param.grad = torch.ones(1) if param.grad is None else param.grad + 1


def grads(params: Params) -> list[float | None]:
    return [None if param.grad is None else param.grad.item() for param in params.values()]


@given(size=st.integers(1, 6), total=st.integers(1, 20))
def test_every_group_is_full_but_the_last(size: int, total: int) -> None:
    """Each update uses the full mean gradient of its own group, even if the last group is shorter."""
    groups, params = groups_of(size, "")
    updates = []
    for number in range(1, total + 1):
        groups.last_batch = number == total
        groups.begin()
        backward(params)
        names = groups.due()
        if names:
            [gradient] = grads(params)
            updates.append((number, gradient, groups.share("")))
            groups.end(names)
        assert groups.open == (not names)
    whole, rest = divmod(total, size)
    expected = [(size * (each + 1), float(size), 1.0) for each in range(whole)]
    assert updates == [*expected, *([(total, float(rest), size / rest)] if rest else [])]


def test_a_group_of_each_optimizer() -> None:
    groups, params = groups_of(2, "gen", "disc")
    groups.begin()
    backward(params)
    assert groups.due("disc") == []
    groups.begin()  # neither optimizer begins a new group here: its gradients add up
    backward(params)
    assert grads(params) == [2.0, 2.0]
    assert groups.due() == ["disc"]
    groups.end(["disc"])
    assert groups.open
    groups.begin()
    assert grads(params) == [2.0, None]


def test_spent_gradients_are_dropped_once() -> None:
    """A second backward pass in a batch must not add to gradients that the optimizer has already used."""
    groups, params = groups_of(1, "gen", "disc")
    groups.begin()
    backward(params)
    groups.end(groups.due("disc"))
    groups.drop_spent()
    assert grads(params) == [1.0, None]
    backward(params)
    groups.drop_spent()
    assert grads(params) == [2.0, 1.0]


@pytest.mark.parametrize("before", [1, 2])
def test_what_is_discarded_counts_no_more(before: int) -> None:
    groups, params = groups_of(3, "")
    for _ in range(before):
        groups.begin()
        backward(params)
        assert groups.due() == []
    groups.discard()
    assert not groups.open
    assert grads(params) == [None]
    for due in ([], [], [""]):
        groups.begin()
        backward(params)
        assert groups.due() == due
    assert grads(params) == [3.0]


def test_groups_that_wait_are_given_as_they_are_updated() -> None:
    groups, _ = groups_of(3, "gen", "disc")
    assert groups.unfilled == []
    groups.begin()
    groups.due()
    assert groups.unfilled == [["gen", "disc"]]
    groups.begin()
    groups.due("disc")
    groups.due("gen")
    assert groups.unfilled == [["disc"], ["gen"]]
    other, _ = groups_of(3, "gen", "disc")
    other.load_state_dict(groups.state_dict())
    assert other.unfilled == [["disc"], ["gen"]]
    groups.end(groups.due("disc"))
    assert groups.unfilled == [["gen"]]
    groups.discard()
    assert groups.unfilled == []


# --- a group whose last batch was cancelled


class Script(Callback):
    """Raises at some events, given by type and batch number from 1; logs each event with the values that it shows."""

    def __init__(self, *raises: tuple[type[Event], int, type[Exception]]) -> None:
        self.raises = raises
        self.batch = 0
        self.log: list[str] = []
        self.seen: list[tuple[bool, Any, Any]] = []

    def state_access(self) -> Access:
        return {"batch": Read()}

    @on(Event, AbstractTrainingPhase)
    def follow(self, event: Event, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        self.batch += isinstance(event, BatchBegin)
        self.log.append(type(event).__name__)
        if isinstance(event, UpdateBegin):
            self.seen.append((event.in_batch, learner.batch.loss.requires_grad, learner.batch.grads["coeff"].item()))
        for event_type, number, exception in self.raises:
            if type(event) is event_type and self.batch == number:
                raise exception(f"{event_type.__name__} {number}")


def by_hand(groups: list[list[int]], clip: float | None = None) -> float:
    """Train the tiny model with SGD on the mean gradient of each group; a group is a list of batch numbers from 1."""
    data, coeff = tiny_batches(), torch.zeros((), requires_grad=True)
    for group in groups:
        for number in group:
            x, y = data[number - 1]
            (nn.functional.mse_loss(coeff * x, y) / len(group)).backward()
        assert coeff.grad is not None
        if clip is not None:
            coeff.grad.clamp_(-clip, clip)
        with torch.no_grad():
            coeff -= 0.1 * coeff.grad
        coeff.grad = None
    return coeff.item()


def learner_of(*callbacks: Callback, n_batches: int = 8, accumulate: int = 4, **core: Any) -> Learner:
    made = TorchCore("cpu", accumulate=accumulate, **core)
    return tiny_learner(*callbacks, data=tiny_batches(n_batches=n_batches), core=made)


def test_the_last_batch_is_cancelled_and_its_group_is_not_lost() -> None:
    """Rule 16: the update, with its two events, follows the cancelled batch and shows the last completed batch."""
    script = Script((BatchBegin, 8, CancelBatchException))
    learner = learner_of(script)
    learner.fit(1)
    assert learner.model.coeff.item() == pytest.approx(by_hand([[1, 2, 3, 4], [5, 6, 7]]))
    history = learner.cbstate.history[TrainingPhase]
    assert (history.steps, history.updates) == (7, 2)
    assert script.log[-5:] == ["BatchBegin", "BatchCancelled", "UpdateBegin", "UpdateEnd", "EpochEnd"]
    assert [seen[:2] for seen in script.seen] == [(True, False), (False, False)]
    x, y = tiny_batches()[6]
    assert torch.equal(learner.batch.inputs, x)
    assert torch.equal(learner.batch.targets, y)


def test_epochs_that_are_cancelled_train() -> None:
    """Five epochs of three completed batches give five updates in groups of four, each with the mean of three."""
    script = Script(*((BatchEnd, number, CancelEpochException) for number in range(3, 16, 3)))
    learner = learner_of(script)
    learner.fit(5)
    assert learner.model.coeff.item() == pytest.approx(by_hand([[1, 2, 3]] * 5))
    assert learner.cbstate.history[TrainingPhase].updates == 5
    assert script.log[-4:] == ["BatchEnd", "UpdateBegin", "UpdateEnd", "EpochEnd"]


def test_a_fit_that_is_cancelled_keeps_what_it_has_seen() -> None:
    script = Script((BatchEnd, 6, CancelFittingException))
    learner = learner_of(script)
    learner.fit(2)
    assert str(learner.stopped) == "BatchEnd 6"
    assert learner.model.coeff.item() == pytest.approx(by_hand([[1, 2, 3, 4], [5, 6]]))
    assert learner.cbstate.history[TrainingPhase].updates == 2
    assert script.log[-4:] == ["BatchEnd", "UpdateBegin", "UpdateEnd", "EpochCancelled"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_an_error_or_interrupt_makes_no_update(failure: Any) -> None:
    learner = learner_of(Script((BatchEnd, 6, failure)))
    with pytest.raises(failure):
        learner.fit(1)
    assert learner.model.coeff.item() == pytest.approx(by_hand([[1, 2, 3, 4]]))
    assert learner.model.coeff.grad is None


@pytest.mark.parametrize("cancel", [CancelBatchException, CancelEpochException, CancelFittingException, ValueError])
@pytest.mark.parametrize(("event", "groups"), [(UpdateBegin, [[1, 2, 3, 4]]), (UpdateEnd, [[1, 2, 3, 4], [5, 6, 7]])])
def test_a_cancel_of_the_update_of_a_group_whose_last_batch_was_cancelled(
    cancel: type[Exception], event: type[Event], groups: list[list[int]]
) -> None:
    """Rule 16: a cancel at the `UpdateBegin` of that late update discards the gradients; the epoch is closed once."""
    script = Script((BatchBegin, 8, CancelBatchException), (event, 8, cancel))
    learner = learner_of(script)
    if issubclass(cancel, CancelException):
        learner.fit(1)
    else:
        with pytest.raises(ValueError, match="8") as raised:
            learner.fit(1)
        assert any("epoch 1, batch 8" in note for note in raised.value.__notes__), raised.value.__notes__
    assert isinstance(learner.stopped, cancel) == (cancel in (CancelFittingException, ValueError))
    assert learner.model.coeff.item() == pytest.approx(by_hand(groups))
    assert learner.model.coeff.grad is None
    closes = issubclass(cancel, (CancelBatchException, CancelEpochException))
    assert script.log[-1] == ("EpochEnd" if closes else "EpochCancelled")
    assert script.log.count("EpochEnd") + script.log.count("EpochCancelled") == 1
    assert script.log.count("BatchCancelled") == 1
    before = learner.model.coeff.item()
    script.raises = ()
    learner.fit(1)  # the learner can train again, without the discarded gradients
    assert learner.model.coeff.item() != before


@pytest.mark.parametrize("validate_every", [None, 6, 3])
def test_a_fit_by_steps_that_ends_in_a_group(validate_every: int | None) -> None:
    for cancelled in (False, True):
        learner = learner_of(*([Script((BatchBegin, 6, CancelBatchException))] if cancelled else []))
        learner.fit(steps=6, validate_every=validate_every)
        if validate_every == 3:
            groups = [[1, 2, 3], [4, 5] if cancelled else [4, 5, 6]]
        else:
            groups = [[1, 2, 3, 4], [5] if cancelled else [5, 6]]
        assert learner.model.coeff.item() == pytest.approx(by_hand(groups))


@pytest.mark.parametrize("options", [{"clip_grad_value": 0.5}, {"clip_grad_norm": 0.5}], ids=str)
def test_an_update_after_a_cancelled_last_batch_is_clipped(options: dict[str, Any]) -> None:
    norms = GradNorm(layers=True)
    learner = learner_of(norms, Script((BatchBegin, 8, CancelBatchException)), **options)
    learner.fit(1)
    assert learner.model.coeff.item() == pytest.approx(by_hand([[1, 2, 3, 4], [5, 6, 7]], clip=0.5))
    for series in learner.cbstate.tracehistory[TrainingPhase].values():
        assert [step for step, _ in series] == [4, 7], "the steps are those of the last completed batches"
        assert all(value > 0.5 for _, value in series), "before clipping"


def test_an_update_after_a_cancelled_last_batch_is_unscaled() -> None:
    def coeff(precision: Any) -> float:
        learner = learner_of(Script((BatchBegin, 8, CancelBatchException)), precision=precision)
        learner.fit(3)
        if precision == "fp16":
            assert learner.core.skipped == 0
        return float(learner.model.coeff.item())

    assert coeff("fp16") == pytest.approx(coeff("fp32"), rel=1e-2)


def test_callbacks_see_the_update_of_a_group_whose_last_batch_was_cancelled(tmp_path: Path) -> None:
    """EMA averages the weights after it, schedules count it, and histograms and rates name the last completed batch."""
    ema, rate = EMA(0.5), Scheduler({LearningRate: constant(0.1)})
    histograms = LogHistograms(JsonlBackend(tmp_path / "log.jsonl"), every=1)
    script = Script((BatchBegin, 7, CancelBatchException), (BatchBegin, 8, CancelBatchException))
    learner = learner_of(ema, rate, histograms, script)
    learner.fit(1)
    first, second = by_hand([[1, 2, 3, 4]]), by_hand([[1, 2, 3, 4], [5, 6]])
    assert ema.averages["coeff"].item() == pytest.approx((first + second) / 2)
    assert rate.updates == len(learner.cbstate.hyperparams["LearningRate"]) == 2


class Pair(AbstractTrainingPhase):
    """Trains two models, each with its own loss and update."""

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self, x=raw) as batch:
            for name in ("disc", "gen"):
                learner.backward(self, (learner.model[name](batch.x) ** 2).mean(), name)
                learner.update(self, name)


class Together(Pair):
    """Trains two models with one update."""

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self, x=raw) as batch:
            losses = [(learner.model[name](batch.x) ** 2).mean() for name in ("disc", "gen")]
            learner.backward(self, losses[0] + losses[1])
            learner.update(self)


@pytest.mark.parametrize("phase", [Pair, Together])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_several_optimizers_update_after_a_cancelled_last_batch(phase: type[Phase], precision: Any) -> None:
    """An epoch whose last batch is cancelled ends with the weights of an epoch without that batch."""

    def run(cancelled: bool) -> tuple[Learner, list[str]]:
        torch.manual_seed(0)
        models = {name: nn.Linear(3, 1) for name in ("gen", "disc")}
        data = [torch.full((2, 3), 0.1 * number) for number in range(1, 8)]

        class Cancel(Callback):
            def __init__(self) -> None:
                self.log: list[str] = []

            @on(Event, AbstractTrainingPhase)
            def follow(self, event: Event, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
                self.log.append(type(event).__name__)
                if cancelled and isinstance(event, BatchBegin) and self.log.count("BatchBegin") == 7:
                    raise CancelBatchException("the last one")

        sgd, cancel = partial(torch.optim.SGD, lr=0.1), Cancel()
        core = TorchCore("cpu", accumulate=4, precision=precision, clip_grad_norm=0.1)
        optimizers = dict.fromkeys(models, sgd)
        learner = Learner(
            models, nn.functional.mse_loss, data={phase: data if cancelled else data[:6]}, optimizer=optimizers,
            core=core, callbacks=[cancel], default_callbacks="quiet",
        )  # fmt: skip
        learner.fit(1)
        return learner, [each for each in cancel.log if each.startswith("Update")]

    (one, events), (other, same_events) = run(True), run(False)
    for name, value in one.model.gen.state_dict().items():
        assert torch.equal(value, other.model.gen.state_dict()[name])
    for name, value in one.model.disc.state_dict().items():
        assert torch.equal(value, other.model.disc.state_dict()[name])
    assert events == same_events == ["UpdateBegin", "UpdateEnd"] * (4 if phase is Pair else 2)
    assert one.cbstate.history[phase].updates == other.cbstate.history[phase].updates


def test_validation_between_direct_steps_updates_nothing() -> None:
    learner = tiny_learner(data=(tiny_batches(), tiny_batches(n_batches=1)), core=TorchCore("cpu", accumulate=2))
    data = tiny_batches()
    learner.step(TrainingPhase, data[0])
    learner.validate()
    assert learner.model.coeff.item() == 0.0
    learner.step(TrainingPhase, data[1])
    assert learner.model.coeff.item() == pytest.approx(by_hand([[1, 2]]))


# --- resuming within such a group


class Ask(Callback):
    """Requests a checkpoint at an event of a batch, counted from 1."""

    def __init__(self, path: Path, event_type: type[Event], number: int) -> None:
        self.path, self.wanted, self.batch = path, (event_type, number), 0

    @on(Event, TrainingPhase)
    def ask(self, event: Event, phase: TrainingPhase, learner: LearnerView) -> None:
        self.batch += isinstance(event, BatchBegin)
        if (type(event), self.batch) == self.wanted:
            learner.request_checkpoint(self.path)


class Cancel(Callback):
    """Cancels the last batch of each epoch of eight, however often training was resumed."""

    def state_access(self) -> Access:
        return {"cbstate.history": Read()}

    @on(BatchBegin, TrainingPhase)
    def cancel(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        if learner.cbstate.history[phase].steps_epoch == 7:
            raise CancelBatchException("the eighth")


@pytest.mark.parametrize(
    ("event", "number"),
    [(BatchEnd, 5), (BatchEnd, 7), (BatchCancelled, 8), (UpdateBegin, 8), (UpdateEnd, 8), (EpochEnd, 8), (BatchEnd, 9)],
)
@pytest.mark.parametrize("how", [{"epochs": 3}, {"steps": 24}, {"steps": 24, "validate_every": 8}], ids=str)
def test_a_resume_in_an_open_group_is_exact(
    event: type[Event], number: int, how: dict[str, Any], tmp_path: Path
) -> None:
    """Rule 28, also if only the update of the epoch is left to do, or if it was just made."""

    def run(*extra: Callback, **options: Any) -> tuple[Any, ...]:
        ema = EMA(0.9)
        data = (tiny_batches(n_batches=8), tiny_batches(n_batches=2))
        learner = tiny_learner(Cancel(), ema, GradNorm(), *extra, data=data, core=TorchCore("cpu", accumulate=4))
        learner.fit(**how, **options)
        history, norms = learner.cbstate.history, learner.cbstate.tracehistory[TrainingPhase]["GradNorm"]
        losses = learner.cbstate.metrics_epoch[ValidationPhase]["Loss"]
        counts = history[TrainingPhase], history[ValidationPhase]
        return learner.model.coeff.item(), ema.averages["coeff"].item(), counts, list(norms), list(losses)

    path = tmp_path / "one.ckpt"
    whole = run(Ask(path, event, number))
    assert run(resume=path) == whole
    assert whole[2][0].updates == 6


def test_a_backward_pass_for_one_optimizer_leaves_the_others_gradients_alone() -> None:
    """With accumulation the group of the other model may be open, and must not include this loss."""

    class Through(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, x=raw) as batch:
                learner.backward(self, learner.model.disc(batch.x).sum(), "disc")
                learner.update(self, "disc")
                faked = learner.model.gen(batch.x)
                learner.backward(self, learner.model.disc(faked).sum(), "gen")
                learner.update(self, "gen")

    def models() -> dict[str, torch.nn.Linear]:
        torch.manual_seed(0)
        return {"gen": torch.nn.Linear(1, 1), "disc": torch.nn.Linear(1, 1)}

    data = [torch.full((2, 1), float(number)) for number in range(4)]
    sgd = partial(torch.optim.SGD, lr=0.1)
    learner = Learner(
        models(),
        torch.nn.functional.mse_loss,
        data={Through: data},
        optimizer={"gen": sgd, "disc": sgd},
        core=TorchCore(accumulate=2, device="cpu"),
        default_callbacks=False,
    )
    learner.fit(1)
    by_hand = models()
    optimizers = {name: sgd(model.parameters()) for name, model in by_hand.items()}
    for group in (data[:2], data[2:]):
        for x in group:
            for name in ("disc", "gen"):
                loss = by_hand["disc"](x if name == "disc" else by_hand["gen"](x)).sum()
                (loss / 2).backward(inputs=list(by_hand[name].parameters()))
                if x is group[1]:
                    optimizers[name].step()
                    optimizers[name].zero_grad()
    for name, model in by_hand.items():
        for mine, theirs in zip(learner.model[name].parameters(), model.parameters(), strict=True):
            assert torch.equal(mine, theirs)
