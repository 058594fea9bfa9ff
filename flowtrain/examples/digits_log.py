"""What ``--log`` and ``--executor`` add to the digits: backends, callbacks that log to them, and where these run.

A module of its own, since callbacks that run in other processes are found there by the name of their module, and the
program itself is called ``__main__``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowtrain import Callback, Executor, ExecutorError, LearnerView, Read, ValidationPhase
from flowtrain.callbacks import Checkpointer, LogHistograms, LogHyperParams, LogMetrics, LogVisualization
from flowtrain.logging import Image, JsonlBackend, Loggable, TensorBoardBackend, Text

__all__ = ["checkpoints", "choose_executor", "complaint", "left_behind", "misclassified", "watching"]

_MOST = 8  # pictures of mistakes in a row


def watching(folder: Path, settings: Mapping[str, Any]) -> list[Callback]:
    """Return the callbacks that log the run, and the one that writes checkpoints.

    Args:
        folder: Where to.
        settings: What the run was started with.
    """
    board, lines = TensorBoardBackend(folder), JsonlBackend(folder / "log.jsonl")
    reads = {f"batch.{name}": Read() for name in ("inputs", "targets", "outputs")}
    return [
        LogMetrics(board, lines),
        LogHyperParams(board, lines, settings=settings),
        LogHistograms(board, lines, every=20, gradients=True),
        LogVisualization(misclassified, board, lines, every=1, access=reads, phase_type=ValidationPhase),
        Checkpointer(checkpoints(folder), keep_top_k=2, monitor="Accuracy", mode="max"),
    ]


def misclassified(learner: LearnerView) -> dict[str, Loggable] | None:
    """Return a row of digits that were read wrong, and what they were read as.

    Args:
        learner: Its batch has inputs of shape ``(batch, 1, 8, 8)`` and outputs of shape ``(batch, 10)``.
    """
    inputs, targets = learner.batch.inputs, learner.batch.targets
    read = learner.batch.outputs.argmax(dim=1)
    wrong = (read != targets).nonzero().flatten()[:_MOST].tolist()
    if not wrong:
        return None
    row = torch.cat([inputs[number, 0] for number in wrong], dim=1)  # (8, 8 * digits)
    said = [f"{targets[number].item()} read as {read[number].item()}" for number in wrong]
    large = row.repeat_interleave(8, dim=0).repeat_interleave(8, dim=1)
    return {"Digits": Image(large), "Labels": Text(", ".join(said))}


def checkpoints(folder: Path) -> Path:
    """Return where the checkpoints of a run lie."""
    return folder / "checkpoints"


def complaint(folder: Path | None, resume: bool, executor: str) -> str:
    """Return why the options do not go together; empty if they do."""
    if folder is not None:
        if not resume and (folder / "log.jsonl").exists():
            return f"{folder} has a run in it. Add --resume to go on with it, or log to another folder"
        return ""
    if resume:
        return "--resume goes on with the run in a folder. Say which: --log FOLDER"
    if _on_cluster(executor):
        return f"--executor {executor} is for callbacks that log, and without --log there are none. Add --log FOLDER"
    return ""


def choose_executor(name: str) -> str | Executor:
    """Return the executor for ``serial``, ``dask``, ``local`` or the address of a scheduler.

    Raises:
        ExecutorError: dask is not installed.
    """
    if not _on_cluster(name):
        return name
    try:
        from flowtrain_dask import DaskExecutor
    except ImportError as error:
        raise ExecutorError(
            f"--executor {name} needs {error.name}, which is not installed: pip install 'flowtrain[dask]'"
        ) from error
    return DaskExecutor(name)


def left_behind(folder: Path) -> str:
    """Return, in lines, what is in the folder of a run."""
    records = len((folder / "log.jsonl").read_text("utf-8").splitlines())
    held = checkpoints(folder)
    names = {each: (held / each).read_text("utf-8").strip() for each in ("latest", "best")}
    return (
        f"In {folder}:\n"
        f"  log.jsonl     {records:,} records, one on each line\n"
        f"  events.out.*  curves, histograms and mistakes: tensorboard --logdir {folder}\n"
        f"  checkpoints/  the latest is {names['latest']}, the best is {names['best']}"
    )


def _on_cluster(executor: str) -> bool:
    return executor == "local" or ":" in executor
