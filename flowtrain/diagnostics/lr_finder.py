"""Find a learning rate: train a copy while the learning rate grows, and look where the loss falls best.

Smith, "Cyclical Learning Rates for Training Neural Networks", https://arxiv.org/abs/1506.01186, section 3.3. The
learner does not change: model, optimizer and loss function are copied, and all random numbers are put back.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from flowtrain.callback.access import Access, Declaration, Read, Write, meet
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, UpdateBegin
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.diagnostics.plots import save
from flowtrain.diagnostics.scratch_learner import LearnerParts, copies, same_random_numbers
from flowtrain.errors import CancelFittingException, UsageError, is_positive, whole_number
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.hyperparameters import LearningRate
from flowtrain.training.checkpoint.rng import loader_state, set_loader_state

__all__ = ["LearningRateSweep", "find_learning_rate"]


@dataclass(frozen=True)
class LearningRateSweep:
    """What a sweep over learning rates found. Each sequence has one item for each update.

    Attributes:
        rates: The learning rates, growing.
        losses: The training loss at each: before the update with this rate, of the batches that it takes in.
        smoothed: The losses as an exponential moving average that is corrected for its start.
        diverged: Whether the sweep ended early, because the loss had grown too far.
        settled: After how many updates the average is made of enough losses to be looked at.
    """

    rates: Sequence[float] = field(repr=False)
    losses: Sequence[float] = field(repr=False)
    smoothed: Sequence[float] = field(repr=False)
    diverged: bool
    settled: int = 0

    @property
    def steepest(self) -> float:
        """The rate where the smoothed loss falls fastest before its minimum, over a tenth of the sweep."""
        half = len(self.rates) // 20 + 1  # of that tenth: between two updates there is little but noise
        first = self.settled + half
        falls = [self.smoothed[n + half] - self.smoothed[n - half] for n in range(first, self._lowest() - half + 1)]
        if not falls or min(falls) >= 0:
            raise self._unclear("steepest")
        return self.rates[first + falls.index(min(falls))]

    @property
    def valley(self) -> float:
        """The rate in the middle of the longest way down: the longest falling subsequence of the smoothed loss."""
        longest: list[tuple[int, int]] = []  # for each update, how long the way down to it is, and from where it came
        smoothed = self.smoothed[self.settled :]
        for n, loss in enumerate(smoothed):
            before = [(longest[m][0], m) for m in range(n) if smoothed[m] > loss]
            length, came = max(before, default=(0, -1))
            longest.append((length + 1, came))
        way = [max(range(len(longest)), key=lambda n: longest[n][0])] if longest else []
        while way and longest[way[-1]][1] >= 0:
            way.append(longest[way[-1]][1])
        if len(way) < 3:
            raise self._unclear("valley")
        return self.rates[self.settled + way[len(way) // 2]]

    @property
    def minimum(self) -> float:
        """A tenth of the rate with the lowest smoothed loss, where training is about to become unstable."""
        if self._lowest() <= self.settled:
            raise self._unclear("minimum")
        return self.rates[self._lowest()] / 10

    def plot(self, to: str | PathLike[str] | None = None) -> Any:
        """Draw loss over learning rate; return a ``matplotlib.figure.Figure``, made without pyplot.

        Args:
            to: A file to write it to as well; its ending says in which format. Folders that are missing are made.

        Raises:
            UsageError: matplotlib is not installed, or does not write such files.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise UsageError(
                f"plot() draws with matplotlib, and {error.name} is not installed: pip install 'flowtrain[plot]'"
            ) from error
        figure = Figure(figsize=(7.0, 3.5), layout="constrained")
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
    """Train a copy of a learner with a learning rate that grows exponentially, and return what the loss did.

    The loader of the first training phase is gone through, again and again if need be. Of the learner's callbacks,
    copies of those run that write the batch, the model or the loss function, and of those that these read from.

    Args:
        learner: The learner; it does not change.
        start: The first learning rate.
        end: The last one.
        updates: How many updates the sweep takes.
        smoothing: How much of the average of the loss is kept at each update, from 0 to below 1.
        divergence: The sweep ends when the smoothed loss is more than this many times its minimum, or not finite.
        optimizer: Whose learning rate, where the learner has several.

    Raises:
        UsageError: A value that means nothing, no training data, or something that cannot be copied.

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
    before = loader_state(loader)
    try:
        with same_random_numbers():
            _run(learner, sweep, phase, loader, updates)
    finally:
        set_loader_state(loader, before)
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
    if not 0 <= smoothing < 1:
        raise UsageError(f"find_learning_rate(smoothing={smoothing!r}): smoothing is at least 0 and below 1.")
    if not divergence > 1:
        raise UsageError(f"find_learning_rate(divergence={divergence!r}): divergence is a number above 1.")


def _training_data(learner: LearnerParts) -> tuple[Phase, Any]:
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
    """Fit a copy of the learner until the sweep ends it."""
    subject, model, lossfn, optimizer, others = copies(learner, sweep)
    wanted = _needed(learner)
    data: PhaseMap[Any] = PhaseMap("data")
    data[phase] = loader
    with type(learner)(
        model,
        lossfn,
        data=data,
        optimizer=optimizer,
        callbacks=[*(other for other in others if other.name in wanted), subject],
        default_callbacks=False,
        core=learner.core.like(),
    ) as scratch:
        scratch.fit(steps=updates * learner.core.accumulate)
    sweep.take(subject)


def _needed(learner: LearnerParts) -> set[str]:
    """Return the names of the callbacks that shape training, and of those whose ``cbstate`` these read."""
    nodes = {node.name: node.union for node in learner.state.callbacks.nodes}
    # One that writes the optimizer would set the learning rate that is swept over.
    usable = {name for name, union in nodes.items() if not any(path[0] == "optimizer" for path in _paths(union, Write))}
    roots = {"batch", "model", "params", "lossfn"}
    found = {name for name in usable if any(path[0] in roots for path in _paths(nodes[name], Write))}
    waiting = list(found)
    while waiting:
        reads = [path for path in _paths(nodes[waiting.pop()], Read) if path[0] == "cbstate"]
        for name in usable - found:
            if any(meet(path, read) for path in _paths(nodes[name], Write) for read in reads):
                found.add(name)
                waiting.append(name)
    return found


def _paths(declaration: Declaration, kind: type[Read] | type[Write]) -> list[tuple[str, ...]]:
    return [path for path, each in declaration if isinstance(each, kind)]


class _Sweep(Callback):
    """Set the learning rate before each update, and keep the loss of its batches."""

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
        self._updating = False

    def take(self, other: Any) -> None:
        """Take what another has found: a copy of this one, which ran."""
        self.rates, self.losses, self.smoothed = other.rates, other.losses, other.smoothed
        self.diverged = other.diverged

    def state_access(self) -> Access:
        return {**self.rate.access(), "batch.loss": Read()}

    @on(UpdateBegin)
    def set_rate(self, event: UpdateBegin, phase: Phase, learner: LearnerView) -> None:
        """Set the next learning rate, once for a batch."""
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
            if not math.isfinite(self.losses[-1]):  # nothing that could be drawn
                del self.rates[-1], self.losses[-1], self.smoothed[-1]
            raise CancelFittingException("the loss has grown too far")
        if len(self.rates) == self.updates:
            raise CancelFittingException("the sweep is complete")
