"""The learner: one object that holds the state of training and delegates the work to its parts.

`LearnerState` holds the state, and `Callbacks` the callbacks, which `CallbackChanges` replaces as a whole. `TorchCore`
computes, and `Loop` runs fits, epochs and batches. The learner checks the arguments of the user and joins these parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from operator import attrgetter
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Never, NoReturn, Self, cast

import torch

from flowtrain.callback.callback import Callback
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase, ValidationPhase
from flowtrain.callbacks import Metrics, MetricsPrinter, ProgressBar, Recorder, StopOnNaNLoss
from flowtrain.callbacks.checkpointer import latest_of
from flowtrain.callbacks.timeline import timing
from flowtrain.core.torch_core import TorchCore
from flowtrain.diagnostics.dry_run import DryRun, dry_run
from flowtrain.diagnostics.history import History
from flowtrain.diagnostics.report.page import write_learner
from flowtrain.diagnostics.strict import watch
from flowtrain.diagnostics.suggest_access import Recording, record
from flowtrain.diagnostics.sync_audit import SyncReport, audit
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import switch
from flowtrain.graph.executor import Executor, find_executor, savings
from flowtrain.graph.registry import Callbacks
from flowtrain.graph.what_if import WhatIf
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.namespace import State
from flowtrain.training import arguments
from flowtrain.training.callback_changes import CallbackChanges
from flowtrain.training.calls import Calls, without_frames
from flowtrain.training.fit_data import loaders_by_phase
from flowtrain.training.loop import Loop

__all__ = ["Learner"]


class Learner:
    """Trains a model.

    Args:
        model: A module, or a mapping from names to several modules. Several modules are ``learner.model.gen`` and so
            on, and need a phase with a step for them.
        lossfn: A function of ``(batch.outputs, batch.targets)`` that returns a tensor with one element. The parameters
            of a loss function that is a module are trained too.
        data: One loader for training; a pair ``(training, validation)``; or a mapping from phases to loaders.
        optimizer: A function of the parameters, such as ``partial(torch.optim.AdamW, lr=1e-3)``; an optimizer; or a
            mapping from names to either. With several models, a name is that of the model whose parameters it gets.
        callbacks: The callbacks. Their order in the list decides where their declarations leave a choice.
        default_callbacks: ``True`` adds `Recorder`, `Metrics`, `StopOnNaNLoss`, `ProgressBar` and `MetricsPrinter`
            after them, each if no callback of its type is there; ``"quiet"`` leaves out the last two, which print.
        executor: ``"serial"``, ``"dask"``, ``"local"``, the address of a dask scheduler, or an `Executor`.
        core: The part that computes, by default `TorchCore()`.
        strict: Whether to check around every handler, slowly, that it changed only declared state, tensors included.

    Attributes:
        state: The state of training, which the views of handlers show.
        core: The part that computes.
        loop: The part that runs fits, epochs and batches.

    Raises:
        FlowtrainError: An argument does not fit. Nothing has run then except the `setup` of callbacks.
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
        arguments.check_keywords("Learner", unknown, Learner.__init__)
        self.state = LearnerState()
        self.state.model = arguments.check_model(model)
        self.state.lossfn = arguments.check_lossfn(lossfn)
        self.state.data = loaders_by_phase(data)
        self._watch = watch(self.state) if switch("Learner", "strict", strict) else None
        quiet, printing = (Recorder, Metrics, StopOnNaNLoss), (ProgressBar, MetricsPrinter)
        chosen = arguments.with_defaults(arguments.as_list(callbacks), default_callbacks, quiet, printing)
        self.core = arguments.check_core(core)
        try:
            self.core.attach(self.state, optimizer)
            self.loop = Loop(self.state, self.core, find_executor(executor))
            self._changes = CallbackChanges(self.loop, repr(self))
            self._calls = Calls(self.loop, self._changes)
            self._calls.check_phases(self.state.data)
            self._use(chosen)
        except BaseException:
            self.core.release(self.state)  # so that the user can pass the same core again
            raise

    def fit(
        self,
        epochs: int | None = None,
        *,
        steps: int | None = None,
        validate_every: int | None = None,
        limit_batches: float | Mapping[Any, float] | None = None,
        data: Any = None,
        resume: str | PathLike[str] | None = None,
        timeline: str | PathLike[str] | None = None,
        **unknown: Never,
    ) -> History:
        """Train for a number of epochs, or for a number of steps.

        With `epochs`, one epoch of every phase in `data` is run in turn, that many times. With `steps`, the training
        loader is repeated until that many batches were run. One training epoch is then `validate_every` batches, or
        one pass over the loader, and one epoch of every other phase follows it.

        Args:
            epochs: The number of epochs of each phase.
            steps: The number of training batches.
            validate_every: With `steps`, the number of training batches in an epoch. With `epochs`, the number of
                training epochs after which the phases that do not train run; they run after the last one too.
            limit_batches: The most batches in a pass over a loader, for short runs: a number, a share as ``0.1``, or a
                mapping from phases to these. A schedule is stretched over the updates that are left.
            data: Loaders for this fit, as for `Learner`.
            resume: The checkpoint to resume from, or a folder, for its latest one; ``"auto"`` takes the folder of the
                Checkpointer, or begins anew if that has none. `epochs` or `steps` is the total, with the part before.
            timeline: A file for a timeline of this fit, which shows who runs when (`flowtrain.callbacks.Timeline`).

        Returns:
            `history`, which holds the metrics of all epochs of this learner, not only those of this fit.

        Raises:
            CheckpointError: A checkpoint cannot be read or does not fit, or another run uses a folder; nothing changed.
            KeyboardInterrupt: Ctrl-C or SIGTERM came, and a batch boundary was reached (rule 29).
            UsageError: A handler or a step called this, or an argument has a wrong value.
            DataError: There is no data.
            Exception: A handler, the model or the loader raised it; `FitEnd` was fired before. A note names the handler
                if there is one. `CancelFittingException` is not raised but assigned to `stopped`.
        """
        arguments.check_keywords("fit", unknown, Learner.fit)
        timed = timing(self.loop, timeline)
        with self._calls.holding(waits=resume is not None):
            found = self.loop.together.agree(latest_of(self.callbacks)) if resume == "auto" else resume
            self._calls.fit(epochs, steps, validate_every, limit_batches, data, found, timed)
        return self.history

    def epoch(self, phase: Phase | type[Phase], data: Any = None) -> None:
        """Run one epoch of a phase, over its own loader or over the loader `data`.

        Raises:
            CancelFittingException: A handler wants to end training, and there is no fit to end.
            UsageError: There is no loader for the phase, or a handler or a step called this.
        """
        self._calls.epoch(arguments.given_phase(phase, "epoch"), data)

    def step(self, phase: Phase | type[Phase], raw: Any) -> BatchState:
        """Run one batch of a phase, `raw` as the loader would give it, and return the batch state."""
        return self._calls.step(arguments.given_phase(phase, "step"), raw)

    def validate(self) -> Mapping[Any, Any]:
        """Run one epoch of every phase in `data` that does not train.

        Returns:
            The values of the metrics by name, as from `evaluate`. With several such phases, these values for each
            phase: ``learner.validate()[ValidationPhase]["Loss"]``.

        Raises:
            UsageError: `data` has no such phase, or a handler or a step called this.
        """
        return self._calls.validate()

    def evaluate(self, data: Any = None, phase: Phase | type[Phase] = ValidationPhase) -> dict[str, float]:
        """Run one epoch of a phase that evaluates, over a loader or over its own data, and return its metrics.

        The values are recorded and logged as those of any epoch of the phase. To keep the values of test data apart,
        give these a phase of their own: ``class TestPhase(ValidationPhase)``.

        Args:
            data: The loader; by default that of `phase` in the data of the learner.
            phase: The phase; if the data has no `ValidationPhase` but one other phase that evaluates, by default that.

        Returns:
            The values of the epoch by the names of the metrics, ``"Loss"`` among them. It is empty if no callback
            records metrics of epochs, or the epoch has no complete batch.

        Raises:
            UsageError: There is no data, the phase trains, or a handler or a step called this.
            DataError: The loader gives no batch.
        """
        return self._calls.evaluate(data, arguments.given_phase(phase, "evaluate"))

    def predict(self, loader: Any, phase: Phase | type[Phase] = ValidationPhase) -> Any:
        """Return the outputs of the model for all batches of a loader, concatenated along the first dimension.

        The model is in eval mode and computes without gradients. No callback runs, nothing is recorded, and the modes,
        the random numbers of the process and the generators of the loader stay as they were. Only worker processes that
        run already (``persistent_workers=True``) keep the numbers that they have drawn.

        An item of the loader may be a pair ``(inputs, targets)``, whose targets are ignored, or inputs alone, also in a
        list or tuple of one part. If the phase defines `split`, that says what the inputs are.

        Args:
            loader: The loader, or a list of batches.
            phase: The phase that evaluates, with the same default as in `evaluate`.

        Returns:
            Tensors on the CPU, in the containers that the model returns: one tensor of shape ``(samples, ...)``, or a
            tuple or a mapping of such tensors.

        Raises:
            UsageError: There are several models, the phase trains, or a handler or a step called this.
            DataError: The loader gives no batch or unknown items, or the outputs cannot be concatenated.
        """
        return self._calls.predict(loader, arguments.given_phase(phase, "predict"))

    def load(self, path: str | PathLike[str]) -> None:
        """Restore models, optimizers, scaler, ``cbstate`` and callbacks from a checkpoint.

        The random number generators belong to the process and do not change, and the next `fit` begins at its first
        batch; use ``fit(..., resume=path)`` to continue where the checkpoint was taken. If evaluations use other
        weights than the trained ones (`flowtrain.callbacks.EMA`), the model has these until training continues.

        Args:
            path: A checkpoint, a folder whose latest checkpoint is used, or the file ``best`` of a folder.

        Raises:
            CheckpointError: The checkpoint cannot be read or does not fit; the learner has not changed.
        """
        self._calls.ready("load()")
        arguments.check_path(path, "load(", "For weights alone call learner.model.load_state_dict(torch.load(path)).")
        self.loop.checkpoints.load(path)

    def plot(self, *metrics: str, to: str | PathLike[str] | None = None) -> Any:
        """Draw the named metrics, or all recorded ones; return a matplotlib figure (`flowtrain.diagnostics.plots`)."""
        return self.history.plot(*metrics, to=to)

    def report(self, path: str | PathLike[str]) -> None:
        """Write a page of HTML that shows the learner, with bokeh; `UsageError` if it cannot (``docs/report.md``)."""
        write_learner(self.state, self.executor, path)

    def flush(self) -> None:
        """Wait until the executor has done everything that it was given and all checkpoints are written."""
        self.loop.executor.flush()
        self.loop.checkpoints.writer.wait()

    def close(self) -> None:
        """Flush and close the executor and the logging backends. The learner can still be read."""
        self._calls.close(None, self._let_go)

    def _let_go(self) -> None:
        """Move the models and the data out of the reference cycles of the learner, and break these cycles."""
        self.loop.dispatch.close()
        self.loop.checkpoints.close()
        self.core.close()
        self.state = self.state.hand_over()
        self._calls.stopped = self.stopped and without_frames(self.stopped)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, failure: BaseException | None, traceback: object) -> None:
        self._calls.close(failure, self._let_go)

    # --- the state of training

    @property
    def closed(self) -> bool:
        """Whether `close` was called: the learner can be read, and cannot run any more."""
        return self._changes.closed

    @property
    def stopped(self) -> BaseException | None:
        """The exception that ended the last fit early, an error or a cancel; ``None`` if it ended by itself."""
        return self._calls.stopped

    @property
    def history(self) -> History:
        """The metrics of all epochs so far: a table, rows, series by phase, a plot."""
        recorder = self.get_callback(Recorder)
        return History(self.cbstate, recorder.ends if isinstance(recorder, Recorder) else {})

    model = property(attrgetter("state.model"), doc="The module that was passed, or all modules by name.")
    lossfn = property(attrgetter("state.lossfn"), doc="The loss function.")
    optimizer = property(attrgetter("state.optimizer"), doc="The optimizer, or all optimizers by name.")
    data = property(attrgetter("state.data"), doc="The loaders by phase: ``learner.data[TrainingPhase]``.")
    strict = property(lambda self: self._watch is not None, doc="Whether every handler is checked around its call.")
    rank = property(attrgetter("state.rank"), doc="The number of this process among those that train together.")
    world_size = property(attrgetter("state.world_size"), doc="The number of processes that train together.")

    @property
    def params(self) -> Mapping[str, Any]:
        """The parameters of the model by name; with several models each name begins with the name of the model."""
        return self.state.params

    @property
    def batch(self) -> BatchState:
        """The state of the current batch, or of the last one if no batch is open."""
        return self.state.batch

    @property
    def cbstate(self) -> State:
        """The state that callbacks share with each other."""
        return self.state.cbstate

    @property
    def callbacks(self) -> Callbacks:
        """The callbacks, a sequence with ``graph``, ``plan`` and ``explain``."""
        return cast(Callbacks, self.state.callbacks)

    @property
    def executor(self) -> Executor:
        """The executor, which runs the callbacks."""
        return self.loop.executor

    # --- the parts of a step, as in `flowtrain.StepContext`

    def run_batch(self, phase: Phase, **state: Any) -> AbstractContextManager[BatchState]:
        """Return the context of one batch; it gives the batch state, and fires `BatchBegin` and `BatchEnd`."""
        return self.loop.steps.run_batch(phase, **state)

    def forward(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass, which is autocast if the precision asks for it."""
        return self.loop.steps.forward()

    def backward(self, phase: Phase, loss: torch.Tensor, name: str | None = None) -> None:
        """Run the backward pass between `BackwardBegin` and `BackwardEnd`, for one optimizer if `name` is given."""
        self.loop.steps.backward(phase, loss, name)

    def update(self, phase: Phase, name: str | None = None) -> None:
        """Count a batch for an optimizer, or for all, and update where the accumulation group is complete."""
        self.loop.steps.update(phase, name)

    def fire(self, event: Event, phase: Phase) -> None:
        """Fire an event. A handler calls ``learner.fire(event)`` of its view instead."""
        self.loop.steps.fire(event, phase)

    # --- callbacks

    def get_callback(self, wanted: type[Callback] | str | Callback) -> Callback | None:
        """Return the first callback of a type, subclasses included, or of a name, or this one; ``None`` without it."""
        return self.callbacks.find(wanted)

    def add_callback(self, callback: Callback) -> None:
        """Add a callback at the end of the list. A change that is refused with an error changes nothing."""
        self._use([*self.callbacks, callback])

    def set_callbacks(self, callbacks: Iterable[Callback]) -> None:
        """Use these callbacks and no others, without default ones. Callbacks that stay are not set up again."""
        self._use(arguments.as_list(callbacks))

    def replace_callback(self, new: Callback) -> Callback:
        """Replace the one callback of exactly this type and return it; `CallbackError` if there is none, or several."""
        old = self.callbacks.must_find_same(new)
        self._use([new if callback is old else callback for callback in self.callbacks])
        return old

    def remove_callback(self, wanted: type[Callback] | str | Callback) -> Callback:
        """Remove and return what `get_callback` finds, one callback; `CallbackError` if it finds none."""
        removed = self.callbacks.must_find(wanted)
        self._use([callback for callback in self.callbacks if callback is not removed])
        return removed

    def replace_optimizer(self, optimizer: Any) -> Any:
        """Train with another optimizer from now on; return the one before. A `CoreError` changes nothing."""
        self._calls.ready("replace_optimizer()")
        return self._changes.replace_optimizer(optimizer, self._watch)

    def _use(self, callbacks: list[Callback]) -> None:
        self._calls.ready("Changing the callbacks")
        self._changes.use(callbacks, self._watch)

    def suggest_access(self, callback: Callback) -> Recording:
        """Find the smallest declaration for each handler of a callback, print them ready to paste, and return them.

        A copy of the callback, which need not be one of the learner nor declare anything, runs for one batch of every
        phase, on copies of all else. The learner does not change.

        Raises:
            UsageError: The learner has no data, or an object cannot be copied.
        """
        self._calls.ready("suggest_access()")
        recording = record(self, callback)
        print(recording)
        return recording

    def dry_run(self) -> DryRun:
        """Run all handlers for one batch of every phase, on copies, and return a table of the time that each took.

        Throttled handlers run too. No record, checkpoint or line is written, and the learner does not change.

        Raises:
            UsageError: The learner has no data, or an object cannot be copied.
        """
        self._calls.ready("dry_run()")
        return dry_run(self)

    def audit_syncs(self) -> SyncReport:
        """Find the lines at which the host waits for the device, print them by callback with a remedy, and return them.

        The callbacks run for one batch of every phase, on copies; the learner does not change. Without a device the
        CPU counts as one. Callbacks that only print or write files are left out.

        Raises:
            UsageError: The learner has no data, or an object cannot be copied.
        """
        self._calls.ready("audit_syncs()")
        report = audit(self)
        print(report)
        return report

    def what_if(self) -> WhatIf:
        """Return what ``executor="dask"`` would save, estimated from the times of the last fit with a timeline.

        Raises:
            ExecutorError: The executor gives no estimate, or dask is not installed, or the learner is closed.
            UsageError: No fit of these callbacks has had a timeline, or a handler or a step called this.
        """
        self._calls.ready("what_if()")
        return savings(self.executor)

    def __scratch__(self, model: Any, lossfn: Any, **parts: Any) -> Learner:
        """Return a learner of copies for a trial run; a subclass may have a constructor with other arguments."""
        return Learner(model, lossfn, callbacks=(), default_callbacks=False, **parts)

    if not TYPE_CHECKING:  # a type checker would think that every attribute exists
        __setattr__ = arguments.set_attribute  # which refuses an assignment that would have no effect

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or hasattr(type(self), name):
                return object.__getattribute__(self, name)  # raises the usual error, or that of a property
            raise arguments.no_attribute(name, dir(self))

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "A Learner cannot be copied or pickled: views, an executor and open files belong to it. Copy its model "
            "(copy.deepcopy(learner.model)), or let a Checkpointer write its state and load(path) that into another."
        )

    def __repr__(self) -> str:
        return f"Learner({type(self.state.model).__name__}, {self.core!r}, executor={self.executor.name!r})"
