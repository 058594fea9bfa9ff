"""Cuts: when a checkpoint is taken, and what of the fit belongs to it.

A cut is taken on the training thread when the event that asked for it has ended, with all that it fired: no handler
runs then. It waits for the end of the batch, which cannot be left in the middle; an accumulation group can. Lanes are
flushed, sinks are flushed, the state is copied (`flowtrain.training.checkpoint.contents`), and training goes on while
the copy is written (`flowtrain.training.checkpoint.files`).

An executor with a part in checkpoints (`flowtrain.graph.executor.Resumable`) is not flushed, and says itself what is
pending.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from flowtrain.callback.callback import Callback
from flowtrain.callback.view import CheckpointRequest
from flowtrain.core.core import TorchCore
from flowtrain.errors import CheckpointError, raise_worst
from flowtrain.graph.executor import Executor, Mailbox, Resumable
from flowtrain.logging.backend import Run
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.encoding import Stage, phase_of
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.checkpoint.contents import apply, check, gather, load_models, lost
from flowtrain.training.checkpoint.files import Writer, read, real_folder, resolve
from flowtrain.training.checkpoint.position import Position, Stream, check_data, open_pass
from flowtrain.training.checkpoint.rng import (
    keeps_workers,
    loader_state,
    random_state,
    set_loader_state,
    set_random_state,
    start_workers,
)
from flowtrain.training.scopes import OPEN, Scopes
from flowtrain.training.sinks import Sinks

__all__ = ["Cuts"]


class Cuts:
    """The checkpoints of one learner.

    Attributes:
        position: Where the fit is.
        writer: What writes them.
        resumed: The checkpoint that this fit goes on from, until it has.
        held: The callbacks that let the models show what was judged, since a checkpoint was loaded.
    """

    def __init__(
        self,
        state: LearnerState,
        core: TorchCore,
        executor: Executor,
        scopes: Scopes,
        sinks: Sinks,
        mailbox: Mailbox,
    ) -> None:
        self.position = Position()
        self.writer = Writer(mailbox)
        self.resumed: Mapping[str, Any] | None = None
        self.held: list[Callback] = []
        self._state, self._core, self._scopes, self._sinks = state, core, scopes, sinks
        self._executor = executor
        self._resumable = executor if isinstance(executor, Resumable) else None
        self._mailbox = mailbox
        self._standing: list[CheckpointRequest] = []
        self._waiting: list[CheckpointRequest] = []

    # --- taking

    def take(self, requests: Sequence[CheckpointRequest]) -> None:
        """Take checkpoints now, or, if a batch is open, at the next batch boundary.

        Raises:
            CheckpointError: Something cannot be in a checkpoint, or the one before could not be written.
        """
        self._standing += [request for request in requests if request.on_interrupt]
        now = [request for request in requests if not request.on_interrupt]
        if now and self._scopes.batch == OPEN:
            self._waiting += now
            self._mailbox.put(self.take_waiting)
        elif now:
            self._submit(now)

    def take_waiting(self) -> None:
        """Take the checkpoints that were asked for within the last batch.

        Raises:
            CheckpointError: As for `take`.
        """
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self._submit(waiting)

    def drop(self) -> None:
        """Forget what was asked for: an error has left the state between two batches."""
        self._standing.clear()
        self._waiting.clear()

    def _submit(self, requests: Sequence[CheckpointRequest]) -> None:
        loss = vars(self._state.batch).get("loss")
        finite = self._core.finite() and (not isinstance(loss, torch.Tensor) or bool(loss.isfinite().all()))
        # All callbacks that asked decide before the state of any is copied: each checkpoint holds what all know of it.
        decided = [_decide(request, finite) for request in requests]
        failures: list[BaseException] = []
        for request in decided:
            try:
                # Until the fit has got back to where its checkpoint was taken, an interrupt leaves that one once more.
                again = self.resumed if request.on_interrupt else None
                gathered = self._gather(request.judged) if again is None else again
                contents: dict[str, Any] = {**gathered, "finite": finite}
                contents["run"] = {**contents["run"], "folder": real_folder(request.path)}
                self.writer.submit(contents, request)
            except CheckpointError as failure:  # raised when the others are taken
                failures.append(failure)
        if failures:
            raise_worst(failures)

    def interrupted(self) -> None:
        """Take the checkpoints that were asked for in case of an interrupt, and wait until they are written."""
        self.take_waiting()
        standing, self._standing = self._standing, []
        if standing:
            self._submit(standing)
            self.writer.wait()

    def end_fit(self) -> None:
        """Wait until what was taken is written.

        Raises:
            CheckpointError: It could not be.
        """
        self.leave_fit()
        self.writer.wait()

    def leave_fit(self) -> None:
        """Be in no fit any more."""
        self.drop()
        self.resumed = None
        self.position = Position()

    def _gather(self, judged: bool) -> dict[str, Any]:
        stage = Stage()
        lanes: Any = None
        if self._resumable is not None:
            lanes = stage.copy(self._resumable.state_dict(), f"the executor {self._executor.name!r}")
        else:
            self._executor.flush()
        return {
            **gather(self._state, self._core, judged=judged),
            "random": {**random_state(), "own": self._state.draws.state_dict()},
            "loaders": {repr(phase): loader_state(loader) for phase, loader in self._state.data.items()},
            "position": self.position.state_dict(self._scopes.batch_number),
            "numbers": {repr(phase): number for phase, number in self._scopes.numbers.items()},
            "passes": {repr(phase): number for phase, number in self._scopes.passes.items()},
            "run": {"id": self._sinks.run.id, "positions": stage.copy(self._sinks.flush(), "the position of a sink")},
            "lanes": lanes,
        }

    # --- putting back

    def load(self, path: Any) -> None:
        """Put the learner into the state of a checkpoint; where it was in its fit is left out.

        Raises:
            CheckpointError: The checkpoint cannot be read, or does not fit; nothing has been changed.
        """
        contents = self._read(path)
        check(contents, self._state, self._core)
        self._executor.flush()  # what is pending reads series that are about to be taken back, and changes callbacks
        with self._released():
            self._apply(contents)
        if "trained" in contents:
            callbacks = [each for each in self._state.callbacks if each.name in contents["callbacks"]]
            self.held = [callback for callback in callbacks if callback.hold_judged(True)]
            if not self.held:  # nobody has what is trained beside it
                load_models(contents["model"], self._core)
        self._set_numbers(contents)

    def release(self) -> list[Callback]:
        """Let the models have what is trained, after a checkpoint was loaded that shows what was judged.

        Returns:
            The callbacks that had changed the models.
        """
        released, self.held = self.held, []
        for callback in released:
            callback.hold_judged(False)
        return released

    @contextmanager
    def _released(self) -> Generator[None]:
        """Give a context in which the models have what is trained; if it fails, they show again what was judged."""
        released = self.release()
        try:
            yield
        except BaseException:
            self.held = [callback for callback in released if callback.hold_judged(True)]
            raise

    def resume(self, path: Any, data: PhaseMap[Any], unit: str) -> None:
        """Go on from a checkpoint: as `load`, and the next fit begins where the checkpoint was taken.

        Args:
            path: The checkpoint.
            data: The loaders of that fit.
            unit: ``"epochs"`` or ``"steps"``, what it counts.

        Raises:
            CheckpointError: As for `load`, or the fit it was taken in counts something else, or has other phases.
        """
        contents = self._read(path)
        position = contents["position"]
        check(contents, self._state, self._core)
        if position["unit"] != unit:
            where = f"a fit by {position['unit']}" if position["unit"] else "no fit, so no fit can go on from it"
            raise CheckpointError(
                f"The checkpoint was taken in {where}, and this fit counts {unit}. Write "
                f"fit({position['unit'] or unit}=..., resume=path), or learner.load(path) and a fit of its own."
            )
        check_data(position, data)
        run = contents["run"]
        self._executor.flush()  # as in `load`
        with self._released():
            before = gather(self._state, self._core, here=True)
            self._apply(contents)
            try:
                if self._resumable is not None and contents["lanes"] is not None:
                    self._resumable.load_state_dict(contents["lanes"])
                positions = self._sinks.moved(run["positions"], run["folder"], run["here"])
                self._sinks.restore(Run(run["id"], resumed=True), positions)
            except BaseException:
                apply(before, self._state, self._core)
                raise
        missing = lost(contents, self._state)
        if missing:
            warnings.warn(
                f"The checkpoint has the state of {', '.join(missing)}, and the learner has no callback of that name: "
                f"the fit goes on without.",
                UserWarning,
                stacklevel=3,
            )
        otherwise = self._core.structure.built_otherwise(contents.get("structure"))
        if otherwise:
            more = f", and {len(otherwise) - 3} more" if len(otherwise) > 3 else ""
            warnings.warn(
                f"The learner of the checkpoint began otherwise: {', '.join(otherwise[:3])}{more}. The fit goes on as "
                f"this learner is. Build it as the other was if the fit is to be the same.",
                UserWarning,
                stacklevel=3,
            )
        self._warn_of_workers(contents, data)
        self._set_numbers(contents)
        self._set_draws(contents)  # for handlers of `FitBegin`
        self.resumed = contents

    def _warn_of_workers(self, contents: Mapping[str, Any], data: PhaseMap[Any]) -> None:
        found: list[str] = []
        for phase, loader in data.items():
            begun, _ = open_pass(contents["position"], phase)
            state = begun["loader"] if begun is not None else contents["loaders"].get(repr(phase), {})
            if state.get("workers") and keeps_workers(loader):
                found.append(repr(phase))
        if found:
            warnings.warn(
                f"The loader for {' and '.join(found)} keeps its workers from one pass to the next "
                f"(persistent_workers=True), and no checkpoint holds the states of their random numbers: what the "
                f"workers draw from here on (an augmentation) is not what they would have drawn without the "
                f"interruption. If they draw nothing, all is exact. Otherwise write persistent_workers=False.",
                UserWarning,
                stacklevel=4,
            )

    def _read(self, path: Any) -> dict[str, Any]:
        """Return what is in a checkpoint, with the folder that it lies in as ``here`` of the run."""
        contents, here = read(path), real_folder(resolve(path))
        return {**contents, "run": {"folder": here, **contents["run"], "here": here}}  # the oldest have no folder

    def _apply(self, contents: Mapping[str, Any]) -> None:
        apply(contents, self._state, self._core)
        for callback in self._state.callbacks:
            if callback.name in contents["callbacks"]:
                callback.moved(contents["run"]["folder"], contents["run"]["here"])

    def _set_numbers(self, contents: Mapping[str, Any]) -> None:
        phases = {repr(phase): phase for phase in self._state.data}
        numbers = {phase_of(name, phases): number for name, number in contents["numbers"].items()}
        passes = {phase_of(name, phases): number for name, number in contents.get("passes", {}).items()}
        position = contents["position"]
        phase = phases.get(position["phase"])
        if phase is not None:  # that epoch begins once more, and with it the pass, unless epochs share passes
            numbers[phase] -= 1
            if phase in passes and position["stream"] is None:
                passes[phase] -= 1
        self._scopes.restore_numbers(numbers, passes)

    def begin_fit(self, unit: str) -> Position:
        """Return the position that the fit begins at: that of the checkpoint, or none of its epochs done."""
        self.release()
        self.position = Position(unit) if self.resumed is None else Position.resumed(self.resumed["position"])
        return self.position

    def restore_random(self) -> None:
        """Put the random numbers back to those of the checkpoint that the fit goes on from; `FitBegin` was fired."""
        if self.resumed is not None:
            if not self.resumed["position"]["phase"]:
                self._check_hooks(self.resumed)
            self._set_random(self.resumed)

    def resume_stream(self, stream: Stream) -> None:
        """Bring the loader of a fit by steps to where it was."""
        if self.resumed is not None and self.resumed["position"]["stream"] is not None:
            stream.resume(self.resumed["position"]["stream"])
            self._set_random(self.resumed)

    def reenter(self) -> None:
        """Put everything back once more, after the `EpochBegin` of an epoch that had begun already."""
        if self.resumed is not None:
            self._apply(self.resumed)
            self._check_hooks(self.resumed)
            self._set_random(self.resumed)

    def _check_hooks(self, contents: Mapping[str, Any]) -> None:
        missing = self._core.structure.missing_hooks(contents.get("structure"))
        if missing:
            raise CheckpointError(
                f"The checkpoint was taken with other hooks: {'; '.join(missing[:3])} in training, and not in this "
                f"fit. A checkpoint holds no hooks. Add and remove them before fit, in setup, or at FitBegin, which is "
                f"fired when a fit goes on as well."
            )

    def let_go(self) -> None:
        """Hold the checkpoint no longer that the fit went on from: its first epoch has begun."""
        self.resumed = None

    def _set_random(self, contents: Mapping[str, Any]) -> None:
        for phase, loader in self._state.data.items():
            if repr(phase) in contents["loaders"]:
                state = contents["loaders"][repr(phase)]
                if open_pass(contents["position"], phase)[0] is None:  # otherwise they start as that pass began
                    start_workers(loader, state)
                set_loader_state(loader, state)
        set_random_state(contents["random"])
        self._set_draws(contents)

    def _set_draws(self, contents: Mapping[str, Any]) -> None:
        """Let deferrable callbacks go on with their own random numbers; older checkpoints say nothing of them."""
        if "own" in contents["random"]:
            self._state.draws.load_state_dict(contents["random"]["own"])


def _decide(request: CheckpointRequest, finite: bool) -> CheckpointRequest:
    best, remove = request.best and finite, request.remove if finite else ()
    if request.decide is not None:
        best, unwanted = request.decide(finite)
        remove = tuple(unwanted)
    return replace(request, best=best, remove=remove)
