"""Rule 21: how values are copied. After the copy everything is overwritten, and the copy still shows what was."""

from __future__ import annotations

import copy
import enum
import functools
import math
import types
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from flowtrain import AccessError, Read, UsageError, Write
from flowtrain.access import Access, declare
from flowtrain.state import LearnerState
from flowtrain_dask import register_copier
from flowtrain_dask.snapshots.copies import Copying, Pool, check

QUANTISED = pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: int = 0


@dataclass(slots=True)
class Slotted:
    x: Any
    items: list[Any] = field(default_factory=list)


@dataclass
class Output(OrderedDict[str, Any]):
    """As some libraries return model outputs: a mapping with attributes."""

    logits: Any = None

    def __post_init__(self) -> None:
        self["logits"] = self.logits


class Colour(enum.Enum):
    RED = 1


class Box:
    """A type that nobody knows."""

    def __init__(self, content: Any) -> None:
        self.content = content


def copied(value: Any) -> Any:
    return Copying(Pool(1 << 20)).entry(value, ("batch", "x"))


def tensor(size: int = 400) -> torch.Tensor:
    return torch.arange(float(size))


def ordered(**items: Any) -> OrderedDict[str, Any]:
    return OrderedDict(items)


CONTAINERS: dict[str, Callable[[torch.Tensor], Any]] = {
    "list": lambda t: [t, [t]],
    "tuple": lambda t: (1, t),
    "namedtuple": lambda t: Pair(t, "b"),
    "dict": lambda t: {"a": t, 3: {"b": t}},
    "ordered": lambda t: ordered(z=1, a=t),
    "defaultdict": lambda t: defaultdict(list, a=[t]),
    "userdict": lambda t: UserDict(a=t),
    "deque": lambda t: deque([1, t], maxlen=2),
    "frozen": lambda t: Frozen(t),
    "slotted": lambda t: Slotted(t, [t]),
    "output": lambda t: Output(logits=t),
    "namespace": lambda t: types.SimpleNamespace(a=t),
    "proxy": lambda t: types.MappingProxyType({"a": t}),
    "partial": lambda t: functools.partial(math.prod, t, start=[t]),
    "struct sequence": lambda t: torch.return_types.max((t, t)),
}


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_containers_are_rebuilt_around_copies(make: Callable[[torch.Tensor], Any]) -> None:
    source = tensor()
    value, expected = make(source), make(source.clone())
    found = copied(value)
    assert type(found) is type(value)
    source.fill_(-1)
    assert flat(found) == flat(expected)
    assert flat(found) != flat(value)


def flat(value: Any) -> str:
    """A text with all that a value holds."""
    if isinstance(value, functools.partial):
        return flat([value.func, value.args, value.keywords])
    return str([type(value), value, getattr(value, "__dict__", None)])


def test_containers_filled_later_do_not_grow_in_the_copy() -> None:
    items: list[Any] = [1]
    value = {"items": items, "set": {1, 2}, "counter": Counter("aab"), "bytes": bytearray(b"ab")}
    found = copied(value)
    items.append(2)
    value["set"].add(3)  # type: ignore[attr-defined]  # a set
    value["bytes"][0] = 0  # type: ignore[index]  # a bytearray
    assert found == {"items": [1], "set": {1, 2}, "counter": Counter("aab"), "bytes": bytearray(b"ab")}


def test_one_thing_in_two_places_stays_one_and_cycles_stay() -> None:
    source = tensor()
    items: list[Any] = [source, source, source[1:]]
    items.append(items)
    found = copied(items)
    assert found[0] is found[1]
    assert found[3] is found
    assert torch.equal(found[2], source[1:])


