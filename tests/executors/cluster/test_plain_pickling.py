"""Pickling for files: values come back, and neither writing nor reading touches a function that could do harm."""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import os
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from flowtrain import BatchEnd, Phase, TrainingPhase
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.learner_state import Named
from flowtrain.state.namespace import State
from flowtrain.state.parameters import NamedTensors
from flowtrain.state.series import Series, SeriesMap
from flowtrain_dask import register_copier
from flowtrain_dask.cluster.codec import Encoded, decode, encode
from flowtrain_dask.cluster.plain_pickling import PlainPickler, loads


class Colour(enum.Enum):
    """An enumeration of a user."""

    RED = 1


@dataclass
class Pair:
    """A dataclass of a user."""

    left: Any
    right: Any


class Point(NamedTuple):
    """A named tuple of a user."""

    x: Any
    y: Any


class Warm(BatchEnd):
    """An event of a user."""


@dataclass(init=False)
class Line(str):
    """A dataclass that is a text as well."""

    extra: int = 0


class Own:
    """A class of a user that no rule knows."""

    def __init__(self, value: int) -> None:
        self.value = value


class Outer:
    """A class of a user with one in it."""

    @dataclass
    class Inner:
        """A dataclass in a class."""


class Derived(Outer):
    """A class that inherits a class."""


class Known(Own):
    """A class of a user with a copier."""


register_copier(Known, lambda value: Known(value.value))


def through(value: Any) -> Any:
    """Return a value as a file gives it back."""
    return decode(bytes(Encoded(value, None, PlainPickler)), loads)


def series() -> SeriesMap:
    """Return a map with one series."""
    made = SeriesMap("cbstate.metrics_step")
    made.push("Loss", 0.5, 1)
    return made


VALUES: list[Any] = [
    None, True, 3, 2.5, 1j, "text", b"bytes", [1], (2,), {"a": {3}}, frozenset({4}), slice(1, 2), range(3),
    collections.deque([1, 2]), collections.OrderedDict(a=1), collections.defaultdict(list, a=[1]),
    types.SimpleNamespace(a=1), torch.float16, torch.Size([2, 3]), torch.device("cpu"), np.arange(4.0), np.float32(3),
    functools.partial(int, base=2),
    np.array(["a", "bc"]), Colour.RED, Pair(1, [2]), Point(1, 2), TrainingPhase(), Counts((1, 2, 3, 4)), int, Pair,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}")
def test_values_come_back(value: Any) -> None:
    found = through(value)
    assert type(found) is type(value)
    if isinstance(value, functools.partial):
        assert found("11") == value("11")
        return
    assert np.array_equal(found, value) if isinstance(value, np.ndarray) else found == value


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.arange(10)[::3],
        torch.ones(2, requires_grad=True),
        torch.nn.Parameter(torch.ones(2)),
        torch.tensor([1 + 2j]).conj(),
        torch.zeros(0, 3),
        torch.eye(2).to_sparse(),
        torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    ],
    ids=["transposed", "strided", "requires_grad", "parameter", "conjugate", "empty", "sparse", "bfloat16"],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.14 says that this takes time
def test_tensors_come_back(tensor: torch.Tensor) -> None:
    found = through([tensor, tensor])
    assert found[0] is found[1]
    assert (type(found[0]), found[0].dtype, found[0].requires_grad) == (
        type(tensor),
        tensor.dtype,
        tensor.requires_grad,
    )
    assert torch.equal(found[0].to_dense(), tensor.to_dense())


def test_objects_come_back() -> None:
    event, module = Warm(), torch.nn.Linear(2, 3)
    found = through([event, module, Known(3)])
    assert type(found[0]) is Warm
    assert torch.equal(found[1].weight, module.weight)
    assert (type(found[2]), found[2].value) == (Known, 3)


def test_containers_of_flowtrain_come_back() -> None:
    by_phase: PhaseMap[Any] = PhaseMap("cbstate.x", list)
    by_phase[TrainingPhase()].append(1)
    counts = CountsMap("cbstate.history")
    state = State("cbstate")
    state.mine = {"a": torch.ones(1)}
    found = through(
        [by_phase, series(), counts, state, Named("model", {"a": 1}), NamedTensors({"w": torch.ones(2)}, {})]
    )
    assert found[0][TrainingPhase()] == [1]
    assert list(found[1]["Loss"]) == [(1, 0.5)]
    assert len(found[2]) == 0
    assert torch.equal(found[3].mine["a"], torch.ones(1))
    assert dict(found[4]) == {"a": 1}
    assert torch.equal(found[5]["w"], torch.ones(2))
    assert type(found[1]["Loss"]) is Series


