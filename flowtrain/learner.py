"""The learner: one object that holds the state of training and hands the work to its parts.

State is in `LearnerState`, callbacks in `Callbacks`, computing in `TorchCore`, running in `Loop`. The learner checks
what a user passes, joins these parts, and delegates. What it offers to a step is in `StepSite`, and what it offers to
who changes its callbacks in `CallbackSite`.

The callbacks of a learner, from outside: found, added, replaced and removed, each as one change or not at all.

`Learner` is one of these. A change makes a new `flowtrain.graph.registry.Callbacks`, which checks and orders all of
them. Then everybody who works for the callbacks is told: core, dispatch and sinks.

A callback has one learner, and keeps it when that is closed or gone: it holds what it has gathered there. It is free
again when it is taken out of the learner, and a learner that could not be built never had it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Never, NoReturn, Self

import torch

from flowtrain.callback.callback import Callback
from flowtrain.callback.events import EpochBegin
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callbacks import Metrics, MetricsPrinter, ProgressBar, Recorder, StopOnNaNLoss
from flowtrain.core.core import TorchCore
from flowtrain.diagnostics.plots import plot
from flowtrain.diagnostics.strict import watch
from flowtrain.diagnostics.suggest_access import Recording, record
from flowtrain.diagnostics.sync_audit import SyncReport, audit
from flowtrain.errors import CallbackError, ExecutorError, UsageError, without_frames
from flowtrain.graph.executor import Executor, find_executor
from flowtrain.graph.nodes import Node
from flowtrain.graph.registry import Callbacks, unique_names
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState
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
from flowtrain.training.data import loaders, warn_untrained
from flowtrain.training.loop import Loop
from flowtrain.training.step_site import StepSite

__all__ = [
    "CallbackSite",
    "Learner",
    "default_callbacks_for",
]


class _Owner(NamedTuple):
    """Who has an object that keeps state.

    Attributes:
        part: The object; its entry goes when it does.
        site: The learner.
        learner: How the learner is written, also when it is gone.
        callback: The name of the callback.
    """

    part: weakref.ref[object]
    site: weakref.ref[CallbackSite]
    learner: str
    callback: str


_owners: dict[int, _Owner] = {}
"""The owner of each callback, condition and criterion by its id.

