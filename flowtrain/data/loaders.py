"""Loaders: several at once (`CombinedLoader`), limited ones, their lengths, and the checks that an object is a loader.

A loader is any iterable of batches. `CombinedLoader` gives one batch of each of several loaders in every step::

    loader = CombinedLoader({"labelled": few, "unlabelled": many}, mode="max_size_cycle")
    for raw in loader:
        raw["labelled"], raw["unlabelled"]  # a batch of each

A fit that resumes repeats the passes of all loaders, as it does for a single one: it begins them again with the random
numbers of the interrupted epoch, and drops the batches that were done. A loader that is begun again in the middle of an
epoch must not draw its order from the generators of the process, because the model has drawn from them meanwhile, and
does not do so while batches are dropped. So each such pass is begun with numbers of its own, which are seeded when the
epoch begins.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, Final, Literal, TypeAlias

import torch

from flowtrain.errors import DataError, UsageError
from flowtrain.errors.describing import describe

__all__ = [
    "DATA_EXAMPLE",
    "END_OF_DATA",
    "CombinedLoader",
    "LimitedLoader",
    "check_iterable",
    "empty",
    "is_array",
    "keeps_position",
    "length",
    "make_loader",
    "own_state",
    "set_own_state",
]

DATA_EXAMPLE = "data=(train_loader, valid_loader), or data={TrainingPhase: a, ValidationPhase: b}"
"""How loaders are passed to a learner, for messages."""

_Mode: TypeAlias = Literal["min_size", "max_size_cycle"]

END_OF_DATA: Final = object()
"""Stands for the batch that a loader does not have any more, since a batch may be ``None``."""


class CombinedLoader:
    """A loader that gives one batch of each of several loaders in every step.

    A batch is a mapping with the names of the loaders, or a tuple, as the loaders are passed. `len` is known if the
    lengths of all loaders are.

    Args:
        loaders: The loaders by name, or a sequence of them.
        mode: ``"min_size"`` ends an epoch with the shortest loader; ``"max_size_cycle"`` ends it with the longest one,
            and begins each shorter loader again as often as needed, shuffled anew if it shuffles.

    Attributes:
        loaders: The loaders, as they were passed.
        mode: The mode.

    Raises:
        UsageError: `mode` has another value, or `loaders` is neither a mapping nor a sequence.
        DataError: There is no loader, or one of them is a tensor, a dataset, not iterable, or has the length 0. In an
            epoch: a loader gives no batch, or an iterator, which cannot be begun again, has ended.

    >>> loader = CombinedLoader({"a": [1, 2, 3], "b": "xy".split("|")}, mode="max_size_cycle")
    >>> len(loader), list(loader)[-1]
    (3, {'a': 3, 'b': 'xy'})
    """

    def __init__(
        self,
        loaders: Mapping[str, Iterable[Any]] | Sequence[Iterable[Any]],
        mode: _Mode = "min_size",
    ) -> None:
        if mode not in ("min_size", "max_size_cycle"):
            raise UsageError(
                f'CombinedLoader(mode={mode!r}): mode is "min_size", which ends an epoch with the shortest loader, or '
                f'"max_size_cycle", which ends it with the longest one and begins the others again.'
            )
        if not isinstance(loaders, (Mapping, list, tuple)):
            raise UsageError(
                f"CombinedLoader({describe(loaders)}) takes several loaders: a mapping, such as "
                f'{{"labelled": one, "unlabelled": other}}, or a tuple (one, other).'
            )
        if not loaders:
            raise DataError("CombinedLoader has no loader. Pass a mapping of names to loaders, or a tuple of them.")
        self.loaders = loaders
        self.mode: _Mode = mode
        for name, loader in self.named():
            check_iterable(loader, f"The loader {name!r} of CombinedLoader")
            if length(loader) == 0:
                raise DataError(empty(f"{name!r} of CombinedLoader", loader))

    def named(self) -> list[tuple[Any, Iterable[Any]]]:
        """Return the loaders, each with its name or its place."""
        return list(self.loaders.items() if isinstance(self.loaders, Mapping) else enumerate(self.loaders))

    def over(self, loaders: Sequence[Iterable[Any]]) -> CombinedLoader:
        """Return a `CombinedLoader` that draws from these loaders instead, in the same order."""
        names = [name for name, _ in self.named()]
        named = dict(zip(names, loaders, strict=True))
        return CombinedLoader(named if isinstance(self.loaders, Mapping) else loaders, self.mode)

    def __len__(self) -> int:
        lengths = [length(loader) for _, loader in self.named()]
        known = [each for each in lengths if each is not None]
        if len(known) < len(lengths):
            unknown = ", ".join(repr(name) for name, loader in self.named() if length(loader) is None)
            raise TypeError(
                f"CombinedLoader does not know its length, because the length of {unknown} is not known. Iterate it "
                f"without len(), or give that loader a __len__."
            )
        return min(known) if self.mode == "min_size" else max(known)

    def __iter__(self) -> Iterator[Any]:
        named = self.named()
        seeds = torch.Generator()
        # One number is drawn from the process for an epoch, and the further passes of shorter loaders draw from a
        # generator of their own: how many there are changes no number of training.
        if self.mode == "max_size_cycle":
            seeds.manual_seed(_draw(None))
        for _, loader in named:
            _set_round(loader, 0)
        passes = [iter(loader) for _, loader in named]
        # Which loaders have ended is kept for the whole epoch: it is over when each has been passed through once.
        ended: set[int] = set()
        rounds = [0] * len(named)
        first = True
        while True:
            batch: list[Any] = []
            for place, (name, loader) in enumerate(named):
                batch.append(next(passes[place], END_OF_DATA))
                if batch[place] is END_OF_DATA:
                    if first:
                        raise DataError(empty(f"{name!r} of CombinedLoader", loader))
                    if self.mode == "min_size":
                        return
                    ended.add(place)
            if len(ended) == len(named):
                return
            for place, (name, loader) in enumerate(named):
                if batch[place] is END_OF_DATA:
                    rounds[place] += 1
                    passes[place], batch[place] = _again(name, loader, _draw(seeds), rounds[place])
            first = False
            yield dict(zip(self.loaders, batch, strict=True)) if isinstance(self.loaders, Mapping) else tuple(batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the loaders that keep their own position, and ``None`` for the others."""
        return {"loaders": [own_state(loader) for _, loader in self.named()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        for (_, loader), each in zip(self.named(), state["loaders"], strict=False):
            set_own_state(loader, each)

    def __repr__(self) -> str:
        return f"CombinedLoader({', '.join(str(name) for name, _ in self.named())}; {self.mode})"


def _draw(generator: torch.Generator | None) -> int:
    """Draw a seed from a generator, or for ``None`` from that of the process."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator))


def _again(name: Any, loader: Iterable[Any], seed: int, number: int) -> tuple[Iterator[Any], Any]:
    """Begin pass `number` of a loader in the middle of an epoch; return its iterator and its first batch."""
    _set_round(loader, number)
    with _seeded(seed):  # a loader draws its order when the first batch is taken
        batches = iter(loader)
        batch = next(batches, END_OF_DATA)
    if batch is not END_OF_DATA:
        return batches, batch
    if batches is loader:
        raise DataError(
            f"The loader {name!r} of CombinedLoader ({type(loader).__name__}) has ended before the longest one, and it "
            f'is an iterator, which cannot be begun again. Pass a list or a DataLoader, or mode="min_size".'
        )
    raise DataError(empty(f"{name!r} of CombinedLoader", loader))


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    """Give a context in which the generators of torch, Python and numpy are seeded; restore them after it."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng(devices=()):
        try:
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            if numpy is not None:
                numpy.random.seed(seed & 0xFFFFFFFF)  # numpy takes 32 bits only
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numbers)


def _set_round(loader: Any, number: int) -> None:
    """Tell a loader of several ranks how often it has been begun again in this epoch, since its order follows from it.

    Any other loader shuffles anew with the random numbers of the pass.
    """
    sampler: Any = loader.sampler if isinstance(loader, torch.utils.data.DataLoader) else None
    while type(sampler) is torch.utils.data.BatchSampler:
        sampler = sampler.sampler
    setter = getattr(sampler, "set_round", None)
    if setter is not None:
        setter(number)


def keeps_position(loader: Any) -> bool:
    """Tell whether a loader is a ``StatefulDataLoader`` of torchdata, which continues after its last batch."""
    module = sys.modules.get("torchdata.stateful_dataloader")
    return module is not None and isinstance(loader, module.StatefulDataLoader)


def own_state(loader: Any) -> Any:
    """Return the state that a loader keeps itself; ``None`` if it keeps none, or keeps one and was not begun yet."""
    if not _is_stateful(loader):
        return None
    # Before its first pass torchdata's loader would begin one for this, and draw random numbers.
    if keeps_position(loader) and loader._iterator is None:
        return loader.next_iter_state
    return loader.state_dict()


def set_own_state(loader: Any, state: Any, *, within: bool = False) -> None:
    """Restore the state that `own_state` returned. The generators of the process are restored after this.

    Args:
        loader: The loader. It is not changed if it keeps no state.
        state: The state. ``None`` makes torchdata's loader one that was not begun yet.
        within: Whether the next iterator of torchdata's loader continues the pass, instead of beginning one.
    """
    if keeps_position(loader):
        loader.load_state_dict(state or {})
        if state is not None:
            loader.state_dict()  # makes the iterator now, which draws random numbers: the next pass must not draw them
            if not within and not state["_iterator_finished"]:
                iter(loader)  # the pass was left before its end, and the run began a new one after it
    elif state is not None and _is_stateful(loader):
        loader.load_state_dict(state)


def _is_stateful(loader: Any) -> bool:
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


class LimitedLoader:
    """The first batches of a loader, in every pass. All other attributes are those of the loader.

    A loader that does not know its length, such as one over a stream, is taken to have as many batches as the limit
    allows, so that a fit over it has a length.

    Args:
        loader: The loader.
        most: The greatest number of batches in a pass.
    """

    def __init__(self, loader: Any, most: int) -> None:
        self.loader, self.most = loader, most

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.loader), self.most)

    def __len__(self) -> int:
        known = length(self.loader)
        return self.most if known is None else min(known, self.most)

    def __getattr__(self, name: str) -> Any:
        if name == "loader" or name.startswith("__"):  # a copy asks for these before it has a loader
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __repr__(self) -> str:
        return f"LimitedLoader({self.loader!r}, {self.most})"


