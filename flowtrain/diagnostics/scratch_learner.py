"""Copies for a trial run: of a learner's parts, of its first batches, and of the states of random number generators.

A trial run must not change training. It runs within `same_rng`. A whole fit runs on a `scratch_learner`, with `copies`
of the parts of a learner and its `first_batches`. A single forward pass runs on a copy of one batch (`first_batch`) and
a copy of the model that shares its parameters (`shared_copy`), so that the model's buffers do not change.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset

from flowtrain.callback.access import Write
from flowtrain.callback.callback import Callback
from flowtrain.core.devices import to_device
from flowtrain.core.torch_core import TorchCore
from flowtrain.data.loaders import CombinedLoader, LimitedLoader
from flowtrain.errors import UsageError
from flowtrain.graph.registry import Callbacks
from flowtrain.logging.records import Identity, collecting
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain.state.shards import is_sharded
from flowtrain.training.checkpoint.rng import random_state, restoring_loader, set_random_state
from flowtrain.training.loop import Loop

__all__ = [
    "CannotLook",
    "LearnerParts",
    "copied",
    "copies",
    "first_batch",
    "first_batches",
    "on_device_of",
    "readable_copy",
    "same_rng",
    "scratch_learner",
    "shared_copy",
]


class LearnerParts(Protocol):
    """The part of `flowtrain.Learner` that diagnostics use; the class itself is in a layer above this package."""

    state: LearnerState
    core: TorchCore
    loop: Loop

    def __scratch__(
        self, model: Any, lossfn: Any, *, data: PhaseMap[Any], optimizer: Any, core: TorchCore
    ) -> LearnerParts:
        """Return a learner of these parts without callbacks."""
        ...

    @property
    def stopped(self) -> BaseException | None:
        """The exception that ended the last fit early, or ``None``."""

    def fit(self, epochs: int | None = None, *, steps: int | None = None) -> Any:
        """Train, as `flowtrain.Learner.fit` does."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


@contextmanager
def scratch_learner(
    learner: LearnerParts,
    parts: tuple[Any, Any, Any],
    data: PhaseMap[Any],
    build: Callable[[LearnerState], Callbacks],
    core: TorchCore | None = None,
) -> Generator[LearnerParts]:
    """Give a learner for a trial run, which is closed after the context.

    A fit of it writes no record and no checkpoint: requests of handlers have no effect, and a callback that knows that
    it runs in a trial (`flowtrain.logging.records.identity`) leaves its files alone. It does not warn of data without a
    training phase.

    Args:
        learner: The learner of the user.
        parts: Copies of its model, loss function and optimizer.
        data: The loader of each phase.
        build: A function that makes the callbacks of the new learner from its state.
        core: The core of the new learner; by default one with the settings of the user's.
    """
    model, lossfn, optimizer = parts
    made = learner.__scratch__(model, lossfn, data=data, optimizer=optimizer, core=core or learner.core.like())
    with made as scratch, warnings.catch_warnings(), collecting(Identity("a trial run", "", 0), None):
        warnings.filterwarnings("ignore", r"fit\(\) has no training phase")
        # The learner was made without callbacks, which `Learner` would give logging backends that are open.
        callbacks = build(scratch.state)
        scratch.state.callbacks = callbacks
        scratch.loop.dispatch.use(callbacks)
        scratch.loop.dispatch.carry_out_requests()
        # A learner finds from its callbacks whether one of them reads the norm, and this one was made without them.
        scratch.core.need_grad_norm(True)
        yield scratch


def copies(learner: LearnerParts, callback: Callback, who: str) -> tuple[Callback, Any, Any, Any, list[Callback]]:
    """Return copies of a callback, the model, the loss function, the optimizer, and the learner's other callbacks.

    Other callbacks of the same type are left out, and those that write no state, because they would print or write
    files a second time.

    Args:
        learner: The learner.
        callback: The callback.
        who: The call of the user, as the subject of the message.

    Raises:
        UsageError: One of the objects cannot be copied.
    """
    others = [
        node.callback
        for node in learner.state.callbacks.nodes
        if type(node.callback) is not type(callback)
        and any(isinstance(kind, Write) and path[0] != "resource" for path, kind in node.union)
    ]
    model, lossfn, optimizer, (subject, *others) = copied(learner, [callback, *others], who)
    return subject, model, lossfn, optimizer, others


def copied(learner: LearnerParts, callbacks: Iterable[Callback], who: str) -> tuple[Any, Any, Any, list[Callback]]:
    """Return copies of the model, the loss function, the optimizer and callbacks.

    The objects are copied together, so two copies share an object if their originals do.

    Args:
        learner: The learner.
        callbacks: The callbacks.
        who: The call of the user, as the subject of the message: ``"learner.dry_run()"``.

    Raises:
        UsageError: One of the objects cannot be copied.
    """
    state = learner.state
    if any(is_sharded(param) for module in by_name(state.model).values() for param in module.parameters()):
        raise UsageError(
            f"{who} works on copies, and a model that is sharded over several processes cannot be copied. Try it with "
            f"a small model that is not sharded: TorchCore(parallel=None)."
        )
    try:
        return copy.deepcopy((state.model, state.lossfn, state.optimizer, list(callbacks)), {id(state): state})
    except Exception as error:
        raise UsageError(
            f"{who} works on copies, and an object of the learner cannot be copied: {type(error).__name__}: {error}. "
            f"Open files and connections in setup or at FitBegin, not in __init__."
        ) from error


