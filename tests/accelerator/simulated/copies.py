"""Copies between the host and the device, which wait, or do not, as those of CUDA.

A copy with ``non_blocking=True`` from or to pinned memory is asynchronous; all others make the host wait. An
asynchronous copy touches the memory of the host only when it runs. A program that changes or reads that memory earlier
sees wrong values (https://docs.pytorch.org/tutorials/intermediate/pinmem_nonblock.html).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.accelerator.simulated.memory import Block
from tests.accelerator.simulated.tensors import INTERNALS, Tensors, is_simulated

__all__ = ["Copies"]


class Copies:
    """The kernels that make tensors, copy them, and read them.

    Args:
        tensors: Makes the tensors.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._machine = tensors.machine

    def empty(self, size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        """Stand for ``aten::empty.memory_format``."""
        form = memory_format or torch.contiguous_format
        return self._tensors.empty_like(torch.empty(size, dtype=dtype, device="meta", memory_format=form))

    def empty_strided(self, size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        """Stand for ``aten::empty_strided``."""
        return self._tensors.empty(dtype or torch.get_default_dtype(), size, stride)

    def resize_(self, tensor: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
        """Stand for ``aten::resize_`` of a tensor that has no elements, or that gets no more than its storage has.

        Raises:
            NotImplementedError: A tensor with elements would need a larger storage.
        """
        form = memory_format or torch.contiguous_format
        plan = torch.empty(size, dtype=tensor.dtype, device="meta", memory_format=form)
        offset = int(tensor.storage_offset())
        if offset * tensor.itemsize + plan.nbytes <= tensor.untyped_storage().nbytes():
            return torch.ops.aten.as_strided_(tensor, plan.size(), plan.stride(), offset)  # type: ignore[no-any-return]  # a tensor
        if tensor.numel():
            raise NotImplementedError("aten::resize_: the simulated device enlarges no storage that is in use.")
        tensor.data = self._tensors.empty_like(plan)
        return tensor

    def set_(self, tensor: Tensor, storage: Any, offset: int, size: Any, stride: Any = ()) -> Tensor:
        """Stand for ``aten::set_.source_Storage_storage_offset``, which touches no memory: the CPU's does it too."""
        op = torch.ops.aten.set_.source_Storage_storage_offset
        keys = INTERNALS.DispatchKeySet(INTERNALS.DispatchKey.CPU)
        return op.redispatch(keys, tensor, storage, offset, size, stride)  # type: ignore[no-any-return]  # a tensor

    def copy_from(self, source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        """Stand for ``aten::_copy_from``: fill a tensor from another one, at least one of which is on the device."""
        if is_simulated(source) and is_simulated(target):
            self._between(source, target)
        elif is_simulated(source):
            self._down(source, target, non_blocking)
        else:
            self._up(source, target, non_blocking)
        return target

    def to_copy(
        self, tensor: Tensor, *, dtype: Any = None, device: Any = None, non_blocking: bool = False,
        memory_format: Any = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """Stand for ``aten::_to_copy`` of a tensor of the device: a copy, on another device or of another dtype."""
        device, form = device or tensor.device, memory_format or torch.preserve_format
        if dtype not in (None, tensor.dtype):  # the device converts, whatever comes after that
            converted = torch.empty_like(tensor, dtype=dtype, memory_format=form)
            self._between(tensor, converted)
            if device == tensor.device:
                return converted
            tensor = converted
        target = torch.empty_like(tensor, device=device, memory_format=form)
        if non_blocking and target.is_cpu:
            target = self._tensors.pinned(target)
        return self.copy_from(tensor, target, non_blocking)

    def item(self, tensor: Tensor) -> Any:
        """Stand for ``aten::_local_scalar_dense``: wait for one number."""
        self._machine.wait(self._machine.submit("item", None, [self._tensors.block(tensor).uses]), "item")
        return self._tensors.on_host(tensor).item()

    def record_stream(self, tensor: Tensor, stream: torch.Stream) -> None:
        """Stand for ``aten::record_stream``."""
        self._tensors.block(tensor).recorded.add(stream.stream_id)

    def is_pinned(self, tensor: Tensor, device: Any = None) -> bool:
        """Stand for ``aten::is_pinned`` of a tensor of the CPU."""
        return self._tensors.memory.find(tensor) is not None

    def pin(self, tensor: Tensor, device: Any = None) -> Tensor:
        """Stand for ``aten::_pin_memory`` of a tensor of the CPU."""
        return self._tensors.pinned(torch.empty_like(tensor, device="meta")).copy_(tensor)

    def clone_storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return a copy of a storage of the device."""
        source, size = self._tensors.memory.at(storage.data_ptr()), storage.nbytes()
        assert source is not None
        made = self._tensors.empty(torch.uint8, [size], [1])
        here, there = source.view(torch.uint8, [size], [1]), self._tensors.on_host(made)
        self._machine.submit("copy", lambda: there.copy_(here), [source.uses], [self._tensors.block(made).uses])
        return made.untyped_storage()

    def _pinned(self, tensor: Tensor) -> Block | None:
        """Return the pinned memory of a tensor of the CPU, if it is in any, and note that the stream uses it."""
        block = self._tensors.memory.find(tensor)
        if block is not None:
            block.recorded.add(self._machine.current_stream)
        return block

    def _between(self, source: Tensor, target: Tensor) -> None:
        here, there = self._tensors.on_host(source), self._tensors.on_host(target)
        uses = self._tensors.block(source).uses, self._tensors.block(target).uses
        self._machine.submit("copy", lambda: there.copy_(here), [uses[0]], [uses[1]])

    def _down(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        here, block, pinned = self._tensors.on_host(source), self._tensors.block(source), self._pinned(target)
        # Pinned memory is not kept for the program by a copy that has not run: only the allocator waits for it.
        there = target.detach() if pinned is None else self._tensors.on_host(target)
        work = self._machine.submit(
            "copy to the host", lambda: there.copy_(here), [block.uses], [pinned.uses] if pinned is not None else []
        )
        if pinned is None or not non_blocking:
            self._machine.wait(work, "pageable" if non_blocking else "copy")

    def _up(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        there, block, pinned = self._tensors.on_host(target), self._tensors.block(target), self._pinned(source)
        late = pinned is not None and non_blocking
        # An ordinary copy has read the host's memory when the call returns.
        here = self._tensors.on_host(source) if late else source.detach().clone()
        work = self._machine.submit(
            "copy to the device", lambda: there.copy_(here), [pinned.uses] if pinned is not None else [], [block.uses]
        )
        if not late and source.dim():  # a number travels with the call
            self._machine.wait(work, "pageable" if non_blocking else "copy")
