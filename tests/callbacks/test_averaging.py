"""The callbacks that average weights: when the model has the averages, and which weights a checkpoint holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flowtrain import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Access,
    BatchCancelled,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    CheckpointError,
    EpochBegin,
    EpochEnd,
    Event,
    Executor,
    Learner,
    LearnerView,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UpdateEnd,
    ValidationPhase,
    load_weights,
    on,
)
from flowtrain.callback.phases import StepContext
from flowtrain.callbacks import EMA, SWA, Checkpointer, throttle
from flowtrain.callbacks.averaging import Averaging
from flowtrain.testing import TinyModel, assert_equivalent, tiny_batches, tiny_learner
from tests.support.models import mixed_model
from tests.support.scores import scored
from tests.support.untyped import untyped

SGD = partial(torch.optim.SGD, lr=0.1)
AVERAGES: dict[str, Callable[[], Averaging]] = {"EMA": lambda: EMA(0.5), "SWA": lambda: SWA(start_update=1)}


class Seen(Callback):
    """Keeps the value of the model's parameter that a reader sees at every event."""

    def __init__(self) -> None:
        self.values: list[tuple[str, float]] = []

    def state_access(self) -> Access:
        return {"model": Read()}

    def look(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.values.append((f"{type(event).__name__} {phase!r}", learner.model.coeff.item()))

    @on(EpochBegin)
    def begin(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        self.look(event, phase, learner)

    @on(BatchEnd)
    def batch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.look(event, phase, learner)

    @on(EpochEnd)
    def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        self.look(event, phase, learner)


@pytest.mark.parametrize("kind", AVERAGES)
def test_validation_uses_the_averages_and_nothing_else_does(kind: str) -> None:
    mean, seen = AVERAGES[kind](), Seen()
    learner = tiny_learner(seen, mean, n_batches=2)
    learner.fit(1)
    plain = tiny_learner(n_batches=2)
    plain.epoch(TrainingPhase)
    weight = plain.model.coeff.item()
    average = mean.averages["coeff"].item()
    assert weight != average
    assert [name for name, value in seen.values if value == average] == [
        "EpochBegin ValidationPhase",
        "BatchEnd ValidationPhase",
        "BatchEnd ValidationPhase",
    ]
    assert seen.values[-1] == ("EpochEnd ValidationPhase", weight)
    assert learner.model.coeff.item() == weight
    losses = [torch.nn.functional.mse_loss(average * x, y).item() for x, y in tiny_batches(n_batches=2)]
    assert learner.cbstate.metrics_epoch[ValidationPhase]["Loss"].last()[1] == pytest.approx(sum(losses) / 2)


class Fails(Callback):
    """Raises at one event of validation."""

    def __init__(self, where: str, error: BaseException) -> None:
        self.where = where
        self.error = error

    def state_access(self) -> Access:
        return {"model": Read()}

    def fail(self, where: str) -> None:
        if where == self.where:
            raise self.error

    @on(EpochBegin, ValidationPhase)
    def begin(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        self.fail("begin")

    @on(BatchEnd, ValidationPhase)
    def batch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.fail("batch")

    @on(EpochEnd, ValidationPhase)
    def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        self.fail("end")


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("where", ["begin", "batch", "end"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("error", [ValueError, CancelEpochException, CancelFittingException, KeyboardInterrupt])
def test_the_weights_come_back_whatever_fails(where: str, first: bool, error: type[BaseException], kind: str) -> None:
    mean, fails = AVERAGES[kind](), Fails(where, error("on purpose"))
    if first:  # so that it raises before the averages are swapped in or out
        untyped(fails).state_access = dict  # it reads nothing
    learner = tiny_learner(*((fails, mean) if first else (mean, fails)), n_batches=2)
    if issubclass(error, (ValueError, KeyboardInterrupt)):
        with pytest.raises(error):
            learner.fit(1)
    else:
        learner.fit(1)
    plain = tiny_learner(n_batches=2)
    plain.epoch(TrainingPhase)
    assert torch.equal(learner.model.coeff, plain.model.coeff)


def applied_learner(kind: str, folder: Path | None = None) -> tuple[Averaging, Learner]:
    mean = AVERAGES[kind]()
    keep = [] if folder is None else [Checkpointer(folder)]
    learner = tiny_learner(mean, *keep, optimizer=SGD, n_batches=3)
    learner.fit(2)
    return mean, learner


@pytest.mark.parametrize("kind", AVERAGES)
def test_within_applied_the_averages_stay_whatever_evaluates(kind: str) -> None:
    mean, learner = applied_learner(kind)
    trained, expected = learner.model.coeff.item(), mean.averages["coeff"].item()
    assert trained != expected
    with mean.applied():
        for evaluate in (
            lambda: learner.evaluate(tiny_batches()),
            lambda: learner.validate(),
            lambda: learner.predict([x for x, _ in tiny_batches()]),
            lambda: learner.evaluate(tiny_batches()),
        ):
            evaluate()
            assert learner.model.state_dict()["coeff"].item() == expected
        with mean.applied():
            learner.validate()
        assert learner.model.coeff.item() == expected
    assert learner.model.coeff.item() == trained


@pytest.mark.parametrize("kind", AVERAGES)
def test_a_fit_within_applied_is_the_fit(kind: str) -> None:
    mean, learner = applied_learner(kind)
    other, plain = applied_learner(kind)
    plain.fit(2)
    with mean.applied():
        learner.fit(2)
        assert learner.model.coeff.item() == mean.averages["coeff"].item() == other.averages["coeff"].item()
    assert learner.model.coeff.item() == plain.model.coeff.item()


@pytest.mark.parametrize("trains", [False, True])
def test_applied_after_a_load_that_shows_the_averages(trains: bool, tmp_path: Path) -> None:
    mean, learner = applied_learner("EMA", tmp_path)
    learner.load(tmp_path)
    shown = learner.model.coeff.item()
    other, plain = applied_learner("EMA", tmp_path / "plain")
    with mean.applied():
        learner.validate()
        if trains:
            learner.fit(1)
            plain.fit(1)
        assert learner.model.coeff.item() == mean.averages["coeff"].item()
    assert learner.model.coeff.item() == (plain.model.coeff.item() if trains else shown)
    assert mean.averages["coeff"].item() == other.averages["coeff"].item()


def test_the_end_of_the_fit_restores_the_weights_if_the_end_of_the_epoch_could_not() -> None:
    """Rule 15: if an ancestor fails at EpochEnd, EMA is skipped there; its handler of FitEnd puts the weights back."""

    class After(EMA):
        def run_after(self) -> tuple[type[Callback], ...]:
            return (Fails,)

    learner = tiny_learner(Fails("end", ValueError("on purpose")), After(0.5), n_batches=2)
    with pytest.raises(ValueError, match="on purpose"):
        learner.fit(1)
    plain = tiny_learner(n_batches=2)
    plain.epoch(TrainingPhase)
    assert torch.equal(learner.model.coeff, plain.model.coeff)


@pytest.mark.parametrize("kind", AVERAGES)
def test_at_rest_in_the_middle_of_validation(kind: str) -> None:
    """Rule 28: a checkpoint holds the trained weights, even if it is requested while the model has the averages."""
    taken: list[tuple[float, float, float]] = []

    class Takes(Callback):
        @on(BatchEnd, ValidationPhase)
        def take(self, event: BatchEnd, phase: Phase, view: LearnerView) -> None:
            before = learner.model.coeff.item()
            with mean.at_rest():
                resting = learner.model.coeff.item()
            taken.append((before, resting, learner.model.coeff.item()))

    mean = AVERAGES[kind]()
    learner = tiny_learner(Takes(), mean, n_batches=2)
    learner.fit(1)
    weight, average = learner.model.coeff.item(), mean.averages["coeff"].item()
    assert weight != average
    assert taken == [(average, weight, average)] * 2
    with mean.at_rest():
        assert learner.model.coeff.item() == weight
    assert learner.model.coeff.item() == weight


def test_a_state_is_taken_back_in_the_middle_of_validation() -> None:
    ema = EMA(0.5)
    learner = tiny_learner(ema, n_batches=2)
    learner.fit(1)
    weights, state = copy.deepcopy(learner.model.state_dict()), copy.deepcopy(ema.state_dict())

    class Loads(Callback):
        @on(BatchEnd, ValidationPhase)
        def load(self, event: BatchEnd, phase: Phase, view: LearnerView) -> None:
            other.model.load_state_dict(weights)
            fresh.load_state_dict(state)

    fresh = EMA(0.5)
    seen = Seen()
    loads = Loads()
    other = tiny_learner(fresh, loads, seen, n_batches=2, coeff=-1.0)
    other.fit(1)
    assert seen.values[-2][1] == state["averages"]["coeff"].item()
    assert other.model.coeff.item() == weights["coeff"].item()
    other.fit(1)
    assert fresh.averages["coeff"] is not state["averages"]["coeff"]  # averaging continues in a copy


def test_a_checkpoint_that_is_asked_for_in_validation_holds_the_weights_and_a_run_resumed_from_it_is_the_run(
    tmp_path: Path,
) -> None:
    """Rule 28: the model has the averages at the request, and again after the resumed validation epoch has begun."""

    class Asks(Callback):
        seen: float | None = None

        @on(BatchEnd, ValidationPhase, access={"cbstate.history": Read(), "model": Read()})
        def ask(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            if learner.cbstate.history[phase].steps == 3:
                self.seen = learner.model.coeff.item()
                learner.request_checkpoint(tmp_path / "one.ckpt")

    def make() -> tuple[Learner, EMA, Asks]:
        ema, asks = EMA(0.5), Asks()
        return tiny_learner(asks, ema, n_batches=2), ema, asks

    whole, averaged, asks = make()
    whole.fit(2)
    resumed, ema, again = make()
    resumed.fit(2, resume=tmp_path / "one.ckpt")
    saved = torch.load(tmp_path / "one.ckpt", weights_only=True)
    held, average = saved["model"][""]["coeff"], saved["callbacks"]["EMA"]["state"]["averages"]["coeff"]
    assert asks.seen == average.item() != held.item()
    assert held.item() == whole.model.coeff.item() == resumed.model.coeff.item()
    assert torch.equal(ema.averages["coeff"], averaged.averages["coeff"])
    losses = [list(learner.cbstate.metrics_step[ValidationPhase]["Loss"]) for learner in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4
    assert again.seen is None  # the checkpoint was taken before the third batch


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_update_of_a_cancelled_batch_is_taken_in_after_a_resume_too(kind: str, tmp_path: Path) -> None:
    """Rule 28: the update of batch 2 is taken in at the end of batch 3, which makes none."""

    class Cancels(Callback):
        updates = 0
        asked: Path | None = None

        @on(UpdateEnd, access={})
        def cancel(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
            self.updates += 1
            if self.updates == 1 and self.asked:
                raise CancelBatchException

        @on(BatchCancelled, access={})
        def ask(self, event: BatchCancelled, phase: Phase, learner: LearnerView) -> None:
            assert self.asked is not None
            learner.request_checkpoint(self.asked)

    class Taken(Callback):
        def __init__(self) -> None:
            self.values: list[tuple[int, float]] = []

        @on(BatchEnd, TrainingPhase, access={"callbacks": Read()})
        def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            [mean] = [each for each in learner.callbacks if isinstance(each, Averaging)]
            self.values.append((mean.taken, mean.averages["coeff"].item() if mean.averages else 0.0))

        def run_after(self) -> tuple[type[Callback], ...]:
            return (Averaging,)

    def run(asked: Path | None, **resume: Any) -> list[tuple[int, float]]:
        cancels, taken = Cancels(), Taken()
        cancels.asked = asked
        core = TorchCore("cpu", accumulate=2)
        tiny_learner(cancels, AVERAGES[kind](), taken, data=tiny_batches(n_batches=6), core=core).fit(1, **resume)
        return taken.values

    whole = run(tmp_path / "one.ckpt")
    assert [taken for taken, _ in whole] == [0, 1, 2, 2, 3]
    assert run(None, resume=tmp_path / "one.ckpt") == whole[1:]


def validation_loss(model: torch.nn.Module, data: Any) -> float:
    """Return the loss over batches of one size, as a user computes it with a model loaded from a file."""
    was = model.training
    model.eval()
    with torch.no_grad():
        losses = [torch.nn.functional.mse_loss(model(x), y).item() for x, y in data]
    model.train(was)
    return sum(losses) / len(losses)


VALID = tiny_batches(coeff=2.5, n_batches=3)
"""The best coefficient here is passed on the way to 3, so that the best epoch is not the last."""


def judged(folder: Path, *callbacks: Callback, valid: bool = True, **options: Any) -> tuple[EMA, Learner]:
    ema = EMA(0.8)
    data = (tiny_batches(n_batches=6), VALID) if valid else (tiny_batches(n_batches=6),)
    chosen: dict[str, Any] = {"model": mixed_model(), "optimizer": SGD, "data": data, **options}
    return ema, tiny_learner(ema, Checkpointer(folder, weights="safetensors"), *callbacks, **chosen)


def weights_of(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in learner.model.state_dict().items()}


def assert_equal(one: Any, other: Any) -> None:
    assert sorted(one) == sorted(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def best_of(folder: Path) -> Path:
    return folder / (folder / "best").read_text().strip()


@pytest.mark.cpu_only("calls the model with tensors of the CPU")
def test_the_best_checkpoint_holds_what_was_judged(tmp_path: Path) -> None:
    """Torch and safetensors read the averages from it, and so do learners with and without the callback."""
    _, learner = judged(tmp_path)
    learner.fit(6)
    best = min(value for _, value in learner.cbstate.metrics_epoch[ValidationPhase]["Loss"])
    contents = torch.load(best_of(tmp_path), weights_only=True)
    model = mixed_model()
    model.load_state_dict(contents["model"][""])
    assert validation_loss(model, VALID) == pytest.approx(best, rel=1e-6)
    assert_equal(load_file(best_of(tmp_path).with_suffix(".safetensors")), dict(model.state_dict()))
    trained = mixed_model()
    trained.load_state_dict(contents["trained"][""])
    assert validation_loss(trained, VALID) != pytest.approx(best, rel=1e-3), "the trained weights give another loss"
    _, other = judged(tmp_path / "other")
    without = tiny_learner(model=mixed_model(), optimizer=SGD)
    for each in (other, without):
        each.load(tmp_path / "best")
        assert validation_loss(each.model, VALID) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("which", ["best", "epoch-0002.ckpt", "."])
def test_a_fit_resumed_from_it_is_exact(which: str, tmp_path: Path) -> None:
    ema, whole = judged(tmp_path / "whole")
    whole.fit(6)
    again, resumed = judged(tmp_path / "resumed")
    resumed.fit(6, resume=tmp_path / "whole" / which)
    assert_equal(weights_of(resumed), weights_of(whole))
    assert_equal(again.averages, ema.averages)
    assert list(resumed.cbstate.metrics_epoch[ValidationPhase]["Loss"]) == list(
        whole.cbstate.metrics_epoch[ValidationPhase]["Loss"]
    )


@pytest.mark.parametrize("how", ["fit", "epoch", "step"])
def test_what_is_loaded_is_shown_until_training_goes_on(how: str, tmp_path: Path) -> None:
    """After `load` and a validation the model has the averages; training resumes from the trained weights."""
    _, first = judged(tmp_path)
    first.fit(3)
    contents = torch.load(tmp_path / "epoch-0002.ckpt", weights_only=True)
    _, learner = judged(tmp_path / "other")
    learner.load(tmp_path / "epoch-0002.ckpt")
    shown = weights_of(learner)
    assert_equal(shown, contents["model"][""])
    learner.validate()
    assert_equal(weights_of(learner), shown)
    recorded = list(learner.cbstate.metrics_epoch[ValidationPhase]["Loss"])
    assert recorded[-1][1] == pytest.approx(recorded[-2][1])
    plain = tiny_learner(model=mixed_model(), optimizer=SGD, data=(tiny_batches(n_batches=6), VALID))
    plain.model.load_state_dict(contents["trained"][""])
    for each in (learner, plain):
        if how == "fit":
            each.fit(1)
        elif how == "epoch":
            each.epoch(TrainingPhase)
        else:
            each.step(TrainingPhase, tiny_batches()[0])
    assert_equal(weights_of(learner), weights_of(plain))


def test_one_load_after_the_other(tmp_path: Path) -> None:
    """A second `load` replaces the averages of the first, unless it is refused; a file without averages shows none."""
    ema, learner = judged(tmp_path)
    learner.fit(2)
    learner.load(tmp_path)
    shown, before = weights_of(learner), copy.deepcopy(ema.averages)
    torch.save({"format": "something"}, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        learner.load(tmp_path / "bad.ckpt")
    assert_equal(weights_of(learner), shown)
    assert_equal(ema.averages, before)
    plain = tiny_learner(
        Checkpointer(tmp_path / "plain"), model=mixed_model(), optimizer=SGD, data=(tiny_batches(n_batches=6), VALID)
    )
    plain.fit(1)
    learner.load(tmp_path / "plain")
    assert_equal(weights_of(learner), weights_of(plain))
    learner.load(tmp_path)
    learner.remove_callback(EMA)  # the callback holds the trained weights
    learner.fit(1)
    again = tiny_learner(model=mixed_model(), optimizer=SGD, data=(tiny_batches(n_batches=6), VALID))
    again.model.load_state_dict(torch.load(tmp_path / "epoch-0002.ckpt", weights_only=True)["trained"][""])
    again.fit(1)
    assert_equal(weights_of(learner), weights_of(again))


def test_a_checkpoint_after_a_load_that_shows_averages(tmp_path: Path) -> None:
    ema, learner = judged(tmp_path)
    learner.fit(2)
    trained = weights_of(learner)
    learner.load(tmp_path)
    shown = weights_of(learner)

    class Ask(Callback):
        @on(EpochEnd, ValidationPhase)
        def ask(self, event: EpochEnd, phase: ValidationPhase, learner: LearnerView) -> None:
            learner.request_checkpoint(tmp_path / "asked.ckpt")
            learner.request_checkpoint(tmp_path / "judged.ckpt", judged=True)

    learner.add_callback(Ask())
    learner.validate()
    learner.flush()
    assert_equal(weights_of(learner), shown)
    asked, judged_file = (torch.load(tmp_path / name, weights_only=True) for name in ("asked.ckpt", "judged.ckpt"))
    assert_equal(asked["model"][""], trained)
    assert "trained" not in asked
    assert_equal(judged_file["model"][""], shown)
    assert_equal(judged_file["trained"][""], trained)
    with ema.applied():
        assert_equal(weights_of(learner), shown)


def test_without_validation_the_weights_that_are_trained_are_judged(tmp_path: Path) -> None:
    _, learner = judged(tmp_path, valid=False)
    learner.fit(2)
    contents = torch.load(tmp_path / "epoch-0002.ckpt", weights_only=True)
    assert_equal(contents["model"][""], weights_of(learner))
    assert "trained" not in contents
    assert contents["version"] == 1
    learner.load(tmp_path / "best")
    assert_equal(weights_of(learner), contents["model"][""])


def test_one_of_several_models_is_judged_by_its_averages(tmp_path: Path) -> None:
    class Both(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, x=raw[0], y=raw[1]) as batch:
                outputs = sum(learner.model[name](batch.x) for name in ("one", "two"))
                batch.loss = learner.lossfn(outputs, batch.y)
                learner.backward(self, batch.loss)
                learner.update(self)

    class Look(AbstractValidationPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, x=raw[0], y=raw[1]) as batch:
                batch.loss = learner.lossfn(sum(learner.model[name](batch.x) for name in ("one", "two")), batch.y)

    models = {"one": mixed_model(), "two": mixed_model()}
    ema, data = EMA(0.5, model="one"), tiny_batches(n_batches=3)
    learner = tiny_learner(
        ema, Checkpointer(tmp_path), model=models, optimizer=dict.fromkeys(models, SGD), data={Both: data, Look: data}
    )
    learner.fit(2)
    contents = torch.load(tmp_path / "epoch-0002.ckpt", weights_only=True)
    assert_equal(contents["model"]["two"], contents["trained"]["two"])
    for name, average in ema.averages.items():
        assert torch.equal(contents["model"]["one"][name], average)
        trained = contents["trained"]["one"][name]
        assert name.startswith("1.") or torch.equal(trained, learner.model.one.state_dict()[name])


# --- the best weights come back


def test_with_averages_the_best_weights_are_those_that_were_judged(tmp_path: Path) -> None:
    """The next fit continues from the trained weights of the best epoch, and the averages with them."""
    keep = Checkpointer(tmp_path, monitor="Score", mode="min", restore_best=True)
    learner, ema = tiny_learner(scored(3, 1, 2), keep, EMA(0.5), n_batches=1), EMA(0.5)
    learner.fit(3)
    plain = tiny_learner(ema, n_batches=1)
    plain.fit(2)
    with ema.applied():
        assert torch.equal(learner.model.coeff, plain.model.coeff)
        assert torch.equal(load_weights(tmp_path)["coeff"], plain.model.coeff)
    learner.replace_callback(scored(5))
    learner.fit(1)
    assert load_weights(tmp_path / "epoch-0004.ckpt")["coeff"] != plain.model.coeff
    contents = torch.load(tmp_path / "epoch-0002.ckpt", weights_only=True)
    assert torch.equal(contents["trained"][""]["coeff"], plain.model.coeff)


@pytest.mark.parametrize(
    ("average", "before", "after"),
    [
        (lambda: SWA(start_epoch=7), 0, 4),  # epochs 7 to 10
        (lambda: SWA(start_update=13, every=2), 0, 4),  # updates 13, 15, 17 and 19
        (lambda: SWA(start_epoch=2, every=2), 1, 4),  # epoch 2, which is the best, and 6, 8, 10
        (lambda: throttle(EMA(), UpdateEnd, every=4), 2, 5),  # updates 4, 8, 12, 16 and 20
    ],
)
def test_the_best_weights_turn_no_count_back(
    average: Callable[[], Any], before: int, after: int, tmp_path: Path
) -> None:
    """Epochs and updates are counted over the life of the learner; epoch 2 of two updates is the best of five."""
    mean, keep = average(), Checkpointer(tmp_path, monitor="Score", mode="min", restore_best=True)
    scores = scored(3, 1, 4, 5, 6, 7, 8, 9, 10, 11)
    data = (tiny_batches(n_batches=2), tiny_batches(n_batches=1))
    learner = tiny_learner(scores, keep, mean, data=data)
    learner.fit(5)
    plain = tiny_learner(data=data)
    plain.fit(2)
    assert load_weights(tmp_path)["coeff"] == plain.model.coeff
    assert mean.taken == before
    learner.remove_callback(Checkpointer)
    learner.fit(5)
    assert mean.taken == after


def test_executors_agree() -> None:
    """Rule 13."""

    def make(executor: Executor) -> Learner:
        return tiny_learner(EMA(0.9), Seen(), model=TinyModel(), n_batches=3, executor=executor)

    assert_equivalent(make, executors=["dask"], interleavings=4)
