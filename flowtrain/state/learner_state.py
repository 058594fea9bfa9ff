"""The learner's state: the objects that handlers can see, and the queues of the events and checkpoints they ask for.

The learner, the loop, the core and the compiled views share one `LearnerState`. State that can change between two reads
of a handler is replaced as a whole (`batch`); state that callbacks share has a read-only twin beside it
(`flowtrain.state.namespace`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

from flowtrain.callback.phases import Phase
from flowtrain.data.nested import Attribute
from flowtrain.errors.describing import nearest
from flowtrain.state.arrivals import Arrivals
from flowtrain.state.batch import BatchState, ReadOnlyBatch
from flowtrain.state.by_phase import PhaseMap, adopt
from flowtrain.state.container import Freezer, Tree, declared_items
from flowtrain.state.namespace import State
from flowtrain.state.optimizer_view import OptimizerParts
from flowtrain.state.random_numbers import CallbackSeeds
from flowtrain.state.readonly import readonly

__all__ = ["LearnerState", "Named", "by_name"]


class Named(Mapping[str, Any]):
    """Several models or optimizers by name: ``learner.model.gen`` and ``learner.model["gen"]`` are the same."""

    def __init__(self, what: str, members: Mapping[str, Any]) -> None:
        self.__dict__.update(members)
        self.__dict__["_what"] = what
        self.__dict__["_members"] = dict(members)

    def __getitem__(self, name: str) -> Any:
        try:
            return self._members[name]
        except KeyError:
            # Still a KeyError, with a better text: `Mapping.get` and ``in`` catch no other error.
            raise KeyError(self._unknown(name)) from None

    def __getattr__(self, name: str) -> Any:
        # An object that is being made has no `_members` yet, and `_unknown` would look for them without an end.
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(self._unknown(name))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self._what}.{name} cannot be replaced; pass the {self._what}s to Learner.")

    @cached_property
    def __twins__(self) -> Named:
        return Named(self._what, {name: readonly(each, f"{self._what}.{name}") for name, each in self.items()})

    def __frozen__(self, freezer: Freezer, inside: Tree | None = None) -> Named | dict[str, Any]:
        """Return a copy of the members: a `Named`, or a plain dict if only some are declared."""
        declared = declared_items(self, inside)
        members = {name: freezer.part(self[name], below, Attribute(name)) for name, below in declared}
        return Named(self._what, members) if inside is None else members

    def __reduce__(self) -> tuple[Any, ...]:
        return Named, (self._what, dict(self))

    def _unknown(self, name: str) -> str:
        return (
            f"there is no {self._what} {name!r}; the learner has: {', '.join(self._members)}."
            f"{nearest(name, self._members)}"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __repr__(self) -> str:
        return f"Named({self._what}: {', '.join(self._members)})"


def by_name(value: Any) -> dict[str, Any]:
    """Return models or optimizers by name; one that is not in a `Named` has the empty name."""
    return dict(value) if isinstance(value, Named) else {"": value}


class LearnerState:
    """The objects that a learner trains, those that its handlers can be given, and the requests of handlers.

    Attributes:
        arrivals: The late writes of handlers that have not arrived.
        model: The user's module, or a `Named` of several.
        lossfn: The loss function, a callable or module.
        optimizer: The user's optimizer, or a `Named` of several.
        optimizers: The same as handlers see it, with ``hyperparams`` and ``state`` apart.
        data: Loaders by phase.
        params: Parameters by name, read-only as a mapping.
        batch: The current batch.
        batch_twin: Its read-only twin for handlers with `Read`; the batch itself while it holds only tensors.
        cbstate: The namespace that callbacks share.
        callbacks: The learner's callbacks.
        draws: The seeds of the random numbers that deferrable callbacks draw.
        fired: Events that handlers of the current event asked to fire next, each with the name of the callback.
        requests: Checkpoints that handlers of the current event asked for, each with the name of the callback.
        updates: How many updates of optimizers the learner has made.
        lag: After how many batches a value of the device is read; 0 where reading does not wait.
        rank: The number of this process among those that train together, from 0.
        world_size: The number of processes that train together.
    """

    __slots__ = (
        "arrivals", "batch", "batch_twin", "callbacks", "cbstate", "data", "draws", "fired", "lag", "lossfn", "model",
        "optimizer", "optimizers", "params", "rank", "requests", "updates", "world_size",
    )  # fmt: skip

    def __init__(self) -> None:
        self.model: Any = None
        self.lossfn: Any = None
        self.optimizer: Any = None
        self.optimizers: Any = None
        self.data: PhaseMap[Any] = PhaseMap("data")
        self.params: Mapping[str, Any] = {}
        self.batch: BatchState = BatchState()
        self.batch_twin: BatchState | ReadOnlyBatch = self.batch
        self.cbstate = State("cbstate")
        self.arrivals = Arrivals(self.cbstate)
        self.callbacks: Any = ()
        self.draws = CallbackSeeds()
        self.fired: list[tuple[str, Any]] = []
        self.requests: list[tuple[str, Any]] = []
        self.lag = self.rank = 0
        self.world_size = 1
        self.updates = 0

    def hand_over(self) -> LearnerState:
        """Return another state with all that this one holds; nothing is left in this one.

        Views, plans and executors refer to this state, and it refers to them. The other state is in no such cycle, so
        the objects of a closed learner are freed with it at once, without the garbage collector.
        """
        other = LearnerState()
        for name in self.__slots__:
            setattr(other, name, getattr(self, name))
        self.__init__()  # type: ignore[misc]  # empty, as it was made
        return other

    def use_optimizers(self, optimizers: Mapping[str, Any], named: Callable[[], Mapping[str, Any]]) -> None:
        """Set `optimizer`, and `optimizers`, which views show: the same ones, without a way to the parameters.

        Args:
            optimizers: The optimizers by name; a single one has the empty name.
            named: A function that returns the parameters by name.
        """
        if "" in optimizers:
            self.optimizer, self.optimizers = optimizers[""], OptimizerParts(optimizers[""], named=named)
        else:
            parts = {name: OptimizerParts(each, f"optimizer.{name}", named) for name, each in optimizers.items()}
            self.optimizer, self.optimizers = Named("optimizer", optimizers), Named("optimizer", parts)

    def adopt(self, phase: Phase) -> None:
        """Let a phase have the loader and the values that another phase of its name has (`by_phase.adopt`)."""
        found: list[Any] = [self.data, *vars(self.cbstate).values()]
        for each in found:
            if isinstance(each, PhaseMap):
                adopt(phase, each)
            elif isinstance(each, State):
                found += vars(each).values()

    def show(self, batch: BatchState) -> None:
        """Make `batch` the current one, with a twin, because it may come to hold containers."""
        self.batch = batch
        self.batch_twin = ReadOnlyBatch(batch)
