# pyright: reportPrivateUsage=false
# It allows the functions by which two other modules make their objects again.
"""Pickling for files: events and their snapshots without code, so that a checkpoint runs none when it is read.

A pickle names functions and classes, and calls them when it is read. `PlainPickler` refuses every name but those of
`is_plain`, and `loads` refuses the same names in a file of others. A class of the user is plain if it holds values: an
event, a phase, an enumeration, a dataclass, a named tuple, a module, or a type with a copier. It is looked up among the
modules that the program has imported; reading a file imports nothing.

A class of the user is never called either, since a file of others could choose the arguments: its objects are made
empty, and their attributes are put into them. So no ``__init__``, ``__post_init__`` or ``__setstate__`` of the user
runs, no property is read or set, and no method of a container is called. Functions and classes of Python, NumPy and
torch ask their arguments for methods, as ``str`` and ``range`` do; so they get no object of the user. What does run is
the ``__hash__`` and ``__eq__`` of an object that is the key of a dict or the value of an enumeration.
"""

from __future__ import annotations

import collections
import copyreg
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import pathlib
import pickle
import sys
import types
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
import torch._utils
from torch import nn

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.data.nested import attributes, set_attributes
from flowtrain.state.readonly import itself
from flowtrain_dask.cluster import pickling
from flowtrain_dask.cluster.pickling import ValuePickler
from flowtrain_dask.snapshots import series
from flowtrain_dask.snapshots.copiers import COPIERS

__all__ = ["PlainPickler", "is_plain", "loads"]

_TYPES = frozenset({
    object, type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset, slice,
    range, collections.OrderedDict, collections.defaultdict, collections.Counter, collections.deque,
    types.SimpleNamespace, functools.partial,
    datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone, decimal.Decimal,
    fractions.Fraction, uuid.UUID, pathlib.Path, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePath,
    pathlib.PurePosixPath, pathlib.PureWindowsPath, torch.Size, torch.device, torch.Tensor, nn.Parameter,
})  # fmt: skip

_FUNCTIONS = frozenset({
    pickling._storage, pickling._strided, pickling._requiring_grad, pickling._conjugate, pickling._negative,
    pickling._set_attributes, series._cut, series._tail, series._shown, torch._utils._rebuild_parameter, itself,
})  # fmt: skip
"""The functions by which `pickling` and `series` make their objects again. None of them calls what it is given."""

_OWN = ("flowtrain.state.", "flowtrain_dask.snapshots.", "flowtrain.callback.events", "flowtrain.callback.phases")
"""The modules of flowtrain whose classes are parts of snapshots."""

_OF_NUMPY = {"numpy": ("ndarray", "dtype"), "multiarray": ("_reconstruct", "scalar"), "numeric": ("_frombuffer",)}
_VALUES = (torch.dtype, torch.layout, torch.memory_format)
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, *_VALUES)
"""The types of objects that a pickle has by their names."""

_MEMORY = (memoryview, torch.UntypedStorage, pickle.PickleBuffer)
_KEEPING = (itself, slice)
"""Functions and classes that keep an argument, and ask it for nothing."""


def is_plain(found: Any) -> bool:
    """Tell whether a function, a class or a constant only holds or makes values."""
    if isinstance(found, _VALUES):
        return True
    module, name = getattr(found, "__module__", None) or "", getattr(found, "__name__", "")
    if module.partition(".")[0] == "numpy" and name in _OF_NUMPY.get(module.rpartition(".")[2], ()):
        return True
    if not isinstance(found, type):
        return found is _load_plain or any(found is each for each in _FUNCTIONS)
    if found in _TYPES or module.startswith(_OWN) or module.startswith("numpy.dtypes"):
        return True
    if issubclass(found, (Event, Phase, enum.Enum, nn.Module)) or dataclasses.is_dataclass(found):
        return True
    return (issubclass(found, tuple) and hasattr(found, "_fields")) or COPIERS.registered(found)


class PlainPickler(ValuePickler):
    """A pickler that refuses functions and classes that are not plain.

    Raises:
        TypeError: The value has such a part; the text names it.
    """

    def reducer_override(self, obj: Any) -> Any:
        """Return how an object is made again; a class or function by its name, never by its code.

        Raises:
            TypeError: The class of the object, or the function, cannot be in a file without code.
        """
        if isinstance(obj, (type, types.FunctionType, types.BuiltinFunctionType)):
            if not is_plain(obj) or _named(obj.__module__, obj.__qualname__) is not obj:
                raise TypeError(f"{obj.__module__}.{obj.__qualname__} cannot be in a file without code")
            return NotImplemented
        if isinstance(obj, functools.partial) and not _may_be_called(obj.func):
            raise TypeError(f"{obj!r} cannot be in a file without code")
        if not is_plain(type(obj)) or _is_own(type(obj)):
            return super().reducer_override(obj)
        return _taken_apart(obj)

    def _reduce_tensor(self, tensor: torch.Tensor) -> Any:
        reduced = super()._reduce_tensor(tensor)
        if reduced is NotImplemented or reduced[0] is not pickling._load:
            return reduced
        if type(tensor) is not torch.Tensor:
            raise TypeError(f"a tensor of type {type(tensor).__name__} cannot be in a file without code")
        file = io.BytesIO()
        torch.save(tensor, file)
        return _load_plain, (file.getvalue(),)


