"""After a batch nothing refers to its tensors; the tool names the object that does."""

from __future__ import annotations

import gc
import weakref
from collections import UserList, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowtrain import BatchEnd, Callback, Learner, LearnerView, Phase, Read, TorchCore, TrainingPhase, on
from flowtrain.callbacks import Metrics, SmoothLoss, Traces
from flowtrain.metrics import mean_squared_error
from flowtrain.testing import holders, leaks, tiny_batches, tiny_learner
from tests.support.nested import Slotted
from tests.support.untyped import untyped

KEPT: list[Any] = []


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    """Let the collector see all objects again, since a holder may be older than the test: see `freeze_imports`."""
    gc.unfreeze()
    yield
    gc.freeze()


class Keeper(Callback):
    """Keeps the outputs of every batch, with their graphs."""

    def __init__(self) -> None:
        self.outputs: list[torch.Tensor] = []

    def state_access(self) -> dict[str, Any]:
        return {"batch.outputs": Read()}

    @on(BatchEnd, TrainingPhase)
    def keep(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.outputs.append(learner.batch.outputs)


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_nothing_of_a_batch_is_held_by_the_library(lag: int, executor: str) -> None:
    traces = Traces({"Norm": lambda view: view.batch.outputs.norm()}, TrainingPhase)
    with Learner(
        torch.nn.Linear(1, 1),
        torch.nn.functional.mse_loss,
        data=(tiny_batches(n_batches=6), tiny_batches(n_batches=3)),
        callbacks=[Metrics(mean_squared_error), SmoothLoss(), traces],
        default_callbacks=True,
        executor=executor,
        core=TorchCore("cpu", lag=lag),
    ) as learner:
        assert leaks(learner) == []


def test_who_keeps_a_batch_is_named() -> None:
    learner = tiny_learner(Keeper(), n_batches=3)
    assert leaks(learner) == [
        "batch.outputs of batch 1 of TrainingPhase is held by Keeper.outputs[0]",
        "batch.outputs of batch 2 of TrainingPhase is held by Keeper.outputs[1]",
        "batch.outputs of batch 3 of TrainingPhase is held by Keeper.outputs[2]",
    ]
    assert not [callback for callback in learner.callbacks if callback.name.startswith("CustomCallback")]


class Thing:
    """An object that allows weak references."""


def in_a_module(thing: Thing) -> Any:
    KEPT.append(thing)
    return None


def in_a_closure(thing: Thing) -> Callable[[], Thing]:
    return lambda: thing


def test_chains_end_at_something_with_a_name() -> None:
    thing = Thing()
    in_a_module(thing)
    assert holders(thing) == [f"module {__name__}['KEPT'][0]"]
    KEPT.clear()
    assert holders(thing) == [], "frames of `holders` and of its caller do not count"
    keeper = Keeper()
    untyped(keeper).outputs = {"a": [1, thing]}
    assert holders(thing) == ["Keeper.outputs['a'][1]"]


@pytest.mark.parametrize(
    ("make", "link"),
    [
        (lambda thing: deque([0, thing]), "[1]"),
        (lambda thing: UserList([thing]), ".data[0]"),
        (lambda thing: Slotted(thing), ".image"),
        (lambda thing: SimpleNamespace(a=(thing,)), ".a[0]"),
    ],
    ids=["deque", "UserList", "slots", "SimpleNamespace"],
)
def test_a_chain_through_any_container_is_written_out(make: Callable[[Any], Any], link: str) -> None:
    thing = Thing()
    KEPT.append(make(thing))
    assert holders(thing) == [f"module {__name__}['KEPT'][0]{link}"]
    KEPT.clear()


def test_a_generator_that_waits_is_no_secret() -> None:
    def waiting(held: Thing) -> Any:
        yield held

    thing = Thing()
    generator = waiting(thing)
    next(generator)
    found = weakref.ref(thing)
    del thing
    [text] = holders(found())
    assert "waiting() in " in text
    assert text.endswith("local held")
