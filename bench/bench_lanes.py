"""The cost of deferred callbacks for training, and the throughput of their lanes.

Run ``python -m bench.bench_lanes`` from the root of the checkout. ``--peers`` adds Lightning and ignite with the same
logging in place, which the extra ``peers`` installs. ``--only`` chooses a part.

The cluster is a scheduler and a worker that dask's command line starts on this machine, so training, the lanes, the
scheduler and the worker share its cores. The times are wall times.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
import torch.nn.functional as F
from distributed import Client

from bench.pairs import Report, figure, second_core
from bench.peers import AtEnd, Work, ignite, lightning
from flowtrain import BatchEnd, Callback, Learner, LearnerView, Phase, TrainingPhase, on
from flowtrain.callbacks import LogHistograms, LogMetrics, Metrics
from flowtrain.graph.executor import Executor
from flowtrain.logging import JsonlBackend
from flowtrain.logging.backend import Histogram, Run, Value
from flowtrain.logging.records import log
from flowtrain_dask import DaskExecutor

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Timed = Callable[[], float]
"""A function that trains for one epoch and returns the seconds of one step."""


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--peers", action="store_true", help="Lightning and ignite with the same logging, in place")
    arguments.add_argument("--only", choices=("metrics", "histograms", "throughput", "recovery"), help="one part of it")
    chosen = arguments.parse_args()
    options = " --peers" * chosen.peers + (f" --only {chosen.only}" if chosen.only else "")
    packages = ("torch", "dask", "distributed", *(("lightning", "pytorch-ignite") if chosen.peers else ()))
    report = Report("Lanes", "python -m bench.bench_lanes" + options, "as each line says", packages=packages)
    parts: dict[str, Callable[[Path, str], None]] = {
        "metrics": lambda folder, address: metrics_per_batch(report, folder, address, peers=chosen.peers),
        "histograms": lambda folder, address: histograms(report, folder, address, peers=chosen.peers),
        "throughput": lambda folder, address: throughput(report, folder),
    }
    for name, part in parts.items():
        if chosen.only in (None, name):
            report.row("at this time: two threads to one, 0.5 with two free cores", "", "", second_core().text())
            with tempfile.TemporaryDirectory() as folder, cluster(1) as (address, _):
                part(Path(folder), address)
    if chosen.only in (None, "recovery"):
        recovery(report)


# --- a logger of metrics for each batch, beside a step of 1 ms


def metrics_per_batch(report: Report, folder: Path, address: str, *, peers: bool) -> None:
    width, data = width_of(1e-3), batches(1000)
    for _ in range(3):  # find the width during long trainings, which are slower than their first second
        step = median(row[0] for row in loops_in_turns([partial(learner_of, width, data, (), "serial")], 5, 1000))
        width = max(16, round(width * (1e-3 / step) ** 0.5))
    without = partial(learner_of, width, data, (), "serial")

    def logged(name: str, executor: Callable[[], str | Executor]) -> Learner:
        return learner_of(width, data, (LogMetrics(JsonlBackend(folder / f"{name}.jsonl")),), executor())

    made: dict[str, tuple[Callable[[], Learner], float | None]] = {
        "in place": (lambda: logged("serial", lambda: "serial"), None),
        "deferred to a thread": (lambda: logged("thread", partial(DaskExecutor, defer="always")), None),
        "deferred to a cluster": (lambda: logged("sent", partial(DaskExecutor, address, defer="always")), None),
        "with a cluster, as the cost decides": (lambda: logged("cluster", partial(DaskExecutor, address)), 1.04),
    }
    for name, (make, goal) in made.items():
        times = loops_in_turns([without, make], 60, 1000)  # in turns, because the speed of a machine changes
        report.ratio(f"1 ms step, `LogMetrics` each batch, {name}; floor: without it", times, goal, steps=1)
    if peers:
        for name, peer in (("Lightning", lightning), ("ignite", ignite)):
            backend = opened(folder / f"{name}.jsonl")
            works = with_and_without(partial(model_of, width), data, partial(log_loss, backend))
            times = in_turns([timed(peer(work), len(data)) for work in works], 30)
            report.ratio(f"the same records in {name}, in place; floor: without them", times, None, steps=1)


def with_and_without(model: Callable[[], torch.nn.Module], data: Batches, log: AtEnd) -> list[Work]:
    """Return the same work twice, the second time with a function that logs."""
    return [Work(model, data, at_end=functions) for functions in ([], [log])]


def opened(path: Path) -> JsonlBackend:
    backend = JsonlBackend(path)
    backend.open(Run("peer"))
    return backend


def log_loss(backend: JsonlBackend, model: torch.nn.Module, loss: torch.Tensor, step: int) -> None:
    log([backend], Value(loss.item()), "Loss", step, ("Step", "TrainingPhase"))


def log_histograms(backend: JsonlBackend, model: torch.nn.Module, loss: torch.Tensor, step: int) -> None:
    if step % 20 == 0:
        for name, weight in model.named_parameters():
            log([backend], Histogram(weight.detach()), name, step, ("Step", "TrainingPhase"))


# --- histograms of all weights, which take 40 ms, at every 20th batch beside a step of 5 ms


def histograms(report: Report, folder: Path, address: str, *, peers: bool) -> None:
    data = batches(400)
    width, tensors = width_of(5e-3), copies_for(40e-3)

    def without() -> Learner:
        return learner_of(width, data, (), "serial", tensors)

    def logged(name: str, executor: str | Executor) -> Learner:
        logger = LogHistograms(JsonlBackend(folder / f"histograms-{name}.jsonl"), every=20)
        return learner_of(width, data, (logger,), executor, extra=tensors)

    for _ in range(3):  # find the sizes in training, where the logged weights are in no cache of the processor
        times = epochs_in_turns([without, lambda: logged("serial", "serial")], 5)
        step, work = median(row[0] for row in times), 20 * median(row[1] - row[0] for row in times)
        width, tensors = round(width * (5e-3 / step) ** 0.5), max(1, round(tensors * 40e-3 / work))
    what = "5 ms step, `LogHistograms` of 40 ms each 20th batch"
    times = epochs_in_turns([without, lambda: logged("serial", "serial")], 30)
    report.ratio(f"{what}, in place; floor: without it", times, None, steps=1)
    with beside(tensors) as process:
        made = [without, lambda: logged("process", DaskExecutor(address, defer="always")), without]
        times = loops_in_turns(made, 30, 200, process)
    report.ratio(f"{what}, deferred to a process; floor: without it", times, 1.08, steps=1)
    report.ratio(
        "a process that has nothing to do with training and computes the same; floor: without it",
        times,
        None,
        steps=1,
        which=2,
    )
    report.ratio("deferred, to training beside that process", [row[::-1] for row in times], None, steps=1)
    if peers:
        for name, peer in (("Lightning", lightning), ("ignite", ignite)):
            log = partial(log_histograms, opened(folder / f"histograms-{name}.jsonl"))
            works = with_and_without(partial(model_of, width, tensors), data, log)
            times = in_turns([timed(peer(work), len(data)) for work in works], 30)
            report.ratio(f"the same histograms in {name}, in place; floor: without them", times, None, steps=1)
    found = backlogs(logged("backlog", DaskExecutor(address, defer="always")), 1000, 30)
    grown = figure([end - half for half, end in found])
    report.row(
        "the same for 30 times 1,000 batches, events that wait, on average over the second and over the last quarter",
        f"{median(half for half, _ in found):.1f}", f"{median(end for _, end in found):.1f}",
        grown.text(digits=2), "0 in the interval, or less", reached=grown.low <= 0,
    )  # fmt: skip


def backlogs(learner: Learner, steps: int, times: int) -> list[tuple[float, float]]:
    """Return the mean number of waiting events in the second and in the last quarter of each of several trainings."""
    executor: Any = learner.executor
    learner.fit(1)
    found: list[tuple[float, float]] = []
    quarter = steps // 4
    for _ in range(times):
        pending: list[int] = []
        for raw in islice(cycle(learner.data[TrainingPhase]), steps):
            learner.step(TrainingPhase, raw)
            pending.append(executor.report().pending)
        found.append((fmean(pending[quarter : 2 * quarter]), fmean(pending[3 * quarter :])))
        learner.flush()
    learner.close()
    return found


WORK = """
import sys, time, torch
from bench.bench_lanes import log_all
weights = [torch.randn(1024, 64) for _ in range(int(sys.argv[1]))]
torch.set_num_threads(1)
log_all(weights)
print("ready", flush=True)
while True:
    begin = time.perf_counter()
    log_all(weights)
    time.sleep(max(0.0, 0.1 - (time.perf_counter() - begin)))
