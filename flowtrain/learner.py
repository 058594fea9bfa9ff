"""The learner: one object that holds the state of training and gives the work to its parts.

`LearnerState` holds the state, `Callbacks` the callbacks, which `CallbackChanges` changes; `TorchCore` computes and
`Loop` runs. The learner checks what a user passes, joins these parts, and delegates to them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Never, NoReturn, Self

import torch

from flowtrain.callback.callback import Callback
from flowtrain.callback.events import EpochBegin, Event
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callbacks import Metrics, MetricsPrinter, ProgressBar, Recorder, StopOnNaNLoss
from flowtrain.core.core import TorchCore
from flowtrain.diagnostics.plots import plot
from flowtrain.diagnostics.strict import watch
from flowtrain.diagnostics.suggest_access import Recording, record
from flowtrain.diagnostics.sync_audit import SyncReport, audit
from flowtrain.errors import ExecutorError, UsageError, without_frames
from flowtrain.graph.executor import Executor, find_executor
from flowtrain.graph.registry import Callbacks
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState, State
from flowtrain.training.arguments import (
    as_list,
    as_phase,
    check_core,
    check_counts,
    check_keywords,
    check_lossfn,
    check_model,
    check_path,
    check_phase,
    no_attribute,
)
from flowtrain.training.callback_changes import CallbackChanges
from flowtrain.training.data import check_fit_data, loaders
from flowtrain.training.loop import Loop

__all__ = ["Learner", "with_defaults"]


def with_defaults(chosen: list[Callback], wanted: object) -> list[Callback]:
    """Return the chosen callbacks, and after them the default ones of each type that is not among them."""
    if wanted not in (True, False, "quiet"):
        raise UsageError(f'default_callbacks={wanted!r} is not True, False or "quiet".')
    printing: list[type[Callback]] = [] if wanted == "quiet" else [ProgressBar, MetricsPrinter]
    kinds = [Recorder, Metrics, StopOnNaNLoss, *printing] if wanted else []
    return [*chosen, *(kind() for kind in kinds if not any(isinstance(callback, kind) for callback in chosen))]


class Learner:
    """Trains a model.

    Args:
        model: A module, or a mapping of several by name (then ``learner.model.gen``, and a phase with a step of its
            own).
        lossfn: Called with ``(batch.outputs, batch.targets)``; returns a tensor with one element. If it is a module,
            its parameters are trained too.
        data: Loaders: one for training; ``(training, validation)``; or a mapping from phases.
        optimizer: Called with the parameters, such as ``partial(torch.optim.AdamW, lr=1e-3)``; or an optimizer; or a
            mapping of either by name. With several models, a name is that of the model whose parameters it gets.
        callbacks: In the order that decides where their declarations leave a choice.
        default_callbacks: ``True`` adds `Recorder`, `Metrics`, `StopOnNaNLoss`, `ProgressBar` and `MetricsPrinter`
            after them, each unless one of its type is there; ``"quiet"`` leaves out the last two, which print.
        executor: ``"serial"``, the name of another, or an `Executor`.
        core: How to compute; `TorchCore()` if not given.
        strict: Check around every handler that it changed only what it declares, tensors included. Slow.

    Attributes:
        state: What is trained, and what callbacks share.
        core: How it is computed.
        loop: What runs it.
        stopped: What ended the last fit before its time, an error or a cancel; ``None`` if nothing did.

    Raises:
        FlowtrainError: Something of this does not fit; nothing has run then but `setup`.
    """

    def __init__(
        self,
        model: torch.nn.Module | Mapping[str, torch.nn.Module],
        lossfn: Callable[..., Any] | None = None,
        *,
        data: Any = None,
        optimizer: Any = torch.optim.AdamW,
        callbacks: Iterable[Callback] = (),
        default_callbacks: bool | Literal["quiet"] = True,
        executor: str | Executor = "serial",
        core: TorchCore | None = None,
        strict: bool = False,
        **unknown: Never,
    ) -> None:
        check_keywords("Learner", unknown, Learner.__init__)
        self.state = LearnerState()
        self.state.model = check_model(model)
        self.state.lossfn = check_lossfn(lossfn)
        self.state.data = loaders(data)
        self.strict = strict
        self.stopped: BaseException | None = None
        chosen = with_defaults(as_list(callbacks), default_callbacks)
        self.core = check_core(core)
        self.core.attach(self.state, optimizer)
        try:
            self._check_phases(self.state.data)
            self.loop = Loop(self.state, self.core, find_executor(executor))
            self._changes = CallbackChanges(self.loop, repr(self))
            self._use(chosen)
        except BaseException:
            self.core.release()  # so that the next attempt, with what was wrong put right, can have it
            raise

    # --- training

    def fit(
        self,
        epochs: int | None = None,
        *,
        steps: int | None = None,
        validate_every: int | None = None,
        data: Any = None,
        resume: str | PathLike[str] | None = None,
        **unknown: Never,
    ) -> None:
        """Train.

        Give `epochs`, or `steps`. By epochs, each epoch runs one epoch of every phase in `data`, in order. By steps,
        the training loader is gone through again and again until `steps` batches were run; each `validate_every`
        batches (without it: each pass of the loader) are one training epoch and are followed by one epoch of every
        other phase.

        Args:
            epochs: How many epochs.
            steps: How many training batches.
            validate_every: Training batches in an epoch; only with `steps`.
            data: Loaders for this fit, as for `Learner`.
            resume: A checkpoint to go on from, or a folder of them (its latest). `epochs`, or `steps`, is the total
                then, with what was done before the checkpoint; give what the fit that wrote it was given.

        Raises:
            CheckpointError: The checkpoint cannot be read or does not fit; the learner is as it was.
            KeyboardInterrupt: Ctrl-C or SIGTERM, seen at a batch boundary (rule 29).
            UsageError: Called inside a handler or a step, or with counts or a `resume` that cannot be.
            DataError: There is no data.
            Exception: Whatever a handler, the model or the loader raised, after `FitEnd`. An exception from a handler
                has a note that says which. `CancelFittingException` is not raised: see `stopped`.
        """
        check_keywords("fit", unknown, Learner.fit)
        with self._running("fit()", opens=resume is None):
            epochs, steps, validate_every = check_counts(epochs, steps, validate_every)
            if resume is not None:
                check_path(resume, "fit(resume=", "Leave it out for a fit that begins anew.")
            chosen = self.state.data if data is None else loaders(data)
            self._check_phases(chosen)
            check_fit_data(chosen, by_steps=steps is not None, stacklevel=2)
            before, self.state.data = self.state.data, chosen
            self.stopped = None
            try:
                if resume is not None:
                    self.loop.cuts.resume(resume, chosen, "epochs" if steps is None else "steps")
                self.stopped = self.loop.fit(chosen, epochs, steps, validate_every)
            except BaseException as failure:
                self.stopped = failure
                raise
            finally:
                self.state.data = before

    def epoch(self, phase: Phase | type[Phase], data: Any = None) -> None:
        """Run one epoch of a phase, over its loader or over `data`.

        Raises:
            CancelFittingException: A handler ended training; only `fit` has something to end.
        """
        phase = as_phase(phase, "epoch")
        with self._running("epoch()", trains=isinstance(phase, AbstractTrainingPhase)):
            if data is None and phase not in self.state.data:
                raise UsageError(f"There is no data for {phase!r}. Pass it: learner.epoch({phase!r}(), loader).")
            chosen = self.state.data if data is None else loaders({**self.state.data, phase: data})
            self._check_phases([phase])
            before, self.state.data = self.state.data, chosen
            try:
                self.loop.epoch(phase, chosen[phase])
            finally:
                self.state.data = before

    def step(self, phase: Phase | type[Phase], raw: Any) -> BatchState:
        """Run one batch of a phase on what a loader would give, and return the batch state."""
        phase = as_phase(phase, "step")
        with self._running("step()", trains=isinstance(phase, AbstractTrainingPhase)):
            self._check_phases([phase])
            return self.loop.step(phase, raw)

    def validate(self) -> None:
        """Run one epoch of every phase in `data` that does not train."""
        with self._running("validate()", trains=False):
            phases = [phase for phase in self.state.data if not isinstance(phase, AbstractTrainingPhase)]
            if not phases:
                raise UsageError("validate() has no data. Pass data=(train_loader, valid_loader) to Learner.")
            for phase in phases:
                self.loop.epoch(phase, self.state.data[phase])

    def load(self, path: str | PathLike[str]) -> None:
        """Put the learner into the state of a checkpoint: models, optimizers, scaler, ``cbstate`` and callbacks.

        The random number generators belong to the process and stay as they are, and the next `fit` begins anew;
        ``fit(..., resume=path)`` goes on where the checkpoint was taken. Where an evaluation judged other weights than
        those that are trained (`flowtrain.callbacks.EMA`), the model shows these until training goes on.

        Args:
            path: A checkpoint, a folder of them (its latest), or the folder's ``best``.

        Raises:
            CheckpointError: It cannot be read or does not fit; the learner is as it was.
        """
        self._ready("load()")
        check_path(path, "load(", "For weights alone call learner.model.load_state_dict(torch.load(path)).")
        self.loop.cuts.load(path)

    def plot(self, *metrics: str, to: str | PathLike[str] | None = None) -> Any:
        """Draw recorded metrics, or all of them; return a matplotlib figure. See `flowtrain.diagnostics.plots.plot`."""
        recorder = self.get_callback(Recorder)
        return plot(metrics, self.cbstate, recorder.ends if isinstance(recorder, Recorder) else {}, to)

    def flush(self) -> None:
        """Return when everything that the executor was given is done, and checkpoints are written."""
        self.loop.executor.flush()
        self.loop.cuts.writer.wait()

    def close(self) -> None:
        """Flush the executor, and give back what it and the backends hold. The learner can still be read.

        Once dropped, it is then gone at once with its model; without `close`, when the garbage collector comes.
        """
        self._close(None)

    def _close(self, failure: BaseException | None) -> None:
        """Close, after what was raised in the ``with`` block, if it was."""
        if self.closed:
            return
        self.loop.scopes.refuse_nested("close()")
        self._changes.closed = True
        if failure is not None:
            self.loop.sinks.note(failure)
        with ExitStack() as stack:  # from the last one to the first, and each of them, whatever the others raise
            stack.callback(self._let_go)
            stack.callback(self.loop.sinks.close)
            stack.enter_context(self.loop.sinks.noting(trains=False))
            stack.callback(self.loop.cuts.writer.wait)
            stack.callback(self.loop.executor.close)

    def _let_go(self) -> None:
        """Move what is heavy out of every circle of references, and end these."""
        self.loop.dispatch.close()
        self.core.close()
        self.state = self.state.moved()
        if self.stopped is not None:
            self.stopped = without_frames(self.stopped)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, failure: BaseException | None, traceback: object) -> None:
        self._close(failure)

    # --- what it holds

    @property
    def closed(self) -> bool:
        """Whether `close` was called: the learner can be read, and cannot run any more."""
        return self._changes.closed

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

    # --- the parts of a batch, as a step has them (`flowtrain.StepContext`)

    def run_batch(self, phase: Phase, **state: Any) -> AbstractContextManager[BatchState]:
        """Give the batch state, with `state` moved to the device, between `BatchBegin` and `BatchEnd`."""
        return self.loop.parts.run_batch(phase, **state)

    def forward(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass: autocast, if the precision asks for it."""
        return self.loop.parts.forward()

    def backward(self, phase: Phase, loss: torch.Tensor, name: str | None = None) -> None:
        """Run the backward pass between `BackwardBegin` and `BackwardEnd`; with `name`, for one optimizer only."""
        self.loop.parts.backward(phase, loss, name)

    def update(self, phase: Phase, name: str | None = None) -> None:
        """Clip and step an optimizer, or all, between `UpdateBegin` and `UpdateEnd`, once its group is complete."""
        self.loop.parts.update(phase, name)

    def fire(self, event: Event, phase: Phase) -> None:
        """Fire an event. In a handler call ``learner.fire(event)`` of the handler's own `learner`."""
        self.loop.parts.fire(event, phase)

    # --- callbacks

    def get_callback(self, wanted: type[Callback] | str) -> Callback | None:
        """Return the first callback of a type, subclasses included, or of a name; ``None`` if there is none."""
        return self.callbacks.find(wanted)

    def add_callback(self, callback: Callback) -> None:
        """Add a callback at the end of the list. If it is refused, everything stays as it was, as for each change."""
        self._use([*self.callbacks, callback])

    def set_callbacks(self, callbacks: Iterable[Callback]) -> None:
        """Use these callbacks, and no default ones. Those that are there already are not set up again."""
        self._use(as_list(callbacks))

    def replace_callback(self, new: Callback) -> Callback:
        """Replace the callback of the same type, and return it.

        Raises:
            CallbackError: There is none of exactly that type, or more than one.
        """
        old = self.callbacks.must_find_same(new)
        self._use([new if callback is old else callback for callback in self.callbacks])
        return old

    def remove_callback(self, wanted: type[Callback] | str) -> Callback:
        """Remove the first callback of a type, subclasses included, or of a name, and return it.

        Raises:
            CallbackError: There is none.
        """
        found = self.callbacks.must_find(wanted)
        self._use([callback for callback in self.callbacks if callback is not found])
        return found

    def _use(self, callbacks: list[Callback]) -> None:
        self._ready("Changing the callbacks")
        self._changes.use(callbacks, watch(self.state) if self.strict else None)

    def suggest_access(self, callback: Callback) -> Recording:
        """Find the least that each handler of a callback must declare, and print it, ready to paste.

        The callback, copied, is run for one batch of every phase, on copies of the model, the optimizer and the
        learner's callbacks. The learner does not change.

        Args:
            callback: One of the learner's, or one that it does not have yet; it need not declare anything.

        Raises:
            UsageError: The learner has no data, or something cannot be copied.
        """
        self._ready("suggest_access()")
        found = record(self, callback)
        print(found)
        return found

    def audit_syncs(self) -> SyncReport:
        """Find what makes the host wait for the device, by callback and line, and print it with what to do about it.

        The callbacks run for one batch of every phase, on copies; the learner does not change. Without a device the
        CPU counts as one. Callbacks that only print or write files are left out.

        Raises:
            UsageError: The learner has no data, or something cannot be copied.
        """
        self._ready("audit_syncs()")
        found = audit(self)
        print(found)
        return found

    def _ready(self, what: str) -> None:
        if self.closed:
            raise ExecutorError(f"{what} on a closed learner: its executor has given back all it held. Make a new one.")
        self.loop.scopes.refuse_nested(what)

    @contextmanager
    def _running(self, what: str, *, opens: bool = True, trains: bool = True) -> Generator[None]:
        """Open the logging backends, and note for them how what runs in this context ends."""
        self._ready(what)
        with self.loop.sinks.noting(trains=trains):
            if opens:
                self.core.structure.begin()
                self.loop.sinks.open()
            yield

    def _check_phases(self, phases: Iterable[Phase]) -> None:
        for phase in phases:
            check_phase(phase, self.state.model, self.core.modules)
            if self.state.callbacks:
                self.callbacks.plan(EpochBegin, type(phase))  # checks a phase that is met for the first time

    if not TYPE_CHECKING:  # a checker must not think that every attribute exists

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or hasattr(type(self), name):
                return object.__getattribute__(self, name)  # its own error, such as that of a property
            raise no_attribute(name, dir(self))

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "A Learner cannot be copied or pickled: views, an executor and open files belong to it. Copy its model "
            "(copy.deepcopy(learner.model)), or let a Checkpointer write its state and load(path) that into another."
        )

    def __repr__(self) -> str:
        return f"Learner({type(self.state.model).__name__}, {self.core!r}, executor={self.executor.name!r})"
