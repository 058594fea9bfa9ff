"""One batch: the bundled steps in one piece, and the parts that a step of your own is written with.

A batch is opened and `BatchBegin` fired; the step computes; `BatchEnd` is fired and the batch closed. An exception
closes it with `BatchCancelled` instead (`StepParts.cancel_batch`). This is written down twice: `StepParts.run_batch`,
`backward` and `update` for any step, and `StepParts.train` and `evaluate` for the bundled ones. The second form is
there for speed, since it runs for every batch: an event is fired by calling its runner, if it has one
(`flowtrain.training.dispatch.StepRunners`), scopes are set without a call, and the core's functions are torch's own
where nothing comes between (`flowtrain.core.core`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Never

import torch

from flowtrain.callback.events import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    Event,
    LossBegin,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.callback.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase, StepContext
from flowtrain.core.core import TorchCore
from flowtrain.errors import CancelException, CoreError, DataError, LossError, UsageError, describe, is_a, raise_worst
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState, State
from flowtrain.training.checkpoint.manager import Cuts
from flowtrain.training.dispatch import Dispatch, StepRunners
from flowtrain.training.scopes import CLOSED, ENDING, OPEN, Scopes

__all__ = ["StepParts", "settle"]

_BATCH_BEGIN, _BATCH_END, _BATCH_CANCELLED = BatchBegin(), BatchEnd(), BatchCancelled()
_LOSS_BEGIN, _BACKWARD_BEGIN, _BACKWARD_END = LossBegin(), BackwardBegin(), BackwardEnd()
_UPDATE_BEGIN, _UPDATE_END = UpdateBegin(), UpdateEnd()


class StepParts(StepContext):
    """What a step gets as ``learner``: `flowtrain.StepContext`, implemented.

    Args:
        state: What is trained, and what callbacks share.
        core: How it is computed.
        scopes: What is open.
        dispatch: What fires events.
        cuts: The checkpoints, of which those that were asked for in a batch are dropped with it after an error.
    """

    def __init__(self, state: LearnerState, core: TorchCore, scopes: Scopes, dispatch: Dispatch, cuts: Cuts) -> None:
        self._state, self._core, self._scopes, self._dispatch, self._cuts = state, core, scopes, dispatch, cuts
        self._runners = dispatch.runners

    # --- the state of training

    @property
    def model(self) -> Any:
        """The module that was passed, or all of them by name."""
        return self._state.model

    @property
    def lossfn(self) -> Any:
        """The loss function."""
        return self._state.lossfn

    @property
    def optimizer(self) -> Any:
        """The optimizer, or all of them by name."""
        return self._state.optimizer

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters of the model by name; with several models the name begins with the model's."""
        return self._state.params

    @property
    def data(self) -> Any:
        """The loaders by phase."""
        return self._state.data

    @property
    def batch(self) -> BatchState:
        """The state of the current, or last, batch."""
        return self._state.batch

    @property
    def cbstate(self) -> State:
        """What callbacks share with each other."""
        return self._state.cbstate

    if not TYPE_CHECKING:  # a checker must not think that every attribute exists

        def __getattr__(self, name: str) -> Never:
            if name in ("epoch", "fit", "step", "validate"):
                self._scopes.refuse_nested(f"{name}()")
            raise AttributeError(
                f"A step's learner has no {name!r}. It has model, lossfn, optimizer, params, data, batch, cbstate, and "
                f"the methods run_batch, forward, backward, update and fire. Other objects that a step needs go into "
                f"cbstate, by a callback's setup.",
                name=name,
                obj=self,
            )

    # --- any step

    @contextmanager
    def run_batch(self, phase: Phase, **state: Any) -> Generator[BatchState]:
        """See `StepContext.run_batch`."""
        core, scopes = self._core, self._scopes
        if scopes.batch != CLOSED:
            raise UsageError(f"run_batch({phase!r}) was called inside an open batch. Leave that one first.")
        batch = BatchState()
        if core.places:
            state = core.place(state)
            scopes.hand_over()
        batch.__dict__.update(state)
        self._state.show(batch)
        scopes.open_batch()
        try:
            self._dispatch.fire(_BATCH_BEGIN, phase)
            if torch.is_grad_enabled():
                core.groups.begin()
            yield batch
        except BaseException as failure:
            self.cancel_batch(phase, failure)  # raises what is left
        scopes.end_batch()
        try:
            self._dispatch.fire(_BATCH_END, phase)
        finally:
            scopes.close_batch(self._state.batch)

    def fire(self, event: Event, phase: Phase) -> None:
        """See `StepContext.fire`."""
        if is_a(event, UpdateEnd):  # of a step that updates by itself
            self._state.updates += 1
        self._dispatch.fire_from_outside(event, phase)

    def forward(self) -> AbstractContextManager[None]:
        """See `StepContext.forward`."""
        return self._core.autocast()

    def backward(self, phase: Phase, loss: torch.Tensor, name: str | None = None) -> None:
        """See `StepContext.backward`."""
        on, batch = self._runners[phase], self._state.batch
        self._need_batch("backward")
        shared = batch.__dict__.get("loss") is loss
        self._scopes.backward = True
        if on.backward_begin is not None:
            on.backward_begin(_BACKWARD_BEGIN, phase)
            loss = batch.loss if shared else loss
        if not is_a(loss, torch.Tensor) or loss.numel() != 1:
            raise CoreError(f"backward({phase!r}, loss) takes a tensor with one element, got {loss!r}.")
        self._core.groups.drop_spent()
        try:
            if name is None:
                self._core.backward(loss)
            else:
                self._core.backward_for(loss, name)
        except RuntimeError as error:
            _check_graph(phase, "batch.loss" if shared else "the loss", loss, error)
            raise
        if shared:
            batch.loss = loss.detach()
        batch.grads = self._core.grads
        if on.backward_end is not None:
            on.backward_end(_BACKWARD_END, phase)

    def update(self, phase: Phase, name: str | None = None) -> None:
        """See `StepContext.update`."""
        self._need_batch("update")
        names = self._core.due(name)
        if names:
            self.update_due(phase, names, _UPDATE_BEGIN, _UPDATE_END)

    def _need_batch(self, what: str) -> None:
        if self._scopes.batch != OPEN:
            raise UsageError(f"{what}() needs an open batch. Call it inside `with learner.run_batch(self, ...)`.")

    # --- the bundled steps

    def train(self, phase: AbstractTrainingPhase, raw: Any) -> None:
        """See `StepContext.train`."""
        on, core, scopes = self._runners[phase], self._core, self._scopes
        batch = self._open(phase, on, raw, True)
        scopes.backward = True
        if on.backward_begin is not None:
            on.backward_begin(_BACKWARD_BEGIN, phase)
        try:
            core.backward(batch.loss)
        except RuntimeError as error:
            _check_graph(phase, "batch.loss", batch.loss, error)
            raise
        if on.watched:  # otherwise the loop does it when the batch can be looked at: it costs most of a microsecond
            batch.loss = batch.loss.detach()
        batch.grads = core.grads
        if on.backward_end is not None:
            on.backward_end(_BACKWARD_END, phase)
        if core.plain:
            if on.update_begin is not None:
                on.update_begin(_UPDATE_BEGIN, phase)
            core.optimizer.step()
            self._state.updates += 1
            if on.update_end is not None:
                on.update_end(_UPDATE_END, phase)
        else:
            self.update(phase)
        scopes.batch = ENDING
        if on.batch_end is not None:
            on.batch_end(_BATCH_END, phase)
        scopes.batch = CLOSED
        scopes.completed = batch

    def evaluate(self, phase: AbstractValidationPhase, raw: Any) -> None:
        """See `StepContext.evaluate`."""
        on, scopes = self._runners[phase], self._scopes
        batch = self._open(phase, on, raw, False)
        scopes.batch = ENDING
        if on.batch_end is not None:
            on.batch_end(_BATCH_END, phase)
        scopes.batch = CLOSED
        scopes.completed = batch

    def _open(
        self, phase: AbstractTrainingPhase | AbstractValidationPhase, on: StepRunners, raw: Any, training: bool
    ) -> BatchState:
        """Open the batch and run it up to its loss: the data, on the device, the model, and the loss function.

        `BatchBegin` comes before the model, `LossBegin` between it and the loss function. In training the gradients of
        the group before are zeroed after `BatchBegin`. Inputs and outputs are read from the batch again only where
        handlers may have replaced them. The loss is not returned: an error keeps the frames that it went through, with
        all in them.
        """
        core, scopes, state = self._core, self._scopes, self._state
        if core.places:
            raw = core.place(raw)
            scopes.hand_over()
        if on.pairs and (type(raw) is tuple or type(raw) is list) and len(raw) == 2:  # what most loaders give
            inputs, targets = raw
        else:
            inputs, targets = _split(phase, raw)
        batch = BatchState()
        batch.inputs = inputs
        batch.targets = targets
        if type(inputs) is torch.Tensor is type(targets):
            state.batch = state.batch_twin = batch
        else:
            state.show(batch)
        scopes.backward = False
        scopes.batch = OPEN
        if on.batch_begin is not None:
            on.batch_begin(_BATCH_BEGIN, phase)
            inputs = batch.inputs
        if training:
            core.begin()
        try:
            outputs = batch.outputs = core.model(inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            error.add_note(f"raised by the model in {phase!r}, called with batch.inputs: {describe(batch.inputs)}")
            raise
        if type(outputs) is not torch.Tensor:
            core.show(batch)
        if on.loss_begin is not None:
            on.loss_begin(_LOSS_BEGIN, phase)
            outputs = batch.outputs
        try:
            loss = batch.loss = core.lossfn(outputs, batch.targets)
            scalar = loss.numel() == 1
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            if isinstance(error, AttributeError) and error.name == "numel" and "loss" in vars(batch):
                raise _loss_error(phase, core, batch, f"returned {describe(batch.loss)}, which is no tensor") from None
            raise _loss_error(phase, core, batch, f"raised {type(error).__name__}: {error}") from error
        if not scalar:
            raise _loss_error(phase, core, batch, f"returned {describe(loss)}, which is no single number")
        return batch

    # --- the loop

    def step_of(self, phase: Phase) -> Callable[[Any], None]:
        """Return what runs a batch of a phase: a bundled step without the call of `Phase.step` that leads here."""
        if isinstance(phase, AbstractTrainingPhase) and type(phase).step is AbstractTrainingPhase.step:
            return partial(self.train, phase)
        if isinstance(phase, AbstractValidationPhase) and type(phase).step is AbstractValidationPhase.step:
            return partial(self.evaluate, phase)
        return partial(phase.step, self)

    def update_due(self, phase: Phase, names: list[str], begin: UpdateBegin, end: UpdateEnd) -> None:
        """Clip and step the optimizers of these names together, between the two events."""
        on, core = self._runners[phase], self._core
        core.unscale(names)
        if on.update_begin is not None:
            on.update_begin(begin, phase)
        norm = core.clip(names)
        if norm is not None:
            self._state.batch.grad_norm = norm
        core.step(names)
        self._state.updates += 1
        if on.update_end is not None:
            on.update_end(end, phase)

    def cancel_batch(self, phase: Phase, failure: BaseException, *ends: type[BaseException]) -> None:
        """Close the batch, if one is open, after an exception; then raise what is left, unless it is one of `ends`."""
        scopes = self._scopes
        scopes.locate(failure, phase)
        failures = [failure]
        del failure  # see `raise_worst`
        self._dispatch.drop()  # an interrupt leaves behind what its event had asked for
        if not isinstance(failures[0], CancelException):
            self._cuts.drop()
        completed = None
        if scopes.batch == OPEN:
            scopes.end_batch()
            if scopes.backward:
                self._core.discard()
                settle(self._state.batch)
            self._dispatch.fire_last(_BATCH_CANCELLED, phase, failures)
        elif scopes.batch == ENDING:
            completed = self._state.batch  # BatchEnd was fired: the batch itself is complete
        scopes.close_batch(completed)
        raise_worst(failures, *ends)


def settle(batch: BatchState) -> None:
    """Detach the loss of a batch that nobody has watched, where the step has left that out."""
    loss = vars(batch).get("loss")
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        batch.loss = loss.detach()


def _split(phase: AbstractTrainingPhase | AbstractValidationPhase, raw: object) -> Any:
    pair: Any = phase.split(raw)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"{phase!r}.split(raw) must return (inputs, targets), got {describe(pair)}.")
    return pair


def _loss_error(phase: object, core: TorchCore, batch: BatchState, what: str) -> LossError:
    return LossError(
        f"The loss function {core.loss_name} {what}\n"
        f"In {phase!r} it was called with batch.outputs: {describe(batch.outputs)} and batch.targets: "
        f"{describe(batch.targets)}. The model and the loss must fit: change the model's last layer, the targets that "
        f"the dataset returns, or wrap the loss in a function of (outputs, targets) that returns a tensor with one "
        f"element."
    )


def _check_graph(phase: object, what: str, loss: torch.Tensor, error: RuntimeError) -> None:
    """Replace the error of a backward pass for a loss without a graph by one that says what cuts the graph.

    Raises:
        LossError: The loss has no graph.
    """
    if not loss.requires_grad:
        raise LossError(
            f"{phase!r} cannot run a backward pass: {what} is {describe(loss)}, without a graph, so no parameter can "
            f"get a gradient from it. Something between the parameters and the loss cuts the graph: look for "
            f"detach(), item(), torch.tensor(...), torch.no_grad() and torch.inference_mode() in the model, the loss "
            f"function and around the call, and for frozen parameters (requires_grad_(False))."
        ) from error