"""


@contextmanager
def beside(tensors: int) -> Generator[subprocess.Popen[bytes]]:
    """Give a stopped process that, while it runs, computes the histograms every 100 ms and discards them."""
    process = subprocess.Popen([sys.executable, "-c", WORK, str(tensors)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def log_all(weights: Sequence[torch.Tensor]) -> None:
    backend = JsonlBackend("nowhere.jsonl")
    for weight in weights:
        backend.encode(Histogram(weight), "w", 0, ("TrainingPhase",))


# --- the records that a lane writes in a second


def throughput(report: Report, folder: Path) -> None:
    """Fit a tiny model with many metrics, and count the records that one lane writes in a second."""

    def metric(number: int) -> Callable[[Any, Any], float]:
        def value(outputs: torch.Tensor, targets: torch.Tensor) -> float:
            return float(number)

        value.__name__ = f"m{number}"
        return value

    rates: list[float] = []
    files: list[list[str]] = []
    executors: list[str | Executor] = ["serial", *(DaskExecutor(defer="always") for _ in range(30))]
    data = [(torch.randn(4, 4), torch.randint(2, (4,))) for _ in range(400)]
    for executor in executors:
        path = folder / f"throughput{len(files)}.jsonl"
        torch.manual_seed(0)
        learner = Learner(
            torch.nn.Linear(4, 2),
            F.cross_entropy,
            data=data,
            callbacks=[Metrics(*(metric(number) for number in range(49))), LogMetrics(JsonlBackend(path))],
            default_callbacks="quiet",
            executor=executor,
        )
        begin = time.perf_counter()
        learner.fit(1)
        took = time.perf_counter() - begin
        learner.close()
        files.append(content(path))
        if executor != "serial":
            rates.append(len(files[-1]) / took)
    rate = figure(rates)
    same = all(each == files[0] for each in files)
    report.row(
        f"records a second through `LogMetrics` to JSON lines on one lane, training included; files equal to serial: "
        f"{same}",
        "",
        "",
        rate.text(1, 0),
        "20,000",
        reached=rate.median >= 20_000 and same,
    )


# --- a worker that is killed while it processes events


class Slow(Callback):
    """A deferred callback that is slow, so that its lane always has events."""

    deferrable = True

    @on(BatchEnd)
    def wait(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        time.sleep(0.1)


def recovery(report: Report) -> None:
    """Kill the worker that processes events, and time until the lane continues on the other worker."""
    took: list[float] = []
    with cluster(2) as (address, processes), Client(address, set_as_default=False) as client:  # type: ignore[no-untyped-call]  # no annotations
        executor = DaskExecutor(address, defer="always")
        learner = learner_of(16, batches(4), (Slow(),), executor)
        learner.fit(1)
        for _ in range(30):
            client.wait_for_workers(2, timeout=60)
            for raw in batches(10):
                learner.step(TrainingPhase, raw)
            victim = at_work(client)
            before = executor.report().lanes[0].done
            os.kill(victim, signal.SIGKILL)
            begin = time.perf_counter()
            while executor.report().lanes[0].done == before:
                time.sleep(0.005)
            took.append(time.perf_counter() - begin)
            learner.flush()
            processes.append(worker_on(address))
        learner.close()
    found = figure(took)
    report.row(
        "seconds until a lane goes on whose worker was killed with a batch at work, another being alive",
        "",
        "",
        f"{found.text()}, at most {max(took):.2f}",
        "3",
        reached=found.median <= 3,
    )


def at_work(client: Any) -> int:
    """Wait until a worker processes events, and return the id of its process."""
    processes: dict[str, int] = client.run(os.getpid)
    while True:
        for worker, keys in client.processing().items():
            if any("flowtrain-" in str(key) for key in keys):
                return processes[worker]


def content(path: Path) -> list[str]:
    """Return the lines of a log without their clock times."""
    return [json.dumps({**json.loads(line), "time": 0}) for line in path.read_text().splitlines()]


# --- the trainings


def model_of(width: int, extra: int = 0) -> torch.nn.Module:
    """Return a network with small activations; large ones would cause hundreds of page faults in each step."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Linear(width, width), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, 10))
    for number in range(extra):  # weights without a gradient are logged, but do not slow down training
        weight = torch.nn.Parameter(torch.randn(1024, 64), requires_grad=False)
        model.register_parameter(f"extra{number}", weight)
    return model


