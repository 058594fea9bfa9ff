"""Memory that is lent, and comes back when nobody refers to it any more."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowtrain import UsageError
from flowtrain_dask.cluster.readings import read
from flowtrain_dask.snapshots import pool as pool_module
from flowtrain_dask.snapshots.parcels import Parcel, parcel_at, possible
from flowtrain_dask.snapshots.pool import ALIGNMENT, Pool, dense_strides

KB = torch.zeros(256)  # 1 KiB
MB = torch.zeros(1 << 18)  # 1 MiB

needs_parcels = pytest.mark.skipif(not possible(), reason="this system has no memfd_create")


def parcel_of(lent: torch.Tensor) -> Parcel:
    found = parcel_at(lent.untyped_storage().data_ptr())
    assert found is not None
    return found


def test_memory_comes_back_when_nobody_refers_to_it() -> None:
    pool = Pool(1 << 20)
    first = pool.like(KB)
    address = first.data_ptr()
    assert pool.like(KB).data_ptr() != address
    assert pool.nbytes == 2048
    del first
    assert {each.data_ptr() for each in [pool.like(KB), pool.like(KB)]} >= {address}
    assert pool.nbytes == 2048


KEPT: dict[str, Callable[[list[torch.Tensor]], Any]] = {
    "slice": lambda lent: lent[0][5:],
    "numpy": lambda lent: lent[0].numpy(),
    "storage": lambda lent: lent[0].untyped_storage(),
    "detached": lambda lent: lent[0].detach(),
    "one of several": lambda lent: lent[1],
}


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_what_is_kept_in_any_way_is_not_lent_again(keep: Callable[[list[torch.Tensor]], Any]) -> None:
    """Rule 26: a callback that keeps what it read finds it unchanged."""
    pool = Pool(1 << 20)
    lent = pool.like_all([KB, KB])
    address = lent[0].data_ptr()
    kept = keep(lent)
    del lent
    assert address not in [pool.like_all([KB, KB])[0].data_ptr() for _ in range(5)]
    del kept
    assert address in [each[0].data_ptr() for each in [pool.like_all([KB, KB]) for _ in range(5)]]


def test_the_limit_holds_and_what_is_idle_longest_goes_first() -> None:
    pool = Pool(4096)
    for size in range(256, 256 * 9, 256):
        assert pool.like(torch.zeros(size)).shape == (size,)
        assert pool.nbytes <= 4096
    lent = [pool.like(KB) for _ in range(8)]
    assert pool.nbytes <= 4096
    assert len({each.data_ptr() for each in lent}) == 8
    pool.clear()
    assert pool.nbytes == 0
    lent[0].fill_(3.0)
    assert Pool(0).like(KB).shape == (256,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex128, torch.int8])
def test_each_tensor_is_aligned_as_torch_aligns(dtype: torch.dtype) -> None:
    sources = [torch.zeros(1001, dtype=dtype), torch.zeros(3, dtype=torch.float16), torch.zeros(7, 9, dtype=dtype).t()]
    for made, source in zip(Pool(1 << 20).like_all(sources), sources, strict=True):
        assert made.data_ptr() % ALIGNMENT == 0
        assert (made.dtype, made.shape, made.stride()) == (source.dtype, source.shape, source.stride())


def test_strides_that_a_copy_keeps() -> None:
    assert dense_strides(torch.zeros(3, 4).t()) == (1, 4)
    assert dense_strides(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)) == (60, 1, 15, 3)
    assert dense_strides(torch.zeros(8)[::2]) == (2,)
    assert dense_strides(torch.zeros(8)[::4]) is None
    assert dense_strides(torch.zeros(1).expand(5)) is None
    assert dense_strides(torch.zeros(6).unfold(0, 3, 1)) is None


def test_a_limit_that_means_nothing() -> None:
    with pytest.raises(UsageError, match=r"Pool\(\): limit_bytes is a whole number, at least 0, got -1\."):
        Pool(-1)


@needs_parcels
def test_large_memory_of_a_pool_that_shares_is_read_where_it_is() -> None:
    pool = Pool(1 << 24, share=True)
    one, two = pool.like_all([MB, torch.zeros(3, 5, dtype=torch.float16).t()])
    one.fill_(3.0)
    two.fill_(5.0)
    assert parcel_of(one) is parcel_of(two)
    reading = read(parcel_of(one).ticket)
    assert reading is not None
    there = torch.frombuffer(reading.memory, dtype=torch.float32, count=MB.numel())
    assert torch.equal(there, one)
    there.fill_(7.0)
    assert one[0] == 3.0, "a reader has it to itself"
    del there
    reading.close()
    assert one.data_ptr() % ALIGNMENT == two.data_ptr() % ALIGNMENT == 0
    assert parcel_at(pool.like(KB).untyped_storage().data_ptr()) is None, "each is an open file"


@needs_parcels
def test_memory_that_somebody_reads_or_has_kept_is_not_lent_again() -> None:
    """A worker that was stopped may read on when its batch was done by another one long ago."""
    pool = Pool(1 << 24, share=True)
    lent = pool.like(MB)
    address, ticket = lent.data_ptr(), parcel_of(lent).ticket
    kept = lent[5:]
    del lent
    assert address not in [pool.like(MB).data_ptr() for _ in range(4)]
    del kept
    reading = read(ticket)
    assert reading is not None
    assert address not in [pool.like(MB).data_ptr() for _ in range(4)]
    reading.close()
    assert address in [pool.like(MB).data_ptr() for _ in range(4)]
    assert read(ticket) is None, "what was told of it before is there no more"


@needs_parcels
def test_there_are_few_parcels_and_they_end_with_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_PARCELS", 2)
    before = len(os.listdir("/proc/self/fd"))
    pool = Pool(8 << 20, share=True)
    lent = [pool.like(MB) for _ in range(4)]
    assert [parcel_at(each.data_ptr()) is not None for each in lent] == [True, True, False, False]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    lent.clear()
    large = pool.like(torch.zeros(2 << 20))  # 8 MiB: all the others have to go
    assert parcel_at(large.data_ptr()) is not None, "those that went count no more"
    assert len(os.listdir("/proc/self/fd")) == before + 1
    large.fill_(2.0)
    pool.clear()
    assert len(os.listdir("/proc/self/fd")) == before
    assert parcel_at(large.data_ptr()) is None
    assert large[-1] == 2.0, "what is lent stays as it is"


@needs_parcels
def test_a_forked_child_does_not_lend_what_its_parent_has() -> None:
    script = (
        "import os, torch\n"
        "from flowtrain_dask.snapshots.pool import Pool\n"
        "torch.set_num_threads(1)\n"
        "large, pool = torch.ones(1 << 18), Pool(1 << 24, share=True)\n"
        "lent = pool.like(large).copy_(large)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    del lent  # the child does not refer to it any more, but the parent does\n"
        "    mine = [pool.like(large).zero_() for _ in range(4)]\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1], torch.equal(lent, large))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "0 True\n", done.stderr


@needs_parcels
def test_what_a_forked_child_may_use_is_not_lent_again() -> None:
    """A handler forks a child that draws, say; the child is at work when the handler is not any more."""
    script = (
        "import os, torch\n"
        "from flowtrain_dask.snapshots.pool import Pool\n"
        "torch.set_num_threads(1)\n"
        "large, pool = torch.ones(1 << 18), Pool(3 << 20, share=True)\n"
        "lent = pool.like(large).copy_(large)\n"
        "go, tell = os.pipe()\n"
        "if not os.fork():\n"
        "    os.read(go, 1)\n"
        "    print(float(lent.min()), float(lent.max()), flush=True)\n"
        "    os._exit(0)\n"
        "del lent\n"
        "for _ in range(5):\n"
        "    others = [pool.like(large).fill_(2.0) for _ in range(3)]\n"
        "os.write(tell, b'x')\n"
        "os.wait()\n"
        "print(len([1 for link in os.listdir('/proc/self/fd') if os.path.islink(f'/proc/self/fd/{link}')\n"
        "          and 'memfd' in os.readlink(f'/proc/self/fd/{link}')]), pool.nbytes >> 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "1.0 1.0\n3 3\n", done.stderr


@needs_parcels
def test_where_no_file_can_be_opened_memory_is_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", refuse)
    pool = Pool(1 << 24, share=True)
    lent = pool.like(MB)
    assert parcel_at(lent.data_ptr()) is None
    address = lent.data_ptr()
    del lent
    assert pool.like(MB).data_ptr() == address
