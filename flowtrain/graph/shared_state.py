"""Several ranks: which state is the same on all of them, which callbacks run where, and which the build refuses.

A *rank* is one of several processes that train one model together, each with batches of its own. The first one is the
*main rank*. State is *shared* if it is the same on every rank, such as the model, or *local*, such as the batch.
`SharedState` knows this for every path: it begins with a table, and finds out the rest from the declarations. An entry
of ``cbstate`` is local if a callback that writes it reads local state.

Shared state must stay the same on every rank, so `check_ranks` refuses callbacks that would change it on one rank
alone. What it accepts needs no trust: a callback that makes shared state of local values declares an exchange of them
(`flowtrain.graph.exchange`), in which every rank takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from flowtrain.callback.access import WHOLE, Declaration, Path, Read, Write, collective, dotted
from flowtrain.callback.callback import Callback
from flowtrain.callback.conditions import EverySeconds
from flowtrain.callback.events import (
    BackwardEnd,
    BatchCancelled,
    BatchEnd,
    EpochBegin,
    EpochCancelled,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.callback.handler import Handler, is_bundled_event
from flowtrain.callback.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase, has_bundled_step
from flowtrain.errors import CallbackError, RankError
from flowtrain.graph.nodes import Node, Order

__all__ = [
    "Peers",
    "SharedState",
    "check_exchange_events",
    "check_ranks",
    "exchanges_of",
    "ranks_of",
    "runs_here",
]


@dataclass(frozen=True)
class Peers:
    """The processes of one training, as one of them sees them.

    Attributes:
        rank: The number of this process, from 0; process 0 is the main rank.
        size: The number of processes.
        exchange: A function that sends a small value to all ranks, and returns the values of all ranks in their order,
            the same on every rank. It waits until every rank has called it.
        sharded: Whether each rank holds only a part of each parameter.
        in_batch: The events of a training batch at which all ranks have agreed that the batch takes place, so that
            they can exchange values. Before, one rank alone may leave the batch.
    """

    rank: int
    size: int
    exchange: Callable[[Any], list[Any]]
    sharded: bool = False
    in_batch: tuple[type[Event], ...] = (BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd)

    @property
    def main(self) -> bool:
        """Whether this process is the main rank."""
        return self.rank == 0


class _RunsOn(NamedTuple):
    """The ranks that run the handlers of a callback, and the reason in words."""

    ranks: Literal["every", "main"]
    why: str


def ranks_of(node: Node) -> _RunsOn:
    """Return the ranks on which the handlers of a callback run, and why.

    Raises:
        CallbackError: `Callback.ranks` is neither ``"every"``, ``"main"`` nor ``None``.
    """
    said: object = node.callback.ranks
    if said in ("every", "main"):
        return _RunsOn("every" if said == "every" else "main", f"it says ranks = {said!r}")
    if said is not None:
        raise CallbackError(
            f"{node.name}.ranks is {said!r}. It is 'every' or 'main', the ranks that run the handlers, or None: then a "
            f"callback that writes no state runs on the main rank only."
        )
    written = [dotted(path) for path, kind in node.union if isinstance(kind, Write) and path[0] != "resource"]
    if node.callback.may_checkpoint:
        return _RunsOn("every", "it may request checkpoints")
    if not written:
        return _RunsOn("main", "it writes no state")
    more = f" and {len(written) - 1} more" if len(written) > 1 else ""
    return _RunsOn("every", f"it writes {written[0]}{more}")


def runs_here(node: Node, peers: Peers | None) -> bool:
    """Tell whether the handlers of a callback run in this process."""
    return peers is None or peers.main or ranks_of(node).ranks == "every"


_LOCAL: dict[Path, str] = {
    ("batch",): "each rank has a batch of its own",
    ("data",): "each rank loads other data",
    ("callbacks",): "the attributes of callbacks are those of one rank",
    ("resource", "rng"): "each rank draws other random numbers",
    ("cbstate", "metrics_step"): "each rank has metrics of its own batches",
    ("cbstate", "smooth_loss"): "each rank has a batch of its own",
    ("cbstate", "tracehistory"): "each rank traces its own batches",
}
"""The local state, with the reason for each path. Some gradients are shared, see `SharedState.why_local`."""

_SHARED_ENTRIES = ("history", "hyperparams", "metrics_epoch")
"""The entries of ``cbstate`` that the bundled callbacks keep the same on every rank."""

_UPDATED = (UpdateBegin, UpdateEnd)
"""Events at which the gradients are those of all ranks: before, they may be those of an unfinished group."""

_MERGED = (EpochEnd, FitEnd)
"""Events before which the loop calls `Callback.merge_ranks`, so that the measurements are those of all ranks."""


class _Source(NamedTuple):
    """Local state that a callback reads, and why it is local."""

    path: str
    why: str


class SharedState:
    """Which state is the same on every rank, by the declarations of the callbacks of a learner.

    Args:
        nodes: The callbacks.

    Attributes:
        local: The local entries of ``cbstate`` that the callbacks make, each with the reason.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes
        self.local: dict[str, str] = {}
        self._entries = {
            path[1] for node in nodes for _, path, _ in _accesses(node) if path[0] == "cbstate" and len(path) > 1
        }
        while any(self._spread(node) for node in nodes):  # until no further entry is found to be local
            pass

    def _spread(self, node: Node) -> bool:
        """Note that the entries that a callback writes are local if it reads local state; tell whether any is new."""
        source = next(iter(self.sources(node)), None)
        if source is None:
            return False
        before = len(self.local)
        for handler, path, kind in _accesses(node):
            if isinstance(kind, Write) and not kind.broadcast and path[0] == "cbstate" and not _merges(node, handler):
                for entry in self._entries if len(path) == 1 else path[1:2]:
                    if entry not in _SHARED_ENTRIES and ("cbstate", entry) not in _LOCAL:
                        self.local.setdefault(entry, f"{node.name} writes it and reads {source.path}")
        return len(self.local) > before

    def why_local(self, path: Path, event_type: type[Event] = Event) -> str:
        """Return why the state at a path differs between ranks; empty if it is the same on every rank.

        Args:
            path: The path.
            event_type: The event at which the state is read: gradients are local until all ranks have theirs.
        """
        if path[:2] == ("batch", "grad_norm") or (path[:2] == ("batch", "grads") and issubclass(event_type, _UPDATED)):
            return ""
        if path == ("cbstate",):
            whys = [self.why_local(("cbstate", entry)) for entry in sorted(self._entries)]
            return next(filter(None, whys), "")
        if path[0] == "cbstate" and path[1] in self.local:
            return self.local[path[1]]
        return next((why for local, why in _LOCAL.items() if path[: len(local)] == local), "")

    def sources(self, node: Node) -> list[_Source]:
        """Return the local state that the handlers of a callback read, its clock included; nothing if it agrees."""
        if type(node.callback).agrees:
            return []
        found = [
            _Source(dotted(path), why)
            for handler, path, kind in _accesses(node)
            if not (isinstance(kind, Read) and collective(kind))
            if (why := self.why_local(path, handler.event_type))
        ]
        if any(isinstance(condition, EverySeconds) for condition in node.callback.conditions):
            found.append(_Source("the clock of throttle(seconds=...)", "each rank has a clock of its own"))
        return list(dict.fromkeys(found))

    def writes_shared(self, node: Node) -> Iterator[tuple[Handler, Path, Write]]:
        """Yield the shared state that a callback writes at each handler."""
        for handler, path, kind in _accesses(node):
            if not isinstance(kind, Write) or path[0] in ("resource", "data", "callbacks"):
                continue
            if path[0] == "batch":
                # Who declares the whole batch may change gradients, where these are about to be used.
                late = any(issubclass(each, handler.event_type) for each in (BackwardEnd, UpdateBegin))
                if path[1:2] == ("grads",) or (len(path) == 1 and late):
                    yield handler, path, kind
            elif path == ("cbstate",) or not self.why_local(path):
                yield handler, path, kind


