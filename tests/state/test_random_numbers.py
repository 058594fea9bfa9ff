# pyright: reportPrivateUsage=false
# The test registers handlers for bundled types and removes them from a private table afterwards.
"""Rules 6, 13 and 19: deferrable callbacks draw random numbers from generators of their own, also in place."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import flowtrain
from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CallbackError,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    Learner,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    UndeclaredWriteError,
    UsageError,
    Write,
    on,
)
from flowtrain.callback.callback import draws_own
from flowtrain.callbacks import CustomCallback, LogMetrics, LogVisualization, Metrics, when
from flowtrain.logging import JsonlBackend
from flowtrain.state.random_numbers import CallbackSeeds, own_numbers, seed_everything
from flowtrain.testing import tiny_learner
from tests.support.interrupts import interrupted
from tests.support.programs import Programs
from tests.support.untyped import untyped

# Numpy documents these two functions, but has no annotations for them.
get_bit_generator: Callable[[], Any] = vars(np.random)["get_bit_generator"]
set_bit_generator: Callable[[Any], None] = vars(np.random)["set_bit_generator"]

Numbers = tuple[float, float, float, float]


def draw() -> Numbers:
    """Draw from each generator of the process; numpy's then holds a second normal number for the next draw."""
    return random.random(), random.gauss(0, 1), float(torch.rand(())), float(np.random.randn())


def generators() -> Any:
    return random.getstate(), torch.get_rng_state().tolist(), repr(np.random.get_state())


