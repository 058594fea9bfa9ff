"""Late writes: what a handler writes with ``Write(lag=n)`` is kept as data, and put into ``cbstate`` when it arrives.

Such a handler gets a view that is bound to a `LateLearner`. Its ``cbstate`` is a `LateState`, which shows the state as
it is at the event and keeps a list of `Change` instead of changing anything: assignments of an entry or of an item of
one, and values that are pushed to a series. The handler runs in place, on a thread or in another process, so a change
holds plain values only (`flowtrain.state.encoding`), copied when they are written. `apply_change` makes the change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, TypeAlias

from flowtrain.callback.access import Declaration, Write, dotted, granted, lags_of
from flowtrain.callback.phases import Phase, as_phase
from flowtrain.errors import CheckpointError, ProtectedException, UsageError
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.container import Container
from flowtrain.state.detached import detached
from flowtrain.state.encoding import Packer, phase_of
from flowtrain.state.readonly import LatePath, readonly
from flowtrain.state.series import Series, SeriesMap

__all__ = ["Change", "Key", "LateLearner", "LatePart", "LateState", "apply_change", "packed_change", "unpacked_change"]

Key: TypeAlias = "str | Phase"
"""One step from ``cbstate`` down to a value: the name of an entry, attribute or series, or a phase."""


class Change(NamedTuple):
    """One late write.

    Attributes:
        lag: After how many events it arrives.
        keys: The way from ``cbstate`` to the value that is replaced, or to the series that gets the value.
        value: The value.
        step: The step of a value that is pushed to a series; ``None`` for an assignment.
    """

    lag: int
    keys: tuple[Key, ...]
    value: Any
    step: int | None = None


def apply_change(cbstate: Any, change: Change) -> None:
    """Make a change in ``cbstate``."""
    *above, last = change.keys
    target = cbstate
    for key in above:
        target = _inside(target, key)
    if change.step is not None:
        _inside(target, last).push(change.value, change.step)
    elif isinstance(last, Phase):
        target[last] = change.value
    else:
        setattr(target, last, change.value)


def _inside(container: Any, key: Key) -> Any:
    """Return an item of a container; a value for a new phase, and a series of a new name, is made."""
    if isinstance(container, SeriesMap):
        return container.series(str(key))
    return container[key] if isinstance(key, Phase) else getattr(container, key)


def packed_change(change: Change, packer: Packer) -> dict[str, Any]:
    """Return a change as plain values, for a checkpoint: a phase becomes a list with its name."""
    keys = [[repr(key)] if isinstance(key, Phase) else key for key in change.keys]
    value = packer.copy(change.value, "a write that has not arrived")
    return {"lag": change.lag, "keys": keys, "value": value, "step": change.step}


def unpacked_change(packed: Mapping[str, Any], phases: Mapping[str, Phase]) -> Change:
    """Return the change of `packed_change`.

    Args:
        packed: The change as plain values.
        phases: Phases by name, for those that the learner has data for.

    Raises:
        CheckpointError: A phase is not defined.
    """
    keys = tuple(key if isinstance(key, str) else phase_of(key[0], phases) for key in packed["keys"])
    return Change(packed["lag"], keys, packed["value"], packed["step"])


class LateState:
    """``cbstate`` as a handler sees it that writes with a lag: it shows the present state, and keeps the changes.

    Args:
        state: The state of ``cbstate``, or that of a snapshot.
        declaration: The declaration of the handler.
        callback: The name of the callback, for messages.
    """

    __slots__ = ("_callback", "_changes", "_declaration", "_entries", "_state")

    def __init__(self, state: Any, declaration: Declaration, callback: str) -> None:
        assign = object.__setattr__  # an assignment is a late write
        assign(self, "_state", state)
        assign(self, "_declaration", declaration)
        assign(self, "_callback", callback)
        assign(self, "_entries", frozenset(path[1] for path in lags_of(declaration)))
        assign(self, "_changes", [])

    _callback: str
    _changes: list[Change]
    _declaration: Declaration
    _entries: frozenset[str]
    _state: Any

    @property
    def __twins__(self) -> Any:
        return self._state.__twins__

    def taken(self) -> tuple[Change, ...]:
        """Return the changes since the last call, and forget them."""
        changes = tuple(self._changes)
        self._changes.clear()
        return changes

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._state, name)
        if name not in self._entries:
            return value
        return _shown(self, (name,), value)

    def __setattr__(self, name: str, value: Any) -> None:
        self.record((name,), value)

    def __delattr__(self, name: str) -> None:
        self.refuse_removal((name,))

    def refuse_removal(self, keys: Sequence[Key]) -> NoReturn:
        """Refuse to remove an entry or an item of one.

        Raises:
            UsageError: Always.
        """
        raise UsageError(
            f"{self._callback} removes {_path(keys)}, which it writes with a lag: only values arrive later. Assign "
            f"None instead."
        )

    def record(self, keys: tuple[Key, ...], value: Any, step: Any = None) -> None:
        """Keep a change.

        Args:
            keys: The way from ``cbstate`` to the value or the series.
            value: The value.
            step: The step of a value that is pushed; ``None`` for an assignment.

        Raises:
            ProtectedException: The place is not declared with ``Write(lag=...)``.
            UsageError: The value cannot be sent to another process and be in a checkpoint, or would replace a
                container.
        """
        path = ("cbstate", *(part for key in keys if isinstance(key, str) for part in key.split(".")))
        access = granted(self._declaration, path)
        if not isinstance(access, Write) or access.lag is None:
            declared = f'{{"{dotted(path)}": Write(lag=1)}}'
            raise ProtectedException("Write", dotted(path), f"{self._callback} does not declare {declared}.")
        if step is None and isinstance(self.present(keys), Container):
            raise UsageError(
                f"{self._callback} assigns {_path(keys)}, which is filled and never replaced: others hold it. Write "
                f"into it, as {_path(keys)}.push(...)."
            )
        if step is not None:  # a series checks the step, and makes a number of a tensor of one element
            probe = Series(_path(keys))
            probe.push(value, step)
            [(step, value)] = probe
        try:
            value = Packer().copy(value, _path(keys))
        except CheckpointError as error:
            raise UsageError(
                f"{self._callback} writes {_path(keys)} with a lag, and {type(value).__name__} is no plain value that "
                f"can wait: {error}"
            ) from error
        self._changes.append(Change(access.lag, keys, value, step))

    def present(self, keys: Sequence[Key]) -> Any:
        """Return the value that is there now; ``None`` if there is none."""
        value = self._state
        for key in keys:
            value = _part(value, key)
        return value

    def part(self, keys: Sequence[Key]) -> Any:
        """Return the present value at some keys, read-only.

        Raises:
            KeyError: There is none.
        """
        value = self.present(keys)
        if value is None:
            raise KeyError(f"{_path(keys)} does not exist (yet).")
        return value


def _part(container: Any, key: Key) -> Any:
    """Return an item of a container, or ``None``. Nothing is made: others would see it."""
    if isinstance(container, PhaseMap) and isinstance(key, Phase):
        if key in container or container.make is not None:
            return container[key] if key in container else container.awaited(key)
        return None
    if isinstance(container, SeriesMap):
        return container.get(key)
    return getattr(container, str(key), None)


def _shown(late: LateState, keys: tuple[Key, ...], value: Any) -> Any:
    """Return a value as the handler may see it: a container takes changes, and any other value is read-only."""
    if isinstance(value, Container):
        return LatePart(late, keys)
    return readonly(detached(value), LatePath(_path(keys)))


def _path(keys: Sequence[Key]) -> str:
    """Return the way to a value as the user writes it."""
    return "cbstate" + "".join(f"[{key!r}]" if isinstance(key, Phase) else f".{key}" for key in keys)


class LatePart:
    """A container in ``cbstate`` as a handler sees it that writes into it with a lag.

    It reads as the container does at the event. Pushed values and assigned items are changes of the `LateState`.
    """

    __slots__ = ("_keys", "_late")

    _keys: tuple[Key, ...]
    _late: LateState

    def __init__(self, late: LateState, keys: tuple[Key, ...]) -> None:
        object.__setattr__(self, "_late", late)
        object.__setattr__(self, "_keys", keys)

    @property
    def holds_series(self) -> bool:
        """Whether the container holds series by name."""
        return isinstance(self._late.present(self._keys), SeriesMap)

    def series(self, name: str) -> LatePart:
        """Return the series of a name, which need not exist yet."""
        return LatePart(self._late, (*self._keys, name))

    def push(self, *args: Any, **named: Any) -> None:
        """Push a value to a series: ``push(value, step)`` of a series, ``push(name, value, step)`` of several."""
        if self.holds_series:
            self._push_named(*args, **named)
        else:
            self._push(*args, **named)

    def _push(self, value: Any, step: int) -> None:
        self._late.record(self._keys, value, step)

    def _push_named(self, name: str, value: Any, step: int) -> None:
        self._late.record((*self._keys, name), value, step)

    def __getitem__(self, key: Any) -> Any:
        phase = as_phase(key)
        if phase is None and not isinstance(key, str):
            return readonly(self._late.part(self._keys), _path(self._keys))[key]  # an item of a series
        keys: tuple[Key, ...] = (*self._keys, key if phase is None else phase)
        return _shown(self._late, keys, self._late.part(keys))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        container = self._late.part(self._keys)
        if isinstance(value := _part(container, name), Container):
            return LatePart(self._late, (*self._keys, name))
        return getattr(readonly(container, _path(self._keys)), name) if value is None else readonly(value, name)

    def __setitem__(self, key: Any, value: Any) -> None:
        phase = as_phase(key)
        self._late.record((*self._keys, str(key) if phase is None else phase), value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._late.record((*self._keys, name), value)

    def __delitem__(self, key: Any) -> None:
        self._late.refuse_removal((*self._keys, as_phase(key) or str(key)))

    def __delattr__(self, name: str) -> None:
        self._late.refuse_removal((*self._keys, name))

    def __contains__(self, key: object) -> bool:
        return key in self._late.part(self._keys)

    def __iter__(self) -> Any:
        return iter(readonly(self._late.part(self._keys), _path(self._keys)))

    def __len__(self) -> int:
        return len(self._late.part(self._keys))

    def __repr__(self) -> str:
        return f"LatePart({_path(self._keys)})"


class LateLearner:
    """The state of a learner, or a snapshot of it, with a `LateState` instead of ``cbstate``: a view is bound to it.

    Args:
        state: The state.
        declaration: The declaration of the handler.
        callback: The name of the callback, for messages.
    """

    def __init__(self, state: Any, declaration: Declaration, callback: str) -> None:
        self._of = state
        self.cbstate = LateState(state.cbstate, declaration, callback)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def taken(self) -> tuple[Change, ...]:
        """Return the changes since the last call, and forget them."""
        return self.cbstate.taken()
