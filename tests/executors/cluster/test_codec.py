"""Blobs: a head and buffers, aligned on either side; and the events of a batch as one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain import BatchEnd, Event, Phase, Read, TrainingPhase
from flowtrain.callback.access import declare
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.cluster.codec import Encoded, decode, dump_entries, encode, load_entries, memory_for
from flowtrain_dask.lanes.work import Entry
from flowtrain_dask.snapshots.pool import ALIGNMENT, Pool
from flowtrain_dask.snapshots.taker import CopiesOfFiring, Taker
from tests.support.encoded import closure, memory_of
from tests.support.programs import Programs


def in_memory(obj: object) -> memoryview:
    """Return an object's bytes as a worker has copied them from a block."""
    blob = encode(obj)
    memory = memory_for(len(blob))
    memory[:] = blob
    return memory


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


@pytest.mark.parametrize("blob", [b"", b"FTB1" + bytes(100), b"something else entirely", b"FTB3", b"FTB3" + bytes(15)])
def test_what_is_no_blob(blob: bytes) -> None:
    for found in (blob, memoryview(bytearray(blob))):
        with pytest.raises(ValueError, match=r"this is no blob of flowtrain's codec: it begins with"):
            decode(found)


def test_another_process_reads_it(tmp_path: Path, programs: Programs) -> None:
    path = tmp_path / "blob"
    path.write_bytes(encode({"a": torch.full((3,), 2.0, dtype=torch.bfloat16), "f": closure(3)}))
    code = (
        "import sys, pathlib; from flowtrain_dask.cluster.codec import decode;"
        "found = decode(pathlib.Path(sys.argv[1]).read_bytes()); print(found['f'](found['a']).tolist())"
    )
    ran = programs.run(code, str(path))
    assert ran.stdout.strip() == "[6.0, 6.0, 6.0]", ran.stderr


def test_a_blob_is_its_pieces() -> None:
    """Sent at once or copied from memory, it is the same; so many bytes are counted."""
    obj = {"a": torch.arange(1001, dtype=torch.uint8), "b": np.arange(7.0), "c": "text"}
    encoded = Encoded(obj)
    whole = bytes(encoded)
    assert whole == b"".join(encoded.pieces) == encode(obj)
    assert len(whole) == encoded.nbytes
    for found in (decode(whole), decode(in_memory(obj))):
        assert torch.equal(found["a"], obj["a"])  # type: ignore[arg-type]  # it is a tensor
        np.testing.assert_array_equal(found["b"], np.arange(7.0))
        assert found["c"] == "text"
    assert decode(encode([1, "two", None])) == [1, "two", None], "without buffers"


def test_every_part_is_aligned_and_can_be_written_to() -> None:
    """As torch aligns its own memory."""
    sources = [torch.full((count,), count, dtype=torch.int32) for count in (1, 63, 64, 65, 300_000)]
    blob = encode(sources)
    found = decode(blob)
    assert [each.data_ptr() % ALIGNMENT for each in found] == [0] * 5
    for made, source in zip(found, sources, strict=True):
        assert torch.equal(made, source)
        made += 1
    assert [int(each[0]) for each in decode(blob)] == [1, 63, 64, 65, 300_000], "what is made has memory of its own"


def test_memory_is_that_of_what_is_large_in_it() -> None:
    size = 300_001
    memory = in_memory([torch.zeros(size), torch.ones(size)])
    one, other = decode(memory)
    one.fill_(3.0)
    assert bytes(np.full(size, 3.0, dtype="f4")) in bytes(memory)
    assert other.data_ptr() - one.data_ptr() == -(-4 * size // 64) * 64


def test_who_keeps_what_is_small_keeps_that_alone() -> None:
    """A callback that keeps each loss would otherwise keep all batches of events."""
    memory = in_memory([torch.ones(3), torch.zeros(400_000), torch.arange(3)])
    one, large, three = decode(memory)
    memory[:] = bytes(len(memory))
    owner = memory.obj
    assert isinstance(owner, bytearray)
    del memory
    with pytest.raises(BufferError):
        owner.append(0)  # the large one has it
    del large
    owner.append(0)
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


# --- the events of a batch


@dataclass(frozen=True)
class Scored(Event):
    """An event with data."""

    score: float


class OtherPhase(Phase):
    """A user's own."""


def test_events_phases_and_numbers_come_back() -> None:
    sent = [
        Entry(3, 0, BatchEnd(), TrainingPhase(), {("batch", "loss"): 0.5}, 8),
        Entry(4, 1, Scored(0.25), OtherPhase(), {}, 0),
    ]
    got = load_entries(bytes(dump_entries(sent)))
    for one, other in zip(got, sent, strict=True):
        assert type(one.event) is type(other.event)  # those without data are not compared by value
        assert one[:2] + one[3:] == other[:2] + other[3:]
    assert got[1].event == Scored(0.25)
    assert type(got[1].phase) is OtherPhase
    assert load_entries(bytes(dump_entries([]))) == []


def test_a_copy_that_two_events_share_is_sent_once() -> None:
    state = LearnerState()
    state.show(BatchState())
    loss: Any = torch.arange(100_000.0)
    state.batch.loss = loss
    taker = Taker(declare({"batch.loss": Read()}, "me"), state, Pool(1 << 20), tail=False)
    shared = CopiesOfFiring()
    sent = [Entry(n, 0, BatchEnd(), TrainingPhase(), taker.take(shared), 400_000) for n in range(2)]
    blob = bytes(dump_entries(sent))
    assert 400_000 < len(blob) < 450_000
    one, two = (entry.payload["batch", "loss"] for entry in load_entries(blob))
    assert one is two
    assert torch.equal(one, loss)