def _load_plain(saved: bytes) -> torch.Tensor:
    """Return a tensor that is no strided one, or is empty, from the bytes of ``torch.save``."""
    tensor: torch.Tensor = torch.load(io.BytesIO(saved), weights_only=True)
    return tensor


def _named(module: str | None, name: str) -> Any:
    """Return the object of a name in an imported module, or ``None``.

    Only the names that modules and classes hold themselves are looked up: ``getattr`` would run the ``__getattr__`` of
    a module, which may import others, or a property of an object in it.
    """
    first, *rest = name.split(".")
    found: Any = getattr(sys.modules.get(module or ""), "__dict__", {}).get(first)
    for part in rest:
        classes = type.mro(found) if issubclass(type(found), type) else []
        found = next((vars(each)[part] for each in classes if part in vars(each)), None)
    return found


def _is_own(kind: Any) -> bool:
    """Tell whether an object is a class of Python, NumPy, torch or flowtrain, which makes its objects itself."""
    if not isinstance(kind, type):
        return False
    return kind in _TYPES or kind.__module__.startswith(_OWN) or kind.__module__.partition(".")[0] == "numpy"


def _is_of_user(value: Any, deep: bool) -> bool:
    """Tell whether a value is an object of a class of the user, or with `deep` a tuple or a list that has one."""
    kind = type(value)
    if deep and kind in (tuple, list):
        return any(_is_of_user(each, deep) for each in value)
    return not (_is_own(kind) or kind in _MEMORY or issubclass(kind, _NAMED))


def _text(value: Any) -> str:
    """Return a value for a message, without asking an object of the user for its text."""
    return repr(value) if type(value) in (int, str) else f"an object of type {type(value).__name__}"


def _may_be_called(found: Any) -> bool:
    """Tell whether an object is a plain function, or a class that makes its objects itself."""
    return _is_own(found) or (isinstance(found, (types.FunctionType, types.BuiltinFunctionType)) and is_plain(found))


def _restores_itself(kind: type) -> bool:
    """Tell whether the ``__setstate__`` of a class is torch's, as that of a recurrent layer, which it needs."""
    return (getattr(getattr(kind, "__setstate__", None), "__module__", None) or "").startswith("torch.nn.modules.")


def _container_of(kind: type) -> type | None:
    """Return the container of Python that a class is derived from; ``None`` if it holds attributes alone."""
    return next((each for each in (collections.OrderedDict, dict, tuple) if issubclass(kind, each)), None)


def _taken_apart(obj: Any) -> Any:
    """Return an object of a class of the user as its class, its attributes and its items.

    Raises:
        TypeError: It has more than these.
    """
    kind, base = type(obj), _container_of(type(obj))
    if isinstance(obj, enum.Enum):
        if obj.name not in kind.__members__:
            raise TypeError(f"{obj!r}, which is several members, cannot be in a file without code")
        return kind, (obj.value,)
    if isinstance(obj, Phase):
        return kind, ()
    own = obj.__getstate__() if _restores_itself(kind) else attributes(obj)
    items = iter(dict.items(obj)) if base is not None and issubclass(base, dict) else None
    arguments = (tuple(tuple.__iter__(obj)),) if base is tuple else ()
    _empty(kind, arguments)
    return copyreg.__newobj__, (kind, *arguments), own, None, items  # type: ignore[attr-defined]  # not in the stubs


def _empty(kind: Any, arguments: Sequence[Any]) -> Any:
    """Return an object of a class of the user without calling anything of it.

    Raises:
        TypeError: The class is derived from another one that is written in C.
        UnpicklingError: There are arguments for a class that takes none.
    """
    base = _container_of(kind)
    if arguments and base is not tuple:
        raise pickle.UnpicklingError(f"it calls {kind.__qualname__}")
    return (base or object).__new__(kind, *arguments)


def _member(kind: type[enum.Enum], value: Any) -> enum.Enum:
    """Return the member of an enumeration, whose own ways to find one are not asked.

    Raises:
        UnpicklingError: It has no such member.
    """
    found = next((each for each in kind.__members__.values() if each.value == value), None)
    if found is None:
        raise pickle.UnpicklingError(f"it calls {kind.__qualname__} with {_text(value)}, which is none of its members")
    return found


_Base: Any = pickle._Unpickler
"""The unpickler that is written in Python. A subclass of it decides what each instruction of a pickle may do."""