def local_class() -> object:
    """Return an object of a class that no module has."""

    @dataclass
    class Inside:
        """Inside."""

    return Inside()


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (print, "builtins.print"),
        (os.execv, "posix.execv"),
        (lambda: 1, "<lambda>"),
        (Own(1), "Own"),
        (local_class(), "Inside"),
        (torch.load, "torch.serialization.load"),
        ("text".upper, "str.upper"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_runs_code_is_not_written(value: Any, named: str) -> None:
    with pytest.raises(TypeError, match=r"cannot be in a file") as caught:
        through([value])
    assert named in str(caught.value)


class Evil:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.made = function, arguments

    def __reduce__(self) -> Any:
        return self.made


@pytest.mark.parametrize(
    ("evil", "named"),
    [
        (Evil(os.execv, "/bin/true", ("true",)), "posix.execv"),
        (Evil(eval, "1"), "builtins.eval"),
        (Evil(getattr, "text", "upper"), "builtins.getattr"),
        (Evil(pickle.loads, b"N."), "_pickle.loads"),
        (Evil(torch.load, "file"), "torch.serialization.load"),
        (Evil(Own, 1), "Own"),
        (Evil(type, "A", (), {}), "builtins.type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_others_calls_nothing(evil: Evil, named: str) -> None:
    with pytest.raises(pickle.UnpicklingError, match="which is no type of a value, or is not imported") as caught:
        loads(pickle.dumps([evil]))
    assert named in str(caught.value)


RAN: list[str] = []
"""The code of classes that was run."""


def watched(kind: Any) -> Any:
    """Let every method of a class note that it has run."""

    def noting(name: str) -> Callable[..., Any]:
        def run(self: Any, *arguments: Any, **options: Any) -> Any:
            RAN.append(f"{kind.__name__}.{name}")
            return {}

        return run

    own = ("__init__", "__post_init__", "__setstate__", "__getstate__", "__reduce__", "__setattr__", "__call__")
    asked = ("__str__", "__repr__", "__index__", "__int__", "__fspath__", "__iter__", "__bool__", "__len__")
    for name in (*own, *asked, "__getattr__", "keys", "items", "replace"):
        setattr(kind, name, noting(name))
    if issubclass(kind, dict):
        kind.__setitem__ = noting("__setitem__")
    if not issubclass(kind, Phase):
        kind.__new__ = noting("__new__")
    setattr(kind, "prop", property(noting("prop"), noting("prop")))  # noqa: B010  # the type does not have it
    return kind


@watched
@dataclass
class Watched:
    """A dataclass of a user."""

    value: Any = None


@watched
@dataclass
class Output(collections.OrderedDict[str, Any]):
    """A dataclass that is a dict as well, as the outputs of models of transformers are."""

    value: Any = None


@watched
class WatchedPoint(Point):
    """A named tuple of a user."""


@watched
class WatchedModule(torch.nn.Module):
    """A module of a user."""


@watched
class WatchedEvent(BatchEnd):
    """An event of a user."""


@watched
class WatchedPhase(Phase):
    """A phase of a user."""


class WatchedEnum(enum.Enum):
    """An enumeration of a user."""

    ONE = 1

    @classmethod
    def _missing_(cls, value: object) -> Any:
        RAN.append("WatchedEnum._missing_")


CLASSES: list[Any] = [Watched, Output, WatchedPoint, WatchedModule, WatchedEvent, WatchedPhase]


def made(kind: Any) -> Any:
    """Return an object of a class with an attribute, without calling anything of it."""
    if kind is WatchedPhase:
        return Phase.__new__(kind)
    if kind is WatchedPoint:
        found: Any = tuple.__new__(kind, (1, 2))
    else:
        base: Any = collections.OrderedDict if kind is Output else object
        found = base.__new__(kind)
    vars(found)["value"] = [torch.ones(2)]
    if kind is Output:
        collections.OrderedDict.__setitem__(found, "value", 3)
    return found


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_no_code_of_a_class_runs_when_its_objects_come_back(kind: Any) -> None:
    RAN.clear()
    one = made(kind)
    first, second = through([one, one])
    assert first is second
    assert type(first) is kind
    if kind is WatchedPhase:
        assert first is one
    else:
        assert torch.equal(vars(first)["value"][0], torch.ones(2))
    if kind is Output:
        assert [*collections.OrderedDict.items(first)] == [("value", 3)]
    if kind is WatchedPoint:
        assert [*tuple.__iter__(first)] == [1, 2]
    assert RAN == []


def pickle_of(*parts: object) -> bytes:
    """Return a pickle of instructions as bytes, and of classes as themselves or by the names of module and class."""
    blob = b"\x80\x05"
    for part in parts:
        if isinstance(part, bytes):
            blob += part
        elif isinstance(part, tuple):
            blob += "c{}\n{}\n".format(*part).encode()
        else:
            kind: Any = part
            blob += f"c{kind.__module__}\n{kind.__qualname__}\n".encode()
    return blob + b"."


def asking(module: str, name: str, kind: Any) -> bytes:
    """Return a pickle that calls something with an object of a class."""
    return pickle_of((module, name), b"(", kind, b")", pickle.NEWOBJ, b"t", pickle.REDUCE)


HOSTILE: list[tuple[str, Callable[[Any], bytes]]] = [
    ("it calls it", lambda kind: pickle_of(kind, b"(K\x01t", pickle.REDUCE)),
    ("it calls it without arguments", lambda kind: pickle_of(kind, b")", pickle.REDUCE)),
    ("it makes it with arguments", lambda kind: pickle_of(kind, b"(K\x01K\x02K\x03t", pickle.NEWOBJ)),
    ("it makes it with names", lambda kind: pickle_of(kind, b")}", pickle.NEWOBJ_EX)),
    ("it makes it the old way", lambda kind: pickle_of(b"(", kind, b"K\x01", pickle.OBJ)),
    ("it calls its object", lambda kind: pickle_of(kind, b")", pickle.NEWOBJ, b")", pickle.REDUCE)),
    ("it sets items", lambda kind: pickle_of(kind, b")", pickle.NEWOBJ, b"K\x01K\x02", pickle.SETITEM)),
    ("it sets many items", lambda kind: pickle_of(kind, b")", pickle.NEWOBJ, b"(K\x01K\x02", pickle.SETITEMS)),
    ("it appends", lambda kind: pickle_of(kind, b")", pickle.NEWOBJ, b"K\x01", pickle.APPEND)),
    ("it extends", lambda kind: pickle_of(kind, b")", pickle.NEWOBJ, b"(K\x01", pickle.APPENDS)),
    ("it adds", lambda kind: pickle_of(kind, b")", pickle.NEWOBJ, b"(K\x01", pickle.ADDITEMS)),
    ("it prepares a call", lambda kind: pickle_of(("functools", "partial"), b"(", kind, b"t", pickle.REDUCE)),
    ("it changes the class", lambda kind: pickle_of(kind, b"}", pickle.BUILD)),
    *(
        (f"{name.rpartition('.')[2]} asks it", partial(asking, *name.rsplit(".", 1)))
        for name in (
            "builtins.str",
            "builtins.int",
            "builtins.list",
            "builtins.dict",
            "builtins.bool",
            "builtins.range",
            "builtins.complex",
            "builtins.bytes",
            "pathlib.PurePosixPath",
            "collections.Counter",
            "fractions.Fraction",
            "datetime.date",
            "uuid.UUID",
            "torch.Tensor",
            "numpy.dtype",
            "flowtrain.state.learner_state.Named",
        )
    ),
    ("a size asks it", lambda kind: pickle_of(("torch", "Size"), b"(](", kind, b")\x81et", pickle.REDUCE)),
    ("it is the arguments", lambda kind: pickle_of(("builtins", "str"), kind, b")", pickle.NEWOBJ, pickle.REDUCE)),
    ("it makes of it", lambda kind: pickle_of(Pair, kind, b")", pickle.NEWOBJ, pickle.NEWOBJ)),
    ("it fills from it", lambda kind: pickle_of(Pair, b")", pickle.NEWOBJ, kind, b")", pickle.NEWOBJ, pickle.BUILD)),
    ("it fills twice", lambda kind: pickle_of(Pair, b")", pickle.NEWOBJ, kind, b")\x81N\x86", pickle.BUILD)),
    ("a namespace fills", lambda kind: pickle_of(types.SimpleNamespace, b")R", kind, b")", pickle.NEWOBJ, b"b")),
    ("a layer fills", lambda kind: pickle_of(torch.nn.LSTM, b")", pickle.NEWOBJ, kind, b")", pickle.NEWOBJ, b"b")),
    ("a list gets it", lambda kind: pickle_of(b"]K\x01a", kind, b")", pickle.NEWOBJ, b"K\x01", pickle.SETITEM)),
    ("it calls a name of it", lambda kind: pickle_of(kind, b")", pickle.NEWOBJ, b"(K\x01t", pickle.REDUCE)),
    ("it partly calls it", lambda kind: pickle_of(("functools", "partial"), b"(", kind, b")\x81t", pickle.REDUCE)),
    ("it changes a phase", lambda kind: pickle_of(WatchedPhase, b")R}", pickle.BUILD)),
    ("it sets a property", lambda kind: pickle_of(kind, b")", pickle.NEWOBJ, b"}X\x04\0\0\0propK\x01s", pickle.BUILD)),
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("number", range(len(HOSTILE)), ids=[what for what, _ in HOSTILE])
def test_a_file_of_others_runs_no_code_of_a_class_that_is_imported(kind: Any, number: int) -> None:
    RAN.clear()
    blob = HOSTILE[number][1](kind)
    with contextlib.suppress(pickle.UnpicklingError, TypeError, AttributeError):
        loads(blob)
    assert RAN == []


def test_a_file_of_others_reads_no_property_and_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with dots is one of a class in a class; ``getattr`` would look further."""
    RAN.clear()
    module = types.ModuleType("tests_lazy")

    def lazy(name: str) -> Any:
        RAN.append(name)
        return Watched

    vars(module).update(thing=made(Watched), __getattr__=lazy)
    monkeypatch.setitem(sys.modules, "tests_lazy", module)
    for name in ("missing", "thing.prop", "thing.value", "thing", "thing.__class__", "__getattr__"):
        with pytest.raises(pickle.UnpicklingError, match="which is no type of a value, or is not imported"):
            loads(pickle_of(("tests_lazy", name)))
    assert RAN == []
    with pytest.raises(pickle.UnpicklingError, match=r"names torch\._dynamo"):
        loads(pickle_of(("torch", "_dynamo.config")))
    assert loads(pickle_of(Outer.Inner)) is Outer.Inner
    assert loads(pickle_of((__name__, "Derived.Inner"))) is Outer.Inner


def test_a_file_of_others_changes_nothing_that_it_has_not_made() -> None:
    """Phases and members of enumerations are one object for the whole program."""
    for kind, arguments in ((TrainingPhase, b")"), (Colour, b"(K\x01t"), (Pair, b"")):
        makes = (kind, arguments, pickle.REDUCE) if arguments else (kind,)
        with pytest.raises(pickle.UnpicklingError, match=r"it changes .*, which it has not made"):
            loads(pickle_of(*makes, b"}X\x01\0\0\0aK\x01s", pickle.BUILD))
    name = "flowtrain_dask.cluster.pickling", "_set_attributes"
    setter = pickle_of(name, b"(", Colour, b"(K\x01t", pickle.REDUCE, b"}t", pickle.REDUCE)
    with pytest.raises(pickle.UnpicklingError, match="it calls _set_attributes with an object of a class"):
        loads(setter)
    with pytest.raises(pickle.UnpicklingError, match=r"it calls .*WatchedEnum with 7, which is none of its members"):
        loads(pickle_of(WatchedEnum, b"(K\x07t", pickle.REDUCE))
    assert "WatchedEnum._missing_" not in RAN


def test_torch_modules_that_restore_themselves_come_back() -> None:
    layer = torch.nn.LSTM(2, 3)
    found = through(layer)
    assert torch.equal(found(torch.ones(1, 1, 2))[0], layer(torch.ones(1, 1, 2))[0])


def test_a_class_that_is_made_of_more_is_not_written() -> None:
    """Several members of a flag, and a class that is derived from one that is written in C."""

    class Flags(enum.Flag):
        """Flags."""

        A = 1
        B = 2

    for value in (Flags.A | Flags.B, Line("text")):
        with pytest.raises(TypeError):
            through([value])


def test_the_pickles_for_workers_are_refused() -> None:
    """They may hold a tensor that torch unpickles, and code by value."""
    for value in (torch.eye(2).to_sparse(), lambda: 1):
        with pytest.raises(pickle.UnpicklingError):
            decode(encode(value), loads)


def test_reading_imports_nothing() -> None:
    module = "colorsys"
    before = sys.modules.pop(module, None)
    with pytest.raises(pickle.UnpicklingError, match=f"it names {module}.rgb_to_hsv"):
        loads(f"c{module}\nrgb_to_hsv\n.".encode())
    assert module not in sys.modules
    if before is not None:
        sys.modules[module] = before


def test_phases_of_a_user_are_plain() -> None:
    class Late(Phase):
        """A phase that no module has."""

    with pytest.raises(TypeError, match="Late cannot be in a file without code"):
        through(Late())
