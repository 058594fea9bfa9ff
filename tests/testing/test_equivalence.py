"""`assert_equivalent`: equal runs pass, and every kind of difference is found and named."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from flowtrain import (
    Access,
    BatchBegin,
    BatchEnd,
    Callback,
    CallbackError,
    EpochEnd,
    Event,
    Executor,
    FitEnd,
    Learner,
    LearnerView,
    Phase,
    Read,
    SerialExecutor,
    TrainingPhase,
    Write,
    on,
)
from flowtrain.callbacks import Metrics, Traces, throttle
from flowtrain.errors import ExecutorError, UsageError
from flowtrain.graph.executor import Runner
from flowtrain.graph.plan import Plan
from flowtrain.testing import ShuffledExecutor, assert_equivalent, tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.untyped import untyped

EXECUTORS: list[str | Callable[[], Executor]] = [
    "serial",
    "dask",
    partial(DaskExecutor, workers=3, parallel="always"),
]


class Doubles(Callback):
    """Doubles the inputs in place but declares only a read, so it races with every reader."""

    def state_access(self) -> Access:
        return {"batch.inputs": Read()}

    @on(BatchBegin)
    def double(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        learner.batch.inputs.mul_(2)


class DoublesOpenly(Doubles):
    """Doubles the inputs and declares the write."""

    def state_access(self) -> Access:
        return {"batch.inputs": Write()}


class Sums(Callback):
    """Keeps the sum of the inputs."""

    def __init__(self) -> None:
        self.sums: list[float] = []

    def state_access(self) -> Access:
        return {"batch.inputs": Read()}

    @on(BatchBegin)
    def add(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.sums.append(learner.batch.inputs.sum().item())

    @on(FitEnd, access={})
    def end(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(torch.optim.SGD, lr=1e-3, momentum=0.9)])
def test_the_default_callbacks_are_equivalent(optimizer: Any) -> None:
    """Rule 13: under every executor and in every legal order."""

    def make_learner(executor: Executor) -> Learner:
        traces = Traces(
            {"coeff": lambda learner: learner.params["coeff"].item()}, TrainingPhase, access={"params": Read()}
        )
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Dropout(0.3), torch.nn.Linear(1, 1))
        if optimizer is not torch.optim.AdamW:
            return tiny_learner(executor=executor, optimizer=optimizer, model=model)
        return tiny_learner(traces, executor=executor, optimizer=optimizer)

    assert_equivalent(make_learner, executors=EXECUTORS)


def test_the_default_callbacks_that_print(capfd: pytest.CaptureFixture[str]) -> None:
    def make_learner(executor: Executor) -> Learner:
        return tiny_learner(executor=executor, default_callbacks=True)

    assert_equivalent(make_learner, executors=EXECUTORS, interleavings=2, epochs=1)
    assert capfd.readouterr().out.count("TrainingPhase") == 1 + len(EXECUTORS) + 2


def test_a_race_of_an_undeclared_write() -> None:
    """The message has the first differing path, both values, the executors and a remedy."""
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(lambda executor: tiny_learner(Doubles(), Sums(), executor=executor))
    first, serial, other, *rest = str(caught.value).split("\n")
    assert first == "callbacks.Sums.sums[0] differs from the serial run:"
    assert serial.startswith("  serial: ")
    assert other.startswith("  ShuffledExecutor(seed=0): ")
    assert float(serial.split(": ")[1]) == 2 * float(other.split(": ")[1])
    assert rest[0] == "63 more paths differ, the next is callbacks.Sums.sums[1]."
    assert rest[1].endswith("Learner(strict=True) names who writes without saying so.")
    assert_equivalent(lambda executor: tiny_learner(DoublesOpenly(), Sums(), executor=executor), executors=EXECUTORS)


def test_one_path_may_be_ignored() -> None:
    def make_learner(executor: Executor) -> Learner:
        return tiny_learner(Doubles(), Sums(), executor=executor)

    assert_equivalent(make_learner, ignore=["callbacks.Sums"])
    with pytest.raises(AssertionError, match=r"^callbacks\.Sums\.sums\[0\] differs"):
        assert_equivalent(make_learner, ignore=["callbacks.Sum", "callbacks.Sums.sum"])


@pytest.mark.cpu_only("on a device a series holds the loss itself until it is read")
def test_a_series_and_shared_state_that_race() -> None:
    """Differences outside of attributes are found too: in ``cbstate``, and in the metrics recorded from it."""

    class Bends(Callback):
        def state_access(self) -> Access:
            return {"batch.loss": Read()}

        @on(BatchEnd)
        def bend(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            learner.batch.loss.mul_(2)

    with pytest.raises(AssertionError, match=r"^cbstate\.metrics_epoch\[TrainingPhase\]\['Loss'\]\[0\]\[1\] differs"):
        assert_equivalent(lambda executor: tiny_learner(Bends(), Metrics(), executor=executor), ignore=["batch"])


# --- executors with another result


class Wrong(SerialExecutor):
    """A serial executor that calls a function of the test at the end of a fit."""

    def __init__(self, does: Callable[[Learner], None], made: list[Learner]) -> None:
        super().__init__()
        self.does = does
        self.made = made

    def compile(self, plan: Plan) -> Runner:
        inner = super().compile(plan)

        def run(event: Event, phase: Phase) -> None:
            inner(event, phase)
            if isinstance(event, FitEnd):
                self.does(self.made[-1])

        return run

    def __repr__(self) -> str:
        return "Wrong()"


def nudge_parameter(learner: Learner) -> None:
    """Change a parameter in its last bit."""
    coeff = learner.model.coeff
    coeff.data = torch.nextafter(coeff.data, torch.tensor(1e9))


def add_minus_zero(learner: Learner) -> None:
    learner.cbstate.sign = -0.0


def make_nan(learner: Learner) -> None:
    learner.cbstate.sign = float("nan")


def change_hyperparam(learner: Learner) -> None:
    learner.optimizer.param_groups[0]["lr"] *= 2


def change_optimizer_state(learner: Learner) -> None:
    learner.optimizer.state[learner.model.coeff]["step"] += 1


def draw(learner: Learner) -> None:
    torch.rand(())


def draw_from_python(learner: Learner) -> None:
    random.random()


def change_counter(learner: Learner) -> None:
    untyped(learner.get_callback("Sums")).sums.append(0.0)


def change_mode(learner: Learner) -> None:
    learner.model.train(not learner.model.training)


def fail(learner: Learner) -> None:
    raise ValueError("later")


class Sign(Sums):
    """Makes an entry whose value is zero."""

    def state_access(self) -> Access:
        return {"batch.inputs": Read(), "cbstate.sign": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.sign = 0.0


@pytest.mark.parametrize(
    ("does", "path"),
    [
        (nudge_parameter, "model.coeff"),
        (change_hyperparam, "optimizer.param_groups[0]['lr']"),
        (change_optimizer_state, "optimizer.state['coeff']['step']"),
        (add_minus_zero, "cbstate.sign"),
        (make_nan, "cbstate.sign"),
        (change_counter, "callbacks.Sums.sums"),
        (change_mode, "model.training"),
        (draw, "torch.get_rng_state()"),
        (draw_from_python, "random.getstate()"),
        (fail, "raised by fit"),
    ],
)
def test_every_kind_of_difference_is_found(does: Callable[[Learner], None], path: str) -> None:
    made: list[Learner] = []

    def make_learner(executor: Executor) -> Learner:
        sums: Sums = Sign() if path == "cbstate.sign" else Sums()
        made.append(tiny_learner(sums, executor=executor, optimizer=torch.optim.AdamW))
        return made[-1]

    with pytest.raises(AssertionError) as caught:
        assert_equivalent(make_learner, executors=[lambda: Wrong(does, made)], epochs=1)
    lines = str(caught.value).split("\n")
    assert lines[0] == f"{path} differs from the serial run:"
    assert lines[2].startswith("  Wrong(): ")
    assert lines[-1].endswith("flowtrain.testing.ExecutorContract says which.")


def test_equal_nans_are_equal() -> None:
    made: list[Learner] = []

    def make_learner(executor: Executor) -> Learner:
        learner = tiny_learner(Sign(), executor=executor)
        made.append(learner)
        make_nan(learner)
        return learner

    assert_equivalent(make_learner, executors=[lambda: Wrong(make_nan, made)], interleavings=1)


def test_the_first_element_of_a_tensor_that_differs() -> None:
    class Keeps(Callback):
        def __init__(self, value: float) -> None:
            self.kept = torch.zeros(2, 3)
            self.kept[1, 2] = value

        @on(EpochEnd)
        def nothing(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    values = iter([0.0, 0.25])
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(lambda executor: tiny_learner(Keeps(next(values)), executor=executor), interleavings=1)
    lines = str(caught.value).split("\n")
    assert lines[:3] == [
        "callbacks.Keeps.kept differs from the serial run:",
        "  serial: 0.0 at [1, 2]",
        "  ShuffledExecutor(seed=0): 0.25 at [1, 2]",
    ]


def test_what_the_serial_run_raises_is_compared_and_raised() -> None:
    """Rule 15: the exception is raised to the test, which cannot pass because all runs fail in the same way."""

    class Fails(Callback):
        @on(BatchEnd)
        def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        assert_equivalent(lambda executor: tiny_learner(Fails(), Fails(), executor=executor), executors=EXECUTORS)


# --- how it is called


def test_random_numbers_begin_the_same_and_are_put_back() -> None:
    class Draws(Sums):
        def state_access(self) -> Access:
            return {"resource.rng": Write()}

        @on(BatchBegin)
        def add(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            self.sums.append(random.random() + torch.rand(()).item())

    before = torch.get_rng_state(), random.getstate()
    assert_equivalent(
        lambda executor: tiny_learner(Draws(), Draws(), Sums(), executor=executor, model=torch.nn.Linear(1, 1)),
        executors=EXECUTORS,
    )
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_learner_that_runs_on_something_else() -> None:
    with pytest.raises(UsageError) as caught:
        assert_equivalent(lambda executor: tiny_learner(executor=SerialExecutor()))
    assert "Pass on what it is called with: Learner(..., executor=executor)." in str(caught.value)


def test_no_learner() -> None:
    with pytest.raises(UsageError) as caught:
        assert_equivalent(untyped(lambda executor: None))
    assert str(caught.value) == "make_learner(executor) returns a Learner, got None."


def test_a_callback_or_model_that_is_used_twice() -> None:
    sums, model = Sums(), torch.nn.Linear(1, 1)
    with pytest.raises(CallbackError, match=r"Sums belongs to another learner, .*Make a new Sums\(\.\.\.\)"):
        assert_equivalent(lambda executor: tiny_learner(sums, executor=executor))
    with pytest.raises(UsageError, match=r"has used this Linear before, and it remembers the run before\."):
        assert_equivalent(lambda executor: tiny_learner(model=model, executor=executor))


def test_an_executor_in_place_of_what_makes_one() -> None:
    with pytest.raises(UsageError) as caught:
        assert_equivalent(lambda executor: tiny_learner(executor=executor), executors=[untyped(SerialExecutor())])
    assert "an executor belongs to one learner. Pass what makes one: its name, its type" in str(caught.value)


def test_what_depends_on_a_clock_is_ignored_where_one_says_so() -> None:
    def make_learner(executor: Executor) -> Learner:
        return tiny_learner(throttle(Sums(), BatchBegin, seconds=1e-6), executor=executor)

    assert_equivalent(make_learner, executors=EXECUTORS, ignore=["callbacks.Sums"])


def test_it_runs_what_it_is_given_in_place_of_a_fit() -> None:
    """`run` was called if each run has appended its number."""
    fitted: list[int] = []

    def run(learner: Learner) -> None:
        learner.fit(1)
        fitted.append(len(learner.callbacks))
        learner.fit(1)

    assert_equivalent(lambda executor: tiny_learner(executor=executor), run=run, interleavings=2)
    assert len(fitted) == 3


# --- the shuffled executor


class Notes(Callback):
    def __init__(self, log: list[str]) -> None:
        self.log = log

    @on(BatchEnd)
    def note(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.log.append(self.name)


def test_seed_0_reverses_what_may_be_reversed_and_other_seeds_give_every_order() -> None:
    log: list[str] = []

    def orders(seed: int) -> list[str]:
        log.clear()
        with tiny_learner(*(Notes(log) for _ in range(3)), n_batches=40, executor=ShuffledExecutor(seed)) as learner:
            learner.epoch(TrainingPhase)
        names = [name.removeprefix("Notes#").replace("Notes", "1") for name in log]
        return ["".join(names[at : at + 3]) for at in range(0, len(names), 3)]

    assert set(orders(0)) == {"321"}
    assert set(orders(7)) == {"123", "132", "213", "231", "312", "321"}
    assert orders(7) == orders(7) != orders(8)


def test_a_shuffled_executor_says_what_it_is() -> None:
    executor = ShuffledExecutor(3)
    assert repr(executor) == "ShuffledExecutor(seed=3)"
    with tiny_learner(executor=executor) as learner:
        assert "in any order that the edges allow, seed 3" in learner.callbacks.explain()
    with pytest.raises(ExecutorError, match=r"^This ShuffledExecutor is closed\. Give the learner a new one\.$"):
        tiny_learner(executor=executor)
