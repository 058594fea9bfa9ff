"""The loop on one of several ranks: the same fit as `Loop`, with sync points between its parts.

`flowtrain.training.ranks` says which sync points there are and what ranks tell each other there. This module puts them
into the loop, and ends each training epoch on all ranks with the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain, islice
from typing import Any, Never

import torch

from flowtrain.callback.phases import AbstractValidationPhase, Phase
from flowtrain.callback.view import CheckpointRequest
from flowtrain.core.data_parallel import DataParallel
from flowtrain.core.sharding import Sharded
from flowtrain.core.torch_core import TorchCore
from flowtrain.core.world import World
from flowtrain.data.loaders import END_OF_DATA, length
from flowtrain.data.rank_batches import fingerprint
from flowtrain.errors import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CheckpointError,
    DataError,
    DivergedError,
    RankError,
    RemoteError,
    attempt,
    raise_worst,
)
from flowtrain.graph.executor import Executor
from flowtrain.graph.plan_texts import first_difference
from flowtrain.graph.registry import Callbacks
from flowtrain.logging.backend import Run
from flowtrain.state.batch import BatchState
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.encoding import Packer
from flowtrain.state.learner_state import LearnerState
from flowtrain.training.checkpoint.checkpoints import Checkpoints
from flowtrain.training.checkpoint.position import Stream
from flowtrain.training.checkpoint.rank_checkpoints import RankCheckpoints
from flowtrain.training.checkpoint.reading import own_version
from flowtrain.training.interrupts import Interrupts
from flowtrain.training.loop import LEFT_OPEN, Loop
from flowtrain.training.rank_data import RankData
from flowtrain.training.rank_steps import RankSteps
from flowtrain.training.ranks import EPOCHS_BROKEN_OFF, FIT_END, Ranks
from flowtrain.training.scopes import CLOSED
from flowtrain.training.sharded_evaluation import ShardedEvaluation
from flowtrain.training.step import Steps

__all__ = ["RankLoop", "make_loop"]


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
    checkpoints: RankCheckpoints

    def __init__(
        self, state: LearnerState, core: TorchCore, executor: Executor, world: World, parallel: DataParallel
    ) -> None:
        self.ranks = Ranks(world)
        self._parallel = parallel
        super().__init__(state, core, executor)
        self.dispatch.checkpoint, self.dispatch.drop = self._take, self.checkpoints.drop
        self._together: ShardedEvaluation | None = None
        if isinstance(parallel, Sharded):
            mailbox = self.dispatch.mailbox
            self._together = ShardedEvaluation(self.ranks, parallel, core, self.scopes, self.steps, mailbox)
        self._data = RankData(self.ranks, self.scopes, core.settings.uneven)
        self.sinks.run = Run(world.exchange(self.sinks.run.id)[0])

    def _make_steps(self) -> Steps:
        return RankSteps(
            self.state, self.core, self.scopes, self.dispatch, self.checkpoints, self.ranks, self._parallel
        )

    def _make_checkpoints(self) -> Checkpoints:
        return RankCheckpoints(
            self.state, self.core, self.executor, self.scopes, self.sinks, self.dispatch.mailbox, self.ranks.world
        )

    def _take(self, requests: Sequence[CheckpointRequest]) -> None:
        """Take checkpoints as `Checkpoints.take` does.

        Raises:
            RankError: The batch only accumulates gradients, and a rank that has left it could not tell the others.
        """
        if self.steps.alone_in_batch:
            raise RankError(
                "A handler of a training batch requests a checkpoint, with accumulate > 1 on several ranks. A rank "
                "that fails in such a batch is missed at the end of the group only, and the others would wait for it "
                "in the checkpoint. Set may_checkpoint = True in the class of the callback: the ranks then ask each "
                "other in each batch."
            )
        self.checkpoints.take(requests)

    # --- fit and epoch

    def divided(self, data: PhaseMap[Any]) -> PhaseMap[Any]:
        """Return the loaders of this rank, and tell the user once how they are divided."""
        return self._data.divided(data)

    def resume(self, path: Any, data: PhaseMap[Any], unit: str) -> None:
        """Let the next fit begin at the position of a checkpoint on all ranks, or on none."""
        self.ranks.begin()
        failures: list[BaseException] = []
        try:
            super().resume(path, data, unit)
            self.checkpoints.loaded()  # what was loaded before has no effect any more
        except BaseException as failure:
            failures.append(failure)
        self.ranks.meet("the checkpoint to resume from", failures)
        self._raise(failures)

    def agreed(self, value: Any) -> Any:
        """Return the value of the main rank."""
        return self.ranks.world.exchange(value)[0]

    def _interrupts(self, workers: bool, on_terminal: bool) -> Interrupts:
        self.ranks.begin()
        self._data.compared.clear()
        return Interrupts(
            self.dispatch.mailbox, self.checkpoints.interrupted, workers, answers=on_terminal, hold=self._hold
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
        value = planned[0], self.state.callbacks.describe(), _versions()
        answers = self.ranks.meet("the plan of the fit", failures, value)
        self._raise(failures)
        for number, (_, _, versions) in enumerate(answers):
            if versions != answers[0][2]:
                raise RankError(
                    f"Rank {number} has {versions}, and the main rank has {answers[0][2]}. Install the same versions "
                    f"everywhere: others may compute, order and save in another way."
                )
        difference = first_difference([plans for _, plans, _ in answers]) if answers else ""
        if difference:
            raise RankError(
                f"The ranks have different callbacks: {difference}. Give the learner the same callbacks, in the same "
                f'order, on every rank; with ranks = "main" one of them runs on the main rank only.'
            )
        found = [updates for updates, _, _ in answers]
        return min(found) if found and None not in found else None

    def _meet(self, point: str, failures: list[BaseException]) -> None:
        ranks = self.ranks
        if failures and not ranks.fit_ends:
            attempt(failures, self.checkpoints.miss, failures[0])
        value: dict[str, str] = {}
        if point == "EpochEnd" and not failures:
            value = self._fingerprints()
        elif point == "EpochBegin":
            value = self.checkpoints.loaded()
        found = ranks.meet(point, failures, value)
        differing = {path for each in found for path in each if each[path] != found[0].get(path)}
        differing |= {path for each in found for path in found[0] if path not in each}
        if differing:
            failures.append((_diverged if point == "EpochEnd" else _loaded)(sorted(differing), found))
        if point == FIT_END:
            known = ranks.failed or any(isinstance(failure, KeyboardInterrupt) for failure in failures)
            if ranks.interrupted and ranks.leave is None and not known:
                failures.append(KeyboardInterrupt("training was interrupted on another rank, after its last epoch"))
        elif ranks.interrupted and not ranks.fit_ends:
            self._interrupt(failures)
        if point == EPOCHS_BROKEN_OFF and not ranks.failed:  # a cancel or an interrupt has left an epoch open
            attempt(failures, self._parallel.share_buffers)

    def _fingerprints(self) -> dict[str, str]:
        """Return a fingerprint by path of all that must be the same on all ranks: entries of ``cbstate``, on request
        parameters and buffers too, after an epoch of training.
        """
        # A value is compared together with its name, since values without a text, such as an empty tensor, have no
        # fingerprint of their own.
        callbacks: Callbacks = self.state.callbacks
        found: dict[str, str] = {}
        if self.core.settings.check_params and torch.is_grad_enabled():
            for root, model in self.core.models.items():
                for name, tensor in (*model.named_parameters(root), *model.named_buffers(root)):
                    found[f"model.{name}"] = fingerprint((name, tensor))
        for name in self.state.cbstate if callbacks.shared is not None else ():
            if callbacks.shared is not None and not callbacks.shared.why_local(("cbstate", name)):
                with suppress(CheckpointError):  # an object that no checkpoint can hold cannot be compared either
                    packed = Packer().pack(getattr(self.state.cbstate, name), f"cbstate.{name}")
                    found[f"cbstate.{name}"] = fingerprint((name, packed))
        return found

    def _interrupt(self, failures: list[BaseException]) -> None:
        """End the fit for a signal to any rank, at a point that all ranks have reached."""
        self.ranks.fit_ends = True
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

    def epoch(self, phase: Phase, loader: Iterable[Any], most: int | None = None) -> None:
        """Run one epoch of a phase over a loader, of at most `most` batches."""
        if self.scopes.fit == CLOSED:
            self.ranks.begin()
        super().epoch(phase, loader, most)

    def step(self, phase: Phase, raw: Any) -> BatchState:
        """Run one batch outside of an epoch on all ranks, each with its own; see `Loop.step`."""
        self.ranks.begin()
        if self.steps.wraps(phase):
            self._parallel.prepare()
        return super().step(phase, raw)

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
        self.steps.check_step(phase)
        if isinstance(phase, AbstractValidationPhase):
            if self._together is not None:
                self._together.run(phase, batches, most)
            else:
                super()._run(phase, self._until_interrupt(batches), total, most)
            return
        if self.steps.wraps(phase):
            self._parallel.prepare()
        source = iter(batches)
        done = number = self.scopes.batch_number
        if most is not None and not isinstance(batches, Stream) and length(self.state.data.get(phase, batches)) is None:
            source, total = islice(source, most - done), None  # `most` is no length that a loader has announced
        first, total = self._data.agree_on_epoch(phase, source, total)
        if first is END_OF_DATA:
            return
        source = chain([first], source)
        del first
        if total is not None:
            fed = iter(self.dispatch.batches(self.core.feed(source, total - done)))
        else:  # the ranks tell each other before each batch whether they have one, so no batch is taken early
            fed = iter(self.dispatch.batches(self._data.until_any_ends(phase, source)))
        step = self.steps.step_of(phase)
        while total is None or number < total:
            self.ranks.begin_batch("")
            try:
                raw = next(fed, END_OF_DATA)
            except BaseException as failure:
                if not self.ranks.knows(failure):
                    self._tell_next(phase, failure)
                raise
            if raw is END_OF_DATA:
                if total is not None:
                    self._end_early(phase, number, total)
                return
            number += 1
            self.scopes.batch_number = number
            self._batch(phase, step, raw, more=total is None or number < total)
            del raw

    def _end_early(self, phase: Phase, number: int, total: int) -> Never:
        """End the epoch on all ranks, since the loader of this rank has given fewer batches than it announced."""
        text = (
            f"The loader for {phase!r} has given {number} batches, and its length is at least {total}. Let its __len__ "
            f"return the number of batches that it gives, or raise a TypeError."
        )
        early = DataError(text) if self.core.settings.uneven == "error" else CancelEpochException(text)
        self._tell_next(phase, early)
        raise early

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
                if ranks.next_sync == "flags" and not self.steps.wraps(phase):  # the step has opened no batch
                    self.steps.agree()
            except BaseException as failure:
                self.steps.cancel_batch(phase, failure, CancelBatchException)
            if self.dispatch.mailbox.calls:
                self.dispatch.mailbox.empty()
        except CancelException as cancel:
            if ranks.knows(cancel):
                raise
            ranks.late_cancel = cancel
            if not more:
                raise
        except BaseException as failure:
            known = ranks.knows(failure)
            self.checkpoints.miss(None if known else failure)
            if more and not known:
                self._tell_next(phase, failure)
            raise
        if ranks.interrupted:
            failures: list[BaseException] = []
            self._interrupt(failures)
            self._raise(failures)

    def _tell_next(self, phase: Phase, failure: BaseException) -> None:
        """Tell the other ranks of a failure at the sync point of their next batch."""
        self.ranks.begin_batch("gradients" if self.steps.wraps(phase) and self._data.known else "flags")
        self.steps.tell(phase, failure)

    @contextmanager
    def predicting(self, phase: Phase, inputs: Iterable[Any]) -> Generator[Iterable[Any]]:
        """See `Loop.predicting`. All ranks predict if the model is sharded, each with inputs of its own."""
        if self._together is None:
            yield inputs
            return
        self.ranks.begin()
        with self._together.telling(phase):
            yield self._together.batches(phase, iter(inputs))

    def _until_interrupt(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of an evaluation until a signal has come to this rank."""
        for raw in batches:
            yield raw
            if self.ranks.leave is not None:
                return


