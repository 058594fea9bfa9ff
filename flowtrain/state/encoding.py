"""Plain copies: the values that a checkpoint may hold, and the entries of ``cbstate`` as such values.

A checkpoint holds tensors and plain values, so ``torch.load(weights_only=True)`` reads it without running any code.
`Stage` copies such values, tensors to the CPU, and refuses everything else by the name of who brought it.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping
from typing import Any

import torch

from flowtrain.callback.nested import like
from flowtrain.callback.phases import Phase
from flowtrain.errors import CheckpointError

__all__ = ["LeftOver", "Object", "Stage", "kept", "live", "phase_of", "refill", "same", "typed"]

_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype})
"""The types of plain values beside the containers of them; no subclasses, which a file does not bring back."""


class Stage:
    """Copies values for one checkpoint. Tensors that share their memory share it in the copy too."""

    def __init__(self) -> None:
        self._clones: dict[tuple[Any, ...], torch.Tensor] = {}

    def copy(self, value: Any, owner: str, path: str = "") -> Any:
        """Return a copy that nobody else holds.

        Args:
            value: Tensors and plain values, in dicts, lists, tuples and sets.
            owner: Whose it is, for the message: ``"EarlyStopping.state_dict()"``.
            path: Where in it, for the message: ``["best"]``.

        Raises:
            CheckpointError: There is something else in it.
        """
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            return self._clone(value)
        if isinstance(value, Mapping):
            for key in value:
                if type(key) not in _PLAIN:
                    raise _refuse(key, owner, f"the key {key!r:.60}" + (f" of {path}" if path else ""))
            return {key: self.copy(item, owner, f"{path}[{key!r}]") for key, item in value.items()}
        if kind is list:
            return [self.copy(item, owner, f"{path}[{place}]") for place, item in enumerate(value)]
        if kind in (tuple, torch.Size):
            return tuple(self.copy(item, owner, f"{path}[{place}]") for place, item in enumerate(value))
        if kind in (set, frozenset) and all(type(item) in _PLAIN for item in value):
            return set(value)
        if hasattr(value, "dtype") and getattr(value, "shape", None) == () and hasattr(value, "item"):
            return self.copy(value.item(), owner, path)  # a number of numpy's
        raise _refuse(value, owner, path or "itself")

    def _clone(self, tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
        key: tuple[Any, ...] = (id(tensor),)
        if place:
            key = (place, tensor.device, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self._clones:
            self._clones[key] = tensor.detach().to("cpu", copy=True)
        return self._clones[key]

    def pack(self, value: Any, path: str) -> Any:
        """Return an entry of ``cbstate`` as plain values that `refill` takes back, marked with their kind.

        The kind is that of a container (`flowtrain.state.container`), ``"object"`` for one with a ``state_dict``, or
        ``"value"`` for the plain value itself.

        Raises:
            CheckpointError: It holds something that is neither plain, nor a container of the learner's, nor has a
                ``state_dict``.
        """
        kind = getattr(type(value), "__kind__", None)
        if kind is not None:
            return {kind: value.__packed__(self, path)}
        if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            return {"object": self.copy(value.state_dict(), f"{path}.state_dict()")}
        return {"value": self.copy(value, path)}


def _refuse(value: Any, owner: str, path: str) -> CheckpointError:
    return CheckpointError(
        f"{owner} cannot be in a checkpoint: {path} is {value!r:.80} ({type(value).__name__}). A checkpoint holds "
        f"tensors and plain values (None, bool, int, float, str, bytes; dict, list, tuple and set of them), so that "
        f"torch.load(weights_only=True) can read it. Return those in its place: float(x), repr(x), torch.as_tensor(x), "
        f"or a dict of what it is made of."
    )


def refill(value: Any, kind: str, content: Any, phases: Mapping[str, Phase]) -> bool:
    """Put packed content back in place; return ``False`` where only the content itself can take the place of `value`.

    Args:
        value: The value of now: a container of this kind, or an object with ``load_state_dict``, is filled.
        kind: How `Stage.pack` has marked the content.
        content: The content, which nobody else holds.
        phases: Phases by name, for those that the learner has data for.
    """
    if kind == getattr(type(value), "__kind__", None):
        value.__fill__(content, phases)
    elif kind == "object" and hasattr(value, "load_state_dict"):
        value.load_state_dict(content)
    else:
        return False
    return True


def typed(value: Any, content: Any) -> Any:
    """Return plain content in containers of the types that `value` has, which a checkpoint holds as dicts and sets.

    So an entry that ``setup`` has made as a ``defaultdict`` is one after loading too, and so are those inside of it.

    Args:
        value: The value of now.
        content: The content that takes its place, and nobody else holds.
    """
    if type(content) is dict and isinstance(value, (dict, UserDict)):
        known = value.data if isinstance(value, UserDict) else value
        items = [typed(dict.get(known, key), item) for key, item in content.items()]
        made = like(known, items, content)
        return like(value, [], data=made) if isinstance(value, UserDict) else made
    if type(content) is set and isinstance(value, frozenset):
        return like(value, list(content))
    return torch.Size(content) if type(content) is tuple and type(value) is torch.Size else content


def phase_of(name: str, phases: Mapping[str, Phase]) -> Phase:
    """Return the phase of a name: one of `phases`, or any that is defined.

    Raises:
        CheckpointError: No phase has that name.
    """
    if name in phases:
        return phases[name]
    found: list[type[Phase]] = [Phase]
    for kind in found:
        if kind.__name__ == name:
            return kind()
        found += kind.__subclasses__()
    raise CheckpointError(f"The checkpoint has state of the phase {name}, and no phase of that name is defined.")


# --- values that are remembered, to see later whether they have changed


class _Tensor:
    """A tensor, and how often it had been changed in place."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version = -1 if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tensor) and self.tensor is other.tensor and self.version == other.version

    __hash__ = None  # type: ignore[assignment]  # equal ones need not stay equal


