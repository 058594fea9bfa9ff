"""Loaders of several ranks: each rank gets its share of the samples of a `torch.utils.data.DataLoader`.

A *rank* is one of the processes that run one training together. Every rank builds the same loaders, and `LoaderDivider`
makes the loaders that this rank uses of them. It divides the indices of a sampler where that is certain to be right::

    loader                                       training                        evaluation
    a DataLoader with a sampler of torch         its share, equally many         its share, each sample once
    the same with a `DistributedSampler`         as it is                        each sample once
    a `CombinedLoader`, a `LimitedLoader`        the loaders inside              the loaders inside
    any other loader                             as it is, and checked           as it is, and checked

How many samples an epoch has: with ``n`` samples and ``size`` ranks, every rank trains on ``ceil(n / size)`` samples.
The first samples of the order come twice, so that the numbers are equal. With ``drop_last=True`` it is
``n // size`` samples, and the rest is left out. In evaluation a rank has the samples ``rank``, ``rank + size`` and so
on of the order: no sample comes twice, ranks may have different numbers of samples and batches, and a rank has none if
there are fewer samples than ranks. The batch size is that of each rank, as the loader has it.

The order of a shuffled loader follows from a seed and the number of the pass, because all ranks must divide the same
order. It draws nothing from the generators of the process, which may differ between the ranks. A pass that is repeated
with the same number has the same order.

A loader that is used as it is may give all ranks the same samples. So `Share.fingerprints` and `check_first_batches`
compare the first batches of the ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from flowtrain.data.loaders import CombinedLoader, LimitedLoader, length
from flowtrain.data.rank_batches import fingerprint
from flowtrain.errors import DataError, RankError
from flowtrain.errors.arguments import is_whole

__all__ = ["LoaderDivider", "RankSampler", "Share", "check_first_batches", "without_share"]

_DIVISIBLE = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
"""The samplers of torch that draw from their own generator only. A subclass may draw from anything."""


_STRIDE = 1_000_003
"""The distance of the seeds of two rounds within a pass: more than there are passes, and within the 32 bits in use."""


class RankSampler(DistributedSampler[int]):
    """The share of one rank in the indices of a sampler, in an order that is the same on all ranks.

    For a `SequentialSampler` or a `RandomSampler` in training the indices are those of a `DistributedSampler` with the
    same seed. The number of samples is asked anew in each pass, since a dataset may grow between epochs.

    Args:
        source: A sampler of torch whose indices are divided.
        rank: The rank, from 0.
        size: The number of ranks.
        seed: The number from which, with the number of the pass, a shuffled order follows.
        even: Whether all ranks get equally many indices. Otherwise no index is repeated or left out.
        drop_last: Whether the last indices are left out where ranks must get equally many. Otherwise the first indices
            of the order come twice.
    """

    def __init__(self, source: Any, rank: int, size: int, seed: int, *, even: bool, drop_last: bool = False) -> None:
        super().__init__(source, size, rank, not isinstance(source, SequentialSampler), seed, drop_last)
        self.source, self.even, self._round = source, even, 0

    def share_of(self, rank: int) -> int:
        """Return the number of indices that a rank gets; rank 0 gets the most."""
        count = len(self.source)
        if not self.even:
            return len(range(rank, count, self.num_replicas))
        return count // self.num_replicas if self.drop_last else ceil(count / self.num_replicas)

    def set_epoch(self, epoch: int) -> None:
        """Set the number of the pass, from which a shuffled order follows."""
        super().set_epoch(epoch)
        self._round = 0

    def set_round(self, number: int) -> None:
        """Set how often the loader has been begun again within this pass, so that it is shuffled anew each time."""
        self._round = number

    def __len__(self) -> int:
        return self.share_of(self.rank)

    def __iter__(self) -> Iterator[int]:
        indices = list(self._ordered())
        if self.even:
            total = self.share_of(0) * self.num_replicas
            indices = (indices * ceil(total / max(len(indices), 1)))[:total]
        return iter(indices[self.rank :: self.num_replicas])

    def _ordered(self) -> Any:
        """Return the sampler with the generator of this pass."""
        if not self.shuffle:
            return self.source
        weights = getattr(self.source, "weights", None)
        generator = torch.Generator("cpu" if weights is None else weights.device)
        generator.manual_seed(self.seed + self.epoch + self._round * _STRIDE)
        source = copy.copy(self.source)
        source.generator = generator
        return source


@dataclass(frozen=True)
class Share:
    """The loader that one rank uses.

    Attributes:
        loader: The loader of this rank; the user's own loader if it is used as it is.
        notes: Lines for the user that say how each loader is divided.
        remedy: What to write if the loader gives all ranks the same samples; empty if that is impossible.
        least: The smallest number of batches that a rank gets; ``None`` if it is not known.
        inner: For a `CombinedLoader` the shares of its loaders, by name or place.
        divided: The samples that all ranks divide, as a text, which must be the same on all of them.
    """

    loader: Any
    notes: tuple[str, ...] = ()
    remedy: str = ""
    least: int | None = None
    inner: tuple[tuple[Any, Share], ...] = ()
    divided: str = "batches of its own"

    @property
    def whole(self) -> str:
        """The samples that all ranks divide, as a text; for a `CombinedLoader` those of each of its loaders."""
        return ", ".join(f"{name}: {share.whole}" for name, share in self.inner) or self.divided

    def fingerprints(self, raw: Any) -> tuple[str, ...]:
        """Return the fingerprints of the parts of a batch that may be the same on all ranks.

        Args:
            raw: A batch of the loader.

        Returns:
            A fingerprint for each loader that is used as it is, none for the loaders that were divided, so that all
            ranks with the same loaders have equally many.
        """
        if self.inner:
            return tuple(each for name, share in self.inner for each in share.fingerprints(raw[name]))
        return (fingerprint(raw),) if self.remedy else ()

    def remedies(self) -> list[str]:
        """Return the remedy for each of the `fingerprints`."""
        if self.inner:
            return [each for _, share in self.inner for each in share.remedies()]
        return [self.remedy] if self.remedy else []


class LoaderDivider:
    """Makes the loaders of one rank, and makes each of them once, so that persistent workers stay from fit to fit.

    Args:
        rank: The rank, from 0.
        size: The number of ranks.
        seed: As for `RankSampler`; the same on all ranks.

    >>> from torch.utils.data import DataLoader
    >>> ranks = [LoaderDivider(rank, 2, seed=0) for rank in (0, 1)]
    >>> shares = [rank.of(DataLoader(range(5)), "The data", training=False) for rank in ranks]
    >>> [[int(batch) for batch in share.loader] for share in shares]
    [[0, 2, 4], [1, 3]]
    """

    def __init__(self, rank: int, size: int, seed: int) -> None:
        self.rank, self.size, self.seed = rank, size, seed
        self._made: dict[bool, WeakKeyDictionary[Any, Share]] = {True: WeakKeyDictionary(), False: WeakKeyDictionary()}

    def of(self, loader: Any, what: str, *, training: bool) -> Share:
        """Return the share of this rank in a loader.

        Args:
            loader: The loader, as all ranks have it.
            what: The subject of notes and messages, such as ``"The data for TrainingPhase()"``.
            training: Whether the loader is for training. Otherwise no sample comes twice.

        Raises:
            DataError: The sampler is for another rank or another number of ranks, no rank would get a batch, or one
                loader of a `CombinedLoader` has no batch for one of the ranks.
        """
        if isinstance(loader, LimitedLoader):
            share = self.of(loader.loader, what, training=training)
            return replace(share, loader=LimitedLoader(share.loader, loader.most))
        if not isinstance(loader, (CombinedLoader, DataLoader)):
            return self._as_it_is(loader, f"{what} is a {type(loader).__name__}, which", _PLAIN)
        made = self._made[training]
        if loader in made:
            return made[loader]
        if isinstance(loader, CombinedLoader):
            share = self._of_combined(loader, what, training)
        else:
            share = self._of_loader(loader, what, training)
        if share.loader is not loader:  # otherwise the entry would keep its own key
            made[loader] = share
        return share

    def _of_combined(self, loader: CombinedLoader, what: str, training: bool) -> Share:
        inner = [(name, self.of(each, f"{what}, loader {name!r},", training=training)) for name, each in loader.named()]
        for name, share in inner:
            if share.least == 0:
                raise DataError(
                    f"{what}: the loader {name!r} of CombinedLoader has too few samples to give each of {self.size} "
                    f"ranks a batch. Use fewer ranks, or pass it as the data of a phase of its own."
                )
        notes = tuple(note for _, share in inner for note in share.notes)
        return Share(loader.over([share.loader for _, share in inner]), notes, inner=tuple(inner))

    def _of_loader(self, loader: DataLoader[Any], what: str, training: bool) -> Share:
        if isinstance(loader.dataset, IterableDataset):
            return self._as_it_is(loader, f"{what} reads a {type(loader.dataset).__name__}, a stream, which", _STREAM)
        index: Any = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
        divided = self._divide(index, what, training, drop_last=False)
        if divided is None:
            name = type(_innermost(index)).__name__
            return self._as_it_is(loader, f"{what} has a sampler of its own, a {name}, which", _SAMPLER)
        if divided is index:
            return Share(loader)
        made, sampler = copy.copy(loader), _innermost(divided)
        # `DataLoader` refuses the assignment of a sampler, because its iterators would keep the old one. The copy has
        # no iterator yet, and as a copy it has all other attributes, also those of a subclass.
        vars(made).update(sampler=sampler, _iterator=None)
        vars(made)["sampler" if loader.batch_sampler is None else "batch_sampler"] = divided
        most, least = (_batches(divided, sampler.share_of(rank)) for rank in (0, self.size - 1))
        if not most:
            raise DataError(
                f"{what} ({type(loader).__name__}) gives no batch on any of {self.size} ranks: each of them gets at "
                f"most {sampler.share_of(0)} of {len(sampler.source)} samples, and a batch with drop_last=True has "
                f"{divided.batch_size}. Use fewer ranks, a smaller batch_size, or drop_last=False."
            )
        divided = f"{len(sampler.source)} samples of a {type(sampler.source).__name__}"
        return Share(made, (_note(what, sampler, most, least),), least=least, divided=divided)

    def _divide(self, sampler: Any, what: str, training: bool, drop_last: bool) -> Any:
        """Return the sampler of this rank, which may be `sampler` itself; ``None`` if it cannot be divided."""
        if type(sampler) is BatchSampler:
            inner = self._divide(sampler.sampler, what, training, sampler.drop_last)
            if inner is None:
                return None
            return sampler if inner is sampler.sampler else BatchSampler(inner, sampler.batch_size, sampler.drop_last)
        size, rank = getattr(sampler, "num_replicas", None), getattr(sampler, "rank", None)
        if is_whole(size) and is_whole(rank):
            if (size, rank) != (self.size, self.rank):
                raise DataError(
                    f"{what} has a {type(sampler).__name__} with num_replicas={size}, rank={rank}, and this is rank "
                    f"{self.rank} of {self.size}. Leave the sampler out, and flowtrain puts one in; or write "
                    f"num_replicas=torch.distributed.get_world_size(), rank=torch.distributed.get_rank()."
                )
            # A subclass may divide in another way, so only the samplers known here are replaced.
            if training or type(sampler) not in (DistributedSampler, RankSampler) or not _repeats(sampler):
                return sampler
            source = sampler.source if isinstance(sampler, RankSampler) else _source(sampler)
            return RankSampler(source, self.rank, self.size, sampler.seed, even=False)
        if type(sampler) in _DIVISIBLE:
            return RankSampler(sampler, self.rank, self.size, self.seed, even=training, drop_last=drop_last)
        return None

    def _as_it_is(self, loader: Any, why: str, remedy: str) -> Share:
        remedy = remedy.format(size=self.size)
        note = f"{why} flowtrain cannot divide: each of {self.size} ranks uses it whole. {remedy}"
        return Share(loader, (note,), remedy)


_RANK = "with rank = torch.distributed.get_rank()"
_PLAIN = (
    "Pass a DataLoader over a dataset, which flowtrain divides; or let each rank have batches of its own, such as "
    f"batches[rank::{{size}}] {_RANK}."
)
_STREAM = (
    "Let the dataset give each rank samples of its own, such as itertools.islice(samples, rank, None, {size}) "
    f"{_RANK}."
)
_SAMPLER = (
    "Let the sampler give each rank indices of its own, such as indices[rank::{size}] "
    f"{_RANK}, or use a sampler of torch."
)


def _innermost(sampler: Any) -> Any:
    """Return the sampler inside of batch samplers of torch."""
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return sampler


def _batches(sampler: Any, samples: int) -> int:
    """Return how many items a sampler gives if the sampler inside of its batches gives this many indices."""
    if type(sampler) is not BatchSampler:
        return samples
    inner = _batches(sampler.sampler, samples)
    return inner // sampler.batch_size if sampler.drop_last else ceil(inner / sampler.batch_size)


def _repeats(sampler: DistributedSampler[Any]) -> bool:
    """Tell whether a sampler gives some samples twice, so that all ranks have equally many."""
    count: int = len(sampler.dataset)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # it is sized
    return len(sampler) * sampler.num_replicas > count and not (isinstance(sampler, RankSampler) and not sampler.even)


def _source(sampler: DistributedSampler[Any]) -> Any:
    """Return a sampler of one process with the order of a `DistributedSampler`."""
    dataset: Any = sampler.dataset
    return RandomSampler(dataset) if sampler.shuffle else SequentialSampler(dataset)


def _note(what: str, sampler: RankSampler, most: int, least: int) -> str:
    """Return the line that tells what each rank gets."""
    count, size = len(sampler.source), sampler.num_replicas
    first, last = sampler.share_of(0), sampler.share_of(size - 1)
    samples, batches = (
        f"{high}" if high == low else f"{low} or {high}" for high, low in ((first, last), (most, least))
    )
    text = f"{what}: a DistributedSampler gives each of {size} ranks {samples} of {count} samples, in {batches} batches"
    more = first * size - count if sampler.even else 0
    if more > 0:
        text += f"; the first {more} of an epoch come twice, so that the ranks have equally many"
    if more < 0:
        text += f"; the last {-more} of an epoch are left out (drop_last=True)"
    return f"{text}."


def without_share(loader: Any) -> bool:
    """Tell whether a loader is one of several ranks, and has no batch on this rank, because others have all samples."""
    return length(loader) == 0 and isinstance(_innermost(getattr(loader, "sampler", None)), RankSampler)


def check_first_batches(fingerprints: Sequence[Sequence[str]], what: str, share: Share) -> None:
    """Check that no two ranks got the same first batch.

    Args:
        fingerprints: The `Share.fingerprints` of the first batch of each rank, in the order of the ranks.
        what: The subject of the message, such as ``"The data for TrainingPhase()"``.
        share: The share of one of the ranks.

    Raises:
        RankError: Two ranks got the same batch.
    """
    for remedy, each in zip(share.remedies(), zip(*fingerprints, strict=True), strict=True):
        for rank, print_ in enumerate(each):
            if print_ and print_ in each[:rank]:
                raise RankError(
                    f"{what} gives ranks {each.index(print_)} and {rank} the same first batch, so they would compute "
                    f"the same gradients. {remedy}"
                )
