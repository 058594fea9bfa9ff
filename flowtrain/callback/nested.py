"""Containers of users: how each type is taken apart, and how it is put together again around other parts.

A batch, an output or an entry of ``cbstate`` may be nested in any way. Everything that goes through such values goes
through this module, so every reader of them knows the same types:

======================================================== ============================================================
type, and its subclasses                                 its parts
======================================================== ============================================================
``tuple`` (also named, of C, such as `torch.max` gives), the items, by number
``list``, ``deque``, ``set``, ``frozenset``
``dict``, ``OrderedDict``, ``defaultdict``               the values, by key; keys stay as they are
``UserDict``, ``UserList``, ``MappingProxyType``         the container that they are made around
``functools.partial``                                    the function and the arguments
dataclasses, ``SimpleNamespace``                         the attributes
======================================================== ============================================================

Attributes are parts of every one of these, those in slots too: a model output of the usual libraries is an
``OrderedDict`` with attributes. Everything else is a leaf: tensors, arrays, modules, enumerations, objects of unknown
types, which may hold anything. `parts` alone looks into other mappings and sequences as well.

A container is made again without its constructor, which may take other arguments or do more. What is in two places is
one object in the result, and a container that holds itself holds itself there. ``torch.utils._pytree`` does none of
this: it is private, takes dataclasses for leaves, drops the attributes of a subclass, makes two of what was one, and
recurses without an end.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import types
from collections import OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from operator import is_
from typing import Any, Final, TypeAlias

import torch

__all__ = ["INSIDE", "PLAIN", "Attribute", "Memo", "attributes", "is_nested", "items", "leaves", "mapped", "parts"]
__all__ += ["rebuild", "refill", "set_attributes", "step", "tuple_like"]

PLAIN: Final[frozenset[type]] = frozenset({int, float, bool, str, bytes, complex, type(None)})
"""The exact types of values that have no parts and never change; every walk leaves them first."""

Memo: TypeAlias = "dict[int, tuple[Any, Any]]"
"""What was made of each object, by its id; the object is kept too, because its id is its own only while it lives."""


class Attribute(str):
    """The name of a part that is an attribute; other parts have a key or a number."""

    __slots__ = ()


def step(where: Any) -> str:
    """Return how the place of a part is written behind its container.

    >>> step("a"), step(0), step(Attribute("a"))
    ("['a']", '[0]', '.a')
    """
    return (where and f".{where}") if isinstance(where, Attribute) else f"[{where!r}]"


_DICTS = (dict, OrderedDict, defaultdict)
_BARE = frozenset({tuple, list, dict, set, frozenset, deque, defaultdict, types.MappingProxyType})
"""Types whose own instances have no attributes."""
_OBJECTS = (types.SimpleNamespace, UserDict, UserList)
_BASES: Final[Mapping[type, Any]] = {
    **{each: each for each in (*_BARE, OrderedDict, functools.partial)},
    **dict.fromkeys(_OBJECTS, object),  # made of attributes
    **dict.fromkeys((torch.Tensor, torch.nn.Module, enum.Enum, type, *PLAIN)),
}


def _base(kind: type) -> Any:
    """Return the type as whose instances those of `kind` are taken apart: one of `_BASES`; ``None`` for leaves."""
    if kind in _BASES:
        return _BASES[kind]
    known = next((base for base in kind.__mro__ if base in _BASES), None)
    return _BASES[known] if known is not None else object if dataclasses.is_dataclass(kind) else None


def is_nested(kind: type) -> bool:
    """Tell whether values of a type are taken apart and made again; see the table above."""
    return _base(kind) is not None


def _items(value: Any, base: Any) -> list[tuple[Any, Any]]:
    """Return the parts of a container that are no attributes, each with its place."""
    if base in _DICTS:
        return list(base.items(value))
    if base is object:
        return []
    if base is types.MappingProxyType:
        return [(Attribute(), gc.get_referents(value)[0])]  # the mapping itself, which a proxy does not give
    if base is functools.partial:
        args = [(Attribute(f"args[{place}]"), arg) for place, arg in enumerate(value.args)]
        keywords = [(Attribute(f"keywords[{name!r}]"), arg) for name, arg in value.keywords.items()]
        return [(Attribute("func"), value.func), *args, *keywords]
    return list(enumerate(value))


def _make(value: Any, base: Any, items: list[Any]) -> Any:
    """Return a container like one that does not change once it is made, with other items."""
    kind: Any = type(value)
    if base is tuple:
        return tuple_like(value, items)
    if base is frozenset:
        return frozenset.__new__(kind, items)
    if base is types.MappingProxyType:
        return types.MappingProxyType(*items)
    end = 1 + len(value.args)
    keywords = dict(zip(value.keywords, items[end:], strict=True))
    return functools.partial.__new__(kind, *items[:end], **keywords)


def tuple_like(value: tuple[Any, ...], items: list[Any]) -> Any:
    """Return a tuple of the type of `value` with other items."""
    kind: Any = type(value)
    return kind(items) if hasattr(kind, "n_fields") else tuple.__new__(kind, items)  # those of C allow no other way


def _empty(value: Any, base: Any) -> Any:
    """Return an empty container like one that can change; ``None`` for others."""
    kind: Any = type(value)
    if base in (tuple, frozenset, types.MappingProxyType, functools.partial):
        return None
    try:
        made = base.__new__(kind)
    except TypeError:  # an object of a type that is made in C
        made = kind.__new__(kind)
    if base is deque:
        deque.__init__(made, (), value.maxlen)  # which a subclass may have another way to say
    elif base is defaultdict:
        made.default_factory = value.default_factory
    return made


def _fill(made: Any, base: Any, places: list[Any], items: list[Any]) -> None:
    """Put items into an empty container, past what a subclass does then."""
    if base in _DICTS:
        enter = base.__setitem__
        for key, item in zip(places, items, strict=True):
            enter(made, key, item)
    elif base is not object:
        (base.update if base is set else base.extend)(made, items)


@functools.lru_cache(512)
def _slots(kind: type) -> tuple[str, ...]:
    """Return the names of the slots of a type, as they are called inside of it."""
    found: list[str] = []
    for base in kind.__mro__:
        slots: Any = base.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            found.append(f"_{base.__name__.lstrip('_')}{slot}" if private else slot)
    return tuple(dict.fromkeys(name for name in found if name not in ("__dict__", "__weakref__")))


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes that an object holds itself, those in slots too; properties are none of them."""
    kind: Any = type(value)
    found: dict[str, Any] = dict(getattr(value, "__dict__", None) or ())
    for name in _slots(kind):
        if hasattr(value, name):
            found[name] = getattr(value, name)
    return found


