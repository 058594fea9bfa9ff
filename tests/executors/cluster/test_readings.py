"""Reading parcels: who finds one, what is written stays with the reader, and what is kept becomes its own."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowtrain_dask.cluster import readings as readings_module
from flowtrain_dask.cluster.codec import Encoded, decode
from flowtrain_dask.cluster.readings import Readings, read
from flowtrain_dask.snapshots.parcels import START, Parcel, Ticket, possible

pytestmark = pytest.mark.skipif(not possible(), reason="this system has no memfd_create")


def content(ticket: Ticket) -> bytes | None:
    """Return a copy of what is in a parcel, and read it no longer."""
    reading = read(ticket)
    if reading is None:
        return None
    found = bytes(reading.memory)
    reading.close()
    return found


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
    value = {"a": torch.arange(300_000.0), "b": torch.ones(3)}
    encoded, parcel = Encoded(value), Parcel()
    reading = read(parcel.fill(encoded.buffers))
    assert reading is not None
    kept = decode(encoded.head, reading.memory)["a"]
    reading.close()
    other = read(parcel.fill([bytes(2 << 20)]))
    assert other is not None, "nobody reads it, so it could be filled"
    assert torch.equal(kept, value["a"])
    kept += 1
    assert bytes(other.memory) == bytes(2 << 20)
    other.close()
    parcel.close()


def test_what_is_kept_keeps_no_file_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    parcel = Parcel()
    kept: list[torch.Tensor] = []
    for number in range(40):
        encoded = Encoded(torch.full((300_000,), float(number)))
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
    """A handler may fork, and the child be at work long after it; till it ends the parcel is not used again."""
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
        "reading.memory[:3] = b'ONE'\n"
        "kept = reading.memory[:6]\n"
        "reading.close()\n"
        "try:\n"
        "    parcel.fill([b'two' * 5000])\n"
        "except BlockingIOError:\n"
        "    print('read', flush=True)\n"
        "os.write(tell, b'x')\n"
        "os.wait()\n"
        "parcel.fill([b'two' * 5000])\n"
        "print(bytes(kept))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "read\nTrue\nb'ONEone'\n", done.stderr


def test_a_fork_loses_nothing_that_a_handler_writes_meanwhile() -> None:
    """On a worker with several threads, or one in the process that trains: another thread forks."""
    script = (
        "import os, threading\n"
        "from flowtrain_dask.snapshots.parcels import Parcel\n"
        "from flowtrain_dask.cluster.readings import read\n"
        "size = 32 << 20\n"
        "parcel = Parcel()\n"
        "reading = read(parcel.fill([bytes(size)]))\n"
        "def write():\n"
        "    for start in range(0, size, 4096):\n"
        "        reading.memory[start : start + 4096] = b'x' * 4096\n"
        "writer = threading.Thread(target=write)\n"
        "writer.start()\n"
        "while writer.is_alive():\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "print(bytes(reading.memory) == b'x' * size)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "True\n", done.stderr


def test_where_there_is_no_memory_for_what_is_kept_it_is_read_until_nobody_keeps_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(memory: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    before = len(os.listdir("/proc/self/fd"))
    parcel = Parcel()
    reading = read(parcel.fill([b"one"]))
    assert reading is not None
    kept = reading.memory[:3]
    monkeypatch.setattr(readings_module, "replace", refuse)
    reading.close()
    with pytest.raises(BlockingIOError):
        parcel.fill([b"two"])
    assert bytes(kept) == b"one"
    del kept
    parcel.fill([b"two"])
    parcel.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_too_many_open_files_are_no_other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and the file is looked for again later."""

    def refuse(*args: object) -> int:
        raise OSError(24, "Too many open files")

    parcel = Parcel()
    ticket = parcel.fill([b"one"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(OSError, match="Too many open files"):
            read(ticket)
        with Readings([ticket]) as readings:
            assert readings.missing == "OSError: [Errno 24] Too many open files"
    assert content(ticket) == b"one"
    parcel.close()


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


@pytest.fixture
def three() -> Iterator[list[Parcel]]:
    """Three parcels with ``b"0" * 5000`` and so on in them."""
    made = [Parcel() for _ in range(3)]
    for number, parcel in enumerate(made):
        parcel.fill([str(number).encode() * 5000])
    yield made
    for parcel in made:
        parcel.close()


def test_the_parcels_of_a_batch_are_read_in_their_order_until_its_end(three: list[Parcel]) -> None:
    tickets = [parcel.ticket for parcel in three]
    with Readings([tickets[2], tickets[0]]) as readings:
        assert not readings.missing
        assert [bytes(memory) for memory in readings.memories] == [b"2" * 5000, b"0" * 5000]
        with pytest.raises(BlockingIOError):
            three[2].renew(1)
        three[1].renew(1)  # which nobody reads
    assert [bytes(memory) for memory in readings.memories] == [b"", b""]
    for parcel in three:
        parcel.renew(1)


def test_a_batch_without_parcels_is_complete() -> None:
    with Readings([]) as readings:
        assert not readings.missing
        assert readings.memories == []


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_where_one_parcel_is_not_found_the_others_are_let_go_at_the_end(three: list[Parcel], missing: int) -> None:
    tickets = [parcel.ticket for parcel in three]
    tickets[missing] = tickets[missing]._replace(mark=bytes(16))
    before = len(os.listdir("/proc/self/fd"))
    with Readings(tickets) as readings:
        assert readings.missing == "memory of the process that trains is not found"
        for parcel in three[:missing]:
            with pytest.raises(BlockingIOError):
                parcel.renew(1)
        for parcel in three[missing:]:
            parcel.renew(1)
    for parcel in three:
        parcel.renew(1)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_batch_that_fails_lets_its_parcels_go(three: list[Parcel]) -> None:
    with pytest.raises(ValueError, match="broken"), Readings([parcel.ticket for parcel in three]):
        raise ValueError("broken")
    for parcel in three:
        parcel.renew(1)


def test_of_a_batch_only_what_is_kept_is_copied(three: list[Parcel], monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    move = ctypes.memmove

    def note(to: int, start: int, size: int) -> int:
        copied.append(size)
        return move(to, start, size)

    monkeypatch.setattr(ctypes, "memmove", note)
    with Readings([parcel.ticket for parcel in three]) as readings:
        kept = readings.memories[1][:3]
    assert copied == [START + 5000]
    for parcel in three:
        parcel.renew(5000)
        parcel.memory[START : START + 5000] = b"x" * 5000
    assert bytes(kept) == b"111"
