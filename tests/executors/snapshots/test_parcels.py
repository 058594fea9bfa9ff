"""Parcels: memory that another process on this machine finds, and notices when something else is in it."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowtrain_dask.cluster.codec import Encoded, decode
from flowtrain_dask.cluster.readings import read
from flowtrain_dask.snapshots.parcels import Parcel, Ticket, possible

pytestmark = pytest.mark.skipif(not possible(), reason="this system has no memfd_create")


def content(ticket: Ticket) -> bytes | None:
    """Return a copy of what is in a parcel, and read it no longer."""
    reading = read(ticket)
    if reading is None:
        return None
    found = bytes(reading.memory)
    reading.close()
    return found


@pytest.mark.parametrize("count", [0, 1, 3, 2000])
def test_what_is_in_it_comes_out(count: int) -> None:
    """Of any number of pieces, also empty ones, and such as cannot be written to."""
    pieces: list[bytes | memoryview] = [bytes([at % 256]) * (at % 50) for at in range(count)]
    pieces[1::2] = [memoryview(bytearray(piece)) for piece in pieces[1::2]]
    pieces[::5] = [memoryview(piece) for piece in pieces[::5]]
    parcel = Parcel()
    assert content(parcel.fill(pieces)) == b"".join(pieces)
    parcel.close()


def test_a_larger_filling_takes_more_memory_and_a_smaller_one_the_same() -> None:
    parcel = Parcel()
    for size in (10, 100_000, 5_000, 1_000_000):
        assert content(parcel.fill([b"x" * size])) == b"x" * size
    assert parcel.size == os.sysconf("SC_PAGE_SIZE") + 1_000_000
    parcel.close()


def test_what_is_written_to_it_stays_with_who_has_read_it() -> None:
    parcel = Parcel()
    ticket = parcel.fill([b"one" * 1000])
    one, other = read(ticket), read(ticket)
    assert one is not None
    assert other is not None
    one.memory[0] = 122
    assert bytes(other.memory) == b"one" * 1000
    assert content(ticket) == b"one" * 1000
    one.close()
    other.close()
    parcel.close()


def test_it_is_not_filled_while_somebody_reads_it() -> None:
    parcel = Parcel()
    first = parcel.fill([b"one"])
    reading = read(first)
    assert reading is not None
    with pytest.raises(BlockingIOError):
        parcel.fill([b"two"])
    assert bytes(reading.memory) == b"one"
    reading.close()
    reading.close()
    second = parcel.fill([b"two"])
    assert content(first) is None, "something else is there by now"
    assert content(second) == b"two"
    parcel.close()
    assert content(second) is None


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_reader_that_is_stopped_keeps_it_and_one_that_has_ended_does_not(end: signal.Signals) -> None:
    parcel = Parcel()
    ticket = parcel.fill([b"one"])
    script = (
        "import sys, time\n"
        "from flowtrain_dask.snapshots.parcels import Ticket\n"
        "from flowtrain_dask.cluster.readings import read\n"
        "reading = read(Ticket(*eval(sys.argv[1])))\n"
        "print(bytes(reading.memory), flush=True)\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script, repr(tuple(ticket))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "b'one'\n"
        try:
            os.kill(reader.pid, end)
            if end is signal.SIGSTOP:
                with pytest.raises(BlockingIOError):
                    parcel.fill([b"two"])
        finally:
            reader.kill()
        reader.wait()
        assert content(parcel.fill([b"two"])) == b"two"
    parcel.close()


def test_what_is_being_filled_is_not_read() -> None:
    parcel = Parcel()
    ticket = parcel.fill([b"one"])
    descriptor = os.open(f"/proc/self/fd/{ticket.descriptor}", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert read(ticket) is None
    os.close(descriptor)
    assert content(ticket) == b"one"
    parcel.close()


def test_what_is_kept_stays_as_it_was() -> None:
    """A callback may keep a tensor: it has a copy when its batch is done, and the parcel is free."""
    value = {"a": torch.arange(100_000.0), "b": torch.ones(3)}
    encoded, parcel = Encoded(value), Parcel()
    reading = read(parcel.fill(encoded.buffers))
    assert reading is not None
    kept = decode(encoded.head, reading.memory)["a"]
    reading.close()
    other = read(parcel.fill([bytes(1 << 20)]))
    assert other is not None, "nobody reads it, so it could be filled"
    assert torch.equal(kept, value["a"])
    kept += 1
    assert bytes(other.memory) == bytes(1 << 20)
    other.close()
    parcel.close()


def test_what_is_kept_keeps_no_file_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    parcel = Parcel()
    kept: list[torch.Tensor] = []
    for number in range(40):
        encoded = Encoded(torch.full((10_000,), float(number)))
        reading = read(parcel.fill(encoded.buffers))
        assert reading is not None
        kept.append(decode(encoded.head, reading.memory)[:3])
        reading.close()
    parcel.close()
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert "memfd:flowtrain" not in Path("/proc/self/maps").read_text(), "and no memory of a parcel that is gone"
    assert [tensor.tolist() for tensor in kept] == [[float(number)] * 3 for number in range(40)]


def test_what_nobody_keeps_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    parcel = Parcel()
    reading = read(parcel.fill([b"one"]))
    assert reading is not None
    monkeypatch.setattr(ctypes, "memmove", None)
    reading.close()
    parcel.close()


def test_a_child_that_was_forked_meanwhile_sees_what_was_there() -> None:
    """A handler may fork, and the child be at work long after the handler."""
    script = (
        "import os, sys\n"
        "from flowtrain_dask.snapshots.parcels import Parcel\n"
        "from flowtrain_dask.cluster.readings import read\n"
        "parcel = Parcel()\n"
        "reading = read(parcel.fill([b'one' * 5000]))\n"
        "go, tell = os.pipe()\n"
        "if not os.fork():\n"
        "    os.read(go, 1)\n"
        "    print(bytes(reading.memory) == b'one' * 5000, flush=True)\n"
        "    os._exit(0)\n"
        "reading.close()\n"
        "parcel.fill([b'two' * 5000])\n"
        "os.write(tell, b'x')\n"
        "os.wait()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr


def test_other_numbers_are_nobodys_parcel(tmp_path: Path) -> None:
    """The process may have ended and its number been given to another one, and so may a descriptor."""
    parcel = Parcel()
    ticket = parcel.fill([b"abc"])
    assert read(ticket._replace(mark=bytes(16))) is None
    assert read(ticket._replace(size=1 << 20)) is None
    assert read(ticket._replace(process=2**22 + 1)) is None
    with open(tmp_path / "file", "wb") as file:
        assert read(ticket._replace(descriptor=file.fileno())) is None
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert read(ticket._replace(descriptor=pipe)) is None, "and nobody waits for what might be written to it"
    os.close(pipe)
    parcel.close()


def test_where_there_are_no_parcels_none_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker with another system than the process that trains."""
    parcel = Parcel()
    ticket = parcel.fill([b"abc"])
    monkeypatch.setattr(sys, "platform", "win32")
    assert read(ticket) is None
    parcel.close()


