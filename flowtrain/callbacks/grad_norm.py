"""GradNorm: the norm of the gradients of each update."""

from __future__ import annotations

import torch

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import UpdateBegin, UpdateEnd
from flowtrain.callback.phases import AbstractTrainingPhase
from flowtrain.callback.view import LearnerView
from flowtrain.core.optimizers import dense_part
from flowtrain.errors.arguments import switch

__all__ = ["GradNorm"]

_HISTORY: Access = {"cbstate.history": Read()}


class GradNorm(Callback):
    """Record the 2-norm of all gradients of each update, before clipping, and optionally the norm of each layer.

    Writes ``"GradNorm"`` to ``cbstate.tracehistory[phase]``; the step is the number of the batch that made the update.
    With `layers` it also writes ``"GradNorm.<layer>"``, where a layer is the first part of a parameter's name:
    ``"encoder"`` of ``"encoder.weight"``. The gradients are accumulated and unscaled.

    Reads ``batch.grad_norm`` at `UpdateEnd`, which the core computes if a callback declares it or gradients are
    clipped; with `layers` also ``batch.grads`` at `UpdateBegin`. Runs after `Recorder`, and with `layers` after
    callbacks that write gradients at `UpdateBegin`. Costs a pass over the gradients for each update, and with `layers`
    a second one; norms stay on the device until the series is read, so there is no synchronisation.

    Args:
        layers: Whether to record the norm of each layer too.

    Raises:
        UsageError: `layers` is neither ``True`` nor ``False``.

    >>> from flowtrain import TrainingPhase
    >>> from flowtrain.testing import tiny_learner
    >>> learner = tiny_learner(GradNorm(layers=True), n_batches=4)
    >>> history = learner.fit(1)
    >>> {name: len(series) for name, series in learner.cbstate.tracehistory[TrainingPhase].items()}
    {'GradNorm.coeff': 4, 'GradNorm': 4}
    """

    may_cancel = False

    def __init__(self, *, layers: bool = False) -> None:
        self.layers = switch("GradNorm", "layers", layers)

    @on(
        UpdateEnd,
        AbstractTrainingPhase,
        access={**_HISTORY, "batch.grad_norm": Read(), "cbstate.tracehistory.GradNorm": Write()},
    )
    def record(self, event: UpdateEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Record the norm of all gradients."""
        # `Recorder` counts this batch only at its end. An update after the last batch of an epoch is in no batch.
        step = learner.cbstate.history[phase].steps + event.in_batch
        learner.cbstate.tracehistory[phase].push("GradNorm", learner.batch.grad_norm, step)

    @on(
        UpdateBegin,
        AbstractTrainingPhase,
        access={**_HISTORY, "batch.grads": Read(gather=True), "cbstate.tracehistory.GradNorm": Write()},
        enabled="layers",
    )
    def record_layers(self, event: UpdateBegin, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Record the norm of each layer."""
        step = learner.cbstate.history[phase].steps + event.in_batch
        by_layer: dict[str, list[torch.Tensor]] = {}
        for name, gradient in learner.batch.grads.items():
            by_layer.setdefault(name.partition(".")[0], []).append(gradient)
        series = learner.cbstate.tracehistory[phase]
        for layer, gradients in by_layer.items():
            series.push(f"GradNorm.{layer}", torch.nn.utils.get_total_norm(map(dense_part, gradients)), step)
