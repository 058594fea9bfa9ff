"""The calls that run something: `fit`, `epoch`, `step`, `validate`, `evaluate` and `predict` of a learner.

Each call checks its arguments and the moment of the call, chooses the data, opens the logging backends, and lets the
loop run. `predict` runs no phase: it only calls the model, and leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from os import PathLike
from typing import Any

import torch

from flowtrain.callback.events import EpochBegin
from flowtrain.callback.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase, ValidationPhase
from flowtrain.data.nested import INSIDE, PLAIN, leaves, mapped
from flowtrain.errors import CheckpointError, DataError, ExecutorError, UsageError, text_of
from flowtrain.errors.describing import describe
from flowtrain.graph.executor import Deferring
from flowtrain.graph.registry import Callbacks
from flowtrain.state.batch import BatchState
from flowtrain.state.by_phase import PhaseMap, adopt
from flowtrain.state.learner_state import Named
from flowtrain.training.arguments import check_counts, check_path, check_phase
from flowtrain.training.callback_changes import CallbackChanges
from flowtrain.training.checkpoint.folder_lock import Folders
from flowtrain.training.checkpoint.rng import restoring_loader
from flowtrain.training.failures import Failures
from flowtrain.training.fit_data import check_fit_data, check_gave, check_loader, limited, loaders_by_phase, same_name
from flowtrain.training.interrupts import Interrupts
from flowtrain.training.loop import Loop

__all__ = ["Calls", "without_frames"]


class Calls:
    """The calls of one learner that run something.

    Args:
        loop: The loop, which runs fits, epochs and batches.
        changes: The object that knows whether the learner is closed.

    Attributes:
        stopped: The exception that ended the last fit early, or ``None``; see `Learner.stopped`.
    """

    def __init__(self, loop: Loop, changes: CallbackChanges) -> None:
        self.stopped: BaseException | None = None
        self._loop, self._changes = loop, changes
        self._phases: dict[str, Phase] = {}  # the phases that the learner has run, by name
        self._folders = Folders(loop.dispatch.mailbox.put)

    # --- calls that train

    @contextmanager
    def holding(self, *, waits: bool) -> Generator[None]:
        """Give a context in which the folders of checkpoints belong to this learner, for a fit.

        They belong to it after the fit too, as long as deferred events of it wait, which may still be written to logs.

        Args:
            waits: Whether to wait for a process that owns a folder and may be ending.

        Raises:
            CheckpointError: Another process, or another learner, trains into one of them. Nothing has been changed.
        """
        self.ready("fit()")
        loop, failure = self._loop, None
        folders = [folder for each in loop.state.callbacks for folder in each.own_folders()]
        if folders:
            if loop.core.world is None or loop.core.world.main:
                try:
                    self._folders.hold(folders, waits)
                except BaseException as raised:  # the other ranks must not wait for this one
                    failure = raised
            refused = loop.together.agree("" if failure is None else text_of(failure))
            if failure is not None:
                raise failure
            if refused:
                raise CheckpointError(f"rank 0: {refused}")
        try:
            yield
        finally:
            if isinstance(loop.executor, Deferring) and loop.executor.pending:
                self._folders.idle()
            else:
                self._folders.release()

    def fit(
        self,
        epochs: int | None,
        steps: int | None,
        validate_every: int | None,
        limit_batches: float | Mapping[Any, float] | None,
        data: Any,
        resume: str | PathLike[str] | None,
        timed: AbstractContextManager[None],
    ) -> None:
        """Check the arguments of `Learner.fit`, and run the fit in the context `timed`."""
        # A fit that resumes opens the backends itself, at the positions in the checkpoint.
        with self._running("fit()", opens=resume is None):
            epochs, steps, validate_every = check_counts(epochs, steps, validate_every)
            if resume is not None:
                check_path(resume, "fit(resume=", "Leave it out for a fit that begins anew.")
            given = self._loop.state.data if data is None else loaders_by_phase(data)
            chosen = limited(self._loop.together.divide(given), limit_batches)
            self.check_phases(chosen)
            check_fit_data(chosen, by_steps=steps is not None, stacklevel=None if self._loop.state.rank else 3)
            self.stopped = None
            with self._using(chosen):
                try:
                    if resume is not None:
                        self._loop.resume(resume, chosen, "epochs" if steps is None else "steps")
                    with timed:
                        self.stopped = self._loop.fit(chosen, epochs, steps, validate_every)
                except BaseException as failure:
                    Interrupts.short(failure)
                    self.stopped = failure
                    raise

    def epoch(self, phase: Phase, data: Any) -> None:
        """Run an epoch of a phase for `Learner.epoch`."""
        with self._running("epoch()", trains=isinstance(phase, AbstractTrainingPhase)):
            self._epoch(phase, data, f"learner.epoch({phase!r}(), loader)")

    def step(self, phase: Phase, raw: Any) -> BatchState:
        """Run one batch of a phase for `Learner.step`, and return its state."""
        with self._running("step()", trains=isinstance(phase, AbstractTrainingPhase)):
            self.check_phases([phase])
            return self._loop.step(phase, raw)

    def _epoch(self, phase: Phase, data: Any, call: str) -> None:
        """Run an epoch over `data`, or over the phase's own loader for ``None``; `call` is the remedy without both."""
        self.check_phases([phase])
        known = self._loop.state.data
        if data is None and phase not in known:
            raise UsageError(f"There is no data for {phase!r}. Pass it: {call}.")
        chosen = self._loop.together.divide(known if data is None else loaders_by_phase({**known, phase: data}))
        with self._using(chosen):
            self._loop.epoch(phase, chosen[phase])

    # --- calls that evaluate

    def validate(self) -> Mapping[Any, Any]:
        """Evaluate all phases that do not train for `Learner.validate`, and return their values."""
        with self._running("validate()", trains=False):
            phases = [phase for phase in self._loop.state.data if not isinstance(phase, AbstractTrainingPhase)]
            if not phases:
                known = ", ".join(map(repr, self._loop.state.data)) or "none at all"
                raise UsageError(
                    f"validate() has no data of a phase that does not train; the learner has {known}. Pass "
                    f"data=(train_loader, valid_loader) to Learner."
                )
            measured: PhaseMap[dict[str, float]] = PhaseMap("validate()")
            for phase in phases:
                measured[phase] = self._measured(phase, None)
        return measured if len(phases) > 1 else measured[phases[0]]

    def evaluate(self, data: Any, phase: Phase) -> dict[str, float]:
        """Evaluate one phase for `Learner.evaluate`, and return its values by name."""
        with self._running("evaluate()", trains=False):
            return self._measured(self._evaluating(phase, "evaluate"), data)

    def _measured(self, phase: Phase, data: Any) -> dict[str, float]:
        """Run an epoch of a phase, and return the values that were recorded for it, by name."""
        # An epoch may record nothing under a name. Then the value of an earlier epoch must not pass for its own.
        before = {name: len(series) for name, series in self._recorded(phase).items()}
        self._epoch(phase, data, "learner.evaluate(loader)")
        new = {name: series for name, series in self._recorded(phase).items() if len(series) > before.get(name, 0)}
        return {name: float(series.last()[1]) for name, series in new.items()}

    def _recorded(self, phase: Phase) -> Mapping[str, Any]:
        """Return the series of the epochs of a phase by name; none if no callback records values of epochs."""
        cbstate = self._loop.state.cbstate
        recorded: Mapping[str, Any] = cbstate.metrics_epoch.get(phase, {}) if "metrics_epoch" in cbstate else {}
        return recorded

    def _evaluating(self, phase: Phase, call: str) -> Phase:
        """Return the phase that evaluates; for `ValidationPhase` without data, the only phase that the data has.

        Raises:
            UsageError: The phase trains.
        """
        if isinstance(phase, AbstractTrainingPhase):
            raise UsageError(
                f"{call}() takes a phase that evaluates, got {phase!r}, which trains. Write "
                f"learner.{call}(loader, ValidationPhase)."
            )
        known = [each for each in self._loop.state.data if isinstance(each, AbstractValidationPhase)]
        return known[0] if type(phase) is ValidationPhase and len(known) == 1 else phase

    # --- a call that only runs the model

    def predict(self, loader: Any, phase: Phase) -> Any:
        """Run the model on all batches for `Learner.predict`, and return its outputs."""
        self.ready("predict()")
        loop, phase = self._loop, self._evaluating(phase, "predict")
        if isinstance(loop.state.model, Named):
            raise UsageError(
                f"predict() runs one model, and the learner has {', '.join(loop.state.model)}. Call the one that you "
                f"mean under torch.no_grad(): learner.model.{next(iter(loop.state.model))}.eval()(inputs)."
            )
        check_loader(loader, phase, "learner.predict(loader)")
        if isinstance(loader, tuple) and all(isinstance(each, torch.Tensor) for each in loader):
            raise DataError(
                f"predict() takes a loader of batches, and got {describe(loader)}, which may be one batch or several. "
                f"Write learner.predict([inputs]) for one batch of inputs, or learner.predict([*batches])."
            )
        # A loader draws from the generators even if it does not shuffle, and may keep its own position.
        with restoring_loader(loader):
            outputs = self._outputs(phase, (_inputs(phase, raw) for raw in loader))
        check_gave(len(outputs), phase, loader)
        return _joined(outputs)

    def _outputs(self, phase: Phase, inputs: Iterable[Any]) -> list[Any]:
        """Return copies on the CPU of the outputs of the model for each of these inputs, in the mode of a phase.

        No event is fired, and no batch is opened.
        """
        loop, core, found = self._loop, self._loop.core, list[Any]()
        own = phase if isinstance(phase, AbstractValidationPhase) else None
        loop.scopes.begin_call()  # so that the model cannot start training
        try:
            with loop.mode(phase), loop.together.predicting(phase, inputs) as given:
                for each in given:
                    placed = core.place(each) if core.places else each
                    try:
                        outputs = core.model(placed) if own is None else own.call_model(core.model, placed)
                    except (TypeError, ValueError, RuntimeError) as error:
                        error.add_note(f"raised by the model in predict(), called with {describe(placed)}")
                        raise
                    found.append(mapped(outputs, _to_cpu))
        finally:
            loop.scopes.close_step()
        return found

    # --- the end, and checks

    def close(self, failure: BaseException | None, let_go: Callable[[], None]) -> None:
        """Close the executor and the logging backends; see `Learner.close`.

        Args:
            failure: The exception that has left the ``with`` block of the learner, if any. If it is the worst of all
                failures, the block raises it, and this method raises none.
            let_go: Called last, whatever was raised before.

        Raises:
            Exception: The worst failure: of a deferred callback, a checkpoint or a logging backend.
        """
        if self._changes.closed:
            return
        loop = self._loop
        loop.scopes.refuse_nested("close()")
        self._changes.close()
        failures = Failures() if failure is None else Failures(failure)
        failures.attempt(loop.executor.close)
        failures.attempt(loop.checkpoints.writer.wait)
        if (worst := failures.worst) is not None:  # the backends are told how the run ended
            loop.sinks.note_failure(worst)
        failures.attempt(loop.sinks.close)
        failures.attempt(self._folders.release)
        failures.attempt(let_go)
        del worst  # see `raise_worst`
        if failure is not None and failures.worst is failure:
            failures.drop()
        failures.raise_worst()

    def ready(self, call: str) -> None:
        """Refuse a call on a closed learner, and one from within a handler or a step."""
        if self._changes.closed:
            raise ExecutorError(f"{call} on a closed learner: its executor has given back all it held. Make a new one.")
        self._loop.scopes.refuse_nested(call)

    def check_phases(self, phases: Iterable[Phase]) -> None:
        """Check that the learner can run an epoch of each phase: its name, its models, and the plans of its events.

        Raises:
            FlowtrainError: It cannot.
        """
        loop = self._loop
        callbacks: Callbacks = loop.state.callbacks
        for phase in phases:
            known = self._phases.get(repr(phase), phase)
            if known is not phase and _place(known) != _place(phase):
                raise same_name("The learner has run or would run", known, phase)
            self._phases[repr(phase)] = phase
            loop.state.adopt(phase)
            adopt(phase, loop.scopes.numbers)
            adopt(phase, loop.scopes.passes)
            check_phase(phase, loop.state.model, loop.core.modules)
            if callbacks:
                callbacks.plan(EpochBegin, type(phase))  # checks a phase that is met for the first time

    @contextmanager
    def _running(self, call: str, *, opens: bool = True, trains: bool = True) -> Generator[None]:
        """Open the logging backends for the calls in this context, and tell them how these end."""
        self.ready(call)
        with self._loop.sinks.noting_outcome(trains=trains):
            if opens:
                self._loop.checkpoints.changes.begin()
                self._loop.sinks.open()
            yield

    @contextmanager
    def _using(self, data: PhaseMap[Any]) -> Generator[None]:
        """Give a context in which handlers see these loaders."""
        state = self._loop.state
        before, state.data = state.data, data
        try:
            yield
        finally:
            state.data = before