# --- looking


def parts(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the parts of a container, each with its place (see `step`); ``None`` for a leaf.

    Mappings and sequences of other sorts are shown too, as they show themselves.

    >>> parts({"a": 1, "b": [2]}), parts(1)
    ([('a', 1), ('b', [2])], None)
    """
    kind = type(value)
    if kind in PLAIN:
        return None
    base = _base(kind)
    inner = items(value) if base is None else _items(value, base)
    if inner is not None and kind not in _BARE:
        inner += [(Attribute(name), item) for name, item in attributes(value).items()]
    return inner


def items(value: Any) -> list[tuple[Any, Any]] | None:
    """Return what a container shows, each with its place: items, or attributes if it has none; ``None`` for a leaf.

    Mappings and sequences of all sorts count, and attributes beside items do not.
    """
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes, bytearray, range, memoryview)):
        return list(enumerate(value))
    if _base(type(value)) is not object:
        return None
    return [(Attribute(name), item) for name, item in attributes(value).items()]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a value, each with its path; what is in several places comes once.

    >>> list(leaves({"a": (1, [2.5])}, "x"))
    [("x['a'][0]", 1), ("x['a'][1][0]", 2.5)]
    """
    seen: dict[int, Any] = {}
    waiting = [(path, value)]
    while waiting:
        path, value = waiting.pop()
        if type(value) not in PLAIN:
            if id(value) in seen:
                continue
            seen[id(value)] = value
        inner = parts(value)
        if inner is None:
            yield path, value
        else:
            waiting += [(path + step(where), part) for where, part in reversed(inner)]


# --- putting together again


def rebuild(
    value: Any,
    change: Callable[[Any, Any], Any],
    memo: Memo,
    change_key: Callable[[Any], Any] | None = None,
) -> Any:
    """Return a container of the same type around changed parts; a leaf, and what cannot change and has not, as it is.

    Args:
        value: Anything.
        change: Returns what becomes of a part, given that and its place.
        memo: What was made of the containers around this one, and of what they hold; `change` has to look there first.
        change_key: What becomes of the key of a dict, which stays otherwise.
    """
    base = _base(type(value))
    if base is None:
        return value
    made = _empty(value, base)
    if made is not None:
        memo[id(value)] = (value, made)  # before it is filled: it may hold itself
    inner = _items(value, base)
    new = [change(item, where) for where, item in inner]
    if made is not None:
        _fill(made, base, [where if change_key is None else change_key(where) for where, _ in inner], new)
    elif id(value) in memo:
        return memo[id(value)][1]  # a part of it holds it
    elif all(part is item for part, (_, item) in zip(new, inner, strict=True)) and _has_plain_attributes(value):
        return value
    else:
        made = _make(value, base, new)
        memo[id(value)] = (value, made)
    if type(value) not in _BARE:
        set_attributes(made, {name: change(item, Attribute(name)) for name, item in attributes(value).items()})
    return made


def _has_plain_attributes(value: Any) -> bool:
    return type(value) in _BARE or all(type(item) in PLAIN for item in attributes(value).values())


def set_attributes(value: Any, own: Mapping[str, Any]) -> None:
    """Set attributes past what the type does then: a frozen dataclass refuses, others do more."""
    kind: Any = type(value)
    slots = _slots(kind)
    for name, item in own.items():
        if name in slots:
            object.__setattr__(value, name, item)
        else:
            value.__dict__[name] = item


def refill(value: Any, content: Any) -> None:
    """Give a container that can change the parts of another one of its type; a leaf stays as it is."""
    base = _base(type(value))
    if base is None or value is content:
        return
    if _empty(value, base) is not None:
        if base is not object:
            base.clear(value)
        pairs = _items(content, base)
        _fill(value, base, [where for where, _ in pairs], [item for _, item in pairs])
    own = attributes(content)
    for name in attributes(value).keys() - own.keys():
        object.__delattr__(value, name)
    set_attributes(value, own)


_FLAT = PLAIN | {torch.Tensor}
INSIDE: Final = object()
"""What a change of `mapped` returns for a value of which the parts are to be changed."""
Change: TypeAlias = "Callable[[Any, Callable[[Any], Any]], Any]"


def mapped(value: Any, change: Change, *, keep: bool = False) -> Any:
    """Return a value with parts of it changed, in containers of the same types.

    Args:
        value: Anything.
        change: Is called once with each object in it, with a container before its parts; not with those of `PLAIN`
            types, nor with a tuple, list, dict, set or deque that is of no subclass. It returns what becomes of the
            object, or `INSIDE`: then a container is made again around what becomes of its parts, and a leaf stays. The
            second argument returns what becomes of a part, for an object that is taken apart in a way of its own.
        keep: Whether containers in which nothing has changed stay too. Otherwise all that can change are new.

    >>> mapped([1, ("a", torch.ones(2))], lambda item, part: item.shape if isinstance(item, torch.Tensor) else INSIDE)
    [1, ('a', torch.Size([2]))]
    """
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is tuple or kind is list or kind is dict:
        inner = value.values() if kind is dict else value
        if _FLAT.issuperset(map(type, inner)) and len({*map(id, inner)}) == len(value):  # most batches: this is quick
            new = [item if type(item) in PLAIN or (made := change(item, _stays)) is INSIDE else made for item in inner]
            if keep and all(map(is_, new, inner)):
                return value
            return kind(new) if kind is not dict else dict(zip(value, new, strict=True))
    walk = _Walk(change, keep)
    made = walk.part(value)
    return made if walk.changed or not keep else value  # made again too is what holds itself


def _stays(part: Any) -> Any:
    return part


class _Walk:
    """One pass of `mapped`."""

    __slots__ = ("_change", "_keep", "_memo", "_new", "changed")

    def __init__(self, change: Change, keep: bool) -> None:
        self._change = change
        self._keep = keep
        self._memo: Memo = {}
        self._new = 0  # how many parts have become another object, so far
        self.changed = False

    def part(self, value: Any, where: Any = None) -> Any:
        """Return what becomes of one object."""
        if type(value) in PLAIN:
            return value
        known = self._memo.get(id(value))
        if known is not None:
            made = known[1]
        elif type(value) in _BARE:
            made = self._inside(value)
        else:
            self._memo[id(value)] = (value, value)  # for one that is taken apart in a way of its own, and holds itself
            made = self._change(value, self.part)
            if made is INSIDE:
                del self._memo[id(value)]
                made = self._inside(value)
            elif made is not value:
                self._memo[id(value)] = (value, made)
                self.changed = True
        if made is not value:
            self._new += 1
        return made

    def _inside(self, value: Any) -> Any:
        """Return what becomes of a container, or of a leaf."""
        before = self._new
        made = rebuild(value, self.part, self._memo)
        if self._keep and self._new == before:
            made = value
        self._memo[id(value)] = (value, made)
        return made
