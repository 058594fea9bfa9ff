"""Access declarations: `Read` and `Write` on the paths that a handler touches.

A user writes a declaration as a mapping from paths to access, dotted or nested; both of these mean the same::

    {"batch.loss": Read(), "cbstate.best": Write()}
    {"batch": {"loss": Read()}, "cbstate": {"best": Write()}}

`declare` checks it and brings it into the normal form that the rest of the library uses (`Declaration`). A path covers
everything below it. Different paths may reach the same state: `flowtrain.graph.reach` knows which ones do.
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
"""The parts of a path: ``("batch", "loss")`` for ``batch.loss``."""

ROOTS = ("model", "lossfn", "optimizer", "data", "params", "batch", "cbstate", "callbacks", "resource")
"""The first parts that a path can have: the attributes of a view, and ``resource`` for things outside the learner."""


@dataclass(frozen=True, slots=True)
class Read:
    """Declare that a handler reads the state at a path, and everything below it.

    Args:
        optional: The view gives ``None`` while the state does not exist, instead of a `MissingStateError`.
        full: The handler iterates over all values of a series at the path. This matters for deferrable callbacks only:
            an executor sends just the newest values of a series to another process, so the handler stays in this one.
    """

    optional: bool = False
    full: bool = False

    def __repr__(self) -> str:
        return f"Read({', '.join(f'{name}=True' for name in ('optional', 'full') if getattr(self, name))})"


@dataclass(frozen=True, slots=True)
class Write:
    """Declare that a handler writes, and may read, the state at a path and everything below it."""

    def __repr__(self) -> str:
        return "Write()"


# typing.Union, because a forward reference in quotes does not take the | operator.
Access: TypeAlias = Mapping[str, Union[Read, Write, "Access"]]
"""A declaration as a user writes it, dotted or nested."""

Declaration: TypeAlias = tuple[tuple[Path, Read | Write], ...]
"""A declaration in normal form: one pair for each path, sorted by path. It is hashable, so views are cached by it."""


def declare(access: Access, owner: str) -> Declaration:
    """Bring a declaration into normal form.

    Args:
        access: The declaration as a callback returns it, dotted or nested.
        owner: The source of the declaration, for messages: ``"Printer.state_access()"``.

    Raises:
        AccessError: A path has something else than `Read()` or `Write()`, an unknown first part, or an empty part.
    """
    strongest: dict[Path, Read | Write] = {}
    for path, kind in _flatten(access, (), owner):
        if path[0] not in ROOTS:
            raise AccessError(
                f"{owner} declares {dotted(path)!r}, but a learner has no {path[0]!r}.{nearest(path[0], ROOTS)} "
                f"A path begins with one of: {', '.join(ROOTS)}."
            )
        # Two users of a resource always take turns, so reading it is no weaker than writing it.
        if path[0] == "resource" and (len(path) == 1 or isinstance(kind, Read)):
            raise AccessError(
                f"{owner} declares {dotted(path)!r}: {kind!r}. A resource has a name and is used or not used: "
                f'write {{"{dotted(path) if len(path) > 1 else "resource.rng"}": Write()}}.'
            )
        # The compiled views keep attributes of their own under such names.
        if path[0] in ("batch", "cbstate", "optimizer") and len(path) > 1 and path[1].startswith("_"):
            raise AccessError(
                f"{owner} declares {dotted(path)!r}: an entry's name does not begin with an underscore. "
                f"Name it {dotted((path[0], path[1].lstrip('_'), *path[2:]))!r}."
            )
        strongest[path] = _stronger(strongest.get(path), kind)  # a path may be there twice: dotted and nested
    return tuple(sorted(strongest.items(), key=lambda item: item[0]))


def _flatten(access: object, prefix: Path, owner: str) -> Iterator[tuple[Path, Read | Write]]:
    """Yield the paths of a nested declaration with their access; `prefix` is the path of `access` itself."""
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
    """Return the access that allows all that either of two allows; `Write` includes reading."""
    if one is None or one == other or isinstance(other, Write):
        return other
    if isinstance(one, Write):
        return one
    # A read that is optional for one of two handlers is still required by the other.
    return Read(optional=one.optional and other.optional, full=one.full or other.full)


def union(declarations: Iterable[Declaration]) -> Declaration:
    """Return one declaration that allows all that any of several allows.

    For each path `Write` beats `Read`, and `Read` beats an optional read. A `Read` is full if one of several is full.
    """
    strongest: dict[Path, Read | Write] = {}
    for declaration in declarations:
        for path, kind in declaration:
            strongest[path] = _stronger(strongest.get(path), kind)
    return tuple(sorted(strongest.items(), key=lambda item: item[0]))


def granted(declaration: Declaration, path: Path) -> Read | Write | None:
    """Return the strongest access that a declaration gives at a path; ``None`` where the path is not declared.

    A path is declared if the declaration names the path itself or a path above it.
    """
    strongest: Read | Write | None = None
    for declared, kind in declaration:
        if path[: len(declared)] == declared:
            strongest = _stronger(strongest, kind)
    return strongest


def dotted(path: Path) -> str:
    """Return a path as the user writes it.

    >>> dotted(("batch", "loss"))
    'batch.loss'
    """
    return ".".join(path)


def render(declaration: Declaration) -> str:
    """Return a declaration as source code, which a message shows so that the user can paste it.

    >>> render(declare({"batch": {"loss": Read()}}, "example"))
    '{"batch.loss": Read()}'
    """
    return "{" + ", ".join(f"{_quoted(path)}: {kind!r}" for path, kind in declaration) + "}"


def _quoted(path: Path) -> str:
    """Return a path as a string literal in double quotes, as the formatters write it, where that needs no escapes."""
    text = dotted(path)
    return f'"{text}"' if text.isprintable() and not set(text) & {'"', "\\"} else repr(text)


def canonical(path: Path) -> Path:
    """Return a path without the alias ``params``, which stands for the parameters of ``model``.

    >>> canonical(("params", "0", "weight"))
    ('model', '0', 'weight')
    """
    return ("model", *path[1:]) if path[0] == "params" else path


def meet(one: Path, other: Path) -> bool:
    """Tell whether two canonical paths overlap: they are equal, or one is a prefix of the other.

    Two paths that do not overlap may still reach one object, such as a parameter that an optimizer holds:
    `flowtrain.graph.reach` finds these.
    """
    return one[: len(other)] == other[: len(one)]
