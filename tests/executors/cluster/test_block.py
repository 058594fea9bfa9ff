"""Blocks: who finds the content, and that a copy which is torn is not used."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowtrain_dask.cluster.block import Block, BlockPlace, possible, read
from tests.support.programs import Programs
from tests.support.waiting import wait_for

pytestmark = pytest.mark.skipif(not possible(), reason="this system has no memfd_create")


@pytest.fixture
def block() -> Iterator[Block]:
    made = Block(kept=10_000)
    yield made
    made.close()


def content(place: BlockPlace) -> bytes | None:
    """Return what is in a block, if that is found and whole."""
    memory = read(place)
    return None if memory is None else bytes(memory)


def memory_of(place: BlockPlace) -> int:
    """Return the bytes that a block of this process takes."""
    return os.fstat(place.descriptor).st_size


@pytest.mark.parametrize("count", [0, 1, 3, 5000])
def test_what_is_in_it_comes_out(block: Block, count: int) -> None:
    """Of any number of pieces, also empty ones, and such as cannot be written to."""
    pieces: list[bytes | memoryview] = [bytes([at % 256]) * (at % 50) for at in range(count)]
    pieces[1::2] = [memoryview(bytearray(piece)) for piece in pieces[1::2]]
    pieces[::5] = [memoryview(piece) for piece in pieces[::5]]
    assert content(block.fill(pieces)) == b"".join(pieces)


def test_the_system_may_take_and_give_a_part_at_once(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does so above 2 GiB; pieces end anywhere."""
    write, take = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda to, pieces, at: write(to, [b"".join(pieces)[:7]], at))
    monkeypatch.setattr(os, "preadv", lambda of, pieces, at: take(of, [pieces[0][:11]], at))
    assert content(block.fill([b"abc", b"defgh", b"ij" * 30, b"k"])) == b"abcdefgh" + b"ij" * 30 + b"k"


def test_what_was_in_it_before_is_not_found(block: Block) -> None:
    first = block.fill([b"one"])
    assert content(first) == b"one"
    second = block.fill([b"three"])
    assert content(first) is None
    assert content(second) == b"three"
    block.close()
    block.close()
    assert content(second) is None


def test_a_copy_is_not_used_if_the_block_is_filled_meanwhile(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever moment: before the copy, in the middle of it, or when the new content has only begun."""
    take = os.preadv

    for fill in range(3):
        place = block.fill([b"a" * 1000])
        parts = iter(range(10))

        def take_a_part(descriptor: int, pieces: list[memoryview], at: int, fill: int = fill) -> int:
            part = next(parts)  # noqa: B023  # it is used within this turn only
            if part == fill:
                block.fill([b"b" * 500])
            return take(descriptor, [pieces[0][:400]], at)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", take_a_part)
            assert content(place) is None


def test_copies_beside_a_writer_are_whole_or_refused(programs: Programs, tmp_path: Path) -> None:
    """Another process fills the block all the time, each time with one byte; what is read in between is of one."""
    script = (
        "import os, sys\n"
        "from flowtrain_dask.cluster.block import Block\n"
        "block, number = Block(1 << 22), 0\n"
        "while True:\n"
        "    number += 1\n"
        "    half = bytes([number % 256]) * (1 << 19)\n"
        "    with open(sys.argv[1] + '.new', 'w') as file:\n"
        "        file.write(str(tuple(block.fill([half, half]))))\n"
        "    os.replace(sys.argv[1] + '.new', sys.argv[1])\n"
    )
    newest = tmp_path / "newest"
    writer = programs.start(script, str(newest), log=tmp_path / "output")
    try:
        wait_for(newest.exists)
        seen: set[int] = set()
        refused = 0
        while len(seen) < 20 or not refused:
            found = content(BlockPlace(*eval(newest.read_text())))
            refused += found is None
            if found is not None:
                assert found.count(found[:1]) == len(found)
                seen.add(found[0])
    finally:
        writer.kill()
        writer.wait(20)
        writer.close()


def test_the_memory_of_a_large_batch_is_given_back(block: Block) -> None:
    small = block.fill([b"x" * 100])
    block.shrink()
    assert content(small) == b"x" * 100
    large = block.fill([b"x" * 100_000])
    assert memory_of(large) > 100_000
    block.shrink()
    assert memory_of(large) == 10_000
    assert content(large) is None, "a worker that is late"
    before = len(os.listdir("/proc/self/fd"))
    block.close()
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_where_there_is_no_room_it_is_an_error_and_the_next_batch_may_fit(programs: Programs) -> None:
    script = (
        "import resource\n"
        "from flowtrain_dask.cluster.block import Block, read\n"
        "block = Block(1 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    block.fill([bytes(2 << 20)])\n"
        "except OSError as error:\n"
        "    print(error.strerror)\n"
        "print(bytes(read(block.fill([b'three']))))\n"
    )
    done = programs.run(script)
    assert done.stdout == "File too large\nb'three'\n", done.stderr


def test_a_block_that_cannot_be_opened_is_not_found(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> int:
        raise OSError(24, "Too many open files")

    place = block.fill([b"one"])
    monkeypatch.setattr(os, "open", refuse)
    assert content(place) is None


def test_other_numbers_are_no_block(block: Block, tmp_path: Path) -> None:
    """The process may have ended and its number been given to another one, and so may a descriptor."""
    place = block.fill([b"abc"])
    assert content(place._replace(mark=bytes(64))) is None
    assert content(place._replace(size=1 << 20)) is None
    assert content(place._replace(process=2**22 + 1)) is None
    with open(tmp_path / "file", "wb") as file:
        assert content(place._replace(descriptor=file.fileno())) is None
    os.mkfifo(tmp_path / "pipe")
    pipe = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert content(place._replace(descriptor=pipe)) is None, "and nobody waits for what might be written to it"
    os.close(pipe)


def test_a_child_that_was_forked_takes_nothing_from_its_parent(programs: Programs) -> None:
    script = (
        "import os\n"
        "from flowtrain_dask.cluster.block import Block, read\n"
        "block = Block(100)\n"
        "place = block.fill([b'one'])\n"
        "if not os.fork():\n"
        "    block.close()\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print(bytes(read(place)))\n"
    )
    done = programs.run(script)
    assert done.stdout == "b'one'\n", done.stderr
