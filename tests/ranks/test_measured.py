"""What several ranks measure and log, in real processes: one value of an epoch, and one log."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowtrain import Learner, Phase, RankError, TrainingPhase, ValidationPhase
from flowtrain.callbacks import (
    EMA,
    SWA,
    Checkpointer,
    EarlyStopping,
    LearningRate,
    LogMetrics,
    Metric,
    Metrics,
    Scheduler,
    reduce_on_plateau,
)
from flowtrain.callbacks.stopping import NumberLimit
from flowtrain.logging import JsonlBackend
from flowtrain.metrics import accuracy
from tests.support.logs import log_records
from tests.support.ranks import Ranks, rank, returned

PHASES: tuple[type[Phase], ...] = (TrainingPhase, ValidationPhase)


def batches(sizes: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def learner_of(train: Any, valid: Any, *callbacks: Any, **options: Any) -> Learner:
    torch.manual_seed(0)
    return Learner(
        options.pop("model", torch.nn.Linear(4, 3)),
        torch.nn.functional.cross_entropy,
        data=(train, valid),
        optimizer=partial(torch.optim.SGD, lr=options.pop("lr", 0.1)),
        callbacks=callbacks,
        default_callbacks="quiet",
        **options,
    )


def numbers() -> tuple[int, int, int]:
    learner = learner_of(batches([2]), batches([2]))
    return learner.rank, learner.world_size, rank()


def test_a_program_knows_the_number_of_its_process(ranks: Ranks) -> None:
    assert ranks.values(numbers) == [(0, 2, 0), (1, 2, 1)]


class Largest:
    """An accumulator that merges ranks itself. Importing torchmetrics takes long in a process that has just begun."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.found.append(outputs.max().item())

    def compute(self) -> float:
        return max(self.found)

    def reset(self) -> None:
        self.found = []

    def rank_state(self) -> list[float]:
        return self.found

    def merge_ranks(self, states: Sequence[list[float]]) -> None:
        self.found = [each for state in states for each in state]


def metrics() -> Metrics:
    return Metrics(accuracy, Metric(Largest(), name="Largest"))


def values(learner: Learner) -> dict[str, list[tuple[int, float]]]:
    found = learner.cbstate.metrics_epoch
    return {f"{phase.__name__}.{name}": list(each) for phase in PHASES for name, each in found[phase].items()}


SIZES = {2: [[8, 5, 3], [7, 4]], 4: [[8, 5], [7], [4, 6], [3]]}
"""The sizes of the validation batches of each rank."""


def measured(size: int) -> tuple[dict[str, list[tuple[int, float]]], Any]:
    """Return the values of epochs on this rank, whose validation batches are some of all."""
    all_batches = batches([n for each in SIZES[size] for n in each])
    begin = sum(map(len, SIZES[size][: rank()]))
    own = all_batches[begin : begin + len(SIZES[size][rank()])]
    learner = learner_of(batches([8] * size)[rank() :][:1], own, metrics(), lr=0.0)
    learner.fit(2)
    return values(learner), learner.cbstate.history[ValidationPhase]


def test_the_values_of_an_epoch_are_those_of_one_process(ranks: Ranks) -> None:
    for size in (2, 4):
        found = returned(ranks.run_on(size, 60, measured, size))
        alone = learner_of(batches([8]), batches([n for each in SIZES[size] for n in each]), metrics(), lr=0.0)
        alone.fit(2)
        expected = {name: each for name, each in values(alone).items() if name.startswith("ValidationPhase")}
        for of_rank, counts in found:
            assert of_rank == found[0][0]
            assert {name: each for name, each in of_rank.items() if name in expected} == expected
            longest = max(map(len, SIZES[size]))
            assert counts == (2, 2 * longest, longest, 0)


def logged(folder: str, name: str, on_every_rank: bool) -> list[str]:
    logger = LogMetrics(JsonlBackend(Path(folder) / name))
    if on_every_rank:
        logger.ranks = "every"
    data = [batches([4, 4, 4, 4])[rank() :: 2]] * 2
    learner = learner_of(*data, logger)
    learner.fit(2)
    learner.close()
    return sorted(path.name for path in Path(folder).iterdir())


