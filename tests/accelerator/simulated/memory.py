"""Memory of the device and pinned memory of the host, given out as torch's caching allocators give it.

Memory belongs to the stream for which it was allocated. When the last tensor in it is gone, it is given out again to
the same stream, the newest first, without a wait: the order of the stream keeps its old and its new use apart. Other
streams that use it must be recorded (``Tensor.record_stream``); then the memory is given out only after the work that
these streams had got until then. Pinned memory belongs to no stream, and every asynchronous copy is recorded by itself
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
"""The byte that fills fresh memory: floating point numbers of it are NaN, integers are -1."""

HOST = -1
"""The home of pinned memory, which belongs to no stream."""

_GRAIN = 64


class Block:
    """A piece of memory.

    Args:
        nbytes: Its size.
        home: The stream that it belongs to, or `HOST`.

    Attributes:
        uses: The uses that must be ordered with the next one.
        recorded: The other streams that use it.
        marks: For each stream recorded during the last use, the mark after which it no longer uses the memory. All
            marks are done.
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
        """Note the tensor whose storage is this memory from now on, and an object that must live as long as it."""
        self._storage, self._keeps = StorageWeakRef(tensor.untyped_storage()), keeps

    @property
    def is_unused(self) -> bool:
        """Whether the storage that the memory was lent to is gone."""
        return self._storage is not None and self._storage.expired()

    def take_back(self) -> None:
        """Forget the storage."""
        self._storage = self._keeps = None

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
            nbytes: The number of bytes.
            home: The stream that it is for, or `HOST`.

        Raises:
            torch.OutOfMemoryError: The device has no more.
        """
        with self._machine.lock:
            self._take_back()
            nbytes = max(_GRAIN, -(-nbytes // _GRAIN) * _GRAIN)
            if home != HOST:
                self._check_limit(nbytes)
            block = self._used_again(nbytes, home) or Block(nbytes, home)
            self._lent[block.address] = block
            return block

    def find(self, tensor: torch.Tensor) -> Block | None:
        """Return the memory of a tensor; ``None`` for ordinary memory of the host."""
        return self.at(tensor.untyped_storage().data_ptr())

    def at(self, address: int) -> Block | None:
        """Return the memory that begins at an address, if it was given out here."""
        return self._lent.get(address)

    def _take_back(self) -> None:
        """Take the memory of all storages that are gone, and put a mark into each stream that was recorded for it."""
        for block in [each for each in self._lent.values() if each.is_unused]:
            others = sorted(block.recorded - {block.home})
            marks = [self._machine.submit("mark", stream=stream) for stream in others]  # fails if the device has failed
            block.take_back()
            del self._lent[block.address]
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
