"""Several ranks as threads of one process: they meet at a barrier for each exchange."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from flowtrain import Callback, Event, Phase, TrainingPhase
from flowtrain.core.torch_core import TorchCore
from flowtrain.core.world import World
from flowtrain.errors import RemoteError
from flowtrain.graph.executor import Executor
from flowtrain.graph.registry import Callbacks
from flowtrain.graph.serial import SerialExecutor
from flowtrain.graph.shared_state import Peers
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import TinyModel, TinySite

T = TypeVar("T")


class Meeting:
    """The exchanges of some ranks. Values are pickled, as between processes, so that no rank changes those of others.

    Attributes:
        count: How many exchanges there were.
    """

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        self.size = size
        self.count = 0
        self._barrier = threading.Barrier(size, timeout=timeout)
        self._read = threading.Barrier(size, timeout=timeout)
        self._sent = [b""] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Return the values of all ranks, when every rank has called this."""
        self._sent[rank] = pickle.dumps(value)
        if self._barrier.wait() == 0:
            self.count += 1
        found = [pickle.loads(each) for each in self._sent]
        self._read.wait()  # the next exchange must not replace a value that a slow rank has not read yet
        return found

    def peers(self, rank: int, *, sharded: bool = False) -> Peers:
        """Return the processes as one rank sees them."""
        return Peers(rank, self.size, lambda value: self.exchange(rank, value), sharded)

    def run(self, function: Callable[[Peers], T], *, sharded: bool = False) -> list[T | BaseException]:
        """Call a function on every rank, with the processes as that rank sees them. See `each`."""
        return self.each(lambda rank: function(self.peers(rank, sharded=sharded)))

    def each(self, function: Callable[[int], T]) -> list[T | BaseException]:
        """Call a function with the number of every rank; return the result or the exception of each rank.

        A rank that ends with an exception makes no further exchange, so that the others end with a
        ``BrokenBarrierError`` if they wait for it.
        """
        results: list[Any] = [None] * self.size

        def run(rank: int) -> None:
            """Call the function on one rank."""
            try:
                results[rank] = function(rank)
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()  # not the other one: ranks may still be on their way out of it

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class MetWorld(World):
    """The world of one rank in a `Meeting`, whose messages are those of threads.

    Args:
        meeting: The exchanges.
        rank: The number of this rank.
    """

    def __init__(self, meeting: Meeting, rank: int) -> None:  # not that of `World`, which needs a process group
        self.rank, self.size = rank, meeting.size
        self.main, self.lost = rank == 0, False
        self._meeting = meeting

    def exchange(self, value: Any) -> list[Any]:
        """Return the values of all ranks; raise a `RemoteError` if another rank has ended, now or before."""
        if self.lost:
            raise RemoteError("an exchange has failed before", ())
        try:
            return self._meeting.exchange(self.rank, value)
        except threading.BrokenBarrierError as error:
            self.lost = True
            raise RemoteError("another rank has ended", ()) from error

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Return the sums over all ranks."""
        return [sum(each) for each in zip(*self.exchange(list(numbers)), strict=True)]


@dataclass
class Rank:
    """One rank: the state of its learner, its callbacks, and an executor that runs them.

    Attributes:
        peers: The processes.
        callbacks: The callbacks, built.
        state: The state.
        site: The stand-in for the loop, which records the failures of handlers.
        executor: The executor.
    """

    peers: Peers
    callbacks: Callbacks
    state: LearnerState
    site: TinySite
    executor: Executor
    runners: dict[tuple[type[Event], type[Phase]], Any] = field(default_factory=dict)

    def fire(self, event: Event, phase: Phase | None = None, **batch: Any) -> None:
        """Fire an event, with entries of the batch, and raise the first failure of a handler."""
        phase = TrainingPhase() if phase is None else phase
        for name, value in batch.items():
            setattr(self.state.batch, name, value)
        self.state.show(self.state.batch)
        key = (type(event), type(phase))
        if key not in self.runners:
            plan = self.callbacks.plan(*key)
            self.runners[key] = self.executor.compile(plan) if len(plan) else None
        if self.runners[key] is not None:
            self.runners[key](event, phase)
        if self.site.failures:
            _, failure = self.site.failures[0]
            self.site.failures.clear()
            raise failure

    def shared(self) -> Mapping[str, Any]:
        """Return the state that must be the same on every rank, for comparison."""
        assert self.callbacks.shared is not None
        local = self.callbacks.shared.local
        entries = {name: value for name, value in vars(self.state.cbstate).items() if name not in local}
        groups = [{**group, "params": None} for group in self.state.optimizer.param_groups]
        tensors = {name: param.detach().clone() for name, param in self.state.params.items()}
        return {"cbstate": entries, "groups": groups, "params": tensors}


def no_exchange(value: Any) -> list[Any]:
    """Stand for an exchange where none is expected."""
    raise AssertionError("nothing is exchanged when callbacks are built")


def made_state(model: torch.nn.Module | None = None) -> LearnerState:
    """Return the state of a learner with a model, by default a `TinyModel`, and an optimizer."""
    state = LearnerState()
    state.model = TinyModel() if model is None else model
    state.lossfn = torch.nn.functional.mse_loss
    TorchCore(device="cpu").attach(state, lambda params: torch.optim.SGD(params, lr=0.1))
    return state


def build(
    callbacks: Sequence[Callback],
    peers: Peers,
    executor: Callable[[], Executor] = SerialExecutor,
    model: torch.nn.Module | None = None,
) -> Rank:
    """Build callbacks on one rank, in a training phase.

    Args:
        callbacks: The callbacks of this rank.
        peers: The processes.
        executor: Makes the executor.
        model: The model; by default a `TinyModel`.
    """
    site = TinySite()
    state = site.state = made_state(model)
    made = Callbacks(callbacks, state, (TrainingPhase,), peers=peers)
    site.nodes = made.running
    runs = executor()
    runs.check(made.running, state)
    runs.bind(site)
    return Rank(peers, made, state, site, runs)
