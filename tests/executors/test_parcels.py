"""Parcels: memory that another process on this machine finds, and notices when something else is in it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowtrain_dask.codec import Encoded, decode
from flowtrain_dask.parcels import Parcel, possible, unpack

pytestmark = pytest.mark.skipif(not possible(), reason="this system has no memfd_create")


@pytest.mark.parametrize("count", [0, 1, 3, 2000])
def test_what_is_in_it_comes_out(count: int) -> None:
    """Of any number of pieces, also empty ones."""
    pieces: list[bytes | memoryview] = [bytes([at % 256]) * (at % 50) for at in range(count)]
    parcel = Parcel()
    found = unpack(parcel.fill(pieces))
    assert found is not None
    assert bytes(found.memory) == b"".join(pieces)
    assert found.holds()
    parcel.close()


def test_what_is_written_to_it_stays_there() -> None:
    parcel = Parcel()
    ticket = parcel.fill([b"abc"])
    one, other = unpack(ticket), unpack(ticket)
    assert one is not None
    assert other is not None
    one.memory[0] = 122
    assert bytes(other.memory) == b"abc"
    parcel.close()


def test_who_opened_it_before_it_was_filled_again_is_told() -> None:
    parcel = Parcel()
    first = parcel.fill([b"one" * 1000])
    found = unpack(first)
    assert found is not None
    second = parcel.fill([b"two"])
    assert not found.holds()
    assert unpack(first) is None
    again = unpack(second)
    assert again is not None
    assert bytes(again.memory) == b"two"
    parcel.close()
    assert unpack(second) is None
    assert bytes(again.memory) == b"two", "who has it mapped keeps it"
    assert again.holds()


def test_other_numbers_are_nobodys_parcel(tmp_path: Path) -> None:
    """The process may have ended and its number been given to another one, and so may a descriptor."""
    parcel = Parcel()
    ticket = parcel.fill([b"abc"])
    assert unpack(ticket._replace(mark=bytes(16))) is None
    assert unpack(ticket._replace(size=1 << 20)) is None
    assert unpack(ticket._replace(process=2**22 + 1)) is None
    with open(tmp_path / "file", "wb") as file:
        assert unpack(ticket._replace(descriptor=file.fileno())) is None
    read, write = os.pipe()
    assert unpack(ticket._replace(descriptor=read)) is None
    os.close(read)
    os.close(write)
    parcel.close()


def test_another_process_makes_tensors_of_it() -> None:
    """Without a copy, and it may write to them."""
    value = {"a": torch.arange(1000.0), "b": torch.tensor([1, 2], dtype=torch.int16)}
    encoded, parcel = Encoded(value), Parcel()
    ticket = parcel.fill(encoded.buffers)
    script = (
        "import sys, torch\n"
        "from flowtrain_dask.codec import decode\n"
        "from flowtrain_dask.parcels import Ticket, unpack\n"
        "found = unpack(Ticket(*eval(sys.argv[1])))\n"
        "value = decode(eval(sys.argv[2]), found.memory)\n"
        "value['a'] += 1\n"
        "print(value['a'].sum().item(), value['b'].tolist(), value['b'].dtype, found.holds())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, repr(tuple(ticket)), repr(encoded.head)], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"{sum(range(1, 1001)):.1f} [1, 2] torch.int16 True", done.stderr
    found = unpack(ticket)
    assert found is not None
    here = decode(encoded.head, found.memory)
    assert torch.equal(here["a"], value["a"]), "what the other process wrote stayed there"
    parcel.close()


def test_nothing_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        parcel = Parcel()
        found = unpack(parcel.fill([b"x" * 5000]))
        assert found is not None
        value = memoryview(found.memory)[:3]
        del found, parcel
        assert bytes(value) == b"xxx"
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2
