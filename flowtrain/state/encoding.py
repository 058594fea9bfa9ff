"""Packed state: the values that a checkpoint may hold, and the entries of ``cbstate`` as such values.

A checkpoint holds tensors and plain values, so ``torch.load(weights_only=True)`` reads it without running any code.
`Packer` copies such values, tensors to the CPU. Its error for any other value names the object that gave the value.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from flowtrain.callback.phases import Phase
from flowtrain.data.nested import like
from flowtrain.errors import CheckpointError
from flowtrain.state.shards import Pieces, is_sharded, own_pieces

__all__ = ["SAME", "SHARDED", "STORABLE", "Buffers", "Packer", "in_types_of", "phase_of", "unpack"]

STORABLE = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype})
"""The types of plain values that are no containers. Values of subclasses are not plain: a file loses the subclass."""


SAME = "the tensor of the main rank"
"""Stands, as the only key of a mapping, for a tensor that the main rank has at the same place."""

SHARDED = "the number of a sharded tensor"
"""A key of a mapping that stands for a sharded tensor, whose pieces are in the files of all ranks."""


_LARGE = 1 << 16
"""The bytes from which a tensor is copied into a buffer. The system reuses the memory of smaller ones by itself."""


class Buffers:
    """The memory of the checkpoint before, once it has been written: the next one is copied into it.

    Memory that is new has to be given by the system page by page, which takes several times as long as the copy.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
        self._used: list[torch.Tensor] = []

    def begin(self) -> None:
        """Begin a checkpoint. The one before has been written."""
        self._free = {}
        for buffer in self._used:
            self._free.setdefault((buffer.shape, buffer.dtype), []).append(buffer)
        self._used = []

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy on the CPU of a tensor without a graph."""
        if not _is_plain(tensor) or tensor.nbytes < _LARGE:
            return tensor.to("cpu", copy=True)
        free = self._free.get((tensor.shape, tensor.dtype))
        buffer = free.pop() if free else torch.empty(tensor.shape, dtype=tensor.dtype)
        self._used.append(buffer)
        return buffer.copy_(tensor)

    def clear(self) -> None:
        """Release the memory."""
        self._free, self._used = {}, []


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor consists of elements one after another, so that shape and dtype tell how to copy it."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return False
    return not tensor.is_nested and not tensor.is_quantized and tensor.is_contiguous()


class Packer:
    """Copies values for one checkpoint. Tensors that share their memory share it in the copy too.

    Args:
        pieces: A list, to which the pieces of each sharded tensor are added that this rank has; the copy has a mapping
            with the key `SHARDED` instead of the tensor. All ranks copy the same values in the same order, so a tensor
            has the same number on all of them. Without a list sharded tensors stay sharded, on their device.
        buffers: Memory for the copies of large tensors; new memory by default.
    """

    def __init__(self, pieces: list[Any] | None = None, buffers: Buffers | None = None) -> None:
        self.pieces = pieces
        self.buffers = Buffers() if buffers is None else buffers
        # By address, the tensors in that memory, each with its clone: if it were freed, the next one could get its
        # address. The view tells them apart, and is asked for only if there are several, because that takes time.
        self._clones: dict[Any, dict[Any, tuple[torch.Tensor, torch.Tensor]]] = {}
        self._around: list[int] = []  # the ids of the containers that are being copied, from the outside inwards

    def copy(self, value: Any, owner: str, path: str = "") -> Any:
        """Return a copy that nobody else holds.

        Args:
            value: Tensors and plain values, in dicts, lists, tuples and sets.
            owner: The source of the whole value, for the message: ``"EarlyStopping.state_dict()"``.
            path: The place of this value in the whole value, for the message: ``["best"]``.

        Raises:
            CheckpointError: The value has a part that is neither a tensor nor plain, a tensor without values, or a
                container that holds itself.
        """
        kind = type(value)
        if kind in STORABLE:
            return value
        if isinstance(value, torch.Tensor):
            return self._sharded(value) if is_sharded(value) else self._clone(value, owner, path)
        if isinstance(value, Pieces):
            return value
        with self._inside(value, owner, path):
            return self._container(value, owner, path)

    @contextmanager
    def _inside(self, value: Any, owner: str, path: str) -> Generator[None]:
        """Give a context in which the parts of a container are copied.

        Raises:
            CheckpointError: The container is one of its own parts, or a part of these.
        """
        if id(value) in self._around:
            raise _refuse(value, owner, f"{path} holds itself, and")
        self._around.append(id(value))
        try:
            yield
        finally:
            self._around.pop()

    def _container(self, value: Any, owner: str, path: str) -> Any:
        """Return the copy of a container, or of a scalar of numpy."""
        kind = type(value)
        if isinstance(value, Mapping):
            for key in value:
                if type(key) not in STORABLE:
                    raise _refuse(key, owner, f"the key {key!r:.60}" + (f" of {path}" if path else ""))
            return {key: self.copy(item, owner, f"{path}[{key!r}]") for key, item in value.items()}
        if kind is list:
            return [self.copy(item, owner, f"{path}[{place}]") for place, item in enumerate(value)]
        if kind in (tuple, torch.Size):
            return kind([self.copy(item, owner, f"{path}[{place}]") for place, item in enumerate(value)])
        if kind in (set, frozenset) and all(type(item) in STORABLE for item in value):
            return set(value)
        if hasattr(value, "dtype") and getattr(value, "shape", None) == () and hasattr(value, "item"):
            number = value.item()
            if type(number) is not kind:  # the item of a long double of NumPy is a long double again
                return self.copy(number, owner, path)
        raise _refuse(value, owner, path or "itself")

    def _sharded(self, tensor: torch.Tensor) -> Any:
        """Return the copy of a sharded tensor; the class describes it."""
        if self.pieces is None:
            return tensor.detach().clone()
        self.pieces.append(own_pieces(tensor))
        return {SHARDED: len(self.pieces) - 1, "shape": [*tensor.shape], "dtype": tensor.dtype}

    def _clone(self, tensor: torch.Tensor, owner: str, path: str) -> torch.Tensor:
        """Return the copy of a tensor. Two objects that show the same elements, such as tied weights, have one copy."""
        plain = _plain(tensor, owner, path)
        place = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
        known = self._clones.setdefault(place or (id(tensor),), {})
        if not known:
            known[None] = tensor, self.buffers.copy(plain)
            return known[None][1]
        if not place:  # the same tensor: it is held, so no other one has its id
            return known[None][1]
        if None in known:
            only = known.pop(None)
            known[_view(only[0])] = only
        key = _view(tensor)
        if key not in known:
            known[key] = tensor, self.buffers.copy(plain)
        return known[key][1]

    def pack(self, value: Any, path: str) -> Any:
        """Return an entry of ``cbstate`` as a dict of one item, from its kind to its content in plain values.

        The kind is ``__kind__`` of a container (`flowtrain.state.container`), ``"object"`` for an object with a
        ``state_dict``, or ``"value"`` for a plain value. `unpack` restores the content.

        Args:
            value: The entry.
            path: The path of the entry, for the message: ``"cbstate.metrics"``.

        Raises:
            CheckpointError: The entry has a part that is neither plain, nor such a container, nor has a ``state_dict``.
        """
        kind = getattr(type(value), "__kind__", None)
        if kind is not None:
            with self._inside(value, path, "it"):
                return {kind: value.__packed__(self, path)}
        if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            return {"object": self.copy(value.state_dict(), f"{path}.state_dict()")}
        return {"value": self.copy(value, path)}


def _view(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what tells which elements of its memory a tensor shows, and how."""
    shown = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.dtype, *shown)


