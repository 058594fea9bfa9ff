"""Exchanges: before a handler runs, all ranks exchange the values that it reads; after it, the main rank sends its own.

`Read(reduce=...)`, `Read(gather=True)` and `Write(broadcast=True)` ask for an exchange. Every rank takes part, also one
that does not run the handler. All ranks run the same plan, so they come to the same exchanges in the same order. To be
sure, each message says which exchange it is for, and a message for another one is an error instead of a wrong value.

A rank that cannot take part with a value, because an earlier handler has failed there, sends a message without one. No
rank then runs the handler, so that no rank waits for ever, and none has changed state that the others have not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from numbers import Number, Real
from operator import add
from typing import Any, NamedTuple

import torch

from flowtrain.callback.access import WHOLE, Path, Read, Reduction, dotted
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.data.nested import INSIDE, PLAIN, mapped, parts, place_text, rebuild
from flowtrain.errors import MissingStateError, RankError
from flowtrain.graph.nodes import Node
from flowtrain.graph.shared_state import Peers, exchanges_of, ranks_of, runs_here
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain.state.shards import is_sharded, whole

__all__ = ["Exchange", "combined"]

_Call = Callable[[Event, Phase, LearnerView], None]


class _Message(NamedTuple):
    """What one rank sends in an exchange.

    Attributes:
        where: The handler, the event and the phase; the same on every rank.
        values: The values; ``None`` if this rank cannot take part with values.
    """

    where: str
    values: tuple[Any, ...] | None


class Exchange:
    """The exchanges of one handler at one event and phase.

    Args:
        peers: The processes.
        node: The callback.
        handler: The handler.
        event_type: The type of the event.
        phase_type: The type of the phase.
        state: The state of the learner.

    Attributes:
        values: The values of all ranks by path while the handler runs, for its view.
    """

    def __init__(
        self,
        peers: Peers,
        node: Node,
        handler: Handler,
        event_type: type[Event],
        phase_type: type[Phase],
        state: LearnerState,
    ) -> None:
        self.values: dict[Path, Any] = {}
        self._peers, self._state = peers, state
        self._reads, self._writes = exchanges_of(node.access[handler], peers)
        self._runs = runs_here(node, peers)
        self._place = ranks_of(node).ranks
        label = f"{node.name}.{handler.attribute}"
        self._where = f"{label} at ({event_type.__name__}, {phase_type.__name__})"

    def __bool__(self) -> bool:
        """Whether anything is exchanged."""
        return bool(self._reads or self._writes)

    def explain(self) -> Iterator[str]:
        """Yield a line for each value that is exchanged, for `Callbacks.explain`."""
        who = "every rank" if self._place == "every" else "the main rank"
        for path, kind in self._reads:
            what = "a list of the values" if kind.reduce is None else f"the {kind.reduce}"
            yield f"exchange before: {who} gets {what} of {dotted(path)} of all ranks"
        for path in self._writes:
            yield f"exchange after: every rank gets {dotted(path)} of the main rank"

    def around(self, call: _Call) -> _Call:
        """Return a call of the handler with the exchanges before and after it."""

        def run(event: Event, phase: Phase, view: LearnerView) -> None:
            """Exchange the values that the handler reads, run it where it runs, and send what it has written."""
            if self._reads and not self._receive():
                return
            failure: BaseException | None = None
            if self._runs:
                try:
                    call(event, phase, view)
                except BaseException as raised:  # raised again below, when the other ranks know
                    failure = raised
                finally:
                    self.values.clear()
            self.values.clear()
            try:
                if self._writes:
                    self._send(failed=failure is not None)
                if failure is not None:
                    raise failure
            finally:
                del failure  # a traceback refers to this frame, and the frame must not refer to the traceback

        return run

    def exchange_nothing(self, event: Event, phase: Phase, view: LearnerView) -> None:
        """Take part without a value, because the handler does not run on this rank; a call like that of the handler."""
        self._tell("before" if self._reads else "after", None)

    def _receive(self) -> bool:
        """Exchange the values that the handler reads; tell whether every rank has sent its own.

        Raises:
            MissingStateError: This rank has no value, which is not declared to be optional.
            RankError: The values of the ranks do not fit together.
        """
        failure: Exception | None = None
        own: tuple[Any, ...] | None = None
        try:
            own = tuple(self._own(path, kind) for path, kind in self._reads if path not in WHOLE)
        except Exception as raised:  # raised again below, when the other ranks know
            failure = raised
        answers = self._tell("before", None if own is None else tuple(map(_portable, own)))
        if failure is not None:
            raise failure
        if own is None or answers is None:
            return False
        sent = [read for read in self._reads if read[0] not in WHOLE]
        for place, (path, kind) in enumerate(sent):
            values = [values[place] for values in answers]
            self.values[path] = values if kind.reduce is None else _placed(combined(values, path, kind), own[place])
        for path, _ in self._reads:
            if path in WHOLE:
                tensors = self._state.params if path == ("params",) else self._state.batch.grads
                self.values[path] = _whole(tensors, keep=self._runs)
        return True

    def _own(self, path: Path, kind: Read) -> Any:
        """Return the value of this rank at a path; ``None`` if it is missing, and declared to be optional."""
        try:
            return getattr(getattr(self._state, path[0]), path[1])
        except MissingStateError as error:
            if kind.optional:
                return None
            raise MissingStateError(
                dotted(path), f"{self._where} exchanges {dotted(path)} with all ranks, and this rank has none. {error}"
            ) from error

    def _send(self, *, failed: bool) -> None:
        """Give every rank the values that the main rank has written."""
        values: tuple[Any, ...] = ()
        if self._peers.main and not failed:
            values = tuple(_portable(_written(self._state, path)) for path in self._writes)
        answers = self._tell("after", None if failed else values)
        if answers is not None and not self._peers.main:
            for path, value in zip(self._writes, answers[0], strict=True):
                _assign(self._state, path, value)

    def _tell(self, when: str, values: tuple[Any, ...] | None) -> list[tuple[Any, ...]] | None:
        """Send a message to all ranks; return the values of all ranks, or ``None`` if one of them has sent none.

        Raises:
            RankError: Another rank is at another exchange.
        """
        where = f"{self._where}, {when} the handler"
        answers = self._peers.exchange(_Message(where, values))
        for rank, answer in enumerate(answers):
            if not isinstance(answer, _Message) or answer.where != where:
                there = answer.where if isinstance(answer, _Message) else "the end of a batch, an epoch or a fit"
                raise RankError(
                    f"Rank {self._peers.rank} exchanges values for {where}, and rank {rank} is at {there}. All ranks "
                    f"must come to the same exchanges: let conditions, such as the predicate of when(), depend on the "
                    f"number of the event and on the phase only, and fire events of your own on every rank."
                )
        found = [answer.values for answer in answers]
        return None if None in found else found


# --- values that ranks send


def _portable(value: Any) -> Any:
    """Return a value with its tensors on the CPU and without graphs: another process may have other devices."""
    return mapped(
        value, lambda item, part: item.detach().cpu() if isinstance(item, torch.Tensor) else INSIDE, keep=True
    )


def _placed(value: Any, own: Any) -> Any:
    """Return a value with its tensors on the device of the first tensor in the value of this rank."""
    devices: list[torch.device] = []

    def note(item: Any, part: Any) -> Any:
        """Add the device of a tensor to the list."""
        if isinstance(item, torch.Tensor):
            devices.append(item.device)
        return INSIDE

    mapped(own, note, keep=True)
    device = devices[0] if devices else None
    if device is None or device.type == "cpu":
        return value
    return mapped(value, lambda item, part: item.to(device) if isinstance(item, torch.Tensor) else INSIDE, keep=True)


def _whole(tensors: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """Return named tensors, each put together from the parts that the ranks hold. Every rank must call this.

    Args:
        tensors: The tensors of this rank by name.
        keep: Whether this rank needs the result. Otherwise it only takes part, and keeps no tensor.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        put_together = whole(tensor.detach())
        if keep:
            found[name] = put_together
    return found


