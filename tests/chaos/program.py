"""The training that is disturbed: a small model, and callbacks whose logs show whatever is lost, doubled or swapped.

::

    python -m tests.chaos.program FOLDER                        serially, for as many epochs as FOLDER/epochs says
    python -m tests.chaos.program FOLDER --cluster ADDRESS      on a cluster, until FOLDER/stop is there
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from flowtrain import Callback, Learner
from flowtrain.callback.phases import TrainingPhase
from flowtrain.callbacks import LogHistograms, LogMetrics, Metrics
from flowtrain.graph.executor import Executor
from flowtrain.graph.serial import SerialExecutor
from flowtrain.logging import JsonlBackend
from flowtrain.metrics import accuracy
from flowtrain_dask import DaskExecutor
from tests.chaos.callbacks import Chain, Enough, Hang, Pace, Paint

__all__ = ["LOGS", "main"]

LOGS = ("shared.jsonl", "chain.jsonl", "canvas.jsonl")
"""The logs of a run: of two callbacks in one lane, of one with a large state, and of one that reads a large tensor."""


def main() -> None:
    """Train, and leave the logs and ``result.json`` in a folder in the folder."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cluster")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    torch.set_num_threads(1)
    if arguments.cluster is None:
        goal = int((folder / "epochs").read_text())
        _train(folder / "serial", SerialExecutor(), arguments.seed, lambda epochs: epochs >= goal, 0.0)
    else:
        importlib.import_module("distributed")  # which sets the levels of its loggers
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # the scheduler's end is no surprise
        executor = DaskExecutor(arguments.cluster, defer="always")
        stop, now = folder / "stop", folder / "now.txt"

        def is_enough(epochs: int) -> bool:
            """Leave the report, and ask whether to stop."""
            now.write_text(str(executor.report()))
            return stop.exists()

        epochs = _train(folder / "cluster", executor, arguments.seed, is_enough, 0.002)
        (folder / "epochs").write_text(str(epochs))


def _train(folder: Path, executor: Executor, seed: int, is_enough: Callable[[int], bool], pace: float) -> int:
    """Train until it is enough, and return the number of epochs."""
    folder.mkdir()
    torch.manual_seed(seed)
    training = [(torch.randn(16, 32), torch.randint(4, (16,))) for _ in range(200)]
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(inplace=True), torch.nn.Linear(64, 4))
    shared, chain, enough = JsonlBackend(folder / LOGS[0]), Chain(JsonlBackend(folder / LOGS[1])), Enough(is_enough)
    histograms = LogHistograms(shared, every=20, gradients=True)
    canvas = Hang(JsonlBackend(folder / LOGS[2]), every=4)
    callbacks: list[Callback] = [LogMetrics(shared), histograms, chain, enough, Metrics(accuracy), Paint(), canvas]
    if pace:
        callbacks.append(Pace(pace))
    with Learner(
        model, F.cross_entropy, data=(training, training[:20]), callbacks=callbacks, default_callbacks="quiet",
        executor=executor,
    ) as learner:  # fmt: skip
        learner.fit(1_000_000)
        report = str(executor.report()) if isinstance(executor, DaskExecutor) else ""
        result = {
            "steps": learner.cbstate.history[TrainingPhase].steps,
            "chain": chain.digest,
            "window": chain.window.double().sum().item(),
            "parameters": sum(one.double().sum().item() for one in model.parameters()),
        }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "report.txt").write_text(report)
    return enough.epochs


if __name__ == "__main__":
    main()