class _PlainUnpickler(_Base):  # type: ignore[misc]  # the interpreter's own annotations leave out what is used here
    """Reads a pickle, and calls only functions of `_FUNCTIONS` and classes of `_is_own`.

    Each method with an underscore does one instruction, with the objects on the stack of the unpickler.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Base.dispatch)

    def __init__(self, file: io.BytesIO, *, buffers: Iterable[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._made: dict[int, Any] = {}  # the objects of classes of the user that are being filled, by their ids

    def find_class(self, module: str, name: str) -> Any:
        """Return the function or class of a name.

        Raises:
            UnpicklingError: It is not plain, or its module is not imported.
        """
        found = _named(module, name)
        if not issubclass(type(found), _NAMED) or not is_plain(found):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no type of a value, or is not imported")
        return found

    def _take_call(self) -> tuple[Any, tuple[Any, ...]]:
        """Take a function or class and its arguments from the stack.

        Raises:
            UnpicklingError: An argument is an object of the user, and the function may ask it for a method.
        """
        arguments, found = self.stack.pop(), self.stack.pop()
        if type(arguments) is not tuple or not issubclass(type(found), _NAMED):
            raise pickle.UnpicklingError(f"it calls {_text(found)} with {_text(arguments)} as arguments")
        name = getattr(found, "__module__", None) or ""
        deep = not name.startswith(("flowtrain.", "flowtrain_dask."))
        if found not in _KEEPING and _may_be_called(found) and any(_is_of_user(each, deep) for each in arguments):
            raise pickle.UnpicklingError(f"it calls {found.__qualname__} with an object of a class of the program")
        return found, arguments

    def _call(self) -> None:
        found, arguments = self._take_call()
        if _may_be_called(found):
            if found is pickling._set_attributes and not isinstance(arguments[0], torch.Tensor):
                raise pickle.UnpicklingError(f"it changes an object of type {type(arguments[0]).__name__}")
            if found is functools.partial and not _may_be_called(arguments[0]):
                raise pickle.UnpicklingError(f"it prepares a call of {_text(arguments[0])}")
            self.append(found(*arguments))
        elif isinstance(found, type) and issubclass(found, enum.Enum) and len(arguments) == 1:
            self.append(_member(found, arguments[0]))
        elif isinstance(found, type) and issubclass(found, Phase) and not arguments:
            self.append(Phase.__new__(found))
        else:
            raise pickle.UnpicklingError(f"it calls {found.__qualname__}")

    def _make(self) -> None:
        kind, arguments = self._take_call()
        if _is_own(kind):
            made = kind.__new__(kind, *arguments)
        else:
            made = _empty(kind, arguments)
            self._made[id(made)] = made
        self.append(made)

    def _set_state(self) -> None:
        value, state = self.stack[-2:]
        if id(value) not in self._made and (issubclass(type(value), Phase) or not _is_own(type(value))):
            raise pickle.UnpicklingError(f"it changes {_text(value)}, which it has not made")
        parts = state if type(state) is tuple else (state,)
        of_numpy = type(value).__module__.partition(".")[0] == "numpy"
        if any(_is_of_user(each, of_numpy) for each in parts):
            raise pickle.UnpicklingError(f"it fills {_text(value)} from an object of a class of the program")
        if type(value) is functools.partial and not _may_be_called(parts[0]):
            raise pickle.UnpicklingError(f"it prepares a call of {_text(parts[0])}")
        if id(value) not in self._made or _restores_itself(type(value)):
            _Base.load_build(self)
        else:
            self.stack.pop()
            own, slots = parts if len(parts) == 2 else (*parts, None)
            set_attributes(value, {**(own or {}), **(slots or {})})

    def _set_items(self) -> None:
        self._enter(self.pop_mark())

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._enter([key, value])

    def _enter(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        base: Any = _container_of(type(target)) if id(target) in self._made else type(target)
        if base is None or not (issubclass(base, dict) or base.__module__.startswith(_OWN)) or not _is_own(base):
            raise pickle.UnpicklingError(f"it puts items into an object of type {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            base.__setitem__(target, key, value)

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it has an instruction that files of flowtrain do not have")

    for _code in (pickle.OBJ, pickle.INST, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_code[0]] = _refuse
    dispatch[pickle.REDUCE[0]] = _call
    dispatch[pickle.NEWOBJ[0]] = _make
    dispatch[pickle.BUILD[0]] = _set_state
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.SETITEM[0]] = _set_item


def _into_own(code: bytes, target: Callable[[Any], Any]) -> None:
    """Let an instruction add elements only to containers of Python and flowtrain, whose methods it calls."""
    original = _Base.dispatch[code[0]]

    def add(unpickler: Any) -> None:
        """Do the instruction."""
        kind = type(target(unpickler))
        if not _is_own(kind):
            raise pickle.UnpicklingError(f"it adds elements to an object of type {kind.__name__}")
        original(unpickler)

    _PlainUnpickler.dispatch[code[0]] = add


_into_own(pickle.APPEND, lambda unpickler: unpickler.stack[-2])
_into_own(pickle.APPENDS, lambda unpickler: unpickler.metastack[-1][-1])
_into_own(pickle.ADDITEMS, lambda unpickler: unpickler.metastack[-1][-1])


def loads(blob: bytes | memoryview, *, buffers: Iterable[Any] = ()) -> Any:
    """Return the value from a pickle of `PlainPickler`.

    Raises:
        UnpicklingError: It names a function or class that is not plain, or that the program has not imported.
    """
    return _PlainUnpickler(io.BytesIO(blob), buffers=buffers).load()
