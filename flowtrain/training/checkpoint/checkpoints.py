"""When a checkpoint is taken, which state of the fit it holds, and how a fit resumes from it.

A checkpoint is taken on the training thread, after the event whose handler requested it, and all events that this event
fired, have ended: then no handler runs. A request within a batch waits for the end of the batch, because a checkpoint
cannot hold half a batch; it can hold an open accumulation group. Deferred work and sinks are flushed, the state is
copied (`flowtrain.training.checkpoint.contents`), and training continues while the copy is written
(`flowtrain.training.checkpoint.files`).

An executor that is `flowtrain.graph.executor.Resumable` flushes its work itself and returns counts, which the
checkpoint holds, so that a resumed fit continues to count from there.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from flowtrain.callback.callback import Callback
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import NO_REQUEST, CheckpointRequest
from flowtrain.core.torch_core import TorchCore
from flowtrain.errors import CheckpointError
from flowtrain.graph.clock import spanning
from flowtrain.graph.executor import Executor, Mailbox, Resumable, Site
from flowtrain.logging.backend import Run
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.encoding import Buffers, Packer, phase_of
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.checkpoint.changes import Changes
from flowtrain.training.checkpoint.contents import (
    apply,
    check_fits,
    check_models,
    finish,
    gather,
    load_callbacks,
    load_models,
    without_callback,
)
from flowtrain.training.checkpoint.files import Writer
from flowtrain.training.checkpoint.form import check_form
from flowtrain.training.checkpoint.parts import Parts
from flowtrain.training.checkpoint.position import Position, Stream, check_data, open_pass, replay, warn_of_workers
from flowtrain.training.checkpoint.reading import read, real_folder
from flowtrain.training.checkpoint.remote import Place, place, real_path
from flowtrain.training.checkpoint.rng import (
    loader_state,
    random_state,
    set_loader_state,
    set_random_state,
    start_workers,
)
from flowtrain.training.checkpoint.shard_files import put_together
from flowtrain.training.failures import Failures
from flowtrain.training.scopes import OPEN, Scopes
from flowtrain.training.sinks import Sinks

__all__ = ["Checkpoints"]


class Checkpoints:
    """Takes and restores the checkpoints of one learner.

    Args:
        state: The state of the learner.
        core: The core of the learner.
        executor: The executor. It is flushed before a checkpoint is taken.
        scopes: The open scopes, and the numbers of epochs and batches.
        sinks: The logging backends, whose positions belong to a checkpoint.
        mailbox: The mailbox of the training thread, which gets the calls that wait for the end of a batch.
        parts: Puts the contents together from all processes that train.

    Attributes:
        changes: The changes that training has made to modules and optimizers, beside their ``state_dict``.
        position: The position of the fit in its epochs and batches.
        writer: The writer of the checkpoint files.
        resumed: The contents of the checkpoint that this fit resumes from, until its first epoch has begun.
        saved: The files of the checkpoints that an interrupt has taken in this fit.
        showing_judged: The callbacks that have put the judged parameters into the models, since the user loaded a
            checkpoint; they put the trained ones back before training.
    """

    def __init__(
        self,
        state: LearnerState,
        core: TorchCore,
        executor: Executor,
        scopes: Scopes,
        sinks: Sinks,
        mailbox: Mailbox,
        parts: Parts,
    ) -> None:
        self.changes = Changes(state, core)
        self.position = Position()
        self.writer = Writer(mailbox)
        self.resumed: Mapping[str, Any] | None = None
        self.saved: list[Place] = []
        self.showing_judged: list[Callback] = []
        self._state, self._core, self._scopes, self._sinks = state, core, scopes, sinks
        self._executor, self._mailbox, self._parts = executor, mailbox, parts
        self._resumable = executor if isinstance(executor, Resumable) else None
        self._buffers = Buffers()
        self._on_interrupt: list[CheckpointRequest] = []  # requests that only an interrupt carries out
        self._waiting: list[CheckpointRequest] = []  # requests that wait for the end of the open batch
        self._again: Mapping[str, Any] | None = None  # the same as `resumed`, until the fit is back at its position
        self._wanted: list[str] = []  # checkpoints whose weights the model gets when the fit has ended

    # --- take

    def take(self, requests: Sequence[CheckpointRequest]) -> None:
        """Take the requested checkpoints now, or, if a batch is open, at the next batch boundary.

        Raises:
            CheckpointError: The state holds an object that a checkpoint cannot, or the previous checkpoint could not
                be written.
            RankError, RemoteError: See `Parts.compare`.
        """
        if self._scopes.batch == OPEN:
            self._waiting += requests
            self._mailbox.put(self.take_waiting)
            return
        self._parts.compare(requests)
        now: list[CheckpointRequest] = []
        for request in requests:
            if request.loads:
                self._wanted.append(request.path)
            elif request is not NO_REQUEST:
                (self._on_interrupt if request.on_interrupt else now).append(request)
        if now:
            self._submit(now)

    def take_waiting(self) -> None:
        """Take the checkpoints that were requested within the last batch; this raises what `take` raises."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self.take(waiting)

    def drop_requests(self) -> None:
        """Forget the requests: after an error within a batch the state belongs to no batch boundary."""
        self._parts.drop(self._waiting)
        self._on_interrupt.clear()
        self._waiting.clear()

    def drop_cancelled(self) -> None:
        """Forget the requests of several ranks in a batch that is cancelled, since not all may have come to them."""
        if self._state.world_size > 1:
            self._waiting.clear()

    def _submit(self, requests: Sequence[CheckpointRequest]) -> None:
        files = ", ".join(place(request.path).name for request in requests)
        with spanning(self.writer.clock, f"checkpoint {files}", "checkpoint"):
            self._begin(requests)

    def _begin(self, requests: Sequence[CheckpointRequest]) -> None:
        """Copy the state for each request, after waiting for the previous write, and begin to write the copies."""
        finite = self._parts.begin(self._is_finite())
        failures, undecided = Failures(), Failures()
        # All requesting callbacks decide before any state is copied, so that every copy holds all their decisions.
        for request in [undecided.attempt(request.decided, finite) or request for request in requests]:
            with failures:  # raised below, after the other checkpoints are taken
                # While a resumed fit is not back at the position of its checkpoint, that checkpoint is saved again:
                # state and generators of the learner are still a mixture of two positions.
                own = partial(self._gather_decided, request.judged, undecided)
                gathered = self._parts.gather(own) if self._again is None else put_together(self._again)
                run = {**gathered["run"], "folder": real_path(place(request.path).parent)}
                self._parts.write(self.writer, {**gathered, "finite": finite, "run": run}, request)
        undecided.drop()  # see `flowtrain.errors.raise_worst`
        failures.raise_worst()

    def _is_finite(self) -> bool:
        """Tell whether the parameters and the last loss are finite."""
        loss = vars(self._state.batch).get("loss")
        return self._core.finite() and (not isinstance(loss, torch.Tensor) or bool(loss.isfinite().all()))

    def interrupted(self) -> None:
        """Take the checkpoints that were requested for the case of an interrupt, and wait until they are written.

        Raises:
            CheckpointError: As for `take`, or one of them could not be written.
        """
        self.take_waiting()
        requests, self._on_interrupt = self._on_interrupt, []
        if requests:
            self.position.undo_begin(self._state.data, self._scopes.batch_number, self._scopes.passes)
            self._submit(requests)
            self.writer.wait()
            self.saved = [place(request.path) for request in requests]

    def end_fit(self) -> None:
        """Forget the fit, and wait until its checkpoints are written.

        Raises:
            CheckpointError: The last checkpoint could not be written.
        """
        self.leave_fit()
        self.writer.wait()

    def leave_fit(self) -> None:
        """Forget the requests and the position of the fit, which is over."""
        self.drop_requests()
        self.release_resumed()
        self._buffers.clear()
        if self.position.stream is not None:
            self.position.stream.close()
        self.position = Position()
        self.saved = []

    def close(self) -> None:
        """Drop the references to models and optimizers, so that a closed learner does not keep them alive."""
        del self.changes

    def _gather_decided(self, judged: bool, undecided: Failures) -> dict[str, Any]:
        if undecided.worst is not None:  # raised only here, where `Parts.gather` tells the other ranks
            raise undecided.worst
        return self._gather(judged)

    def _gather(self, judged: bool) -> dict[str, Any]:
        packer = Packer()
        self.writer.wait()  # memory holds one copy of the state, and the writer may still read it
        self._buffers.begin()
        lanes: Any = None
        if self._resumable is not None:
            lanes = packer.copy(self._resumable.state_dict(), f"the executor {self._executor.name!r}")
        else:
            self._executor.flush()
        # The random state is read after `gather`, because the `state_dict` of a callback may draw numbers.
        return {
            **gather(self._state, self._core, self.changes, Packer([], self._buffers), judged=judged),
            "random": {**random_state(), "own": self._state.draws.state_dict()},
            "loaders": {repr(phase): loader_state(loader) for phase, loader in self._state.data.items()},
            "position": self.position.state_dict(self._scopes.batch_number),
            "numbers": {repr(phase): number for phase, number in self._scopes.numbers.items()},
            "passes": {repr(phase): number for phase, number in self._scopes.passes.items()},
            "run": {"id": self._sinks.run.id, "positions": packer.copy(self._sinks.flush(), "the position of a sink")},
            "lanes": lanes,
        }

    # --- restore

    def load(self, path: Any) -> None:
        """Put the learner into the state of a checkpoint, without the position in the fit that it was taken in.

        Raises:
            CheckpointError: The checkpoint cannot be read, or does not fit the learner, which is not changed.
        """
        contents = self._read(path)
        check_fits(contents, self._state, self._core, self.changes)
        numbers = self._numbers(contents)
        self._executor.flush()  # deferred handlers read series that are about to shrink, and change their callbacks
        with self._trained():
            apply(contents, self._state, self._core, self.changes)
        if "trained" in contents:
            callbacks = [each for each in self._state.callbacks if each.name in contents["callbacks"]]
            self.showing_judged = [callback for callback in callbacks if callback.hold_judged(True)]
            if not self.showing_judged:  # no callback of this learner has the judged parameters, so load them here
                load_models(contents["model"], self._core)
        self._scopes.restore_numbers(*numbers)
        self._parts.note_load(path)

    def load_wanted(self) -> None:
        """Load the weights that were requested for the end of the fit, which has ended and written its checkpoints.

        Raises:
            CheckpointError: A checkpoint cannot be read, or is of another model.
        """
        paths, self._wanted = self._wanted, []
        for path in paths:
            contents = self._read(path)
            check_models(contents, self._core)
            self.show_trained()
            load_models(contents.get("trained", contents["model"]), self._core)
            # Only these callbacks hold weights of the model (averages), which belong to the weights that are loaded.
            # All other callbacks count the fit that has ended, and stay as they are.
            judges = [each for each in self._state.callbacks if type(each).hold_judged is not Callback.hold_judged]
            load_callbacks(contents, judges, of_weights=True)
            if "trained" in contents:
                self.showing_judged = [callback for callback in judges if callback.hold_judged(True)]
                if not self.showing_judged:
                    load_models(contents["model"], self._core)

    def show_trained(self) -> list[Callback]:
        """Put the trained parameters back into the models, if a loaded checkpoint has put the judged ones there.

        Returns:
            The callbacks that had changed the models.
        """
        changed, self.showing_judged = self.showing_judged, []
        for callback in changed:
            callback.hold_judged(False)
        return changed

    @contextmanager
    def _trained(self) -> Generator[None]:
        """Give a context in which the models have the trained parameters; if it fails, the judged ones come back."""
        changed = self.show_trained()
        try:
            yield
        except BaseException:
            self.showing_judged = [callback for callback in changed if callback.hold_judged(True)]
            raise

    def resume(self, path: Any, data: PhaseMap[Any], unit: str, site: Site) -> None:
        """Load a checkpoint as `load` does, and let the next fit begin at the position of the checkpoint.

        Args:
            path: The checkpoint.
            data: The loaders of the next fit.
            unit: The unit that the next fit counts: ``"epochs"`` or ``"steps"``.
            site: The loop, for events that waited in lanes.

        Raises:
            CheckpointError: As for `load`; or the checkpoint was taken in no fit, in one that counts another unit, or
                in an epoch of a phase that `data` lacks.
        """
        contents = self._read(path)
        position = contents["position"]
        check_fits(contents, self._state, self._core, self.changes)
        if not self._parts.same_size(contents):
            contents.pop("ranks", None)
        if position["unit"] != unit:
            where = f"a fit by {position['unit']}" if position["unit"] else "no fit, so no fit can resume from it"
            raise CheckpointError(
                f"The checkpoint was taken in {where}, and this fit counts {unit}. Write "
                f"fit({position['unit'] or unit}=..., resume=path), or learner.load(path) and a new fit."
            )
        check_data(position, data)
        numbers = self._numbers(contents)
        self._warn(contents, data)  # before anything is changed: a filter of the user may make an error of a warning
        run = contents["run"]
        self._executor.flush()  # as in `load`
        with self._trained():
            before = gather(self._state, self._core, self.changes, Packer())
            lanes = None if self._resumable is None else self._resumable.state_dict()
            apply(contents, self._state, self._core, self.changes, before)
            try:
                self._load_lanes(contents["lanes"])
                positions = self._sinks.relocated_positions(run["positions"], run["folder"], run["here"])
                self._sinks.restore(Run(run["id"], resumed=True), positions)
            except BaseException:
                apply(before, self._state, self._core, self.changes)
                self._load_lanes(lanes)
                raise
        self._scopes.restore_numbers(*numbers)
        self._state.draws.load_state_dict(contents["random"].get("own"))  # for deferrable handlers of `FitBegin`
        # If it is saved again, its positions are those of the present sinks, wherever it is saved.
        contents = {**contents, "run": {**run, "positions": positions}}
        self.resumed = self._again = finish(contents, self._core, self._executor, site, self._sinks)

    def _load_lanes(self, lanes: Any) -> None:
        if self._resumable is not None and lanes is not None:
            self._resumable.load_state_dict(lanes)

    def _warn(self, contents: Mapping[str, Any], data: PhaseMap[Any]) -> None:
        """Warn where the learner is not the one that the checkpoint was taken of, and so the fit may differ."""
        if self._state.rank:  # the main rank of several warns
            return
        missing = without_callback(contents, self._state)
        if missing:
            warnings.warn(
                f"The checkpoint has the state of {', '.join(missing)}, and the learner has no callback of that name: "
                f"the fit continues without that state.",
                UserWarning,
                stacklevel=6,
            )
        self.changes.warn_of_others(contents.get("structure"), stacklevel=6)
        warn_of_workers(contents, data)

    def _read(self, path: Any) -> dict[str, Any]:
        """Return the contents of a checkpoint, with its present folder as the entry ``here`` of ``run``."""
        contents = read(path, pieces=True)
        check_form(contents)
        here = real_folder(path)
        run = {"folder": here, **contents["run"], "here": here}  # early checkpoints lack "folder"
        return self._parts.own({**contents, "run": run})

    def _numbers(self, contents: Mapping[str, Any]) -> tuple[dict[Phase, int], dict[Phase, int]]:
        """Return the numbers of epochs and of passes, less the ones that a resumed fit begins and counts again.

        Raises:
            CheckpointError: One of them is of a phase that is not defined.
        """
        phases = {repr(phase): phase for phase in self._state.data}
        numbers = {phase_of(name, phases): number for name, number in contents["numbers"].items()}
        passes = {phase_of(name, phases): number for name, number in contents.get("passes", {}).items()}
        position = contents["position"]
        phase = phases.get(position["phase"])
        # The open epoch is counted already, and its pass too unless a stream spans epochs. The fit counts both again.
        if phase is not None:
            numbers[phase] -= 1
            if phase in passes and position["stream"] is None:
                passes[phase] -= 1
        return numbers, passes

    def begin_fit(self, unit: str) -> Position:
        """Return the position at which a fit begins: the position of the checkpoint that it resumes, or its start."""
        self._wanted.clear()
        self.show_trained()
        self.position = Position(unit) if self.resumed is None else Position.resumed(self.resumed["position"])
        return self.position

    def restore_random(self) -> None:
        """Restore the random number generators from the checkpoint that the fit resumes, after `FitBegin`."""
        if self.resumed is not None:
            position = self.resumed["position"]
            if not position["phase"]:
                self.changes.check_hooks(self.resumed.get("structure"))
            self._set_random(self.resumed)
            if not position["phase"] and position["stream"] is None:  # otherwise it is reached after `EpochBegin`
                self._again = None

    def resume_stream(self, stream: Stream) -> None:
        """Bring the stream of a fit by steps back to its position in the checkpoint that the fit resumes."""
        if self.resumed is not None and self.resumed["position"]["stream"] is not None:
            stream.resume(self.resumed["position"]["stream"], self.resumed["loaders"].get(repr(stream.phase)))
            self._set_random(self.resumed)

    def replay(self, loader: Any, phase: Phase) -> Iterator[Any]:
        """Return the batches that are left of the epoch in which the fit resumes; see `position.replay`."""
        at, reached = self.position, (self.resumed or {"loaders": {}})["loaders"].get(repr(phase))
        return replay(loader, at.begun or {}, at.batches, phase, reached)

    def restore_epoch(self) -> None:
        """Restore the state again after the `EpochBegin` of the resumed epoch, whose handlers have changed it."""
        if self.resumed is not None:
            self._executor.flush()  # deferred handlers of `EpochBegin` change the state too
            apply(self.resumed, self._state, self._core, self.changes)
            self.changes.check_hooks(self.resumed.get("structure"))
            self._set_random(self.resumed)

    def release_resumed(self) -> None:
        """Release the memory of the checkpoint that the fit resumed from: its first epoch has begun."""
        self.resumed = self._again = None

    def _set_random(self, contents: Mapping[str, Any]) -> None:
        for phase, loader in self._state.data.items():
            if repr(phase) in contents["loaders"]:
                state = contents["loaders"][repr(phase)]
                between = open_pass(contents["position"], phase)[0] is None
                if between:  # `replay` does this for an open pass
                    start_workers(loader, state)
                set_loader_state(loader, state, own=between)
        set_random_state(contents["random"])
        self._state.draws.load_state_dict(contents["random"].get("own"))
        self._parts.seed_anew()