def _accesses(node: Node) -> Iterator[tuple[Handler, Path, Read | Write]]:
    for _, handler in node.handlers:
        for path, kind in node.access[handler]:
            yield handler, path, kind


def _merges(node: Node, handler: Handler) -> bool:
    """Tell whether a handler runs when the callback has merged the measurements of all ranks."""
    return type(node.callback).merge_ranks is not Callback.merge_ranks and issubclass(handler.event_type, _MERGED)


# --- what the build refuses


def check_ranks(nodes: Sequence[Node], peers: Peers) -> SharedState:
    """Check that callbacks keep shared state the same on every rank; return which state that is.

    Raises:
        RankError: A callback would change shared state on one rank alone, or leave the others waiting for ever.
    """
    shared = SharedState(nodes)
    for node in nodes:
        _check_clock(node)
        if ranks_of(node).ranks == "main":
            _check_main(node, shared, nodes)
        else:
            _check_sources(node, shared)
        if peers.sharded:
            _check_sharded(node)
    return shared


def _check_main(node: Node, shared: SharedState, nodes: Sequence[Node]) -> None:
    """Check that a callback of the main rank sends the shared state that it writes, and requests no checkpoint."""
    if node.callback.may_checkpoint:
        raise RankError(
            f"{node.name} runs on the main rank only, since {ranks_of(node).why}, and may_checkpoint = True: a "
            f"checkpoint needs all ranks, since each gives its random numbers and its position. Leave ranks out, or "
            f'set ranks = "every".'
        )
    for _, path, kind in shared.writes_shared(node):
        if not kind.broadcast:
            raise RankError(
                f"{node.name} runs on the main rank only, since {ranks_of(node).why}, and writes {dotted(path)}, which "
                f"must be the same on every rank: the other ranks would keep the value before. {_send(path)}, or set "
                f'ranks = "every", so that each rank writes it.'
            )
    entries = {path[1]: path for _, path, kind in _accesses(node) if _writes_alone(path, kind)}
    for other in nodes:
        for _, path, access in _accesses(other):
            needs = isinstance(access, Read) and not access.optional and path[0] == "cbstate" and path[1:2]
            if needs and path[1] in entries and ranks_of(other).ranks == "every":
                raise RankError(
                    f"{other.name} reads {dotted(path)} on every rank, and {node.name}, which writes it, runs on the "
                    f"main rank only, since {ranks_of(node).why}. {_send(entries[path[1]])} in {node.name}, or set "
                    f'ranks = "every" there.'
                )


