"""Scheduler: which hyperparameters it sets, when, and which values it records."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    AccessError,
    BatchEnd,
    Callback,
    CancelFittingException,
    EpochEnd,
    Executor,
    FitBegin,
    Learner,
    LearnerView,
    MissingStateError,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UpdateEnd,
    UsageError,
    ValidationPhase,
    Write,
    WriteConflictError,
    on,
)
from flowtrain.callback.phases import StepContext
from flowtrain.callbacks import (
    EMA,
    Checkpointer,
    HyperParameter,
    LearningRate,
    Momentum,
    Schedule,
    Scheduler,
    Setting,
    WeightDecay,
    constant,
    cosine,
    exponential,
    from_torch,
    one_cycle,
    per_epoch,
    reduce_on_plateau,
    step,
    warmup,
)
from flowtrain.diagnostics.suggest_access import record
from flowtrain.testing import TinyModel, assert_equivalent, tiny_batches, tiny_learner
from tests.support.untyped import untyped

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Used(Callback):
    """Keeps the learning rate and the momentum of each update."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.momenta: list[float] = []

    def state_access(self) -> Access:
        return {"optimizer.hyperparams": Read()}

    @on(UpdateEnd)
    def keep(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
        [group] = learner.optimizer.hyperparams
        self.rates.append(group["lr"])
        self.momenta.append(group.get("momentum", math.nan))


def plain_loop(make: Callable[[torch.optim.Optimizer], Any], epochs: int, n_batches: int) -> tuple[TinyModel, Any]:
    """Train in a hand-written loop, with a step of torch's scheduler after each update."""
    model = TinyModel()
    optimizer = SGD(model.parameters())
    scheduler = make(optimizer)
    for number in range(epochs * n_batches):
        x, y = tiny_batches(n_batches=n_batches)[number % n_batches]
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        if number < epochs * n_batches - 1:
            scheduler.step()
    return model, optimizer


@pytest.mark.cpu_only("trains the model by hand on the CPU")
def test_one_cycle_trains_as_torchs_scheduler_does() -> None:
    used = Used()
    schedules = {LearningRate: one_cycle(0.05), Momentum: one_cycle(0.85, start=0.95, end=0.95)}
    learner = tiny_learner(Scheduler(schedules), used, optimizer=SGD, n_batches=6)
    learner.fit(3)
    model, optimizer = plain_loop(partial(OneCycleLR, max_lr=0.05, total_steps=18), 3, 6)
    torch.testing.assert_close(learner.model.coeff, model.coeff, rtol=1e-6, atol=0)
    assert used.rates[-1] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    hyperparams = learner.cbstate.hyperparams
    assert list(hyperparams["LearningRate"]) == list(enumerate(used.rates, start=1))
    assert list(hyperparams["Momentum"]) == list(enumerate(used.momenta, start=1))


def test_a_wrapped_scheduler_trains_bit_for_bit() -> None:
    make = partial(CosineAnnealingLR, T_max=7)
    learner = tiny_learner(Scheduler({LearningRate: from_torch(make, 0.1)}), optimizer=SGD, n_batches=6)
    learner.fit(2)
    assert torch.equal(learner.model.coeff, plain_loop(make, 2, 6)[0].coeff)


@pytest.mark.parametrize(
    ("how", "accumulate", "updates"),
    [({"epochs": 3}, 1, 15), ({"epochs": 3}, 2, 9), ({"steps": 7}, 1, 7), ({"steps": 7, "validate_every": 3}, 2, 5)],
)
def test_what_has_no_length_is_stretched_over_the_fit(how: dict[str, Any], accumulate: int, updates: int) -> None:
    used = Used()
    core = TorchCore(device="cpu", accumulate=accumulate)
    learner = tiny_learner(Scheduler({LearningRate: one_cycle(1.0)}), used, n_batches=5, core=core)
    learner.fit(**how)
    expected = [one_cycle(1.0, length=updates)(n) for n in range(1, updates + 1)]
    assert used.rates == expected
    learner.fit(**how)  # a second fit begins the schedule again
    assert used.rates == expected * 2
    assert [n for n, _ in learner.cbstate.hyperparams["LearningRate"]] == list(range(1, 2 * updates + 1))


def test_other_schedules_count_over_the_life_of_the_learner() -> None:
    used = Used()
    learner = tiny_learner(Scheduler({LearningRate: lambda n: 1 / n}), used, n_batches=2)
    learner.fit(1)
    learner.step(TrainingPhase, tiny_batches()[0])
    learner.fit(1)
    assert used.rates == [1 / n for n in range(1, 6)]


def recorded(learner: Learner) -> list[tuple[int, float]]:
    return list(learner.cbstate.hyperparams["LearningRate"])


@pytest.mark.parametrize("schedule", [step(0.1, [6], 0.1), per_epoch(step(0.1, [2], 0.1))], ids=str)
def test_a_scheduler_that_is_added_late_counts_the_life_of_the_learner(schedule: Schedule, tmp_path: Path) -> None:
    whole = tiny_learner(Scheduler({LearningRate: schedule}), n_batches=4)
    whole.fit(3)
    rates = recorded(whole)
    assert [rate for _, rate in rates][4:] == pytest.approx([0.1] * 2 + [0.01] * 6 if schedule.unit == "update" else
                                                           [0.1] * 4 + [0.01] * 4)  # fmt: skip
    replaced = tiny_learner(Scheduler({LearningRate: constant(0.2)}), n_batches=4)
    replaced.fit(2)
    replaced.replace_callback(Scheduler({LearningRate: schedule}))
    replaced.fit(1)
    assert recorded(replaced) == [(n, 0.2) for n in range(1, 9)] + rates[8:]
    tiny_learner(Checkpointer(tmp_path), n_batches=4).fit(2)
    resumed = tiny_learner(Scheduler({LearningRate: schedule}), Checkpointer(tmp_path), n_batches=4)
    resumed.fit(3, resume=tmp_path)
    assert recorded(resumed) == rates[8:]
    stepped = tiny_learner(n_batches=4)
    stepped.fit(2)
    stepped.add_callback(Scheduler({LearningRate: schedule}))
    stepped.step(TrainingPhase, tiny_batches()[0])
    assert recorded(stepped) == rates[8:9]


def test_epochs_are_counted_also_while_no_schedule_needs_them(tmp_path: Path) -> None:
    tiny_learner(Scheduler({LearningRate: 0.1}), Checkpointer(tmp_path), n_batches=1).fit(3)
    scheduler = Scheduler({LearningRate: per_epoch(step(0.1, [4], 0.1))})
    learner = tiny_learner(scheduler, Checkpointer(tmp_path), n_batches=1)
    learner.fit(8, resume=tmp_path)
    assert [rate for _, rate in recorded(learner)] == pytest.approx([0.1] * 4 + [0.01] * 4)


@pytest.mark.parametrize("schedule", [cosine(0.1), per_epoch(cosine(0.1))], ids=str)
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("at", ["epoch", "batch"])
def test_a_scheduler_that_is_added_at_a_resume_is_stretched_over_the_whole_fit(
    schedule: Schedule, before: int, at: str, tmp_path: Path
) -> None:
    """The fit that resumes, in its second or third epoch, is the first or second one of the learner."""

    def make(*callbacks: Callback) -> Learner:
        learner = tiny_learner(*callbacks, n_batches=4)
        if before:
            learner.fit(before)
        return learner

    whole = make(Scheduler({LearningRate: schedule}))
    whole.fit(4)
    stop = StopAfter(before * 8 + (8 if at == "epoch" else 10), tmp_path / "cut.pt")
    make(stop).fit(4)
    learner = tiny_learner(Scheduler({LearningRate: schedule}), n_batches=4)
    learner.fit(4, resume=tmp_path / "cut.pt")
    done = before * 4 + (4 if at == "epoch" else 6)
    assert [n for n, _ in recorded(learner)] == list(range(done + 1, before * 4 + 17))
    if (before, at, schedule.unit) != (2, "batch", "update"):  # where an epoch is open, its updates are not known
        assert recorded(learner) == recorded(whole)[done:]


def test_per_epoch() -> None:
    used = Used()
    schedules = {LearningRate: per_epoch(step(0.1, every=2)), Momentum: per_epoch(cosine(0.8))}
    learner = tiny_learner(Scheduler(schedules), used, optimizer=SGD, n_batches=2)
    learner.fit(4)
    assert used.rates == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.01])
    momenta = [cosine(0.8, length=4)(n) for n in (1, 1, 2, 2, 3, 3, 4, 4)]
    assert used.momenta == momenta
    learner.fit(4)
    assert used.rates[8:] == pytest.approx([1e-3] * 4 + [1e-4] * 4)
    assert used.momenta[8:] == momenta


