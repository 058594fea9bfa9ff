"""Copies of tensors: detached, on the CPU, in the layout of the original.

The training thread does not wait for a copy from an accelerator with streams. The tensor is cloned on the current
stream, the clone is copied to pinned memory on another stream, and an event tells when this copy is complete
(`Copying.events`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from flowtrain.state.accelerator import has_streams, on_stream
from flowtrain_dask.snapshots.copying import Copying, Refused

__all__ = ["compressed_indices", "copy_tensor", "copy_tensors"]

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)

_streams: dict[torch.device, torch.Stream] = {}


def copy_tensor(value: torch.Tensor, copying: Copying) -> torch.Tensor:
    """Return a detached copy of a tensor in CPU memory.

    Args:
        value: A tensor of any type of torch.
        copying: The pass of copying.

    Raises:
        Refused: Tensors of this layout cannot be copied.
    """
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        return _special(value, copying)
    source = value.detach()
    if copying.dry or source.is_meta:
        return source
    if source.is_cpu:
        if not source.is_contiguous() and 0 in source.stride():  # expanded: some elements are shown many times
            return _expanded(source, copying)
        copy = copying.pool.like(source).copy_(source)
    elif has_streams(source.device):
        copy = _from_accelerator(source, copying)
    else:
        copy = source.to("cpu")
    copying.nbytes += copy.nbytes
    return copy


def copy_tensors(tensors: Mapping[str, torch.Tensor], copying: Copying) -> dict[str, torch.Tensor]:
    """Return copies by name. Ordinary tensors get one piece of memory together, which is faster than one for each.

    Args:
        tensors: Parameters or gradients by name.
        copying: The pass of copying.

    Raises:
        Refused: One of them cannot be copied.
    """
    # One tensor of another kind sends all of them the slow way, which names the tensor that cannot be copied.
    if copying.dry or not all(map(_is_ordinary, tensors.values())):
        return {name: copying.copy_at(tensor, name) for name, tensor in tensors.items()}
    sources = list(tensors.values())
    copies = copying.pool.like_all(sources)
    with torch.no_grad():
        for copy, source in zip(copies, sources, strict=True):
            copy.copy_(source)
            copying.remember(source, copy)  # the same tensor elsewhere in the entry gets the same copy
    copying.nbytes += sum([copy.nbytes for copy in copies])
    return dict(zip(tensors, copies, strict=True))


def _is_ordinary(value: torch.Tensor) -> bool:
    """Return whether `torch.Tensor.copy_` into memory of the same strides is all that a copy needs."""
    return (
        (type(value) is nn.Parameter or type(value) is torch.Tensor)
        and value.layout is torch.strided
        and not value.is_nested
        and value.is_cpu
        and value.is_contiguous()
        and not value.is_quantized
        and not value.is_conj()
        and not value.is_neg()
    )


def compressed_indices(source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two index tensors of a sparse tensor in a compressed layout, the compressed one first."""
    if source.layout in (torch.sparse_csr, torch.sparse_bsr):
        return source.crow_indices(), source.col_indices()
    return source.ccol_indices(), source.row_indices()


def _expanded(source: torch.Tensor, copying: Copying) -> torch.Tensor:
    """Copy an expanded tensor, each element only once."""
    # A dimension with stride 0 shows one element many times, so one row of it holds all elements.
    once = [1 if stride == 0 else size for size, stride in zip(source.shape, source.stride(), strict=True)]
    small = source.as_strided(once, [stride or 1 for stride in source.stride()])
    copy = copying.pool.like(small).copy_(small)
    copying.nbytes += copy.nbytes
    return copy.expand(source.shape)


def _special(value: torch.Tensor, copying: Copying) -> torch.Tensor:
    source = value.detach()
    if value.layout is torch.sparse_coo:
        indices, values = (copy_tensor(part, copying) for part in (source._indices(), source._values()))
        return torch.sparse_coo_tensor(
            indices, values, source.shape, is_coalesced=source.is_coalesced(), check_invariants=False
        )
    if value.layout in _COMPRESSED:
        compressed, plain = compressed_indices(source)
        return torch.sparse_compressed_tensor(
            copy_tensor(compressed, copying),
            copy_tensor(plain, copying),
            copy_tensor(source.values(), copying),
            source.shape,
            layout=value.layout,
            check_invariants=False,
        )
    if value.is_quantized and value.layout is torch.strided:
        copying.nbytes += source.numel() * source.element_size()
        return source if copying.dry else source.to("cpu", copy=True)
    kind = "nested" if value.is_nested else str(value.layout)
    raise Refused(value, f"tensors of this kind ({kind}) cannot be copied", "Read a dense tensor made from it")


def _from_accelerator(source: torch.Tensor, copying: Copying) -> torch.Tensor:
    device = source.device
    stream = _streams.get(device)
    if stream is None:
        stream = _streams[device] = torch.Stream(device)
    source = source.resolve_conj().resolve_neg()
    kept = source.clone()
    target = copying.pool.like(kept, pinned=True)
    stream.wait_stream(torch.accelerator.current_stream(device))
    with on_stream(stream):
        target.copy_(kept, non_blocking=True)
    kept.record_stream(stream)  # so that torch does not reuse the memory of the clone before the copy is complete
    copying.events.append(stream.record_event())
    return target
