"""Parcels on the side of their owner: what is in one, where it is, and when it may be used again."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys

import pytest

from flowtrain_dask.cluster.readings import read
from flowtrain_dask.snapshots.parcels import MARK, START, Parcel, Ticket, parcel_at, possible

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


def test_room_is_taken_when_it_is_made_or_when_it_is_filled() -> None:
    empty, roomy = Parcel(), Parcel(10_000)
    assert empty.size == 0
    assert roomy.size == START + 10_000
    empty.close()
    roomy.close()


def test_what_was_in_it_is_found_by_nobody_when_it_is_begun_anew() -> None:
    """The owner writes to its memory, and gives nothing away but the ticket."""
    parcel = Parcel(100)
    assert parcel.ticket.descriptor == -1
    first = parcel.renew(3)
    parcel.memory[START : START + 3] = b"one"
    assert content(first) == b"one"
    second = parcel.renew(5)
    assert parcel.ticket == second
    assert (second.process, second.descriptor, second.size) == (os.getpid(), first.descriptor, 5)
    assert len(second.mark) == MARK
    assert second.mark != first.mark
    assert content(first) is None
    assert content(second) == b"one\0\0", "what is there stays until it is overwritten"
    parcel.close()


def test_the_owner_may_refer_to_memory_longer_than_the_parcel_is_there() -> None:
    parcel = Parcel(100)
    ticket = parcel.renew(3)
    kept = memoryview(parcel.memory).cast("B")[START:]
    kept[:3] = b"abc"
    parcel.close()
    parcel.close()
    assert bytes(kept[:3]) == b"abc"
    assert content(ticket) is None


def test_it_is_not_begun_anew_while_somebody_reads_it() -> None:
    parcel = Parcel(100)
    ticket = parcel.renew(3)
    reading = read(ticket)
    assert reading is not None
    with pytest.raises(BlockingIOError):
        parcel.renew(3)
    assert parcel.ticket == ticket
    reading.close()
    assert parcel.renew(3) != ticket
    parcel.close()


def test_a_renewal_that_fails_leaves_what_was_there() -> None:
    """There is no room of that size. What was there can be read, and the parcel renewed."""
    script = (
        "import resource\n"
        "from flowtrain_dask.snapshots.parcels import Parcel\n"
        "from flowtrain_dask.cluster.readings import read\n"
        "parcel = Parcel()\n"
        "ticket = parcel.fill([b'one'])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    parcel.renew(2 << 20)\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
        "reading = read(ticket)\n"
        "print(bytes(reading.memory), parcel.ticket == ticket)\n"
        "reading.close()\n"
        "print(parcel.fill([b'three']).size)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "File too large\nb'one' True\n5\n", done.stderr


def test_its_address_is_where_its_content_begins() -> None:
    parcel = Parcel()
    assert parcel.address == 0, "there is no room yet"
    parcel.fill([b"abc"])
    assert ctypes.string_at(parcel.address, 3) == b"abc"
    assert parcel_at(parcel.address) is parcel
    assert parcel_at(parcel.address + 1) is None
    address, kept = parcel.address, parcel.memory
    parcel.close()
    assert parcel.address == 0
    assert parcel_at(address) is None, "it is closed"
    assert len(kept) == START + 3


def test_a_parcel_that_has_grown_is_found_where_it_is_now() -> None:
    parcel = Parcel(100)
    parcel.renew(100)
    before, kept = parcel.address, parcel.memory
    parcel.renew(50)
    assert parcel.address == before, "it has room for that"
    parcel.renew(100_000)
    assert parcel.address != before
    assert parcel_at(before) is None
    assert parcel_at(parcel.address) is parcel
    assert len(kept) == START + 100, "who refers to the memory keeps it"
    parcel.close()


def test_no_parcel_is_found_when_nobody_has_it_any_more() -> None:
    parcel = Parcel(100)
    address, kept = parcel.address, parcel.memory
    del parcel
    gc.collect()
    assert parcel_at(address) is None
    assert len(kept) == START + 100


def test_each_of_several_is_found_by_its_own_address() -> None:
    made = [Parcel(size) for size in (1, 1, 5000)]
    assert len({parcel.address for parcel in made}) == 3
    assert [parcel_at(parcel.address) for parcel in made] == made
    for parcel in made:
        parcel.close()


def test_a_forked_child_refuses_to_begin_it_anew_and_takes_nothing_from_its_parent() -> None:
    script = (
        "import os\n"
        "from flowtrain_dask.snapshots.parcels import Parcel\n"
        "from flowtrain_dask.cluster.readings import read\n"
        "parcel = Parcel()\n"
        "ticket = parcel.fill([b'one'])\n"
        "if not os.fork():\n"
        "    for begin in (lambda: parcel.renew(3), lambda: parcel.fill([b'two'])):\n"
        "        try:\n"
        "            begin()\n"
        "        except BlockingIOError as error:\n"
        "            text = str(error).replace(str(os.getppid()), 'PARENT')\n"
        "            print(text.replace(str(os.getpid()), 'CHILD'), flush=True)\n"
        "    parcel.close()\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "reading = read(ticket)\n"
        "print(bytes(reading.memory))\n"
        "reading.close()\n"
        "parcel.fill([b'three'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    refused = "this memory belongs to process PARENT, and this is CHILD\n"
    assert done.stdout == f"{refused}{refused}b'one'\n", done.stderr
    assert done.returncode == 0, done.stderr


def test_what_other_threads_do_while_a_child_is_forked_counts_as_before() -> None:
    """Hooks of others may let them run when ours has."""
    script = (
        "import os\n"
        "seen = []\n"
        "os.register_at_fork(before=lambda: seen.append(parcels.forks()))  # runs after the hooks that come later\n"
        "from flowtrain_dask.snapshots import parcels\n"
        "before = parcels.forks()\n"
        "if not os.fork():\n"
        "    os._exit(parcels.forks() == before)\n"
        "_, status = os.wait()\n"
        "print(status, before != seen[0] != parcels.forks())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 True\n", done.stderr
