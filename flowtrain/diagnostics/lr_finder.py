"""Find a learning rate: train a copy of a learner while the learning rate grows, and examine how the loss falls.

Smith, "Cyclical Learning Rates for Training Neural Networks", https://arxiv.org/abs/1506.01186, section 3.3. The
learner does not change: model, optimizer and loss function are copied, and the generators of random numbers are
restored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from flowtrain.callback.access import Access, Declaration, Read, Write, overlap
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, UpdateBegin
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.diagnostics.plots import figure_type, save
from flowtrain.diagnostics.scratch_learner import LearnerParts, copies, scratch_learner
from flowtrain.errors import CancelFittingException, UsageError
from flowtrain.errors.arguments import is_a, is_positive, whole_number
from flowtrain.graph.registry import Callbacks
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.hyperparameters import LearningRate
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.checkpoint.rng import restoring_loader

__all__ = ["LearningRateSweep", "find_learning_rate"]


@dataclass(frozen=True)
class LearningRateSweep:
    """The losses of a sweep over learning rates. Each sequence has one item for each update.

    Attributes:
        rates: The learning rates, growing.
        losses: The mean training loss of the batches of each update, before the update is made.
        smoothed: The exponential moving average of the losses, corrected for its start.
        diverged: Whether the sweep ended early, because the loss had grown too far.
        settled: The number of updates after which the average consists of enough losses to be used.
    """

    rates: Sequence[float] = field(repr=False)
    losses: Sequence[float] = field(repr=False)
    smoothed: Sequence[float] = field(repr=False)
    diverged: bool
    settled: int = 0

    @property
    def steepest(self) -> float:
        """The rate at which the smoothed loss falls fastest before its minimum.

        The fall is measured over a tenth of the sweep.

        Raises:
            UsageError: The loss did not fall.
        """
        half = len(self.rates) // 20 + 1  # half of a tenth: the difference of two single updates is mostly noise
        first = self.settled + half
        falls = [self.smoothed[n + half] - self.smoothed[n - half] for n in range(first, self._lowest() - half + 1)]
        if not falls or min(falls) >= 0:
            raise self._unclear("steepest")
        return self.rates[first + falls.index(min(falls))]

    @property
    def valley(self) -> float:
        """The rate in the middle of the longest falling subsequence of the smoothed loss.

        Raises:
            UsageError: The loss did not fall.
        """
        longest: list[tuple[int, int]] = []  # the length of the subsequence that ends here, and its item before
        smoothed = self.smoothed[self.settled :]
        for n, loss in enumerate(smoothed):
            before = [(longest[m][0], m) for m in range(n) if smoothed[m] > loss]
            length, previous = max(before, default=(0, -1))
            longest.append((length + 1, previous))
        chain = [max(range(len(longest)), key=lambda n: longest[n][0])] if longest else []
        while chain and longest[chain[-1]][1] >= 0:
            chain.append(longest[chain[-1]][1])
        if len(chain) < 3:
            raise self._unclear("valley")
        return self.rates[self.settled + chain[len(chain) // 2]]

    @property
    def minimum(self) -> float:
        """A tenth of the rate with the lowest smoothed loss, above which training is likely to become unstable.

        Raises:
            UsageError: The loss did not fall.
        """
        if self._lowest() <= self.settled:
            raise self._unclear("minimum")
        return self.rates[self._lowest()] / 10

    def plot(self, to: str | PathLike[str] | None = None) -> Any:
        """Draw the loss over the learning rate; return a ``matplotlib.figure.Figure``, made without pyplot.

        Args:
            to: The path of a file to write as well, in the format of its suffix. Missing folders are made.

        Raises:
            UsageError: matplotlib is not installed, or does not write files with this suffix.
        """
        figure = figure_type()(figsize=(7.0, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color="C0", linewidth=0.8, alpha=0.4, label="loss")
        axes.plot(self.rates, self.smoothed, color="C0", label="loss, smoothed")
        for number, name in enumerate(("steepest", "valley", "minimum"), start=1):
            try:
                rate = getattr(self, name)
            except UsageError:
                continue
            axes.axvline(rate, color=f"C{number}", linestyle="--", label=f"{name}: {rate:.2g}")
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("Loss")
        axes.legend()
        if to is not None:
            save(figure, Path(to))
        return figure

    def _lowest(self) -> int:
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)

    def _unclear(self, what: str) -> UsageError:
        return UsageError(
            f"There is no {what} learning rate: over {len(self.rates)} updates with rates from {self.rates[0]:.2g} to "
            f"{self.rates[-1]:.2g} the loss did not fall. Look at plot(); sweep over lower rates, or with more updates."
        )


def find_learning_rate(
    learner: LearnerParts,
    *,
    start: float = 1e-7,
    end: float = 10.0,
    updates: int = 100,
    smoothing: float = 0.9,
    divergence: float = 4.0,
    optimizer: str = "",
) -> LearningRateSweep:
    """Train a copy of a learner with a learning rate that grows exponentially, and return the losses.

    The copy trains on the loader of the first training phase, in several passes if necessary. It has copies of the
    callbacks that write the batch, the model or the loss function, and of the callbacks that these read from.

    Args:
        learner: The learner, which does not change.
        start: The first learning rate.
        end: The last learning rate.
        updates: The number of updates.
        smoothing: The share of the average of the loss that is kept at each update, from 0 to below 1.
        divergence: The sweep ends when the smoothed loss is more than this many times its minimum, or not finite.
        optimizer: The name of the optimizer, if the learner has several.

    Raises:
        UsageError: An argument is out of its range, a handler or a step called this, the learner has no training data
            or an iterator as data, a part of the learner cannot be copied, or the first loss is not finite.

    >>> from flowtrain.testing import tiny_learner
    >>> sweep = find_learning_rate(tiny_learner(), start=1e-4)
    >>> sweep.diverged, 0.01 < sweep.steepest < 1
    (True, True)
    """
    updates = whole_number("find_learning_rate(): updates", updates, least=2)
    _check(start, end, smoothing, divergence)
    learner.loop.scopes.refuse_nested("find_learning_rate()")
    phase, loader = _training_data(learner)
    sweep = _Sweep(LearningRate(optimizer), start, end, updates, smoothing, divergence)
    with restoring_loader(loader):  # the copy of the learner trains on the loader itself
        _run(learner, sweep, phase, loader, updates)
    settled = math.ceil(1 / (1 - smoothing)) if smoothing else 0
    if not sweep.losses:
        raise UsageError(
            f"find_learning_rate(): the loss of the first update, with the rate {start}, is not finite. Look for NaN "
            f"in the data and in the model's parameters."
        )
    return LearningRateSweep(tuple(sweep.rates), tuple(sweep.losses), tuple(sweep.smoothed), sweep.diverged, settled)


def _check(start: float, end: float, smoothing: float, divergence: float) -> None:
    if not is_positive(start) or not is_positive(end) or not start < end < math.inf:
        raise UsageError(f"find_learning_rate(start={start!r}, end={end!r}): 0 < start < end, as 1e-7 and 10.0.")
    if not is_a(smoothing, (int, float)) or not 0 <= smoothing < 1:
        raise UsageError(
            f"find_learning_rate(smoothing={smoothing!r}): smoothing is at least 0 and below 1, such as 0.9."
        )
    if not is_positive(divergence) or not divergence > 1:
        raise UsageError(f"find_learning_rate(divergence={divergence!r}): divergence is a number above 1.")


def _training_data(learner: LearnerParts) -> tuple[Phase, Any]:
    """Return the first training phase and its loader.

    Raises:
        UsageError: There is no training phase, or its loader can be iterated only once.
    """
    for phase, loader in learner.state.data.items():
        if isinstance(phase, AbstractTrainingPhase):
            if isinstance(loader, Iterator):
                raise UsageError(
                    f"The data for {phase!r} is an iterator: the sweep would use it up. Pass a list, a DataLoader, or "
                    f"anything that can be iterated again."
                )
            return phase, loader
    raise UsageError("find_learning_rate() needs data to train on. Pass data=(train_loader, valid_loader) to Learner.")


def _run(learner: LearnerParts, sweep: _Sweep, phase: Phase, loader: Any, updates: int) -> None:
    """Fit a copy of the learner until the sweep ends the fit."""
    subject, model, lossfn, optimizer, others = copies(learner, sweep, "find_learning_rate()")
    needed = _needed(learner)
    data: PhaseMap[Any] = PhaseMap("data")
    data[phase] = loader
    callbacks = [*(other for other in others if other.name in needed), subject]

    def build(state: LearnerState) -> Callbacks:
        """Return the callbacks of the sweep."""
        return Callbacks(callbacks, state, [type(phase)])

    with scratch_learner(learner, (model, lossfn, optimizer), data, build) as scratch:
        scratch.fit(steps=updates * learner.core.accumulate)
    sweep.take(subject)


def _needed(learner: LearnerParts) -> set[str]:
    """Return the names of the callbacks that write the training state, and of those whose ``cbstate`` these read."""
    nodes = {node.name: node.union for node in learner.state.callbacks.nodes}
    # A callback that writes the optimizer is left out, since it would overwrite the learning rate of the sweep.
    usable = {name for name, union in nodes.items() if not any(path[0] == "optimizer" for path in _paths(union, Write))}
    roots = {"batch", "model", "params", "lossfn"}
    found = {name for name in usable if any(path[0] in roots for path in _paths(nodes[name], Write))}
    waiting = list(found)
    while waiting:
        reads = [path for path in _paths(nodes[waiting.pop()], Read) if path[0] == "cbstate"]
        for name in usable - found:
            if any(overlap(path, read) for path in _paths(nodes[name], Write) for read in reads):
                found.add(name)
                waiting.append(name)
    return found


def _paths(declaration: Declaration, kind: type[Read] | type[Write]) -> list[tuple[str, ...]]:
    return [path for path, each in declaration if isinstance(each, kind)]


class _Sweep(Callback):
    """Sets the learning rate before each update, and keeps the loss of the batches of the update."""

    def __init__(
        self, rate: LearningRate, start: float, end: float, updates: int, smoothing: float, divergence: float
    ) -> None:
        self.rate, self.start, self.end, self.updates = rate, start, end, updates
        self.smoothing, self.divergence = smoothing, divergence
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.diverged = False
        self._group: list[float] = []  # the losses of the batches since the last update
        self._average = 0.0
        self._updating = False  # whether an update has begun in this batch

    def take(self, other: Any) -> None:
        """Take the results of a copy of this callback, which ran in the copy of the learner."""
        self.rates, self.losses, self.smoothed = other.rates, other.losses, other.smoothed
        self.diverged = other.diverged

    def state_access(self) -> Access:
        """Declare a write of the learning rate, and a read of the loss."""
        return {**self.rate.access(), "batch.loss": Read()}

    @on(UpdateBegin)
    def set_rate(self, event: UpdateBegin, phase: Phase, learner: LearnerView) -> None:
        """Set the next learning rate, at the first update of a batch."""
        if not self._updating:
            self._updating = True
            share = len(self.rates) / (self.updates - 1)
            self.rates.append(self.start * (self.end / self.start) ** share)
            self.rate.set(learner, self.rates[-1])

    @on(BatchEnd, AbstractTrainingPhase)
    def keep_loss(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Keep the loss; end the fit with the last update, or when the loss has grown too far."""
        self._group.append(float(learner.batch.loss))
        if not self._updating:
            return
        self._updating = False
        self.losses.append(sum(self._group) / len(self._group))
        self._group.clear()
        self._average = self.smoothing * self._average + (1 - self.smoothing) * self.losses[-1]
        self.smoothed.append(self._average / (1 - self.smoothing ** len(self.losses)))
        lowest = min(self.smoothed)
        if not math.isfinite(self.losses[-1]) or self.smoothed[-1] > lowest + (self.divergence - 1) * abs(lowest):
            self.diverged = True
            if not math.isfinite(self.losses[-1]):  # such a loss cannot be drawn
                del self.rates[-1], self.losses[-1], self.smoothed[-1]
            raise CancelFittingException("the loss has grown too far")
        if len(self.rates) == self.updates:
            raise CancelFittingException("the sweep is complete")
