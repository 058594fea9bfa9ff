"""What a callback declares: `Read` and `Write` on dotted paths.

A declaration maps paths to access, dotted or nested; both of these mean the same::

    {"batch.loss": Read(), "cbstate.best": Write()}
    {"batch": {"loss": Read()}, "cbstate": {"best": Write()}}

A path covers everything below it. Which paths lead to the same state is the subject of `flowtrain.graph.reach`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, Union

from flowtrain.errors import AccessError, nearest

__all__ = [
    "ROOTS",
    "Access",
    "Declaration",
    "Path",
    "Read",
    "Write",
    "canonical",
    "declare",
    "dotted",
    "granted",
    "meet",
    "render",
    "union",
]

Path: TypeAlias = tuple[str, ...]

ROOTS = ("model", "lossfn", "optimizer", "data", "params", "batch", "cbstate", "callbacks", "resource")
"""The first parts that a path can have: the learner's state, and ``resource`` for what no path can name."""


@dataclass(frozen=True, slots=True)
class Read:
    """Declare that a handler reads what is at a path, and below it.

    Args:
        optional: Give ``None`` where there is nothing (yet), in place of a `MissingStateError`.
        full: The handler iterates over a whole series there. It matters for deferrable callbacks only: such a one
            stays in this process, since another process gets just the newest values of a series.
    """

    optional: bool = False
    full: bool = False

    def __repr__(self) -> str:
        return f"Read({', '.join(f'{name}=True' for name in ('optional', 'full') if getattr(self, name))})"


@dataclass(frozen=True, slots=True)
class Write:
    """Declare that a handler writes, and may read, what is at a path and below it."""

    def __repr__(self) -> str:
        return "Write()"


# typing.Union, because a forward reference in quotes does not take the | operator.
Access: TypeAlias = Mapping[str, Union[Read, Write, "Access"]]
Declaration: TypeAlias = tuple[tuple[Path, Read | Write], ...]
"""A declaration in normal form: sorted, one entry a path, hashable."""


def declare(access: Access, owner: str) -> Declaration:
    """Bring a declaration into normal form.

    Args:
        access: As a callback returns it, dotted or nested.
        owner: Who declares it, for messages: ``"Printer.state_access()"``.

    Raises:
        AccessError: For anything but `Read()` or `Write()` at a path, an unknown first part, or an empty part.
    """
    found: dict[Path, Read | Write] = {}
    for path, kind in _flatten(access, (), owner):
        if path[0] not in ROOTS:
            raise AccessError(
                f"{owner} declares {dotted(path)!r}, but a learner has no {path[0]!r}.{nearest(path[0], ROOTS)} "
                f"A path begins with one of: {', '.join(ROOTS)}."
            )
        if path[0] == "resource" and (len(path) == 1 or isinstance(kind, Read)):
            raise AccessError(
                f"{owner} declares {dotted(path)!r}: {kind!r}. A resource has a name and is used or not used: "
                f'write {{"{dotted(path) if len(path) > 1 else "resource.rng"}": Write()}}.'
            )
        if path[0] in ("batch", "cbstate", "optimizer") and len(path) > 1 and path[1].startswith("_"):
            raise AccessError(f"{owner} declares {dotted(path)!r}: an entry's name does not begin with an underscore.")
        found[path] = _stronger(found.get(path), kind)
    return tuple(sorted(found.items(), key=lambda item: item[0]))


def _flatten(access: object, prefix: Path, owner: str) -> Iterator[tuple[Path, Read | Write]]:
    if not isinstance(access, Mapping):
        where = f"{owner} declares {dotted(prefix)!r}: " if prefix else f"{owner} is "
        if access is Read or access is Write:
            name = "Read" if access is Read else "Write"
            raise AccessError(f"{where}{name} without parentheses. Write {name}(), an instance of it.")
        raise AccessError(
            f"{where}{access!r}, which is neither Read(), Write() nor a mapping. "
            f'Write a mapping such as {{"batch.loss": Read()}}.'
        )
    for key, value in access.items():
        if not isinstance(key, str) or not all(key.split(".")):
            raise AccessError(f'{owner} declares the path {key!r}. A path is names joined by dots, as "batch.loss".')
        path = (*prefix, *key.split("."))
        if isinstance(value, (Read, Write)):
            yield path, value
        else:
            yield from _flatten(value, path, owner)


def _stronger(one: Read | Write | None, other: Read | Write) -> Read | Write:
    if one is None or one == other or isinstance(other, Write):
        return other
    if isinstance(one, Write):
        return one
    return Read(optional=one.optional and other.optional, full=one.full or other.full)


def union(declarations: Iterable[Declaration]) -> Declaration:
    """Return what any of the declarations allows; for one path `Write` beats `Read` beats an optional read.

    A `Read` of two is full if one of them is.
    """
    found: dict[Path, Read | Write] = {}
    for declaration in declarations:
        for path, kind in declaration:
            found[path] = _stronger(found.get(path), kind)
    return tuple(sorted(found.items(), key=lambda item: item[0]))


def granted(declaration: Declaration, path: Path) -> Read | Write | None:
    """Return the strongest access that the declaration gives at `path`, or ``None``."""
    found: Read | Write | None = None
    for declared, kind in declaration:
        if path[: len(declared)] == declared:
            found = _stronger(found, kind)
    return found


def dotted(path: Path) -> str:
    """Write a path as the user does.

    >>> dotted(("batch", "loss"))
    'batch.loss'
    """
    return ".".join(path)


def render(declaration: Declaration) -> str:
    """Write a declaration as source code to paste.

    >>> render(declare({"batch": {"loss": Read()}}, "example"))
    '{"batch.loss": Read()}'
    """
    return "{" + ", ".join(f"{_quoted(path)}: {kind!r}" for path, kind in declaration) + "}"


def _quoted(path: Path) -> str:
    text = dotted(path)
    return f'"{text}"' if text.isprintable() and not set(text) & {'"', "\\"} else repr(text)


def canonical(path: Path) -> Path:
    """Return a path by the one name of what it names: ``params`` are the parameters of ``model``.

    >>> canonical(("params", "0", "weight"))
    ('model', '0', 'weight')
    """
    return ("model", *path[1:]) if path[0] == "params" else path


def meet(one: Path, other: Path) -> bool:
    """Tell whether two canonical paths overlap: one is a prefix of the other, or they are equal.

    What else two paths have in common, such as a parameter that the optimizer holds too, `flowtrain.graph.reach` knows.
    """
    return one[: len(other)] == other[: len(one)]
