"""Pickling for other processes: tensors bit for bit, code by value or by name; what stays, and what cannot be sent."""

from __future__ import annotations

import io
import os.path
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.backends
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flowtrain import BatchEnd, Phase, TrainingPhase, ValidationPhase
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.learner_state import Named
from flowtrain.state.namespace import State
from flowtrain.state.parameters import NamedGradients, NamedTensors
from flowtrain.state.series import Series, SeriesMap
from flowtrain_dask.cluster.codec import Encoded, decode, encode
from flowtrain_dask.cluster.pickling import ValuePickler, dumps, loads
from flowtrain_dask.snapshots.copiers import COPIERS
from flowtrain_dask.snapshots.copying import Copying
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.series import Cut
from tests.support.encoded import closure, memory_of
from tests.support.programs import Programs

pytestmark = pytest.mark.filterwarnings(
    "ignore:ComplexHalf support is experimental",
    "ignore:Sparse .* tensor support is in beta state",
    "ignore:Sparse invariant checks are",
    "ignore:.*quantized tensor creation functions",
    "ignore:TypedStorage is deprecated",
    "ignore:The PyTorch API of nested tensors is in prototype",
)


DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
          torch.complex32, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int16, torch.uint16,
          torch.int32, torch.uint32, torch.int64, torch.uint64, torch.bool)  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of every dtype with random bits, as any view of their storage."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    count = 1
    for size in shape:
        count *= size
    bits = torch.tensor(
        list(draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))), dtype=torch.uint8
    )
    made = (bits % 2).to(torch.bool)[:count] if dtype is torch.bool else bits.view(dtype)
    made = made.view(shape)
    if draw(st.booleans()) and shape:
        made = made.permute(*draw(st.permutations(range(len(shape)))))
    if draw(st.booleans()) and shape:
        made = made[:: draw(st.integers(1, 3))]
    if draw(st.booleans()):
        made = made.unsqueeze(0).expand(3, *made.shape)
    return made


def bits(value: torch.Tensor) -> bytes:
    flat = torch.empty(value.numel(), dtype=value.dtype)
    return bytes(flat.copy_(value.reshape(-1)).view(torch.uint8).tolist())


@given(st.lists(tensors(), max_size=4))
def test_tensors_come_back_bit_for_bit(sources: list[torch.Tensor]) -> None:
    found = decode(encode(sources))
    for made, source in zip(found, sources, strict=True):
        assert (made.dtype, made.shape, bits(made)) == (source.dtype, source.shape, bits(source))
    for made, source in zip(decode(encode(Copying(COPIERS, Pool(1 << 16)).copy(sources))), sources, strict=True):
        assert (made.dtype, made.shape, bits(made)) == (source.dtype, source.shape, bits(source))


def test_aliases_are_kept() -> None:
    source = torch.arange(100.0)
    same, also, view, other = decode(encode([source, source, source[10:].view(9, 10).t(), torch.ones(3)]))
    assert same is also
    same.fill_(7)
    assert view.unique().tolist() == [7.0]
    assert view.stride() == (1, 10)
    assert other.tolist() == [1, 1, 1]


def test_a_small_part_of_a_large_storage_is_sent_alone() -> None:
    large = torch.zeros(1_000_000)
    blob = encode([large[5:10], large[3], large.view(1000, 1000)[:, 0]])
    assert len(blob) < 10_000
    assert [each.shape for each in decode(blob)] == [(5,), (), (1000,)]


def test_a_small_part_of_a_large_storage_that_is_sent_anyway_shares_its_memory() -> None:
    large = torch.zeros(1_000_000)
    blob = encode([large, *(large[at : at + 10] for at in range(0, 1000, 10))])
    assert len(blob) < 4_100_000
    found = decode(blob)
    found[0].fill_(7)
    assert found[5].tolist() == [7.0] * 10


@dataclass
class Bag:
    items: list[Any]


