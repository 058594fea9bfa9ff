"""Averages of the weights, which the model has during validation: the base of `EMA` and `SWA`.

A callback of this kind has averages of the weights beside the trained weights, and exchanges the two. During an epoch
of a validation phase the model has the averages. Whatever ends that epoch, the model gets the trained weights back.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, EpochBegin, EpochCancelled, EpochEnd, FitEnd, UpdateEnd
from flowtrain.callback.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase
from flowtrain.callback.resolution import Resolution, Unresolvable
from flowtrain.callback.view import LearnerView
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.state.shards import is_sharded, shard_like

__all__ = ["Averaging"]


class Averaging(Callback):
    """Base of the callbacks that average the weights, and validate with the averages.

    A subclass says after which updates or epochs it takes the weights in (`counts`), and how a weight changes its
    average (`average`).

    Args:
        model: The name of the model, if the learner has several; or of the part of the only model that is averaged.

    Attributes:
        averages: The averages by the name of the parameter; empty before the first.
        taken: How often the weights were taken in.
        by_update: Whether the weights are taken in after updates.
    """

    first: ClassVar[str] = "fit a learner that has it first"
    """How to get averages, for the message of a callback that has none yet."""

    missing = "Write model= only if the learner has several models, with the name of one of them."

    def __init__(self, model: str) -> None:
        kind = type(self).__name__
        if not is_a(model, str) or "." in model:
            raise UsageError(
                f"{kind}(model={model!r}): model is the name of one of several models, as in {{'gen': ...}}."
            )
        self.model = model
        self.averages: dict[str, torch.Tensor] = {}
        self.taken = 0
        self.by_update = True
        self._weights: dict[str, torch.Tensor] = {}  # the tensors of the model that are averaged
        self._kept: dict[str, torch.Tensor] | None = None  # the trained weights, while the model has the averages
        self._held = False  # the model has the averages outside of validation, since a checkpoint was loaded
        self._applied = False  # the model has the averages outside of validation, within `applied`
        self._due = False  # an update that counts has changed the weights since they were taken in last
        self._copied_names: list[str] = []  # the names of weights with infinities

    # --- for subclasses

    def average(self, averages: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        """Change averages in place by the weights, which are on the same device and of the same dtype."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define average(averages, weights). Define it: it changes the averages "
            f"in place."
        )

    def counts(self, number: int) -> bool:
        """Tell whether the weights are taken in after the update of this number of the learner, from 1.

        If `by_update` is false, the number is that of a training epoch that has ended.
        """
        return True

    def more_averaged(self, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors of a model that are averaged in addition to its parameters, with their names."""
        return iter(())

    def more_shown(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return further tensors of the model by name, each with its value while the model has the averages."""
        return {}

    def models_found(self, models: list[tuple[str, torch.nn.Module]]) -> None:
        """Take note of the averaged models, which training may change, each with the prefix of its names."""

    def prepare(self, learner: LearnerView) -> None:
        """Prepare the averages for a validation epoch, while the model has them."""

    @property
    def required_arguments(self) -> str:
        """The arguments that a callback must have to load the averages, as the end of a sentence."""
        return ""

    def take(self, learner: LearnerView) -> None:
        """Take the weights into the averages."""
        weights = self._find(learner)
        if not self.averages:
            self._start(weights)
        else:
            averages = self._placed()
            with torch.no_grad():
                averaged = {name: weight for name, weight in weights.items() if name not in self._copied_names}
                for names in _groups(averaged):
                    self.average([averages[name] for name in names], [weights[name].detach() for name in names])
                for name in self._copied_names:
                    averages[name].copy_(weights[name])
        self.taken += 1

    # --- handlers

    def state_access(self) -> Access:
        """Declare a write of the model, for the handlers that exchange its weights."""
        return dict.fromkeys(self._reads(), Write())

    def prepares(self) -> Access:
        """Return the access of the handlers that call `prepare`."""
        return self.state_access()

    def _reads(self) -> Access:
        return {f"model.{self.model}" if self.model else "model": Read()}

    def _reads_at_end(self) -> Access:
        return self._reads() if self.by_update else {**self._reads(), "cbstate.history": Read()}

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        """Refuse another average of the same model: each would take the averages of the other for trained weights."""
        return Unresolvable() if isinstance(other, Averaging) else None

    def setup(self, learner: LearnerView) -> None:
        """Find the weights."""
        self._find(learner)

    @on(UpdateEnd, access={}, enabled="by_update")
    def note_update(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
        """Note whether the weights count that this update has made."""
        self._due = self._due or self.counts(learner.updates)

    @on(BatchEnd, AbstractTrainingPhase, access="_reads", enabled="by_update")
    def take_in(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Update the averages after a batch with an update."""
        self._take_due(learner)

    @on(EpochEnd, AbstractTrainingPhase, access="_reads_at_end")
    def take_in_last(self, event: EpochEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Update the averages after an epoch, or the update of an accumulation group that the epoch has not filled."""
        if not self.by_update:
            self._due = self.counts(learner.cbstate.history[phase].epochs)
        self._take_due(learner)

    @on(EpochCancelled, AbstractTrainingPhase, access="_reads")
    def take_in_cancelled(self, event: EpochCancelled, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Update the averages after the update of an accumulation group that the epoch has not filled."""
        self._take_due(learner)

    def _take_due(self, learner: LearnerView) -> None:
        due, self._due = self._due, False
        if due:
            self.take(learner)

    def _start(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Make copies of these weights the averages, and find the weights with infinities, which are only copied."""
        self.averages = {name: weight.detach().clone() for name, weight in weights.items()}
        self._copied_names = [name for name, weight in self.averages.items() if not weight.isfinite().all()]

    @on(EpochBegin, AbstractValidationPhase, access="prepares")
    def swap_in(self, event: EpochBegin, phase: AbstractValidationPhase, learner: LearnerView) -> None:
        """Put the averages into the model."""
        self._put_back()  # in case the last validation epoch ended without its closing event being handled here
        self._find(learner)
        self._put_averages()
        if self._kept is not None:
            self.prepare(learner)

    @on(EpochEnd, AbstractValidationPhase)
    def swap_out(self, event: EpochEnd, phase: AbstractValidationPhase, learner: LearnerView) -> None:
        """Put the trained weights back into the model."""
        self._end_validation()

    @on(EpochCancelled, AbstractValidationPhase)
    def swap_out_cancelled(self, event: EpochCancelled, phase: AbstractValidationPhase, learner: LearnerView) -> None:
        """Put the trained weights back into the model."""
        self._end_validation()

    @on(FitEnd, access="prepares")
    def end_fit(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Put the trained weights back, if a failure has prevented it at the end of the epoch.

        Within `applied` the model gets the averages again, which training has changed.
        """
        self._end_validation()

    @on(EpochBegin, AbstractTrainingPhase)
    def begin_training(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Put the trained weights back, if a failure has prevented it before."""
        self._put_back()

    @contextmanager
    def applied(self) -> Generator[None]:
        """Give a context in which the model has the averages, to evaluate it or to save its state.

        Evaluations and fits within the context leave the averages in the model.

        Raises:
            UsageError: No update has been made yet, so there are no averages.
        """
        if not self.averages:
            raise UsageError(f"{self.name or type(self).__name__} has no averages yet: {self.first}.")
        outer = self._applied or (self._kept is not None and not self._held)  # another such context, or validation
        try:
            self._put_averages()
            self._applied = True
            yield
        finally:
            if not outer:
                self._applied = False
                self._end_validation()

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
        # A call that changes nothing must say so: the caller then loads the judged weights itself.
        changed = self._held if not held else bool(self.averages)
        if changed and held:
            self._put_averages()
        elif changed:
            self._put_back()
        self._held = held and changed
        return changed

    def state_dict(self) -> dict[str, Any]:
        """Return the averages by name, and whether an update is still to be taken in."""
        return {"averages": dict(self.averages), "due": self._due}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the averages that `state_dict` returned. Within a validation epoch the model gets them at once.

        Raises:
            UsageError: The averages have other names or shapes than the weights of the model.
        """
        loaded: dict[str, torch.Tensor] = dict(state["averages"])
        if self._weights and loaded:
            self._check(loaded)
        inside = self._kept is not None
        known = self._weights
        chosen = {name: each for name, each in loaded.items() if not known or name in known}
        self._start({name: shard_like(each, known.get(name)) for name, each in chosen.items()})
        self._due = state.get("due", False)  # early checkpoints lack this entry
        if inside:
            self._kept = None  # the checkpoint has put its trained weights into the model, so forget the earlier ones
            self._put_averages()

    def _end_validation(self) -> None:
        """Give the model the weights that it has outside of validation."""
        if self._held or self._applied:
            self._put_averages()
        else:
            self._put_back()

    def _find(self, learner: LearnerView) -> dict[str, torch.Tensor]:
        """Find the averaged tensors of the model, which training may have replaced since the last call."""
        models = self.models(learner)
        self.models_found(models)
        self._weights = {
            prefix + name: weight
            for prefix, module in models
            for name, weight in (*module.named_parameters(), *self.more_averaged(module))
        }
        return self._weights

    def models(self, learner: LearnerView) -> list[tuple[str, torch.nn.Module]]:
        """Return the averaged models, each with the prefix of the names of its weights."""
        model = getattr(learner.model, self.model) if self.model else learner.model
        if isinstance(model, torch.nn.Module):
            return [("", model)]
        return [(f"{name}.", each) for name, each in model.items()]

    def _placed(self) -> dict[str, torch.Tensor]:
        """Return the averages on the devices and in the dtypes of the weights, which a user may have changed.

        The averages of a checkpoint are on the CPU. A weight that training has added, or replaced by one of another
        shape, is its own first average.
        """
        if self.averages.keys() != self._weights.keys():
            self.averages = {name: average for name, average in self.averages.items() if name in self._weights}
        new: dict[str, torch.Tensor] = {}
        for name, weight in self._weights.items():
            average = self.averages.get(name)
            if average is None or average.shape != weight.shape:
                new[name] = weight
            elif (average.device, average.dtype) != (weight.device, weight.dtype):
                self.averages[name] = average.to(weight)
        if new:
            self._start({**self.averages, **new})
        return self.averages

    def _put_averages(self) -> None:
        if self._kept is None and self.averages:
            averages, more = self._placed(), self.more_shown()
            tensors = {**self._weights, **{name: tensor for name, (tensor, _) in more.items()}}
            self._kept = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            _copy({**averages, **{name: value for name, (_, value) in more.items()}}, tensors)

    def _put_back(self) -> None:
        if self._kept is not None:
            tensors = {**self._weights, **{name: tensor for name, (tensor, _) in self.more_shown().items()}}
            _copy(self._kept, tensors)
            self._kept = None  # only now, so that after an interrupt between two copies the next event copies again

    def _check(self, loaded: Mapping[str, torch.Tensor]) -> None:
        for name, weight in self._weights.items():
            if name not in loaded or loaded[name].shape != weight.shape:
                found = f"shape {tuple(loaded[name].shape)}" if name in loaded else "nothing"
                raise UsageError(
                    f"The state of {self.name or type(self).__name__} has {found} for {name!r}, of shape "
                    f"{tuple(weight.shape)}. Load a state of the same model{self.required_arguments}."
                )


def _copy(values: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


def _groups(weights: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Return the names of the weights in groups that torch averages in one call each.

    A group is of one device and dtype, and all of its weights are sharded over the ranks or none is.
    """
    groups: dict[tuple[torch.device, torch.dtype, bool], list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault((weight.device, weight.dtype, is_sharded(weight)), []).append(name)
    return list(groups.values())
