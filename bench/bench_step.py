"""The cost of the core on the CPU, for a plain step and for each option: accumulation, clipping, precision, and so on.

Run ``python -m bench.bench_step`` from the root of the checkout. The floor of each line is a hand-written loop that
does the same with the usual functions of torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch.nn.functional import cross_entropy

from bench.pairs import PROCESSOR, Report, in_turns_afresh
from flowtrain import Learner, TorchCore, TrainingPhase

FEATURES, WIDTH, BATCH = 32, 512, 16
SGD = partial(torch.optim.SGD, lr=0.01)

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Defaults = Literal[False, "quiet"]


class Ahead:
    """A prefetch that takes the next batch early but moves no data, to time the cost of taking a batch early."""

    def start(self, raw: Any) -> Any:
        return raw

    def finish(self, moving: Any) -> Any:
        return moving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="batches in one timed epoch")
    steps = parser.parse_args().steps
    report = Report("The step on the CPU", "python -m bench.bench_step", "the loop by hand, line by line", PROCESSOR)
    data = batches(steps)
    lines: list[tuple[str, dict[str, Any], dict[str, Any], Defaults, float | None]] = [
        ("plain, no callbacks", {}, {}, False, 1.04),
        ('plain, `default_callbacks="quiet"`', {}, {"keep": True}, "quiet", 1.10),
        ("`accumulate=2`", {"accumulate": 2}, {"accumulate": 2}, False, None),
        ("`clip_grad_norm=1.0`", {"clip_grad_norm": 1.0}, {"clip": 1.0}, False, None),
        ('`precision="bf16"`', {"precision": "bf16"}, {"dtype": torch.bfloat16}, False, None),
        ("looking ahead by one batch", {"prefetch": Ahead()}, {}, False, None),
        ("`lag=2`, quiet: values read late", {"lag": 2}, {"keep": True}, "quiet", None),
    ]
    for what, options, floor, defaults, goal in lines:
        pair = [partial(by_hand, data, **floor), partial(ours, data, options, defaults)]
        times = in_turns_afresh(pair, 16, 3, PROCESSOR)
        report.ratio(what, times, goal, steps=steps)


def batches(count: int) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(BATCH, FEATURES), torch.randint(10, (BATCH,))) for _ in range(count)]


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(FEATURES, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, 10))


def ours(data: Batches, options: dict[str, Any], defaults: Defaults) -> Callable[[], None]:
    """Return a function that trains for an epoch with a learner."""
    core = TorchCore("cpu", **options)
    learner = Learner(make_model(), cross_entropy, data=data, optimizer=SGD, default_callbacks=defaults, core=core)
    return partial(learner.epoch, TrainingPhase)


def by_hand(
    data: Batches,
    *,
    accumulate: int = 1,
    clip: float | None = None,
    dtype: torch.dtype | None = None,
    keep: bool = False,
) -> Callable[[], None]:
    """Return a function that trains for an epoch with a hand-written loop."""
    model = make_model()
    optimizer = SGD(model.parameters())

    def plain() -> None:
        """Train without any option."""
        model.train()
        for inputs, targets in data:
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()

    def run() -> None:
        """Train with the given options."""
        losses: list[float] = []
        model.train()
        for number, (inputs, targets) in enumerate(data):
            if number % accumulate == 0:
                optimizer.zero_grad()
            with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
                loss = cross_entropy(model(inputs), targets)
            (loss / accumulate if accumulate > 1 else loss).backward()
            if (number + 1) % accumulate == 0:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
            if keep:
                losses.append(loss.item())

    return plain if accumulate == 1 and clip is None and dtype is None and not keep else run


if __name__ == "__main__":
    main()
