"""SanityCheck: what is wrong with data, model, loss and optimizer, all of it, before the first batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from flowtrain.access import Access, Read, Write
from flowtrain.callback import Callback, on
from flowtrain.errors import DataError, SanityCheckError
from flowtrain.events import FitBegin
from flowtrain.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase
from flowtrain.protect import LearnerView
from flowtrain.sanity import (
    Broadcasts,
    Problem,
    check_backward,
    check_batch,
    check_classes,
    check_loss,
    check_optimizers,
    check_outputs,
    check_targets,
    remedy_for,
)
from flowtrain.steps import describe
from flowtrain.trial import CannotLook, borrowed, first_batch, on_device_of, untouched

__all__ = ["SanityCheck"]


class SanityCheck(Callback):
    """Look at data, model, loss and optimizer when a fit begins, and raise one error with all that is wrong.

    Checked are, for each phase that runs the library's step, with the first batch of its loader:

    - data: there is a batch, it is a pair, its numbers are finite, there are as many targets as inputs;
    - model: it runs, and its outputs are finite;
    - targets: they have the type, and lie in the range, that `cross_entropy`, `nll_loss` and the binary ones of torch
      need;
    - loss: it is a single finite number, in training it has a graph that can be gone through, and it does not stretch
      outputs and targets of different shapes, such as ``(16, 1)`` and ``(16,)``, to a common one;

    and where there is training, the optimizer: it holds every trainable parameter, and its learning rates are positive.

    The model runs on a copy that shares its parameters, without autocast. Loaders are looked into only where that
    changes nothing: lists, tuples, and a ``DataLoader`` of a dataset with indices, in this process and with copies of
    its samplers. Random numbers are put back. So a run with this callback is bit for bit the run without it, as long as
    the dataset itself keeps no count of what it was asked for.

    Reads ``data``, ``model``, ``lossfn`` and ``optimizer`` at `FitBegin`; so it runs after those that write them there.
    Writes nothing but its resource, ``resource.rng``. Costs a batch, a forward pass and copies of the buffers for each
    phase, once for each fit.

    Attributes:
        skipped: What was not looked at in the last fit, and why.

    Raises:
        SanityCheckError: Something is wrong; nothing has been trained.

    >>> from flowtrain.testing import tiny_learner
    >>> tiny_learner(SanityCheck()).fit(1)
    """

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def state_access(self) -> Access:
        reads: Access = {name: Read() for name in ("data", "lossfn", "model", "optimizer")}
        return {**reads, "resource.rng": Write()}

    @on(FitBegin)
    def check(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Check everything, then raise if something is wrong."""
        self.skipped = []
        model, lossfn, data = learner.model, learner.lossfn, learner.data
        found: list[Problem] = []
        with untouched():
            for each, loader in data.items():
                found += self._phase(each, loader, model, lossfn)
        if any(isinstance(each, AbstractTrainingPhase) for each in data):
            optimizer = learner.optimizer
            optimizers = {"": optimizer} if hasattr(optimizer, "param_groups") else dict(optimizer.items())
            found += check_optimizers(optimizers, _trainable(model, lossfn))
        if found:
            raise SanityCheckError(tuple((each.where, each.what, each.remedy) for each in found), self._report(found))

    def _phase(self, phase: Any, loader: Any, model: Any, lossfn: Any) -> Iterator[Problem]:
        where = f"data of {phase!r}"
        try:
            batches = first_batch(loader)
        except CannotLook as reason:
            self.skipped.append(f"{where}: {reason}")
            return
        except Exception as error:
            yield Problem(where, f"it raised {type(error).__name__}: {error}", "Look at the dataset, and collate_fn.")
            return
        if not batches:
            yield Problem(where, "it gives no batch.", "Is the dataset empty, or smaller than a batch with drop_last?")
            return
        ours = isinstance(phase, (AbstractTrainingPhase, AbstractValidationPhase)) and phase.provides is not None
        if not ours or not isinstance(model, torch.nn.Module):
            self.skipped.append(f"model and loss in {phase!r}: it has a step of its own")
            return
        try:
            inputs, targets = phase.split(batches[0])
        except (DataError, TypeError, ValueError) as error:
            yield Problem(where, str(error), f"Give pairs, or override {phase!r}.split(raw).")
            return
        wrong = list(check_batch(where, inputs, targets))
        yield from wrong
        yield from self._step(phase, inputs, targets, model, lossfn, whole=not wrong)

    def _step(
        self, phase: Phase, inputs: Any, targets: Any, model: Any, lossfn: Any, *, whole: bool
    ) -> Iterator[Problem]:
        """Run model and loss on a batch; where that is not `whole`, what comes out of it is not looked at."""
        training = isinstance(phase, AbstractTrainingPhase)
        try:
            trial, loss_trial = borrowed(model), borrowed(lossfn)
        except CannotLook as reason:
            self.skipped.append(f"model and loss in {phase!r}: {reason}")
            return
        inputs, targets = on_device_of((inputs, targets), [model])
        with phase.mode([each for each in (trial, loss_trial) if isinstance(each, torch.nn.Module)]):
            try:
                outputs = trial(inputs)
            except Exception as error:
                what = f"it raised {type(error).__name__}: {error}\n   It was called with inputs: {describe(inputs)}."
                yield Problem(f"model in {phase!r}", what, "Fit the model and the dataset to each other.")
                return
            wrong = [
                *(check_outputs(f"model in {phase!r}", outputs) if whole else ()),
                *check_targets(f"targets of {phase!r}", lossfn, outputs, targets),
            ]
            if whole and not wrong:
                wrong = list(check_classes(f"targets of {phase!r}", lossfn, outputs, targets))
            yield from wrong
            if wrong or not whole:
                return  # a loss of these says nothing more; and on a GPU a target out of range ends the process
            where = f"loss in {phase!r}"
            broadcasts = Broadcasts(outputs, targets)
            try:
                with broadcasts:
                    loss = loss_trial(outputs, targets)
            except Exception as error:
                what = f"it raised {type(error).__name__}: {error}\n   outputs: {describe(outputs)}, "
                raised = Problem(where, f"{what}targets: {describe(targets)}.", remedy_for(error))
                yield from [*broadcasts.problems(where)] or [raised]
                return
            yield from broadcasts.problems(where)
            yield from check_loss(where, loss, training=training)
            yield from check_backward(where, loss, outputs)

    def _report(self, found: list[Problem]) -> str:
        count = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
        lines = [f"{self.name or type(self).__name__} found {count} before the first batch:", ""]
        for number, problem in enumerate(found, start=1):
            lines += [f"{number}. {problem.where}: {problem.what}", f"   {problem.remedy}"]
        lines += ["", "Nothing was trained."]
        lines += [f"Not looked at: {each}." for each in self.skipped]
        return "\n".join(lines)


def _trainable(model: Any, lossfn: Any) -> dict[str, torch.Tensor]:
    models = {"": model} if isinstance(model, torch.nn.Module) else {name: model[name] for name in model}
    if isinstance(lossfn, torch.nn.Module):
        models["lossfn"] = lossfn
    return {
        name: param
        for prefix, module in models.items()
        for name, param in module.named_parameters(prefix)
        if param.requires_grad
    }