def length(loader: object) -> int | None:
    """Return the number of batches in a loader, or ``None`` if the loader does not know it for certain."""
    if isinstance(loader, LimitedLoader):
        return len(loader)
    if isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset):
        return None  # a DataLoader divides the length that the dataset claims; with workers it may give more batches
    try:
        return len(loader)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # no __len__: TypeError
    except (TypeError, NotImplementedError):
        return None


def empty(which: str, loader: object) -> str:
    """Return the message for a loader that gives no batch; `which` says which loader it is, behind the word."""
    text = f"The loader {which} ({type(loader).__name__}) gives no batch."
    # An iterator is the most usual cause: an earlier fit or a look at a batch has used it up.
    if isinstance(loader, Iterator):
        return f"{text} It is an iterator, used up after one pass: pass a list, a DataLoader, or another iterable."
    return f"{text} Is the dataset empty, or smaller than one batch with drop_last=True?"


def check_iterable(loader: Any, what: str, call: str = DATA_EXAMPLE) -> None:
    """Check that an object can be a loader of batches.

    Args:
        loader: The object.
        what: The subject of the message.
        call: How a loader is passed, for the message.

    Raises:
        DataError: `loader` is a tensor, an array, a dataset, a text, or not iterable.
    """
    # A tensor can be iterated, row by row, so without this check each sample would pass for a batch.
    if is_array(loader):
        raise DataError(f"{what} is {describe(loader)}, not a loader of batches. {make_loader(loader, call=call)}")
    if isinstance(loader, torch.utils.data.Dataset) and not isinstance(loader, torch.utils.data.IterableDataset):
        raise DataError(
            f"{what} is a {type(loader).__name__}, a dataset of single samples. "
            f"Make batches of it: DataLoader(dataset, batch_size=32)."
        )
    # Python iterates an object that has __getitem__ alone as well, so a sequence of batches in a class is a loader.
    if isinstance(loader, (str, bytes)) or not (isinstance(loader, Iterable) or hasattr(type(loader), "__getitem__")):
        raise DataError(f"{what} is {describe(loader)}, not a loader of batches. Pass {call}.")


def is_array(value: object) -> bool:
    """Tell whether a value is a tensor or an array, and so no loader."""
    # The attributes tell an array of numpy or another library, none of which flowtrain needs to import.
    return isinstance(value, torch.Tensor) or all(hasattr(value, name) for name in ("__array__", "shape", "dtype"))


def make_loader(*arrays: object, call: str = DATA_EXAMPLE) -> str:
    """Return the remedy for tensors or arrays that are passed where a loader belongs; `call` is how it is passed."""
    names = ("inputs", "targets")
    if not all(isinstance(array, torch.Tensor) for array in arrays):
        names = ("torch.as_tensor(inputs)", "torch.as_tensor(targets)")
    made = f"DataLoader(TensorDataset({', '.join(names)}), batch_size=32)"
    return f"Make batches of {'it' if len(arrays) == 1 else 'them'}: {made}, and pass {call}."
