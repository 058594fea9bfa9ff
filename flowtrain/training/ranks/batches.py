"""The batches of one of several ranks: its share of each loader, and the batches of an epoch, as many as on all ranks.

An epoch of training ends on all ranks with the same batch. The batches of an evaluation are not counted: each rank
evaluates its own. A forward pass of a sharded model gathers the parameters from all ranks, though. So its evaluation
has a sync point before each batch, at which every rank says whether it has one. A rank that has no further batch
gathers with the others and computes nothing, until no rank has one: no sample is left out, and no rank waits for one
that is ready.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, Never

import torch

from flowtrain.callback.phases import AbstractValidationPhase, Phase
from flowtrain.core.sharding import Sharded
from flowtrain.core.torch_core import TorchCore
from flowtrain.data.loaders import END_OF_DATA
from flowtrain.data.rank_batches import agreed_length, check_ends
from flowtrain.data.rank_loaders import LoaderDivider, Share, check_first_batches
from flowtrain.errors import CancelEpochException, CancelException, DataError
from flowtrain.graph.plan_texts import Description
from flowtrain.state.by_phase import PhaseMap
from flowtrain.training.checkpoint.rank_checkpoints import RankParts
from flowtrain.training.ranks.batch_sync import BatchSync
from flowtrain.training.ranks.sync_points import END, FORWARD, MESSAGE, NO_BATCH, NONE, SyncPoints

__all__ = ["RankBatches"]

_logger = logging.getLogger("flowtrain")


class RankBatches:
    """Gives the batches of one learner on one of several ranks.

    Args:
        points: The sync points.
        sync: Synchronises single batches.
        parts: The parts of the checkpoints.
        core: The core of the learner.
    """

    def __init__(self, points: SyncPoints, sync: BatchSync, parts: RankParts, core: TorchCore) -> None:
        world = points.world
        self._points, self._sync, self._parts, self._core = points, sync, parts, core
        self._sharded = core.replica if isinstance(core.replica, Sharded) else None
        self._uneven: Literal["stop", "error"] = core.settings.uneven
        self._divider = LoaderDivider(world.rank, world.size, world.exchange(torch.initial_seed() % 2**32)[0])
        self._shares: dict[Phase, Share] = {}
        self._compared: set[Phase] = set()  # the phases whose first batch was compared with others in this fit
        self._said: set[str] = set()
        self._asks = False  # whether the ranks ask each other before each batch whether they have it
        self._more = False  # whether a further batch of the epoch follows the present one

    # --- the data

    def divide(self, data: PhaseMap[Any]) -> PhaseMap[Any]:
        """Return the loaders of this rank, and tell the user once, on the main rank, how they are divided."""
        found: PhaseMap[Any] = PhaseMap("data")
        for phase, loader in data.items():
            training = not isinstance(phase, AbstractValidationPhase)
            self._shares[phase] = share = self._divider.of(loader, f"The data for {phase!r}", training=training)
            found[phase] = share.loader
            for note in share.notes:
                self._say(note)
        return found

    def describe(self) -> Description:
        """Return the data of all phases as lines that the ranks compare."""
        return [(repr(phase), share.whole) for phase, share in self._shares.items()]

    def begin_fit(self) -> None:
        """Compare the first batches of all ranks once more."""
        self._compared.clear()

    def _say(self, line: str) -> None:
        """Write a line for the user, once, on the main rank; an empty line is not written."""
        if line and self._points.world.main and line not in self._said:
            self._said.add(line)
            _logger.warning(line)  # a level that Python shows without any setting

    # --- an epoch of training

    def training(self, phase: Phase, source: Iterable[Any], done: int, total: int | None) -> Iterator[Any]:
        """Yield the batches of an epoch of training that are left, as many on each rank; the loop runs each of them.

        Args:
            phase: The phase.
            source: The batches that are left in the epoch on this rank.
            done: How many batches of the epoch were run before.
            total: The number of batches in the whole epoch on this rank; ``None`` if it is not known.
        """
        points = self._points
        if self._sync.uses_replica(phase):
            self._core.replica.prepare()
        batches = iter(source)
        first, total = self._agree_on_epoch(phase, batches, total)
        if first is END_OF_DATA:
            return
        batches = chain([first], batches)
        del first
        self._asks = total is None
        if total is None:
            fed = self._until_any_ends(phase, batches, done)
        else:  # no batch is taken early where the ranks must tell each other before whether they have one
            fed = iter(self._core.feed(batches, total - done))
        number = done
        while total is None or number < total:
            points.begin(NONE)
            try:
                raw = next(fed, END_OF_DATA)
            except BaseException as failure:
                if not points.knows(failure):
                    self._sync.fail_next(phase, failure, asks=self._asks)
                raise
            if raw is END_OF_DATA:
                if total is not None:
                    self._end_early(phase, number, total)
                return
            number += 1
            self._more = total is None or number < total
            self._sync.open_batch(phase)
            yield raw
            del raw

    @contextmanager
    def after_sync(self, phase: Phase) -> Generator[None]:
        """Give a context for the end of a training batch, behind its sync point.

        A cancel is kept for the next batch. The other ranks are told of an error at the sync point of that batch.
        """
        points = self._points
        try:
            yield
        except CancelException as cancel:
            if points.knows(cancel):
                raise
            points.late(cancel)
            if not self._more:
                raise
        except BaseException as failure:
            known = points.knows(failure)
            self._parts.miss(None if known else failure)
            if self._more and not known:
                self._sync.fail_next(phase, failure, asks=self._asks)
            raise

    def _end_early(self, phase: Phase, number: int, total: int) -> Never:
        """End the epoch on all ranks, since the loader of this rank has given fewer batches than it announced."""
        text = (
            f"The loader for {phase!r} has given {number} batches, and its length is at least {total}. Let its __len__ "
            f"return the number of batches that it gives, or raise a TypeError."
        )
        early = DataError(text) if self._uneven == "error" else CancelEpochException(text)
        self._sync.fail_next(phase, early, asks=self._asks)
        raise early

    def _agree_on_epoch(self, phase: Phase, source: Iterator[Any], total: int | None) -> tuple[Any, int | None]:
        """Return the first batch of this rank, and the number of batches that the epoch has on all ranks.

        Args:
            phase: The phase.
            source: The batches that are left in the epoch on this rank.
            total: As for `training`.

        Returns:
            The batch, `END_OF_DATA` if a rank has none; and the number, ``None`` if a rank does not know it.

        Raises:
            RankError: Two ranks have the same first batch, or different numbers of batches where that is not wanted.
        """
        held: list[Any] = []  # a list, so that nothing here keeps the batch while it is trained
        share = self._shares.get(phase)

        def draw() -> tuple[int | None, bool, tuple[str, ...] | None]:
            """Draw the first batch, and return what the other ranks must know of it."""
            held.append(next(source, END_OF_DATA))
            ended = held[0] is END_OF_DATA
            compares = not ended and share is not None and phase not in self._compared
            return total, ended, share.fingerprints(held[0]) if share is not None and compares else None

        found = self._points.share("the first batch", draw)
        what = f"The data for {phase!r}"
        agreed = agreed_length([each for each, _, _ in found], what, self._uneven)
        if any(ended for _, ended, _ in found):
            return END_OF_DATA, None
        compared = [each for _, _, each in found if each is not None]
        if share is not None and len(compared) == len(found):
            check_first_batches(compared, what, share)
        self._compared.add(phase)
        self._say(agreed.note)
        return held.pop(), agreed.most if agreed.certain else None

    def _until_any_ends(self, phase: Phase, source: Iterator[Any], number: int) -> Iterator[Any]:
        """Yield batches until any rank has no further one, which all ranks tell each other before each batch.

        Raises:
            RankError: One rank has ended and another has not, where that is not wanted.
        """
        points = self._points
        while True:
            held = [next(source, END_OF_DATA)]  # a list, so that nothing here keeps the batch while it is trained
            ended = held[0] is END_OF_DATA
            points.begin(MESSAGE)
            if points.ask(ended=ended, batch=False)[END]:
                if self._uneven == "error":
                    check_ends(points.world.exchange(ended), number, f"The data for {phase!r}")
                return
            number += 1
            yield held.pop()

    # --- an evaluation

    @contextmanager
    def evaluation(self, phase: Phase, source: Iterable[Any]) -> Generator[Iterable[Any]]:
        """Give a context with the batches of an evaluation, as many on each rank as its loader gives.

        Args:
            phase: The phase, for the text of errors.
            source: The batches that are left on this rank.
        """
        if self._sharded is None:
            yield self._until_signalled(source)
            return
        points = self._points
        try:
            with torch.no_grad():
                yield self._until_all_end(phase, iter(source), self._sharded)
        except BaseException as failure:
            if points.next:  # the failure comes from within a forward pass, and no batch was open
                points.fail(failure)
            if not points.knows(failure):
                points.begin(MESSAGE)
                raise points.fail(failure) from None
            raise
        finally:
            self._sharded.reset()

    def _until_signalled(self, source: Iterable[Any]) -> Iterator[Any]:
        """Yield batches until a signal has come to this rank."""
        for raw in source:
            yield raw
            if self._points.signalled:
                return

    def _until_all_end(self, phase: Phase, source: Iterator[Any], sharded: Sharded) -> Iterator[Any]:
        """Yield batches until no rank has a further one; meanwhile a rank without one gathers with the others.

        Raises:
            DataError: A rank has no batch at all, and the model has not been evaluated before.
        """
        points = self._points
        while True:
            raw = next(source, END_OF_DATA)
            ended = raw is END_OF_DATA
            points.begin(MESSAGE)
            sums = points.ask(ended=ended, unable=ended and not sharded.knows())
            if sums[END] == points.world.size or points.interrupted:
                return
            if sums[NO_BATCH]:
                raise DataError(
                    f"A rank has no batch for {phase!r}, and the model is sharded: it takes part in the forward passes "
                    f"of the other ranks as in those before, and there were none. Give each rank a batch at least."
                )
            sharded.begin_forward()
            if ended:
                sharded.finish_forward()
                continue
            points.expect(FORWARD)
            yield raw
            del raw