def without_frames(failure: BaseException) -> BaseException:
    """Return a copy of an exception without its traceback, whose frames may hold a batch or a model.

    The copy has the same type, arguments and notes. If its type cannot be made again, or has another text then, the
    copy is a `RuntimeError` with the name of the type and the text. The exception itself is not changed, since code
    that caught it may still print its traceback.
    """
    others = tuple(without_frames(other) for other in getattr(failure, "others", ()))
    bare: BaseException = RuntimeError(text_of(failure))
    with suppress(Exception):  # the class of a user, or one written in C, may take other arguments, or none at all
        same = type(failure).__new__(type(failure), *failure.args)
        vars(same).update(vars(failure))
        bare = same if text_of(same) == text_of(failure) else bare
    vars(bare).update(vars(failure), **({"others": others} if others else {}))
    return bare


def _place(phase: Phase) -> tuple[str, str]:
    """Return the module and the name of a phase's class. A cell of a notebook that runs again makes another class."""
    return type(phase).__module__, type(phase).__qualname__


def _inputs(phase: Phase, raw: Any) -> Any:
    """Return the inputs in one item of a loader, with targets or without; see `Learner.predict`.

    Raises:
        DataError: The item is a tuple or list of more than two parts, and the phase does not say what they are.
    """
    if isinstance(phase, AbstractValidationPhase) and type(phase).split is not AbstractValidationPhase.split:
        try:
            return phase.split(raw)[0]
        except Exception as error:
            error.add_note(
                f"raised by {phase!r}.split, called by predict() with {describe(raw)}. For data without targets pass "
                f"a phase whose split takes it: learner.predict(loader, OtherPhase)"
            )
            raise
    unpack = isinstance(phase, AbstractValidationPhase) and phase.unpack
    if unpack and isinstance(raw, Mapping):  # a model that gets no labels computes no loss, which is no output
        return {name: each for name, each in raw.items() if name != "labels"}
    if not isinstance(raw, (tuple, list)):
        return raw
    parts = len(raw)
    if unpack and parts > 2:
        return tuple(raw[:-1])
    if not 1 <= parts <= 2:
        raise DataError(
            f"predict() takes (inputs, targets) or inputs from its loader, and got {describe(raw)}. Say in a phase "
            f"which part the model gets: class MyPhase(ValidationPhase) with a split(raw) that returns "
            f"(inputs, targets), and learner.predict(loader, MyPhase)."
        )
    return raw[0]


