"""A training that is killed again and again, and resumes to the result of the training that nobody killed.

::

    python -m tests.kill --runs 100

Each run trains one variant. Its process is ended up to four times: at a random moment, or before or after a random
file operation, which may be one of a checkpoint, of a flush or of a resume; by SIGKILL, SIGTERM or SIGINT, sent to the
process or to its group. Or a limit on the size of files lets its writes fail, as a full disk does. Then the program is
started again, with a random executor, until it ends by itself. What it leaves is compared with the same training
without kills: parameters, optimizer, histories, state of callbacks, generators, and every log.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from flowtrain import CheckpointError, Learner, LoggingError, TorchCore
from flowtrain.callbacks import (
    EMA,
    Checkpointer,
    LearningRate,
    LogHistograms,
    LogMetrics,
    Metrics,
    Scheduler,
    SmoothLoss,
    one_cycle,
)
from flowtrain.graph.executor import Executor
from flowtrain.graph.serial import SerialExecutor
from flowtrain.logging import CsvBackend, JsonlBackend
from flowtrain.metrics import accuracy
from flowtrain_dask import DaskExecutor
from tests.support.logs import log_records
from tests.support.resumed import Noisy

__all__ = ["main"]

LOGS = ("metrics.jsonl", "histograms.jsonl", "metrics.csv")

EXECUTORS: dict[str, Callable[[], Executor]] = {
    "serial": SerialExecutor,
    "dask": DaskExecutor,
    "strands": partial(DaskExecutor, parallel="always"),
}

ENDS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}

FULL = 40_000
"""The size in bytes of the largest file that a full disk takes: less than a checkpoint has."""


@dataclass(frozen=True)
class Variant:
    """A training.

    Attributes:
        data: Makes the training data.
        fit: Trains or resumes.
        accumulate: The batches of an accumulation group.
    """

    data: Callable[[], Any]
    fit: Callable[[Learner], object]
    accumulate: int = 1


def epochs(number: int) -> Callable[[Learner], object]:
    return lambda learner: learner.fit(number, resume="auto")


def table() -> TensorDataset:
    x = torch.randn(44, 3, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, x[:, :2] ** 2)


def stateful() -> Any:
    module: Any = importlib.import_module("torchdata.stateful_dataloader")  # an optional dependency
    return module.StatefulDataLoader(table(), 5, shuffle=True)


def with_generator() -> Any:
    return DataLoader(table(), 5, sampler=RandomSampler(table(), generator=torch.Generator().manual_seed(5)))


VARIANTS = {
    "epochs": Variant(lambda: DataLoader(table(), 5, shuffle=True), epochs(4)),
    "accumulated": Variant(lambda: DataLoader(table(), 5, shuffle=True), epochs(4), accumulate=4),
    "generator": Variant(with_generator, epochs(4)),
    "augmented": Variant(lambda: DataLoader(Noisy(), 5, shuffle=True), epochs(8)),
    "workers": Variant(lambda: DataLoader(Noisy(), 5, shuffle=True, num_workers=2), epochs(3)),
    "persistent": Variant(
        lambda: DataLoader(table(), 5, shuffle=True, num_workers=2, persistent_workers=True), epochs(3)
    ),
    "stream": Variant(
        lambda: DataLoader(table(), 5, shuffle=True),
        lambda learner: learner.fit(steps=31, validate_every=7, resume="auto"),
    ),
    "steps": Variant(
        lambda: DataLoader(table(), 5, shuffle=True), lambda learner: learner.fit(steps=31, resume="auto")
    ),
    "own state": Variant(stateful, epochs(4)),
}


def train(folder: Path, variant: Variant, executor: str) -> None:
    """Train or resume in a folder, and leave ``result.pt`` there."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))
    metrics, histograms = JsonlBackend(folder / LOGS[0]), JsonlBackend(folder / LOGS[1])
    callbacks = [
        Checkpointer(folder / "checkpoints", every_steps=3, keep_top_k=2),
        LogMetrics(metrics, CsvBackend(folder / LOGS[2])),
        LogHistograms(histograms, every=4, gradients=True),
        Scheduler({LearningRate: one_cycle(0.01)}),
        Metrics(accuracy_of_sign),
        EMA(0.9),
        SmoothLoss(),
    ]
    with Learner(
        model,
        nn.functional.mse_loss,
        data=(variant.data(), DataLoader(table(), 11)),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        callbacks=callbacks,
        default_callbacks="quiet",
        executor=EXECUTORS[executor](),
        core=TorchCore(device="cpu", accumulate=variant.accumulate, clip_grad_norm=1.0),
    ) as learner:
        variant.fit(learner)
        state = learner.cbstate
        series = {
            f"{name} {phase!r} {key}": list(each)
            for name in ("metrics_step", "metrics_epoch")
            for phase, by_name in getattr(state, name).items()
            for key, each in by_name.items()
        }
        result = {
            "parameters": learner.model.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "histories": {"history": repr(state.history), **series},
            "callbacks": {
                each.name: repr(each.state_dict()) for each in learner.callbacks if not isinstance(each, Checkpointer)
            },
            "generators": (torch.get_rng_state(), repr(random.getstate())),
        }
    torch.save(result, folder / "result.pt")