@pytest.mark.parametrize(
    "value", [1, True, 2.5, "a", b"b", None, 3j, Colour.RED, (1, "a"), frozenset({1}), Frozen(1), math.sin,
              torch.float16, range(3), torch.Size((1, 2)), np.float32(1.5), np.datetime64("2026-01-01"), Box, slice(1)],
)  # fmt: skip
def test_what_cannot_change_is_shared(value: Any) -> None:
    found = copied(value)
    assert found is value or (isinstance(value, Frozen) and found == value)


@pytest.mark.parametrize(
    "value",
    [np.arange(6.0).reshape(2, 3), np.array(2.0), np.asfortranarray(np.ones((2, 3))), np.zeros(0, dtype="i2"),
     np.ma.masked_array([1.0, 2.0], [False, True]), np.zeros(2, dtype=[("a", "i4"), ("b", "f8")])],
    ids=["array", "0-d", "fortran", "empty", "masked", "records"],
)  # fmt: skip
def test_numpy_arrays_are_copied(value: Any) -> None:
    expected = value.copy(order="K")
    found = copied(value)
    if value.size:
        value[...] = 7 if value.dtype.names is None else (7, 7)
    assert type(found) is type(expected)
    assert (found.dtype, found.strides) == (expected.dtype, expected.strides)
    np.testing.assert_array_equal(found, expected)


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex32,
          torch.float8_e4m3fn, torch.int8, torch.uint8, torch.uint16, torch.int64, torch.bool)  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype: torch.dtype) -> None:
    source = torch.arange(600).remainder(2).to(dtype)
    expected = source.clone()
    found = copied(source)
    source.zero_()
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


SHAPES: dict[str, Callable[[], torch.Tensor]] = {
    "0-d": lambda: torch.tensor(3.0),
    "empty": lambda: torch.zeros(0, 3),
    "transposed": lambda: tensor().view(20, 20).t(),
    "channels last": lambda: tensor().view(1, 4, 10, 10).contiguous(memory_format=torch.channels_last),
    "every other": lambda: tensor()[::2],
    "every fifth": lambda: tensor()[::5],
    "expanded": lambda: tensor().view(20, 1, 20).expand(20, 7, 20),
    "overlapping": lambda: tensor().unfold(0, 30, 1),
    "conjugate": lambda: torch.complex(tensor(), tensor()).conj(),
    "negative": lambda: torch.complex(tensor(), tensor()).conj().imag,
}


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_tensors_of_every_shape_in_their_strides(make: Callable[[], torch.Tensor]) -> None:
    source, expected = make(), make()
    found = copied(source)
    base = source if source._base is None else source._base
    base.detach().zero_()
    assert torch.equal(found, expected)
    if make not in (SHAPES["every fifth"], SHAPES["overlapping"]):
        assert found.stride() == expected.stride()
    assert found.untyped_storage().nbytes() <= 2 * expected.nbytes + 128


@QUANTISED
@pytest.mark.parametrize("channels", [False, True])
def test_quantised_tensors(channels: bool) -> None:
    if channels:
        scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
        source = torch.quantize_per_channel(torch.randn(2, 9), scales, zeros, 0, torch.qint8)
    else:
        source = torch.quantize_per_tensor(torch.randn(20), 0.1, 3, torch.quint8)
    found, expected = copied(source), source.int_repr().clone()
    source.copy_(torch.zeros(source.shape))
    assert torch.equal(found.int_repr(), expected)
    assert found.qscheme() == source.qscheme()


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state", "ignore:Sparse invariant checks are")
@pytest.mark.parametrize("layout", ["coo", "uncoalesced", "csr", "csc", "bsr"])
def test_sparse_tensors(layout: str) -> None:
    dense = torch.eye(4) * torch.arange(4.0)
    source = {
        "coo": lambda: dense.to_sparse(),
        "uncoalesced": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([1.0, 2.0]), (3,)),
        "csr": lambda: dense.to_sparse_csr(),
        "csc": lambda: dense.to_sparse_csc(),
        "bsr": lambda: dense.to_sparse_bsr((2, 2)),
    }[layout]()
    expected = source.to_dense()
    found = copied(source)
    (source._values() if source.layout is torch.sparse_coo else source.values()).zero_()
    assert found.layout is source.layout
    assert torch.equal(found.to_dense(), expected)


