"""The cost of several ranks: a fit of a learner, compared with a loop that is written by hand with DDP.

Run ``torchrun --standalone --nproc-per-node 2 -m bench.bench_ranks`` from the root of the checkout, with at least as
many cores as ranks. All ranks run the same function at the same time, after a barrier; the main rank keeps the time and
prints. Where Lightning is installed, it runs beside them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from bench.pairs import Report, differences, in_turns, in_turns_afresh, median
from bench.peers import Work
from bench.peers import lightning as lightning_fit
from flowtrain import Learner, TorchCore

FEATURES, WIDTH = 32, 256
SGD = partial(torch.optim.SGD, lr=0.01)

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Defaults = Literal[False, "quiet"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="how often models are made; each is timed 3 times")
    parser.add_argument("--dry-run", action="store_true", help="train for a few batches only, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    turns = partial(in_turns_afresh, rounds=options.rounds, repetitions=3, before=dist.barrier)
    size = dist.get_world_size()
    with only_the_main_rank_prints():
        report = Report(
            f"Training on {size} ranks",
            f"torchrun --standalone --nproc-per-node {size} -m bench.bench_ranks",
            "the loop by hand with DDP in the same file",
        )
        few = batches(1, 8)
        times = turns([partial(by_hand, few), partial(ours, few, False)])
        floor, whole = (f"{median(times, which) * 1e3:.2f} ms" for which in (0, 1))
        more = f"{differences(times).text(1e3, 2)} ms"
        report.row("a fit of one epoch of one batch: the exchanges of a fit and of an epoch", floor, whole, more)
        for milliseconds, many, bare_goal, quiet_goal in ((1.5, 1000, 1.04, 1.08), (10.0, 200, 1.02, 1.03)):
            batch, steps = calibrate(milliseconds / 1000), 4 if options.dry_run else many
            data = batches(steps, batch)
            what = f"steps of {milliseconds} ms (batches of {batch})"
            bare: list[Callable[[], Callable[[], object]]] = [partial(by_hand, data), partial(ours, data, False)]
            if find_spec("lightning"):
                bare.append(partial(lightning, data))
            times = turns(bare)
            report.ratio(f"no callbacks, {what}", times, bare_goal, steps=steps)
            if len(bare) > 2:
                report.ratio(f"Lightning, {what}", times, None, steps=steps, which=2)
            times = turns([partial(by_hand, data, keep=True), partial(ours, data, "quiet")])
            report.ratio(f'`default_callbacks="quiet"`, {what}', times, quiet_goal, steps=steps)
            times = turns([partial(by_hand, data, accumulate=4), partial(ours, data, False, 4)])
            report.ratio(f"`accumulate=4`, {what}", times, 1.03, steps=steps)
    dist.destroy_process_group()


@contextmanager
def only_the_main_rank_prints() -> Generator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if dist.get_rank() == 0 else nowhere):
        yield


def model_of() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(FEATURES, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 10))


def batches(count: int, size: int) -> Batches:
    random = torch.Generator().manual_seed(dist.get_rank())
    inputs = torch.randn(count, size, FEATURES, generator=random)
    return list(zip(inputs, torch.randint(10, (count, size), generator=random), strict=True))


def calibrate(seconds: float) -> int:
    """Return the size of the batches for which a step by hand takes about this time, the same size on all ranks."""
    size = 8
    while True:
        data = batches(10, size)
        times = in_turns([by_hand(data)], 7, 1, before=dist.barrier)
        found = [median(times, 0) / len(data)]
        dist.broadcast_object_list(found)  # the main rank decides
        if found[0] > seconds / 2:
            return max(1, round(size * seconds / found[0] / 8)) * 8
        size *= 2


def by_hand(data: Batches, *, keep: bool = False, accumulate: int = 1) -> Callable[[], object]:
    """Return the floor: an epoch by hand, which keeps the loss of each batch if it is compared with callbacks."""
    model = model_of()
    parallel, optimizer = DistributedDataParallel(model), SGD(model.parameters())

    def step(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(parallel(inputs), targets)
        (loss if accumulate == 1 else loss / accumulate).backward()
        return loss

    def epoch() -> float:
        losses: list[float] = []
        model.train()
        for number, (inputs, targets) in enumerate(data, start=1):
            if accumulate == 1:
                optimizer.zero_grad()
                loss = step(inputs, targets)
                optimizer.step()
            elif number % accumulate:
                if number % accumulate == 1:
                    optimizer.zero_grad()
                with parallel.no_sync():
                    loss = step(inputs, targets)
            else:
                loss = step(inputs, targets)
                optimizer.step()
            if keep:
                losses.append(loss.item())
        return sum(losses)

    return epoch


def ours(data: Batches, defaults: Defaults, accumulate: int = 1) -> Callable[[], object]:
    core = TorchCore(device="cpu", accumulate=accumulate)
    learner = Learner(model_of(), cross_entropy, data=data, optimizer=SGD, core=core, default_callbacks=defaults)
    return partial(learner.fit, 1)


def lightning(data: Batches) -> Callable[[], object]:
    work = Work(model_of, data, optimizer=SGD)
    return lightning_fit(work, callbacks=[], strategy="ddp", devices=dist.get_world_size())


if __name__ == "__main__":
    main()
