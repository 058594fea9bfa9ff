"""The bytes of a tensor, by which its content is compared without NumPy, which flowtrain does not need."""

from __future__ import annotations

import ctypes

import torch

__all__ = ["tensor_bytes"]


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return the elements of a tensor as bytes, in the order of its indices; views of equal elements have equal bytes.

    Args:
        tensor: A dense tensor of any shape, on any device but ``"meta"``.

    >>> tensor_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T)
    b'\\x01\\x03\\x02\\x04'
    """
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return ctypes.string_at(plain.data_ptr(), plain.nbytes) if plain.nbytes else b""