def _copy_of(raw: Any, what: str, who: str) -> Any:
    try:
        return copy.deepcopy(raw)
    except Exception as error:
        raise UsageError(
            f"{who} works on copies, and {what} cannot be copied: {type(error).__name__}: {error}. Let the loader give "
            f"tensors and plain values."
        ) from error


def first_batches(data: PhaseMap[Any], who: str) -> PhaseMap[Any]:
    """Return a copy of the first batch of each phase, in a list that serves as a loader.

    Phases without a batch are left out. The loaders, the random numbers and the workers do not change.

    Args:
        data: The loader of each phase.
        who: The call of the user, as the subject of the message.

    Raises:
        UsageError: There are no loaders, one of them can be iterated only once, or a batch cannot be copied.
    """
    if not data:
        raise UsageError(f"{who} needs a batch of data. Pass data= to Learner.")
    found: PhaseMap[Any] = PhaseMap("data")
    for phase, loader in data.items():
        if isinstance(loader, Iterator):
            raise UsageError(
                f"The data for {phase!r} is an iterator: {who} would use up its first batch. Pass a list, a "
                f"DataLoader, or anything that can be iterated again."
            )
        try:
            source = readable_copy(loader)
        except CannotLook:
            source = loader
        with restoring_loader(source):
            for raw in source:
                found[phase] = [_copy_of(raw, f"the first batch of {phase!r}", who)]
                break
    return found


@contextmanager
def same_rng() -> Generator[None]:
    """Restore the generators of torch, Python, numpy and the accelerator after the context."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)


M = TypeVar("M")


class CannotLook(Exception):
    """A trial run would change training: a loader would lose the batch, or an object cannot be copied."""


def first_batch(loader: Any) -> list[Any]:
    """Return a list with a copy of the first batch of a loader; an empty list if the loader has no batch.

    Raises:
        CannotLook: As for `readable_copy`.
    """
    return copy.deepcopy(list(islice(readable_copy(loader), 1)))


def readable_copy(loader: Any) -> Iterable[Any]:
    """Return an iterable over the batches of a loader that training does not notice if it runs within `same_rng`.

    Only sequences can be read without a change for training, and a `torch.utils.data.DataLoader` of a dataset with
    indices, which is read in this process and with copies of its samplers.

    Raises:
        CannotLook: `loader` is another one, or combines another one, or its samplers cannot be copied.
    """
    if isinstance(loader, LimitedLoader):
        return LimitedLoader(readable_copy(loader.loader), loader.most)
    if isinstance(loader, CombinedLoader):
        return loader.over([readable_copy(each) for _, each in loader.named()])
    if isinstance(loader, Sequence):  # a handler sees the read-only twin of a list, which is a sequence too
        return loader
    if not isinstance(loader, DataLoader):
        raise CannotLook(f"a {type(loader).__name__} may lose the batches that are taken from it before training")
    if isinstance(loader.dataset, IterableDataset):
        raise CannotLook("an IterableDataset may lose the batches that are taken from it before training")
    return _separate(loader)


def _separate(loader: DataLoader[Any]) -> Iterable[Any]:
    """Return a loader that gives the same batches, with copies of samplers and generators, and without workers."""
    other = copy.copy(loader)
    names = ("batch_sampler", "generator", "sampler")
    try:
        # Copy them together, because they share a generator. The dataset is not copied, because it may be large.
        parts = copy.deepcopy({name: vars(loader)[name] for name in names}, {id(loader.dataset): loader.dataset})
    except Exception as error:
        raise CannotLook(f"its samplers cannot be copied: {type(error).__name__}: {error}") from error
    vars(other).update(parts, num_workers=0, timeout=0, _iterator=None)  # `DataLoader.__setattr__` refuses a sampler
    return other


def shared_copy(module: M) -> M:
    """Return a copy of a module that shares its parameters; buffers and other attributes are copied.

    A forward pass of the copy does not change the module. An object that is no module is returned as it is.

    Raises:
        CannotLook: An attribute of the module cannot be copied.
    """
    if not isinstance(module, torch.nn.Module):
        return module
    # A lazy parameter is copied, because the forward pass gives it a shape.
    shared = {id(param): param for param in module.parameters() if not is_lazy(param)}
    try:
        return copy.deepcopy(module, shared)
    except Exception as error:
        raise CannotLook(f"it cannot be copied: {type(error).__name__}: {error}") from error


def on_device_of(data: Any, modules: Sequence[torch.nn.Module]) -> Any:
    """Return the data on the device of the first parameter or buffer of the modules."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            return to_device(data, tensor.device)
    return data
