"""One batch: the bundled steps, and the methods that a user's step is written with.

A batch is opened and `BatchBegin` is fired; the step computes; `BatchEnd` is fired and the batch is closed. An
exception closes the batch with `BatchCancelled` instead (`Steps.cancel_batch`). The code has two forms of this
protocol: `Steps.run_batch`, `backward` and `update` serve any step, `Steps.train` and `evaluate` are the bundled steps.
The second form is faster, because it runs for every batch of most programs: it fires an event by calling the runner of
the event, if there is one (`flowtrain.training.dispatch.StepRunners`), it sets the state of the batch (`Scopes.batch`)
directly, and it calls torch's own functions where the settings of the core allow it (`flowtrain.core.torch_core`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Never, TypeAlias

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
from flowtrain.callback.phases import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Phase,
    StepContext,
    has_bundled_step,
)
from flowtrain.core.torch_core import TorchCore
from flowtrain.errors import CancelException, CoreError, DataError, UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.errors.describing import describe
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.namespace import State
from flowtrain.training.checkpoint.checkpoints import Checkpoints
from flowtrain.training.dispatch import Dispatch, StepRunners
from flowtrain.training.failures import Failures
from flowtrain.training.scopes import CLOSED, ENDING, OPEN, Scopes
from flowtrain.training.step_errors import check_graph, loss_error, note_inputs, see_memory_error
from flowtrain.training.sync import StepSync

__all__ = ["Steps", "detach_loss"]

_DEVICE_FAILURES = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))  # torch 2.8

_Bundled: TypeAlias = AbstractTrainingPhase | AbstractValidationPhase  # a phase with a bundled step

_BATCH_BEGIN, _BATCH_END, _BATCH_CANCELLED = BatchBegin(), BatchEnd(), BatchCancelled()
_LOSS_BEGIN, _BACKWARD_BEGIN, _BACKWARD_END = LossBegin(), BackwardBegin(), BackwardEnd()
_UPDATE_BEGIN, _UPDATE_END = UpdateBegin(), UpdateEnd()


class Steps(StepContext):
    """Runs batches. This is the object that a step gets as ``learner``: the implementation of `flowtrain.StepContext`.

    Args:
        state: The state of the learner.
        core: The torch core.
        scopes: The open scopes.
        dispatch: Fires events.
        checkpoints: Drops the requests of a batch that ends with an error.
        sync: Synchronises each batch with those of the other ranks.
    """

    def __init__(
        self,
        state: LearnerState,
        core: TorchCore,
        scopes: Scopes,
        dispatch: Dispatch,
        checkpoints: Checkpoints,
        sync: StepSync,
    ) -> None:
        self._state, self._core, self._scopes, self._dispatch = state, core, scopes, dispatch
        self._checkpoints, self._sync = checkpoints, sync
        self._runners = dispatch.runners

    # --- the state of training

    @property
    def model(self) -> Any:
        """The model of the learner, or all its models by name."""
        return self._state.model

    @property
    def lossfn(self) -> Any:
        """The loss function."""
        return self._state.lossfn

    @property
    def optimizer(self) -> Any:
        """The optimizer of the learner, or all its optimizers by name."""
        return self._state.optimizer

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters of the model by name; with several models the name begins with the name of the model."""
        return self._state.params

    @property
    def data(self) -> Any:
        """The loaders by phase."""
        return self._state.data

    @property
    def batch(self) -> BatchState:
        """The state of the current batch, or of the last one."""
        return self._state.batch

    @property
    def cbstate(self) -> State:
        """The state that callbacks share with each other."""
        return self._state.cbstate

    if not TYPE_CHECKING:  # with `__getattr__` a type checker would accept every attribute

        def __getattr__(self, name: str) -> Never:
            if name in ("epoch", "evaluate", "fit", "predict", "step", "validate"):
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
        """Open a batch with this state, and close it when its body has ended (`StepContext.run_batch`)."""
        core, scopes = self._core, self._scopes
        if scopes.batch != CLOSED:
            raise UsageError(f"run_batch({phase!r}) was called inside an open batch. Leave that one first.")
        self._sync.begin_own(phase)
        batch = BatchState()
        if core.places:
            state = core.place(state)
            scopes.release_completed()
        batch.__dict__.update(state)
        self._state.show(batch)
        scopes.open_batch()
        try:
            self._dispatch.fire(_BATCH_BEGIN, phase)
            if torch.is_grad_enabled():
                core.groups.begin()
            yield batch
            self._sync.end_own(phase)
        except BaseException as failure:
            self.cancel_batch(phase, failure)  # always raises, since no exception is given to end here
        scopes.end_batch()
        try:
            self._dispatch.fire(_BATCH_END, phase)
        finally:
            scopes.close_batch(self._state.batch)

    def fire(self, event: Event, phase: Phase) -> None:
        """Fire an event for a step; an `UpdateEnd` counts as an update that the step has made itself."""
        if is_a(event, UpdateEnd):  # a step that calls its optimizer itself fires this event instead of `update`
            self._sync.check_own_update(phase)
            self._state.updates += 1
        self._dispatch.fire_from_outside(event, phase)

    def forward(self) -> AbstractContextManager[None]:
        """Return the context in which the core runs a forward pass."""
        return self._core.autocast()

    def backward(self, phase: Phase, loss: torch.Tensor, name: str | None = None) -> None:
        """Run the backward pass of the core between its two events (`StepContext.backward`)."""
        on, batch = self._runners[phase], self._state.batch
        self._need_batch("backward")
        shared = batch.__dict__.get("loss") is loss
        self._scopes.backward = True
        if on.backward_begin is not None:
            on.backward_begin(_BACKWARD_BEGIN, phase)
            loss = batch.loss if shared else loss
        if not is_a(loss, torch.Tensor) or loss.numel() != 1:
            raise CoreError(f"backward({phase!r}, loss) takes a tensor with one element, got {loss!r}. Pass the mean.")
        self._core.groups.drop_spent()
        try:
            if name is None:
                self._core.backward(loss)
            else:
                self._core.backward_for(loss, name)
        except RuntimeError as error:
            check_graph(phase, "batch.loss" if shared else "the loss", loss, error)
            raise
        if shared:
            batch.loss = loss.detach()
        batch.grads = self._core.grads
        if on.backward_end is not None:
            on.backward_end(_BACKWARD_END, phase)

    def update(self, phase: Phase, name: str | None = None) -> None:
        """Update the parameters of the optimizers whose accumulation groups are complete (`StepContext.update`)."""
        self._need_batch("update")
        names = self._core.due(name)
        if names:
            self.update_due(phase, names, _UPDATE_BEGIN, _UPDATE_END)

    def _need_batch(self, what: str) -> None:
        if self._scopes.batch != OPEN:
            raise UsageError(f"{what}() needs an open batch. Call it inside `with learner.run_batch(self, ...)`.")

    # --- the bundled steps

    def train(self, phase: AbstractTrainingPhase, raw: Any) -> None:
        """Run a batch of a training phase, with its events; the update of a plain core is written out here."""
        on, core, scopes, sync = self._runners[phase], self._core, self._scopes, self._sync
        # `NoSync.begin` returns the same functions, and its call would be one more in every batch.
        calls = (core.model, core.backward, self.update) if sync.alone else sync.begin(phase, self.update)
        model, backward, update = calls
        batch = self._open(phase, on, raw, model, True)
        scopes.backward = True
        if on.backward_begin is not None:
            on.backward_begin(_BACKWARD_BEGIN, phase)
        try:
            backward(batch.loss)
        except RuntimeError as error:
            check_graph(phase, "batch.loss", batch.loss, error)
            raise
        if on.watched:  # otherwise `detach_loss` follows when a handler may see the batch: detaching costs about 1 µs
            batch.loss = batch.loss.detach()
        batch.grads = core.grads
        if on.backward_end is not None:
            on.backward_end(_BACKWARD_END, phase)
        if core.plain:
            # These lines are `update_due` for a plain core, written out because four calls fewer in every batch are
            # worth it (tests/test_costs.py counts them).
            if on.update_begin is not None:
                on.update_begin(_UPDATE_BEGIN, phase)
            core.optimizer.step()
            self._state.updates += 1
            if on.update_end is not None:
                on.update_end(_UPDATE_END, phase)
        else:
            update(phase)
        scopes.batch = ENDING
        if on.batch_end is not None:
            on.batch_end(_BATCH_END, phase)
        scopes.batch = CLOSED
        scopes.completed = batch

    def evaluate(self, phase: AbstractValidationPhase, raw: Any) -> None:
        """Run a batch of a phase that evaluates: forward pass and loss, with their events."""
        on, scopes = self._runners[phase], self._scopes
        batch = self._open(phase, on, raw, self._core.model, False)
        scopes.batch = ENDING
        if on.batch_end is not None:
            on.batch_end(_BATCH_END, phase)
        scopes.batch = CLOSED
        scopes.completed = batch

    def _open(
        self, phase: _Bundled, on: StepRunners, raw: Any, model: Callable[..., Any], training: bool
    ) -> BatchState:
        """Open the batch and run it up to its loss: move the data to the device, call the model and the loss function.

        `BatchBegin` is fired before the model is called, by the function `model`, and `LossBegin` before the loss
        function. In training the gradients of the previous accumulation group are zeroed after `BatchBegin`. Inputs and
        outputs are read from the batch again only after an event whose handlers may have replaced them. The loss is not
        returned, because an error in the caller would keep it alive, with its graph, in the frame of its traceback.

        Raises:
            DataError: `split` of the phase did not return a pair.
            LossError: The loss function raised an error, or returned another value than a tensor with one element.
        """
        core, scopes, state = self._core, self._scopes, self._state
        if core.places:
            raw = core.place(raw)
            scopes.release_completed()
        if on.pairs and (type(raw) is tuple or type(raw) is list) and len(raw) == 2:  # most loaders give such a pair
            inputs, targets = raw
        else:
            inputs, targets = _split(phase, raw)
        batch = BatchState()
        batch.inputs = inputs
        batch.targets = targets
        if type(inputs) is torch.Tensor is type(targets):  # tensors need no read-only twin, so skip looking for them
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
            call = on.call_model
            outputs = batch.outputs = model(inputs) if call is None else call(model, inputs)
        except (TypeError, ValueError, RuntimeError) as error:
            note_inputs(error, phase, batch.inputs, whole=on.call_model is None)
            raise
        if type(outputs) is not torch.Tensor:
            core.show(batch)
        if on.loss_begin is not None:
            on.loss_begin(_LOSS_BEGIN, phase)
            outputs = batch.outputs
        try:
            loss = batch.loss = core.lossfn(outputs, batch.targets)
            scalar = loss.numel() == 1
        except _DEVICE_FAILURES:  # the loss is not to blame
            raise
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            if isinstance(error, AttributeError) and error.name == "numel" and "loss" in vars(batch):
                raise loss_error(phase, core, batch, f"returned {describe(batch.loss)}, which is no tensor") from None
            raise loss_error(phase, core, batch, f"raised {type(error).__name__}: {error}") from error
        if not scalar:
            raise loss_error(phase, core, batch, f"returned {describe(loss)}, which is no single number")
        return batch

    # --- the loop

    def step_of(self, phase: Phase) -> Callable[[Any], None]:
        """Return a function that runs a batch of a phase.

        For a bundled step this is `train` or `evaluate` itself, which saves the call of `Phase.step` for every batch.
        """
        if isinstance(phase, AbstractTrainingPhase) and has_bundled_step(type(phase), AbstractTrainingPhase):
            return partial(self.train, phase)
        if isinstance(phase, AbstractValidationPhase) and has_bundled_step(type(phase), AbstractValidationPhase):
            return partial(self.evaluate, phase)
        return self._sync.around(phase, partial(phase.step, self))

    def update_due(self, phase: Phase, names: list[str], begin: UpdateBegin, end: UpdateEnd) -> None:
        """Clip and step the optimizers of these names together, between the two events."""
        on, core, sync = self._runners[phase], self._core, self._sync
        runners = on.update_begin, on.update_end  # `NoSync.updating` returns them too; see `train`
        if not sync.alone:
            runners = sync.updating(phase, names, on, in_batch=begin.in_batch)
        update_begin, update_end = runners
        core.unscale(names)
        if update_begin is not None:
            update_begin(begin, phase)
        norm = core.clip(names)
        if norm is not None:
            self._state.batch.grad_norm = norm
        core.step(names)
        self._state.updates += 1
        if update_end is not None:
            update_end(end, phase)

    def cancel_batch(self, phase: Phase, failure: BaseException, *ends: type[BaseException]) -> None:
        """Close the batch after an exception, if it is open, and raise the worst failure.

        Args:
            phase: The phase of the batch.
            failure: The exception.
            ends: Types of exceptions that end with the batch, and are not raised.
        """
        scopes = self._scopes
        failure = self._sync.leave(phase, failure)
        scopes.locate(failure, phase)
        see_memory_error(failure, phase, self._core, self._state.batch if scopes.batch else None)
        failures = Failures(failure)
        del failure  # see `flowtrain.errors.raise_worst`
        self._dispatch.drop_requests()  # an interrupt within an event leaves the requests of its handlers
        if not failures.only(CancelException):
            self._checkpoints.drop_requests()
        completed = None
        if scopes.batch == OPEN:
            self._checkpoints.drop_cancelled()
            scopes.end_batch()
            if scopes.backward:
                self._core.discard()
                detach_loss(self._state.batch)
            with failures:
                self._dispatch.fire_closing(_BATCH_CANCELLED, phase)
        elif scopes.batch == ENDING:
            completed = self._state.batch  # a handler of `BatchEnd` has failed, but the batch is complete
        scopes.close_batch(completed)
        failures.raise_worst(*ends)


def detach_loss(batch: BatchState) -> None:
    """Detach the loss of a batch, if `Steps.train` has left that out because no handler could see the loss."""
    loss = vars(batch).get("loss")
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        batch.loss = loss.detach()


def _split(phase: AbstractTrainingPhase | AbstractValidationPhase, raw: object) -> Any:
    """Return the pair that `split` of a phase makes of the data.

    Raises:
        DataError: `split` has returned another value than a pair.
    """
    pair: Any = phase.split(raw)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"{phase!r}.split(raw) must return (inputs, targets), or (raw, None), got {describe(pair)}.")
    return pair