def _to_cpu(item: Any, part: object) -> Any:
    """Return a copy of a tensor, as the model or the loader may use its memory again; see `mapped` for the rest."""
    return item.detach().to("cpu", copy=True) if isinstance(item, torch.Tensor) else INSIDE


def _joined(batches: Sequence[Any]) -> Any:
    """Return the outputs of all batches as one value: tensors are concatenated, and containers keep their type.

    Raises:
        DataError: The outputs of two batches differ by more than their first dimension, or a part is no tensor and not
            the same in all batches.
    """
    # Paths, and not positions, tell which parts belong together: the keys of a dictionary may come in another order.
    columns = [dict(leaves(each, "outputs")) for each in batches]
    other = next((number for number, column in enumerate(columns, 1) if column.keys() != columns[0].keys()), None)
    if other is not None:
        raise _not_joined(f"{', '.join(columns[0])} in the first batch, and {', '.join(columns[other - 1])}", other)
    # One object may be in several places of the outputs; its concatenation is then in all of them.
    made = {id(part): _concatenated([column[path] for column in columns], path) for path, part in columns[0].items()}
    return mapped(batches[0], lambda item, part: made.get(id(item), INSIDE))


def _concatenated(parts: Sequence[Any], path: str) -> Any:
    first = parts[0]
    tensors = [each for each in parts if isinstance(each, torch.Tensor)]
    if not tensors:
        if type(first) not in PLAIN or any(each != first for each in parts):
            raise _not_joined(f"{path} is {describe(first)}, which is no tensor")
        return first
    for number, each in enumerate(parts, 1):
        if not isinstance(each, torch.Tensor) or each.shape[1:] != tensors[0].shape[1:]:
            raise _not_joined(f"{path} is {describe(first)} in the first batch, and {describe(each)}", number)
        if not each.ndim:
            raise _not_joined(f"{path} is one number for each batch, without a dimension of samples")
    return torch.cat(tensors)


def _not_joined(what: str, batch: int | None = None) -> DataError:
    where = "" if batch is None else f" in batch {batch}"
    return DataError(
        f"predict() cannot concatenate the outputs of the batches: {what}{where}. Take the outputs of each batch: "
        f"[learner.predict([batch]) for batch in loader]."
    )