def test_copies_are_detached() -> None:
    """Rule 21: a held graph keeps a batch's memory."""
    weight = nn.Parameter(tensor())
    found = copied({"weight": weight, "loss": (weight * 2).sum()})
    assert type(found["weight"]) is torch.Tensor
    assert found["loss"].grad_fn is None
    assert not found["weight"].requires_grad


def test_a_model_is_copied_with_its_buffers_and_without_its_graph() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[0].bias.requires_grad_(False)
    model[1].last = model[0].weight * 2  # a module that keeps a result, with its graph
    model(torch.randn(5, 3)).sum().backward()
    calls: list[nn.Module] = []

    def note(module: nn.Module, inputs: Any, outputs: Any) -> None:
        """A hook."""
        calls.append(module)

    model.register_forward_hook(note)
    expected = copy.deepcopy({name: value.clone() for name, value in model.state_dict().items()})
    found = copied(model)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.zero_()
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert [each.requires_grad for each in found.parameters()] == [each.requires_grad for each in model.parameters()]
    assert found[0].weight.grad is None
    found(torch.randn(5, 3))
    assert calls == [found]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [Box(1)]}, r"learner\.batch\.x\['a'\]\[0\] is a .*Box, and a deferred callback reads it: training may "
                          r"change it .* flowtrain_dask\.register_copier\(Box, copy\.deepcopy\).*deferrable = False"),
        (Frozen(Box(1)), r"learner\.batch\.x\.x is a .*Box"),
        (np.array([[], 1], dtype=object), r"batch\.x is a numpy\.ndarray.*array of objects.*Read a list in its place"),
        (torch.nested.nested_tensor([torch.zeros(1)], layout=torch.jagged), r"subclass of Tensor"),
        (iter([1]), r"is a builtins\.list_iterator"),
    ],
)  # fmt: skip
def test_what_cannot_be_copied_is_named_with_a_remedy(value: Any, message: str) -> None:
    with pytest.raises(AccessError, match=message):
        copied(value)


def test_a_registered_type_is_copied_as_it_says() -> None:
    class Mine(Box):
        pass

    class Special(Mine):
        pass

    with pytest.raises(AccessError):
        copied(Special([1]))
    register_copier(Mine, copy.deepcopy)
    value = Special([1])
    found = copied([value])[0]
    value.content.append(2)
    assert (type(found), found.content) == (Special, [1])
    with pytest.raises(UsageError, match=r"register_copier\(3, \.\.\.\): the first argument is a type"):
        register_copier(3, copy.deepcopy)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(UsageError, match=r"register_copier\(Box, 3\): the second argument is a function"):
        register_copier(Box, 3)  # type: ignore[arg-type]  # what is tested


@pytest.mark.parametrize(
    ("access", "message"),
    [
        ({"data": Read()}, r"declares 'data', and there is no snapshot of data: loaders are used by training"),
        ({"callbacks": Read()}, r"no snapshot of callbacks: they hold the learner"),
        ({"cbstate.x": Write()}, r"declares Write\(\) on 'cbstate\.x', and works on a snapshot"),
        ({"cbstate": Read()}, r"learner\.cbstate\.box is a .*Box"),
        ({"cbstate.box": Read(optional=True)}, r"learner\.cbstate\.box is a .*Box"),
    ],
)
def test_a_declaration_is_checked_when_the_learner_is_built(access: Access, message: str) -> None:
    """Rule 21: otherwise an error when built."""
    state = LearnerState()
    state.cbstate.box = Box(1)
    with pytest.raises(AccessError, match=message):
        check(declare(access, "me"), state)
    check(declare({"cbstate.other": Read(), "batch": Read(), "model": Read(), "resource.x": Write()}, "me"), state)