def _writes_alone(path: Path, kind: Read | Write) -> bool:
    return path[0] == "cbstate" and len(path) > 1 and isinstance(kind, Write) and not kind.broadcast


def _check_sources(node: Node, shared: SharedState) -> None:
    """Check that a callback that runs on every rank makes no shared state of local state."""
    sources = shared.sources(node)
    for handler, path, kind in shared.writes_shared(node) if sources else ():
        if kind.broadcast or _merges(node, handler):
            continue
        source = sources[0]
        raise RankError(
            f"{node.name} reads {source.path}, which differs between ranks ({source.why}), and writes {dotted(path)}, "
            f"which must be the same on every rank: each rank would write another value. {_one_value(source, path)}"
        )


def _one_value(source: _Source, written: Path) -> str:
    """Return the remedy for a callback that reads local state and writes shared state."""
    path = tuple(source.path.split("."))
    if path[:2] == ("batch", "grads") or path == ("batch",) or path == ("cbstate",):
        if written[0] == "batch":
            return (
                "Change gradients at UpdateBegin, where they are those of all ranks, by declaring "
                '{"batch.grads": Write()}; to change other entries of the batch declare these alone.'
            )
        return 'Declare the entry that it needs, as one value for all ranks: {"batch.loss": Read(reduce="mean")}.'
    if source.path.startswith("the clock"):
        return "Count events instead: throttle(..., every=10)."
    if path[:2] in _LOCAL and path[0] == "cbstate":
        return (
            "Read a value of all ranks instead: those of an epoch are in cbstate.metrics_epoch, and that of a batch is "
            '{"batch.loss": Read(reduce="mean")}.'
        )
    send = f"{_send(written)}: every rank then gets the value of the main rank"
    if path[0] in ("batch", "cbstate"):
        one = f'Read one value for all ranks: {{"{dotted(path[:2])}": Read(reduce="mean")}}.'
        return f"{one} Or, if it is no number: {_lower(send)}."
    return f"{send}."


def _send(path: Path) -> str:
    """Return how to send the state that the main rank writes at a path."""
    sent = path[0] in ("model", "params") or (path[0] == "cbstate" and len(path) == 2) or path[-1] == "hyperparams"
    if sent and path[:2] not in [("cbstate", entry) for entry in _SHARED_ENTRIES]:
        return f'Declare {{"{dotted(path)}": Write(broadcast=True)}}'
    if path[0] == "optimizer":
        return 'Write hyperparameters only, and declare {"optimizer.hyperparams": Write(broadcast=True)}'
    return 'Write the value to an entry of its own, and declare {"cbstate.sent": Write(broadcast=True)}'


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _check_clock(node: Node) -> None:
    """Check that no clock decides whether a handler runs that exchanges values with other ranks."""
    clocks = [each for each in node.callback.conditions if isinstance(each, EverySeconds)]
    for handler, path, kind in _accesses(node):
        for clock in clocks if collective(kind) else ():
            if issubclass(handler.event_type, clock.event_type) or issubclass(clock.event_type, handler.event_type):
                raise RankError(
                    f"throttle({node.name}, {clock.event_type.__name__}, seconds={clock.seconds:g}) depends on a "
                    f"clock, and {node.name} exchanges {dotted(path)} with all ranks: {kind!r}. Where the clocks of "
                    f"two ranks disagree, one would wait for the other for ever. Count events instead: "
                    f"throttle({type(node.callback).__name__}(...), {clock.event_type.__name__}, every=10)."
                )