def batches(count: int) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(64, 64), torch.randint(10, (64,))) for _ in range(count)]


def learner_of(
    width: int, data: Batches, callbacks: Sequence[Callback], executor: str | Executor, extra: int = 0
) -> Learner:
    return Learner(
        model_of(width, extra),
        F.cross_entropy,
        data=data,
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        callbacks=callbacks,
        default_callbacks="quiet",
        executor=executor,
    )


def width_of(cost: float) -> int:
    """Return the hidden width for which one step of a learner takes about `cost` seconds."""
    width, data = 256, batches(40)
    for _ in range(5):
        learner = learner_of(width, data, (), "serial")
        learner.fit(1)
        took = median(timed(partial(learner.fit, 1), len(data))() for _ in range(9))
        width = max(16, round(width * (cost / took) ** 0.5))
    return width


def copies_for(cost: float) -> int:
    """Return the number of extra weights whose histograms take `cost` seconds."""
    weights = [torch.randn(1024, 64) for _ in range(40)]
    return max(1, round(cost / median(timed(partial(log_all, weights), len(weights))() for _ in range(20))))


# --- timing


def timed(run: Callable[[], object], steps: int) -> Timed:
    def one() -> float:
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) / steps

    return one


def epochs_in_turns(make: Sequence[Callable[[], Learner]], repetitions: int) -> list[tuple[float, ...]]:
    """Time fits of one epoch in turns, which include the flush at the end."""
    learners = [each() for each in make]
    try:
        steps = len(next(iter(learners[0].data.values())))
        return in_turns([timed(partial(learner.fit, 1), steps) for learner in learners], repetitions)
    finally:
        for learner in learners:
            learner.close()


