"""Random ranks do random things at random events of every way to train: all ranks end alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy

from flowtrain import (
    AbstractTrainingPhase,
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    Learner,
    LossBegin,
    Phase,
    StepContext,
    TorchCore,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
)
from tests.ranks.alone import Alone, End, Unsized, fit, model
from tests.ranks.by_hand import classes
from tests.support.ranks import Ranks, rank, returned

EVENTS: list[type[Event]] = [
    FitBegin, EpochBegin, BatchBegin, LossBegin, BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd,
    BatchCancelled, EpochEnd, FitEnd,
]  # fmt: skip
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Own(AbstractTrainingPhase):
    """The bundled step, written by a user."""

    def step(self, learner: StepContext, raw: Any) -> None:
        inputs, targets = raw
        with learner.run_batch(self, inputs=inputs, targets=targets) as batch:
            with learner.forward():
                batch.outputs = learner.model(batch.inputs)
                batch.loss = learner.lossfn(batch.outputs, batch.targets)
            learner.backward(self, batch.loss)
            learner.update(self)


class Two(AbstractTrainingPhase):
    """Updates two models one after the other with each batch."""

    def step(self, learner: StepContext, raw: Any) -> None:
        inputs, targets = raw
        with learner.run_batch(self, inputs=inputs, targets=targets) as batch:
            for name in ("one", "two"):
                with learner.forward():
                    batch.loss = learner.lossfn(learner.model[name](batch.inputs), batch.targets)
                learner.backward(self, batch.loss, name)
                learner.update(self, name)


def two() -> dict[str, nn.Module]:
    torch.manual_seed(4)
    return {"one": nn.Linear(12, 4), "two": nn.Sequential(nn.Linear(12, 4), nn.BatchNorm1d(4))}


def data(phase: type[Phase] = TrainingPhase, batches: int = 7, wrap: Callable[[Any], Any] = list) -> dict[Any, Any]:
    return {phase: wrap(classes(batches)), ValidationPhase: classes(2)}


def by_steps(learner: Learner) -> object:
    return learner.fit(steps=10, validate_every=3)


def by_epochs(learner: Learner) -> None:
    for _ in range(2):
        learner.epoch(TrainingPhase)
        learner.validate()


WAYS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "accumulation": lambda: {"data": data(), "core": TorchCore(device="cpu", accumulate=3)},
    "clipping and accumulation": lambda: {"core": TorchCore(device="cpu", accumulate=2, clip_grad_norm=0.1)},
    "without a length": lambda: {"data": data(wrap=Unsized)},
    "accumulation without a length": lambda: {
        "data": data(wrap=Unsized), "core": TorchCore(device="cpu", accumulate=2),
    },
    "uneven": lambda: {"data": data(batches=4 + rank())},
    "own step": lambda: {"phase": Own, "data": data(Own, 4)},
    "own step, accumulation": lambda: {
        "phase": Own, "data": data(Own, 5), "core": TorchCore(device="cpu", accumulate=2),
    },
    "own step without a length": lambda: {"phase": Own, "data": data(Own, 4, Unsized)},
    "two models": lambda: {
        "phase": Two, "data": {Two: classes(4)}, "model": two(), "optimizer": {"one": SGD, "two": SGD},
    },
    "steps": lambda: {"run": by_steps},
    "epochs": lambda: {"run": by_epochs},
    "a frozen part": lambda: {"model": frozen()},
}  # fmt: skip


def frozen() -> nn.Module:
    made: Any = model()
    made[0].requires_grad_(False)
    return made  # type: ignore[no-any-return]  # a module


def scenarios(seed: int, size: int) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Return random ways to train, each with random actions: event, phase, action, its firing, and rank."""
    draw = random.Random(seed)
    found = list[tuple[str, list[tuple[Any, ...]]]]()
    for way in draw.sample(sorted(WAYS), len(WAYS)):
        acts = [
            (
                draw.choice(EVENTS),
                draw.choice([Phase, Phase, ValidationPhase]),
                draw.choice(["batch", "epoch", "fit", "error", *["SIGTERM"] * (way != "epochs")]),  # seen in a fit
                draw.randint(1, 6),
                draw.randrange(size),
            )
            for _ in range(draw.choice([1, 1, 2, 3]))
        ]
        found.append((way, acts))
    return found


def shown(acts: Sequence[tuple[Any, ...]]) -> str:
    """Return actions as text."""
    return "; ".join(
        f"{action} at {event.__name__} {nth} of {phase.__name__} on rank {number}"
        for event, phase, action, nth, number in acts
    )


def run(seed: int, size: int) -> list[End]:
    """Run random scenarios; a process group of their own time-out makes a rank that waits fail, and not hang."""
    dist.init_process_group("gloo")
    ends = list[End]()
    for way, acts in scenarios(seed, size):
        print(way, shown(acts), flush=True)
        ends.append(fit(*(Alone(*act) for act in acts), **WAYS[way]()))
    return ends


def kind(end: End) -> str:
    """Return how a fit has ended, by its kind."""
    if end.error is not None:
        return "interrupt" if end.error.kind == "KeyboardInterrupt" else "error"
    return "returned" if end.stopped is None else "stopped"


@pytest.mark.parametrize(("seed", "size"), [*((seed, 2) for seed in range(8)), (100, 4)])
def test_all_ranks_end_alike(seed: int, size: int, ranks: Ranks) -> None:
    outcomes = ranks.run_on(size, 30, run, seed, size)
    main, *others = returned(outcomes)
    for other in others:
        for (way, acts), one, two in zip(scenarios(seed, size), main, other, strict=True):
            case = f"{way}: {shown(acts)}\n{one}\n{two}"
            if "error" in (kind(one), kind(two)):
                assert {kind(one), kind(two)} <= {"error", "interrupt"}, case  # a rank that has both is interrupted
                assert parameters(one) == parameters(two), case
                continue
            assert kind(one) == kind(two), case
            assert one.weights == two.weights, case
            assert (one.counts[0], one.counts[3]) == (two.counts[0], two.counts[3]), case
            assert one.unlike(two) == [], case


def parameters(end: End) -> dict[str, Any]:
    """Return the weights of a rank without buffers, which a rank changes in a batch that an error of another ends."""
    return {path: bits for path, bits in end.weights.items() if "buffers" not in path}


def failing(way: str) -> End:
    dist.init_process_group("gloo")
    return fit(Alone(BatchBegin, Phase, "error", 2, 0), **WAYS[way](), lossfn=cross_entropy)


@pytest.mark.parametrize("way", WAYS)
def test_an_error_of_the_main_rank_is_told_to_the_others(way: str, ranks: Ranks) -> None:
    main, other = ranks.values(failing, way)
    assert main.error is not None
    assert other.error is not None
    assert (main.error.kind, main.error.text) == ("ValueError", "only here")
    assert other.error.kind == "RemoteError"
    assert other.error.text.startswith("rank 0: ValueError: only here")
    assert parameters(main) == parameters(other)
