"""The same work by hand, in flowtrain and in other libraries, timed in turns in one run.

Run ``python -m bench.bench_peers`` from the root of the checkout; ``--draw RESULTS FOLDER`` draws the tables in a file
of results. Each contender has a process of its own, so that no library changes another, and one process works at a
time: round by round each contender does the work once. A library that is not installed, or fails, is left out with a
line that says so.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from random import Random
from statistics import median
from typing import IO, Any

import rich
import torch
from torch.nn.functional import cross_entropy

from bench.bench_loop import BATCH, FEATURES, batches, digits, model_of
from bench.pairs import Figure, Report, figure
from bench.peers import PEERS, AtEnd, Made, Work
from flowtrain import BatchEnd, Callback, Learner, LearnerView, Read, TrainingPhase, on
from flowtrain.callbacks import Metrics
from flowtrain.graph.executor import Executor
from flowtrain.metrics import accuracy
from flowtrain_dask import DaskExecutor

ROUNDS = 30
"""How often each contender does each work; at least 30."""

FLOOR = "by hand"
STEPS = 500
BESIDE = ("dask", "deferred")
"""The contenders for works with functions at the end of a batch only."""


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--only", nargs="*", choices=sorted({*WORKS, "import"}), default=[*WORKS, "import"])
    arguments.add_argument("--draw", nargs=2, type=Path, metavar=("RESULTS", "FOLDER"), help="draw a file of results")
    arguments.add_argument("--contender", help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.contender:
        serve(CONTENDERS[chosen.contender])
        return
    if chosen.draw:
        draw(*chosen.draw)
        return
    known = {name: distribution for name, (distribution, _) in PEERS.items() if installed(name, distribution)}
    packages = ("torch", "dask", "rich", *known.values())
    report = Report("Peers", "python -m bench.bench_peers", "the loop by hand in the same file", packages=packages)
    with Processes([name for name in CONTENDERS if name in known or name not in PEERS]) as processes:
        for name in [name for name in WORKS if name in chosen.only]:
            compare(report, name, processes, chosen.rounds)
    if "import" in chosen.only:
        imports(report, known, chosen.rounds)


def installed(name: str, distribution: str) -> bool:
    """Return whether a library can be imported; otherwise print a line that says so."""
    done = subprocess.run([sys.executable, "-c", IMPORTS[name]], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name} is left out: {done.stderr.strip().splitlines()[-1]} (pip install {distribution})\n")
    return done.returncode == 0


def compare(report: Report, name: str, processes: Processes, rounds: int) -> None:
    """Time one work in all contenders, and print a line for each."""
    work = WORKS[name](Path())
    names = [each for each in processes.names if work.at_end or each not in BESIDE]
    seconds = processes.time(name, names, rounds)
    for contender, times in seconds.items():
        if contender == FLOOR:
            continue
        pairs = list(zip(seconds[FLOOR], times, strict=True))
        shown = contender if contender in PEERS else f"flowtrain, {contender}"
        report.ratio(f"{name}: {shown}", pairs, None, steps=work.batches)


# --- the works


def pure(folder: Path) -> Work:
    return Work(partial(model_of, FEATURES, 128), batches(STEPS))


def recorded(folder: Path) -> Work:
    return replace(pure(folder), recorded=True)


def of_digits(folder: Path) -> Work:
    train, valid = digits()
    adam = partial(torch.optim.AdamW, lr=1e-3)
    return Work(partial(model_of, 64, 128), train, valid, adam, epochs=3, accuracy=True)


def with_four(function: Callable[[Path, int], AtEnd], steps: int, folder: Path) -> Work:
    """Return a work of steps of a few milliseconds with four functions at the end of each batch."""
    torch.manual_seed(1)
    data = [(torch.randn(64, 256), torch.randint(10, (64,))) for _ in range(steps)]
    return Work(partial(model_of, 256, 2048), data, at_end=[function(folder, number) for number in range(4)])


@dataclass(frozen=True)
class Sleep:
    """Waits as long as a small request takes."""

    folder: Path
    number: int

    def __call__(self, model: torch.nn.Module, loss: torch.Tensor, step: int) -> None:
        time.sleep(0.01)


_BLOB = Random(0).randbytes(80_000)


@dataclass(frozen=True)
class Compress:
    """Compresses some bytes, for about 2 ms in which the lock of the interpreter is free."""

    folder: Path
    number: int

    def __call__(self, model: torch.nn.Module, loss: torch.Tensor, step: int) -> None:
        zlib.compress(_BLOB)


@dataclass(frozen=True)
class Save:
    """Writes the weights, of 2 MB, into a file."""

    folder: Path
    number: int

    def __call__(self, model: torch.nn.Module, loss: torch.Tensor, step: int) -> None:
        torch.save(model.state_dict(), self.folder / f"{self.number}.pt")


WORKS: dict[str, Callable[[Path], Work]] = {
    f"no callbacks, a {FEATURES}-128-10 network, batch {BATCH}": pure,
    "the loss of each batch recorded, and a bar": recorded,
    "digits with accuracy, 3 epochs": of_digits,
    "four callbacks that sleep 10 ms": partial(with_four, Sleep, 12),
    "four callbacks that compress 80 kB": partial(with_four, Compress, 12),
    "four callbacks that save the weights": partial(with_four, Save, 12),
}


# --- the loop by hand, and flowtrain


def by_hand(work: Work) -> Made:
    """Train in a loop that does no more than the work asks for."""
    model = work.model()
    optimizer = work.optimizer(model.parameters())
    shown: Callable[[Any], Any] = import_module("tqdm").tqdm if work.recorded else iter

    def fit() -> None:
        losses: list[float] = []
        accuracies: list[float] = []
        for _ in range(work.epochs):
            model.train()
            for step, (inputs, targets) in enumerate(shown(work.train), 1):
                optimizer.zero_grad()
                outputs = model(inputs)
                loss = cross_entropy(outputs, targets)
                loss.backward()
                optimizer.step()
                if work.recorded or work.accuracy:
                    losses.append(loss.item())
                if work.accuracy:
                    accuracies.append(accuracy(outputs, targets).item())
                for function in work.at_end:
                    function(model, loss, step)
            model.eval()
            with torch.no_grad():
                for inputs, targets in work.valid or ():
                    outputs = model(inputs)
                    losses.append(cross_entropy(outputs, targets).item())
                    accuracies.append(accuracy(outputs, targets).item())

    return fit


class AtBatchEnd(Callback):
    """Calls a function with the loss."""

    deferrable = True
    stochastic = False  # nobody sees that the function draws no random numbers

    def __init__(self, function: AtEnd) -> None:
        self.function = function

    @on(BatchEnd, TrainingPhase, access={"batch.loss": Read()})
    def call(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Call it."""
        self.function(torch.nn.Module(), learner.batch.loss, 0)