def train(*callbacks: Callback, strict: bool = False, fails: type[Exception] | None = None) -> tuple[float, Any]:
    """Train with dropout; return the last loss, and the random numbers drawn after it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    data = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(6)]
    learner = Learner(
        model, nn.functional.cross_entropy, data=data, callbacks=callbacks, default_callbacks="quiet", strict=strict
    )
    if fails is None:
        learner.fit(2)
    else:
        with pytest.raises(fails):
            learner.fit(2)
    return float(learner.batch.loss), generators()


class Consumer(Callback):
    """Calls a function at every event that it handles, and keeps the results."""

    deferrable = True

    def __init__(self, do: Callable[[int], object], event_type: type[Event] = BatchEnd) -> None:
        self.do = do
        self.event_type = event_type
        self.found: list[object] = []

    @on(Event)
    def look(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if isinstance(event, self.event_type):
            self.found.append(self.do(len(self.found)))


def seeds(number: int) -> object:
    torch.manual_seed(7)
    random.seed(7)
    np.random.seed(7)
    return draw()


def loads(number: int) -> object:
    return [float(batch[0]) for batch in DataLoader(untyped(range(3)), shuffle=True)]


def replaces(number: int) -> object:
    set_bit_generator(np.random.PCG64(1))
    return float(np.random.rand())


@pytest.mark.parametrize("event_type", [BatchEnd, EpochEnd, FitBegin, FitEnd])
@pytest.mark.parametrize("do", [lambda number: draw(), seeds, loads, replaces, lambda number: number < 5 or draw()])
def test_a_consumer_that_draws_changes_nothing(do: Callable[[int], object], event_type: type[Event]) -> None:
    """In a model with dropout, a logger that drew random numbers once changed the losses."""
    consumer = Consumer(do, event_type)
    assert train(consumer) == train()
    assert consumer.found


def test_strict_mode_has_nothing_to_say_of_it() -> None:
    assert train(Consumer(lambda number: draw()), strict=True) == train()


def test_the_numbers_differ_from_event_to_event_and_from_callback_to_callback_and_come_again() -> None:
    def found() -> list[object]:
        callbacks = [Consumer(lambda number: draw()), Consumer(lambda number: draw())]
        train(*callbacks)
        return [numbers for callback in callbacks for numbers in callback.found]

    first = found()
    assert len(set(first)) == len(first) == 24
    assert found() == first


def test_the_numbers_depend_on_the_seed_of_the_run() -> None:
    def first(seed: int) -> object:
        consumer = Consumer(lambda number: draw())
        learner = tiny_learner(consumer)
        torch.manual_seed(seed)  # seeded again, since building the learner may draw
        learner.fit(1)
        return consumer.found[0]

    assert first(1) == first(1) != first(2)


def test_a_handler_that_raises_after_it_drew_leaves_the_generators_as_they_were() -> None:
    def fails(number: int) -> object:
        if number == 3:
            draw()
            raise ValueError(number)
        return None

    def only_fails(number: int) -> object:
        if number == 3:
            raise ValueError(number)
        return None

    assert train(Consumer(fails), fails=ValueError) == train(Consumer(only_fails), fails=ValueError)


def test_a_condition_of_a_consumer_may_draw() -> None:
    """A condition may log about every tenth event at random; every run asks it for the same events."""

    def sampled() -> Consumer:
        return when(Consumer(lambda number: draw()), BatchEnd, lambda number, phase: random.random() < 0.5)

    one, other = sampled(), sampled()
    assert train(one) == train() == train(other)
    assert 0 < len(one.found) < 12
    assert one.found == other.found


def test_setup_of_a_consumer_may_draw() -> None:
    class Picks(Consumer):
        def setup(self, learner: LearnerView) -> None:
            self.picked = draw()

    callbacks = [Picks(lambda number: None), Picks(lambda number: None)]
    assert train(callbacks[0]) == train() == train(callbacks[1])
    assert callbacks[0].picked == callbacks[1].picked


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("inside", range(4))
def test_the_generators_come_back_whatever_was_drawn(before: int, inside: int) -> None:
    """Numpy's generator keeps the second of two normal numbers outside of its bit generator's state."""
    random.seed(1)
    torch.manual_seed(1)
    np.random.seed(1)
    for _ in range(before):
        draw()
    state, found = generators(), []
    for _ in range(2):
        with own_numbers(2**64 - 1):
            found.append([draw() for _ in range(inside)])
        assert generators() == state
    assert found[0] == found[1]
    with pytest.raises(TypeError), own_numbers(3):
        random.choice(untyped(draw))
    assert generators() == state


def test_another_generator_of_numpy_comes_back_too() -> None:
    before = get_bit_generator()
    set_bit_generator(np.random.PCG64(1))
    try:
        np.random.randn()
        state = repr(np.random.get_state(legacy=False))
        with own_numbers(3):
            first = draw()
        with own_numbers(3):
            assert draw() == first
        assert repr(np.random.get_state(legacy=False)) == state
    finally:
        set_bit_generator(before)


def test_no_interrupt_leaves_the_generators_seeded() -> None:
    def draw_own() -> None:
        with own_numbers(3):
            draw()

    before = generators()
    for raised in interrupted(draw_own, "state/random_numbers.py"):
        assert raised
        assert generators() == before


def test_a_seed_is_of_the_run_the_name_and_the_number() -> None:
    draws = CallbackSeeds()
    draws.load_state_dict({"seed": 5, "counts": {}})
    found = [draws.next("A"), draws.next("A"), draws.next("B"), draws.before_training("A")]
    assert len(set(found)) == 4
    state = draws.state_dict()
    assert state == {"seed": 5, "counts": {"A": 2, "B": 1}}
    again = CallbackSeeds()
    again.load_state_dict(state)
    assert again.next("A") == draws.next("A")
    assert CallbackSeeds().seed == torch.initial_seed()


class MyMetrics(LogMetrics):
    pass


def test_bundled_loggers_say_that_they_draw_nothing_and_their_subclasses_do_not(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log.jsonl")
    assert not draws_own(LogMetrics(backend))
    assert draws_own(MyMetrics(backend))
    assert draws_own(LogVisualization(lambda learner: None, backend))
    mine = MyMetrics(backend)
    mine.stochastic = False
    assert not draws_own(mine)
    assert not draws_own(CustomCallback(lambda learner: None, BatchEnd))  # it draws training's numbers


def test_a_handler_of_a_user_s_that_was_added_to_a_bundled_logger_draws_numbers_of_its_own(tmp_path: Path) -> None:
    """The logger declares that it draws nothing, which says nothing about a handler that a user adds."""
    before = dict(LogMetrics._handlers)
    try:

        @on(BatchEnd, TrainingPhase, LogMetrics, access={})
        def sample(callback: LogMetrics, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            draw()

        logs = LogMetrics(JsonlBackend(tmp_path / "log.jsonl"))
        assert draws_own(logs)
        assert train(logs) == train()
    finally:
        LogMetrics._handlers.clear()
        LogMetrics._handlers.update(before)


def test_a_bundled_logger_is_called_as_it_is(tmp_path: Path) -> None:
    """A bundled logger runs at every batch, so it is neither wrapped for random numbers nor given copies."""
    learner = tiny_learner(LogMetrics(JsonlBackend(tmp_path / "log.jsonl")))
    handlers = learner.callbacks.plan(BatchEnd, TrainingPhase).handlers
    planned = next(each for each in handlers if "LogMetrics" in each.label)
    assert planned.call == planned.handler.bind(planned.callback)
    twins = learner.state.cbstate.__twins__
    assert planned.view.cbstate.metrics_step is twins.metrics_step


# --- refusals and their messages


def strict(callback: Callback) -> str:
    with pytest.raises(UndeclaredWriteError) as caught:
        tiny_learner(callback, strict=True).fit(1)
    return str(caught.value)


def test_strict_mode_finds_who_says_that_it_draws_nothing() -> None:
    callback = Consumer(lambda number: draw())
    callback.stochastic = False
    text = strict(callback)
    assert "changed resource.rng and does not declare to write it. It declares {}. It says stochastic = False" in text
    assert "and drew random numbers: remove that, and it draws from its own generators." in text
    assert "Write()" not in text


def test_strict_mode_says_what_a_function_of_a_bundled_callback_can_do() -> None:
    def noisy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.rand(())

    text = strict(Metrics(noisy))
    assert text.partition("\n")[0].endswith(
        "A function that it was given drew random numbers of training: let it draw from a generator of its own, such "
        "as torch.Generator() or random.Random(0)."
    )
    text = strict(CustomCallback(lambda learner: draw(), BatchEnd))
    assert 'It drew random numbers: declare:\n\n    {"resource.rng": Write()}' in text


class Declares(Consumer):
    def state_access(self) -> Access:
        return {"resource.rng": Write()}


def test_a_consumer_need_not_declare_the_generators() -> None:
    with pytest.raises(CallbackError) as caught:
        tiny_learner(Declares(lambda number: None))
    assert str(caught.value) == (
        "Declares is deferrable and declares Write() on 'resource.rng', training's random numbers. A deferrable "
        "callback has random numbers of its own, from the seed of the run, its name and the number of the event: leave "
        "'resource.rng' out. Set deferrable = False if it must draw those of training."
    )


class Plain(Callback):
    stochastic: Any = True

    @on(BatchEnd)
    def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None: ...


def test_stochastic_means_something_only_for_a_consumer() -> None:
    with pytest.raises(CallbackError, match=r"Plain says stochastic = True and is not deferrable.*set deferrable = T"):
        tiny_learner(Plain())
    wrong = Consumer(lambda number: None)
    untyped(wrong).stochastic = "yes"
    with pytest.raises(CallbackError, match=r"Consumer\.stochastic is 'yes'\. It is True or False"):
        tiny_learner(wrong)


class Suggested(Callback):
    deferrable = True

    def setup(self, learner: LearnerView) -> None:
        draw()

    @on(BatchEnd, TrainingPhase)
    def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.found = draw(), learner.batch.outputs.numpy().sum()


@pytest.mark.cpu_only("makes numpy arrays of tensors")
@pytest.mark.parametrize("says", [None, True, False])
def test_suggest_access_does_not_suggest_what_is_refused(says: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    callback = Suggested()
    callback.stochastic = says
    found = tiny_learner().suggest_access(callback)
    assert found.union == ((("batch", "outputs"), Read()),)
    assert found.failure is None
    assert "rng" not in capsys.readouterr().out


# --- seed_everything


def drawn() -> tuple[float, float, list[float]]:
    return random.random(), float(np.random.rand()), torch.rand(2).tolist()


def test_one_seed_for_all_generators_which_is_returned() -> None:
    number: Any = np.int64(42)
    with own_numbers(0):
        assert seed_everything(number) == 42
        first = drawn()
        assert drawn() != first
        assert type(seed_everything(number)) is int
        assert drawn() == first
        assert torch.initial_seed() == 42
        seed_everything(43)
        assert drawn() != first
        assert flowtrain.seed_everything is seed_everything


def test_a_program_of_its_own(programs: Programs) -> None:
    program = "import flowtrain; flowtrain.seed_everything(5); import numpy; print(numpy.random.rand())"
    expected = np.random.RandomState(5).rand()
    done = programs.run(program)
    assert float(done.stdout) == expected


@pytest.mark.parametrize("deterministic", [True, "warn"])
def test_deterministic_algorithms(deterministic: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    was = torch.are_deterministic_algorithms_enabled()
    try:
        with own_numbers(0):
            seed_everything(1)
            assert (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark) == (was, True)
            assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
            seed_everything(1, deterministic=deterministic)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() is (deterministic == "warn")
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(was)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "seed_everything(-1): the seed is a whole number from 0 to 2**32 - 1, such as 42."),
        ((2**32,), "seed_everything(4294967296): the seed is a whole number from 0 to 2**32 - 1, such as 42."),
        ((True,), "seed_everything(True): the seed is a whole number from 0 to 2**32 - 1, such as 42."),
        (("a",), "seed_everything('a'): the seed is a whole number from 0 to 2**32 - 1, such as 42."),
        ((1, "yes"), "seed_everything(deterministic='yes'): deterministic is True, False or 'warn'."),
    ],
)
def test_seeds_that_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    before = torch.initial_seed()
    with pytest.raises(UsageError) as caught:
        seed_everything(arguments[0], **({"deterministic": arguments[1]} if len(arguments) > 1 else {}))
    assert str(caught.value) == message
    assert torch.initial_seed() == before
