"""The option ``--log`` of the digits: backends, callbacks that log to them, and the files that they leave.

This is a separate module because another process imports the functions of callbacks by the name of their module, and
the module of the program itself is called ``__main__``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flowtrain import Callback, LearnerView, Read, ValidationPhase
from flowtrain.callbacks import Checkpointer, LogHistograms, LogHyperParams, LogMetrics, LogVisualization
from flowtrain.logging import Image, JsonlBackend, Loggable, TensorBoardBackend, Text

__all__ = ["checkpoints", "complaint", "left_behind", "misclassified", "watching"]

_MOST = 8  # the number of misclassified digits in a picture


def watching(folder: Path, settings: Mapping[str, Any]) -> list[Callback]:
    """Return the callbacks that log the run, and a callback that writes checkpoints.

    Args:
        folder: The folder for logs and checkpoints.
        settings: The settings of the run, which are logged.
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
    """Return a picture of misclassified digits in a row, and a text with their labels and the predictions.

    Args:
        learner: A view whose batch has inputs of shape ``(batch, 1, 8, 8)`` and outputs of shape ``(batch, 10)``.
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
    """Return the folder for the checkpoints of a run."""
    return folder / "checkpoints"


def complaint(folder: Path | None, resume: bool, executor: str) -> str:
    """Return an error message if the options do not fit together, otherwise an empty string."""
    if folder is not None:
        if not resume and (folder / "log.jsonl").exists():
            return f"{folder} has a run in it. Add --resume to continue it, or log to another folder"
        return ""
    if resume:
        return "--resume continues the run in a folder. Name the folder: --log FOLDER"
    if executor == "local" or ":" in executor:
        return f"--executor {executor} is for callbacks that log, and without --log there are none. Add --log FOLDER"
    return ""


def left_behind(folder: Path) -> str:
    """Return lines of text that describe the files in the folder of a run."""
    records = len((folder / "log.jsonl").read_text("utf-8").splitlines())
    held = checkpoints(folder)
    names = {each: (held / each).read_text("utf-8").strip() for each in ("latest", "best")}
    return (
        f"In {folder}:\n"
        f"  log.jsonl     {records:,} records, one on each line\n"
        f"  events.out.*  curves, histograms and mistakes: tensorboard --logdir {folder}\n"
        f"  checkpoints/  the latest is {names['latest']}, the best is {names['best']}"
    )
