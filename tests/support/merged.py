"""Ranks that are trained one after another in this process, and merge what they have measured."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

from flowtrain import Callback, EpochEnd, Learner, LearnerView, Phase, on

__all__ = ["ranked"]


class Between(Callback):
    """Calls a function before the other handlers of `EpochEnd`, where ranks meet."""

    def __init__(self) -> None:
        self.meet: Callable[[], None] = lambda: None

    @on(EpochEnd)
    def call(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        self.meet()


def ranked(
    make: Callable[[Any, Callback], Learner], parts: Sequence[Any], run: Callable[[Learner], Any]
) -> list[Learner]:
    """Return a learner for each rank after a run in which the ranks have merged what they measured in each epoch.

    Every rank runs twice: once to see what it measures, and once more, with a new learner, to merge that of all ranks.
    So what is merged in an epoch must not change what is measured in a later one.

    Args:
        make: A function of the data of a rank and of a callback, to go first in the list, that makes a learner.
        parts: The data of each rank.
        run: A function that runs a learner.
    """
    measured: list[list[bytes]] = []
    for part in parts:
        between, own = Between(), list[bytes]()
        learner = make(part, between)

        def note(learner: Learner = learner, own: list[bytes] = own) -> None:
            own.append(pickle.dumps({each.name: each.rank_state() for each in learner.callbacks}))

        between.meet = note
        run(learner)
        measured.append(own)
    merged = []
    for part in parts:
        between = Between()
        learner = make(part, between)
        epochs = zip(*measured, strict=True)

        def merge(learner: Learner = learner, epochs: Any = epochs) -> None:
            states = [pickle.loads(state) for state in next(epochs)]
            for each in learner.callbacks:
                each.merge_ranks([state[each.name] for state in states])

        between.meet = merge
        run(learner)
        merged.append(learner)
    return merged