def test_one_log_is_written_once(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.run_on(2, 60, logged, str(tmp_path), "log.jsonl", False)
    assert [outcome.ended for outcome in outcomes] == ["returned"] * 2, "\n".join(map(str, outcomes))
    records = [(each["group"], each["name"], each["step"]) for each in log_records(tmp_path / "log.jsonl")]
    assert len(records) == len(set(records)) == 2 * (2 + 2 + 2)


def test_a_log_for_each_rank(ranks: Ranks, tmp_path: Path) -> None:
    outcomes = ranks.run_on(2, 60, logged, str(tmp_path), "log-{rank}.jsonl", True)
    assert [outcome.ended for outcome in outcomes] == ["returned"] * 2, "\n".join(map(str, outcomes))
    own = [log_records(tmp_path / f"log-{number}.jsonl") for number in range(2)]
    assert [len(records) for records in own] == [12, 12]
    epochs = [[each["value"] for each in records if each["group"].startswith("Epoch")] for records in own]
    steps = [[each["value"] for each in records if each["group"].startswith("Step")] for records in own]
    assert epochs[0] == epochs[1]
    assert steps[0] != steps[1]


def test_a_log_on_every_rank_needs_the_rank_in_its_path(ranks: Ranks, tmp_path: Path) -> None:
    for outcome in ranks.run_on(2, 60, logged, str(tmp_path), "log.jsonl", True):
        assert outcome.error is not None
        assert outcome.error.kind == RankError.__name__
        assert outcome.error.text == (
            f"LogMetrics has ranks = 'every' and logs to JsonlBackend('{tmp_path}/log.jsonl'), which has one sink for "
            f"all ranks: 2 processes would mix their records. Log to a path with the rank in it, as in "
            f'JsonlBackend("runs/log-{{rank}}.jsonl"), or leave ranks out: then only the main rank writes.'
        )


def averaged() -> tuple[list[Any], list[Any], str]:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))
    ema = EMA(0.5, buffers=True)
    data = [batches([4, 5, 6, 7])[rank() :: 2]] * 2
    learner = learner_of(*data, ema, EarlyStopping(NumberLimit(2)), model=model)
    learner.fit(5)
    averages = [(name, average.tolist()) for name, average in ema.averages.items()]
    return averages, list(values(learner).items()), str(learner.stopped)


def test_averaged_statistics_and_an_early_stop_are_alike_on_all_ranks(ranks: Ranks) -> None:
    (averages, epochs, stopped), other = ranks.values(averaged)
    assert (averages, epochs) == other[:2]
    assert {name for name, _ in averages} >= {"0.weight", "1.running_mean", "1.running_var"}
    assert all(len(series) == 2 for _, series in epochs)
    assert stopped.startswith("EarlyStopping ends training after epoch 2 of ValidationPhase.")
    assert stopped in other[2]


def counted(folder: str) -> list[Any]:
    """Train three epochs, resume with callbacks that count the life of the learner, and return what they have counted.

    Each rank has batches of its own, so the ranks agree only in what is the same for all.
    """
    mine = batches([4] * 8)[rank() :: 2]
    with learner_of(mine, mine, Checkpointer(folder, every=2)) as learner:
        learner.fit(3)
    plateau, swa = reduce_on_plateau(0.1, factor=0.5, patience=0, threshold=0.9), SWA(start_epoch=4)
    with learner_of(mine, mine, Checkpointer(folder), Scheduler({LearningRate: plateau}), swa) as learner:
        learner.fit(5, resume=folder)
        with swa.applied():
            learner.validate()
            shown = all(torch.equal(value, swa.averages[name]) for name, value in learner.model.named_parameters())
        return [list(learner.cbstate.hyperparams["LearningRate"]), swa.taken, shown]


def test_callbacks_that_are_added_at_a_resume_count_the_life_of_the_learner(ranks: Ranks, tmp_path: Path) -> None:
    rates = [(n, 0.1) for n in range(13, 21)]
    assert ranks.values(counted, str(tmp_path)) == [[rates, 2, True]] * 2
    assert sorted(path.name for path in tmp_path.glob("epoch*")) == [f"epoch-000{n}.ckpt" for n in (2, 3, 4, 5)]
