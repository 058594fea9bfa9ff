"""Train a small network to read handwritten digits: ``python -m flowtrain.examples.digits``.

The data comes with scikit-learn: 1,797 grey images of 8 by 8 pixels. A quarter of them is held out for validation.
The program has the parts of every flowtrain program: loaders, a model with its loss, metrics, a schedule, a callback of
its own, and a `Learner` that joins them. It writes files only with ``--log``::

    python -m flowtrain.examples.digits --log runs/a                          # TensorBoard, JSON lines, checkpoints
    python -m flowtrain.examples.digits --log runs/a --resume                 # resume an interrupted run
    python -m flowtrain.examples.digits --log runs/b --executor dask          # log in a thread beside training
    python -m flowtrain.examples.digits --log runs/c --executor local         # log in processes of this machine
    python -m flowtrain.examples.digits --log runs/d --executor tcp://...     # log on a cluster: docs/cluster.md
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import (
    Access,
    Callback,
    CheckpointError,
    EpochEnd,
    ExecutorError,
    Learner,
    LearnerView,
    LoggingError,
    Read,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import (
    Checkpointer,
    EarlyStopping,
    LearningRate,
    LogHistograms,
    LogHyperParams,
    LogMetrics,
    LogVisualization,
    Metrics,
    Scheduler,
    one_cycle,
)
from flowtrain.logging import Image, JsonlBackend, Loggable, TensorBoardBackend, Text
from flowtrain.metrics import accuracy

__all__ = ["BestEpoch", "Loader", "load_data", "main", "make_learner", "make_model", "misclassified"]

Loader = DataLoader[tuple[torch.Tensor, ...]]
_MOST = 8  # the number of misclassified digits in a picture


class BestEpoch(Callback):
    """Remember the epoch with the highest accuracy on the held-out digits.

    The callback declares that it reads the accuracy. `Metrics` declares that it writes the accuracy, so flowtrain runs
    `Metrics` first.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.accuracy = 0.0

    def state_access(self) -> Access:
        """Declare a read of the accuracy of epochs."""
        return {"cbstate.metrics_epoch.Accuracy": Read()}

    @on(EpochEnd, ValidationPhase)
    def compare(self, event: EpochEnd, phase: ValidationPhase, learner: LearnerView) -> None:
        """Keep the epoch if it is better than all epochs before."""
        epoch, value = learner.cbstate.metrics_epoch[phase]["Accuracy"].last()
        if value > self.accuracy:
            self.epoch, self.accuracy = epoch, value

    def state_dict(self) -> dict[str, Any]:
        """Return the best epoch and its accuracy, for checkpoints."""
        return {"epoch": self.epoch, "accuracy": self.accuracy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.epoch, self.accuracy = state["epoch"], state["accuracy"]


def load_data(batch_size: int = 32) -> tuple[Loader, Loader]:
    """Return the loaders for training and validation, whose batches are pairs of inputs and targets.

    Inputs have shape ``(batch, 1, 8, 8)`` and values from 0 to 1, targets have shape ``(batch,)``. Validation has one
    batch.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise SystemExit(
            "This example needs scikit-learn, because the digits come with it. Install it and run this again:\n\n"
            "    pip install scikit-learn"
        ) from None
    pixels, labels = load_digits(return_X_y=True)  # each image is 64 numbers from 0 to 16
    images = (pixels / 16).astype("float32").reshape(-1, 1, 8, 8)
    split: list[Any] = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    train_images, valid_images, train_labels, valid_labels = (torch.from_numpy(array) for array in split)
    train = TensorDataset(train_images, train_labels)
    valid = TensorDataset(valid_images, valid_labels)
    return DataLoader(train, batch_size, shuffle=True), DataLoader(valid, len(valid))


def make_model() -> nn.Module:
    """Return a network from ``(batch, 1, 8, 8)`` to ten scores for each image."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the results.

    Args:
        arguments: The arguments of the command line; those in `sys.argv` by default.
    """
    parser = _make_parser()
    options = parser.parse_args(arguments)
    wrong = _complaint(options.log, options.resume, options.executor)
    if wrong:
        parser.error(wrong)
    torch.set_num_threads(1)  # a network this small gains nothing from more
    torch.manual_seed(0)  # the same weights and the same order of the data in each run
    try:
        best = BestEpoch()
        with make_learner(best, options) as learner:
            _explain(learner, options)
            learner.fit(options.epochs, resume=_checkpoints(options.log) if options.resume else None)
            _conclude(learner, best, options)
    except (CheckpointError, ExecutorError, LoggingError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        if options.log is None:
            raise
        # `fit` writes a checkpoint for this case before it raises.
        if not _checkpoints(options.log).exists():
            raise SystemExit("\nInterrupted before training began: there is no checkpoint to resume from.") from None
        raise SystemExit(f"\nInterrupted. Continue with the same command and --resume: {options.log}") from None


def make_learner(best: BestEpoch, options: argparse.Namespace) -> Learner:
    """Return the learner, which has callbacks that log if the options name a folder for logs."""
    rate = 4e-3
    callbacks: list[Callback] = [
        Metrics(accuracy),
        Scheduler({LearningRate: one_cycle(rate)}),
        EarlyStopping(patience=5, monitor="Accuracy"),
        best,
    ]
    if options.log is not None:
        callbacks += _watching(options.log, {"epochs": options.epochs, "optimizer": "AdamW", "highest rate": rate})
    return Learner(
        make_model(),
        nn.functional.cross_entropy,
        data=load_data(),
        optimizer=partial(torch.optim.AdamW, lr=rate),
        callbacks=callbacks,
        default_callbacks="quiet" if options.quiet else True,  # quiet: no progress bar, no line for each epoch
        executor=options.executor,
    )


# --- the option --log


def _watching(folder: Path, settings: Mapping[str, Any]) -> list[Callback]:
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
        Checkpointer(_checkpoints(folder), keep_top_k=2, monitor="Accuracy"),
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


def _checkpoints(folder: Path) -> Path:
    """Return the folder for the checkpoints of a run."""
    return folder / "checkpoints"


def _complaint(folder: Path | None, resume: bool, executor: str) -> str:
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


def _left_behind(folder: Path) -> str:
    """Return lines of text that describe the files in the folder of a run."""
    records = len((folder / "log.jsonl").read_text("utf-8").splitlines())
    held = _checkpoints(folder)
    names = {each: (held / each).read_text("utf-8").strip() for each in ("latest", "best")}
    return (
        f"In {folder}:\n"
        f"  log.jsonl     {records:,} records, one on each line\n"
        f"  *Phase/       curves, histograms and mistakes: tensorboard --logdir {folder}\n"
        f"  checkpoints/  the latest is {names['latest']}, the best is {names['best']}"
    )


# --- the command line


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flowtrain.examples.digits", description="Train a small network on scikit-learn's digits."
    )
    parser.add_argument("--epochs", type=_at_least_one, default=10, metavar="N", help="how long to train (default: 10)")
    where = "serial, dask, local, or the address of a dask scheduler (default: serial)"
    parser.add_argument("--executor", default="serial", metavar="NAME", help=f"what runs callbacks: {where}")
    parser.add_argument("--log", type=Path, metavar="FOLDER", help="keep logs and checkpoints in this folder")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--quiet", action="store_true", help="print the final accuracy only")
    output.add_argument("--explain", action="store_true", help="print the order of the callbacks at every event")
    return parser


def _explain(learner: Learner, options: argparse.Namespace) -> None:
    if options.explain:
        print("The order of the callbacks at every event, and why:\n")
        print(learner.callbacks.explain(), end="\n\n")
    elif not options.quiet:
        print("The order of the callbacks when a validation epoch ends, and why (--explain prints every event):\n")
        print("\n".join(learner.callbacks.plan(EpochEnd, ValidationPhase).explain()), end="\n\n")


def _conclude(learner: Learner, best: BestEpoch, options: argparse.Namespace) -> None:
    final = learner.history[ValidationPhase]["Accuracy"].values[-1]
    if not options.quiet:
        if learner.stopped is not None:
            print(f"\n{learner.stopped}")
        print(f"\nBest epoch: {best.epoch}, with {best.accuracy:.1%}")
    print(f"Accuracy on held-out digits: {final:.1%}")
    if options.quiet:
        return
    if options.log is not None:
        print(f"\n{_left_behind(options.log)}")
        report = getattr(learner.executor, "report", None)  # only executors that defer callbacks have a report
        if report is not None:
            print(f"\nWhat the callbacks that log did beside training:\n{report()}")
    print("\nWhere to look next: docs/callbacks.md builds a callback step by step, from nothing to tested.")


def _at_least_one(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


if __name__ == "__main__":
    main()
