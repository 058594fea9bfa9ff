"""The bytes of tensors, by which they are compared."""

from __future__ import annotations

import struct

import pytest
import torch

from flowtrain.data.tensor_bytes import tensor_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0, 3)])
def test_a_view_has_the_bytes_of_a_copy(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(6).to(dtype)[: torch.Size(shape).numel()].reshape(shape)
    wide = torch.stack([tensor, tensor], dim=-1)
    assert tensor_bytes(tensor) == tensor_bytes(wide[..., 0]), "with strides"
    assert len(tensor_bytes(tensor)) == tensor.nbytes


def test_the_bytes_are_those_of_the_elements_in_their_order() -> None:
    assert tensor_bytes(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T) == struct.pack("4f", 1, 3, 2, 4)
    parameter = torch.nn.Parameter(torch.tensor([0.5]))
    assert tensor_bytes(parameter) == struct.pack("f", 0.5)


def test_lazy_views_are_computed() -> None:
    tensor = torch.tensor([1 + 2j])
    assert tensor_bytes(tensor.conj()) == struct.pack("2f", 1, -2)
    assert tensor_bytes(tensor.conj().imag) == struct.pack("f", -2)
