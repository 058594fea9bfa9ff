"""Parcels: memory that another process on this machine finds, and notices when something else is in it."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    assert bytes(found) == b"".join(pieces)
    parcel.close()


def test_what_was_read_stays_as_it_was() -> None:
    """Whoever reads it keeps it, may write to it, and does not notice when it is filled again."""
    parcel = Parcel()
    first = parcel.fill([b"one" * 1000])
    one, other = unpack(first), unpack(first)
    assert one is not None
    assert other is not None
    one[0] = 122
    assert bytes(other) == b"one" * 1000
    second = parcel.fill([b"two"])
    assert bytes(other) == b"one" * 1000
    assert unpack(first) is None, "something else is there by now"
    again = unpack(second)
    assert again is not None
    assert bytes(again) == b"two"
    parcel.close()
    assert unpack(second) is None
    assert bytes(again) == b"two"


def test_what_is_filled_again_while_it_is_read_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parcel = Parcel()
    ticket = parcel.fill([b"one" * 1000])
    read = os.preadv

    def slowly(descriptor: int, buffers: Any, offset: int) -> int:
        count = read(descriptor, buffers, offset)
        parcel.fill([b"two" * 1000])
        return count

    monkeypatch.setattr(os, "preadv", slowly)
    assert unpack(ticket) is None
    parcel.close()


def test_other_numbers_are_nobodys_parcel(tmp_path: Path) -> None:
    """The process may have ended and its number been given to another one, and so may a descriptor."""
    parcel = Parcel()
    ticket = parcel.fill([b"abc"])
    assert unpack(ticket._replace(mark=bytes(16))) is None
    assert unpack(ticket._replace(size=1 << 20)) is None
    assert unpack(ticket._replace(process=2**22 + 1)) is None
    with open(tmp_path / "file", "wb") as file:
        assert unpack(ticket._replace(descriptor=file.fileno())) is None
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert unpack(ticket._replace(descriptor=pipe)) is None, "and nobody waits for what might be written to it"
    os.close(pipe)
    parcel.close()


def test_where_there_are_no_parcels_none_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with another system than the process that trains."""
    parcel = Parcel()
    ticket = parcel.fill([b"abc"])
    monkeypatch.setattr(sys, "platform", "win32")
    assert unpack(ticket) is None
    parcel.close()


def test_another_process_makes_tensors_of_it() -> None:
    """It may write to them."""
    value = {"a": torch.arange(1000.0), "b": torch.tensor([1, 2], dtype=torch.int16)}
    encoded, parcel = Encoded(value), Parcel()
    ticket = parcel.fill(encoded.buffers)
    script = (
        "import sys, torch\n"
        "from flowtrain_dask.codec import decode\n"
        "from flowtrain_dask.parcels import Ticket, unpack\n"
        "found = unpack(Ticket(*eval(sys.argv[1])))\n"
        "value = decode(eval(sys.argv[2]), found)\n"
        "value['a'] += 1\n"
        "print(value['a'].sum().item(), value['b'].tolist(), value['b'].dtype)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, repr(tuple(ticket)), repr(encoded.head)], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"{sum(range(1, 1001)):.1f} [1, 2] torch.int16", done.stderr
    found = unpack(ticket)
    assert found is not None
    here = decode(encoded.head, found)
    assert torch.equal(here["a"], value["a"]), "what the other process wrote stayed there"
    parcel.close()


def test_nothing_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        parcel = Parcel()
        found = unpack(parcel.fill([b"x" * 5000]))
        assert found is not None
        value = found[:3]
        del found, parcel
        assert bytes(value) == b"xxx"
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2
