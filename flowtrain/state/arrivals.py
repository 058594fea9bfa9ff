"""Arrivals: late writes on their way, from the event at which a handler writes them to that of their arrival.

`Arrivals` belongs to one learner. For each handler that writes with a lag, and each event type and phase type, it has a
`LateStream`, which counts the events. The handler of the k-th event leaves a result there: its changes, if it has run
in place, or an `Awaited`, from which an executor gives the changes when the handler has run elsewhere. At the begin of
the (k+n)-th event the changes with a lag of n are made in ``cbstate``, on the training thread. So the moment of an
arrival depends on counts alone, and never on the time that a handler takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from flowtrain.callback.access import Path, dotted
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import Arrived
from flowtrain.state.container import Container
from flowtrain.state.encoding import Packer
from flowtrain.state.late_writes import Change, apply_change, packed_change, unpacked_change

__all__ = ["Arrivals", "Awaited", "Changes", "LateStream"]

Changes: TypeAlias = "tuple[Change, ...]"
"""The late writes of one handler at one event, in their order."""


class Awaited(Protocol):
    """The changes of a handler that runs elsewhere."""

    def is_there(self) -> bool:
        """Return whether `get` would return at once."""
        ...

    def get(self) -> Changes | None:
        """Return the changes, after waiting for them; ``None`` if there will be none, as the handler does not run.

        Raises:
            Exception: The handler has failed.
        """
        ...


@dataclass(slots=True)
class _Result:
    """The changes of a handler at one event, of which some have not arrived.

    Attributes:
        number: The number of the result, by which results are ordered.
        stream: The name of the stream.
        callback: The name of the callback.
        event: The event, and the updates that had been made.
        lags: The lag of each path that the handler declares.
        changes: The changes; ``None`` if they are awaited, or will never come.
        awaited: Gives the changes, if they are not here.
    """

    number: int
    stream: str
    callback: str
    event: Arrived
    lags: Mapping[str, int]
    changes: Changes | None = None
    awaited: Awaited | None = None

    def get(self) -> Changes | None:
        """Return the changes, after waiting for them; ``None`` if they will never come."""
        if self.awaited is not None:
            awaited, self.awaited = self.awaited, None  # a failure is raised once
            self.changes = awaited.get()
        return self.changes

    def state_dict(self, packer: Packer) -> dict[str, Any]:
        """Return the result as plain values. Changes that are not here yet are left out: their event is in a lane."""
        there = self.awaited is None or self.awaited.is_there()
        changes = self.get() if there else None
        return {
            "number": self.number,
            "stream": self.stream,
            "callback": self.callback,
            "event": tuple(self.event),
            "lags": dict(self.lags),
            "changes": None if changes is None else [packed_change(change, packer) for change in changes],
        }


class LateStream:
    """The late writes of one handler at the events of one type and phase.

    Args:
        arrivals: The arrivals of the learner.
        name: The name of the stream, the same in a learner that is built again.
        callback: The name of the callback.
        lags: The lag of each path that the handler declares.

    Attributes:
        number: The number of the result of the present event.
        readers: The callbacks that read what the handler writes, at the events of the stream.
    """

    def __init__(self, arrivals: Arrivals, name: str, callback: str, lags: Mapping[Path, int]) -> None:
        self._arrivals = arrivals
        self.name = name
        self.callback = callback
        self.lags = {dotted(path): lag for path, lag in lags.items()}
        self.number = 0
        self.readers: tuple[str, ...] = ()
        self._event = Arrived(0, 0)

    def arrive(self, updates: int) -> None:
        """Begin the next event: make the changes that arrive at it.

        Args:
            updates: How many updates the learner has made.
        """
        self.number, number = self._arrivals.begin(self.name)
        self._event = Arrived(number, updates)
        self._arrivals.deliver(self.name, number)

    def put(self, changes: Changes | None = None, awaited: Awaited | None = None) -> None:
        """Keep the changes of the handler at the present event, or the object that gives them.

        Without either the handler has failed, or does not run any more: at the time of their arrival the entries that
        it would have written become missing.
        """
        result = _Result(self.number, self.name, self.callback, self._event, self.lags, changes, awaited)
        self._arrivals.add(result)


class Arrivals:
    """The late writes of a learner that have not arrived, and the counts of the events of their handlers.

    Args:
        cbstate: The state in which they arrive.

    Attributes:
        arrived: For each path that was written with a lag, the event that its value belongs to. The mapping is replaced
            and never changed.
    """

    def __init__(self, cbstate: Any) -> None:
        self._cbstate = cbstate
        self._streams: dict[str, LateStream] = {}
        self._counts: dict[str, int] = {}
        self._number = 0
        self._under_way: dict[int, _Result] = {}
        self.arrived: Mapping[str, Arrived] = {}

    def stream(
        self, callback: str, event_type: type[Event], phase_type: type[Phase], lags: Mapping[Path, int]
    ) -> LateStream:
        """Return the stream of a handler at the events of a type and phase."""
        name = f"{callback} ({event_type.__module__}.{event_type.__qualname__}, {phase_type.__name__})"
        found = self._streams.get(name)
        if found is None or found.lags != {dotted(path): lag for path, lag in lags.items()}:
            found = self._streams[name] = LateStream(self, name, callback, lags)
        return found

    def begin(self, stream: str) -> tuple[int, int]:
        """Count an event of a stream; return the number for its result, and the number of the event."""
        self._number += 1
        self._counts[stream] = count = self._counts.get(stream, 0) + 1
        return self._number, count

    def add(self, result: _Result) -> None:
        """Keep a result until all of it has arrived."""
        self._under_way[result.number] = result

    def deliver(self, stream: str, number: int) -> None:
        """Make the changes of a stream that arrive at an event.

        Raises:
            Exception: The handler that should have written them has failed.
        """
        for result in list(self._under_way.values()):
            if result.stream == stream:
                self._deliver(result, number, number)

    def rest(self) -> list[Callable[[], None]]:
        """Return functions that make the changes that have not arrived, one for each handler and event, in order.

        They are called at the end of a fit, since no further event follows.
        """
        results = sorted(self._under_way.values(), key=lambda result: result.number)

        def delivery(result: _Result) -> Callable[[], None]:
            """Return the function for a result."""
            return lambda: self._deliver(result, self._counts[result.stream] + 1, result.event.number + _LATEST)

        return [delivery(result) for result in results]

    def _deliver(self, result: _Result, first: int, last: int) -> None:
        """Make the changes of a result that arrive from one event to another, and forget the result after its last."""
        due = {lag for lag in result.lags.values() if first <= result.event.number + lag <= last}
        if not due:
            return
        if result.event.number + max(result.lags.values()) <= last:
            self._under_way.pop(result.number, None)  # first: if the handler has failed, it is not asked again
        changes = result.get()
        paths = [path for path, lag in result.lags.items() if lag in due]
        if changes is None:
            self._arrive(paths, None)
            for path in paths:
                _remove(self._cbstate, path.split(".")[1:])
            return
        self._arrive(paths, result.event)
        for change in changes:
            if change.lag in due:
                apply_change(self._cbstate, change)

    def _arrive(self, paths: Iterable[str], event: Arrived | None) -> None:
        others = {path: each for path, each in self.arrived.items() if path not in paths}
        self.arrived = others if event is None else {**others, **dict.fromkeys(paths, event)}

    def drop(self) -> None:
        """Forget what has not arrived: an error or an interrupt has ended the fit, or the fit is over."""
        self._under_way.clear()

    def keep(self, callbacks: Iterable[str]) -> None:
        """Forget the late writes of all callbacks but these, since the others have left the learner."""
        names = set(callbacks)
        self._under_way = {at: each for at, each in self._under_way.items() if each.callback in names}
        self._streams = {name: each for name, each in self._streams.items() if each.callback in names}

    # --- checkpoints

    def expect(self, number: int, awaited: Awaited) -> None:
        """Let an object give the changes of a result, whose event has waited in a checkpoint."""
        result = self._under_way.get(number)
        if result is not None and result.changes is None:
            result.awaited = awaited

    def fill(self, number: int, changes: Changes) -> None:
        """Keep the changes of a result, whose event has waited in a checkpoint and has been processed now."""
        result = self._under_way.get(number)
        if result is not None and result.changes is None:
            result.changes = changes

    def state_dict(self, packer: Packer) -> dict[str, Any] | None:
        """Return the counts, and the writes that have not arrived, as plain values; ``None`` if nothing is counted."""
        if not self._counts:
            return None
        return {
            "number": self._number,
            "counts": dict(self._counts),
            "under way": [result.state_dict(packer) for result in self._under_way.values()],
            "arrived": {path: tuple(event) for path, event in self.arrived.items()},
        }

    def load_state_dict(
        self, state: Mapping[str, Any] | None, phases: Mapping[str, Phase], callbacks: Sequence[str], packer: Packer
    ) -> None:
        """Restore the state that `state_dict` returned; ``None`` stands for no late writes.

        Args:
            state: The state.
            phases: Phases by name, for those that the learner has data for.
            callbacks: The names of the callbacks of the learner; the writes of others are left out.
            packer: Copies the values, which the state keeps.
        """
        state = state or {"number": 0, "counts": {}, "under way": (), "arrived": {}}
        self._number = state["number"]
        self._counts = dict(state["counts"])
        self.arrived = {path: Arrived(*event) for path, event in state["arrived"].items()}
        self._under_way = {}
        for each in packer.copy(list(state["under way"]), "the writes that have not arrived"):
            if each["callback"] not in callbacks:
                continue
            changes = each["changes"]
            self._under_way[each["number"]] = _Result(
                each["number"],
                each["stream"],
                each["callback"],
                Arrived(*each["event"]),
                each["lags"],
                None if changes is None else tuple(unpacked_change(change, phases) for change in changes),
            )


_LATEST = 1 << 62
"""A number of events that no training has."""


def _remove(cbstate: Any, names: Sequence[str]) -> None:
    """Remove an entry whose writer has failed, so that its readers are told; a container stays as it is."""
    *above, last = names
    target = cbstate
    for name in above:
        target = getattr(target, name, None)
    if last in vars(target or object) and not isinstance(vars(target)[last], Container):
        delattr(target, last)
