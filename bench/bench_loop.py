"""The cost of the loop: an epoch of a learner, compared with a hand-written loop that does the same.

Run ``python -m bench.bench_loop`` from the root of the checkout.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import rich
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from bench.pairs import PROCESSOR, Report, in_turns, in_turns_afresh, median
from flowtrain import Learner, TrainingPhase
from flowtrain.callbacks import Metrics
from flowtrain.metrics import accuracy

FEATURES, BATCH = 32, 16
STEPS = 1500
"""The number of batches in one timed epoch: enough to hide the fixed cost of an epoch, and to redraw a bar."""

Batches = list[tuple[torch.Tensor, torch.Tensor]]
SGD = partial(torch.optim.SGD, lr=0.01)


def main() -> None:
    report = Report("The loop", "python -m bench.bench_loop", "the hand-written loop in the same file", PROCESSOR)
    width = calibrate()
    data = batches(STEPS)

    plain = pairs(lambda: by_hand(bare, width, data), lambda: epoch(width, data, False))
    report.ratio(f"no callbacks (a {FEATURES}-{width}-10 network, batch {BATCH})", plain, 1.04, steps=STEPS)

    leaner = pairs(lambda: by_hand(bare_without_zero_grad, width, data), lambda: epoch(width, data, False))
    report.ratio("the same; the floor drops gradients without `zero_grad()`, as ours does", leaner, None, steps=STEPS)

    quiet = pairs(lambda: by_hand(with_loss, width, data), lambda: epoch(width, data, "quiet"))
    report.ratio('`default_callbacks="quiet"`', quiet, 1.10, steps=STEPS)

    with open(os.devnull, "w") as nowhere:
        rich.reconfigure(file=nowhere, force_terminal=False)
        shown = pairs(lambda: by_hand(with_loss, width, data), lambda: fit(width, data))
    report.ratio("`default_callbacks=True`, no terminal", shown, 1.10, steps=STEPS)

    rich.reconfigure(file=io.StringIO(), force_terminal=True, width=100)
    drawn = pairs(lambda: by_hand(with_loss, width, data), lambda: fit(width, data))
    report.ratio("`default_callbacks=True`, a bar on a terminal", drawn, 1.10, steps=STEPS)
    rich.reconfigure()

    train, valid = digits()
    steps = len(train) + len(valid)
    report.ratio("digits with accuracy, tensors in memory", digits_pairs(train, valid), 1.12, steps=steps)
    report.ratio("digits with accuracy, `DataLoader`", digits_pairs(loader(train), loader(valid)), 1.12, steps=steps)


def pairs(
    floor: Callable[[], Callable[[], object]], ours: Callable[[], Callable[[], object]]
) -> list[tuple[float, ...]]:
    return in_turns_afresh([floor, ours], 16, 3, PROCESSOR)


# --- a step of about 150 microseconds


def model_of(inputs: int, width: int, outputs: int = 10) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(inputs, width), torch.nn.ReLU(), torch.nn.Linear(width, outputs))


def batches(count: int) -> Batches:
    torch.manual_seed(1)
    return [(torch.randn(BATCH, FEATURES), torch.randint(10, (BATCH,))) for _ in range(count)]


def parts(width: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = model_of(FEATURES, width)
    return model, SGD(model.parameters())


def calibrate() -> int:
    """Return the hidden width for which the hand-written step comes closest to 150 microseconds."""
    data, widths = batches(200), range(128, 1025, 64)
    times = in_turns([by_hand(bare, width, data) for width in widths], 15, 1, PROCESSOR)
    steps = [median(times, which) / len(data) for which in range(len(widths))]
    return min(widths, key=lambda width: abs(steps[widths.index(width)] - 150e-6))


def by_hand(loop: Callable[[Any, Batches], object], width: int, data: Batches) -> Callable[[], object]:
    return partial(loop, parts(width), data)


def bare(made: tuple[torch.nn.Module, torch.optim.Optimizer], data: Batches) -> None:
    """Train as the hand-written loop does: the floor without callbacks."""
    model, optimizer = made
    model.train()
    for inputs, targets in data:
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = cross_entropy(outputs, targets)
        loss.backward()
        optimizer.step()


def bare_without_zero_grad(made: tuple[torch.nn.Module, torch.optim.Optimizer], data: Batches) -> None:
    """Train without ``zero_grad()``, which takes 5 to 9 microseconds, most of them for the profiler."""
    model, optimizer = made
    params = list(model.parameters())
    model.train()
    for inputs, targets in data:
        for param in params:
            param.grad = None
        outputs = model(inputs)
        loss = cross_entropy(outputs, targets)
        loss.backward()
        optimizer.step()


def with_loss(made: tuple[torch.nn.Module, torch.optim.Optimizer], data: Batches) -> float:
    """Train and keep the loss of each batch: the floor with the default callbacks."""
    model, optimizer = made
    losses: list[float] = []
    model.train()
    for inputs, targets in data:
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = cross_entropy(outputs, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def epoch(width: int, data: Batches, default_callbacks: Literal[False, "quiet"]) -> Callable[[], None]:
    learner = Learner(
        model_of(FEATURES, width), cross_entropy, data=data, optimizer=SGD, default_callbacks=default_callbacks
    )
    return partial(learner.epoch, TrainingPhase)


def fit(width: int, data: Batches) -> Callable[[], object]:
    return partial(Learner(model_of(FEATURES, width), cross_entropy, data=data, optimizer=SGD).fit, 1)


# --- real data with a metric


def digits() -> tuple[Batches, Batches]:
    """Return scikit-learn's digits in batches of 32, a fifth of them for validation."""
    bunch: Any = load_digits()
    inputs = torch.tensor(bunch.data, dtype=torch.float32) / 16
    targets = torch.tensor(bunch.target)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    pairs = list(zip(inputs[order].split(32), targets[order].split(32), strict=True))
    cut = len(pairs) * 4 // 5
    return pairs[:cut], pairs[cut:]


