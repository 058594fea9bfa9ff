"""The cost of the loop on a GPU, compared with the hand-written loop and with Lightning in the same run.

Run ``python -m bench.bench_gpu`` from the root of the checkout, on a machine with an idle CUDA device. ``--dry-run``
runs all of it on the CPU with small sizes, as a test of the benchmark itself; its figures are not measurements.

There are three cases: a network whose time is the time of kernel launches, GPT-2 with 124 million parameters in bf16,
and a loader that takes as long as the step. Every loop gets the same batches in host memory, keeps its losses on the
device, and uses the same fused optimizer. A run ends with a synchronisation. Lightning is left out if it is not
installed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.gpu_models import GPT2, Shape, language_loss, mlp
from bench.pairs import Report, figure, in_turns, median, microseconds
from flowtrain import Learner, TorchCore, TrainingPhase
from flowtrain.core.precision import Precision, autocast

Batches = list[tuple[Tensor, Tensor]]
Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """A model with its data.

    Attributes:
        name: The name of the case.
        make: A function that makes the model.
        lossfn: The loss function.
        batches: The batches, in host memory.
        precision: The precision of the forward pass.
        goal: The largest ratio of our time to the time of the hand-written loop.
    """

    name: str
    make: Callable[[], nn.Module]
    lossfn: Callable[[Tensor, Tensor], Tensor]
    batches: Any
    precision: Precision
    goal: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="on the CPU and in small, to see that it runs")
    dry = parser.parse_args().dry_run
    if not dry and not torch.cuda.is_available():
        sys.exit("bench_gpu needs a CUDA device, and torch finds none. To see that it runs: --dry-run.")
    device = torch.device("cpu" if dry else "cuda")
    repetitions = 30
    print(_hardware(device))
    report = Report("A GPU", "python -m bench.bench_gpu", "the hand-written loop in the same run")
    for case in cases(dry):
        compare(report, case, device, repetitions)
    slow_loader(report, device, dry)


def cases(dry: bool) -> list[Case]:
    """Return the cases whose loader takes no time."""
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(32, 64, generator=generator), torch.randint(10, (32,), generator=generator))
        for _ in range(4 if dry else 500)
    ]
    shape = Shape(64, 16, 1, 2, 16) if dry else Shape()
    rows = 2 if dry else 8
    texts = [
        torch.randint(shape.vocabulary, (rows, shape.context + 1), generator=generator) for _ in range(2 if dry else 20)
    ]
    tokens = [(text[:, :-1].contiguous(), text[:, 1:].contiguous()) for text in texts]
    size = f"{rows} x {shape.context}"
    return [
        Case("MLP 64-256-256-10, batch 32", partial(mlp, 64, 256, 256, 10), cross_entropy, pairs, "fp32", 1.05),
        Case(f"GPT-2 124M, bf16, {size}", partial(GPT2, shape), language_loss, tokens, "bf16", 1.01),
    ]


def compare(report: Report, case: Case, device: torch.device, repetitions: int) -> None:
    """Time the hand-written loop, ours and Lightning in turns, and count synchronisations of ours."""
    steps = len(case.batches)
    runs = [by_hand(case, device), ours(case, device, False), ours(case, device, "quiet")]
    names = ["no callbacks", '`default_callbacks="quiet"`']
    lightning = in_lightning(case, device)
    if lightning is not None:
        runs.append(lightning)
        names.append("Lightning, no logger, no bar")
    times = in_turns([_until_done(run, device) for run in runs], repetitions, 2)
    for which, name in enumerate(names, start=1):
        goal = case.goal if which < 3 else None
        report.ratio(f"{case.name}: {name}", times, goal, steps=steps, which=which)
    if lightning is None:
        report.row(f"{case.name}: Lightning", "", "", "not installed")
    found = synchronisations(ours(case, device, "quiet"), device)
    report.row(f"{case.name}: synchronisations in an epoch of {steps} batches", "", "", found, "0 in each batch")


def slow_loader(report: Report, device: torch.device, dry: bool) -> None:
    """Compare prefetch, no prefetch and the hand-written loop, with a loader that takes as long as the step."""
    width, rows = (64, 8) if dry else (8192, 4096)
    steps = 3 if dry else 30
    batches = [(torch.randn(rows, width), torch.randint(10, (rows,))) for _ in range(4)]
    make = partial(mlp, width, width, width, 10)
    free = Case("", make, cross_entropy, [batches[0]] * steps, "bf16", 1.1)
    step = median(in_turns([_until_done(by_hand(free, device), device)], 5, 2), 0) / steps
    slow = Case("", make, cross_entropy, SlowLoader(batches, steps, step), "bf16", 1.1)
    runs = [ours(slow, device, "quiet"), ours(slow, device, "quiet", prefetch=False), by_hand(slow, device)]
    times = in_turns([_until_done(run, device) for run in runs], 30, 1)
    for which, name in enumerate(("prefetch", "`prefetch=False`", "by hand, from pageable memory")):
        found = figure([row[which] / steps / step for row in times])
        report.row(
            f"a loader as slow as the step ({step * 1e3:.1f} ms each): {name}",
            microseconds(step),
            microseconds(median(times, which) / steps),
            found.text(),
            "1.10" if which == 0 else "",
            reached=found.median <= 1.1 if which == 0 else None,
        )


class SlowLoader:
    """A loader that works for the same time on each batch, in this process, and gives batches in host memory."""

    def __init__(self, batches: Batches, steps: int, seconds: float) -> None:
        self._batches, self._steps, self._seconds = batches, steps, seconds

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(self._steps):
            until = time.perf_counter() + self._seconds
            while time.perf_counter() < until:
                pass
            yield self._batches[number % len(self._batches)]


# --- the loops


def _optimizer(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-4, fused=True)


def by_hand(case: Case, device: torch.device) -> Run:
    """Return a function that trains for an epoch with the usual hand-written loop."""
    torch.manual_seed(0)
    model = case.make().to(device)
    optimizer = _optimizer(model.parameters())

    def run() -> list[Tensor]:
        """Train, and return the losses, which stay on the device."""
        losses: list[Tensor] = []
        model.train()
        for inputs, targets in case.batches:
            inputs, targets = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            optimizer.zero_grad()
            with autocast(device, case.precision):
                loss = case.lossfn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    return run


def ours(case: Case, device: torch.device, defaults: Any, **options: Any) -> Run:
    """Return a function that trains for an epoch with a learner."""
    torch.manual_seed(0)
    core = TorchCore(device, case.precision, **options)
    learner = Learner(
        case.make(), case.lossfn, data=case.batches, optimizer=_optimizer, default_callbacks=defaults, core=core
    )
    return partial(learner.epoch, TrainingPhase)


def in_lightning(case: Case, device: torch.device) -> Run | None:
    """Return a function that trains for an epoch with Lightning; ``None`` if Lightning is not installed."""
    try:
        lightning: Any = importlib.import_module("lightning")
    except ImportError:
        return None

    class Module(lightning.LightningModule):
        """The same model, loss and optimizer."""

        def __init__(self) -> None:
            super().__init__()
            self.model = case.make()

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            """Return the loss."""
            inputs, targets = batch
            return case.lossfn(self.model(inputs), targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            """Return the optimizer."""
            return _optimizer(self.parameters())

    torch.manual_seed(0)
    module = Module()

    def run() -> None:
        """Train with a new trainer, because a trainer of Lightning fits only once."""
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            precision="bf16-mixed" if case.precision == "bf16" else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, case.batches)

    return run


def _until_done(run: Run, device: torch.device) -> Run:
    def timed() -> None:
        """Run, and wait for the device."""
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return timed


def synchronisations(run: Run, device: torch.device) -> str:
    """Return how often the host waits for the device in an epoch, by the warnings of torch."""
    if device.type != "cuda":
        return "no GPU"
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return str(sum("synchronizing CUDA operation" in str(each.message) for each in caught))


def _hardware(device: torch.device) -> str:
    if device.type != "cuda":
        return "A dry run on the CPU: these figures are no measurements.\n"
    found = torch.cuda.get_device_properties(device)
    return (
        f"GPU: {found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors; CUDA "
        f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}\n"
    )


if __name__ == "__main__":
    main()
