# pyright: reportPrivateUsage=false
# torch has no public way to the tables of a module without running properties of the user's.
"""The state of modules and optimizers that no ``state_dict`` holds, recorded by name.

================= =====================================================================================================
kind              state
================= =====================================================================================================
``requires_grad`` whether each parameter is trained
``mode``          whether each module is in train mode, without the mode that a phase has set
``attribute``     tensors and plain values in the attributes of modules, such as the ``p`` of a dropout, of optimizers,
                  of a loss function that is no module, and of the objects in attributes, such as a configuration
``buffer``        the buffers of each module that are registered with ``persistent=False``
``type``          the type of each module
``order``         the order of the parameters and modules in each module, which is the order of a `Sequential`
``hooks``         the hooks of modules, parameters and optimizers that take part in computing
================= =====================================================================================================

`find_owners` finds the modules, optimizers and objects that have such state, `record` records it, and `put` sets one
part of it. `recorded` gives the form in which a value is recorded, `same` compares two forms, and `restored` returns
the value.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Mapping, MutableMapping
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias
from weakref import ProxyTypes

import torch
from torch.optim import Optimizer

from flowtrain.errors import CheckpointError
from flowtrain.state.encoding import STORABLE

__all__ = [
    "ABSENT",
    "Key",
    "NotRecorded",
    "Object",
    "find_owners",
    "frozensets",
    "key_text",
    "put",
    "record",
    "recorded",
    "restored",
    "same",
    "with_frozensets",
    "without_compiled",
]

Key: TypeAlias = tuple[str, str, str]
"""The kind of the state, the name of its owner, such as ``model.0``, and the name of the state within the owner.

The last name is empty for kinds of which an owner has one, such as its mode.
"""

ABSENT: Any = object()
"""Stands for a value that the owner does not have."""

_MODULE = frozenset(vars(torch.nn.Module())) | {"_compiled_call_impl"}
_OPTIMIZER = frozenset({"state", "param_groups", "found_inf", "grad_scale"})
_PARAMETER_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", *_PARAMETER_HOOKS,
    "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks",
)  # fmt: skip


def key_text(key: Key) -> str:
    """Return the name of the state for messages: the owner's, then its own, as in ``model.0.p``."""
    return f"{key[1]}.{key[2]}" if key[2] else key[1]


def without_compiled(name: str) -> str:
    """Return the name that a parameter or module has if no part of the model is compiled."""
    if "_orig_mod" not in name:  # nearly always, and a checkpoint asks for the name of every parameter
        return name
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


# --- owners