def test_reduce_on_plateau_is_torchs() -> None:
    used = Used()
    schedule = reduce_on_plateau(0.3, factor=0.5, patience=0, threshold=0.999)
    learner = tiny_learner(Scheduler({LearningRate: schedule}), used, n_batches=2)
    learner.fit(8)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.999)
    expected: list[float] = []
    for _, loss in learner.cbstate.metrics_epoch[ValidationPhase]["Loss"]:
        expected += [optimizer.param_groups[0]["lr"]] * 2
        theirs.step(loss)
    assert used.rates == expected
    assert len(set(expected)) > 2  # the rate was lowered more than once


def test_a_monitor_that_no_metric_provides() -> None:
    with pytest.raises(MissingStateError) as caught:
        tiny_learner(Scheduler({LearningRate: reduce_on_plateau(0.1, monitor="Los")}))
    assert "Scheduler reads cbstate.metrics_epoch.Los, and no callback declares to write it." in str(caught.value)
    assert "Did you mean 'Loss'?" in str(caught.value)


def two_groups(params: Any) -> torch.optim.Optimizer:
    [coeff] = params
    other = torch.nn.Parameter(torch.zeros(1))
    return torch.optim.AdamW([{"params": [coeff], "lr": 0.1}, {"params": [other], "lr": 0.2}])


