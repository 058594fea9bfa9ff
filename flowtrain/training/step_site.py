"""What a step sees of a learner: its state, and the means to open a batch, run backward and update.

`Learner` is one of these, so a step of one's own calls ``learner.run_batch(...)`` and the rest. The bundled steps do
the same in one piece, for speed (`flowtrain.callback.phases`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from flowtrain.callback.events import BackwardBegin, BackwardEnd, BatchBegin, BatchEnd, Event, UpdateBegin, UpdateEnd
from flowtrain.callback.phases import Phase
from flowtrain.core.core import TorchCore
from flowtrain.errors import CoreError, UsageError, is_a
from flowtrain.graph.executor import Executor
from flowtrain.graph.registry import Callbacks
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState, State
from flowtrain.training.loop import Loop
from flowtrain.training.step import CLOSED, CLOSING, OPEN, check_graph

__all__ = ["RunBatch", "StepSite"]

_BATCH_BEGIN, _BATCH_END = BatchBegin(), BatchEnd()
_BACKWARD_BEGIN, _BACKWARD_END = BackwardBegin(), BackwardEnd()
_UPDATE_BEGIN, _UPDATE_END = UpdateBegin(), UpdateEnd()


class StepSite:
    """A learner as a step sees it: `flowtrain.callback.phases.StepContext`, implemented.

    Attributes:
        state: What is trained, and what callbacks share.
        core: How it is computed.
        loop: What runs it.
    """

    state: LearnerState
    core: TorchCore
    loop: Loop

    @property
    def model(self) -> Any:
        """The module that was passed, or all of them by name."""
        return self.state.model

    @property
    def lossfn(self) -> Any:
        """The loss function."""
        return self.state.lossfn

    @property
    def optimizer(self) -> Any:
        """The optimizer, or all of them by name."""
        return self.state.optimizer

    @property
    def data(self) -> Any:
        """The loaders by phase: ``learner.data[TrainingPhase]``."""
        return self.state.data

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters of the model by name; with several models the name begins with the model's."""
        return self.state.params

    @property
    def batch(self) -> BatchState:
        """The state of the current, or last, batch."""
        return self.state.batch

    @property
    def cbstate(self) -> State:
        """What callbacks share with each other."""
        return self.state.cbstate

    @property
    def callbacks(self) -> Callbacks:
        """The callbacks: iterable, with ``graph``, ``plan`` and ``explain``."""
        callbacks: Callbacks = self.state.callbacks
        return callbacks

    @property
    def executor(self) -> Executor:
        """What runs the callbacks."""
        return self.loop.executor

    # --- the parts of a step

    def run_batch(self, phase: Phase, **state: Any) -> RunBatch:
        """Return the context of one batch: it gives the batch state, and fires `BatchBegin` and `BatchEnd`.

        Args:
            phase: The phase whose step calls this.
            state: The first entries of the batch state; they are moved to the device.
        """
        return RunBatch(self.loop, phase, state)

    def fire(self, event: Event, phase: Phase) -> None:
        """Fire an event. In a handler call ``learner.fire(event)`` of the handler's own `learner`."""
        if is_a(event, UpdateEnd):  # of a step that updates by itself
            self.state.updates += 1
        self.loop.dispatch.fire_from_outside(event, phase)

    def forward(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass: autocast, if the precision asks for it."""
        return self.core.autocast()

    def backward(self, phase: Phase, loss: torch.Tensor, name: str | None = None) -> None:
        """Run the backward pass between `BackwardBegin` and `BackwardEnd`.

        Args:
            phase: The phase whose step calls this.
            loss: A tensor with one element. If it is ``batch.loss``, that is detached afterwards.
            name: Which of several optimizers the loss is for: only its parameters get gradients. Without a name all
                parameters that the loss depends on do, also those of a model that it only passes through.

        Raises:
            CoreError: The loss is no tensor with one element, or there is no optimizer of that name.
            LossError: The loss has no graph.
            UsageError: No batch is open.
        """
        on, batch = self.loop.runners[phase], self.state.batch
        self._need_batch("backward")
        shared = batch.__dict__.get("loss") is loss
        self.loop.scopes.backward = True
        if on.backward_begin is not None:
            on.backward_begin(_BACKWARD_BEGIN, phase)
            loss = batch.loss if shared else loss
        if not is_a(loss, torch.Tensor) or loss.numel() != 1:
            raise CoreError(f"backward({phase!r}, loss) takes a tensor with one element, got {loss!r}.")
        self.core.groups.drop_spent()
        try:
            if name is None:
                self.core.backward(loss)
            else:
                self.core.backward_for(loss, name)
        except RuntimeError as error:
            check_graph(phase, "batch.loss" if shared else "the loss", loss, error)
            raise
        if shared:
            batch.loss = loss.detach()
        batch.grads = self.core.grads
        if on.backward_end is not None:
            on.backward_end(_BACKWARD_END, phase)

    def update(self, phase: Phase, name: str | None = None) -> None:
        """Step an optimizer, or all, between `UpdateBegin` and `UpdateEnd`, once its accumulation group is complete.

        Args:
            phase: The phase whose step calls this.
            name: Which of several optimizers.

        Raises:
            CoreError: There is no optimizer of that name.
            UsageError: No batch is open.
        """
        self._need_batch("update")
        names = self.core.due(name)
        if names:
            self.loop.update(phase, names, _UPDATE_BEGIN, _UPDATE_END)

    def _need_batch(self, what: str) -> None:
        if self.loop.scopes.batch != OPEN:
            raise UsageError(f"{what}() needs an open batch. Call it inside `with learner.run_batch(self, ...)`.")


class RunBatch:
    """The context of one batch: it makes the batch state, and fires `BatchBegin` and `BatchEnd`.

    An exception in its body closes the batch and goes on, so a step may catch it.
    """

    __slots__ = ("_entries", "_loop", "_phase")

    def __init__(self, loop: Loop, phase: Phase, entries: dict[str, Any]) -> None:
        self._loop = loop
        self._phase = phase
        self._entries = entries

    def __enter__(self) -> BatchState:
        loop, scopes = self._loop, self._loop.scopes
        if scopes.batch != CLOSED:
            raise UsageError(f"run_batch({self._phase!r}) was called inside an open batch. Leave that one first.")
        batch = BatchState()
        entries = self._entries
        if loop.core.places:
            entries = loop.core.place(entries)
            scopes.hand_over()
        batch.__dict__.update(entries)
        loop.state.show(batch)
        scopes.backward = False
        scopes.batch = OPEN
        try:
            loop.dispatch.fire(_BATCH_BEGIN, self._phase)
        except BaseException as failure:  # closed first
            loop.close_batch(self._phase, failure)
        if torch.is_grad_enabled():
            loop.core.groups.begin()
        return batch

    def __exit__(self, kind: object, failure: BaseException | None, traceback: object) -> None:
        loop = self._loop
        if failure is not None:
            try:
                loop.close_batch(self._phase, failure)
            finally:
                del failure, traceback  # see `flowtrain.errors.raise_worst`
        loop.scopes.batch = CLOSING
        try:
            loop.dispatch.fire(_BATCH_END, self._phase)
        finally:
            loop.scopes.batch = CLOSED
            loop.scopes.completed = loop.state.batch