@pytest.mark.parametrize("kind", [NamedTensors, NamedGradients])
def test_named_tensors_of_a_pool_are_one_buffer(kind: type[NamedTensors]) -> None:
    sources = [torch.randn(64, 64), torch.randn(30, 3).t(), torch.arange(5000), torch.randn(7).bfloat16()]
    copies = Pool(1 << 24).like_all(sources)
    for copy, source in zip(copies, sources, strict=True):
        copy.copy_(source)
    named = kind(dict(zip("abcd", copies, strict=True)), {"tied": "a"})
    encoded = Encoded([named, copies[2]])
    assert memory_of(encoded) == [copies[0].data_ptr()]
    found, alone = decode(bytes(encoded))
    assert type(found) is kind
    assert list(found) == list("abcd")
    for name, source in zip("abcd", sources, strict=True):
        assert torch.equal(found[name], source)
        assert (found[name].dtype, found[name].stride()) == (source.dtype, source.stride())
    assert found["tied"] is found["a"]
    assert found["c"] is alone
    alone += 1
    assert torch.equal(found["c"], alone), "they share their memory there too"


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3),
        lambda: torch.randn(3, requires_grad=True),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.randn(4, dtype=torch.complex64).conj(),
        lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
        lambda: torch.empty(0, 3),
        lambda: nn.Parameter(torch.ones(2)),
    ],
    ids=["elsewhere", "with a gradient", "sparse", "conjugated", "quantised", "empty", "parameter"],
)
def test_named_tensors_that_are_not_in_one_piece(make: Callable[[], torch.Tensor]) -> None:
    other = make()
    named = NamedTensors({"a": torch.randn(1000), "b": other})
    found = decode(encode(named))
    assert torch.equal(found["a"], named["a"])
    assert type(found["b"]) is type(other)
    assert found["b"].layout is other.layout
    assert found["b"].requires_grad == other.requires_grad
    plain, back = (each.dequantize() if each.is_quantized else each.to_dense() for each in (other, found["b"]))
    assert torch.equal(plain, back)


def test_few_of_the_tensors_of_a_pool_are_sent_without_the_others() -> None:
    copies = Pool(1 << 24).like_all([torch.randn(100, 100) for _ in range(20)])
    named = NamedTensors({"a": copies[3], "b": copies[4]})
    encoded = Encoded(named)
    assert memory_of(encoded) == [copies[3].data_ptr(), copies[4].data_ptr()]
    assert encoded.nbytes < 100_000
    found = decode(bytes(encoded))
    assert torch.equal(found["b"], copies[4])


def test_everything_else_that_a_snapshot_holds() -> None:
    parameter = nn.Parameter(torch.ones(2), requires_grad=False)
    source = {
        "bag": Bag([1, parameter]),
        "array": np.asfortranarray(np.arange(6, dtype="f8").reshape(2, 3)),
        "scalar": np.float32(1.5),
        "leaf": torch.ones(2, requires_grad=True),
        "meta": torch.ones(2, 3, device="meta"),
        "local": closure(2),
        "dtype": torch.bfloat16,
        "named": Named("model", {"gen": 1}),
    }
    found = decode(encode(source))
    assert type(found["bag"].items[1]) is nn.Parameter
    assert not found["bag"].items[1].requires_grad
    np.testing.assert_array_equal(found["array"], source["array"])
    found["array"][0, 0] = 5.0  # writable, and its own
    assert found["array"].flags.f_contiguous
    assert found["scalar"] == np.float32(1.5)
    assert found["leaf"].requires_grad
    assert found["leaf"].is_leaf
    assert (found["meta"].device.type, found["meta"].shape) == ("meta", (2, 3))
    assert found["local"](2) == 4
    assert found["dtype"] is torch.bfloat16
    assert found["named"].gen == 1