def test_parameter_groups() -> None:
    rates = {LearningRate(group=0): constant(0.3), LearningRate(group=1): step(0.4, 1, 0.5)}
    schedules: dict[Any, Any] = {**rates, Momentum: constant(0.5), WeightDecay: constant(0.0)}
    learner = tiny_learner(Scheduler(schedules), optimizer=two_groups, n_batches=2)
    learner.fit(1)
    kept = [(group["lr"], group["betas"], group["weight_decay"]) for group in learner.optimizer.param_groups]
    assert kept == [(0.3, (0.5, 0.999), 0.0), (0.2, (0.5, 0.999), 0.0)]
    assert list(learner.cbstate.hyperparams) == ["LearningRate.0", "LearningRate.1", "Momentum", "WeightDecay"]


class Gan(AbstractTrainingPhase):
    """Updates two optimizers in each batch, one of them twice."""

    def step(self, learner: StepContext, raw: torch.Tensor) -> None:
        with learner.run_batch(self, inputs=raw) as batch:
            for name in ("disc", "gen", "disc"):
                learner.backward(self, learner.model[name](batch.inputs).mean(), name)
                learner.update(self, name)


def gan(*callbacks: Callback, **options: Any) -> Learner:
    return tiny_learner(
        *callbacks,
        model={"gen": TinyModel(), "disc": TinyModel()},
        optimizer={"gen": SGD, "disc": SGD},
        data={Gan: [torch.ones(2, 1)] * 3},
        **options,
    )


def test_optimizers_by_name_keep_step() -> None:
    scheduler = Scheduler({LearningRate("gen"): one_cycle(1.0), LearningRate("disc"): lambda n: n / 10})
    learner = gan(scheduler)
    learner.fit(2)
    hyperparams = learner.cbstate.hyperparams
    assert list(hyperparams["LearningRate.gen"]) == [(n, one_cycle(1.0, length=6)(n)) for n in range(1, 7)]
    assert list(hyperparams["LearningRate.disc"]) == [(n, n / 10) for n in range(1, 7)]
    assert learner.optimizer.disc.param_groups[0]["lr"] == 0.6
    learner.replace_callback(Scheduler({LearningRate("disc"): lambda n: n / 10}))
    learner.fit(1)
    assert [n for n, _ in hyperparams["LearningRate.disc"]] == [*range(1, 7), 1, 2, 3], "a new callback counts anew"