def _versions() -> str:
    """Return the versions that must be the same on all ranks."""
    return f"flowtrain {own_version()} and torch {torch.__version__}"


def _loaded(paths: Sequence[str], found: Sequence[Mapping[str, str]]) -> RankError:
    """Return the error for ranks that have not loaded the same checkpoints; the arguments are those of `_diverged`."""
    shown = "; ".join(f"rank {rank}: {each.get('load', 'nothing')}" for rank, each in enumerate(found))
    return RankError(
        f"The ranks have not loaded the same checkpoints since their last epoch, so their models differ: {shown}. All "
        f"ranks must call learner.load with the same file: do not put the call under `if rank == 0`."
    )


def _diverged(paths: Sequence[str], found: Sequence[Mapping[str, str]]) -> DivergedError:
    """Return the error for shared state that is not the same on all ranks.

    Args:
        paths: The paths that differ.
        found: For each rank a fingerprint by path.
    """
    ranks = [rank for rank, each in enumerate(found) if any(each.get(path) != found[0].get(path) for path in paths)]
    return DivergedError(
        tuple(paths),
        f"{', '.join(paths)} must be the same on all ranks, and differs on rank {', '.join(map(str, ranks))} from the "
        f"main rank. A callback that writes it uses what only its own rank has: the clock, random numbers, the rank, "
        f"an attribute that it fills from batches. Declare what it reads, with Read(reduce='mean') for a value of all "
        f"ranks, or let the main rank write it: Write(broadcast=True).",
    )
