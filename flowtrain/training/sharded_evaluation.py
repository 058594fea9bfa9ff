"""The evaluation of a sharded model, in which all ranks take part in each forward pass, whatever data they have.

A forward pass of a sharded model gathers the parameters from all ranks. So an evaluation has a sync point before each
batch, at which every rank says whether it has one. A rank that has no further batch gathers with the others and
computes nothing, until no rank has one: no sample is left out, and no rank waits for one that is ready.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from flowtrain.callback.phases import Phase
from flowtrain.core.sharding import Sharded
from flowtrain.core.torch_core import TorchCore
from flowtrain.data.loaders import END_OF_DATA
from flowtrain.errors import CancelBatchException, DataError
from flowtrain.graph.executor import Mailbox
from flowtrain.training.loop import LEFT_OPEN
from flowtrain.training.rank_steps import RankSteps
from flowtrain.training.ranks import END, NO_BATCH, Ranks
from flowtrain.training.scopes import Scopes

__all__ = ["ShardedEvaluation"]


class ShardedEvaluation:
    """Evaluates the sharded model of one learner, on one of several ranks.

    Args:
        ranks: The sync points.
        parallel: The sharded model.
        core: The core of the learner.
        scopes: The open scopes.
        steps: Runs batches.
        mailbox: The mailbox of the training thread, which is emptied after each batch.
    """

    def __init__(
        self,
        ranks: Ranks,
        parallel: Sharded,
        core: TorchCore,
        scopes: Scopes,
        steps: RankSteps,
        mailbox: Mailbox,
    ) -> None:
        self._ranks, self._parallel, self._core = ranks, parallel, core
        self._scopes, self._steps, self._mailbox = scopes, steps, mailbox

    def run(self, phase: Phase, batches: Iterable[Any], most: int | None) -> None:
        """Run the batches of an epoch of evaluation, as many on each rank as its loader gives.

        Args:
            phase: The phase.
            batches: The batches that are left on this rank.
            most: The most batches that the whole epoch may have on this rank; ``None`` for no limit.

        Raises:
            DataError: As for `batches`.
        """
        scopes, step = self._scopes, self._steps.step_of(phase)
        with self.telling(phase):
            left = None if most is None else most - scopes.batch_number
            fed = self._core.feed(islice(batches, left), None)
            for raw in self.batches(phase, iter(fed)):
                scopes.batch_number += 1
                try:
                    step(raw)
                    if scopes.batch:
                        raise CancelBatchException(LEFT_OPEN)
                except BaseException as failure:
                    self._steps.cancel_batch(phase, failure, CancelBatchException)
                if self._mailbox.calls:
                    self._mailbox.empty()
                del raw

    def batches(self, phase: Phase, source: Iterator[Any]) -> Iterator[Any]:
        """Yield batches until no rank has a further one; meanwhile a rank without one gathers with the others.

        Args:
            phase: The phase, for the text of the error.
            source: The batches of this rank.

        Raises:
            DataError: A rank has no batch at all, and the model has not been evaluated before.
        """
        ranks, parallel = self._ranks, self._parallel
        while True:
            raw = next(source, END_OF_DATA)
            ranks.begin_batch("")
            mine = ranks.flags()
            mine[END] = int(raw is END_OF_DATA)
            mine[NO_BATCH] = int(raw is END_OF_DATA and not parallel.knows())
            sums = ranks.world.sum(mine)
            ranks.join(sums, None)
            if sums[END] == ranks.world.size or ranks.interrupted:
                return
            if sums[NO_BATCH]:
                raise DataError(
                    f"A rank has no batch for {phase!r}, and the model is sharded: it takes part in the forward passes "
                    f"of the other ranks as in those before, and there were none. Give each rank a batch at least."
                )
            parallel.begin_forward()
            if raw is END_OF_DATA:
                parallel.gather_rest()
                continue
            ranks.next_sync = "forward"
            yield raw
            del raw

    @contextmanager
    def telling(self, phase: Phase) -> Generator[None]:
        """Give a context for an evaluation, which tells the other ranks of a failure at their next sync point in it."""
        ranks, steps = self._ranks, self._steps
        try:
            with torch.no_grad():
                yield
        except BaseException as failure:
            if ranks.next_sync:  # the failure comes from within a forward pass, and no batch was open
                steps.tell(phase, failure)
            if not ranks.knows(failure):
                ranks.begin_batch("flags")
                raise steps.tell(phase, failure) from None
            raise
        finally:
            self._parallel.reset()