class Epsilon(HyperParameter):
    """The hyperparameter eps of Adam."""

    key = "eps"


class Forcing(Setting):
    """A hyperparameter that a user's optimizer defines."""

    def access(self) -> Access:
        return {"cbstate.forcing": Write()}

    def set(self, learner: LearnerView, value: float) -> None:
        learner.cbstate.forcing = value


def test_hyperparameters_of_ones_own() -> None:
    seen: list[float] = []

    class Reader(Callback):
        def state_access(self) -> Access:
            return {"cbstate.forcing": Read()}

        def setup(self, learner: LearnerView) -> None:
            seen.append(learner.cbstate.forcing)

        @on(UpdateEnd)
        def look(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
            seen.append(learner.cbstate.forcing)

    scheduler = Scheduler({Epsilon: 1e-3, Forcing: lambda n: 1.0 - n})
    learner = tiny_learner(Reader(), scheduler, optimizer=torch.optim.Adam, n_batches=3)
    learner.fit(1)
    assert learner.optimizer.param_groups[0]["eps"] == 1e-3
    assert seen == [0.0, 0.0, -1.0, -2.0]
    assert learner.cbstate.hyperparams["Forcing"].last() == (3, -2.0)


@pytest.mark.parametrize(
    ("third", "text"),
    [
        (math.nan, "gave nan for update 3. A hyperparameter is finite; look for a division by zero or an overflow."),
        (math.inf, "gave inf for update 3. A hyperparameter is finite; look for a division by zero or an overflow."),
        (
            -0.5,
            "gave -0.5 for update 3, and LearningRate is at least 0.0. If it falls too far, bound it: "
            "lambda n: max(0.0, f(n)).",
        ),
        (None, "gave None for update 3, which is a NoneType and no number. Return a float."),
    ],
)
def test_a_schedule_that_gives_no_value(third: Any, text: str) -> None:
    def falling(n: int) -> float:
        value: float = third if n == 3 else 0.1 / n
        return value

    falling.__qualname__ = "falling"
    learner = tiny_learner(Scheduler({LearningRate: falling}))
    with pytest.raises(UsageError) as caught:
        learner.fit(1)
    assert str(caught.value) == f"The schedule falling of LearningRate {text}"
    assert learner.optimizer.param_groups[0]["lr"] == 0.05
    assert len(learner.cbstate.hyperparams["LearningRate"]) == 2


def test_a_schedule_that_is_bad_from_the_first_is_refused_when_built() -> None:
    with pytest.raises(UsageError, match=r"The schedule -0\.1 of LearningRate gave -0\.1 for update 1"):
        tiny_learner(Scheduler({LearningRate: -0.1}))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Scheduler({}), UsageError, "Scheduler({}) takes schedules by hyperparameter"),
        (lambda: Scheduler({"lr": 0.1}), UsageError, "Scheduler got 'lr' where a hyperparameter belongs."),
        (lambda: Scheduler({LearningRate: untyped("x")}), UsageError, "A schedule is a function schedule(n)"),
        (
            lambda: Scheduler({LearningRate: 0.1, LearningRate(group=1): 0.1}),
            UsageError,
            "Scheduler has two schedules for LearningRate.1: of LearningRate() and LearningRate(group=1).",
        ),
        (lambda: LearningRate("a.b"), UsageError, "LearningRate('a.b') takes the name of an optimizer"),
        (
            lambda: LearningRate(group=-1),
            UsageError,
            "LearningRate(): group, the position of a parameter group, is a whole number, at least 0, got -1.",
        ),
        (
            lambda: tiny_learner(Scheduler({Momentum: 0.9}), optimizer=torch.optim.Adagrad),
            UsageError,
            "Momentum(): the parameter groups of the optimizer have no 'momentum'.",
        ),
        (
            lambda: tiny_learner(Scheduler({LearningRate: 0.9}), optimizer=two_groups),
            UsageError,
            "LearningRate() would give all parameter groups one value, and now they have 0.1, 0.2. Name the group",
        ),
        (
            lambda: tiny_learner(Scheduler({LearningRate(group=2): 0.9}), optimizer=two_groups),
            UsageError,
            "LearningRate(group=2): the optimizer has 2 parameter groups, counted from 0. Write group=1 or less.",
        ),
        (lambda: gan(Scheduler({LearningRate("gem"): 0.1})), AccessError, "Did you mean 'gen'?"),
        (
            lambda: gan(Scheduler({LearningRate: 0.1})),
            AccessError,
            "no 'hyperparams'. The optimizers are 'gen', 'disc'; name one, as in 'optimizer.gen.hyperparams': "
            "LearningRate('gen') in a Scheduler, ",
        ),
        (
            lambda: tiny_learner(Scheduler({LearningRate("gen"): 0.1})),
            AccessError,
            "There is one optimizer, without a name: leave 'gen' out, as in 'optimizer.hyperparams'.",
        ),
    ],
)
def test_what_does_not_fit(make: Callable[[], object], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert text in str(caught.value)


def test_a_loader_without_a_length_needs_one_given() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(tiny_batches(n_batches=3))

    def learner(length: int | None) -> Learner:
        loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
        return tiny_learner(Scheduler({LearningRate: warmup(one_cycle(0.1, length=length), 1)}), data=loader)

    with pytest.raises(UsageError) as caught:
        learner(None).fit(1)
    assert str(caught.value) == (
        "The schedule warmup(one_cycle(0.1), 1) of LearningRate is stretched over the updates of the fit, and how many "
        "these are is not known: a loader does not know how many it has. Give it a length, in updates: length=1000."
    )
    learner(10).fit(1)
    with pytest.raises(UsageError, match=r"of LearningRate is stretched over the epochs .*: the fit counts steps\."):
        tiny_learner(Scheduler({LearningRate: per_epoch(one_cycle(0.1))})).fit(steps=3)


def test_two_schedulers() -> None:
    """Rule 7: two schedulers of one hyperparameter conflict. Rule 8: two schedulers of different ones do not."""
    with pytest.raises(WriteConflictError, match=r"Scheduler and Scheduler#2 "):
        tiny_learner(Scheduler({LearningRate: 0.1}), Scheduler({LearningRate(group=0): 0.1}))
    learner = tiny_learner(Scheduler({LearningRate: 0.2}), Scheduler({Momentum: 0.3}), optimizer=SGD)
    learner.fit(1)
    assert [learner.optimizer.param_groups[0][key] for key in ("lr", "momentum")] == [0.2, 0.3]


def every_kind() -> Scheduler:
    return Scheduler(
        {
            LearningRate: reduce_on_plateau(0.2, factor=0.5, patience=0, threshold=0.5),
            Momentum: warmup(one_cycle(0.8), 3),
            WeightDecay: per_epoch(exponential(0.1, 0.5)),
        }
    )


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_state_goes_on_exactly(stop_after: int) -> None:
    """A fit of four epochs gives the same rates if another learner continues it with the scheduler's state."""
    whole, first, second = every_kind(), every_kind(), every_kind()
    learner = tiny_learner(whole, optimizer=SGD, n_batches=4)
    learner.fit(4)
    halves = tiny_learner(first, optimizer=SGD, n_batches=4)

    class Stop(Callback):
        def state_access(self) -> Access:
            return {"cbstate.history": Read()}

        def run_after(self) -> tuple[type[Callback], ...]:
            return (Scheduler,)

        @on(EpochEnd, ValidationPhase)
        def stop(self, event: EpochEnd, phase: Phase, view: LearnerView) -> None:
            if view.cbstate.history[phase].epochs == stop_after:
                raise CancelFittingException("on purpose")

    halves.add_callback(Stop())
    halves.fit(4)
    halves.remove_callback(Stop)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    halves.replace_callback(second)
    view = SimpleNamespace(rank=0, updates=first.updates, cbstate=halves.cbstate)
    begin = FitBegin(4, None, 16, resumed=True, phases=(TrainingPhase(), ValidationPhase()))
    second.begin_fit(begin, Phase(), untyped(view))
    for _ in range(4 - stop_after):
        halves.epoch(TrainingPhase)
        halves.epoch(ValidationPhase)
    assert torch.equal(halves.model.coeff, learner.model.coeff)
    assert {name: list(series) for name, series in halves.cbstate.hyperparams.items()} == {
        name: list(series) for name, series in learner.cbstate.hyperparams.items()
    }
    assert second.state_dict() == {**whole.state_dict()}


def test_executors_agree() -> None:
    """Rule 13."""

    def make(executor: Executor) -> Learner:
        return tiny_learner(every_kind(), EMA(0.9), Used(), optimizer=SGD, n_batches=3, executor=executor)

    assert_equivalent(make, executors=["dask"], interleavings=4)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: Scheduler({LearningRate: 0.2}),
            {"optimizer.hyperparams", "cbstate.hyperparams.LearningRate", "cbstate.history"},
        ),
        (
            lambda: Scheduler({LearningRate: reduce_on_plateau(0.2), Forcing: 0.3}),
            {
                "optimizer.hyperparams",
                "cbstate.hyperparams.LearningRate",
                "cbstate.hyperparams.Forcing",
                "cbstate.forcing",
                "cbstate.history",
                "cbstate.metrics_epoch.Loss",
            },
        ),
    ],
)
def test_declares_exactly_what_it_touches(make: Callable[[], Scheduler], expected: set[str]) -> None:
    found = record(tiny_learner(), make())
    assert found.failure is None
    assert {".".join(path) for path, _ in found.union} == expected
    learner = tiny_learner(make())
    node = next(node for node in learner.callbacks.nodes if isinstance(node.callback, Scheduler))
    assert {".".join(path) for path, _ in node.union} == expected
    assert {path for path, kind in node.union if isinstance(kind, Write)} == {
        path for path, kind in found.union if isinstance(kind, Write)
    }


