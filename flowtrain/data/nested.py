"""Nested data of users: each type of container is taken apart, and put together again around other parts.

A batch, an output or an entry of ``cbstate`` may be nested in any way. All code that goes through such values uses this
module, so that all of it knows the same types. Only a checkpoint has fewer: `flowtrain.state.encoding` refuses all
containers that ``torch.load(weights_only=True)`` could not read, so its own functions and
`flowtrain.training.checkpoint.rank_parts` know just dicts, lists, tuples and sets. The types are:

======================================================== ============================================================
type, and its subclasses                                 its parts
======================================================== ============================================================
``tuple`` (also named, of C, such as `torch.max` gives), the items, by number
``list``, ``deque``, ``set``, ``frozenset``
``dict``, ``OrderedDict``, ``defaultdict``               the values, by key; keys are not changed
``UserDict``, ``UserList``, ``MappingProxyType``         the container inside
``functools.partial``                                    the function and the arguments
dataclasses, ``SimpleNamespace``                         the attributes
======================================================== ============================================================

The attributes of each of these are parts too, also those in slots: a model output of the usual libraries is an
``OrderedDict`` with attributes. All other objects are *leaves*: tensors, arrays, modules, texts, enumerations, and
objects of unknown types. Only `parts` and `items` look into other mappings and sequences as well.

A container is made again without a call of its constructor, which may take other arguments or have side effects. An
object that is in two places is one object in the result, and a container that holds itself holds itself in the result.
``torch.utils._pytree`` does none of this: it is private, treats dataclasses as leaves, drops the attributes of a
subclass, makes two objects of one, and recurses without an end.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import gc
import types
from collections import OrderedDict, UserDict, UserList, UserString, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from operator import is_
from typing import Any, Final, TypeAlias

import torch

__all__ = [
    "INSIDE",
    "PLAIN",
    "Attribute",
    "Change",
    "Memo",
    "attributes",
    "is_nested",
    "items",
    "leaves",
    "like",
    "mapped",
    "parts",
    "place_text",
    "rebuild",
    "refill",
    "set_attributes",
]

PLAIN: Final[frozenset[type]] = frozenset({int, float, bool, str, bytes, complex, type(None)})
"""The exact types of values that have no parts and never change; every walk tests for them first, as it is quick."""

Memo: TypeAlias = "dict[int, tuple[Any, Any]]"
"""Each object and its counterpart in the result, by the id of the object, which is unique while the object lives."""


class Attribute(str):
    """The place of a part that is an attribute: its name. The place of any other part is a key or a number."""

    __slots__ = ()


def place_text(where: Any) -> str:
    """Return the place of a part as source code, to be written behind its container.

    >>> place_text("a"), place_text(0), place_text(Attribute("a"))
    ("['a']", '[0]', '.a')
    """
    return (where and f".{where}") if isinstance(where, Attribute) else f"[{where!r}]"


_DICTS = (dict, OrderedDict, defaultdict)
_BARE = frozenset({tuple, list, dict, set, frozenset, deque, defaultdict, types.MappingProxyType})
"""Types whose instances have no attributes; those of subclasses may have some."""
_OBJECTS = (types.SimpleNamespace, UserDict, UserList)
_BASES: Final[Mapping[type, Any]] = {
    **{kind: kind for kind in (*_BARE, OrderedDict, functools.partial)},
    **dict.fromkeys(_OBJECTS, object),  # their attributes are their only parts
    **dict.fromkeys(PLAIN),  # leaves, with all subclasses
}
"""The type whose methods take instances apart, for each type and its subclasses; ``None`` for leaves."""
_LEAVES = (torch.Tensor, torch.nn.Module, enum.Enum, type)
"""Types whose instances are leaves, also if a subclass is a container as well, such as an enumeration of tuples."""
_TEXTS = (str, bytes, bytearray, range, memoryview, UserString)
"""Types of sequences without parts. The items of a text are texts again, without an end."""


def _base(kind: type) -> Any:
    """Return the type whose methods take instances of a type apart; ``object`` for attributes, ``None`` for leaves."""
    if kind in _BASES:
        return _BASES[kind]
    if issubclass(kind, _LEAVES):
        return None
    known = next((base for base in kind.__mro__ if base in _BASES), None)
    return _BASES[known] if known is not None else object if dataclasses.is_dataclass(kind) else None


def is_nested(kind: type) -> bool:
    """Tell whether values of a type are taken apart and made again, as the table in the module docstring says."""
    return _base(kind) is not None


def _items(value: Any, base: Any) -> list[tuple[Any, Any]]:
    """Return the items of a container, which are its parts without the attributes, each with its place."""
    if base in _DICTS:
        return list(base.items(value))
    if base is object:
        return []
    if base is types.MappingProxyType:
        return [(Attribute(), gc.get_referents(value)[0])]  # a proxy gives its mapping in no other way
    if base is functools.partial:
        args = [(Attribute(f"args[{place}]"), arg) for place, arg in enumerate(value.args)]
        keywords = [(Attribute(f"keywords[{name!r}]"), arg) for name, arg in value.keywords.items()]
        return [(Attribute("func"), value.func), *args, *keywords]
    return list(enumerate(value))


def _make(value: Any, base: Any, items: list[Any]) -> Any:
    """Return an immutable container like `value` with other items."""
    kind: Any = type(value)
    if base is tuple:
        # A named tuple that is written in C can only be made by its constructor.
        in_c = isinstance(vars(kind).get("n_unnamed_fields"), int)
        return kind(items) if in_c else tuple.__new__(kind, items)
    if base is frozenset:
        return frozenset.__new__(kind, items)
    if base is types.MappingProxyType:
        return types.MappingProxyType(*items)
    end = 1 + len(value.args)
    keywords = dict(zip(value.keywords, items[end:], strict=True))
    return functools.partial.__new__(kind, *items[:end], **keywords)


def _empty(value: Any, base: Any) -> Any:
    """Return an empty container like `value`, or ``None`` if `value` is immutable, so that it cannot be filled."""
    kind: Any = type(value)
    if base in (tuple, frozenset, types.MappingProxyType, functools.partial):
        return None
    try:
        made = base.__new__(kind)
    except TypeError:  # a type that is written in C
        made = kind.__new__(kind)
    if base is deque:
        deque.__init__(made, (), value.maxlen)  # not the constructor of a subclass, which may take other arguments
    elif base is defaultdict:
        made.default_factory = value.default_factory
    return made


def _fill(made: Any, base: Any, places: list[Any], items: list[Any]) -> None:
    """Put items into an empty container by the methods of the base type, since a subclass may override them."""
    if base in _DICTS:
        enter = base.__setitem__
        for key, item in zip(places, items, strict=True):
            enter(made, key, item)
    elif base is not object:
        (base.update if base is set else base.extend)(made, items)


@functools.lru_cache(512)
def _slots(kind: type) -> tuple[str, ...]:
    """Return the names of the slots of a type and its bases, with private names as the class mangles them."""
    names: list[str] = []
    for base in kind.__mro__:
        slots: Any = base.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            private = slot.startswith("__") and not slot.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{slot}" if private else slot)
    return tuple(dict.fromkeys(name for name in names if name not in ("__dict__", "__weakref__")))


def attributes(value: Any) -> dict[str, Any]:
    """Return the attributes that an object holds itself, also those in slots, but no properties."""
    kind: Any = type(value)
    held: dict[str, Any] = dict(getattr(value, "__dict__", None) or ())
    for name in _slots(kind):
        if hasattr(value, name):  # a slot may be empty
            held[name] = getattr(value, name)
    return held


# --- taking apart


def parts(value: Any) -> list[tuple[Any, Any]] | None:
    """Return the parts of a container, each with its place (see `place_text`); ``None`` for a leaf.

    The items of mappings and sequences of other types are parts too.

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
    """Return the items of a container, or its attributes if it has no items, each with its place; ``None`` for a leaf.

    Mappings and sequences of all types have items. Attributes beside items are left out.
    """
    if isinstance(value, _LEAVES):
        return None
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (Sequence, Set)) and not isinstance(value, _TEXTS):
        inner = list(enumerate(value))
        return None if inner and _is_text(value, inner[0][1]) else inner
    if _base(type(value)) is not object:
        return None
    return [(Attribute(name), item) for name, item in attributes(value).items()]


