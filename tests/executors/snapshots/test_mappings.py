"""Memory from the operating system: who sees it, and when it is given back."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowtrain_dask.snapshots.mappings import address_of, mapped, replace
from flowtrain_dask.snapshots.parcels import possible

pytestmark = pytest.mark.skipif(not possible(), reason="this system has no memfd_create")


@pytest.fixture
def file() -> Iterator[int]:
    descriptor = os.memfd_create("flowtrain-test")
    os.pwrite(descriptor, b"x" * 8192, 0)
    yield descriptor
    os.close(descriptor)


def test_what_is_shared_is_seen_and_what_is_not_stays_here(file: int) -> None:
    shared, private = mapped(8192, file, shared=True), mapped(8192, file, shared=False)
    shared[:3] = b"abc"
    private[3:6] = b"def"
    assert os.pread(file, 8, 0) == b"abcxxxxx"
    assert bytes(private[:8]) == b"abcdefxx"


def test_what_is_replaced_is_where_it_was_and_follows_the_file_no_more(file: int) -> None:
    array = mapped(8192, file, shared=False)
    address = address_of(array)
    array[1:3] = b"yz"
    replace(array)
    os.pwrite(file, b"?" * 8192, 0)
    assert address_of(array) == address
    assert bytes(array) == b"xyz" + b"x" * 8189


def test_it_is_given_back_when_nobody_refers_to_it(file: int) -> None:
    array = mapped(8192, file, shared=True)
    replaced = mapped(8192, file, shared=False)
    replace(replaced)
    view = memoryview(array)[4000:]
    assert "flowtrain-test" in Path("/proc/self/maps").read_text()
    del array
    gc.collect()
    assert "flowtrain-test" in Path("/proc/self/maps").read_text()
    del view, replaced
    gc.collect()
    assert "flowtrain-test" not in Path("/proc/self/maps").read_text()


def test_what_cannot_be_mapped_says_how_much_it_was(file: int) -> None:
    with pytest.raises(OSError, match=r"mmap of 1,152,921,504,606,846,976 bytes: Cannot allocate memory"):
        mapped(1 << 60, file, shared=True)
    assert mmap.PAGESIZE == 4096 or not os.uname().machine.startswith("x86")
