"""SWA: stochastic weight averaging, the mean of the weights late in training, which the model has during validation."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.optim.swa_utils import get_swa_multi_avg_fn

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import on
from flowtrain.callback.events import FitBegin, FitEnd
from flowtrain.callback.phases import AbstractTrainingPhase, Phase, has_bundled_step
from flowtrain.callback.view import LearnerView
from flowtrain.callbacks.averaging import Averaging
from flowtrain.diagnostics.scratch_learner import CannotLook, on_device_of, readable_copy
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import whole_number
from flowtrain.training.checkpoint.rng import restoring_loader

__all__ = ["SWA"]

_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d, torch.nn.SyncBatchNorm)
_REMEDY = "Pass the batches to use: SWA(..., data=loader)"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class SWA(Averaging):
    """Average the weights equally from an epoch on, and validate with the average.

    The weights at the end of epoch `start_epoch` are the first average; those at the end of each `every`-th epoch after
    it count as much. With `start_update` updates are counted instead. This is torch's ``AveragedModel`` with
    ``get_swa_multi_avg_fn()``, bit for bit. Izmailov and others, "Averaging Weights Leads to Wider Optima and Better
    Generalization", https://arxiv.org/abs/1803.05407. Epochs and updates are counted over the life of the learner,
    also those before this callback was added; of several optimizers each update counts. A weight that contains an
    infinity, as a mask that is a frozen parameter does, is copied.

    The averages belong together with a learning rate that stays high from `start_epoch` on:
    ``Scheduler({LearningRate: per_epoch(swa_lr(cosine(0.1), 0.05, start=10, length=5))})``
    (`flowtrain.callbacks.schedules.swa_lr`, torch's ``SWALR``).

    The running statistics of BatchNorm fit the trained weights, not their average. So they are renewed whenever the
    averages have changed: before a validation epoch, and at the end of a fit that was not broken off. One pass over
    the training data computes them, as torch's ``update_bn`` does, in the modes of training: layers that were in eval
    mode keep theirs. The pass reads the training data in this process, without the workers of its loader, and moves
    neither the random numbers of training nor the loader. A model without BatchNorm needs no pass.

    As with `EMA`, the model has the averages during each epoch of a validation phase, and the trained weights again
    when the epoch ends, normally or not; ``with swa.applied(): ...`` evaluates or saves the averages after training.
    A checkpoint that a `Checkpointer` takes after a validation epoch holds the averages and their statistics as
    ``model``, and what training continues with as ``trained``.

    Reads ``model`` and ``data`` at `FitBegin`, and ``model`` at `EpochEnd` and `EpochCancelled` of training; with
    `start_epoch` ``cbstate.history`` at that `EpochEnd` too, so it runs after `Recorder`, and with `start_update`
    ``model`` at `BatchEnd`. Writes ``model`` at `EpochBegin` of training and of validation phases, at `EpochEnd` and
    `EpochCancelled` of validation phases and at `FitEnd`, so it runs after callbacks that write the model and before
    callbacks that read it. Where it renews statistics, at `EpochBegin` of validation phases and at
    `FitEnd`, it also reads ``data`` and declares the resource ``rng``. A learner has one average of a model, `SWA` or
    `EMA`. Costs the size of the weights in memory, a pass over them for each epoch that counts, and the passes over
    the data.

    Args:
        start_epoch: The first epoch whose weights count, from 1.
        start_update: Instead of it, the first update whose weights count, from 1.
        every: The number of epochs, or updates, from one that counts to the next.
        data: The batches for the statistics of BatchNorm, each the inputs of the model, or a tuple or list that begins
            with them; by default the training data, which must be a list or a ``DataLoader`` of a dataset with indices.
        batches: How many of these batches are used at most; all by default.
        model: The name of the model, if the learner has several; or of the part of the only model that is averaged.

    Raises:
        UsageError: Both or neither of `start_epoch` and `start_update` are given, one of the numbers is not whole or
            below 1, or `model` is no name of a model. At `FitBegin`: the model has BatchNorm, and the training data
            cannot be read beside training.

    Attributes:
        averages: The averages by the name of the parameter; empty before the first.
        taken: How many weights the averages are the mean of.

    >>> from flowtrain.testing import tiny_learner
    >>> swa = SWA(start_epoch=2)
    >>> learner = tiny_learner(swa, n_batches=2)
    >>> history = learner.fit(3)
    >>> swa.taken
    2
    """

    first = "it begins with start_epoch or start_update, so fit for longer, or begin earlier"
    agrees = True  # Only the statistics differ between ranks, and `prepares` sends those of the main rank.

    def __init__(
        self,
        start_epoch: int | None = None,
        *,
        start_update: int | None = None,
        every: int = 1,
        data: Iterable[Any] | None = None,
        batches: int | None = None,
        model: str = "",
    ) -> None:
        if (start_epoch is None) == (start_update is None):
            raise UsageError(
                f"SWA(start_epoch={start_epoch!r}, start_update={start_update!r}): one of the two says from when on "
                f"the weights are averaged. Write SWA(start_epoch=10)."
            )
        super().__init__(model)
        self.by_update = start_update is not None
        name, given = ("start_epoch", start_epoch) if start_update is None else ("start_update", start_update)
        self.start = whole_number(f"SWA(): {name}", given)
        self.every = whole_number("SWA(): every", every)
        self.batches = None if batches is None else whole_number("SWA(): batches", batches)
        if data is not None and (isinstance(data, Iterator) or not hasattr(data, "__iter__")):
            raise UsageError(
                f"SWA(data={data!r}): data is a loader or a list of batches, which is read once for each average. "
                f"Write data=DataLoader(dataset, batch_size=256)."
            )
        self.data = data
        self._average = get_swa_multi_avg_fn()
        self._norms: dict[str, Any] = {}  # the layers of BatchNorm by name
        self._resting: list[str] = []  # the names of the modules that were in eval mode in training
        self._statistics: dict[str, torch.Tensor] = {}  # of the averages; empty if the averages have changed since

    # --- averages

    def average(self, averages: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        """Change the averages by the weights, by torch's function."""
        self._average(averages, weights, self.taken)

    def counts(self, number: int) -> bool:
        """Tell whether the weights after this update or epoch are taken in."""
        return number >= self.start and (number - self.start) % self.every == 0

    def take(self, learner: LearnerView) -> None:
        """Take the weights into the averages, which have no statistics yet."""
        super().take(learner)
        modules = (each for prefix, model in self.models(learner) for each in _named(prefix, model))
        self._resting = [name for name, module in modules if not module.training]
        self._statistics = {}

    # --- the statistics of BatchNorm

    def prepares(self) -> Access:
        """Return the access of the handlers that renew the statistics: also the training data and random numbers.

        Each of several ranks renews the statistics with its own data, and then all get those of the main rank.
        """
        sent: Access = dict.fromkeys(super().prepares(), Write(broadcast=True))
        return {**sent, "data": Read(), "resource.rng": Write()}

    def models_found(self, models: list[tuple[str, torch.nn.Module]]) -> None:
        """Find the layers of BatchNorm."""
        named = (each for prefix, model in models for each in _named(prefix, model))
        self._norms = {
            name: module for name, module in named if isinstance(module, _NORMS) and module.running_mean is not None
        }

    def more_shown(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return the statistics of BatchNorm, each with its renewed value, or with its own while there is none."""
        buffers: dict[str, Any] = {
            f"{name}.{key}": getattr(norm, key) for name, norm in self._norms.items() for key in _STATISTICS
        }
        values = {**buffers, **self._statistics}
        return {name: (buffer, values[name]) for name, buffer in buffers.items()}

    @on(FitBegin, access="_looks")
    def begin_fit(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Check that the training data can be read for the statistics."""
        self._find(learner)
        if self._norms:
            self._source(learner)

    def _looks(self) -> Access:
        return {**self._reads(), "data": Read()}

    def end_fit(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Put the trained weights back, if a failure has prevented it, and renew the statistics of the averages."""
        super().end_fit(event, phase, learner)
        if event.complete and self.averages and self._norms and not self._statistics:
            with self.applied():
                self.prepare(learner)

    def prepare(self, learner: LearnerView) -> None:
        """Renew the statistics by a pass over the data, while the model has the averages."""
        norms = {name: norm for name, norm in self._norms.items() if name not in self._resting}
        if not norms or self._statistics:
            return
        [(_, model)] = self.models(learner)
        source, call = self._source(learner)
        given = False
        with restoring_loader(source), torch.no_grad(), self._renewing(learner, norms):
            for raw in islice(source, self.batches):
                call(model, on_device_of(raw, [model]))
                given = True
        if not given:  # the statistics are only reset now; those of training come back with the trained weights
            raise self._unread("it gives no batch", _REMEDY)
        self._statistics = {name: buffer.clone() for name, (buffer, _) in self.more_shown().items()}

    @contextmanager
    def _renewing(self, learner: LearnerView, norms: Mapping[str, Any]) -> Generator[None]:
        """Give a context in which the modules have the modes of training, and BatchNorm computes its statistics anew.

        Without a momentum a layer computes the mean over all batches since the reset.
        """
        modules = dict(each for prefix, model in self.models(learner) for each in _named(prefix, model))
        modes = {module: module.training for module in modules.values()}
        momenta = {norm: norm.momentum for norm in norms.values()}
        try:
            for name, module in modules.items():
                module.training = name not in self._resting
            for norm in momenta:
                # Otherwise the statistics of the trained weights would stay in the mean over the batches.
                norm.reset_running_stats()
                norm.momentum = None
            yield
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
            for module, mode in modes.items():
                module.training = mode

    def _source(self, learner: LearnerView) -> tuple[Iterable[Any], Callable[[torch.nn.Module, Any], Any]]:
        """Return the batches for the statistics, and a function that calls the model with a batch.

        Raises:
            UsageError: There are several models, the training data cannot be read without a change for training, or
                only a step of the user's knows which part of a batch the model takes.
        """
        # Nothing says which of several models takes the inputs of a batch, so the statistics of only one can be
        # renewed.
        if len(self.models(learner)) > 1:
            raise self._unread("the learner has several models", "Name one: SWA(..., model='gen')")
        if self.data is not None:
            return self.data, _call_first
        for phase, loader in learner.data.items():
            if has_bundled_step(type(phase), AbstractTrainingPhase):
                try:
                    return readable_copy(loader), partial(_call_split, phase)
                except CannotLook as reason:
                    raise self._unread(str(reason), _REMEDY) from reason
        raise self._unread("no training phase uses the bundled step, which would tell the inputs of the model", _REMEDY)

    def _unread(self, why: str, remedy: str) -> UsageError:
        return UsageError(
            f"{self.name or 'SWA'} renews the statistics of BatchNorm ({', '.join(list(self._norms)[:3])}) by a pass "
            f"over the training data, and cannot: {why}. {remedy}."
        )

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, their number and their statistics."""
        return {
            **super().state_dict(),
            "taken": self.taken,
            "resting": list(self._resting),
            "statistics": dict(self._statistics),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned. Within a validation epoch the model gets the averages at once.

        Raises:
            UsageError: The averages have other names or shapes than the weights of the model.
        """
        statistics, self._statistics = self._statistics, dict(state["statistics"])
        try:
            super().load_state_dict(state)
        except BaseException:
            self._statistics = statistics
            raise
        self.taken = state["taken"]
        self._resting = list(state["resting"])


def _call_first(model: torch.nn.Module, raw: Any) -> Any:
    """Call the model with a batch, as torch's ``update_bn`` does."""
    return model(raw[0] if isinstance(raw, (tuple, list)) else raw)


def _call_split(phase: AbstractTrainingPhase, model: torch.nn.Module, raw: Any) -> Any:
    """Call the model with a batch, as the step of a phase does."""
    return phase.call_model(model, phase.split(raw)[0])


def _named(prefix: str, model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules of a model with their names, as those of its parameters begin."""
    for name, module in model.named_modules():
        yield (prefix + name).rstrip("."), module