def _plain(tensor: torch.Tensor, owner: str, path: str) -> torch.Tensor:
    """Return a tensor without its graph and as a plain `torch.Tensor`, since a file with a subclass cannot be read.

    Raises:
        CheckpointError: The tensor has no values, or its class computes them (``__torch_dispatch__``).
    """
    if _computes(type(tensor)):
        why = ", which torch.load(weights_only=True) cannot read. Return plain tensors that it can be made from"
    elif tensor.is_meta:
        why = " on the device 'meta', without values. Give it values first: module.to_empty(device='cpu')"
    else:
        plain = tensor.detach()
        return plain if type(plain) is torch.Tensor else plain.as_subclass(torch.Tensor)
    raise CheckpointError(f"{owner} cannot be in a checkpoint: {path or 'itself'} is a {type(tensor).__name__}{why}.")


def _computes(kind: Any) -> bool:
    """Tell whether a class of tensors computes its elements, so that they are in no memory of its own."""
    plain: Any = torch.Tensor
    return kind.__torch_dispatch__ is not plain.__torch_dispatch__


def _refuse(value: Any, owner: str, path: str) -> CheckpointError:
    return CheckpointError(
        f"{owner} cannot be in a checkpoint: {path} is {value!r:.80} ({type(value).__name__}). A checkpoint holds "
        f"tensors and plain values (None, bool, int, float, str, bytes; dict, list, tuple and set of them), so that "
        f"torch.load(weights_only=True) can read it. Return such values instead: float(x), repr(x), "
        f"torch.as_tensor(x), or a dict of its parts."
    )


