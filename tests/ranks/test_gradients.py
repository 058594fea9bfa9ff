"""Gradients of other kinds than dense real numbers: a rank that leaves a batch sends zeros of the same kind."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from flowtrain import AbstractTrainingPhase, BatchBegin, LossBegin, TorchCore, TrainingPhase
from tests.ranks.alone import Alone, End, fit
from tests.ranks.test_ways import Own
from tests.support.ranks import Ranks, of_complex, rank, returned


class Words(nn.Module):
    """Looks up the rows of words, whose gradients are sparse, and computes 4 classes from their mean."""

    def __init__(self, *, bag: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        kind: Any = nn.EmbeddingBag if bag else nn.Embedding
        self.rows, self.classes = kind(20, 8, sparse=True), nn.Linear(8, 4)

    def forward(self, words: torch.Tensor) -> Any:
        found = self.rows(words)
        return self.classes(found if found.dim() == 2 else found.mean(1))


class Turns(nn.Module):
    """Computes 4 classes with complex parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.turn = nn.Parameter(torch.randn(5, 4, dtype=torch.complex64))

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return (words.float() @ self.turn.real) * self.turn.imag.sum(0)


MODELS: dict[str, Any] = {"sparse": Words, "bag": partial(Words, bag=True), "complex": Turns}


def words() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the batches of this rank: 5 words for each of 6 samples, and their classes."""
    draw = torch.Generator().manual_seed(rank())
    return [(torch.randint(20, (6, 5), generator=draw), torch.randint(4, (6,), generator=draw)) for _ in range(4)]


def train(kind: str, action: str, event: Any, nth: int, accumulate: int, phase: type[AbstractTrainingPhase]) -> End:
    dist.init_process_group("gloo")
    alone = [Alone(event, phase, action, nth)] if action else []
    return fit(
        *alone, model=MODELS[kind](), phase=phase, data={phase: words()},
        optimizer=partial(torch.optim.SGD, lr=0.1), core=TorchCore(device="cpu", accumulate=accumulate),
    )  # fmt: skip


@pytest.mark.parametrize(("accumulate", "phase"), [(1, TrainingPhase), (2, TrainingPhase), (1, Own)])
@pytest.mark.parametrize("action", ["", "batch", "error"])
@pytest.mark.parametrize("kind", MODELS)
def test_all_ranks_end_alike(kind: str, action: str, accumulate: int, phase: Any, ranks: Ranks) -> None:
    for event, nth in [(BatchBegin, 1), (LossBegin, 2)] if action and phase is TrainingPhase else [(BatchBegin, 2)]:
        outcomes = ranks.run(train, kind, action, event, nth, accumulate, phase)
        zero, one = of_complex(outcomes) if kind == "complex" else returned(outcomes)
        assert zero.unlike(one) == []
        assert (zero.error is None) == (one.error is None) == (action != "error")
        if zero.error is not None:
            assert zero.error.text.startswith("rank 1: ValueError: only here")