class Saves(Callback):
    """Writes the weights into a file."""

    deferrable = True

    def __init__(self, function: Save) -> None:
        self.path = function.folder / f"{function.number}.pt"

    @on(BatchEnd, TrainingPhase, access={"params": Read()})
    def save(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        """Write them."""
        torch.save({name: param.detach() for name, param in learner.params.items()}, self.path)


def in_flowtrain(executor: Callable[[], str | Executor], work: Work) -> Made:
    """Train with a learner; its last call waits until deferred callbacks are done."""
    if work.recorded:
        rich.reconfigure(file=io.StringIO(), force_terminal=True, width=100)
    callbacks = [Saves(each) if isinstance(each, Save) else AtBatchEnd(each) for each in work.at_end]
    learner = Learner(
        work.model(),
        cross_entropy,
        data=(work.train, work.valid) if work.valid else work.train,
        optimizer=work.optimizer,
        callbacks=[*callbacks, *([Metrics(accuracy)] if work.accuracy else [])],
        default_callbacks=True if work.recorded else "quiet" if work.accuracy else False,
        executor=executor(),
    )

    def fit() -> None:
        learner.fit(work.epochs)
        learner.flush()

    return fit


CONTENDERS: dict[str, Callable[[Work], Made]] = {
    FLOOR: by_hand,
    "serial": partial(in_flowtrain, lambda: "serial"),
    "dask": partial(in_flowtrain, partial(DaskExecutor, defer="never")),
    "deferred": partial(in_flowtrain, partial(DaskExecutor, defer="always")),
    **{name: make for name, (_, make) in PEERS.items()},
}


# --- a process for each contender


class Processes:
    """The processes of the contenders, which wait until they are told to work.

    Args:
        names: The names of the contenders.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        command = [sys.executable, "-m", "bench.bench_peers", "--contender"]
        self._processes = {
            name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for name in names
        }

    def time(self, work: str, names: Sequence[str], rounds: int) -> Mapping[str, list[float]]:
        """Return the seconds of each contender in each round; a first round is not counted."""
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds + 1):
            for name in list(seconds):
                answer = self._ask(name, work)
                if isinstance(answer, str):
                    print(f"| {work}: {name} | | | left out: {answer} | | |", flush=True)
                    del seconds[name]
                else:
                    seconds[name].append(answer)
        return {name: times[1:] for name, times in seconds.items()}

    def _ask(self, name: str, work: str) -> float | str:
        process = self._processes[name]
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            print(work, file=process.stdin, flush=True)
            answer: float | str = json.loads(process.stdout.readline())
        except (OSError, ValueError):
            return f"its process ended with {process.wait()}"
        return answer

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *failure: object) -> None:
        for process in self._processes.values():
            assert process.stdin is not None
            with suppress(BrokenPipeError):  # of a process that has ended by itself
                process.stdin.close()
            process.wait()


def serve(make: Callable[[Work], Made]) -> None:
    """Do each work that is named on the standard input, and answer with the seconds that it took, or an error."""
    torch.set_num_threads(1)
    answers: IO[str] = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # libraries print, and their bars are drawn to nowhere
    os.dup2(nowhere, 2)
    made: dict[str, Made] = {}
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            name = line.strip()
            try:
                if name not in made:
                    made[name] = make(WORKS[name](Path(folder)))
                    made[name]()  # what a library does once is not timed
                answer: float | str = timed(made[name])
            except Exception as error:
                answer = f"{type(error).__name__}: {error}".splitlines()[0]
            print(json.dumps(answer), file=answers, flush=True)


def timed(fit: Made) -> float:
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        fit()
        return time.perf_counter() - start
    finally:
        gc.enable()


# --- import and memory

IMPORTS = {
    "flowtrain": "import flowtrain",
    "Lightning": "import lightning",
    "ignite": "import ignite.engine",
    "Keras": "import os; os.environ['KERAS_BACKEND'] = 'torch'; import keras",
    "skorch": "import skorch",
    "TorchTNT": "import torchtnt.framework",
    "fastai": "import fastai.basics",
}
"""The statements by which a program imports each library."""

_MEASURED = """
import json, resource, time, torch
start = time.perf_counter()
{statement}
print(json.dumps((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)))
"""


def imports(report: Report, known: Mapping[str, str], rounds: int) -> None:
    """Print the seconds of each import after that of torch, and the MiB of the process then, in turns."""
    statements = {"torch alone": "pass", **{name: IMPORTS[name] for name in ("flowtrain", *known)}}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in statements}
    for _ in range(rounds):
        for name, statement in statements.items():
            command = [sys.executable, "-W", "ignore", "-c", _MEASURED.format(statement=statement)]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name].append(tuple(json.loads(printed.splitlines()[-1])))
    alone = median(size for _, size in found["torch alone"])
    for name, rows in found.items():
        size = median(each for _, each in rows)
        seconds = figure([each for each, _ in rows])
        report.row(f"import, after torch: {name}", f"{alone:.0f} MiB", f"{size:.0f} MiB", f"{seconds.text()} s")


# --- the pictures


def draw(results: Path, folder: Path) -> None:
    """Draw the ratios to the loop by hand in a file of results: of the works with four callbacks, and of the others."""
    row = re.compile(r"\| (.+): (.+?) \|.*\| ([\d.]+) \[([\d.]+), ([\d.]+)\] \|")
    found: dict[str, dict[str, Figure]] = {}
    for line in results.read_text("utf-8").splitlines():
        if (read := row.match(line)) is not None and read[1] in WORKS:
            found.setdefault(read[1], {})[read[2]] = Figure(*map(float, read.groups()[2:]))
    four = [name for name in WORKS if name.startswith("four ")]
    for file, names in (("peers-loop.svg", [name for name in WORKS if name not in four]), ("peers-four.svg", four)):
        if shown := {name: found[name] for name in names if name in found}:
            bars(shown, folder / file)


def bars(found: Mapping[str, Mapping[str, Figure]], path: Path) -> None:
    """Draw a panel for each work, with a bar for each library, in colours that can be read on white and on black."""
    import matplotlib
    from matplotlib.figure import Figure as Picture

    grey, ours, others = "#768390", "#2f7de1", "#9aa4b2"
    matplotlib.rcParams["svg.fonttype"] = "none"  # the texts stay texts
    matplotlib.rcParams["svg.hashsalt"] = path.name  # the same results give the same file
    picture = Picture(figsize=(10, 0.28 * max(map(len, found.values())) + 0.9), layout="constrained")
    for axes, (work, libraries) in zip(picture.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        names = sorted(libraries, key=lambda name: -libraries[name].median)
        lengths = [libraries[name].median for name in names]
        drawn = axes.barh(names, lengths, color=[ours if "flowtrain" in name else others for name in names])
        axes.bar_label(drawn, [f"{length:.2f}" for length in lengths], padding=3, color=grey, fontsize=8)
        axes.axvline(1, color=grey, linewidth=0.8, linestyle=":")
        axes.set_title(work.replace(", ", ",\n", 1), fontsize=9, color=grey)
        axes.set_xlim(0, 1.2 * max(lengths))
        axes.tick_params(colors=grey, labelsize=8, length=0)
        axes.xaxis.set_visible(False)
        axes.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