def accuracy_of_sign(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return accuracy(outputs, targets.argmax(1))


# --- ends


def end_at_operation(number: int, before: bool, end: Callable[[], None]) -> None:
    """Let this process end at its n-th file operation that changes something."""
    left = number

    def counted(operation: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            now = not left
            if now and before:
                end()
            done = operation(*args, **kwargs)
            if now and not before:
                end()
            return done

        return act

    for name in ("write", "ftruncate", "fsync", "replace", "rename", "unlink", "link", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))


def attempt(folder: Path, variant: Variant, executor: str, draw: random.Random | None) -> tuple[str, int]:
    """Train in a process of its own, which a fault may end; return the kind of fault, and the exit code.

    Args:
        folder: The folder of the training.
        variant: The training.
        executor: The name of the executor.
        draw: Draws the fault; ``None`` for no fault.
    """
    where = "" if draw is None else draw.choice(["moment", "operation", "operation", "full disk"])
    name = "" if draw is None else draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"])
    group = draw is not None and draw.random() < 0.4
    number, before = (0, False) if draw is None else (draw.randint(1, 260), draw.random() < 0.5)
    delay = 0.0 if draw is None else draw.uniform(0, 1.5)
    sys.stdout.flush()
    process = os.fork()
    if not process:
        code = 1
        try:
            os.setsid()
            warnings.simplefilter("ignore")
            output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if where == "operation":
                send = partial(os.killpg, 0) if group else partial(os.kill, os.getpid())
                end_at_operation(number, before, partial(send, ENDS[name]))
            elif where == "full disk":
                resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            train(folder, variant, executor)
            code = 0
        except KeyboardInterrupt:
            code = 3
        except (CheckpointError, LoggingError):
            traceback.print_exc()
            code = 4
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if where == "moment":
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):  # it may have ended, and may not lead a group yet
            (os.killpg if group else os.kill)(process, ENDS[name])
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    return where if where == "full disk" else f"{name}{' to the group' if group else ''} at a random {where}", code


def differences(whole: Path, found: Path) -> list[str]:
    """Return the kinds of things in which a training differs from the one that nobody has killed."""
    wanted, got = (torch.load(each / "result.pt", weights_only=True) for each in (whole, found))
    kinds = [kind for kind in wanted if not equal(wanted[kind], got[kind])]
    for log in LOGS:
        read: Callable[[Path], Any] = log_records if log.endswith("jsonl") else Path.read_text
        if read(whole / log) != read(found / log):
            kinds.append(log)
    kinds += [f"left {each.name}" for each in found.rglob("*tmp")]
    return kinds


def equal(one: Any, other: Any) -> bool:
    """Tell whether two values of nested containers are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) or repr(one) == repr(other)


def main() -> int:
    """Do the runs, print what was found, and return the exit code: 0 if no run differs."""
    parser = argparse.ArgumentParser("python -m tests.kill", description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the folders of runs that differ")
    arguments = parser.parse_args()
    importlib.import_module("torch._dynamo")  # an optimizer imports it, which takes a second in each forked process
    place = Path(tempfile.mkdtemp(prefix="flowtrain-kill-"))
    names = list(VARIANTS)
    try:
        stateful()
    except ImportError:
        names.remove("own state")
    kills, found, wholes = Counter[str](), Counter[str](), dict[str, Path]()
    for number in range(arguments.runs):
        draw = random.Random(f"{arguments.seed} {number}")
        name = names[number % len(names)]
        if name not in wholes:
            wholes[name] = place / f"whole {name}"
            wholes[name].mkdir()
            assert attempt(wholes[name], VARIANTS[name], "serial", None)[1] == 0, (
                wholes[name] / "output.txt"
            ).read_text()
        folder = place / str(number)
        folder.mkdir()
        before = kills.total()
        wrong = one_run(folder, wholes[name], VARIANTS[name], draw, kills)
        found.update(f"{name}: {each}" for each in wrong)
        said = ", ".join(wrong) or "no difference"
        print(f"run {number}, {name}: {kills.total() - before} kills, {said}", flush=True)
        if not (wrong and arguments.keep):
            shutil.rmtree(folder)
    if not arguments.keep:
        shutil.rmtree(place)
    report = {"runs": arguments.runs, "kills": kills.total(), "by kind": kills, "differences": found}
    print(json.dumps(report, indent=1))
    return 1 if found else 0


def one_run(folder: Path, whole: Path, variant: Variant, draw: random.Random, kills: Counter[str]) -> list[str]:
    """Train with kills until the training is complete, and return in what it differs."""
    wanted = draw.randint(1, 4)
    for _ in range(20):
        kind, code = attempt(folder, variant, draw.choice(list(EXECUTORS)), draw if wanted else None)
        if code == 0:
            return differences(whole, folder)
        if code not in (3, 4, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT):
            return [f"exit code {code} after {kind}: {(folder / 'output.txt').read_text()[-1500:]}"]
        if code == 4 and kind != "full disk":
            return [f"an error after {kind}: {(folder / 'output.txt').read_text()[-1500:]}"]
        kills[kind] += 1
        wanted -= 1
    return ["no end"]


if __name__ == "__main__":
    sys.exit(main())
