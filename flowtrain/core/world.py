"""The ranks of a training: the processes that train one model together, and the exchanges between them.

``torchrun`` starts the processes and gives each of them its number, the *rank*. Rank 0 is the *main* rank: it writes
logs and checkpoints. What ranks tell each other beside gradients goes through `World.exchange` and `World.sum`, over a
process group of its own, so that it never meets the gradients of DDP on the way. Every rank must make the same calls in
the same order; `flowtrain.training.ranks` sees to that.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import pickle
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from flowtrain.errors import CoreError, RemoteError
from flowtrain.state.accelerator import accelerator

__all__ = ["Parallel", "World", "find_world", "local_rank", "wanted_world"]

Parallel = Literal["auto", "ddp", "fsdp"] | None
"""How several processes train one model; ``"auto"`` is DDP where ``torchrun`` has started several processes."""

T = TypeVar("T")

_groups: dict[object, Any] = {}
"""The process group for exchanges, by the default group of torch that it was made beside."""


class World:
    """All ranks of a training, seen from one of them.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
        main: Whether this is the main rank, which writes logs and checkpoints.
        lost: Whether an exchange has failed, since a rank has ended or stands still. No further one can be made.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.main = self.rank == 0
        self.lost = False

    def exchange(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in the order of the ranks. Every rank calls this at the same point.

        Args:
            value: The value of this rank. It is pickled.

        Raises:
            RemoteError: A rank has ended or stands still.
        """
        # The length and a short value travel together, as a second collective would double the time of most exchanges.
        data = bytearray(pickle.dumps(value))
        own = torch.zeros(_LENGTH + _SHORT, dtype=torch.uint8)
        own[:_LENGTH] = torch.tensor([len(data)], dtype=torch.int64).view(torch.uint8)
        own[_LENGTH : _LENGTH + len(data)] = _bytes(data[:_SHORT])
        parts = self._all(own)
        sizes = [int(part[:_LENGTH].view(torch.int64)) for part in parts]
        if max(sizes) <= _SHORT:
            return _unpacked([part[_LENGTH:] for part in parts], sizes)
        return _unpacked(self._all(_padded(data, max(sizes))), sizes)

    def _all(self, own: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of all ranks, which have the same shape."""
        parts = [torch.empty_like(own) for _ in range(self.size)]
        self.guarded(dist.all_gather, parts, own, group=self._group)
        return parts

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks on the main rank, in the order of the ranks; an empty list on any other.

        Args:
            value: The value of this rank. It is pickled.

        Raises:
            RemoteError: A rank has ended or stands still.
        """
        data = bytearray(pickle.dumps(value))
        sizes = [int(each) for each in self._all(torch.tensor([len(data)]))]
        own = _padded(data, max(sizes))
        parts = [torch.empty_like(own) for _ in sizes] if self.main else []
        self.guarded(dist.gather, own, parts if self.main else None, dst=0, group=self._group)
        return _unpacked(parts, sizes) if self.main else []

    def sum(self, numbers: Sequence[int]) -> list[int]:
        """Return the sums over all ranks of these numbers, of which every rank gives equally many.

        Raises:
            RemoteError: A rank has ended or stands still.
        """
        sums = torch.tensor(numbers, dtype=torch.int64)
        self.guarded(dist.all_reduce, sums, group=self._group)
        return sums.tolist()

    def give_up(self) -> None:
        """Make no further exchange, as the other ranks wait in a collective that this one cannot join."""
        self.lost = True

    def guarded(self, collective: Callable[..., T], *args: Any, **named: Any) -> T:
        """Call a function in which all ranks take part, and return its result.

        Raises:
            RemoteError: A rank has ended or stands still, now or before.
        """
        if self.lost:
            raise RemoteError(_LOST.format(rank=self.rank, size=self.size, cause="an exchange has failed before"))
        try:
            return collective(*args, **named)
        except RuntimeError as error:
            if not _of_a_connection(error):
                raise  # an error of the computation, as in a backward pass, during which gradients travel
            self.lost = True
            cause = str(error).partition("\n")[0]
            raise RemoteError(_LOST.format(rank=self.rank, size=self.size, cause=cause)) from error

    def beside(self) -> World:
        """Return the same ranks with a process group of its own, for exchanges on another thread than these.

        Every rank calls this at the same point.
        """
        return World(self.guarded(dist.new_group, backend="gloo", timeout=_timeout(dist.group.WORLD)))

    def __repr__(self) -> str:
        return f"rank {self.rank} of {self.size}"


_LENGTH = 8
"""Bytes in which the first collective of an exchange carries the length of the value."""

_SHORT = 2040
"""Bytes of a value that the first collective of an exchange carries; a longer one needs a second collective."""


def _bytes(data: bytearray) -> torch.Tensor:
    """Return bytes as a tensor. The functions of torch that exchange objects need NumPy, which is not required."""
    return torch.frombuffer(data, dtype=torch.uint8)


def _padded(data: bytearray, length: int) -> torch.Tensor:
    """Return bytes in a tensor of a length."""
    own = torch.zeros(length, dtype=torch.uint8)
    own[: len(data)] = _bytes(data)
    return own


def _unpacked(parts: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[Any]:
    """Return the values that other ranks have pickled into tensors of bytes."""
    return [pickle.loads(ctypes.string_at(part.data_ptr(), size)) for part, size in zip(parts, sizes, strict=True)]


_OF_A_CONNECTION = ("/gloo/", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")
"""Words in the errors that torch raises when a rank has ended or does not answer; gloo has no type for them."""

_TORCH = os.path.join(os.path.dirname(torch.__file__), "")
"""The folder of torch."""


def _of_a_connection(error: RuntimeError) -> bool:
    """Tell whether an error says that a rank has ended or does not answer.

    A model may raise an error with the same words, as for a server that it asks. Such an error comes from a line
    outside of torch, and the other ranks must be told of it.
    """
    if not isinstance(error, dist.DistError) and not any(word in str(error) for word in _OF_A_CONNECTION):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or trace.tb_frame.f_code.co_filename.startswith((_TORCH, __file__))


_LOST = (
    "rank {rank} of {size} waits for another rank that has ended, or stands still for longer than the time-out of the "
    "process group: {cause}. The output of that rank says why, if it has ended with an error. Start all ranks again "
    "with fit(..., resume='auto')."
)


def wanted_world() -> int:
    """Return the number of processes that ``torchrun``, or the user's process group, has; 1 without either."""
    if not dist.is_available():
        return 1
    if dist.is_initialized():
        return dist.get_world_size()
    started = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if started else 1


def local_rank() -> int | None:
    """Return the number of this process on its machine, which is the number of its accelerator; ``None`` if alone."""
    value = os.environ.get("LOCAL_RANK", "")
    return int(value) if value.isdigit() and wanted_world() > 1 else None


def find_world(parallel: Parallel) -> World | None:
    """Return the ranks that train together, and join their process group; ``None`` if this process trains alone.

    Args:
        parallel: The setting of the user.

    Raises:
        CoreError: ``"ddp"`` or ``"fsdp"`` is wanted, and this process was not started as one of several; or the process
            group of the user cannot work on this machine.
    """
    if parallel is None:
        return None
    if wanted_world() == 1:
        if parallel != "auto" and not (dist.is_available() and (dist.is_initialized() or "RANK" in os.environ)):
            raise CoreError(
                f"parallel={parallel!r} trains in several processes, and this process was started alone: there is no "
                f"process group and no RANK in the environment. Start the program with "
                f"`torchrun --nproc-per-node 2 program.py`, or leave parallel= out, which trains alone here and in "
                f"parallel under torchrun."
            )
        return None
    own = not dist.is_initialized()
    if own:
        _join(None if accelerator() else "gloo")
    elif dist.get_backend() == dist.Backend.NCCL and not torch.cuda.is_available():
        raise CoreError(
            "The process group uses NCCL, which needs a GPU of CUDA in every process, and this one has none. Write "
            "torch.distributed.init_process_group('gloo'), or leave that call out: flowtrain makes the group that fits."
        )
    default = dist.group.WORLD
    if default not in _groups:  # all learners of a process share one, since each group has threads and connections
        atexit.register(_leave, own)
        _groups[default] = dist.new_group(backend="gloo", timeout=_timeout(default))
    return World(_groups[default])


def _join(backend: str | None) -> None:
    """Join the process group that the environment describes.

    ``torchrun --max-restarts`` may keep one store for all lives of the processes. There the addresses of dead ones
    would be found, so each life after the first one has names of its own in the store. On several machines the number
    of restarts may differ between them, so nothing is changed there.
    """
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if life == "0" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        dist.init_process_group(backend)
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    names = dist.PrefixStore(f"life {life}", store)  # type: ignore[attr-defined]  # it is documented there
    dist.init_process_group(backend, store=names, rank=rank, world_size=size)


def _timeout(group: Any) -> timedelta | None:
    """Return the time-out of a process group, for the group beside it; ``None`` if torch does not tell it."""
    for device in (torch.device("cpu"), accelerator()):
        try:
            found = group._get_backend(device).options._timeout
        except (AttributeError, RuntimeError, TypeError):  # a group has no backend for every device; no way is public
            continue
        if isinstance(found, timedelta):
            return found
    return None


_SETTLING = 0.1
"""Seconds in which a thread of gloo releases the tensors of the last exchange."""


def _leave(own: bool) -> None:
    """End the exchanges of this process as it ends, and leave the process group if `find_world` has joined it.

    A thread of gloo may still hold the tensors of the last exchange, whose release needs the interpreter. If the
    interpreter ended meanwhile, that thread would abort the process, with an exit code that ``torchrun`` takes for a
    failure. So the thread gets time first.
    """
    time.sleep(_SETTLING)
    _groups.clear()
    if own and dist.is_initialized():
        dist.destroy_process_group()
