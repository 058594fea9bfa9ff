"""What a dry run works on: copies of a learner and of its first batches, and random numbers that come back.

Trying things before training: the first batch of a loader, and a model that a forward pass does not change.

Whoever tries something enters `untouched`, takes a batch with `first_batch`, and runs a `borrowed` copy of the model.
Then the model, its buffers, the loader and the random numbers are what they were.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

import torch
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset

from flowtrain.callback.access import Write
from flowtrain.callback.callback import Callback
from flowtrain.core.core import TorchCore
from flowtrain.core.devices import place
from flowtrain.errors import UsageError
from flowtrain.graph.nodes import Node
from flowtrain.graph.registry import Callbacks
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.learner_state import LearnerState, Named
from flowtrain.training.loop import Loop

__all__ = [
    "CannotLook",
    "LearnerParts",
    "borrowed",
    "copies",
    "first_batch",
    "first_batches",
    "on_device_of",
    "same_random_numbers",
    "untouched",
]


class LearnerParts(Protocol):
    """What is used of a learner, and how another one is made of its type; both lie in a later layer."""

    state: LearnerState
    core: TorchCore
    loop: Loop

    def __init__(
        self,
        model: Any,
        lossfn: Any,
        *,
        data: PhaseMap[Any],
        optimizer: Any,
        callbacks: Sequence[Callback],
        default_callbacks: Literal[False],
        core: TorchCore,
    ) -> None: ...

    def fit(self, epochs: int | None = None, *, steps: int | None = None) -> Any:
        """Train, as `flowtrain.Learner.fit` does."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def copies(learner: LearnerParts, callback: Callback) -> tuple[Callback, Any, Any, Any, list[Callback]]:
    """Return copies of the callback, the model, the loss function, the optimizer, and the callbacks around it.

    They are copied together, so what they share they share again.

    Raises:
        UsageError: Something cannot be copied.
    """
    state = learner.state
    others = [
        other
        for other in state.callbacks
        # Those that only consume would print or write files once more.
        if type(other) is not type(callback)
        and any(isinstance(kind, Write) and path[0] != "resource" for path, kind in _node_of(state, other).union)
    ]
    models = dict(state.model) if isinstance(state.model, Named) else state.model
    optimizers = dict(state.optimizer) if isinstance(state.optimizer, Named) else state.optimizer
    try:
        subject, model, lossfn, optimizer, others = copy.deepcopy(
            (callback, models, state.lossfn, optimizers, others), {id(state): state}
        )
    except Exception as error:
        raise UsageError(
            f"The dry run works on copies, and something cannot be copied: {type(error).__name__}: {error}. Open "
            f"files and connections in setup or at FitBegin, not in __init__."
        ) from error
    return subject, model, lossfn, optimizer, others


def _node_of(state: LearnerState, callback: Callback) -> Node:
    callbacks: Callbacks = state.callbacks
    return next(node for node in callbacks.nodes if node.callback is callback)


def first_batches(data: PhaseMap[Any]) -> PhaseMap[Any]:
    """Return, for each phase, a list of the loader's first batch; a loader without one is left out.

    Raises:
        UsageError: There are no loaders, or one can be gone through only once.
    """
    if not data:
        raise UsageError("The dry run needs a batch of data. Pass data= to Learner.")
    found: PhaseMap[Any] = PhaseMap("data")
    for phase, loader in data.items():
        if isinstance(loader, Iterator):
            raise UsageError(
                f"The data for {phase!r} is an iterator: the dry run would use up its first batch. Pass a list, a "
                f"DataLoader, or anything that can be iterated again."
            )
        for raw in loader:
            found[phase] = [raw]
            break
    return found


@contextmanager
def same_random_numbers() -> Generator[None]:
    """Put the states of torch's, Python's and numpy's generators back."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None else None
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(numbers)


M = TypeVar("M")

untouched = same_random_numbers
"""The context of a trial: torch's, Python's and numpy's random numbers go on afterwards as if it had not been."""


class CannotLook(Exception):
    """To take a batch from this loader would change what training gets from it; the message says why."""


def first_batch(loader: Any) -> list[Any]:
    """Return a list of a copy of the first batch that a loader may give; an empty one where it gives none.

    Looked into are sequences and a `torch.utils.data.DataLoader` of a dataset with indices, in this process and
    with copies of its samplers.

    Raises:
        CannotLook: Any other loader; and one whose samplers cannot be copied.
    """
    if isinstance(loader, Sequence):  # handlers are shown a twin of a list
        return copy.deepcopy(list(islice(loader, 1)))
    if not isinstance(loader, DataLoader):
        raise CannotLook(f"a {type(loader).__name__} is asked for batches by training alone")
    if isinstance(loader.dataset, IterableDataset):
        raise CannotLook("an IterableDataset may lose what it gives")
    return copy.deepcopy(list(islice(_beside(loader), 1)))


def _beside(loader: DataLoader[Any]) -> Iterable[Any]:
    """Return a loader that gives what this one would, with samplers and generators of its own and no workers."""
    other = copy.copy(loader)
    names = ("batch_sampler", "generator", "sampler")
    try:
        # Together, since the samplers and the loader share a generator. The dataset stays: it may be large.
        parts = copy.deepcopy({name: vars(loader)[name] for name in names}, {id(loader.dataset): loader.dataset})
    except Exception as error:
        raise CannotLook(f"its samplers cannot be copied: {type(error).__name__}: {error}") from error
    vars(other).update(parts, num_workers=0, timeout=0, _iterator=None)  # its own __setattr__ refuses a sampler
    return other


def borrowed(module: M) -> M:
    """Return a copy of a module that shares its parameters; buffers and other attributes are copies.

    A forward pass changes nothing of the original then. What is no module is returned as it is.

    Raises:
        CannotLook: Something in it cannot be copied.
    """
    if not isinstance(module, torch.nn.Module):
        return module
    shared = {id(param): param for param in module.parameters() if not is_lazy(param)}  # a lazy one would be made
    try:
        return copy.deepcopy(module, shared)
    except Exception as error:
        raise CannotLook(f"it cannot be copied: {type(error).__name__}: {error}") from error


def on_device_of(data: Any, modules: Sequence[torch.nn.Module]) -> Any:
    """Return data on the device of the first parameter or buffer."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            return place(data, tensor.device)
    return data
