"""One pass of copying, with the parts that all types have in common.

The copiers of the types are in `flowtrain_dask.snapshots.copiers`. A copy keeps the sharing within a value: a tensor in
two places is one tensor in the copy too, and a list that contains itself does so in the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from flowtrain.callback.access import Path, Read, Write, dotted
from flowtrain.data.nested import PLAIN, Attribute, Memo, place_text
from flowtrain.errors import AccessError
from flowtrain.state.container import Tree, declared_items
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.series import Cutter

__all__ = ["Attributes", "Copier", "Copying", "Refused"]

Copier: TypeAlias = "Callable[[Any, Copying], Any]"
"""A function that returns the copy of a value, given the pass of copying."""


class Refused(Exception):  # `Copying.at` turns it into an `AccessError` that names the place
    """A value cannot be copied.

    Attributes:
        value: The value.
        why: Why it cannot be copied.
        remedy: The text that says what to write.
        where: The steps from the entry to the value, the outermost one last.
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
        copiers: The copier of each type.
        pool: Gives the memory for tensors.
        cutter: Makes the copies of series.
        dry: Whether this is only a check: tensors and modules are not copied.

    Attributes:
        nbytes: The bytes of the tensors, arrays and texts that were copied.
        has_series: Whether the entry contains a series. The copy of a series may depend on the handler.
        events: The events of an accelerator that must have passed before the copy is complete.
        memo: The values that were copied so far, each with its copy, by their ids.
    """

    __slots__ = ("_copiers", "cutter", "dry", "events", "has_series", "memo", "nbytes", "pool")

    def __init__(
        self, copiers: Mapping[type, Copier], pool: Pool, *, cutter: Cutter | None = None, dry: bool = False
    ) -> None:
        self._copiers = copiers
        self.pool = pool
        self.cutter = cutter or Cutter()
        self.dry = dry
        self.nbytes = 0
        self.has_series = False
        self.events: list[Any] = []
        self.memo: Memo = {}

    def copy(self, value: Any) -> Any:
        """Return the copy of a value.

        Raises:
            Refused: The value, or a part of it, cannot be copied.
        """
        kind = type(value)
        if kind in PLAIN:
            return value
        known = self.memo.get(id(value))
        if known is not None:
            return known[1]
        result = self._copiers[kind](value, self)
        self.memo[id(value)] = (value, result)  # with the value, so that no other object gets its id meanwhile
        return result

    def copy_at(self, value: Any, where: Any) -> Any:
        """Return the copy of a part. An error names its place by `where`: a key, or an `Attribute`."""
        if type(value) in PLAIN:
            return value
        try:
            return self.copy(value)
        except Refused as refused:
            refused.where.append(place_text(where))
            raise

    def copy_key(self, key: Any) -> Any:
        """Return the copy of a key of a dict. A key may be an object that training changes."""
        return key if type(key) in PLAIN else self.copy_at(key, Attribute(f"keys() {key!r}"))

    def remember(self, value: Any, result: Any) -> None:
        """Note the copy of a container before it is filled, because the container may contain itself."""
        self.memo[id(value)] = (value, result)

    def entry(self, value: Any, path: Path, inside: Tree | None = None) -> Any:
        """Return the copy of the value at a path, or of the declared parts of it.

        Args:
            value: The value.
            path: The path.
            inside: The declared paths below it; ``None`` for the whole value.

        Raises:
            AccessError: The value, or a part of it, cannot be copied.
        """
        return self.at(path, self.copy, value) if inside is None else self.at(path, self.inside, value, inside)

    def at(self, path: Path, copy: Callable[..., Any], *args: Any) -> Any:
        """Call a function that copies the value at a path, and turn `Refused` into an error that names the place.

        Raises:
            AccessError: The value, or a part of it, cannot be copied.
        """
        try:
            return copy(*args)
        except Refused as refused:
            # The refusal itself is left out of the chain: the error says all that it says, and the place.
            raise _error(refused, path) from refused.__cause__

    def inside(self, container: Any, inside: Tree) -> Any:
        """Return copies of the declared parts of a container: in a container of its type, a dict, or `Attributes`."""
        frozen = getattr(type(container), "__frozen__", None)
        if frozen is not None:
            return frozen(container, self, inside)
        if isinstance(container, Mapping):
            return {key: self.part(container[key], below, key) for key, below in declared_items(container, inside)}
        # An attribute that does not exist yet is left out, and the view of the handler says that it is missing.
        own = {name: getattr(container, name) for name in inside if name and hasattr(container, name)}
        return Attributes({name: self.part(own[name], inside[name], Attribute(name)) for name in own})

    def part(self, value: Any, inside: Tree | Read | Write | None, where: Any) -> Any:
        """Return the copy of a part that is declared as a whole, or of the declared parts of it."""
        if not isinstance(inside, dict) or "" in inside:
            return self.copy_at(value, where)
        return self.inside(value, inside)


class Attributes:
    """The copied attributes of an object, if only some of them are declared."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)


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