def _check_sharded(node: Node) -> None:
    """Check that sharded parameters are read and written by all ranks together."""
    main = ranks_of(node).ranks == "main"
    for _, path, kind in _accesses(node):
        gathered = isinstance(kind, Read) and kind.gather
        tensors = path[0] in ("model", "params") or path[:2] == ("batch", "grads") or path == ("batch",)
        tensors = tensors or (path[0] == "optimizer" and path[-1] != "hyperparams")
        sends = isinstance(kind, Write) and kind.broadcast and path[0] in ("model", "params")
        if sends and (main or not type(node.callback).agrees):
            raise RankError(
                f"{node.name} declares {dotted(path)!r}: {kind!r}, and the parameters are sharded: the main rank does "
                f'not hold those of the others. Declare {{"{dotted(path)}": Write()}} with ranks = "every", and let '
                f"each rank change its part."
            )
        if main and tensors and not gathered:
            raise RankError(
                f"{node.name} runs on the main rank only, since {ranks_of(node).why}, and reads {dotted(path)}, "
                f"{_unsharded(node, path)}"
            )


def _unsharded(node: Node, path: Path) -> str:
    """Return the rest of the message to a callback of the main rank that reads sharded tensors at a path."""
    parts = "sharded: each rank holds a part, and all ranks must help to put it together."
    passed = "Pass access=" if node.callback.access_argument is not None else "Declare "
    if path == ("batch",):
        return (
            f"and with it batch.grads, which is {parts} {passed}{{...}} with the entries that it reads, such as "
            f'{{"batch.outputs": Read()}}; for gradients {{"batch.grads": Read(gather=True)}}.'
        )
    whole = "batch.grads" if path[0] == "batch" else "params"
    return (
        f'which is {parts} {passed}{{"{whole}": Read(gather=True)}}, or set ranks = "every", so that each rank reads '
        f"its part."
    )


def exchanges_of(declaration: Declaration, peers: Peers | None) -> tuple[list[tuple[Path, Read]], list[Path]]:
    """Return the paths that a handler reads from all ranks, with the access, and those that the main rank sends."""
    if peers is None:
        return [], []
    reads = [(path, kind) for path, kind in declaration if isinstance(kind, Read) and collective(kind)]
    writes = [path for path, kind in declaration if isinstance(kind, Write) and kind.broadcast]
    # Tensors that are not sharded are whole on every rank, and nothing is exchanged for them.
    return [(path, kind) for path, kind in reads if peers.sharded or path not in WHOLE], writes


_OUTSIDE = (FitBegin, EpochBegin, EpochEnd, FitEnd)
"""The events outside of batches that every rank fires, in the same order."""


def check_exchange_events(event_type: type[Event], phase_type: type[Phase], order: Order, peers: Peers | None) -> None:
    """Check that values are exchanged only at events that every rank fires.

    Raises:
        RankError: Values are exchanged at an event that one rank alone may fire, or leave out.
    """
    trains = has_bundled_step(phase_type, AbstractTrainingPhase)
    fine = peers is None or event_type in _OUTSIDE or (trains and event_type in peers.in_batch)
    for node, handler in () if fine else zip(order.nodes, order.handlers, strict=True):
        reads, writes = exchanges_of(node.access[handler], peers)
        for path in [*(path for path, _ in reads), *writes]:
            kind = dict(node.access[handler])[path]
            raise RankError(
                f"{node.name} exchanges {dotted(path)} with all ranks at ({event_type.__name__}, "
                f"{phase_type.__name__}): {kind!r}. {_why_not_here(event_type, phase_type, peers)}"
            )


def _why_not_here(event_type: type[Event], phase_type: type[Phase], peers: Peers | None) -> str:
    """Return why ranks cannot exchange values at an event, and what to write instead."""
    in_batch = () if peers is None else peers.in_batch
    known = ", ".join(event.__name__ for event in in_batch)
    training = f" Write @on({in_batch[-1].__name__}, TrainingPhase)." if in_batch else " Exchange it at EpochEnd."
    if not is_bundled_event(event_type) or issubclass(event_type, (BatchCancelled, EpochCancelled)):
        return "One rank alone may fire this event, and would wait for the others for ever. Exchange it at EpochEnd."
    if issubclass(phase_type, AbstractValidationPhase):
        return f"The ranks may have different numbers of batches in an evaluation.{training}"
    if not has_bundled_step(phase_type, AbstractTrainingPhase):
        return (
            f"The step of {phase_type.__name__} is your own, so it is not known which events of a batch are left out "
            f"on a rank that leaves the batch. Exchange it at EpochEnd."
        )
    if not in_batch:
        return "With several models, ranks exchange nothing within a batch. Exchange it at EpochEnd."
    return (
        f"One rank alone may leave the batch before all have agreed on it with the gradients. Exchange it at one of: "
        f"{known}."
    )
