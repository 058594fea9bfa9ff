"""The shuffled executor: every order that the edges allow (that it keeps the rules is in the tests of the contract)."""

from __future__ import annotations

import pytest

from flowtrain import BatchEnd, Callback, Event, LearnerView, Phase, TrainingPhase, on
from flowtrain.errors import ExecutorError
from flowtrain.testing import ShuffledExecutor, tiny_learner


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
