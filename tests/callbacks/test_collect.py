"""GarbageCollect: off during epochs, collections where they are due, and the collector put back whatever happens."""

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


@pytest.fixture(params=[True, False], ids=["on", "off"])
def enabled(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the automatic collection is on before training; the state before the test is put back."""
    before = gc.isenabled()
    (gc.enable if request.param else gc.disable)()
    yield request.param
    (gc.enable if before else gc.disable)()


class Cycle:
    """Refers to itself, so only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


class Litters(Callback):
    """Make a cycle in every batch, and count those that are still there; raise in one batch.

    Attributes:
        alive: After each batch, how many of the cycles made in earlier batches are there.
        automatic: After each batch, whether the automatic collection was on.
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
    # The collection comes before what the third and sixth batch make; it frees those made before.
    assert litters.alive == [0, 1, 0, 1, 2, 0, 1]
    assert litters.automatic == [False] * 7
    assert gc.isenabled() is enabled
    assert not [made for made in vars(litters)["_made"] if made() is not None]  # at the end of the epoch: all of them


@pytest.mark.parametrize("failure", [CancelEpochException, CancelFittingException, ValueError, KeyboardInterrupt])
def test_the_collector_is_put_back_whatever_ends_the_epoch(enabled: bool, failure: type[BaseException]) -> None:
    learner = tiny_learner(GarbageCollect(), Litters(failure()), n_batches=4)
    with contextlib.suppress(ValueError, KeyboardInterrupt):
        learner.fit(1)
    assert gc.isenabled() is enabled


def test_the_count_goes_on_after_a_checkpoint() -> None:
    """Counted over the callback's life: 2 batches before, so the next one is the third."""
    first = GarbageCollect(every=3)
    tiny_learner(first, n_batches=2).epoch(TrainingPhase)
    second, litters = GarbageCollect(every=3), Litters()
    second.load_state_dict(first.state_dict())
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
