"""The view of a deferred handler: the same class of view as in place, bound to copies.

A `SnapshotLearner` has a learner's state of its own, to which the view is bound once. For each event it fills this
state with the payload of a snapshot. So a handler reads the same paths as in place, and is refused the same ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from flowtrain.callback.access import Declaration, Path, lags_of
from flowtrain.callback.view import LearnerView
from flowtrain.state.arrivals import Changes
from flowtrain.state.batch import BatchState, ReadOnlyBatch
from flowtrain.state.late_writes import LateLearner
from flowtrain.state.learner_state import LearnerState, Named, by_name
from flowtrain.state.optimizer_view import OptimizerParts
from flowtrain.state.parameters import Parameters
from flowtrain.state.partial_view import Owner
from flowtrain.state.readonly import UNPROTECTED
from flowtrain.state.views import bind_view
from flowtrain_dask.snapshots.modules import OptimizerCopy

__all__ = ["SnapshotLearner"]


class SnapshotLearner:
    """The learner as one deferred handler sees it.

    Args:
        declaration: The declaration of the handler.
        owner: The callback and handler that errors of the view name.
    """

    def __init__(self, declaration: Declaration, owner: Owner) -> None:
        self._declaration = declaration
        self._owner = replace(owner, consumes=True, copied=True)
        self._state = LearnerState()
        self._optimizers: dict[str, _Shown] = {}
        self._view: LearnerView | None = None
        self._late: LateLearner | None = None

    def show(self, payload: Mapping[Path, Any]) -> LearnerView:
        """Fill the state with a snapshot and return the view, which shows this snapshot until the next call.

        Args:
            payload: The payload of a snapshot of the same declaration.
        """
        state = self._state
        batch, twin, entries = BatchState(), False, {}
        for path, value in payload.items():
            if path[0] == "batch":
                vars(batch)[path[1]] = value
                twin = twin or type(value) not in UNPROTECTED
            elif path[0] == "cbstate":
                entries[path[1]] = value
            elif path[0] != "optimizer":
                setattr(state, path[0], value)
        state.batch, state.batch_twin = batch, ReadOnlyBatch(batch) if twin else batch
        state.cbstate.__rewind__(entries)
        if ("model",) in payload and not isinstance(payload["model",], dict):
            state.params = _parameters(payload["model",], state.params)
        if ("optimizer",) in payload:
            self._fill_optimizers(payload["optimizer",])
        if self._view is None:
            if state.optimizers is None:
                state.optimizers = OptimizerParts(_Shown())  # type: ignore[arg-type]  # no path of it is declared
            shown: Any = state
            if lags_of(self._declaration):
                shown = self._late = LateLearner(state, self._declaration, self._owner.callback)
            self._view = bind_view(self._declaration, shown, self._owner)
        self.taken()  # what the handler of an earlier event has written and then failed
        return self._view

    def taken(self) -> Changes:
        """Return what the handler has written with a lag since the last call."""
        return () if self._late is None else self._late.taken()

    def clear(self) -> None:
        """Drop the snapshot."""
        if self._view is not None:
            state, batch = self._state, BatchState()
            state.batch = state.batch_twin = batch
            state.params, state.model, state.lossfn = {}, None, None
            state.cbstate.__rewind__({})
            for shown in self._optimizers.values():
                shown.fill(OptimizerCopy(), {})

    def _fill_optimizers(self, copies: Mapping[str, OptimizerCopy]) -> None:
        for name, copy in copies.items():
            if name not in self._optimizers:
                self._optimizers[name] = _Shown()
            self._optimizers[name].fill(copy, self._state.params)
        if self._state.optimizers is None:
            parts: dict[str, Any] = {
                name: OptimizerParts(
                    shown,  # type: ignore[arg-type]  # it has the attributes that views use
                    f"optimizer.{name}" if name else "optimizer",
                    partial(getattr, shown, "named"),
                )
                for name, shown in self._optimizers.items()
            }
            self._state.optimizers = parts[""] if "" in parts else Named("optimizer", parts)


class _Shown:
    """Takes the place of an optimizer in a view; the same object for all events."""

    param_groups: list[dict[str, Any]]
    state: dict[torch.Tensor, Any]
    named: dict[str, torch.Tensor]
    defaults: dict[str, Any]

    def fill(self, copy: OptimizerCopy, params: Mapping[str, torch.Tensor]) -> None:
        """Show a copy. The keys of the state are the parameters in the view, or tensors like them if it has none."""
        self.param_groups = copy.groups or []
        self.state = defaultdict(dict)
        self.named = {name: params.get(name, like) for name, like, _ in copy.state or ()}
        for name, _, item in copy.state or ():
            self.state[self.named[name]] = item
        self.defaults = copy.defaults or {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"a deferred callback sees hyperparams, state and defaults of an optimizer, and there is no {name!r}. "
            f"Set deferrable = False on the callback if it needs the optimizer itself."
        )


def _parameters(model: Any, params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters of a copied model, so that ``params`` are the parameters of ``model``, as in place."""
    models = by_name(model)
    return Parameters(models) if all(isinstance(each, nn.Module) for each in models.values()) else params
