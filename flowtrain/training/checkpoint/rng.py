"""The states of random number generators: the generators of the process, and the generators of loaders.

The process has the generators of Python, numpy and torch, and those of the accelerator under its type, as ``"cuda"``. A
loader has its own ``torch.Generator`` if the user gave one to the loader, its sampler or its dataset. A loader with
``state_dict()`` and ``load_state_dict()`` keeps a state of its own.

Worker processes have their own generators, seeded with a number that the loader draws when it starts them. A loader
with ``persistent_workers=True`` starts its workers once, so only its first pass draws that number.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

from flowtrain.data.loaders import keeps_position, own_state, set_own_state
from flowtrain.state.accelerator import accelerator_kind, random_states, set_random_states
from flowtrain.training.fit_data import loader_parts, unlimited

__all__ = [
    "hold_queues",
    "keeps_workers",
    "loader_state",
    "random_state",
    "restoring_loader",
    "set_loader_state",
    "set_random_state",
    "start_workers",
    "stop_workers",
]


def random_state() -> dict[str, Any]:
    """Return the states of the generators of the process, as tensors and plain values."""
    found: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state(), "numpy": None}
    numpy = sys.modules.get("numpy")  # a program that has not imported numpy has drawn no numbers from it
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        # As a tensor, because `torch.load(weights_only=True)` refuses arrays.
        found["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), *rest)
    kind = accelerator_kind()
    if kind is not None:
        found[kind] = random_states()
    return found


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators of the process to the states that `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"])
    numpy = sys.modules.get("numpy")
    if numpy is not None and state["numpy"] is not None:
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    set_random_states(state.get(accelerator_kind() or "", ()))  # the states of another kind of accelerator do not fit


def loader_state(loader: Any) -> dict[str, Any]:
    """Return the states of a loader's generators, the state that it keeps itself, and whether its workers run.

    The seeds of its `DistributedSampler` objects are part of it, because the order of a pass follows from them. For a
    loader that keeps its position, ``given`` is the number of batches of its pass up to there.
    """
    kept = unlimited(loader)
    return {
        "generators": [generator.get_state() for generator in _generators(loader)],
        "seeds": [sampler.seed for sampler in _distributed(loader)],
        "workers": any(_runs(part) for part in _persistent(loader)),
        "own": own_state(kept),
        "given": getattr(kept._iterator, "_num_yielded", 0) if keeps_position(kept) else 0,
    }


def set_loader_state(loader: Any, state: Mapping[str, Any], *, own: bool = True) -> None:
    """Set a loader to the state that `loader_state` returned; without `own`, all but the state that it keeps itself."""
    if own:  # before the generators, which this may draw from
        set_own_state(unlimited(loader), state["own"])
    # Not strict: a fit may resume with another loader, which has fewer generators or more.
    for generator, each in zip(_generators(loader), state["generators"], strict=False):
        generator.set_state(each)
    for sampler, seed in zip(_distributed(loader), state.get("seeds", ()), strict=False):  # early checkpoints lack them
        sampler.seed = seed


def keeps_workers(loader: Any) -> bool:
    """Tell whether the worker processes of a loader stay from one pass to the next."""
    return bool(_persistent(loader))


def start_workers(loader: Any, state: Mapping[str, Any]) -> None:
    """Start the persistent workers of a loader if they ran in `state`, so that its next pass does not start them.

    Call this before the generators are restored, because starting workers draws from them. The memory of the earlier
    workers is lost.

    Args:
        loader: The loader.
        state: The state that `loader_state` returned.
    """
    for part in _persistent(loader) if state.get("workers") else ():
        if not _runs(part) and not keeps_position(part):  # that one is begun with its state
            iter(part)  # a DataLoader starts its persistent workers when it is first iterated


def stop_workers(loader: Any, state: Mapping[str, Any]) -> None:
    """Stop the persistent workers of a loader if none ran in `state`, so that its next pass starts them, and draws.

    Args:
        loader: The loader.
        state: The state that `loader_state` returned.
    """
    for part in _persistent(loader) if not state["workers"] else ():
        # The iterator ends its workers when it is freed, and torch has no public way to it.
        part._iterator = None  # pyright: ignore[reportPrivateUsage]  # see above


_queues: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""The queues from which persistent workers are told to end, by the iterator that tells them."""


def hold_queues(loader: Any) -> None:
    """Let the persistent workers of a loader end at once if Python's garbage collector frees the loader.

    It frees a learner that was not closed together with its loaders, because a learner holds itself. If it frees a
    queue, the queue is closed first, so that the iterator cannot tell its workers to end any more, and waits 5 s for
    each of them. A reference from outside keeps the queues open until the iterator is gone.

    Args:
        loader: The loader, after a pass.
    """
    for part in _persistent(loader):
        iterator = getattr(part, "_iterator", None)
        queues = getattr(iterator, "_index_queues", None)  # without it the workers end too, only later
        if queues is not None:
            _queues[iterator] = queues


@contextmanager
def restoring_loader(loader: Any) -> Generator[None]:
    """Give a context in which a loader may be iterated, and after which training continues as if it had not been.

    The generators of the process and of the loader, and the loader's own position, are restored; persistent workers
    that were started in the context are stopped. Workers that ran before keep what they have drawn meanwhile.
    """
    before, state = random_state(), loader_state(loader)
    try:
        yield
    finally:
        stop_workers(loader, state)
        set_loader_state(loader, state)
        set_random_state(before)


def _distributed(loader: Any) -> list[torch.utils.data.DistributedSampler[Any]]:
    return [part for part in loader_parts(loader) if isinstance(part, torch.utils.data.DistributedSampler)]


def _persistent(loader: Any) -> list[torch.utils.data.DataLoader[Any]]:
    inside = (each for each in loader_parts(loader) if isinstance(each, torch.utils.data.DataLoader))
    return [each for each in inside if each.persistent_workers]


def _runs(loader: torch.utils.data.DataLoader[Any]) -> bool:
    return getattr(loader, "_iterator", None) is not None


def _generators(loader: Any) -> list[torch.Generator]:
    found: list[torch.Generator] = []
    for part in loader_parts(loader):
        generator = getattr(part, "generator", None)
        if isinstance(generator, torch.Generator) and all(generator is not each for each in found):
            found.append(generator)
    return found
