"""EMA: an exponential moving average of the weights, which the model has during validation."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, EpochBegin, EpochCancelled, EpochEnd, FitEnd, UpdateEnd
from flowtrain.callback.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import UsageError, is_a

__all__ = ["EMA"]


class EMA(Callback):
    """Keep an exponential moving average of the weights, and validate with it.

    After each batch with an update ``average = decay * average + (1 - decay) * weight``; the first average is a copy of
    the weights. This is torch's ``AveragedModel`` with ``get_ema_multi_avg_fn(decay)``, bit for bit
    (https://docs.pytorch.org/docs/stable/optim.html#weight-averaging-swa-and-ema). Polyak and Juditsky, "Acceleration
    of stochastic approximation by averaging", https://doi.org/10.1137/0330046.

    Buffers are not averaged by default. With ``buffers=True`` the running statistics of normalisation layers, which are
    floating point buffers named ``running_...``, are averaged like the weights. Other buffers never are: the mean of
    counters, unit vectors (spectral normalisation) or masks is not a valid value of them. A weight that contains an
    infinity, as a mask that is a frozen parameter does, is copied, because its average would be NaN.

    The model has the averages during each epoch of a validation phase, and the trained weights again when the epoch
    ends, normally or not. Training continues with the trained weights. After training ``with ema.applied(): ...``
    evaluates or saves the averages, and `averages` has them by name.

    A checkpoint that a `Checkpointer` takes after a validation epoch holds the averages as ``model``, and in its
    safetensors file, since these are the weights that were judged. It holds the trained weights as ``trained``, with
    which ``fit(resume=...)`` continues, bit for bit. After ``learner.load(...)`` the model has the averages until
    training continues.

    Reads ``model`` at `BatchEnd`, and writes it at `EpochBegin`, `EpochEnd` and `EpochCancelled` of validation phases
    and at `FitEnd`, so it runs after callbacks that write the model and before callbacks that read it. Costs a pass
    over the weights for each update, their size in memory for the averages, and the same again during a validation
    epoch.

    Args:
        decay: The share of the average that is kept at each update, from 0 to below 1.
        buffers: Whether to average running statistics too.
        model: The name of the model, if the learner has several.

    Raises:
        UsageError: `decay` is out of its range, or `model` is no name of a model.

    Attributes:
        averages: The averages by the name of the parameter; empty before the first update.

    >>> from flowtrain.testing import tiny_learner
    >>> ema = EMA(0.5)
    >>> learner = tiny_learner(ema, n_batches=2)
    >>> history = learner.fit(1)
    >>> with ema.applied():
    ...     averaged = learner.model.coeff.item()
    >>> 0 < averaged < learner.model.coeff.item()  # on its way to 3, the average is behind
    True
    """

    def __init__(self, decay: float = 0.999, *, buffers: bool = False, model: str = "") -> None:
        if not is_a(decay, (int, float)) or not 0 <= decay < 1:
            raise UsageError(f"EMA(decay={decay!r}): decay is at least 0 and below 1.")
        if not is_a(model, str) or "." in model:
            raise UsageError(f"EMA(model={model!r}): model is the name of one of several models, as in {{'gen': ...}}.")
        self.decay = decay
        self.buffers = buffers
        self.model = model
        self.averages: dict[str, torch.Tensor] = {}
        self._average = get_ema_multi_avg_fn(decay)
        self._weights: dict[str, torch.Tensor] = {}  # the tensors of the model
        self._kept: dict[str, torch.Tensor] | None = None  # the trained weights, while the model has the averages
        self._held = False  # the model has the averages outside of validation, since a checkpoint was loaded
        self._due = False  # an update has changed the weights since the last average
        self._copied: list[str] = []  # the names of weights with infinities

    def state_access(self) -> Access:
        """Declare a write of the model, for the handlers that exchange its weights."""
        return {f"model.{self.model}" if self.model else "model": Write()}

    def _reads(self) -> Access:
        return dict.fromkeys(self.state_access(), Read())

    def setup(self, learner: LearnerView) -> None:
        """Find the weights."""
        self._find(learner)

    @on(UpdateEnd, access={})
    def note_update(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
        """Note that this batch has changed the weights."""
        self._due = True

    @on(BatchEnd, AbstractTrainingPhase, access="_reads")
    def take_in(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Update the averages after a batch with an update."""
        self._take_in(learner)

    @on(EpochEnd, AbstractTrainingPhase, access="_reads")
    def take_in_last(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Update the averages after the update of an accumulation group that the epoch has not filled."""
        self._take_in(learner)

    @on(EpochCancelled, AbstractTrainingPhase, access="_reads")
    def take_in_cancelled(self, event: EpochCancelled, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Update the averages after the update of an accumulation group that the epoch has not filled."""
        self._take_in(learner)

    def _take_in(self, learner: LearnerView) -> None:
        if not self._due:
            return
        self._due = False
        weights = self._find(learner)
        if not self.averages:
            self._start(weights)
            return
        averages = self._placed()
        with torch.no_grad():
            for names in _alike({name: weight for name, weight in weights.items() if name not in self._copied}):
                self._average([averages[name] for name in names], [weights[name].detach() for name in names], 0)
            for name in self._copied:
                averages[name].copy_(weights[name])

    def _start(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Make copies of these weights the averages, and find the weights with infinities, which are only copied."""
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}
        self._copied = [name for name, weight in self.averages.items() if not weight.isfinite().all()]

    @on(EpochBegin, AbstractValidationPhase)
    def swap_in(self, event: EpochBegin, phase: AbstractValidationPhase, learner: LearnerView) -> None:
        """Put the averages into the model."""
        self._put_back()  # in case the last validation epoch ended without its closing event being handled here
        self._find(learner)
        self._put_averages()

    @on(EpochEnd, AbstractValidationPhase)
    def swap_out(self, event: EpochEnd, phase: AbstractValidationPhase, learner: LearnerView) -> None:
        """Put the trained weights back into the model."""
        self._end_validation()

    @on(EpochCancelled, AbstractValidationPhase)
    def swap_out_cancelled(self, event: EpochCancelled, phase: AbstractValidationPhase, learner: LearnerView) -> None:
        """Put the trained weights back into the model."""
        self._end_validation()

    @on(FitEnd)
    def end_fit(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Put the trained weights back, if a failure has prevented it at the end of the epoch."""
        self._end_validation()

    @on(EpochBegin, AbstractTrainingPhase)
    def begin_training(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Put the trained weights back, if a failure has prevented it before."""
        self._put_back()

    @contextmanager
    def applied(self) -> Generator[None]:
        """Give a context in which the model has the averages, to evaluate it or to save its state.

        Raises:
            UsageError: No update has been made yet, so there are no averages.
        """
        if not self.averages:
            raise UsageError(f"{self.name or 'EMA'} has no averages yet: fit a learner that has it first.")
        inside = self._kept is not None
        try:
            self._put_averages()
            yield
        finally:
            if not inside:
                self._put_back()

    @contextmanager
    def at_rest(self) -> Generator[None]:
        """Give a context in which the model has the trained weights; a checkpoint is taken within it."""
        inside, held = self._kept is not None, self._held
        try:
            self._put_back()
            yield
        finally:
            self._put_back()
            self._held = held
            if inside:
                self._put_averages()

    def hold_judged(self, held: bool) -> bool:
        """Put the averages, which validation judges, into the model, or the trained weights back.

        Args:
            held: Whether the model is to have the averages, until the next call.

        Returns:
            Whether the call has changed the model.
        """
        changed = self._held if not held else bool(self.averages)
        if changed and held:
            self._put_averages()
        elif changed:
            self._put_back()
        self._held = held and changed
        return changed

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by name."""
        return {"averages": dict(self.averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the averages that `state_dict` returned. Within a validation epoch the model gets them at once.

        Raises:
            UsageError: The averages have other names or shapes than the weights of the model.
        """
        loaded: dict[str, torch.Tensor] = dict(state["averages"])
        if self._weights and loaded:
            self._check(loaded)
        inside = self._kept is not None
        self._start({name: average for name, average in loaded.items() if not self._weights or name in self._weights})
        if inside:
            self._kept = None  # the checkpoint has put its trained weights into the model, so forget the earlier ones
            self._put_averages()

    def _end_validation(self) -> None:
        if not self._held:
            self._put_back()

    def _find(self, learner: LearnerView) -> dict[str, torch.Tensor]:
        """Find the averaged tensors of the model, which training may have replaced since the last call."""
        model = getattr(learner.model, self.model) if self.model else learner.model
        modules: Iterable[tuple[str, Any]] = [("", model)]
        if not isinstance(model, torch.nn.Module):  # several models by name
            modules = [(f"{name}.", each) for name, each in model.items()]
        self._weights = {
            prefix + name: weight
            for prefix, module in modules
            for name, weight in chain(module.named_parameters(), _statistics(module) if self.buffers else ())
        }
        return self._weights

    def _placed(self) -> dict[str, torch.Tensor]:
        """Return the averages on the devices of the weights; the averages of a checkpoint are on the CPU.

        A weight that training has added, or replaced by one of another shape, is its own first average.
        """
        if self.averages.keys() != self._weights.keys():
            self.averages = {name: average for name, average in self.averages.items() if name in self._weights}
        new: dict[str, torch.Tensor] = {}
        for name, weight in self._weights.items():
            average = self.averages.get(name)
            if average is None or average.shape != weight.shape:
                new[name] = weight
            elif average.device != weight.device:
                self.averages[name] = average.to(weight.device)
        if new:
            self._start({**self.averages, **new})
        return self.averages

    def _put_averages(self) -> None:
        if self._kept is None and self.averages:
            averages = self._placed()
            self._kept = {name: weight.detach().clone() for name, weight in self._weights.items()}
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(averages[name])

    def _put_back(self) -> None:
        if self._kept is not None:
            with torch.no_grad():
                for name, weight in self._weights.items():
                    weight.copy_(self._kept[name])
            self._kept = None  # only now, so that after an interrupt between two copies the next event copies again

    def _check(self, loaded: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self._weights.items():
            if name not in loaded or loaded[name].shape != weight.shape:
                found = f"shape {tuple(loaded[name].shape)}" if name in loaded else "nothing"
                raise UsageError(
                    f"The state of {self.name or 'EMA'} has {found} for {name!r}, of shape {tuple(weight.shape)}. "
                    f"Load a state of the same model, made with buffers={self.buffers}."
                )


def _statistics(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the running statistics of normalisation layers, with their names."""
    for name, buffer in module.named_buffers():
        if name.rpartition(".")[2].startswith("running_") and buffer.is_floating_point():
            yield name, buffer


def _alike(weights: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Return the names of the weights in groups of one device and dtype: torch averages each group in one call."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault((weight.device, weight.dtype), []).append(name)
    return list(groups.values())
