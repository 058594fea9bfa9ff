"""Snapshots as bytes and back: every dtype, shape and stride bit for bit, and no reduction of torch's."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowtrain import BatchEnd, Phase, TrainingPhase, ValidationPhase
from flowtrain.phasemap import Counts, CountsMap, PhaseMap
from flowtrain.series import Series, SeriesMap
from flowtrain.state import Named, State
from flowtrain_dask.cluster.codec import Encoded, decode, encode
from flowtrain_dask.cluster.readings import Readings
from flowtrain_dask.snapshots.copies import Copying, Pool
from flowtrain_dask.snapshots.cuts import Tail
from flowtrain_dask.snapshots.parcels import possible
from flowtrain_dask.snapshots.states import NamedGradients, NamedTensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:ComplexHalf support is experimental",
    "ignore:Sparse .* tensor support is in beta state",
    "ignore:Sparse invariant checks are",
    "ignore:.*quantized tensor creation functions",
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
    bits = torch.tensor(list(draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))),
                        dtype=torch.uint8)
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


@settings(deadline=None, max_examples=300)
@given(st.lists(tensors(), max_size=4))
def test_tensors_come_back_bit_for_bit(sources: list[torch.Tensor]) -> None:
    found = decode(encode(sources))
    for made, source in zip(found, sources, strict=True):
        assert (made.dtype, made.shape, bits(made)) == (source.dtype, source.shape, bits(source))
    for made, source in zip(decode(encode(Copying(Pool(1 << 16)).copy(sources))), sources, strict=True):
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


def closure(factor: int) -> Callable[[Any], Any]:
    """A function that no import finds."""

    def multiply(value: Any) -> Any:
        """Multiply."""
        return value * factor

    return multiply


def memory_of(encoded: Encoded) -> list[int]:
    """Return the addresses of what is sent beside the head."""
    return [np.frombuffer(part, np.uint8).ctypes.data for part in encoded.buffers if isinstance(part, memoryview)]


def test_tensors_of_a_pool_are_sent_from_where_they_are() -> None:
    """They lie in one piece of memory, which is much larger than one of them: no tensor is copied for that."""
    sources = [torch.randn(64, 64), torch.randn(10, 3).t(), torch.arange(5000), torch.randn(2, 2).bfloat16()]
    copies = Pool(1 << 24).like_all(sources * 10)
    for copy, source in zip(copies, sources * 10, strict=True):
        copy.copy_(source)
    encoded = Encoded(copies[:2])
    assert memory_of(encoded) == [copy.data_ptr() for copy in copies[:2]]
    for found, source in zip(decode(bytes(encoded)), sources[:2], strict=True):
        assert torch.equal(found, source)
        assert found.stride() == source.stride()


@pytest.mark.skipif(not possible(), reason="this system has no memfd_create")
def test_what_is_in_parcels_is_left_there() -> None:
    """Each parcel is named once, and what is in none is among the buffers."""
    pool = Pool(1 << 26, share=True)
    sources = [torch.randn(600, 600), torch.randn(3), torch.arange(300_000), torch.randn(4, 2).bfloat16()]
    one = NamedTensors(dict(zip("abcd", pool.like_all(sources), strict=True)))
    two, three = pool.like(sources[0]), pool.like(sources[1])
    for name, source in zip("abcd", sources, strict=True):
        one[name].copy_(source)
    two.copy_(sources[0])
    three.copy_(sources[1])
    obj = [one, two, three, one["c"], torch.ones(50)]
    encoded = Encoded(obj, share=True)
    assert [parcel.address for parcel in encoded.parcels] == [one["a"].data_ptr(), two.data_ptr()]
    assert encoded.nbytes < 10_000
    with Readings([parcel.ticket for parcel in encoded.parcels]) as readings:
        assert readings.complete
        found = decode(encoded.head, memoryview(bytearray().join(encoded.buffers)), readings.memories)
        for name, source in zip("abcd", sources, strict=True):
            assert torch.equal(found[0][name], source)
            assert found[0][name].dtype == source.dtype
        assert torch.equal(found[1], sources[0])
        assert torch.equal(found[2], sources[1])
        assert found[3] is found[0]["c"]
        found[1] += 1
        assert torch.equal(two, sources[0]), "who reads has it to itself"
        kept = found[1]
        del found
    assert torch.equal(kept, sources[0] + 1)
    whole = decode(encode(obj))
    assert torch.equal(whole[0]["c"], sources[2]), "and without parcels all of it is sent"
    assert len(encode(obj)) > 5_000_000


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
    blob = encode(Tail(series, 9_990))
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
    ("value", "message"),
    [
        (torch.zeros(2, 2).to_mkldnn(), "a mkldnn tensor is not sent"),
        (torch.zeros(2).untyped_storage(), "a torch storage is not sent to another process; send a tensor"),
    ],
)
def test_what_cannot_be_sent(value: Any, message: str) -> None:
    with pytest.raises((TypeError, pickle.PicklingError), match=message):
        encode(value)


@pytest.mark.parametrize("blob", [b"", b"FTB1", b"something else entirely"])
def test_what_is_no_blob(blob: bytes) -> None:
    with pytest.raises(ValueError, match=r"this is no blob of flowtrain's codec: it begins with"):
        decode(blob)


def test_another_process_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(encode({"a": torch.full((3,), 2.0, dtype=torch.bfloat16), "f": closure(3)}))
    code = (
        "import sys, pathlib; from flowtrain_dask.cluster.codec import decode;"
        "found = decode(pathlib.Path(sys.argv[1]).read_bytes()); print(found['f'](found['a']).tolist())"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[6.0, 6.0, 6.0]"
