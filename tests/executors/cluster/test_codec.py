"""Blobs: a head and buffers, aligned on either side, and what is left in parcels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain_dask.cluster.codec import Encoded, decode, encode
from flowtrain_dask.cluster.readings import Readings
from flowtrain_dask.snapshots.copiers import Pool
from flowtrain_dask.snapshots.parcels import parcel_at, possible
from flowtrain_dask.snapshots.pool import ALIGNMENT
from flowtrain_dask.snapshots.states import NamedTensors


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
        assert not readings.missing
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


@pytest.mark.parametrize(
    "blob",
    [b"", b"FTB1", b"something else entirely", b"FTB2", b"FTB2" + bytes(15), memoryview(b"FTB1" + bytes(100))],
)
def test_what_is_no_blob(blob: bytes | memoryview) -> None:
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


def test_a_blob_is_its_head_and_its_buffers() -> None:
    """Sent at once or in parts, it is the same; so many bytes are counted."""
    obj = {"a": torch.arange(1001, dtype=torch.uint8), "b": np.arange(7.0), "c": "text"}
    encoded = Encoded(obj)
    whole = bytes(encoded)
    assert whole == encoded.head + b"".join(encoded.buffers) == encode(obj)
    assert len(whole) == encoded.nbytes
    assert encoded.parcels == []
    assert len(encoded.buffers) == 4, "each with what aligns the next one"
    for found in (decode(whole), decode(encoded.head, memoryview(bytearray().join(encoded.buffers)))):
        assert torch.equal(found["a"], obj["a"])  # type: ignore[arg-type]  # it is a tensor
        np.testing.assert_array_equal(found["b"], np.arange(7.0))
        assert found["c"] == "text"


def test_what_has_no_buffers_is_all_head() -> None:
    encoded = Encoded([1, "two", None])
    assert encoded.buffers == []
    assert encoded.nbytes == len(encoded.head)
    assert decode(encoded.head, memoryview(b"")) == decode(bytes(encoded)) == [1, "two", None]


@pytest.mark.parametrize("shift", [0, 1, 63])
@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_every_part_is_aligned_wherever_the_blob_begins(kind: type[Any], shift: int) -> None:
    """As torch aligns its own memory; a blob may begin anywhere and be nothing that can be written to."""
    sources = [torch.full((count,), count, dtype=torch.int16) for count in (1, 63, 64, 65, 1000)]
    blob = memoryview(kind(bytes(shift) + encode(sources)))[shift:]
    found = decode(blob)
    assert [each.data_ptr() % ALIGNMENT for each in found] == [0] * 5
    for made, source in zip(found, sources, strict=True):
        assert torch.equal(made, source)
        made += 1
    assert [each[0].item() for each in decode(blob)] == [1, 63, 64, 65, 1000], "what is made has memory of its own"


def test_with_a_head_the_buffers_are_the_memory_of_what_is_made() -> None:
    size = 300_001
    encoded = Encoded([torch.zeros(size), torch.ones(size)])
    memory = bytearray().join(encoded.buffers)
    one, other = decode(encoded.head, memoryview(memory))
    one.fill_(3.0)
    assert memory[: 4 * size] == bytes(np.full(size, 3.0, dtype="f4"))
    assert other.data_ptr() - one.data_ptr() == -(-4 * size // 64) * 64


def test_who_keeps_what_is_small_keeps_that_alone() -> None:
    """A callback that keeps each loss would otherwise keep all batches of events."""
    encoded = Encoded([torch.ones(3), torch.zeros(400_000), torch.arange(3)])
    memory = bytearray().join(encoded.buffers)
    one, large, three = decode(encoded.head, memoryview(memory))
    before = sys.getrefcount(memory)
    del large
    assert sys.getrefcount(memory) < before
    memory[:] = b""
    assert one.tolist() == [1.0, 1.0, 1.0]
    assert three.tolist() == [0, 1, 2]
    assert one.data_ptr() % 64 == three.data_ptr() % 64 == 0


def test_buffers_show_what_is_there_when_they_are_sent() -> None:
    """Nothing is copied before."""
    source = torch.zeros(100)
    encoded = Encoded(source)
    source += 5
    assert decode(bytes(encoded)).unique().tolist() == [5.0]


def test_buffers_keep_alive_what_they_show() -> None:
    encoded = Encoded([torch.full((50_000,), float(number)) for number in range(3)])
    others = [torch.zeros(50_000) for _ in range(3)]  # which would get memory that was given back
    assert [each.unique().tolist() for each in decode(bytes(encoded))] == [[0.0], [1.0], [2.0]]
    del others


@pytest.mark.skipif(not possible(), reason="this system has no memfd_create")
def test_a_parcel_that_was_closed_or_is_read_only_is_sent() -> None:
    closed, frozen = Pool(1 << 26, share=True), Pool(1 << 26, share=True)
    one, other = (pool.like(torch.empty(600, 600)) for pool in (closed, frozen))
    one.fill_(1.0)
    other.fill_(2.0)
    array = other.numpy()
    array.flags.writeable = False
    parcel = parcel_at(one.data_ptr())
    assert parcel is not None
    parcel.close()
    encoded = Encoded([one, array], share=True)
    assert encoded.parcels == []
    assert encoded.nbytes > 2 * 600 * 600 * 4
    found = decode(bytes(encoded))
    assert torch.equal(found[0], one)
    np.testing.assert_array_equal(found[1], array)
    assert not found[1].flags.writeable