def loader(data: Batches) -> Any:
    inputs, targets = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=32)


def digits_pairs(train: Iterable[Any], valid: Iterable[Any], epochs: int = 3) -> list[tuple[float, ...]]:
    """Time a hand-written loop and a learner; return the seconds of one epoch of training and validation."""
    adam = partial(torch.optim.AdamW, lr=1e-3)

    def floor() -> Callable[[], object]:
        model = model_of(64, 128)
        return partial(bare_digits, model, adam(model.parameters()), train, valid, epochs)

    def ours() -> Callable[[], object]:
        model, metrics = model_of(64, 128), [Metrics(accuracy)]
        learner = Learner(
            model, cross_entropy, data=(train, valid), optimizer=adam, callbacks=metrics, default_callbacks="quiet"
        )
        return partial(learner.fit, epochs)

    return [tuple(run / epochs for run in row) for row in pairs(floor, ours)]


def bare_digits(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, train: Iterable[Any], valid: Iterable[Any], epochs: int
) -> list[tuple[float, float]]:
    """Train and validate with loss and accuracy of each batch and their means over epochs: the floor with metrics."""
    means: list[tuple[float, float]] = []
    for _ in range(epochs):
        losses: list[float] = []
        accuracies: list[float] = []
        model.train()
        for inputs, targets in train:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = cross_entropy(outputs, targets)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            accuracies.append(accuracy(outputs, targets).item())
        means.append((sum(losses) / len(losses), sum(accuracies) / len(accuracies)))
        losses, accuracies = [], []
        model.eval()
        with torch.no_grad():
            for inputs, targets in valid:
                outputs = model(inputs)
                losses.append(cross_entropy(outputs, targets).item())
                accuracies.append(accuracy(outputs, targets).item())
        means.append((sum(losses) / len(losses), sum(accuracies) / len(accuracies)))
    return means


if __name__ == "__main__":
    main()
