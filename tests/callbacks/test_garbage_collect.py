"""GarbageCollect: collections only at its intervals during epochs, and the collector's setting restored afterwards."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from flowtrain import (
    BatchEnd,
    Callback,
    CancelEpochException,
    CancelFittingException,
    LearnerView,
    TrainingPhase,
    UsageError,
    on,
)
from flowtrain.callbacks import GarbageCollect
from flowtrain.testing import assert_equivalent, tiny_learner

pytestmark = pytest.mark.usefixtures("freeze_what_is_there")


@pytest.fixture(params=[True, False], ids=["on", "off"])
def enabled(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Set whether automatic collection is on before training; restore the setting after the test."""
    before = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before else gc.disable)()


class Cycle:
    """Refers to itself, so that only the garbage collector frees it."""

    def __init__(self) -> None:
        self.itself = self


class Litters(Callback):
    """Makes a cycle in every batch and counts the living ones; raises in one batch.

    Attributes:
        alive: For each batch, how many cycles of earlier batches are alive at its end.
        automatic: For each batch, whether automatic collection was on at its end.
    """

    def __init__(self, fails: BaseException | None = None, at: int = 3) -> None:
        self.fails, self.at = fails, at
        self.alive: list[int] = []
        self.automatic: list[bool] = []
        self._made: list[weakref.ref[Cycle]] = []

    @on(BatchEnd, TrainingPhase)
    def litter(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.alive.append(sum(made() is not None for made in self._made))
        self.automatic.append(gc.isenabled())
        self._made.append(weakref.ref(Cycle()))
        if self.fails is not None and len(self.alive) == self.at:
            raise self.fails


def test_collects_every_n_batches_and_leaves_the_collector_as_it_was(enabled: bool) -> None:
    litters = Litters()
    learner = tiny_learner(GarbageCollect(every=3), litters, n_batches=7)
    learner.epoch(TrainingPhase)
    # The collection runs before batches 3 and 6 make their cycles, so it frees only the cycles of earlier batches.
    assert litters.alive == [0, 1, 0, 1, 2, 0, 1]
    assert litters.automatic == [False] * 7
    assert gc.isenabled() is enabled
    assert not [made for made in vars(litters)["_made"] if made() is not None]  # the epoch's end collects all


@pytest.mark.parametrize("failure", [CancelEpochException, CancelFittingException, ValueError, KeyboardInterrupt])
def test_the_collector_is_put_back_whatever_ends_the_epoch(enabled: bool, failure: type[BaseException]) -> None:
    learner = tiny_learner(GarbageCollect(), Litters(failure()), n_batches=4)
    with contextlib.suppress(ValueError, KeyboardInterrupt):
        learner.fit(1)
    assert gc.isenabled() is enabled


def test_the_count_goes_on_after_a_checkpoint() -> None:
    """The interval counts over the callback's life: with 2 batches before the checkpoint, the next one is the third."""
    first = GarbageCollect(every=3)
    tiny_learner(first, n_batches=2).epoch(TrainingPhase)
    second, litters = GarbageCollect(every=3), Litters()
    second.load_state_dict({"counts": {"TrainingPhase": 2}})  # of early checkpoints; the condition has the count now
    second.conditions[0].load_state_dict(first.conditions[0].state_dict())
    tiny_learner(second, litters, n_batches=5).epoch(TrainingPhase)
    assert litters.alive == [0, 1, 2, 0, 1]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "10"])
def test_every_is_a_positive_whole_number(every: Any) -> None:
    with pytest.raises(UsageError, match=r"GarbageCollect\(\): every is a whole number, at least 1, got "):
        GarbageCollect(every=every)


def test_the_same_under_every_executor() -> None:
    assert_equivalent(
        lambda executor: tiny_learner(GarbageCollect(every=2), n_batches=3, executor=executor), executors=["dask"]
    )
