"""The number of calls that a training step adds to a hand-written loop: calls are exact, times are left to ``bench/``.

Calls are counted with `sys.setprofile` in every thread, with the garbage collector off and without redraws. The costs
of an epoch are removed by comparing a long run with a short one. If a limit is exceeded, the message lists the
functions that are called more often than in the hand-written loop, so that the new one can be seen.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any, Literal

import pytest
import torch

from flowtrain import (
    BatchBegin,
    BatchEnd,
    Callback,
    FitEnd,
    Learner,
    LearnerView,
    Phase,
    TrainingPhase,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import MetricsPrinter, ProgressBar

FEW, MANY = 10, 60
"""The steps of the short and the long run; the difference is divided by their difference."""

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Run = Callable[[Batches], object]


@dataclass(frozen=True, repr=False)
class Calls:
    """Calls by function, in one step."""

    python: Counter[str]
    c: Counter[str]

    def over(self, floor: Calls) -> Calls:
        """Return the calls in excess of those of `floor`; a negative number means that `floor` makes more."""
        return Calls(_minus(self.python, floor.python), _minus(self.c, floor.c))

    def __repr__(self) -> str:
        lines = ["extra calls of one step:"]
        for kind, calls in (("Python", self.python), ("C", self.c)):
            lines.append(f"  {kind}: {calls.total():g}")
            lines += [f"    {count:+g} {name}" for name, count in sorted(calls.items())]
        return "\n".join(lines)


def _minus(calls: Counter[str], floor: Counter[str]) -> Counter[str]:
    # `Counter.__sub__` would drop negative counts.
    return Counter({name: calls[name] - floor[name] for name in {*calls, *floor} if calls[name] != floor[name]})


def count(run: Run) -> Calls:
    """Count the calls of one step of `run`, and fail if they are not the same in every step."""
    run(_batches(FEW))  # fills caches and makes the optimizer's state
    short, long = _profile(run, FEW), _profile(run, MANY)
    return Calls(_a_step(short.python, long.python), _a_step(short.c, long.c))


def _a_step(short: Counter[str], long: Counter[str]) -> Counter[str]:
    calls = Counter[str]()
    for name, more in _minus(long, short).items():
        calls[name], rest = divmod(more, MANY - FEW)
        assert rest == 0, f"{name} is not called equally often in each step: {more} times in {MANY - FEW} steps"
    return calls


def _profile(run: Run, steps: int) -> Calls:
    data = _batches(steps)
    counted = Calls(Counter(), Counter())

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            counted.python[f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"] += 1
        elif event == "c_call":
            counted.c[f"{argument.__module__ or ''}.{argument.__qualname__}"] += 1

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run(data)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return counted


def _batches(steps: int) -> Batches:
    return [(torch.ones(4, 3), torch.ones(4, 2)) for _ in range(steps)]


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))


def hand_written() -> Run:
    """Train in a hand-written loop, whose calls are the floor."""
    model, lossfn = _model(), torch.nn.functional.mse_loss
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run(data: Batches) -> None:
        for inputs, targets in data:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = lossfn(outputs, targets)
            loss.backward()
            optimizer.step()

    return run


def learning(*callbacks: Callback, default_callbacks: bool | Literal["quiet"] = False) -> Run:
    """Train in the same way with a learner."""
    learner = Learner(
        _model(),
        torch.nn.functional.mse_loss,
        optimizer=partial(torch.optim.SGD, lr=0.01),
        callbacks=callbacks,
        default_callbacks=default_callbacks,
    )
    return lambda data: learner.epoch(TrainingPhase, data)


def hand_written_validation() -> Run:
    """Validate in a hand-written loop, whose calls are the floor."""
    model, lossfn = _model(), torch.nn.functional.mse_loss

    def run(data: Batches) -> None:
        with torch.no_grad():
            for inputs, targets in data:
                outputs = model(inputs)
                lossfn(outputs, targets)

    return run


class NoOp(Callback):
    """Handles the end of each batch and does nothing."""

    @on(BatchEnd)
    def nothing(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        pass


class Elsewhere(Callback):
    """Has handlers only for events that a training step does not fire."""

    @on(FitEnd)
    def at_the_end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        pass

    @on(BatchBegin, ValidationPhase)
    def in_validation(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.fixture
def floor() -> Calls:
    return count(hand_written())


def test_the_count_is_exact(floor: Calls) -> None:
    assert repr(count(hand_written()).over(floor)) == "extra calls of one step:\n  Python: 0\n  C: 0"
    assert floor.python["torch.nn.modules.linear.Linear.forward"] == 2
    assert floor.c["torch._C._nn.linear"] == 2


def test_a_step_without_callbacks(floor: Calls) -> None:
    extra = count(learning()).over(floor)
    assert extra.python.total() <= 8, extra
    assert extra.c.total() <= 15, extra


def test_a_validation_step_without_callbacks() -> None:
    learner = Learner(_model(), torch.nn.functional.mse_loss, default_callbacks=False)
    extra = count(lambda data: learner.epoch(ValidationPhase, data)).over(count(hand_written_validation()))
    assert extra.python.total() <= 8, extra
    assert extra.c.total() <= 15, extra


def test_a_step_with_the_quiet_defaults(floor: Calls) -> None:
    extra = count(learning(default_callbacks="quiet")).over(floor)
    assert extra.python.total() <= 14, extra


def test_a_step_with_a_silent_bar() -> None:
    # The bar reads the clock; in a step without a redraw it must not read the state.
    bar = [ProgressBar(redraw=1e9, report=1e9), MetricsPrinter()]
    extra = count(learning(*bar, default_callbacks="quiet")).over(count(learning(default_callbacks="quiet")))
    assert extra.python.total() <= 1, extra
    assert extra.c.total() <= 1, extra


@pytest.mark.parametrize("more", [1, 7])
def test_a_handler_is_one_call(more: int) -> None:
    one = count(learning(NoOp()))
    extra = count(learning(NoOp(), *(NoOp() for _ in range(more)))).over(one)
    assert extra.python == {f"{__name__}.NoOp.nothing": more}, extra
    assert not extra.c, extra


def test_the_first_handler_of_an_event_is_two_calls() -> None:
    """One call is the loop over the plan, the other is the handler."""
    extra = count(learning(NoOp())).over(count(learning()))
    assert extra.python.total() == 2, extra
    assert extra.python[f"{__name__}.NoOp.nothing"] == 1, extra


@pytest.mark.parametrize("others", [(), (NoOp,)], ids=["alone", "beside a handler"])
def test_a_callback_without_a_handler_costs_nothing(others: tuple[type[Callback], ...]) -> None:
    """Rule 2: a callback without a handler for the event costs nothing at that event."""
    without = count(learning(*(kind() for kind in others)))
    extra = count(learning(*(kind() for kind in others), *(Elsewhere() for _ in range(5)))).over(without)
    assert not extra.python, extra
    assert not extra.c, extra


def test_nothing_heavy_is_imported() -> None:
    """``import flowtrain`` imports the modules that torch does not need only on demand."""
    script = (
        "import sys, torch; before = set(sys.modules); import flowtrain; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout
    for name in ("networkx", "rich", "dask", "distributed", "sklearn", "torchmetrics"):
        assert f"'{name}'" not in loaded, f"import flowtrain imports {name}; new with it: {loaded}"
