"""Whole numbers are checked everywhere alike: an int or one of NumPy's, not ``True`` or ``2.0``, and large enough."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain import BatchEnd, FlowtrainError, TorchCore, TrainingPhase
from flowtrain.callbacks import (
    Checkpointer,
    DeviceStats,
    EarlyStopping,
    GarbageCollect,
    LogHistograms,
    Metrics,
    ModelSummary,
    Scheduler,
    SmoothLoss,
    Traces,
    after,
    before,
    throttle,
)
from flowtrain.callbacks.model_summary import summarize
from flowtrain.callbacks.schedules import cosine, reduce_on_plateau, sequence, step, warmup
from flowtrain.callbacks.stopping import PQ, UP, NumberLimit, Patience, Warmup
from flowtrain.diagnostics.lr_finder import find_learning_rate
from flowtrain.errors import LoggingError, UsageError
from flowtrain.errors.arguments import whole_number
from flowtrain.logging import Histogram, JsonlBackend, Value, log
from flowtrain.logging.backend import Run
from flowtrain.logging.distribution import distribution
from flowtrain.metrics import top_k_accuracy
from flowtrain.state.hyperparameters import LearningRate
from flowtrain.testing import tiny_learner
from tests.support.logs import log_fields
from tests.support.untyped import untyped

PLACES: dict[str, tuple[int, Callable[[Any], object]]] = {
    "fit(): epochs": (1, lambda n: tiny_learner().fit(n)),
    "fit(): steps": (1, lambda n: tiny_learner().fit(steps=n)),
    "fit(): validate_every": (1, lambda n: tiny_learner().fit(steps=2, validate_every=n)),
    "accumulate": (1, lambda n: TorchCore(accumulate=n)),
    "lag, in batches, or None for the device's own,": (0, lambda n: TorchCore(lag=n)),
    "LearningRate(): group, the position of a parameter group,": (0, lambda n: LearningRate(group=n)),
    "Checkpointer(): keep_top_k": (1, lambda n: Checkpointer("runs", keep_top_k=n)),
    "Checkpointer(): every": (1, lambda n: Checkpointer("runs", every=n)),
    "Checkpointer(): every_steps": (1, lambda n: Checkpointer("runs", every_steps=n)),
    "DeviceStats(): every": (1, lambda n: DeviceStats(n, lambda: {"Watt": 1.0})),
    "GarbageCollect(): every": (1, GarbageCollect),
    "Metrics(): keep": (1, lambda n: Metrics(keep=n)),
    "Scheduler(): keep": (1, lambda n: Scheduler({LearningRate: 0.1}, keep=n)),
    "SmoothLoss(): keep": (1, lambda n: SmoothLoss(keep=n)),
    "Traces(): keep": (1, lambda n: Traces({"One": lambda learner: 1.0}, TrainingPhase, keep=n)),
    "ModelSummary(): depth": (0, lambda n: ModelSummary(depth=n)),
    "summarize(): depth": (0, lambda n: summarize(torch.nn.Linear(1, 1), depth=n)),
    "LogHistograms(): every": (1, lambda n: LogHistograms(JsonlBackend("log.jsonl"), every=n)),
    "throttle(): every": (1, lambda n: throttle(GarbageCollect(), BatchEnd, every=n)),
    "after(): n": (1, lambda n: after(GarbageCollect(), BatchEnd, n)),
    "before(): n": (2, lambda n: before(GarbageCollect(), BatchEnd, n)),
    "Patience(): n": (1, Patience),
    "NumberLimit(): n": (1, NumberLimit),
    "Warmup(): n": (1, lambda n: Warmup(Patience(), n)),
    "PQ(): k": (2, lambda n: PQ(k=n)),
    "UP(): s": (1, UP),
    "cosine(): length": (1, lambda n: cosine(1.0, length=n)),
    "step(): every": (1, lambda n: step(1.0, n)),
    "step(): each of every": (1, lambda n: step(1.0, [n])),
    "sequence(): each of at": (1, lambda n: sequence([1.0, 2.0], at=[n])),
    "warmup(): updates": (1, lambda n: warmup(1.0, n)),
    "reduce_on_plateau(): patience": (0, lambda n: reduce_on_plateau(1.0, patience=n)),
    "reduce_on_plateau(): cooldown": (0, lambda n: reduce_on_plateau(1.0, cooldown=n)),
    "top_k_accuracy(): k": (1, top_k_accuracy),
    "Histogram(): bins": (1, lambda n: distribution(Histogram([1.0, 2.0], n))),
    "find_learning_rate(): updates": (2, lambda n: find_learning_rate(tiny_learner(), start=1e-4, updates=n)),
}


@pytest.mark.parametrize("what", PLACES)
def test_every_place_refuses_and_takes_the_same(what: str) -> None:
    least, call = PLACES[what]
    for wrong in (True, float(least + 2), least - 1, np.int64(least - 1), np.bool_(True), "3", torch.tensor(3)):
        with pytest.raises(FlowtrainError) as caught:
            call(wrong)
        assert str(caught.value) == f"{what} is a whole number, at least {least}, got {wrong!r}."
    call(np.int64(least + 2))
    call(np.uint8(least))


def test_what_is_kept_is_an_int() -> None:
    """A Python int can be written to every file, and prints as the user wrote it."""
    kept = [
        whole_number("n", np.int32(7)),
        TorchCore(accumulate=untyped(np.int64(7))).accumulate,
        LearningRate(group=untyped(np.int64(7))).group,
        Patience(untyped(np.int64(7))).n,
    ]
    assert kept == [7, 7, 7, 7]
    assert {type(each) for each in kept} == {int}
    stopping = EarlyStopping(untyped(np.int64(3)))
    assert repr(stopping.criterion) == "Disjunction(Patience(3))"
    with pytest.raises(UsageError) as caught:
        EarlyStopping(True)
    assert str(caught.value) == "Patience(): n is a whole number, at least 1, got True."


def test_a_step_of_a_log_is_a_whole_number_too(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    backend = JsonlBackend(path)
    backend.open(Run("a"))
    log(backend, Value(0.5), "Loss", untyped(np.int64(5)), ("Step",))
    with pytest.raises(LoggingError, match=r"log\('Loss'\) was given the step True\. A step is a whole number"):
        log(backend, Value(0.5), "Loss", True, ("Step",))
    backend.close()
    assert log_fields(path, "name", "step") == [("Loss", 5)]
