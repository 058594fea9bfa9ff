"""Memory of the device and pinned memory of the host, given out as torch's caching allocators give it.

Memory belongs to the stream in which it was asked for. Once the last tensor in it is gone it is given out again to the
same stream, the newest first, without a wait: the order of the stream keeps its old and its new use apart. Streams that
use it besides must be recorded (``Tensor.record_stream``); then it waits until these have done what they had got so
far. Pinned memory belongs to no stream, and every copy that may still run is recorded by itself
(https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.accelerator.simulated.clocks import Uses
from tests.accelerator.simulated.machine import Machine, Work

__all__ = ["HOST", "POISON", "Block", "Memory"]

POISON = 0xFF
"""What fresh memory is full of: as a floating point number it is NaN, as an integer -1."""

HOST = -1
"""The home of pinned memory, which belongs to no stream."""

_GRAIN = 64


class Block:
    """A piece of memory.

    Args:
        nbytes: Its size.
        home: The stream that it belongs to, or `HOST`.

    Attributes:
        uses: What must be ordered with its next use.
        recorded: The other streams that use it.
        marks: Where the streams that were recorded for its last use let go of it; they are past that.
    """

    def __init__(self, nbytes: int, home: int) -> None:
        with torch.inference_mode(False):
            self.bytes = torch.full((nbytes,), POISON, dtype=torch.uint8, device="cpu")
        self.nbytes = nbytes
        self.home = home
        self.address = self.bytes.data_ptr()
        self.uses = Uses()
        self.recorded: set[int] = set()
        self.marks: list[Work] = []
        self._storage: StorageWeakRef | None = None
        self._keeps: object = None

    def lend(self, tensor: torch.Tensor, keeps: object = None) -> None:
        """Note the tensor in whose storage the memory is from now on, and what must live as long as that."""
        self._storage, self._keeps = StorageWeakRef(tensor.untyped_storage()), keeps

    def take_back(self) -> bool:
        """Return whether the storage is gone; then nobody has the memory."""
        if self._storage is None or not self._storage.expired():
            return False
        self._storage = self._keeps = None
        return True

    def view(self, dtype: torch.dtype, size: Sequence[int], stride: Sequence[int], offset: int = 0) -> torch.Tensor:
        """Return a tensor of the CPU in this memory."""
        whole = self.bytes[: self.nbytes // dtype.itemsize * dtype.itemsize].view(dtype)
        return whole.as_strided(size, stride, offset)


class Memory:
    """All memory of the machine.

    Args:
        machine: The machine.

    Attributes:
        limit: How many bytes the device has; ``None`` for as many as are asked for.
    """

    def __init__(self, machine: Machine) -> None:
        self.limit: int | None = None
        self._machine = machine
        self._lent: dict[int, Block] = {}
        self._free: defaultdict[tuple[int, int], list[tuple[Block, list[Work]]]] = defaultdict(list)

    @property
    def nbytes(self) -> int:
        """How many bytes of the device have tensors in them."""
        with self._machine.lock:
            self._take_back()
            return sum(block.nbytes for block in self._lent.values() if block.home != HOST)

    def allocate(self, nbytes: int, home: int) -> Block:
        """Return memory, full of `POISON` or of what was in it.

        Args:
            nbytes: How much.
            home: The stream that it is for, or `HOST`.

        Raises:
            torch.OutOfMemoryError: The device has no more.
        """
        with self._machine.lock:
            self._take_back()
            nbytes = max(_GRAIN, -(-nbytes // _GRAIN) * _GRAIN)
            block = self._used_again(nbytes, home)
            if block is None:
                if home != HOST:
                    self._check_limit(nbytes)
                block = Block(nbytes, home)
            self._lent[block.address] = block
            return block

    def find(self, tensor: torch.Tensor) -> Block | None:
        """Return the memory that a tensor is in; ``None`` for ordinary memory of the host."""
        return self.at(tensor.untyped_storage().data_ptr())

    def at(self, address: int) -> Block | None:
        """Return the memory that begins at an address, if it was given out here."""
        return self._lent.get(address)

    def _take_back(self) -> None:
        """Take the memory of all storages that are gone, and mark in the recorded streams when it was."""
        for block in [each for each in self._lent.values() if each.take_back()]:
            del self._lent[block.address]
            others = sorted(block.recorded - {block.home})
            marks = [self._machine.submit("mark", stream=stream) for stream in others]
            self._free[block.home, block.nbytes].append((block, marks))

    def _used_again(self, nbytes: int, home: int) -> Block | None:
        """Return the memory that came back last, of those that no recorded stream uses any more."""
        free = self._free[home, nbytes]
        for position in reversed(range(len(free))):
            block, marks = free[position]
            if all(mark.done for mark in marks):
                del free[position]
                block.recorded = set()
                block.marks = marks
                if home == HOST:
                    block.uses = Uses()  # every use was recorded, and is done
                    block.bytes.fill_(POISON)
                return block
        return None

    def _check_limit(self, nbytes: int) -> None:
        if self.limit is None:
            return
        lent = self.nbytes
        if lent + nbytes > self.limit:
            raise torch.OutOfMemoryError(
                f"The simulated device is out of memory. Tried to allocate {nbytes} bytes. It has {self.limit} bytes, "
                f"of which {lent} are in use."
            )