def _tensors(state: LearnerState, path: Path) -> list[torch.Tensor]:
    """Return the parameters and buffers at a path below ``model``, or the parameters at one below ``params``.

    Sharded ones are left out: the main rank has only a part of them, and each rank has written its own.
    """
    prefix = ".".join(path[1:])
    if path[0] == "params":
        named = list(state.params.items())
    else:
        named = [
            (".".join(filter(None, (root, name))), tensor)
            for root, model in by_name(state.model).items()
            for members in (model.named_parameters, model.named_buffers)
            for name, tensor in members(remove_duplicate=False)
        ]
    return [
        tensor
        for name, tensor in named
        if not prefix or name == prefix or name.startswith(f"{prefix}.")
        if not is_sharded(tensor)
    ]


def _written(state: LearnerState, path: Path) -> Any:
    """Return the value at a path that the main rank sends, in a list; an empty list if there is none."""
    if path[0] == "cbstate":
        return [getattr(state.cbstate, path[1])] if path[1] in state.cbstate else []
    if path[0] == "optimizer":
        return [
            {key: value for key, value in group.items() if key != "params"}
            for optimizer in _optimizers(state, path)
            for group in optimizer.param_groups
        ]
    return _tensors(state, path)


def _assign(state: LearnerState, path: Path, sent: Any) -> None:
    """Put the value that the main rank has sent at its path."""
    if path[0] == "cbstate":
        for value in sent:
            own = getattr(state.cbstate, path[1]) if path[1] in state.cbstate else None
            setattr(state.cbstate, path[1], _placed(value, own))
    elif path[0] == "optimizer":
        groups = [group for optimizer in _optimizers(state, path) for group in optimizer.param_groups]
        for group, values in zip(groups, sent, strict=True):
            for key, value in values.items():
                if isinstance(group.get(key), torch.Tensor) and isinstance(value, torch.Tensor):
                    group[key].copy_(value)  # a compiled optimizer and a view hold this tensor
                else:
                    group[key] = value
    else:
        with torch.no_grad():
            for tensor, value in zip(_tensors(state, path), sent, strict=True):
                tensor.copy_(value)