def find_owners(modules: Mapping[str, torch.nn.Module], objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return, by name, every module, optimizer and plain object whose attributes are recorded.

    The wrapper that `torch.compile` puts around a module is left out. Of each owner that is no optimizer the objects in
    its attributes are owners too, but not the objects in the attributes of those, which may belong to anything.

    Args:
        modules: The models, and the loss function if it is a module.
        objects: The optimizers, and the loss function if it is no module.
    """
    found = {**_modules_in(modules), **objects}
    seen = {id(each) for each in found.values()}
    for owner, each in list(found.items()):
        for name, part in () if isinstance(each, Optimizer) else _attributes(each).items():
            if id(part) not in seen and name not in _MODULE and _is_object(part):
                seen.add(id(part))
                inside = {f"{owner}.{name}": part}
                found.update(_modules_in(inside) if isinstance(part, torch.nn.Module) else inside)
    return found


def _modules_in(roots: Mapping[str, Any]) -> dict[str, Any]:
    return {
        without_compiled(f"{root}.{name}" if name else root): inner
        for root, module in roots.items()
        if isinstance(module, torch.nn.Module)
        for name, inner in module.named_modules()
        if "_orig_mod" not in inner._modules
    }


def _attributes(owner: Any) -> MutableMapping[str, Any]:
    """Return the attributes of an object by name, to be read and changed; of a partial function its keywords."""
    return owner.keywords if isinstance(owner, partial) else getattr(owner, "__dict__", {})


def _is_object(value: Any) -> bool:
    """Tell whether a value is an object with attributes of its own; classes and Python modules are shared by others."""
    if type(value) in ProxyTypes or not hasattr(value, "__dict__"):
        return False  # the object behind a weak reference, such as the parent module, belongs to another owner
    return not isinstance(value, (type, ModuleType, torch.Tensor, Optimizer))


# --- reading and setting


def record(owners: Mapping[str, Any], modes: Mapping[torch.nn.Module, bool]) -> dict[Key, Any]:
    """Return all state of the owners, each value in the form that `recorded` gives.

    Args:
        owners: The result of `find_owners`.
        modes: The modes that modules have without the mode of the phase; other modules have their present mode.
    """
    found: dict[Key, Any] = {}
    for owner, each in owners.items():
        if isinstance(each, (torch.nn.Module, Optimizer)):
            _add_hooks(found, owner, "", each)
        if not isinstance(each, torch.nn.Module):
            for name, value in _attributes(each).items():
                if not isinstance(each, Optimizer) or name not in _OPTIMIZER:
                    now = recorded(value)
                    # Of objects inside an object only those of the loss function count: they take part in computing.
                    found["attribute", owner, name] = (
                        NotRecorded() if isinstance(now, Object) and owner != "lossfn" else now
                    )
            continue
        found["type", owner, ""] = type(each).__name__
        found["order", owner, ""] = (*each._parameters, *each._modules)
        found["mode", owner, ""] = modes.get(each, each.training)
        for name, value in vars(each).items():
            if name not in _MODULE:
                found["attribute", owner, name] = recorded(value)
        for name in sorted(each._non_persistent_buffers_set & each._buffers.keys()):
            found["buffer", owner, name] = recorded(each._buffers[name])
        for name, param in each._parameters.items():
            if param is not None:
                found["requires_grad", owner, name] = param.requires_grad
                _add_hooks(found, owner, name, param, _PARAMETER_HOOKS)
    return found


def _add_hooks(found: dict[Key, Any], owner: str, name: str, each: Any, kinds: tuple[str, ...] = _HOOKS) -> None:
    hooks = [
        f"{kind.strip('_').removesuffix('s')} {getattr(hook, '__qualname__', type(hook).__qualname__)}"
        for kind in kinds
        for hook in (getattr(each, kind, None) or {}).values()
    ]
    if hooks:
        found["hooks", owner, name] = hooks


def put(owner: Any, kind: str, name: str, value: Any) -> None:
    """Set one part of the state of an owner; `ABSENT` removes it.

    Args:
        owner: The module, optimizer or object.
        kind: Any kind but ``type`` and ``hooks``, which cannot be set.
        name: The name of the state within the owner.
        value: The value itself, not its recorded form.
    """
    if kind == "mode":
        owner.training = value
    elif kind == "requires_grad":
        if owner._parameters.get(name) is not None and value is not ABSENT:
            owner._parameters[name].requires_grad_(value)
    elif kind == "buffer" and value is ABSENT:
        owner._buffers.pop(name, None)
        owner._non_persistent_buffers_set.discard(name)
    elif kind == "buffer":
        owner._buffers[name] = value
        owner._non_persistent_buffers_set.add(name)
    elif kind == "order":
        for part in (owner._parameters, owner._modules):
            ordered = {each: part.pop(each) for each in value if each in part}
            part.update(ordered)
    elif value is ABSENT:
        _attributes(owner).pop(name, None)
    else:
        _attributes(owner)[name] = value  # without __setattr__, which would register a tensor or a module


# --- values


class _Tensor:
    """A tensor, with a checksum of its elements: torch counts no change that is made through ``.data`` or numpy.

    A special tensor, such as a sparse one, has the number of its changes instead.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.content = _checksum(tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tensor) and self.tensor is other.tensor and self.content == other.content

    __hash__ = None  # type: ignore[assignment]  # two equal objects may differ later


def _checksum(tensor: torch.Tensor) -> int:
    special = tensor.is_quantized or tensor.is_meta or tensor.is_nested
    if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or special:
        return -1 if tensor.is_inference() else tensor._version
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    if not plain.nbytes:
        return 0
    memory: Any = (ctypes.c_char * plain.nbytes).from_address(plain.data_ptr())
    return zlib.crc32(memory)


class Object:
    """The recorded form of an object that is neither a tensor nor a plain value: the object itself."""

    def __init__(self, value: Any) -> None:
        self.value = value


class NotRecorded:
    """Stands for a value that is not recorded: a tensor with a graph, or a parameter."""


class _Unfit(Exception):
    """A part of a value is neither a tensor nor plain, so the whole value becomes an `Object` or `NotRecorded`."""


def recorded(value: Any) -> Any:
    """Return the form in which a value is recorded: containers are copied, and tensors get a checksum.

    So `same` can tell later whether the value has changed, and `restored` returns it.
    """
    try:
        return _recorded(value)
    except _Unfit as reason:
        return reason.args[0](value) if reason.args[0] is Object else NotRecorded()


def _recorded(value: Any, around: tuple[int, ...] = ()) -> Any:
    """Return the form of a value; `around` has the ids of the containers that the value is in."""
    kind = type(value)
    if kind in STORABLE:
        return value
    if isinstance(value, (torch.nn.Parameter, torch.nn.Module)):
        raise _Unfit(NotRecorded)
    if isinstance(value, torch.Tensor):
        if value.grad_fn is not None:
            raise _Unfit(NotRecorded)
        return _Tensor(value)
    if id(value) in around:  # a container that holds itself has no copy in plain values
        raise _Unfit(Object)
    around = (*around, id(value))
    if kind in (list, tuple, torch.Size):
        return kind([_recorded(each, around) for each in value])
    if kind is dict and all(type(key) in STORABLE for key in value):
        return {key: _recorded(each, around) for key, each in value.items()}
    if kind in (set, frozenset) and all(type(each) in STORABLE for each in value):
        return kind(value)
    if hasattr(value, "dtype") and getattr(value, "shape", None) == () and hasattr(value, "item"):
        return _recorded(value.item())  # a scalar of numpy
    raise _Unfit(Object)


def restored(form: Any, path: str) -> Any:
    """Return the value of a recorded form, in new containers.

    Args:
        form: A result of `recorded`.
        path: The name of the state, for the message.

    Raises:
        CheckpointError: The value has a tensor that was changed in place since it was recorded.
    """
    if isinstance(form, Object):
        return form.value
    if isinstance(form, _Tensor):
        if form != _Tensor(form.tensor):
            raise CheckpointError(
                f"{path} was changed in place since training began, and the checkpoint, taken without the "
                f"change, does not hold its earlier value. Build the learner anew, then load."
            )
        return form.tensor
    if isinstance(form, (list, tuple)):
        return type(form)([restored(each, path) for each in form])
    if isinstance(form, dict):
        return {name: restored(each, path) for name, each in form.items()}
    return set(form) if type(form) is set else form


def same(one: Any, other: Any) -> bool:
    """Tell whether two recorded forms are of the same value, with the same types in the same containers.

    Objects without an ``__eq__`` of their own are the same only if they are identical.
    """
    if one is other:
        return True
    if isinstance(one, Object) and isinstance(other, Object):
        try:
            return one.value is other.value or bool(one.value == other.value)
        except Exception:  # an array compares item by item, and so has no single truth value
            return False
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return same([*one.items()], [*other.items()])
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (set, frozenset)):
        return {(type(each), each) for each in one} == {(type(each), each) for each in other}
    return repr(one) == repr(other) if isinstance(one, (float, complex)) else bool(one == other)  # repr: NaN, and -0.0


def frozensets(value: Any) -> Any:
    """Return where a value has frozensets, which are sets in a checkpoint; `with_frozensets` makes them again.

    Returns:
        True for a frozenset; for a container a dict of these results by place, of the parts that have frozensets.
    """
    if type(value) is frozenset:
        return True
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {place: found for place, each in inner if (found := frozensets(each))}


def with_frozensets(value: Any, found: Any) -> Any:
    """Return a value with frozensets for its sets in the places that `frozensets` has found."""
    if not found:
        return value
    if isinstance(value, dict):
        return {place: with_frozensets(each, found.get(place)) for place, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([with_frozensets(each, found.get(place)) for place, each in enumerate(value)])
    return frozenset(value)