It is kept here and not on the object, whose copies (for a dry run, in another process) belong to nobody.
"""


class CallbackSite(StepSite):
    """A learner as who changes its callbacks sees it.

    Attributes:
        strict: Whether every handler is checked to change only what it declares.
        closed: Whether the learner is closed.
    """

    strict: bool
    closed: bool

    def get_callback(self, wanted: type[Callback] | str) -> Callback | None:
        """Return the first callback of a type, subclasses included, or of a name; ``None`` if there is none."""
        return self.callbacks.find(wanted)

    def add_callback(self, callback: Callback) -> None:
        """Add a callback at the end of the list. A refused change leaves everything as it was; so with the next."""
        self._use([*self.callbacks, callback])

    def set_callbacks(self, callbacks: Iterable[Callback]) -> None:
        """Use these callbacks, and no default ones. Those that are there already are not set up again."""
        self._use(as_list(callbacks))

    def replace_callback(self, new: Callback) -> Callback:
        """Replace the callback of the same type, and return it.

        Raises:
            CallbackError: There is none of exactly that type, or more than one.
        """
        same = [callback for callback in self.callbacks if type(callback) is type(new)]
        if len(same) != 1:
            raise CallbackError(
                f"replace_callback({new!r}) needs exactly one {type(new).__name__} to replace; there are {len(same)}. "
                f"Use set_callbacks(...) or add_callback(...)."
            )
        self._use([new if callback is same[0] else callback for callback in self.callbacks])
        return same[0]

    def remove_callback(self, wanted: type[Callback] | str) -> Callback:
        """Remove the first callback of a type, subclasses included, or of a name, and return it.

        Raises:
            CallbackError: There is none.
        """
        found = self.callbacks.must_find(wanted)
        self._use([callback for callback in self.callbacks if callback is not found])
        return found

    def _use(self, callbacks: list[Callback]) -> None:
        self._check_open("Changing the callbacks")
        self.loop.scopes.refuse_nested("Changing the callbacks")
        phases = [type(phase) for phase in self.state.data]
        before = self.state.callbacks
        self._check_free(callbacks)
        watched = watch(self.state) if self.strict else None
        made = Callbacks(callbacks, self.state, phases, before, watched, self._accept)
        made.annotate(self.loop.executor.explain)
        self.state.callbacks = made
        named = (path for node in made.nodes for path, _ in node.union)
        self.core.need_grad_norm(("batch", "grad_norm") in named)
        self.core.guard_nan(any(callback.stops_at_nan for callback in made))
        self.loop.dispatch.use(made)
        self._own(made, before)
        self.loop.sinks.use(made.nodes)  # last: a sink that cannot be closed is an error, and the change is done then

    def _check_open(self, what: str) -> None:
        if self.closed:
            raise ExecutorError(f"{what} on a closed learner: its executor has given back all it held. Make a new one.")

    def _check_free(self, callbacks: list[Callback]) -> None:
        """Check that nothing that keeps state is another learner's, or is in two of these callbacks.

        Raises:
            CallbackError: Something is.
        """
        holders: dict[int, str] = {}
        for callback, name in unique_names(callbacks):
            for part in callback.stateful():
                owner = _owners.get(id(part))
                if owner is not None and owner.site() is not self:
                    raise _taken(name, callback, part, owner)
                other = holders.setdefault(id(part), name)
                if other != name:
                    raise CallbackError(
                        f"{other} and {name} have the same {part!r}, which would count the events or values of both. "
                        f"Make one for each of them."
                    )

    def _own(self, callbacks: Iterable[Callback], before: Iterable[Callback]) -> None:
        for callback in before:
            for part in callback.stateful():
                _owners.pop(id(part), None)
        me, written = weakref.ref(self), repr(self)
        for callback in callbacks:
            for part in callback.stateful():
                gone = partial(_forget, _owners, id(part))
                _owners[id(part)] = _Owner(weakref.ref(part, gone), me, written, callback.name)

    def _accept(self, nodes: Sequence[Node], state: LearnerState) -> None:
        self.loop.sinks.check(nodes)
        self.loop.executor.check(nodes, state)


def _forget(owners: dict[int, _Owner], place: int, part: weakref.ref[object]) -> None:
    owners.pop(place, None)


def _taken(name: str, callback: Callback, part: object, owner: _Owner) -> CallbackError:
    """Make the error for an object that another learner has."""
    learner = owner.site()
    what = name if part is callback else f"{part!r} of {name}"
    text = (
        f"{what} belongs to another learner, {owner.learner}, and would bring along what it has gathered there. Make a "
        f"new {type(part).__name__}(...) for each learner, such as one for each fold of a cross-validation."
    )
    if learner is not None and not learner.closed and part is callback:
        text += f" To move it with what it has gathered, write other.remove_callback({owner.callback!r}) first."
    return CallbackError(text)


def default_callbacks_for(wanted: object, chosen: Iterable[Callback]) -> list[Callback]:
    """Return the callbacks that a learner has without being told, except where one of that type was chosen.

    Args:
        wanted: ``True``, ``False``, or ``"quiet"``, which leaves out those that print.
        chosen: The user's.
    """
    if wanted not in (True, False, "quiet"):
        raise UsageError(f'default_callbacks={wanted!r} is not True, False or "quiet".')
    if not wanted:
        return []
    kinds: list[type[Callback]] = [Recorder, Metrics, StopOnNaNLoss]
    if wanted != "quiet":
        kinds += [ProgressBar, MetricsPrinter]
    return [kind() for kind in kinds if not any(isinstance(callback, kind) for callback in chosen)]


class Learner(CallbackSite):
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
        self.closed = False
        found = find_executor(executor)
        chosen = [*as_list(callbacks)]
        chosen += default_callbacks_for(default_callbacks, chosen)
        self.core = check_core(core)
        self.core.attach(self.state, optimizer)
        try:
            self._check_phases(self.state.data)
            self.loop = Loop(self.state, self.core, found)
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
            UsageError: Called inside a handler or a step, with counts that mean nothing, or with a `resume` that is no
                path.
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
            self._check_fit_data(chosen, by_steps=steps is not None)
            before, self.state.data = self.state.data, chosen
            self.stopped = None
            try:
                if resume is not None:
                    self.loop.cuts.resume(resume, chosen, "epochs" if steps is None else "steps")
                self.stopped = self.loop.fit(self, chosen, epochs, steps, validate_every)
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
                self.loop.epoch(self, phase, chosen[phase])
            finally:
                self.state.data = before

    def step(self, phase: Phase | type[Phase], raw: Any) -> BatchState:
        """Run one batch of a phase on what a loader would give, and return the batch state."""
        phase = as_phase(phase, "step")
        with self._running("step()", trains=isinstance(phase, AbstractTrainingPhase)):
            self._check_phases([phase])
            return self.loop.step(self, phase, raw)

    def validate(self) -> None:
        """Run one epoch of every phase in `data` that does not train."""
        with self._running("validate()", trains=False):
            phases = [phase for phase in self.state.data if not isinstance(phase, AbstractTrainingPhase)]
            if not phases:
                raise UsageError("validate() has no data. Pass data=(train_loader, valid_loader) to Learner.")
            for phase in phases:
                self.loop.epoch(self, phase, self.state.data[phase])

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

        Dropped after that, it is gone at once, its model too. One that is dropped without it is gone, files and all,
        when the garbage collector comes.
        """
        self._close(None)

    def _close(self, failure: BaseException | None) -> None:
        """Close, after what was raised in the ``with`` block, if it was."""
        if self.closed:
            return
        self.loop.scopes.refuse_nested("close()")
        self.closed = True
        sinks = self.loop.sinks
        if failure is not None:
            sinks.note(failure)
        with ExitStack() as stack:  # from the last one to the first, and each of them, whatever the others raise
            stack.callback(self._let_go)
            stack.callback(sinks.close)
            stack.enter_context(sinks.noting(trains=False))
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

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close(failure)

    # --- what callbacks touch

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

    # --- checks

    def _ready(self, what: str) -> None:
        self._check_open(what)
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

    def _check_fit_data(self, data: Any, *, by_steps: bool) -> None:
        if not data:
            raise UsageError("fit() has no data. Pass data=(train_loader, valid_loader) to Learner or to fit.")
        training = [repr(phase) for phase in data if isinstance(phase, AbstractTrainingPhase)]
        if by_steps and len(training) != 1:
            raise UsageError(
                f"fit(steps=...) counts the batches of one training phase; the data has "
                f"{', '.join(training) or 'none'}. Use fit(epochs), or data with one."
            )
        self._check_phases(data)
        warn_untrained(data, stacklevel=3)

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
