"""Memory that is lent, and comes back when nobody refers to it any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowtrain import UsageError
from flowtrain_dask.snapshots.pool import ALIGNMENT, Pool, dense_strides

KB = torch.zeros(256)  # 1 KiB


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