def _is_text(value: Any, first: Any) -> bool:
    """Tell whether a sequence of an unknown type is a text, by its first item: a character is its own only item."""
    same = type(first) is type(value) and _base(type(value)) is None and len(first) == 1
    return same and (first is first[0] or (first == first[0]) is True)


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a value, each with its path; a leaf that is in several places comes once.

    Args:
        value: Any object.
        path: The path of `value` itself.

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
            waiting += [(path + place_text(where), part) for where, part in reversed(inner)]


# --- putting together again


def rebuild(
    value: Any,
    change: Callable[[Any, Any], Any],
    memo: Memo,
    change_key: Callable[[Any], Any] | None = None,
) -> Any:
    """Return a container of the same type around changed parts.

    A leaf is returned as it is, and so is an immutable container of which no part has changed, unless it has attributes
    that may have parts themselves: then it is made again.

    Args:
        value: Any object.
        change: A function of a part and its place that returns the part for the result.
        memo: The counterparts of the containers around this one and of their parts. `change` must look there first, and
            this container is added to it.
        change_key: A function that returns the key for the result; without it the keys of a dict stay the same.
    """
    base = _base(type(value))
    if base is None:
        return value
    made = _empty(value, base)
    if made is not None:
        memo[id(value)] = (value, made)  # before it is filled, since it may hold itself
    inner = _items(value, base)
    new = [change(item, where) for where, item in inner]
    if made is not None:
        _fill(made, base, [where if change_key is None else change_key(where) for where, _ in inner], new)
    elif id(value) in memo:
        return memo[id(value)][1]  # one of its parts contains it, so it was made while that part was changed
    elif all(part is item for part, (_, item) in zip(new, inner, strict=True)) and _has_plain_attributes(value):
        return value
    else:
        made = _make(value, base, new)
        memo[id(value)] = (value, made)
    if type(value) not in _BARE:
        set_attributes(made, {name: change(item, Attribute(name)) for name, item in attributes(value).items()})
    return made


