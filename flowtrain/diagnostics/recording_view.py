"""A view that allows every access, and logs the paths that a handler reads and assigns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from flowtrain.callback.access import Path, Read, Write
from flowtrain.callback.phases import Phase
from flowtrain.state.by_phase import CONTAINERS, kind_of_series
from flowtrain.state.detached import detached
from flowtrain.state.learner_state import LearnerState, Named
from flowtrain.state.namespace import State
from flowtrain.state.partial_view import Owner
from flowtrain.state.series import SeriesMap
from flowtrain.state.views import GuardedView

__all__ = ["Log", "RecordingView"]

Log: TypeAlias = dict[Path, Read | Write]
"""The paths that a handler has read or written."""

_PLAIN_ROOTS = ("callbacks", "data", "lossfn", "model")
"""The attributes of a view that are declared as a whole."""


class RecordingView(GuardedView):
    """A view of the live state that logs what a handler reads and assigns.

    Args:
        state: The state to show.
        owner: The callback and handler that the view is for.
        log: The log that the view adds to.
    """

    __slots__ = ("_log", "_shown")

    _log: Log
    _shown: Callable[[Any], Any]

    def __init__(self, state: LearnerState, owner: Owner, log: Log) -> None:
        object.__setattr__(self, "_state", state)
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_log", log)
        object.__setattr__(self, "_shown", detached if owner.consumes else _itself)

    def __getattr__(self, name: str) -> Any:
        state, log, shown = self._state, self._log, self._shown
        if name in ("batch", "cbstate"):
            return _RecordedNamespace(getattr(state, name), (name,), log, shown, self._owner.gathered)
        if name == "optimizer":
            return _RecordedNamespace(state.optimizers, (name,), log)
        if name == "params" or (name == "model" and isinstance(state.model, Named)):
            return _RecordedMapping(getattr(state, name), (name,), log, shown if name == "params" else _itself)
        if name in _PLAIN_ROOTS:
            _read(log, (name,))
            return getattr(state, name)
        return GuardedView.__getattr__(self, name)  # type: ignore[attr-defined]  # hidden from checkers there


class _RecordedNamespace:
    """``batch``, ``cbstate`` or ``optimizer`` of a recording view, or a namespace within ``cbstate``.

    Args:
        target: The object to show.
        path: The path of the object.
        log: The log of the view.
        shown: Makes the value that a handler sees, such as a detached tensor; by default the value itself.
        lists: The paths at which the handler sees a list of the values of all ranks.
    """

    def __init__(
        self, target: Any, path: Path, log: Log, shown: Callable[[Any], Any] | None = None, lists: Sequence[Path] = ()
    ) -> None:
        self.__dict__.update(_target=target, _path=path, _log=log, _shown=shown or _itself, _lists=lists)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        target, path = self._target, (*self._path, name)
        if path[0] == "cbstate" and len(path) == 2 and name in CONTAINERS and name not in target:
            # A learner makes the containers that are declared; this one is not declared yet, so make it here.
            setattr(target, name, CONTAINERS[name](f"cbstate.{name}"))
        if path[0] == "optimizer" and name not in ("hyperparams", "state") and not isinstance(target, Named):
            _read(self._log, self._path)  # a method or attribute of the optimizer itself, so all of it is read
            return getattr(target, name)
        value = getattr(target, name, None)
        if isinstance(value, State) or (path[0] == "optimizer" and isinstance(target, Named)):
            return _RecordedNamespace(value, path, self._log, self._shown)
        if path[0] == "cbstate" and kind_of_series(value) is SeriesMap:
            return _RecordedMapping(value, path, self._log)
        _read(self._log, path, optional=value is None)
        return [self._shown(value)] if path in self._lists else self._shown(value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._log[*self._path, name] = Write()
        setattr(self._target, name, value)

    def __delattr__(self, name: str) -> None:
        self._log[*self._path, name] = Write()
        delattr(self._target, name)

    def __contains__(self, name: object) -> bool:
        _read(self._log, (*self._path, str(name)), optional=True)
        return name in (self._target if isinstance(self._target, State) else vars(self._target))


class _RecordedMapping(Mapping[Any, Any]):
    """A mapping from names to values, or from phases to such mappings, of a recording view.

    Access to one name is logged with the name in the path, iteration with the path of the whole mapping. A phase is no
    part of a path.

    Args:
        target: The mapping.
        path: The path of the mapping.
        log: The log of the view.
        shown: Makes the value that a handler sees; by default the value itself.
    """

    def __init__(self, target: Any, path: Path, log: Log, shown: Callable[[Any], Any] | None = None) -> None:
        self._target = target
        self._path = path
        self._log = log
        self._shown = shown or _itself

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (Phase, type)):
            return _RecordedMapping(self._target[key], self._path, self._log)
        found = self._target.get(key)
        _read(self._log, (*self._path, *str(key).split(".")), optional=found is None)
        return self._shown(found)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of a key, or `default`."""
        found = self[key]
        return default if found is None else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def push(self, name: str, value: Any, step: int) -> None:
        """Append a value to a series."""
        self._log[*self._path, *name.split(".")] = Write()
        self._target.push(name, value, step)

    def __iter__(self) -> Iterator[Any]:
        _read(self._log, self._path)
        return iter(self._target)

    def __len__(self) -> int:
        _read(self._log, self._path)
        return len(self._target)


def _itself(value: Any) -> Any:
    return value


def _read(log: Log, path: Path, *, optional: bool = False) -> None:
    """Log a read, which is optional only if the value was missing at every read. A logged write stays."""
    known = log.get(path)
    if known is None or (isinstance(known, Read) and known.optional):
        log[path] = Read(optional=optional)