def unpack(value: Any, kind: str, content: Any, phases: Mapping[str, Phase]) -> bool:
    """Fill a container from packed content; return ``False`` if `value` cannot be filled and must be replaced.

    Args:
        value: The present value. A container of this kind, or an object with ``load_state_dict``, can be filled.
        kind: The kind of the content, from `Packer.pack`.
        content: The content. The filled container may keep parts of it.
        phases: The phases that the learner has data for, by name.
    """
    if kind == getattr(type(value), "__kind__", None):
        value.__fill__(content, phases)
    elif kind == "object" and hasattr(value, "load_state_dict"):
        value.load_state_dict(content)
    else:
        return False
    return True


def in_types_of(value: Any, content: Any) -> Any:
    """Return plain content in containers, and tensors, of the types that `value` has.

    A checkpoint holds a ``defaultdict`` as a dict, a frozenset as a set, and a tensor of a subclass as a plain one. An
    entry that ``setup`` has made as a ``defaultdict`` becomes a ``defaultdict`` again, and so do the containers in it.

    Args:
        value: The present value.
        content: The content that replaces it. The result may keep parts of it.
    """
    if type(content) is dict and isinstance(value, (dict, UserDict)):
        known = value.data if isinstance(value, UserDict) else value
        items = [in_types_of(dict.get(known, key), item) for key, item in content.items()]
        made = like(known, items, content)
        return like(value, [], data=made) if isinstance(value, UserDict) else made
    if type(content) is torch.Tensor and isinstance(value, torch.Tensor):
        kind = type(value.detach())  # a parameter becomes a plain tensor
        return content if _computes(kind) else content.as_subclass(kind)
    if type(content) is set and isinstance(value, frozenset):
        return like(value, list(content))
    return torch.Size(content) if type(content) is tuple and type(value) is torch.Size else content


def phase_of(name: str, phases: Mapping[str, Phase]) -> Phase:
    """Return the phase of a name: one of `phases`, or of all classes of that name the one that was defined last.

    Args:
        name: The name of the phase, which is that of its class.
        phases: The phases that the learner has data for, by name.

    Raises:
        CheckpointError: No phase has that name.
    """
    if name in phases:
        return phases[name]
    kinds: list[type[Phase]] = [Phase]
    for kind in kinds:
        kinds += kind.__subclasses__()
    # A cell of a notebook that ran twice has left two classes, and the newer one is meant.
    found = [kind for kind in kinds if kind.__name__ == name]
    if found:
        return found[-1]()
    raise CheckpointError(
        f"The checkpoint has state of the phase {name}, and no phase of that name is defined. Import the module that "
        f"defines class {name} before loading; if the class was renamed, give it its old name."
    )