def test_what_cbstate_holds() -> None:
    history, metrics, state = CountsMap("cbstate.history"), PhaseMap[Any]("cbstate.m"), State("cbstate.deep")
    history[TrainingPhase()] = Counts((1, 2, 3, 4))
    metrics[ValidationPhase] = SeriesMap("cbstate.m")
    metrics[ValidationPhase].push("Loss", 0.5, 3)
    state.best = torch.ones(2)
    counts, by_phase, deep, event, phase = decode(encode((history, metrics, state, BatchEnd(), TrainingPhase())))
    assert counts[TrainingPhase] == Counts((1, 2, 3, 4))
    assert counts[TrainingPhase].updates == 4
    assert type(counts) is CountsMap
    assert list(by_phase[ValidationPhase]["Loss"]) == [(3, 0.5)]
    assert deep.best.tolist() == [1.0, 1.0]
    assert type(event) is BatchEnd
    assert phase is TrainingPhase()
    assert isinstance(phase, Phase)


def test_a_tail_travels_without_what_came_before() -> None:
    series = Series("cbstate.s")
    for step in range(10_000):
        series.push(float(step), step)
    blob = encode(Cut(series, len(series), 9_990))
    assert len(blob) < 1000
    tail = decode(blob)
    assert (len(tail), tail.last(), tail.since(9_998)) == (10_000, (9_999, 9999.0), [9998.0, 9999.0])


@pytest.mark.parametrize("kind", ["coo", "csr", "bsc", "tensor", "channel"])
def test_sparse_and_quantised_tensors(kind: str) -> None:
    dense = torch.eye(4) * torch.arange(4.0)
    source = {
        "coo": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([1.0, 2.0]), (3,)),
        "csr": lambda: dense.to_sparse_csr(),
        "bsc": lambda: dense.to_sparse_bsc((2, 2)),
        "tensor": lambda: torch.quantize_per_tensor(dense, 0.1, 3, torch.quint8),
        "channel": lambda: torch.quantize_per_channel(dense, torch.ones(4), torch.arange(4), 0, torch.qint8),
    }[kind]()
    found = decode(encode(source))
    assert (found.layout, found.dtype, found.shape) == (source.layout, source.dtype, source.shape)
    if source.is_quantized:
        assert torch.equal(found.int_repr(), source.int_repr())
        assert torch.equal(found.dequantize(), source.dequantize())
    else:
        assert torch.equal(found.to_dense(), source.to_dense())
    if kind == "coo":
        assert not found.is_coalesced()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(2, 2).to_mkldnn(), "Cannot access storage of OpaqueTensorImpl"),
        (lambda: torch.zeros(2).untyped_storage(), "a torch storage is not sent to another process; send a tensor"),
        (lambda: torch.TypedStorage([1.0]), "a torch storage is not sent to another process; send a tensor"),
    ],
    ids=["mkldnn", "storage", "typed storage"],
)
def test_what_cannot_be_sent(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, NotImplementedError), match=message):
        encode({"inside": [make()]})


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    source = torch.nested.nested_tensor([torch.ones(2), torch.arange(3.0)], layout=layout)
    found = decode(encode(source))
    assert found.layout is layout
    assert [each.tolist() for each in found.unbind()] == [[1.0, 1.0], [0.0, 1.0, 2.0]]


def test_sparse_tensors_leave_nothing_behind_in_torch() -> None:
    """Torch notes those that a plain pickle makes, for the next ``torch.load`` to check: they would never be freed."""
    found = decode(encode([torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()]))
    assert [each.layout for each in found] == [torch.sparse_coo, torch.sparse_csr]
    assert vars(sys.modules["torch._utils"])["_sparse_tensors_to_validate"] == []


class Labelled(torch.Tensor):
    """A tensor with attributes."""

    label: Any


def pickled(value: object) -> bytes:
    """Return a pickle that has its buffers in it."""
    file = io.BytesIO()
    ValuePickler(file).dump(value)
    return file.getvalue()


def test_a_subclass_of_tensor_comes_back_with_its_attributes() -> None:
    source = torch.arange(5.0).as_subclass(Labelled)
    source.label = [torch.ones(3)]
    found = decode(encode(source))
    assert type(found) is Labelled
    assert torch.equal(found.as_subclass(torch.Tensor), torch.arange(5.0))
    assert torch.equal(found.label[0], torch.ones(3))


