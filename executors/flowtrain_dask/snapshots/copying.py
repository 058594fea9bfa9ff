"""One pass of copying: what is common to all types. `flowtrain_dask.snapshots.copiers` says how each type is copied.

The copy of one value keeps what it shares within itself: one tensor in two places stays one tensor, and a list that
holds itself does so in the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from flowtrain.callback.access import Path, Read, Write, dotted
from flowtrain.callback.nested import PLAIN, Attribute, Memo, step
from flowtrain.errors import AccessError
from flowtrain.state.container import Tree, picked
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.series import Cutter

__all__ = [
    "COPIERS",
    "FINDERS",
    "Attributes",
    "Copier",
    "Copying",
    "Refused",
]

Copier: TypeAlias = "Callable[[Any, Copying], Any]"

COPIERS: dict[type, Copier] = {}
"""How each type is copied, by exact type; `flowtrain_dask.snapshots.copiers` fills it, new types are entered later."""

FINDERS: list[Callable[[type, Any], Copier | None]] = []
"""What is asked, in turn, how a type is copied that is met for the first time."""


class Refused(Exception):  # turned into an error that says where before anybody else sees it
    """A value that cannot be copied, and where it is inside the entry.

    Attributes:
        value: The value.
        why: Why not.
        remedy: What to write.
        where: How to get there, the outermost step last.
    """

    def __init__(self, value: object, why: str, remedy: str = "") -> None:
        super().__init__(why)
        self.value = value
        self.why = why
        self.remedy = remedy
        self.where: list[str] = []


class Copying:
    """The copy of one entry of the learner's state, while it is made.

    Args:
        pool: Where the memory for tensors comes from.
        fresh: Whether the tensors belong to nobody else: they are detached and shared.
        cutter: Makes what is shown of series.
        dry: Whether tensors and modules are only looked at.

    Attributes:
        nbytes: The bytes of the tensors, arrays and texts that were copied.
        has_series: Whether there was a series; how it is shown depends on who looks.
        events: What has to be waited for before the copy is complete, on an accelerator.
        memo: What was copied so far, and its copy.
    """

    __slots__ = ("cutter", "dry", "events", "fresh", "has_series", "memo", "nbytes", "pool")

    def __init__(self, pool: Pool, *, fresh: bool = False, cutter: Cutter | None = None, dry: bool = False) -> None:
        self.pool = pool
        self.fresh = fresh
        self.cutter = cutter or Cutter()
        self.dry = dry
        self.nbytes = 0
        self.has_series = False
        self.events: list[Any] = []
        self.memo: Memo = {}

    def copy(self, value: Any) -> Any:
        """Return the copy of a value.

        Raises:
            Refused: It, or something in it, cannot be copied.
        """
        kind = type(value)
        if kind in PLAIN:
            return value
        known = self.memo.get(id(value))
        if known is not None:
            return known[1]
        copier = COPIERS.get(kind)
        if copier is None:
            copier = COPIERS[kind] = next((found for find in FINDERS if (found := find(kind, value))), _refuse)
        result = copier(value, self)
        self.memo[id(value)] = (value, result)  # the value too: as long as it lives, its id is its own
        return result

    def copy_at(self, value: Any, where: Any) -> Any:
        """Return the copy of a part; `where` is its place: a key, or an `flowtrain.callback.nested.Attribute`."""
        if type(value) in PLAIN:
            return value
        try:
            return self.copy(value)
        except Refused as refused:
            refused.where.append(step(where))
            raise

    def copy_key(self, key: Any) -> Any:
        """Return the copy of a key of a dict: an object may be one, and training may change it."""
        return key if type(key) in PLAIN else self.copy_at(key, Attribute(f"keys() {key!r}"))

    def remember(self, value: Any, result: Any) -> None:
        """Note the copy of a container before it is filled: it may hold itself."""
        self.memo[id(value)] = (value, result)

    def entry(self, value: Any, path: Path, inside: Tree | None = None) -> Any:
        """Return the copy of what is at a path, or of what is declared inside it.

        Args:
            value: What is there.
            path: Where.
            inside: What is declared below it; ``None`` is all.

        Raises:
            AccessError: It, or something in it, cannot be copied.
        """
        return self.at(path, self.copy, value) if inside is None else self.at(path, self.inside, value, inside)

    def at(self, path: Path, copy: Callable[..., Any], *args: Any) -> Any:
        """Call something that copies what is at a path; what is refused inside becomes an error that says where.

        Raises:
            AccessError: Something cannot be copied.
        """
        try:
            return copy(*args)
        except Refused as refused:
            raise _error(refused, path) from refused.__cause__

    def inside(self, container: Any, inside: Tree) -> Any:
        """Return copies of what is declared inside a container, in one of the same sort, a dict or `Attributes`."""
        frozen = getattr(type(container), "__frozen__", None)
        if frozen is not None:
            return frozen(container, self, inside)
        if isinstance(container, Mapping):
            return {key: self.part(container[key], below, key) for key, below in picked(container, inside)}
        own = {name: getattr(container, name) for name in inside if name and hasattr(container, name)}
        return Attributes({name: self.part(own[name], inside[name], Attribute(name)) for name in own})

    def part(self, value: Any, inside: Tree | Read | Write | None, where: Any) -> Any:
        """Return the copy of a part of which all, or something inside, is declared."""
        if not isinstance(inside, dict) or "" in inside:
            return self.copy_at(value, where)
        return self.inside(value, inside)


class Attributes:
    """What of an object's attributes was copied."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)


def _refuse(value: Any, copying: Copying) -> Any:
    raise Refused(value, "training may change it while the callback waits, and nothing says how it is copied")


def _error(refused: Refused, path: Path) -> AccessError:
    kind = type(refused.value)
    remedy = refused.remedy or (
        f"Say how it is copied, for instance with flowtrain_dask.register_copier({kind.__name__}, copy.deepcopy), or "
        f"make it a dataclass"
    )
    return AccessError(
        f"learner.{dotted(path)}{''.join(reversed(refused.where))} is a {kind.__module__}.{kind.__qualname__}, and a "
        f"deferred callback reads it: {refused.why}. {remedy}; or set deferrable = False on the callback."
    )
