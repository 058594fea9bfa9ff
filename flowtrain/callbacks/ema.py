"""EMA: an exponential moving average of the weights, which validation uses."""

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

    After each batch with an update ``average = decay * average + (1 - decay) * weight``; the first one copies the
    weights. The same as torch's ``AveragedModel`` with ``get_ema_multi_avg_fn(decay)``, bit for bit
    (https://docs.pytorch.org/docs/stable/optim.html#weight-averaging-swa-and-ema). Polyak and Juditsky, "Acceleration
    of stochastic approximation by averaging", https://doi.org/10.1137/0330046.

    Buffers stay those of the model. With ``buffers=True`` those that are averages by themselves are averaged like the
    weights: the running statistics of normalisation layers, which are floating point numbers named ``running_...``. A
    mean of anything else means nothing, such as of counters, unit vectors (spectral normalisation) or masks. A weight
    with an infinity in it, as a mask that is a frozen parameter has, is copied: the average would be NaN.

    For each epoch of a validation phase the averages are put in the model, and the weights that are trained are put
    back when it ends, whatever ended it. Training goes on with the weights themselves; when it is over,
    ``with ema.applied(): ...`` evaluates or saves the averages, and `averages` has them by name.

    A checkpoint that a `Checkpointer` takes after a validation epoch holds as ``model``, and in its safetensors file,
    what was judged: the averages. The weights that are trained are beside them, as ``trained``. With
    ``fit(resume=...)`` these go on, to the bit. After ``learner.load(...)`` the model has the averages until training
    goes on.

    Reads ``model`` at `BatchEnd`, and writes it at `EpochBegin`, `EpochEnd` and `EpochCancelled` of validation phases
    and at `FitEnd`, so it runs after those that write the model and before those that read it. Costs a pass over the
    weights for each update, their size in memory for the averages, and once more during a validation epoch.

    Args:
        decay: How much of the average is kept at each update, from 0 to below 1.
        buffers: Whether to average running statistics too.
        model: The name of the model, where the learner has several.

    Raises:
        UsageError: A value that means nothing.

    Attributes:
        averages: The averages by the name of the parameter; empty before the first update.

    >>> from flowtrain.testing import tiny_learner
    >>> ema = EMA(0.5)
    >>> learner = tiny_learner(ema, n_batches=2)
    >>> learner.fit(1)
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
        self._weights: dict[str, torch.Tensor] = {}  # the model's own
        self._kept: dict[str, torch.Tensor] | None = None  # copies of what is trained, while the model has the averages
        self._held = False  # whether it has them outside of validation, since a checkpoint was loaded
        self._due = False
        self._copied: list[str] = []  # the names of weights with infinities

    def state_access(self) -> Access:
        return {f"model.{self.model}" if self.model else "model": Write()}

    def _reads(self) -> Access:
        return dict.fromkeys(self.state_access(), Read())

    def setup(self, learner: LearnerView) -> None:
        """Find the weights."""
        self._find(learner)

    @on(UpdateEnd, access={})
    def note_update(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
        """Remember that this batch has changed the weights."""
        self._due = True

    @on(BatchEnd, AbstractTrainingPhase, access="_reads")
    def take_in(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Take the weights after a batch with an update into the averages."""
        self._take_in(learner)

    @on(EpochEnd, AbstractTrainingPhase, access="_reads")
    def take_in_last(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Take in the weights after the update of a group that no batch has filled."""
        self._take_in(learner)

    @on(EpochCancelled, AbstractTrainingPhase, access="_reads")
    def take_in_cancelled(self, event: EpochCancelled, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Take in the weights after the update of a group that no batch has filled."""
        self._take_in(learner)

    def _take_in(self, learner: LearnerView) -> None:
        if not self._due:
            return
        self._due = False
        weights = self._find(learner)
        if not self.averages:
            self._take(weights)
            return
        averages = self._placed()
        with torch.no_grad():
            for names in _alike({name: weight for name, weight in weights.items() if name not in self._copied}):
                self._average([averages[name] for name in names], [weights[name].detach() for name in names], 0)
            for name in self._copied:
                averages[name].copy_(weights[name])

    def _take(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Begin with these averages, and find those that cannot be averaged with anything."""
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}
        self._copied = [name for name, weight in self.averages.items() if not weight.isfinite().all()]

    @on(EpochBegin, AbstractValidationPhase)
    def swap_in(self, event: EpochBegin, phase: AbstractValidationPhase, learner: LearnerView) -> None:
        """Put the averages in the model."""
        self._put_back()  # of an epoch that ended without its end being handled
        self._find(learner)
        self._put_averages()

    @on(EpochEnd, AbstractValidationPhase)
    def swap_out(self, event: EpochEnd, phase: AbstractValidationPhase, learner: LearnerView) -> None:
        """Put back the weights that are trained."""
        self._end_validation()

    @on(EpochCancelled, AbstractValidationPhase)
    def swap_out_cancelled(self, event: EpochCancelled, phase: AbstractValidationPhase, learner: LearnerView) -> None:
        """Put back the weights that are trained."""
        self._end_validation()

    @on(FitEnd)
    def end_fit(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Put back the weights that are trained, if a failure has kept them from it before."""
        self._end_validation()

    @on(EpochBegin, AbstractTrainingPhase)
    def begin_training(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Put back the weights that are trained, if a failure has kept them from it before."""
        self._put_back()

    @contextmanager
    def applied(self) -> Generator[None]:
        """Give a context in which the model has the averages: to evaluate it, or to save its state.

        Raises:
            UsageError: There are no averages yet.
        """
        if not self.averages:
            raise UsageError(f"{self.name or 'EMA'} has no averages yet: fit a learner that has it first.")
        inside = self._kept is not None
        self._put_averages()
        try:
            yield
        finally:
            if not inside:
                self._put_back()

    @contextmanager
    def at_rest(self) -> Generator[None]:
        """Give a context in which the model has the weights that are trained; a checkpoint is taken in it."""
        inside, held = self._kept is not None, self._held
        self._put_back()
        try:
            yield
        finally:
            self._put_back()
            self._held = held
            if inside:
                self._put_averages()

    def hold_judged(self, held: bool) -> bool:
        """Let the model have the averages, as validation judges it; or again the weights that are trained."""
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
        """Take back what `state_dict` returned. In the middle of a validation epoch it goes on with these averages.

        Raises:
            UsageError: The averages are not of this model's weights.
        """
        loaded: dict[str, torch.Tensor] = dict(state["averages"])
        if self._weights and loaded:
            self._check(loaded)
        inside = self._kept is not None
        self._take({name: average for name, average in loaded.items() if not self._weights or name in self._weights})
        if inside:
            self._kept = None  # what the model holds now was loaded with this state
            self._put_averages()

    def _end_validation(self) -> None:
        if not self._held:
            self._put_back()

    def _find(self, learner: LearnerView) -> dict[str, torch.Tensor]:
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
        """Return the averages, moved to where the weights are; a checkpoint gives them on the CPU.

        The average of a weight that training has added, or put in the place of one of another shape, begins with it.
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
            self._take({**self.averages, **new})
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
            self._kept = None  # only now: an interrupt in between leaves it to the next event

    def _check(self, loaded: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self._weights.items():
            if name not in loaded or loaded[name].shape != weight.shape:
                found = f"shape {tuple(loaded[name].shape)}" if name in loaded else "nothing"
                raise UsageError(
                    f"The state of {self.name or 'EMA'} has {found} for {name!r}, of shape {tuple(weight.shape)}. "
                    f"Load a state of the same model, made with buffers={self.buffers}."
                )


def _statistics(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that are averages by themselves, with their names."""
    for name, buffer in module.named_buffers():
        if name.rpartition(".")[2].startswith("running_") and buffer.is_floating_point():
            yield name, buffer


def _alike(weights: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Return the names of the weights, together those of one device and type."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault((weight.device, weight.dtype), []).append(name)
    return list(groups.values())
