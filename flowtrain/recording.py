"""The recording view: it allows everything, and writes down which paths were read or assigned.

It stands in for a protected view while the least declaration of a handler is looked for. In-place changes leave no
trace here; `flowtrain.dryrun` finds them by fingerprints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from flowtrain.access import Path, Read, Write
from flowtrain.containers import CONTAINERS, holds_series
from flowtrain.detached import detached
from flowtrain.part import Owner
from flowtrain.phases import Phase
from flowtrain.protect import LearnerView
from flowtrain.state import LearnerState, Named, State

__all__ = ["Log", "RecordingView"]

Log: TypeAlias = dict[Path, Read | Write]

_PLAIN_ROOTS = ("callbacks", "data", "lossfn", "model")


class RecordingView(LearnerView):
    """A view of the live state that logs what a handler reads and assigns.

    Args:
        state: The state to show.
        owner: Whose view it is.
        log: What is found is added here.
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
            return RecordedNamespace(getattr(state, name), (name,), log, shown)
        if name == "optimizer":
            return RecordedNamespace(state.optimizers, (name,), log)
        if name == "params" or (name == "model" and isinstance(state.model, Named)):
            return RecordedMapping(getattr(state, name), (name,), log, shown if name == "params" else _itself)
        if name in _PLAIN_ROOTS:
            _read(log, (name,))
            return getattr(state, name)
        return LearnerView.__getattr__(self, name)  # type: ignore[attr-defined]  # hidden from checkers there


class RecordedNamespace:
    """``batch``, ``cbstate`` or ``optimizer`` under a recording view, or a namespace inside ``cbstate``."""

    def __init__(self, target: Any, path: Path, log: Log, shown: Callable[[Any], Any] | None = None) -> None:
        self.__dict__.update(_target=target, _path=path, _log=log, _shown=shown or _itself)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        target, path = self._target, (*self._path, name)
        if path[0] == "cbstate" and len(path) == 2 and name in CONTAINERS and name not in target:
            # Not declared yet, so the learner has not made it.
            setattr(target, name, CONTAINERS[name](f"cbstate.{name}"))
        if path[0] == "optimizer" and name not in ("hyperparams", "state") and not isinstance(target, Named):
            _read(self._log, self._path)  # a method or attribute of the optimizer itself
            return getattr(target, name)
        value = getattr(target, name, None)
        if isinstance(value, State) or (path[0] == "optimizer" and isinstance(target, Named)):
            return RecordedNamespace(value, path, self._log, self._shown)
        if path[0] == "cbstate" and holds_series(value):
            return RecordedMapping(value, path, self._log)
        _read(self._log, path, optional=value is None)
        return self._shown(value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._log[*self._path, name] = Write()
        setattr(self._target, name, value)

    def __delattr__(self, name: str) -> None:
        self._log[*self._path, name] = Write()
        delattr(self._target, name)

    def __contains__(self, name: object) -> bool:
        _read(self._log, (*self._path, str(name)), optional=True)
        return name in (self._target if isinstance(self._target, State) else vars(self._target))


class RecordedMapping(Mapping[Any, Any]):
    """Something that holds things by name, perhaps by phase first: one name is a path, all of it is a shorter one."""

    def __init__(self, target: Any, path: Path, log: Log, shown: Callable[[Any], Any] | None = None) -> None:
        self._target = target
        self._path = path
        self._log = log
        self._shown = shown or _itself

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (Phase, type)):
            return RecordedMapping(self._target[key], self._path, self._log)
        found = self._target.get(key)
        _read(self._log, (*self._path, *str(key).split(".")), optional=found is None)
        return self._shown(found)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return what is at a key."""
        found = self[key]
        return default if found is None else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def push(self, name: str, value: Any, step: int) -> None:
        """Append to a series."""
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
    known = log.get(path)
    if known is None or (isinstance(known, Read) and known.optional):
        log[path] = Read(optional=optional)
