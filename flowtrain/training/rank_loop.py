"""The loop on one of several ranks: the same fit as `Loop`, with sync points between its parts.

`flowtrain.training.ranks` says which sync points there are and what ranks tell each other there. This module puts them
into the loop, and ends each training epoch on all ranks with the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from flowtrain.callback.phases import AbstractValidationPhase, Phase
from flowtrain.core.data_parallel import DataParallel
from flowtrain.core.torch_core import TorchCore
from flowtrain.core.world import World
from flowtrain.errors import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    DataError,
    RankError,
    RemoteError,
    raise_worst,
)
from flowtrain.graph.executor import Executor
from flowtrain.graph.plan_texts import first_difference
from flowtrain.logging.backend import Run
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.checkpoint.checkpoints import Checkpoints
from flowtrain.training.checkpoint.rank_checkpoints import RankCheckpoints
from flowtrain.training.interrupts import Interrupts
from flowtrain.training.loop import LEFT_OPEN, Loop
from flowtrain.training.rank_steps import RankSteps
from flowtrain.training.ranks import END, Ranks
from flowtrain.training.scopes import CLOSED
from flowtrain.training.step import Steps

__all__ = ["RankLoop", "make_loop"]

_NONE = object()
"""Stands for a batch that a loader has not given, since a batch may be ``None``."""


def make_loop(state: LearnerState, core: TorchCore, executor: Executor) -> Loop:
    """Return the loop of a learner, whose core is attached: that of one process, or that of one of several ranks."""
    if core.world is None or core.parallel is None:
        return Loop(state, core, executor)
    return RankLoop(state, core, executor, core.world, core.parallel)


class RankLoop(Loop):
    """Runs training on one of several ranks. The arguments are those of `Loop`.

    Args:
        world: The ranks.
        parallel: The models of this rank.

    Attributes:
        ranks: The sync points.
    """

    steps: RankSteps

    def __init__(
        self, state: LearnerState, core: TorchCore, executor: Executor, world: World, parallel: DataParallel
    ) -> None:
        self.ranks = Ranks(world)
        self._parallel = parallel
        self._known = True  # whether all ranks know the number of batches of the present epoch
        self._compared: set[Phase] = set()  # phases whose first batch was compared with those of the other ranks
        super().__init__(state, core, executor)
        self.sinks.run = Run(world.exchange(self.sinks.run.id)[0])

    def _make_steps(self) -> Steps:
        return RankSteps(
            self.state, self.core, self.scopes, self.dispatch, self.checkpoints, self.ranks, self._parallel
        )

    def _make_checkpoints(self) -> Checkpoints:
        return RankCheckpoints(
            self.state, self.core, self.executor, self.scopes, self.sinks, self.dispatch.mailbox, self.ranks.world
        )

    # --- fit and epoch

    def resume(self, path: Any, data: PhaseMap[Any], unit: str) -> None:
        """Let the next fit begin at the position of a checkpoint on all ranks, or on none."""
        self.ranks.begin()
        failures: list[BaseException] = []
        try:
            super().resume(path, data, unit)
        except BaseException as failure:
            failures.append(failure)
        self.ranks.meet("the checkpoint to resume from", failures)
        self._raise(failures)

    def agreed(self, value: Any) -> Any:
        """Return the value of the main rank."""
        return self.ranks.world.exchange(value)[0]

    def _interrupts(self, workers: bool, prints: bool) -> Interrupts:
        self.ranks.begin()
        self._compared.clear()
        return Interrupts(
            self.dispatch.mailbox, self.checkpoints.interrupted, workers, answers=prints, hold=self._hold
        )

    def _hold(self, leave: Callable[[], None]) -> None:
        """Keep the function that ends the fit until all ranks know of the signal."""
        self.ranks.leave = leave

    def _planned_updates(self, data: PhaseMap[Any], *counts: int | None) -> int | None:
        failures: list[BaseException] = []
        planned: list[int | None] = [None]
        try:
            planned = [super()._planned_updates(data, *counts)]
        except BaseException as failure:
            failures.append(failure)
        told = self.ranks.meet("the plan of the fit", failures, (planned[0], self.state.callbacks.describe()))
        self._raise(failures)
        difference = first_difference([plans for _, plans in told]) if told else ""
        if difference:
            raise RankError(
                f"The ranks have different callbacks: {difference}. Give the learner the same callbacks, in the same "
                f'order, on every rank; with ranks = "main" one of them runs on the main rank only.'
            )
        found = [updates for updates, _ in told]
        return min(found) if found and None not in found else None

    def _meet(self, point: str, failures: list[BaseException]) -> None:
        self.ranks.meet(point, failures)
        if self.ranks.interrupted and not self.ranks.ending and point != "FitEnd":
            self._interrupt(failures)

    def _interrupt(self, failures: list[BaseException]) -> None:
        """End the fit for a signal to any rank, at a point that all ranks have reached."""
        self.ranks.ending = True
        own: BaseException | None = None
        try:
            if self.ranks.leave is not None:
                self.ranks.leave()
            self.checkpoints.interrupted()
        except BaseException as failure:
            own = failure
        try:
            reasons = self.ranks.world.exchange("" if own is None else str(own))
            others = "; ".join(f"{reason} on rank {rank}" for rank, reason in enumerate(reasons) if reason)
            failures.append(KeyboardInterrupt(others) if own is None else own)
        except RemoteError as lost:
            failures.append(lost if own is None else own)

    def _merge(self, phase: Phase, failures: list[BaseException]) -> None:
        states: dict[str, Any] = {}
        try:
            if not failures:
                states = {callback.name: callback.rank_state() for callback in self.state.callbacks}
        except BaseException as failure:
            failures.append(failure)
        found = self.ranks.meet("the merging of what ranks measured", failures, states)
        try:
            if found:
                if not isinstance(phase, AbstractValidationPhase):
                    self._parallel.share_buffers()
                for callback in self.state.callbacks:
                    callback.merge_ranks([each.get(callback.name) for each in found])
        except BaseException as failure:
            failures.append(failure)

    def _check_gave(self, phase: Phase, loader: object) -> None:
        if not isinstance(phase, AbstractValidationPhase):  # a rank may have nothing to evaluate
            super()._check_gave(phase, loader)

    def epoch(self, phase: Phase, loader: Iterable[Any], most: int | None = None) -> None:
        """Run one epoch of a phase over a loader, of at most `most` batches."""
        if self.scopes.fit == CLOSED:
            self.ranks.begin()
        super().epoch(phase, loader, most)

    def _begin_epoch(self, phase: Phase, loader: Iterable[Any]) -> Iterable[Any]:
        failures: list[BaseException] = []
        batches: list[Iterable[Any]] = []
        try:
            batches.append(super()._begin_epoch(phase, loader))
        except BaseException as failure:
            failures.append(failure)
        self._meet("EpochBegin", failures)
        self._raise(failures)
        return batches[0]

    @staticmethod
    def _raise(failures: list[BaseException]) -> None:
        if failures:
            raise_worst(failures)

    # --- the batches of an epoch

    def _run(self, phase: Phase, batches: Iterable[Any], total: int | None, most: int | None) -> None:
        if isinstance(phase, AbstractValidationPhase):
            super()._run(phase, self._until_interrupt(batches), total, most)
            return
        if self.steps.wraps(phase):
            self._parallel.prepare()
        source = iter(batches)
        done = self.scopes.batch_number
        first, total = self._agree_on_epoch(phase, source, total)
        left = None if total is None else total - done
        if left == 0:
            return
        known = total is not None
        source = chain([first], source)
        fed = iter(self.core.feed(source if known else self._until_last(source), left))
        step = self.steps.step_of(phase)
        number = done
        while total is None or number < total:
            self.ranks.begin_batch("")
            try:
                raw = next(fed)
            except StopIteration:
                if total is None:
                    return
                early = CancelEpochException(
                    f"the loader for {phase!r} has given {number} batches, and has announced {total} or more"
                )
                self.steps.tell(phase, early)
                raise early from None
            except BaseException as failure:
                if not self.ranks.knows(failure):
                    self._tell_next(phase, failure)
                raise
            number += 1
            self.scopes.batch_number = number
            self._batch(phase, step, raw, more=total is None or number < total)
            del raw

    def _batch(self, phase: Phase, step: Callable[[Any], None], raw: Any, *, more: bool) -> None:
        """Run a training batch, and act on what was raised after its sync point.

        Args:
            phase: The phase.
            step: The function that runs a batch.
            raw: The batch as the loader gave it.
            more: Whether a further batch of the epoch follows.
        """
        ranks = self.ranks
        ranks.begin_batch("gradients" if self.steps.wraps(phase) else "flags")
        try:
            try:
                step(raw)
                if self.scopes.batch:
                    raise CancelBatchException(LEFT_OPEN)
            except BaseException as failure:
                self.steps.cancel_batch(phase, failure, CancelBatchException)
            if self.dispatch.mailbox.calls:
                self.dispatch.mailbox.empty()
        except CancelException as cancel:
            if ranks.knows(cancel):
                raise
            ranks.carried = cancel
            if not more:
                raise
        except BaseException as failure:
            if more and not ranks.knows(failure):
                self._tell_next(phase, failure)
            raise
        if ranks.interrupted:
            failures: list[BaseException] = []
            self._interrupt(failures)
            self._raise(failures)

    def _tell_next(self, phase: Phase, failure: BaseException) -> None:
        """Tell the other ranks of a failure at the sync point of their next batch."""
        self.ranks.begin_batch("gradients" if self.steps.wraps(phase) and self._known else "flags")
        self.steps.tell(phase, failure)

    def _agree_on_epoch(self, phase: Phase, source: Iterator[Any], total: int | None) -> tuple[Any, int | None]:
        """Return the first batch of this rank, and the number of batches in the epoch on all ranks.

        Args:
            phase: The phase.
            source: The batches that are left in the epoch.
            total: The number of batches in the whole epoch on this rank; ``None`` if it is not known.

        Raises:
            RankError: Two ranks have the same first batch.
            DataError: The ranks have different numbers of batches, and that is not wanted.
        """
        failures: list[BaseException] = []
        first: list[Any] = [_NONE]
        mark = ""
        try:
            first[0] = next(source, _NONE)
            if phase not in self._compared and first[0] is not _NONE:
                mark = ''
        except BaseException as failure:
            failures.append(failure)
        if first[0] is _NONE:
            total = self.scopes.batch_number
        found = self.ranks.meet("the first batch", failures, (total, mark))
        self._raise(failures)
        self._compared.add(phase)
        if found:
            _check_different(phase, [mark for _, mark in found])
        totals = [each for each, _ in found]
        self._known = None not in totals
        least = min(each for each in totals if each is not None) if self._known else None
        if self.core.settings.uneven == "error" and len(set(totals)) > 1:
            shown = ", ".join(f"rank {rank}: {'unknown' if each is None else each}" for rank, each in enumerate(totals))
            raise DataError(
                f"The ranks have different numbers of batches for {phase!r} ({shown}), and uneven='error' was asked "
                f"for. Give every rank equally many, or leave uneven= out: the epoch then ends with the shortest."
            )
        return first[0], least

    def _until_last(self, source: Iterator[Any]) -> Iterator[Any]:
        """Yield batches until any rank has no further one, which all ranks tell each other before each batch."""
        ranks = self.ranks
        while True:
            following = next(source, _NONE)  # after the batch before, with which the other ranks would meet an error
            ranks.begin_batch("flags")
            mine = ranks.flags()
            mine[END] = int(following is _NONE)
            sums = ranks.world.sum(mine)
            ranks.join(sums, None)
            if sums[END]:
                return
            yield following

    def _until_interrupt(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of an evaluation until a signal has come to this rank."""
        for raw in batches:
            yield raw
            if self.ranks.leave is not None:
                return


def _check_different(phase: Phase, marks: list[str]) -> None:
    """Check that no two ranks have the same first batch.

    Raises:
        RankError: Two ranks have the same one.
    """
    for rank, mark in enumerate(marks):
        if mark and mark in marks[:rank]:
            raise RankError(
                f"Rank {marks.index(mark)} and rank {rank} have got the same first batch for {phase!r}, so they would "
                f"train on the same data. Give each rank its part: DataLoader(dataset, "
                f"sampler=DistributedSampler(dataset)) of torch.utils.data, or batches chosen by the rank, "
                f"torch.distributed.get_rank()."
            )
