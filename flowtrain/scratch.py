"""What a dry run works on: copies of a learner and of its first batches, and random numbers that come back."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch

from flowtrain.access import Write
from flowtrain.callback import Callback
from flowtrain.core import TorchCore
from flowtrain.errors import UsageError
from flowtrain.graph import Node
from flowtrain.loop import Loop
from flowtrain.phasemap import PhaseMap
from flowtrain.registry import Callbacks
from flowtrain.state import LearnerState, Named

__all__ = ["LearnerParts", "copies", "first_batches", "same_random_numbers"]


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

    def fit(self, epochs: int) -> None:
        """Train: every phase of the data once for each epoch."""


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
