"""A part of a container: what a view gives where only something inside it is declared.

``Write`` on ``cbstate.tracehistory.GradNorm`` gives, at ``learner.cbstate.tracehistory``, a `Part` that has that one
series in every phase. ``Read`` on ``params.encoder.weight`` gives, at ``learner.params``, one parameter. The phase is
left out of a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

from flowtrain.access import Declaration, Path, Read, Write, dotted, granted, render, union
from flowtrain.errors import MissingStateError, ProtectedException
from flowtrain.phases import Phase
from flowtrain.readonly import readonly
from flowtrain.series import PhaseMap, Series, SeriesMap

__all__ = ["Owner", "Part", "Tree", "tree"]

Tree: TypeAlias = "dict[str, Tree | Read | Write]"


def tree(declaration: Declaration) -> Tree:
    """Nest a declaration by the parts of its paths. What a declared path covers already is left out.

    >>> from flowtrain.access import declare
    >>> tree(declare({"batch.loss": Read(), "batch.inputs": Read()}, "example"))
    {'batch': {'inputs': Read(), 'loss': Read()}}
    """
    root: Tree = {}
    for path, kind in declaration:
        level = root
        for name in path[:-1]:
            inner = level.setdefault(name, {})
            if not isinstance(inner, dict):  # the shorter path sorts first and covers this one
                inner = level[name] = {"": inner}
            level = inner
        level[path[-1]] = kind
    return root


@dataclass(frozen=True)
class Owner:
    """Whose view it is, so that a refusal can be written in the callback's own name.

    Attributes:
        callback: The callback's name in the learner.
        type_name: The name of its type.
        where: What to edit: ``"state_access"``, or the handler whose `on` has ``access=``.
        declaration: What is declared there.
        handlers: The decorator of that handler as source, up to the access; empty for ``state_access``.
    """

    callback: str
    type_name: str
    where: str
    declaration: Declaration
    decorator: str = ""

    def refuse(self, access: str, path: Path) -> NoReturn:
        """Raise the `ProtectedException` for `path`, with the declaration to paste.

        A path that is declared as read is refused for writing only, and the new declaration replaces it.
        """
        kind = "Write()" if access == "Write" else "Read()"
        wanted = render(union([self.declaration, ((path, Write() if access == "Write" else Read()),)]))
        what = f"{self.callback} declares {kind} for it nowhere." if not self.declaration else (
            f"{self.callback} declares {render(self.declaration)}."
        )
        if self.decorator:
            paste = f"{self.decorator}access={wanted})"
        else:
            paste = f"def state_access(self) -> Access:\n        return {wanted}"
        remedy = f"{what} In {self.type_name}.{self.where} write:\n\n    {paste}\n"
        raise ProtectedException(access, dotted(path), remedy)

    def missing(self, path: Path, cause: BaseException | None) -> NoReturn:
        """Raise the `MissingStateError` for a declared path with nothing there."""
        reason = f" {cause}" if isinstance(cause, MissingStateError) else ""
        raise MissingStateError(
            dotted(path),
            f"{self.callback} reads Learner.{dotted(path)}, and there is nothing.{reason} "
            f'If that is expected, declare {{"{dotted(path)}": Read(optional=True)}} and handle None.',
        ) from cause


class Part(Mapping[Any, Any]):
    """A mapping and namespace of the declared items of one container, by phase where the container is by phase."""

    __slots__ = ("_by_phase", "_find", "_open", "_owner", "_path", "_tree")

    def __init__(self, owner: Owner, path: Path, inside: Tree, find: Callable[[], Any]) -> None:
        self._owner = owner
        self._path = path
        self._tree = inside
        self._find = find
        self._by_phase: dict[Phase, Part] = {}
        self._open: dict[str, Series] = {}

    def push(self, name: str, value: Any, step: int) -> None:
        """Append a value to the series `name`, if it is declared for writing."""
        series = self._open.get(name)
        if series is None:
            container = self._find()
            if not isinstance(container, SeriesMap):
                raise TypeError(f"Learner.{dotted(self._path)} is a {type(container).__name__}; only series take push")
            if not isinstance(granted(self._owner.declaration, (*self._path, name)), Write):
                self._owner.refuse("Write", (*self._path, name))
            series = self._open[name] = container.series(name)
        series.push(value, step)

    def __getitem__(self, key: Any) -> Any:
        part = self._by_phase.get(key)
        if part is not None:
            return part
        if isinstance(key, Phase) or (isinstance(key, type) and issubclass(key, Phase)):
            phase = key if isinstance(key, Phase) else key()
            part = Part(self._owner, self._path, self._tree, lambda: self._find()[phase])
            self._by_phase[phase] = part
            return part
        return self._item(str(key))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._item(name)

    def _item(self, name: str) -> Any:
        path = (*self._path, *name.split("."))
        access = granted(self._owner.declaration, path)
        if access is None:
            inner = self._tree.get(name)
            if isinstance(inner, dict):
                return Part(self._owner, path, inner, lambda: _look(self._find(), name))
            self._owner.refuse("Read", path)
        try:
            value = _look(self._find(), name)
        except (KeyError, AttributeError) as error:
            if isinstance(access, Read) and access.optional:
                return None
            self._owner.missing(path, error)
        return value if isinstance(access, Write) else readonly(value, dotted(path))

    def __setitem__(self, key: Any, value: Any) -> None:
        path = (*self._path, str(key))
        if not isinstance(granted(self._owner.declaration, path), Write):
            self._owner.refuse("Write", path)
        self._find()[key] = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Part.__slots__:
            object.__setattr__(self, name, value)
            return
        path = (*self._path, name)
        if not isinstance(granted(self._owner.declaration, path), Write):
            self._owner.refuse("Write", path)
        setattr(self._find(), name, value)

    def __iter__(self) -> Iterator[Any]:
        container = self._find()
        if isinstance(container, PhaseMap):
            return iter(list(container))
        if not isinstance(container, Mapping):
            return iter([name for name in self._tree if name])
        return iter([key for key in container if granted(self._owner.declaration, (*self._path, *str(key).split(".")))])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"Part(Learner.{dotted(self._path)}: {', '.join(name for name in self._tree if name)})"


def _look(container: Any, name: str) -> Any:
    """Find an item by name: a key of a mapping, otherwise an attribute."""
    if isinstance(container, Mapping):
        return container[name]
    return getattr(container, name)