def like(value: Any, items: list[Any], keys: Iterable[Any] = (), **own: Any) -> Any:
    """Return a container of the type of `value` with other items; `keys` are those of a dict, `own` new attributes."""
    base = _base(type(value))
    made = _empty(value, base)
    if made is None:
        made = _make(value, base, items)
    else:
        _fill(made, base, list(keys), items)
    set_attributes(made, {**attributes(value), **own})
    return made


def _has_plain_attributes(value: Any) -> bool:
    """Tell whether all attributes of a container are plain values, which no change replaces."""
    return type(value) in _BARE or all(type(item) in PLAIN for item in attributes(value).values())


def set_attributes(value: Any, own: Mapping[str, Any]) -> None:
    """Set attributes of an object directly, since a frozen dataclass refuses it and other types may override it."""
    kind: Any = type(value)
    slots = _slots(kind)
    for name, item in own.items():
        if name in slots:
            object.__setattr__(value, name, item)
        else:
            value.__dict__[name] = item


def refill(value: Any, content: Any) -> None:
    """Replace the parts of a mutable container by those of another container of its type; a leaf is not changed."""
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
"""The answer of the function that `mapped` is given, for an object whose parts are to be changed."""
Change: TypeAlias = "Callable[[Any, Callable[[Any], Any]], Any]"


def mapped(value: Any, change: Change, *, keep: bool = False) -> Any:
    """Return a value with some of its parts changed, in containers of the same types.

    Args:
        value: Any object.
        change: A function that is called for each object in the value, for a container before its parts. It is called
            once for each object, and twice only for an immutable container that holds itself. It is not called for
            objects of `PLAIN` types, nor for those of exactly these types: tuple, list, dict, defaultdict, set,
            frozenset, deque, mappingproxy. It returns the object for the result, or `INSIDE`: a container is then made
            again around its changed parts, and a leaf stays the same. Its second argument is a function that returns
            the part for the result, for a type of object that `change` takes apart itself.
        keep: Whether a container without a changed part stays the same object, unless it holds itself and another part
            of the value has changed. Otherwise all mutable containers are new.

    >>> mapped([1, ("a", torch.ones(2))], lambda item, part: item.shape if isinstance(item, torch.Tensor) else INSIDE)
    [1, ('a', torch.Size([2]))]
    """
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind is tuple or kind is list or kind is dict:
        inner = value.values() if kind is dict else value
        # A short way for most batches: different tensors and plain values, in one container without subclasses.
        if _FLAT.issuperset(map(type, inner)) and len({*map(id, inner)}) == len(value):
            new = [item if type(item) in PLAIN or (made := change(item, _stays)) is INSIDE else made for item in inner]
            if keep and all(map(is_, new, inner)):
                return value
            return kind(new) if kind is not dict else dict(zip(value, new, strict=True))
    walk = _Walk(change, keep)
    made = walk.part(value)
    # A container that holds itself was made again even if nothing has changed in it.
    return made if walk.changed or not keep else value


def _stays(part: Any) -> Any:
    return part


class _Walk:
    """One pass of `mapped`."""

    __slots__ = ("_change", "_keep", "_memo", "_new", "changed")

    def __init__(self, change: Change, keep: bool) -> None:
        self._change = change
        self._keep = keep
        self._memo: Memo = {}
        self._new = 0  # the number of parts so far that are another object in the result
        self.changed = False

    def part(self, value: Any, where: Any = None) -> Any:
        """Return one object for the result."""
        if type(value) in PLAIN:
            return value
        known = self._memo.get(id(value))
        if known is not None:
            made = known[1]
        elif type(value) in _BARE:
            made = self._inside(value)
        else:
            # The change may take the object apart itself, and meet the object again in its parts. There the object
            # stands for its own result, since the result is not known yet, and the change would be called without end.
            self._memo[id(value)] = (value, value)
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
        """Return a container or a leaf for the result, with its parts changed."""
        before = self._new
        made = rebuild(value, self.part, self._memo)
        if self._keep and self._new == before:
            made = value
        self._memo[id(value)] = (value, made)
        return made
