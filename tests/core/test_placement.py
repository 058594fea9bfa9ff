"""Placement: what of a batch goes where, in which memory format."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from flowtrain import AbstractTrainingPhase, CoreError, Learner, StepContext, TorchCore, TrainingPhase


def learner_of(core: TorchCore) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    data = [(torch.randn(5, 3, 8, 8), torch.randint(2, (5,))) for _ in range(3)]
    return Learner(model, cross_entropy, data=data, core=core, default_callbacks="quiet")


def test_channels_last_reaches_model_and_data_and_changes_no_value() -> None:
    last, plain = learner_of(TorchCore("cpu", channels_last=True)), learner_of(TorchCore("cpu"))
    for learner in (last, plain):
        learner.fit(1)
    assert last.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert last.batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert last.batch.targets.dim() == 1
    assert not plain.batch.inputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.model[0].weight, plain.model[0].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("options", "lag"), [({}, 0), ({"lag": 3}, 3), ({"lag": 0}, 0)])
def test_the_lag_of_the_cpu(options: dict[str, int], lag: int) -> None:
    learner = learner_of(TorchCore("cpu", **options))  # type: ignore[arg-type]
    assert learner.state.lag == lag


def test_a_copy_of_a_core_keeps_what_it_was_told() -> None:
    core = TorchCore("cpu", "bf16", 2, 1.0, True, clip_grad_value=0.5, lag=1, channels_last=True, prefetch=False)
    assert vars(core.like().settings) == {**vars(core.settings), "compile": False}


def test_a_loader_of_another_length_than_it_says_loses_no_gradient() -> None:
    """Rule 16: its last group is updated with behind the last batch, and is a shorter one."""

    class Lies(list[Any]):
        def __len__(self) -> int:
            return 5

    made = torch.Generator().manual_seed(1)
    batches = [(torch.randn(2, 3, 8, 8, generator=made), torch.tensor([0, 1])) for _ in range(7)]
    for given in (3, 4, 5, 6, 7):
        lying, true = (learner_of(TorchCore("cpu", accumulate=4)) for _ in range(2))
        lying.epoch(TrainingPhase, Lies(batches[:given]))
        true.epoch(TrainingPhase, batches[:5])
        true.epoch(TrainingPhase, batches[5:given]) if given > 5 else None
        if given < 5:
            true = learner_of(TorchCore("cpu", accumulate=4))
            true.epoch(TrainingPhase, batches[:given])
        assert all(map(torch.equal, lying.model.state_dict().values(), true.model.state_dict().values())), given


def test_tf32_is_for_cuda() -> None:
    before = torch.get_float32_matmul_precision()
    learner_of(TorchCore("cpu", tf32=True))
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(CoreError, match="tf32 is True, False or None; got 'high'"):
        TorchCore(tf32="high")  # type: ignore[arg-type]


class Batch(list[Any]):
    """Can be referred to weakly."""


class Own(AbstractTrainingPhase):
    """Never places what it gets, so that it is the epoch that has to let go of it."""

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self):
            pass


def test_a_fed_batch_is_forgotten_when_the_epoch_ends() -> None:
    alive: list[weakref.ref[Batch]] = []

    class Ahead:
        def start(self, raw: object) -> object:
            return raw

        def finish(self, moving: tuple[torch.Tensor, torch.Tensor]) -> Batch:
            batch = Batch(moving)
            alive.append(weakref.ref(batch))
            return batch

    learner = learner_of(TorchCore("cpu", prefetch=Ahead()))
    learner.epoch(Own, learner.data[TrainingPhase][:2])
    assert len(alive) == 2
    assert [each() for each in alive] == [None, None]