def test_a_parameter_comes_back_with_its_attributes() -> None:
    source = nn.Parameter(torch.ones(3), requires_grad=False)
    vars(source)["decay"] = 0.5
    found, data = decode(encode([source, source.data]))
    assert type(found) is nn.Parameter
    assert (found.requires_grad, vars(found)) == (False, {"decay": 0.5})
    assert found.data_ptr() == data.data_ptr()


def test_a_result_with_a_graph_comes_back_as_a_leaf() -> None:
    weight = torch.ones(3, requires_grad=True)
    found = decode(encode(weight * 2))
    assert found.requires_grad
    assert found.is_leaf
    assert found.tolist() == [2.0, 2.0, 2.0]
    found.sum().backward()
    assert found.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "make",
    [lambda: torch.complex(torch.arange(9.0), torch.ones(9)).conj(),
     lambda: torch.complex(torch.arange(9.0), torch.ones(9)).conj().imag],
    ids=["conjugate", "negative"],
)  # fmt: skip
def test_what_is_only_marked_as_other_values_has_those(make: Callable[[], torch.Tensor]) -> None:
    source = make()
    found = decode(encode(source))
    assert torch.equal(found, source)
    assert (found.is_conj(), found.is_neg()) == (source.is_conj(), source.is_neg())


def test_what_is_only_marked_as_other_values_shares_its_memory_there_too() -> None:
    """A conjugate view was sent as a copy, so a handler that wrote into the tensor left the view as it was."""
    z = torch.tensor([1 + 2j, 3 - 4j])
    sources = [z, z.conj(), z.imag, z.conj().imag, z.detach().requires_grad_().conj()]
    for found in (loads(dumps(sources)), decode(encode(sources))):
        found[0].mul_(2)
        assert [each.tolist() for each in found] == [
            [2 + 4j, 6 - 8j], [2 - 4j, 6 + 8j], [4, -8], [-4, 8], [2 - 4j, 6 + 8j]
        ]  # fmt: skip
        assert [each.requires_grad for each in found] == [False] * 4 + [True]


def test_a_tensor_comes_back_with_its_attributes_and_its_memory() -> None:
    """Attributes of plain tensors were lost, also those that a serial run has after the handler."""
    source: Any = torch.arange(3.0)
    source.unit, source.all = "m", [source]
    leaf: Any = torch.ones(2, requires_grad=True)
    leaf.unit = {"scale": source}
    for found, view, parameter in (
        loads(dumps([source, source[1:], leaf])),
        decode(encode([source, source[1:], leaf])),
    ):
        assert (found.unit, type(found)) == ("m", torch.Tensor)
        assert found.all[0] is found is parameter.unit["scale"]
        assert (parameter.requires_grad, parameter.is_leaf) == (True, True)
        found.fill_(7)
        assert view.tolist() == [7, 7]


class SetsAFilter:
    """An object that sets a filter for warnings when it is unpickled, as a program may do in another thread."""

    def __reduce__(self) -> Any:
        return warnings.filterwarnings, ("ignore", "a warning of the program")


def test_loading_leaves_the_filters_of_warnings_that_are_set_meanwhile() -> None:
    source: Any = torch.arange(3.0).to_sparse()
    source.sets = SetsAFilter()
    decode(encode(source))
    decode(encode(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)))
    texts = [each[1].pattern for each in warnings.filters if isinstance(each[1], re.Pattern)]
    assert "a warning of the program" in texts
    assert texts.count("TypedStorage is deprecated") == 2  # one of this module's tests, and one of the loading


def test_a_tensor_without_values_keeps_its_strides() -> None:
    empty, meta = torch.empty_strided((0, 3), (1, 5)), torch.empty_strided((2, 3), (1, 2), device="meta")
    found = decode(encode([empty, meta]))
    assert [(each.shape, each.stride(), each.device.type) for each in found] == [
        ((0, 3), (1, 5), "cpu"),
        ((2, 3), (1, 2), "meta"),
    ]


