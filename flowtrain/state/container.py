"""Containers: the objects that hold the values of ``cbstate``, and the operations that each of them answers.

`Series`, `SeriesMap`, `PhaseMap`, `CountsMap` and the namespace `State` are containers. A container is filled in place
and never replaced, because views hold it. A module that works on the learner's state asks a container for one of these
operations, and does not need to know its type:

=================  ================================================================  ===============================
operation          effect                                                            asked by
=================  ================================================================  ===============================
``__twin__``       shows the live container, and refuses to change it                `flowtrain.state.readonly`
``__detached__``   gives itself, or a copy whose tensors have no graph               `flowtrain.state.detached`
``__frozen__``     copies all of it, or the declared part, for a snapshot            executors
``__packed__``     gives its content as plain values for a checkpoint                `flowtrain.state.encoding`
``__fill__``       takes such content back                                           `flowtrain.state.encoding`
``__mark__``       remembers its content                                             `flowtrain.state.namespace`
``__rewind__``     puts the content of a mark back                                   `flowtrain.state.namespace`
``__leaves__``     describes its content by path, so that a change can be found      `flowtrain.diagnostics.strict`
``__reduce__``     makes it again from a pickle, or as a deep copy; a twin gives     pickle and copy
                   the container that it shows
=================  ================================================================  ===============================

All names begin with two underscores, because the entries of a namespace are attributes, whose names callbacks choose.

The first three operations are optional for any object and are looked up by name. `Parameters`, `Gradients` and `Named`
have those of the three that they need. They hold no content of their own: they show modules and optimizers by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

from flowtrain.callback.access import Path, Read, Write
from flowtrain.callback.phases import Phase
from flowtrain.state.encoding import Packer

__all__ = ["Container", "Freezer", "Tree", "changed_items", "declared_items"]

K = TypeVar("K")

Tree: TypeAlias = "dict[str, Tree | Read | Write]"
"""Declared access inside a container, nested by name, without the phase; the name ``""`` stands for all of it."""


class Freezer(Protocol):
    """An object that copies the items of a container for a snapshot."""

    def copy(self, value: Any) -> Any:
        """Return the copy of a value."""

    def part(self, value: Any, inside: Tree | Read | Write | None, where: Any) -> Any:
        """Return the copy of an item, or of the part of it that is declared.

        Args:
            value: The item.
            inside: The declared part; anything but a `Tree` means all of it.
            where: The place of the item, for an error: its key, or an `flowtrain.data.nested.Attribute`.
        """


class Container:
    """An object that holds values of ``cbstate``; the module describes the operations."""

    __slots__ = ()

    __kind__: ClassVar[str]
    """The word that marks the content in a checkpoint; only a container of the same kind takes it back."""

    def __twin__(self) -> Any:
        """Return an object that shows the live container and refuses to change it; its items are twins as well."""
        raise NotImplementedError

    def __detached__(self, detach: Callable[[Any], Any]) -> Any:
        """Return the container itself, or a copy if it holds items that change when they are detached.

        Args:
            detach: Returns an item with its tensors detached; the item itself, if no tensor in it has a graph.
        """
        return self

    def __frozen__(self, freezer: Freezer, inside: Tree | None = None) -> Any:
        """Return a container of the same sort that training does not change.

        Args:
            freezer: Copies the items.
            inside: The declared part; ``None`` means all. A container may copy more than that.
        """
        raise NotImplementedError

    def __packed__(self, packer: Packer, path: str) -> dict[str, Any]:
        """Return the content as plain values, which nobody else holds.

        Args:
            packer: Copies plain values (`Packer.copy`) and packs other values (`Packer.pack`).
            path: Where the container is, for messages.

        Raises:
            CheckpointError: An item cannot be in a checkpoint.
        """
        raise NotImplementedError

    def __fill__(self, content: Mapping[str, Any], phases: Mapping[str, Phase]) -> None:
        """Replace the content in place; containers inside stay the same objects.

        Args:
            content: A result of `__packed__`; an empty mapping empties the container.
            phases: Phases by name, for those that the learner has data for.

        Raises:
            CheckpointError: The content has a phase that is not defined.
        """
        raise NotImplementedError

    def __mark__(self) -> Any:
        """Return the content for `__rewind__`; a dict of the items, if they may be containers, which have marks too."""
        raise NotImplementedError

    def __rewind__(self, mark: Any) -> None:
        """Put the content of a mark back in place; the mark stays as it is."""
        raise NotImplementedError

    def __leaves__(self, fingerprint: Callable[[Any], object]) -> Iterator[tuple[Path, object]]:
        """Yield the path of each item below the container, with an object that is equal while the item is the same.

        The phase is left out of a path, so items may have the same one. An empty series yields nothing: a lookup alone
        may have made it.

        Args:
            fingerprint: Returns such an object for an item that is not a container.
        """
        raise NotImplementedError


def changed_items(items: Iterable[tuple[K, Any]], new: Callable[[Any], Any]) -> dict[K, Any]:
    """Return ``new(item)`` for the items, by their keys, for which it is another object."""
    return {key: made for key, item in items if (made := new(item)) is not item}


def declared_items(keys: Iterable[K], inside: Tree | None) -> Iterator[tuple[K, Tree | Read | Write | None]]:
    """Yield the keys at which access is declared, each with the declared part of its item; ``None`` means all of it.

    A key may have dots in it: to declare ``encoder`` is to declare all of ``"encoder.weight"``.
    """
    for key in keys:
        found: Tree | Read | Write | None = inside
        # The tree may end before the name does: a leaf of the tree declares everything below it.
        for name in str(key).split("."):
            if isinstance(found, dict) and "" not in found:
                found = found.get(name)
        # Without a tree everything is declared, so each key is yielded with ``None`` for all of its item.
        if found is not None or inside is None:
            yield key, found