def test_strict_mode_finds_nothing() -> None:
    learner = tiny_learner(every_kind(), EMA(0.9), optimizer=SGD, n_batches=2, strict=True)
    learner.fit(2)


class StopAfter(Callback):
    """Requests a checkpoint at a batch, counted over all phases, and stops training at the next batch."""

    def __init__(self, batch: int, path: Path) -> None:
        self.left = batch
        self.path = path

    @on(BatchEnd)
    def count(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.left -= 1
        if self.left == 0:
            learner.request_checkpoint(self.path)
        if self.left < 0:
            raise CancelFittingException("on purpose")


@pytest.mark.parametrize("batch", [3, 7, 12])  # in training, in validation, and in the second epoch
def test_a_resumed_fit_is_the_whole_one(batch: int, tmp_path: Path) -> None:
    """Rule 28: for schedules of every kind, and while the model has averages at the time of the checkpoint."""

    def make(*more: Callback) -> Learner:
        schedules: dict[Any, Any] = dict(every_kind().schedules)
        schedules[LearningRate()] = reduce_on_plateau(0.02, factor=0.5, patience=0, threshold=0.5)
        return tiny_learner(Scheduler(schedules), EMA(0.9), *more, optimizer=SGD, n_batches=5)

    whole, resumed = make(), make()
    whole.fit(4)
    make(StopAfter(batch, tmp_path / "cut.pt")).fit(4)
    resumed.fit(4, resume=tmp_path / "cut.pt")
    averages = [learner.callbacks.must_find(EMA).state_dict()["averages"]["coeff"] for learner in (whole, resumed)]
    assert torch.equal(whole.model.coeff, resumed.model.coeff)
    assert torch.equal(*averages)
    recorded: list[dict[str, list[Any]]] = []
    for learner in (whole, resumed):
        hyperparams, metrics = learner.cbstate.hyperparams, learner.cbstate.metrics_epoch[ValidationPhase]
        recorded.append({name: list(series) for kept in (hyperparams, metrics) for name, series in kept.items()})
    assert recorded[0] == recorded[1]


def lengthened(schedules: Any, path: Path, at: int, first: dict[str, Any], then: dict[str, Any]) -> Learner:
    """Return a learner that resumes, with the arguments `then`, a fit of 4 batches per epoch made with `first`."""

    def make(n_batches: int, *more: Callback) -> Learner:
        batches = tiny_batches(n_batches=n_batches)
        return tiny_learner(Scheduler(schedules), *more, data=batches, optimizer=SGD)

    make(4, StopAfter(at, path)).fit(**first)
    again = make(then.pop("n_batches", 4))
    again.fit(**then, resume=path)
    return again


@pytest.mark.parametrize("at", [6, 8])  # within the second epoch, and at its end
@pytest.mark.parametrize(
    ("first", "then", "totals"),
    [
        ({"epochs": 2}, {"epochs": 4}, (8, 16)),
        ({"epochs": 4}, {"epochs": 3}, (16, 12)),
        ({"epochs": 4}, {"epochs": 4, "n_batches": 5}, (16, 20)),
        ({"steps": 10}, {"steps": 20}, (10, 20)),
        ({"steps": 20, "validate_every": 3}, {"steps": 11, "validate_every": 3}, (20, 11)),
    ],
)
def test_a_schedule_that_was_made_for_another_total_says_that_it_jumps(
    at: int, first: dict[str, Any], then: dict[str, Any], totals: tuple[int, int], tmp_path: Path
) -> None:
    schedule = one_cycle(0.1)
    before, now = (f"{schedule.value(at + 1, total):.4g}" for total in totals)
    with pytest.warns(UserWarning, match="was planned to have") as caught:
        learner = lengthened({LearningRate: schedule}, tmp_path / "cut.pt", at, first, dict(then))
    (text,) = [str(each.message) for each in caught]
    assert f"planned to have {totals[0]} updates, and this fit has {totals[1]}. " in text
    assert f"jumps here: LearningRate is now {now}, and would have been {before}, by one_cycle(0.1). " in text
    rates = dict(learner.cbstate.hyperparams["LearningRate"])
    assert max(rates) == totals[1] - (1 if "n_batches" in then else 0)  # its first epoch had one batch less
    for update, rate in rates.items():
        assert rate == schedule.value(update, totals[update > at])


def test_several_schedules_that_jump_are_one_warning(tmp_path: Path) -> None:
    schedules = {LearningRate: cosine(0.1), Momentum: per_epoch(cosine(0.9))}
    with pytest.warns(UserWarning, match="was planned to have") as caught:
        lengthened(schedules, tmp_path / "cut.pt", 7, {"epochs": 2}, {"epochs": 4})
    (text,) = [str(each.message) for each in caught]
    assert "have 8 updates, and this fit has 16; 2 epochs, and this fit has 4. A schedule" in text
    assert "LearningRate is now 0.05975, and would have been 0.003806, by cosine(0.1, end=0.0); Momentum is now" in text
    assert "Momentum is now 0.7682, and would have been 0.45, by per_epoch(cosine(0.9, end=0.0)). To" in text


@pytest.mark.parametrize(
    ("schedule", "then"),
    [
        (one_cycle(0.1), {"epochs": 2}),
        (one_cycle(0.1, length=30), {"epochs": 4}),
        (step(0.1, every=3), {"epochs": 4}),
        (one_cycle(0.1), {"epochs": 1}),  # the fit is complete: resuming trains nothing
        (per_epoch(cosine(0.1)), {"epochs": 2, "n_batches": 6}),
    ],
)
def test_a_schedule_that_does_not_jump_says_nothing(schedule: Any, then: dict[str, Any], tmp_path: Path) -> None:
    lengthened({LearningRate: schedule}, tmp_path / "cut.pt", 6, {"epochs": 2}, dict(then))