def test_what_shares_memory_that_is_not_sent_as_a_whole_comes_apart() -> None:
    """How wasteful it may be is said by a subclass: a callback's state keeps what it shares."""

    class Whole(ValuePickler):
        waste = 1e9

    large = torch.zeros(100_000)
    value = [large[:10], large[5:15]]
    apart = pickle.loads(pickled(value))
    file = io.BytesIO()
    Whole(file).dump(value)
    together = pickle.loads(file.getvalue())
    for found in (apart, together):
        found[0].fill_(1.0)
    assert apart[1].tolist() == [0.0] * 10
    assert together[1].tolist() == [1.0] * 5 + [0.0] * 5
    assert len(pickled(value)) < 2000
    assert len(file.getvalue()) > 400_000


def test_without_a_place_for_buffers_they_are_in_the_pickle() -> None:
    """Plain pickle reads it, and what is made can be written to."""
    source = torch.arange(1000.0)
    found = pickle.loads(pickled({"a": source, "b": source[10:20]}))
    found["a"] += 1
    assert torch.equal(found["a"], source + 1)
    assert torch.equal(found["b"], source[10:20] + 1)


def test_only_buffers_are_left_out_where_there_is_a_place_for_them() -> None:
    file, buffers = io.BytesIO(), list[pickle.PickleBuffer]()
    ValuePickler(file, buffers.append).dump([torch.zeros(10_000), torch.ones(3)])
    assert [buffer.raw().nbytes for buffer in buffers] == [40_000, 12]
    assert not any(buffer.raw().readonly for buffer in buffers)
    assert len(file.getvalue()) < 1000


def test_no_tensor_of_a_model_goes_through_torchs_storages() -> None:
    """These would make a copy more, and lose what tensors share."""
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    blob = pickled([model, model.state_dict()])
    assert b"_rebuild_tensor" not in blob
    assert b"torch.storage" not in blob
    found, state = pickle.loads(blob)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert found[0].weight.data_ptr() == state["0.weight"].data_ptr()
    assert not model[0].weight.is_shared()


def test_a_state_in_a_state_and_a_map_with_a_function_of_its_own() -> None:
    deep, metrics = State("cbstate.deep"), PhaseMap[Any]("cbstate.m", list)
    deep.inner = State("cbstate.deep.inner")
    deep.inner.value = [1]
    metrics[TrainingPhase].append(2)
    found, by_phase = decode(encode((deep, metrics)))
    assert type(found.inner) is State
    assert found.inner.value == [1]
    assert by_phase[TrainingPhase] == [2]
    assert by_phase[ValidationPhase] == []


# --- callbacks and their state


def test_modules_are_named_also_those_of_a_type_of_their_own() -> None:
    found = loads(dumps({"backends": torch.backends, "mkldnn": torch.backends.mkldnn, "path": os.path}))
    assert found == {"backends": torch.backends, "mkldnn": torch.backends.mkldnn, "path": os.path}
    assert type(torch.backends.mkldnn).__name__ != "module"  # what makes it hard


def test_what_stays_is_the_other_sides_and_inside_of_anything() -> None:
    mine, yours = [1], [2]
    found = loads(dumps({"it": mine, "again": (mine,), "other": [1]}, [mine]), [yours])
    assert found["it"] is yours
    assert found["again"][0] is yours
    assert found["other"] == [1]


def test_without_what_stays_it_is_a_pickle_like_any_other() -> None:
    assert pickle.loads(dumps({"a": (1, 2.5, "three")})) == {"a": (1, 2.5, "three")}


def test_methods_of_a_script_that_name_a_backend_of_torch_travel(programs: Programs) -> None:
    """A class of ``__main__`` is sent by value, with the modules that its methods mention."""
    script = """
import torch
from flowtrain_dask.cluster.codec import encode
from flowtrain_dask.cluster.pickling import dumps

class Mine:
    def look(self):
        return torch.backends.mkldnn.is_available(), self.__class__.__name__

print(dumps(Mine()).hex())
encode(Mine())
"""
    made = programs.run(script)
    assert made.returncode == 0, made.stderr
    assert loads(bytes.fromhex(made.stdout)).look() == (torch.backends.mkldnn.is_available(), "Mine")


def test_what_does_not_pickle_says_so() -> None:
    with pytest.raises(TypeError, match="cannot pickle"):
        dumps(number for number in range(3))