def _optimizers(state: LearnerState, path: Path) -> list[Any]:
    """Return the optimizers that a path to hyperparameters reaches: one by name, or all of them."""
    optimizers = by_name(state.optimizer)
    return [optimizers[path[1]]] if len(path) > 2 else list(optimizers.values())


# --- one value for all ranks


def combined(values: Sequence[Any], path: Path, kind: Read) -> Any:
    """Return one value for those of all ranks: numbers and tensors are combined, containers item by item.

    Floating-point numbers are added in the order of the ranks, so the result has the same bits on every rank.

    Args:
        values: The values, in the order of the ranks. Ranks with ``None`` are left out if the read is optional.
        path: The path, for messages.
        kind: The access that is declared for the path.

    Raises:
        RankError: The values have different types, shapes or items, or are no numbers.

    >>> combined([{"a": 1.0}, {"a": 2.0}], ("batch", "seen"), Read(reduce="mean"))
    {'a': 1.5}
    """
    if kind.reduce is None:
        return list(values)
    there = [value for value in values if value is not None] if kind.optional else list(values)
    return _combined(there, dotted(path), kind.reduce) if there else None


def _combined(values: Sequence[Any], path: str, how: Reduction) -> Any:
    first = values[0]
    inner = [parts(value) for value in values]
    if all(each is None for each in inner):
        return _number(values, path, how)
    tables = [dict(each or ()) for each in inner]
    for rank, (value, table) in enumerate(zip(values, tables, strict=True)):
        if type(value) is not type(first) or table.keys() != tables[0].keys():
            raise RankError(
                f"{path} is {_described(first, tables[0])} on the first rank that has it and "
                f"{_described(value, table)} on another one (number {rank}), so {_cannot(how)}"
            )
    return rebuild(
        first,
        lambda _, where: _combined([table[where] for table in tables], path + place_text(where), how),
        {},
    )


def _described(value: Any, table: dict[Any, Any]) -> str:
    return f"a {type(value).__name__} with {', '.join(map(repr, table)) or 'nothing'}"


def _cannot(how: Reduction) -> str:
    return f"it has no {how} over all ranks. Declare a number, or Read(gather=True) for a list of all values."


def _number(values: Sequence[Any], path: str, how: Reduction) -> Any:
    """Return one number, or one tensor, for those of all ranks."""
    first = values[0]
    if all(isinstance(value, torch.Tensor) for value in values):
        forms = [(tuple(value.shape), value.dtype) for value in values]
        other = next((form for form in forms if form != forms[0]), None)
        if other is not None:
            raise RankError(
                f"{path} has shape {forms[0][0]} and {forms[0][1]} on one rank, and {other[0]} and {other[1]} on "
                f"another, so {_cannot(how)}"
            )
        return _tensor(values, how)
    if all(isinstance(value, Number) for value in values):
        if how in ("min", "max"):
            if any(value != value for value in values):
                return math.nan
            if all(isinstance(value, Real) for value in values):
                return min(values) if how == "min" else max(values)
        else:
            # From the first rank to the last one. `sum` adds numbers in another way since Python 3.12.
            total: Any = reduce(add, values, 0)
            return total / len(values) if how == "mean" else total
    elif all(type(value) in PLAIN and type(value) is type(first) and value == first for value in values):
        return first  # a text beside the numbers, the same on every rank
    kinds = ", ".join(dict.fromkeys(type(value).__name__ for value in values))
    raise RankError(f"{path} is a {kinds} on the ranks, so {_cannot(how)}")


def _tensor(values: Sequence[torch.Tensor], how: Reduction) -> torch.Tensor:
    """Return one tensor for tensors of one shape and type, element by element."""
    total = values[0]
    if how in ("min", "max"):
        for value in values[1:]:
            total = torch.minimum(total, value) if how == "min" else torch.maximum(total, value)
        return total
    kept = total.dtype
    # Half precision overflows and loses digits, and the sum of booleans is a count.
    wide = torch.float32 if kept in (torch.float16, torch.bfloat16) else torch.int64 if kept == torch.bool else kept
    total = total.to(wide)
    for value in values[1:]:
        total = total + value.to(wide)
    if how == "mean":
        total = total / len(values)
    return total.to(kept) if kept in (torch.float16, torch.bfloat16) else total
