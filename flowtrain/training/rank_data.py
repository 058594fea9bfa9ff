"""The data of one of several ranks: its share of each loader, and the batches of an epoch, as many as on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch

from flowtrain.callback.phases import AbstractValidationPhase, Phase
from flowtrain.data.loaders import END_OF_DATA
from flowtrain.data.rank_batches import agreed_length, check_ends
from flowtrain.data.rank_loaders import LoaderDivider, Share, check_first_batches
from flowtrain.errors import raise_worst
from flowtrain.state.by_phase import PhaseMap
from flowtrain.training.ranks import END, Ranks
from flowtrain.training.scopes import Scopes

__all__ = ["RankData"]

_logger = logging.getLogger("flowtrain")


class RankData:
    """Divides the loaders of one learner among the ranks, and ends each training epoch with the same batch on all.

    Args:
        ranks: The sync points.
        scopes: The open scopes.
        uneven: What happens if the ranks have different numbers of batches, as for `TorchCore`.

    Attributes:
        known: Whether all ranks know the number of batches of the present epoch.
        compared: The phases whose first batch was compared with those of the other ranks in this fit.
    """

    def __init__(self, ranks: Ranks, scopes: Scopes, uneven: Literal["stop", "error"]) -> None:
        world = ranks.world
        self.known = True
        self.compared: set[Phase] = set()
        self._ranks, self._scopes = ranks, scopes
        self._uneven: Literal["stop", "error"] = uneven
        self._divider = LoaderDivider(world.rank, world.size, world.exchange(torch.initial_seed() % 2**32)[0])
        self._shares: dict[Phase, Share] = {}
        self._said: set[str] = set()

    def divided(self, data: PhaseMap[Any]) -> PhaseMap[Any]:
        """Return the loaders of this rank, and tell the user once, on the main rank, how they are divided."""
        found: PhaseMap[Any] = PhaseMap("data")
        for phase, loader in data.items():
            training = not isinstance(phase, AbstractValidationPhase)
            self._shares[phase] = share = self._divider.of(loader, f"The data for {phase!r}", training=training)
            found[phase] = share.loader
            for note in share.notes:
                self._say(note)
        return found

    def _say(self, line: str) -> None:
        """Write a line for the user, once, on the main rank; an empty line is none."""
        if line and self._ranks.world.main and line not in self._said:
            self._said.add(line)
            _logger.warning(line)  # a level that Python shows without any setting

    def agree_on_epoch(self, phase: Phase, source: Iterator[Any], total: int | None) -> tuple[Any, int | None]:
        """Return the first batch of this rank, and the number of batches that the epoch has on all ranks.

        Args:
            phase: The phase.
            source: The batches that are left in the epoch on this rank.
            total: The number of batches in the whole epoch on this rank; ``None`` if it is not known.

        Returns:
            The batch, `END_OF_DATA` if a rank has none; and the number, ``None`` if a rank does not know it.

        Raises:
            RankError: Two ranks have the same first batch, or different numbers of batches where that is not wanted.
        """
        failures: list[BaseException] = []
        first: list[Any] = [END_OF_DATA]
        fingerprints: tuple[str, ...] | None = None
        share = self._shares.get(phase)
        try:
            first[0] = next(source, END_OF_DATA)
            if first[0] is not END_OF_DATA and share is not None and phase not in self.compared:
                fingerprints = share.fingerprints(first[0])
        except BaseException as failure:
            failures.append(failure)
        found = self._ranks.meet("the first batch", failures, (total, first[0] is END_OF_DATA, fingerprints))
        if failures:
            raise_worst(failures)
        what = f"The data for {phase!r}"
        agreed = agreed_length([each for each, _, _ in found], what, self._uneven)
        self.known = agreed.certain
        if any(ended for _, ended, _ in found):
            return END_OF_DATA, None
        marks = [each for _, _, each in found if each is not None]
        if share is not None and len(marks) == len(found):
            check_first_batches(marks, what, share)
        self.compared.add(phase)
        self._say(agreed.note)
        return first.pop(), agreed.most if agreed.certain else None

    def until_any_ends(self, phase: Phase, source: Iterator[Any]) -> Iterator[Any]:
        """Yield batches until any rank has no further one, which all ranks tell each other before each batch.

        Raises:
            RankError: One rank has ended and another has not, where that is not wanted.
        """
        ranks, number = self._ranks, self._scopes.batch_number
        while True:
            held = [next(source, END_OF_DATA)]  # a list, so that nothing here keeps the batch while it is trained
            ranks.begin_batch("flags")
            flags = ranks.flags(batch=False)
            flags[END] = int(held[0] is END_OF_DATA)
            sums = ranks.world.sum(flags)
            ranks.join(sums, None)
            if sums[END]:
                if self._uneven == "error":
                    check_ends(ranks.world.exchange(held[0] is END_OF_DATA), number, f"The data for {phase!r}")
                return
            number += 1
            yield held.pop()