class Object:
    """An object that is neither a tensor nor a plain value, as `kept` gives it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class LeftOver:
    """Of a tensor with a graph, which a forward pass has left behind, and of parameters, which the state holds."""


class _Unkept(Exception):
    """Something in a value is neither a tensor nor plain."""


def kept(value: Any) -> Any:
    """Return a value in a form that tells later whether it has changed, and in which nobody else changes anything."""
    try:
        return _keep(value)
    except _Unkept as reason:
        return reason.args[0](value) if reason.args[0] is Object else LeftOver()


def _keep(value: Any) -> Any:
    kind = type(value)
    if kind in _PLAIN:
        return value
    if isinstance(value, (torch.nn.Parameter, torch.nn.Module)):
        raise _Unkept(LeftOver)
    if isinstance(value, torch.Tensor):
        if value.grad_fn is not None:
            raise _Unkept(LeftOver)
        return _Tensor(value)
    if kind in (list, tuple, torch.Size):
        return [_keep(each) for each in value] if kind is list else tuple(_keep(each) for each in value)
    if kind is dict and all(type(key) in _PLAIN for key in value):
        return {key: _keep(each) for key, each in value.items()}
    if kind in (set, frozenset) and all(type(each) in _PLAIN for each in value):
        return kind(value)
    if hasattr(value, "dtype") and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _keep(value.item())  # a number of numpy's
    raise _Unkept(Object)


def live(kept: Any, path: str) -> Any:
    """Return the value that was kept, in containers of its own.

    Raises:
        CheckpointError: It is a tensor that was changed in place since.
    """
    if isinstance(kept, Object):
        return kept.value
    if isinstance(kept, _Tensor):
        if kept != _Tensor(kept.tensor):
            raise CheckpointError(
                f"{path} was changed in place since training began, and the checkpoint, in which it is as it "
                f"was then, does not hold it. Build the learner anew, then load."
            )
        return kept.tensor
    if isinstance(kept, (list, tuple)):
        return type(kept)(live(each, path) for each in kept)
    if isinstance(kept, dict):
        return {name: live(each, path) for name, each in kept.items()}
    return set(kept) if type(kept) is set else kept


def same(one: Any, other: Any) -> bool:
    """Tell whether two values are the same; objects that do not say so are if they are one."""
    if isinstance(one, Object) and isinstance(other, Object):
        try:
            return one.value is other.value or bool(one.value == other.value)
        except Exception:  # an array says it for each item
            return False
    return one is other or (type(one) is type(other) and bool(one == other))