def loops_in_turns(
    make: Sequence[Callable[[], Learner]], repetitions: int, lead: int, process: subprocess.Popen[bytes] | None = None
) -> list[tuple[float, ...]]:
    """Time epochs in turns, each in the middle of training.

    Training runs for `lead` batches, about a second, before the timing, and the lane is flushed after it. So the lane
    has about the same backlog at both ends of the timing, and processes as many events as training puts into it.

    Args:
        make: Functions that make the learners.
        repetitions: The number of timings of each learner.
        lead: The number of batches before each timing.
        process: A stopped process that runs while the last learner trains, or ``None``.
    """
    learners = [each() for each in make]

    def one(learner: Learner, beside: bool) -> float:
        if process is not None and beside:
            process.send_signal(signal.SIGCONT)
        learner.epoch(TrainingPhase, learner.data[TrainingPhase][:lead])
        took = timed(partial(learner.epoch, TrainingPhase), len(learner.data[TrainingPhase]))()
        if process is not None:
            process.send_signal(signal.SIGSTOP)
        learner.flush()
        return took

    try:
        return in_turns([partial(one, learner, learner is learners[-1]) for learner in learners], repetitions)
    finally:
        for learner in learners:
            learner.close()


def in_turns(runs: Sequence[Timed], repetitions: int) -> list[tuple[float, ...]]:
    gc.collect()
    gc.disable()
    try:
        for run in runs:
            run()
        return [tuple(run() for run in runs) for _ in range(repetitions)]
    finally:
        gc.enable()


# --- the cluster


@contextmanager
def cluster(workers: int) -> Generator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Start a scheduler and workers by dask's command line; give the address and the processes, which end after it."""
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            file = Path(folder, "scheduler.json")
            processes.append(dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file)))
            while not file.exists() or not file.read_text():
                time.sleep(0.05)
            address: str = json.loads(file.read_text())["address"]
            processes += [worker_on(address) for _ in range(workers)]
            yield address, processes
        finally:
            for process in processes:
                process.kill()
                process.wait()


def worker_on(address: str) -> subprocess.Popen[bytes]:
    return dask("worker", address, "--nthreads", "1", "--no-nanny")


def dask(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dask", *arguments, "--no-dashboard"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
