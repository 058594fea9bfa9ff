"""ModelSummary: what the model is made of, before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flowtrain.access import Access, Read, Write
from flowtrain.callback import Callback, on
from flowtrain.errors import UsageError, is_a
from flowtrain.events import FitBegin
from flowtrain.phases import AbstractTrainingPhase, Phase
from flowtrain.protect import LearnerView
from flowtrain.summary import summarize
from flowtrain.terminal import console
from flowtrain.trial import first_batch, untouched

__all__ = ["ModelSummary"]


class ModelSummary(Callback):
    """Print a table of the model's layers when the first fit begins: what they give, how many parameters they have.

    `flowtrain.summary.summarize` makes the table, and works without a learner. For the shapes the model runs once, on a
    copy that shares its parameters, with the inputs given here or with those of the first training batch. Where
    neither can be had without changing what training gets (an iterator, an ``IterableDataset``), shapes are left out;
    so they are where a learner has several models.

    Reads ``model`` and ``data``, so it runs after those that write these at `FitBegin`; writes no state. Its resources
    are ``resource.terminal`` and ``resource.rng``: samplers may draw random numbers, which are put back. Costs one
    forward pass, once.

    Args:
        inputs: What the model is called with.
        depth: How far down: 1 for the modules of the model, 2 for those in these too.

    Raises:
        UsageError: `depth` is no whole number or negative.

    >>> from flowtrain.testing import tiny_learner
    >>> tiny_learner(ModelSummary()).fit(1)
     Layer     Type        Output shape   Parameters   Trainable
    ─────────────────────────────────────────────────────────────
     (model)   TinyModel   (8, 1)                  1           1
    <BLANKLINE>
    Parameters: 1, of them frozen: 0. With buffers: 0.00 MiB.
    """

    def __init__(self, inputs: Any = None, depth: int = 2) -> None:
        if not is_a(depth, int) or isinstance(depth, bool) or depth < 0:
            raise UsageError(f"ModelSummary(depth={depth!r}): depth is a whole number, at least 0.")
        self.inputs = inputs
        self.depth = depth
        self._shown = False

    def state_access(self) -> Access:
        terminal: Access = {"resource.terminal": Write()}
        return {"data": Read(), "model": Read(), "resource.rng": Write(), **terminal}

    @on(FitBegin)
    def show(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Print the table, or one for each model."""
        if self._shown:
            return
        self._shown = True
        model, data = learner.model, learner.data
        if isinstance(model, torch.nn.Module):
            console().print(str(summarize(model, self._inputs(data), self.depth)), **_PLAIN)
            return
        for name in model:
            console().print(f"{name}\n{summarize(model[name], depth=self.depth)}", **_PLAIN)

    def _inputs(self, data: Any) -> Any:
        if self.inputs is not None:
            return self.inputs
        for phase, loader in data.items():
            if not isinstance(phase, AbstractTrainingPhase) or phase.provides is None:
                continue
            with untouched():
                try:
                    return next((phase.split(raw)[0] for raw in first_batch(loader)), None)
                except Exception:  # what is wrong with the data, training says
                    return None
        return None


_PLAIN: Mapping[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