def test_another_process_makes_tensors_of_it() -> None:
    """It may write to them."""
    value = {"a": torch.arange(1000.0), "b": torch.tensor([1, 2], dtype=torch.int16)}
    encoded, parcel = Encoded(value), Parcel()
    ticket = parcel.fill(encoded.buffers)
    script = (
        "import sys, torch\n"
        "from flowtrain_dask.cluster.codec import decode\n"
        "from flowtrain_dask.snapshots.parcels import Ticket\n"
        "from flowtrain_dask.cluster.readings import read\n"
        "reading = read(Ticket(*eval(sys.argv[1])))\n"
        "value = decode(eval(sys.argv[2]), reading.memory)\n"
        "value['a'] += 1\n"
        "print(value['a'].sum().item(), value['b'].tolist(), value['b'].dtype)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, repr(tuple(ticket)), repr(encoded.head)], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"{sum(range(1, 1001)):.1f} [1, 2] torch.int16", done.stderr
    reading = read(ticket)
    assert reading is not None
    here = decode(encoded.head, reading.memory)
    assert torch.equal(here["a"], value["a"]), "what the other process wrote stayed there"
    reading.close()
    parcel.close()


def test_nothing_stays_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(50):
        parcel = Parcel()
        reading = read(parcel.fill([b"x" * 5000]))
        assert reading is not None
        value = reading.memory[:3]
        if number % 2:
            reading.close()
        assert bytes(value) == b"xxx"
        del reading, parcel, value
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 2
