"""Batches on several ranks: each training batch has one sync point, at which all ranks decide together.

A bundled phase trains through DDP, and the flags of the sync point travel with the gradients, in the backward pass. The
step of a user's phase averages the gradients before each update, after a message with the flags, and has a further sync
point at the end of its batch. What is raised before a sync point is told there, so that a batch is cancelled on all
ranks or on none; `flowtrain.training.ranks.sync_points` describes the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from flowtrain.callback.access import Write
from flowtrain.callback.callback import Callback
from flowtrain.callback.events import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    EpochBegin,
    EpochCancelled,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    LossBegin,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.callback.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase, has_bundled_step
from flowtrain.core.replica import Replica
from flowtrain.core.sharding import Sharded
from flowtrain.core.torch_core import TorchCore
from flowtrain.errors import CancelBatchException, CancelException, CoreError, RankError, RemoteError, merge
from flowtrain.graph.executor import Runner
from flowtrain.graph.nodes import Node
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.dispatch import Dispatch, StepRunners
from flowtrain.training.ranks.sync_points import GRADIENTS, MESSAGE, NONE, NextSync, SyncPoints
from flowtrain.training.scopes import CLOSED, OPEN, Scopes
from flowtrain.training.sync import StepCalls, Update

__all__ = ["BatchSync"]

_BATCH_END, _BACKWARD_END = BatchEnd(), BackwardEnd()


class BatchSync:
    """Synchronises the batches of one learner with those of the other ranks: a `StepSync`.

    Args:
        points: The sync points.
        replica: The models of this rank.
        state: The state of the learner.
        core: The core of the learner.
        scopes: The open scopes.
        dispatch: Fires events.
    """

    alone = False

    def __init__(
        self,
        points: SyncPoints,
        replica: Replica,
        state: LearnerState,
        core: TorchCore,
        scopes: Scopes,
        dispatch: Dispatch,
    ) -> None:
        self._points, self._replica = points, replica
        self._state, self._core, self._scopes, self._dispatch = state, core, scopes, dispatch
        self._counted = False  # whether the accumulation group has counted the present batch
        self._asked: dict[tuple[Callbacks, Phase, bool], bool] = {}  # what `_decides` has returned, by its arguments
        self._writes = False
        self._looked_at: Callbacks | None = None  # the callbacks of the last call of `_changes_training`
        if isinstance(replica, Sharded):
            replica.agree_by(self._agree_within)

    def uses_replica(self, phase: Phase) -> bool:
        """Tell whether the batches of a phase run through DDP or shards: those of a phase with the bundled step do."""
        return self._replica.runs_bundled_steps and has_bundled_step(type(phase), AbstractTrainingPhase)

    def check_step(self, phase: Phase) -> None:
        """Check that a phase has the bundled step if the model is sharded.

        Raises:
            CoreError: It has a step of its own.
        """
        if self._replica.forward_is_collective and not has_bundled_step(type(phase)):
            raise CoreError(
                f"{phase!r} has a step of its own, in which a rank that fails could not tell the others, since each "
                f"use of a sharded model needs all of them. Use the bundled step (split, call_model and callbacks "
                f"change what it does), or TorchCore(parallel='ddp')."
            )

    # --- a batch, from its begin to its end

    def open_batch(self, phase: Phase) -> None:
        """Begin the next training batch, whose step is about to be called."""
        self._points.begin(GRADIENTS if self.uses_replica(phase) else MESSAGE)

    def around(self, phase: Phase, step: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return the step with a sync point at its end if it has opened no batch, which would have one."""
        if isinstance(phase, AbstractValidationPhase):
            return step

        def run(raw: Any) -> None:
            """Run the step."""
            step(raw)
            if self._points.next == MESSAGE and self._scopes.batch == CLOSED:
                self.agree()

        return run

    def begin(self, phase: AbstractTrainingPhase, update: Update) -> StepCalls:
        """Begin a batch of all ranks, and return functions that agree on it in or after the backward pass."""
        points, replica = self._points, self._replica
        self.open_batch(phase)
        self._dispatch.met.clear()
        self._counted = False
        if not self.uses_replica(phase):
            return self._core.model, self._core.backward, partial(self._update_and_agree, update)
        if self._changes_training():
            replica.prepare()
        replica.set_gradient_sync(self._core.groups.fills)
        if not replica.has_sync_point:
            points.expect(self._question(phase, in_group=True))
        model = self._run_prepared if self._writes else replica.model
        return model, partial(self._backward, phase), partial(self._update, update)

    def _run_prepared(self, *inputs: Any, **named: Any) -> Any:
        """Run the model, whose parameters a handler may have changed since the batch has begun.

        Raises:
            CoreError: A handler has changed which parameters there are, or which of them are trained. The others may
                not have come there, so the ranks cannot prepare again within the batch.
        """
        if not self._replica.prepared:
            raise CoreError(
                "A callback has changed, at the begin of a batch, which parameters the model has or which of them are "
                "trained (requires_grad). On several ranks their gradients would not be averaged in this batch. Change "
                "them at BatchEnd or at EpochBegin."
            )
        return self._replica.model(*inputs, **named)

    def _backward(self, phase: Phase, loss: torch.Tensor) -> None:
        """Run the backward pass, with the sync point of the batch if there is one in it."""
        points, replica = self._points, self._replica
        sums = self._core.backward_on_ranks(loss, points.flags())
        if replica.has_sync_point:
            points.passed(sums)
            points.expect(self._question(phase, in_group=not replica.syncs_gradients))

    def _update(self, update: Update, phase: Phase) -> None:
        """Update if a group is due; before, agree on a batch that only accumulates if a callback may have cancelled."""
        if self._points.next and self._in_group(phase):
            self.agree()
        self._counted = True
        update(phase)

    def _update_and_agree(self, update: Update, phase: Phase) -> None:
        """Update if a group is due, and then agree on a batch whose gradients do not travel in the backward pass."""
        update(phase)
        self.agree()

    def begin_own(self, phase: Phase) -> None:
        """Begin a batch of a user's step, on which the ranks agree by a message."""
        if not isinstance(phase, AbstractValidationPhase):
            self._points.begin(MESSAGE)

    def end_own(self, phase: Phase) -> None:
        """Agree by a message how a batch of a user's step ends, if the phase trains."""
        if not isinstance(phase, AbstractValidationPhase):
            self.agree()

    def agree(self, failure: BaseException | None = None) -> None:
        """Exchange the flags of this batch by a message, and act on them as `SyncPoints.passed` does."""
        self._points.ask(failure)

    def _agree_within(self) -> None:
        """Exchange the flags before a unit of a sharded model gathers in its first forward pass."""
        following = self._points.next
        self.agree()
        self._points.expect(following)

    # --- an update

    def updating(
        self, phase: Phase, names: list[str], on: StepRunners, *, in_batch: bool
    ) -> tuple[Runner | None, Runner | None]:
        """Agree that all ranks make the update, and average; DDP has done both in its backward pass."""
        if not (self.uses_replica(phase) and in_batch):
            following = self._points.next
            self._points.ask(updates=True)
            self._core.average(names)
            self._points.expect(following)
        end = on.update_end
        return partial(self._begin_update, on.update_begin), None if end is None else partial(self._end_update, end)

    def _begin_update(self, runner: Runner | None, event: Event, phase: Phase) -> None:
        """Fire `UpdateBegin`, and let all ranks decide whether the update is made, before any rank makes it."""
        decides, following = self._decides(phase), NONE if self.uses_replica(phase) else self._points.next
        failure: BaseException | None = None
        try:
            if runner is not None:
                runner(event, phase)
        except BaseException as raised:
            if not decides:
                raise
            failure = raised
        if decides:
            self.agree(failure)
            self._points.expect(following)

    def _end_update(self, runner: Runner, event: Event, phase: Phase) -> None:
        """Fire `UpdateEnd`. A cancel takes effect in the next batch: all ranks have agreed to complete this one."""
        try:
            runner(event, phase)
        except CancelException as cancel:
            if not (self.uses_replica(phase) and isinstance(event, UpdateEnd) and event.in_batch):
                raise
            self._scopes.locate(cancel, phase)
            if not isinstance(cancel, CancelBatchException):
                self._points.late(cancel)

    def check_own_update(self, phase: Phase) -> None:
        """Refuse it: the update would use the gradients of this rank alone."""
        raise RankError(
            f"{phase!r} fires UpdateEnd, as a step that calls its optimizer itself. On several ranks that update "
            f"would use the gradients of one rank, and the models would differ. Write learner.update(self), which "
            f"averages the gradients over the ranks."
        )

    # --- what callbacks declare

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

    def _question(self, phase: Phase, *, in_group: bool) -> NextSync:
        """Return the sync point after the backward pass; `_decides` describes the arguments."""
        return MESSAGE if self._decides(phase, in_group=in_group) else NONE

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
                in_group and any(map(_may_ask_in_a_batch, callbacks.nodes))
            )
        return self._asked[key]

    def _in_group(self, phase: Phase) -> bool:
        """Tell whether the present batch goes through DDP and its gradients stay on this rank for now."""
        return self.uses_replica(phase) and not self._replica.syncs_gradients

    # --- failures

    def fail_next(self, phase: Phase, failure: BaseException, *, asks: bool) -> None:
        """Tell the other ranks of a failure at the sync point of their next batch.

        Args:
            phase: The phase.
            failure: The failure.
            asks: Whether the ranks ask each other before that batch whether they have it.
        """
        self._points.begin(GRADIENTS if self.uses_replica(phase) and not asks else MESSAGE)
        self._points.fail(failure)

    def leave(self, phase: Phase, failure: BaseException) -> BaseException:
        """Leave the batch, and tell all ranks of the failure if the sync point of the batch is still to come."""
        points, core, scopes = self._points, self._core, self._scopes
        if not points.known and self.uses_replica(phase):
            self._exchange_nothing(phase)
        untold = scopes.batch == OPEN and not points.known and isinstance(failure, Exception)
        if untold and self._in_group(phase):
            try:
                self._replica.skip_unsent_batch()
            except RemoteError as lost:
                failure = merge([failure, lost])
        if points.next:
            failure = points.fail(failure)
        elif untold and not isinstance(failure, CancelException):  # the others complete the batch
            self._dispatch.drop_requested(_BATCH_END, phase)
        if points.known:  # also if this backward pass has not begun: its group is that of the other ranks
            scopes.set_backward(True)
        elif scopes.batch == OPEN and self._in_group(phase) and isinstance(failure, CancelException):
            # The gradients of this batch stay in the group of all ranks, which is discarded with its last batch.
            points.late(CancelBatchException(str(failure)))
            scopes.set_backward(False)
            if not self._counted:
                core.due(None)
                self._counted = True
        return failure

    def _exchange_nothing(self, phase: Phase) -> None:
        """Take part in the exchanges of values that the other ranks still make in the batch that this rank leaves.

        Before the gradients there are none, so the others learn of the failure before the next one.
        """
        if self._points.next == GRADIENTS or self._in_group(phase):
            return
        update = (UpdateEnd(), _BATCH_END) if not self._points.next else ()  # otherwise the others make no update
        try:
            for event in (_BACKWARD_END, UpdateBegin(), *update):
                if type(event) not in self._dispatch.met:
                    self._dispatch.exchange_nothing(event, phase)
        except (RankError, RemoteError):
            return  # the failure of this rank is told at the next sync point


def _may_ask_in_a_batch(node: Node) -> bool:
    """Tell whether a callback may request a checkpoint in a batch, at an event that is fired there or one of a user."""
    outside = (FitBegin, EpochBegin, EpochEnd, EpochCancelled, FitEnd)
    return node.callback.may_checkpoint and any(
        not issubclass(handler.event_type, outside) for _, handler in node.handlers
    )
