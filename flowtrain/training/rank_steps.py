"""Batches on several ranks: each training batch has one sync point, at which all ranks decide together.

A bundled phase trains through DDP, and the flags of the sync point travel with the gradients, in the backward pass. The
step of a user's phase averages the gradients before each update, after a message with the flags, and has a further sync
point at the end of its batch. What is raised before a sync point is told there, so that a batch is cancelled on all
ranks or on none; `flowtrain.training.ranks` describes the rest.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from flowtrain.callback.access import Write
from flowtrain.callback.callback import Callback
from flowtrain.callback.events import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Event,
    LossBegin,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.callback.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase, has_bundled_step
from flowtrain.core.data_parallel import DataParallel
from flowtrain.core.sharding import Sharded
from flowtrain.core.torch_core import TorchCore
from flowtrain.errors import CancelBatchException, CancelException, CoreError, RankError, RemoteError, is_a, merge
from flowtrain.graph.registry import Callbacks
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.checkpoint.rank_checkpoints import RankCheckpoints
from flowtrain.training.dispatch import Dispatch
from flowtrain.training.ranks import Ranks
from flowtrain.training.scopes import CLOSED, ENDING, OPEN, Scopes
from flowtrain.training.step import Steps, check_graph

__all__ = ["RankSteps"]

_BATCH_END, _BACKWARD_BEGIN, _BACKWARD_END = BatchEnd(), BackwardBegin(), BackwardEnd()


class RankSteps(Steps):
    """Runs batches on one of several ranks. The arguments are those of `Steps`.

    Args:
        ranks: The sync points.
        parallel: The models of this rank.
    """

    _checkpoints: RankCheckpoints

    def __init__(
        self,
        state: LearnerState,
        core: TorchCore,
        scopes: Scopes,
        dispatch: Dispatch,
        checkpoints: RankCheckpoints,
        ranks: Ranks,
        parallel: DataParallel,
    ) -> None:
        super().__init__(state, core, scopes, dispatch, checkpoints)
        self._ranks, self._parallel = ranks, parallel
        self._counted = False  # whether the accumulation group has counted the present batch
        self._asked: dict[tuple[Callbacks, Phase, bool], bool] = {}  # what `_decides` has returned, by its arguments
        self._writes = False
        self._looked_at: Callbacks | None = None  # the callbacks of the last call of `_changes_training`
        if isinstance(parallel, Sharded):
            parallel.agree = self._agree_within

    # --- the bundled step

    def train(self, phase: AbstractTrainingPhase, raw: Any) -> None:
        """See `StepContext.train`."""
        on, core, scopes, ranks = self._runners[phase], self._core, self._scopes, self._ranks
        wrapped = self.wraps(phase)
        ranks.begin_batch("gradients" if wrapped else "flags")
        self._dispatch.met.clear()
        if wrapped:
            if self._changes_training():
                self._parallel.prepare()
            self._parallel.send(core.groups.fills)
            if not self._parallel.meets:
                ranks.next_sync = "flags" if self._decides(phase, in_group=True) else ""
        self._counted = False
        batch = self._open(phase, on, raw, self._parallel.model if wrapped else core.model, True)
        scopes.backward = True
        if on.backward_begin is not None:
            on.backward_begin(_BACKWARD_BEGIN, phase)
        try:
            if wrapped:
                sums = core.backward_on_ranks(batch.loss, ranks.flags())
                if self._parallel.meets:
                    ranks.join(sums, None)
                    ranks.next_sync = "flags" if self._decides(phase, in_group=not self._parallel.sends) else ""
            else:
                core.backward(batch.loss)
        except RuntimeError as error:
            check_graph(phase, "batch.loss", batch.loss, error)
            raise
        if on.watched:
            batch.loss = batch.loss.detach()
        batch.grads = core.grads
        if on.backward_end is not None:
            on.backward_end(_BACKWARD_END, phase)
        if ranks.next_sync and self._in_group(phase):
            self.agree()
        self.update(phase)
        if not wrapped:
            self.agree()
        scopes.batch = ENDING
        if on.batch_end is not None:
            on.batch_end(_BATCH_END, phase)
        scopes.batch = CLOSED
        scopes.completed = batch

    def _changes_training(self) -> bool:
        """Tell whether a callback may change which parameters are trained: it writes the model or the parameters."""
        callbacks: Callbacks = self._state.callbacks
        if callbacks is not self._looked_at:
            self._looked_at = callbacks
            self._writes = any(
                isinstance(kind, Write) and path[0] in ("model", "params")
                for node in callbacks.nodes
                for path, kind in node.union
            )
        return self._writes

    def wraps(self, phase: Phase) -> bool:
        """Tell whether the batches of a phase run through DDP or shards: those of a phase with the bundled step do."""
        return self._parallel.wraps and has_bundled_step(type(phase), AbstractTrainingPhase)

    def check_step(self, phase: Phase) -> None:
        """Check that a phase has the bundled step if the model is sharded.

        Raises:
            CoreError: It has a step of its own.
        """
        if self._parallel.together and not has_bundled_step(type(phase)):
            raise CoreError(
                f"{phase!r} has a step of its own, in which a rank that fails could not tell the others, since each "
                f"use of a sharded model needs all of them. Use the bundled step (split, call_model and callbacks "
                f"change what it does), or TorchCore(parallel='ddp')."
            )

    # --- any step

    @contextmanager
    def run_batch(self, phase: Phase, **state: Any) -> Generator[BatchState]:
        """See `StepContext.run_batch`."""
        if isinstance(phase, AbstractValidationPhase):
            with super().run_batch(phase, **state) as batch:
                yield batch
            return
        self._ranks.begin_batch("flags")
        with super().run_batch(phase, **state) as batch:
            yield batch
            self.agree()

    def update(self, phase: Phase, name: str | None = None) -> None:
        """See `StepContext.update`."""
        self._counted = True
        super().update(phase, name)

    def update_due(self, phase: Phase, names: list[str], begin: UpdateBegin, end: UpdateEnd) -> None:
        """See `Steps.update_due`. Gradients that DDP has not sent are averaged first."""
        on, core = self._runners[phase], self._core
        sync = self._ranks.next_sync
        if not (self.wraps(phase) and begin.in_batch):
            self.agree()
            core.average(names)
            self._ranks.next_sync = sync
        core.unscale(names)
        failure: BaseException | None = None
        try:
            if on.update_begin is not None:
                on.update_begin(begin, phase)
        except BaseException as raised:
            if not self._decides(phase):
                raise
            failure = raised
        if self._decides(phase):  # whether the update is made, before any rank makes it
            self.agree(failure)
            self._ranks.next_sync = sync if not self.wraps(phase) else ""
        norm = core.clip(names)
        if norm is not None:
            self._state.batch.grad_norm = norm
        core.step(names)
        self._state.updates += 1
        if on.update_end is None:
            return
        try:
            on.update_end(end, phase)
        except CancelException as cancel:
            if not (self.wraps(phase) and begin.in_batch):
                raise
            # The other ranks complete this batch, as all ranks have agreed: so does this one, and counts it.
            self._scopes.locate(cancel, phase)
            if not isinstance(cancel, CancelBatchException):
                self._ranks.late_cancel = self._ranks.late_cancel or cancel

    def _decides(self, phase: Phase, *, in_group: bool = False) -> bool:
        """Tell whether all ranks must agree on the present batch by a message, after its backward pass.

        They agree before an update if a callback between gradients and update may cancel. In a batch that only
        accumulates gradients, which therefore bring no news, they agree if a callback may cancel the batch, or may
        request a checkpoint, in which the other ranks would wait for a rank that has left the batch.

        Args:
            phase: The phase.
            in_group: Whether the batch only accumulates gradients.
        """
        callbacks: Callbacks = self._state.callbacks
        key = (callbacks, phase, in_group)
        if key not in self._asked:

            def handling(*events: type[Event]) -> list[type[Callback]]:
                """Return the types of the callbacks that handle one of these events."""
                plans = [callbacks.plan(event, type(phase)) for event in events]
                return [type(planned.callback) for plan in plans for planned in plan.handlers]

            early = (BatchBegin, LossBegin, BackwardBegin) if in_group else ()
            self._asked = {each: known for each, known in self._asked.items() if each[0] is callbacks}
            self._asked[key] = any(kind.may_cancel for kind in handling(*early, BackwardEnd, UpdateBegin)) or (
                in_group and any(kind.may_checkpoint for kind in handling(BatchEnd))
            )
        return self._asked[key]

    def fire(self, event: Event, phase: Phase) -> None:
        """See `Steps.fire`.

        Raises:
            RankError: The step has called its optimizer itself, with the gradients of this rank.
        """
        if is_a(event, UpdateEnd):
            raise RankError(
                f"{phase!r} fires UpdateEnd, as a step that calls its optimizer itself. On several ranks that update "
                f"would use the gradients of one rank, and the models would differ. Write learner.update(self), which "
                f"averages the gradients over the ranks."
            )
        super().fire(event, phase)

    # --- failures

    def _in_group(self, phase: Phase) -> bool:
        """Tell whether the present batch goes through DDP and its gradients stay on this rank for now."""
        return self.wraps(phase) and not self._parallel.sends

    @property
    def alone_in_batch(self) -> bool:
        """Whether a batch is running in which a failure of this rank would not be told to the others."""
        phase = self._scopes.phase
        running = self._scopes.batch != CLOSED and not isinstance(phase, AbstractValidationPhase)
        return running and self._in_group(phase) and not self._decides(phase, in_group=True)

    def _agree_within(self) -> None:
        """Exchange the flags before a unit of a sharded model gathers in its first forward pass."""
        sync = self._ranks.next_sync
        self.agree()
        self._ranks.next_sync = sync

    def agree(self, failure: BaseException | None = None) -> None:
        """Exchange the flags of this batch by a message, and act on them as `Ranks.join` does."""
        self._ranks.join(self._ranks.world.sum(self._ranks.flags(failure)), failure)

    def tell(self, phase: Phase, failure: BaseException) -> BaseException:
        """Take part in the next sync point of the other ranks with a failure; return the worst failure of all ranks.

        Args:
            phase: The phase of that batch.
            failure: What this rank has raised.
        """
        ranks, parallel = self._ranks, self._parallel
        sync, by_gradients = ranks.next_sync, ranks.next_sync not in ("flags", "forward") and self.wraps(phase)
        gathered = isinstance(parallel, Sharded) and sync != "flags" and not ranks.world.lost and parallel.gather_rest()
        if gathered and sync == "forward":  # the next sync point is the one before the next batch
            ranks.next_sync = ""
            return failure
        if ranks.world.lost:
            return failure
        try:
            flags = ranks.flags(failure)
            ranks.join(self._parallel.send_zeros(flags) if by_gradients else ranks.world.sum(flags), failure)
        except BaseException as worst:
            if worst is not failure and not ranks.known_failure:
                # This rank cannot tell the others, as in the middle of a backward pass. They notice when its process
                # ends, so it must not wait for them.
                ranks.world.lost = True
                return merge([failure, worst])
            return worst
        return failure

    def cancel_batch(self, phase: Phase, failure: BaseException, *ends: type[BaseException]) -> None:
        """See `Steps.cancel_batch`. Before the sync point of the batch, all ranks are told of the failure there."""
        ranks = self._ranks
        if not ranks.known_failure and self.wraps(phase):
            self._exchange_nothing(phase)
        untold = self._scopes.batch == OPEN and not ranks.known_failure and isinstance(failure, Exception)
        if untold and self._in_group(phase):
            try:
                self._parallel.forward_without_batch()
            except RemoteError as lost:
                failure = merge([failure, lost])
        if ranks.next_sync:
            failure = self.tell(phase, failure)
        elif untold and not isinstance(failure, CancelException):  # the others complete the batch
            self._checkpoints.drop(self._dispatch.requested(_BATCH_END, phase))
        if ranks.known_failure:  # also if this backward pass has not begun: its group is that of the other ranks
            self._scopes.backward = True
        elif self._scopes.batch == OPEN and self._in_group(phase) and isinstance(failure, CancelException):
            # The gradients of this batch stay in the group of all ranks, which is discarded with its last batch.
            ranks.late_cancel = ranks.late_cancel or CancelBatchException(str(failure))
            self._scopes.backward = False
            if not self._counted:
                self._core.due(None)
                self._counted = True
        super().cancel_batch(phase, failure, *ends)

    def _exchange_nothing(self, phase: Phase) -> None:
        """Take part in the exchanges of values that the other ranks still make in the batch that this rank leaves.

        Before the gradients there are none, so the others learn of the failure before the next one.
        """
        if self._ranks.next_sync == "gradients" or self._in_group(phase):
            return
        update = (UpdateEnd(), _BATCH_END) if not self._ranks.next_sync else ()  # the others make no update otherwise
        try:
            for event in (_BACKWARD_END, UpdateBegin(), *update):
                if type(event) not in self._dispatch.met:
                    self._dispatch.exchange_nothing(event, phase)
        except (RankError, RemoteError):
            return  # the failure of this rank is told at the next sync point
