# pyright: reportPrivateUsage=false
# torch has no public way to the tables of a module without running properties of the user's.
"""Structure: what training can change about models, loss function and optimizers that no ``state_dict`` holds.

================= =====================================================================================================
kind              what it is
================= =====================================================================================================
``requires_grad`` of each parameter
``mode``          train or eval, of each module, as it is without what a phase has set
``attribute``     tensors and plain values in attributes of modules, such as the ``p`` of a dropout, of optimizers, and
                  of a loss function that is no module; and of the objects in attributes, such as a configuration
``buffer``        of each module those that are registered with ``persistent=False``
``type``          of each module
``order``         of the parameters and modules in each module, which is that of a ``Sequential``
``hooks``         those of modules, parameters and optimizers that take part in computing
================= =====================================================================================================

How all this was when training began is remembered (`Structure.begin`). A checkpoint holds what is different since.
Whoever goes on from it gets that, and of all else what his own learner began with: so a change of the script counts,
and a change in training is not lost. A module that training put in the place of another, and a hook, cannot be made of
a file; then the learner must have it.

The parameter groups of optimizers are held by the names of the parameters (`Structure.groups`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from types import ModuleType
from typing import Any
from weakref import ProxyTypes

import torch
from torch.optim import Optimizer

from flowtrain.callback.nested import leaves
from flowtrain.core.devices import place
from flowtrain.errors import CheckpointError
from flowtrain.state.encoding import LeftOver, Object, Stage, kept, live, same

__all__ = ["Structure"]

Key = tuple[str, str, str]
"""Kind, owner (``model.0``), and name, which is empty for what an owner has one of."""

_NOTHING: Any = object()
_MODULE = frozenset(vars(torch.nn.Module())) | {"_compiled_call_impl"}
_OPTIMIZER = frozenset({"state", "param_groups", "found_inf", "grad_scale"})
_HOOKS = (
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks", "_post_accumulate_grad_hooks",
    "_optimizer_step_pre_hooks", "_optimizer_step_post_hooks",
)  # fmt: skip


class Structure:
    """Knows what training has changed of one learner beside the states of its models and optimizers.

    Args:
        models: The models by name; a single one has the empty name.
        lossfn: The loss function.
        optimizers: The optimizers by name; a single one has the empty name.
        device: Where tensors go that were on a device.
        modes: Returns the modes of modules without what a phase has set, where one has.
    """

    def __init__(
        self,
        models: Mapping[str, torch.nn.Module],
        lossfn: Any,
        optimizers: Mapping[str, Optimizer],
        device: torch.device,
        modes: Callable[[], Mapping[torch.nn.Module, bool]],
    ) -> None:
        self._roots = {f"model.{name}" if name else "model": model for name, model in models.items()}
        self._objects: dict[str, Any] = {_called(name): optimizer for name, optimizer in optimizers.items()}
        if isinstance(lossfn, torch.nn.Module):
            self._roots["lossfn"] = lossfn
        else:
            self._objects["lossfn"] = lossfn
        self._optimizers, self._device, self._modes = optimizers, device, modes
        self._began: dict[Key, Any] | None = None
        self._owned: set[str] = set()
        self._groups: dict[str, list[list[str]]] = {}

    def begin(self) -> None:
        """Remember how everything is, the first time: training begins, or a checkpoint is to be loaded."""
        if self._began is None:
            self._began = self._look()
            self._owned = set(self._owners())
            self._groups = {name: self._named(name) for name in self._optimizers}

    # --- what is different

    def state_dict(self, stage: Stage, *, here: bool) -> dict[str, Any]:
        """Return what is different since training began, and what was frozen or in eval mode then.

        Args:
            stage: Copies values.
            here: It is put back in this process if something fails: objects may be in it that no file holds.

        Raises:
            CheckpointError: Training has replaced an object by one that cannot be in a checkpoint.
        """
        began = self._begun()
        now = self._look()
        new = {name for name, each in self._owners().items() if not isinstance(each, torch.nn.Module)} - self._owned
        changed = []
        for key in {**began, **now}:
            before, value = began.get(key, _NOTHING), now.get(key, _NOTHING)
            if isinstance(value, LeftOver) or same(before, value) or (key[0] == "attribute" and key[1] in new):
                continue
            if isinstance(value, Object) and not here:
                self._check_object(key, before, value.value)
                continue
            changed.append(self._entry(key, before, value, stage))
        return {
            "changed": changed,
            "frozen": [_dotted(key) for key, value in began.items() if key[0] == "requires_grad" and not value],
            "eval": [_dotted(key) for key, value in began.items() if key[0] == "mode" and not value],
        }

    def _entry(self, key: Key, before: Any, value: Any, stage: Stage) -> dict[str, Any]:
        entry: dict[str, Any] = dict(zip(("kind", "owner", "name"), key, strict=True))
        if key[0] == "hooks":
            now, then = (Counter(() if each is _NOTHING else each) for each in (value, before))
            return {**entry, "added": [*(now - then).elements()], "removed": [*(then - now).elements()]}
        if value is _NOTHING:
            return {**entry, "gone": True}
        if isinstance(value, Object):
            return {**entry, "object": value.value}
        found: Any = live(value, _dotted(key))
        on_device = any(isinstance(leaf, torch.Tensor) and not leaf.is_cpu for _, leaf in leaves(found))
        return {**entry, "value": stage.copy(found, _dotted(key)), "device": on_device}

    def _check_object(self, key: Key, before: Any, value: Any) -> None:
        """Refuse an object that training has put in the place of something; what it only left somewhere is left out."""
        module: Any = self._owners().get(key[1])
        own = getattr(type(module), "get_extra_state", torch.nn.Module.get_extra_state)
        if own is not torch.nn.Module.get_extra_state:
            return  # it says itself what its state is
        if before is _NOTHING and callable(getattr(type(module), key[2], None)):
            before = key[2]  # a method, which it covers
        if before is _NOTHING or before is None or isinstance(before, LeftOver):
            return
        more = f", or define get_extra_state() and set_extra_state() in {type(module).__name__}"
        more = more if isinstance(module, torch.nn.Module) else ""
        raise CheckpointError(
            f"{_dotted(key)} cannot be in a checkpoint: training has replaced it, by {value!r:.80} "
            f"({type(value).__name__}). What training changes in an attribute is held if it is a tensor or a plain "
            f"value (None, bool, int, float, str, bytes; dict, list, tuple and set of them). Keep such a value there, "
            f"and find the object by it{more}. An attribute that a forward pass only leaves something in begins as "
            f"None."
        )

    # --- what does not fit

    def differences(self, saved: Mapping[str, Any] | None) -> Iterator[str]:
        """Yield what tells the modules apart, by name and type, where training has changed them here or there."""
        began, now, changed = self._begun(), self._look(), _by_key(saved)
        for key in {**began, **now, **changed} if saved is not None else ():
            if key[0] != "type":
                continue
            there = changed[key].get("value", _NOTHING) if key in changed else began.get(key, _NOTHING)
            here = now.get(key, _NOTHING)
            if there != here:
                was = f"a {there}" if there is not _NOTHING else "nothing"
                yield f"it has {was} at {key[1]}, where training put it, the learner has " + (
                    f"a {here}" if here is not _NOTHING else "nothing there"
                )

    def built_otherwise(self, saved: Mapping[str, Any] | None) -> list[str]:
        """Return what was frozen, or in eval mode, when training began there, and not when it did here; or reverse."""
        found: list[str] = []
        for kind, listed, words in (
            ("requires_grad", "frozen", ("frozen", "trained")),
            ("mode", "eval", ("in eval mode", "in train mode")),
        ):
            there: set[str] = set(() if saved is None else saved[listed])
            for key, value in self._begun().items():
                name = _dotted(key)
                if saved is not None and key[0] == kind and value is (name in there):
                    found.append(f"{name} was {words[name not in there]} there and is {words[value]} here")
        return found

    def missing_hooks(self, saved: Mapping[str, Any] | None) -> list[str]:
        """Return the hooks that training had added, and are not here, or had removed, and are here."""
        now, found = self._look(), []
        for key, entry in _by_key(saved).items():
            if key[0] == "hooks":
                here = Counter(now.get(key, ()))
                where = f"{key[1]}.{key[2]}" if key[2] else key[1]
                found += [f"{each}, added to {where}" for each in (Counter(entry["added"]) - here)]
                found += [f"{each}, removed from {where}" for each in (Counter(entry["removed"]) & here)]
        return found

    # --- put back

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Take back what `state_dict` returned; what is not in it becomes as it was when training began here.

        Raises:
            CheckpointError: It cannot, because a tensor was changed in place since.
        """
        if saved is None:  # an older checkpoint knows nothing of it
            return
        began, now, changed = self._begun(), self._look(), _by_key(saved)
        owners = self._owners()
        for key in {**began, **now, **changed}:
            kind, owner, name = key
            if kind in ("type", "hooks") or owner not in owners:
                continue
            if key in changed:
                value = self._from(changed[key])
            elif (
                same(began.get(key, _NOTHING), now.get(key, _NOTHING))
                or isinstance(began.get(key), LeftOver)
                or (isinstance(now.get(key), LeftOver) and not isinstance(owners[owner], torch.nn.Module))
            ):
                continue
            elif key in began:
                value = live(began[key], _dotted(key))
            elif isinstance(now[key], (LeftOver, Object)):
                continue
            else:
                value = _NOTHING
            _put(owners[owner], kind, name, value)

    def _from(self, entry: Mapping[str, Any]) -> Any:
        if "object" in entry:
            return entry["object"]
        if "value" not in entry:
            return _NOTHING
        value = Stage().copy(entry["value"], "a checkpoint")  # what was read may be put back once more
        return place(value, self._device) if entry["device"] else value

    # --- parameter groups

    def _named(self, name: str) -> list[list[str]]:
        """Return the names of the parameters in each group of an optimizer; empty for one that is nobody's."""
        names = {id(param): name for name, param in self._params().items()}
        groups = self._optimizers[name].param_groups
        return [[names.get(id(param), "") for param in group["params"]] for group in groups]

    def _check_groups(self, name: str) -> None:
        """Check that every parameter of an optimizer has a name, and every one that it has state of a group.

        Raises:
            CheckpointError: A handler has left one behind.
        """
        optimizer = self._optimizers[name]
        names = {id(param): name for name, param in self._params().items()}
        grouped = {id(param) for group in optimizer.param_groups for param in group["params"]}
        for number, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if id(param) not in names:
                    raise CheckpointError(
                        f"{_called(name)} has, in group {number}, a parameter of shape {tuple(param.shape)} that is "
                        f"none of the model's or the loss function's any more, so it has no name in a checkpoint. "
                        f"Where a handler replaces a module, put the new parameters into the groups in place of the "
                        f"old ones, and take the state of these out of optimizer.state."
                    )
        for param in optimizer.state:
            # Optimizers of users keep what they like there.
            if isinstance(param, torch.Tensor) and id(param) not in grouped:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise CheckpointError(
                    f"{_called(name)} has state of {names.get(id(param), 'a parameter')}, of shape "
                    f"{tuple(param.shape)}, which is in none of its groups. Where a handler takes a parameter out of a "
                    f"group, call optimizer.state.pop(param, None)."
                )

    def other_groups(self, name: str, saved: Mapping[str, Any]) -> str:
        """Say how the groups that a checkpoint has of an optimizer are other than those it was built with here.

        Groups that training has made there are no such difference; the answer is empty then.
        """
        self.begin()
        here = self._groups[name]
        sizes = [len(group) for group in here]
        if "groups" not in saved:  # an older checkpoint knows numbers alone
            there = [len(group["params"]) for group in saved["state"]["param_groups"]]
            return "" if there == sizes else _sizes(name, there, sizes)
        now = saved["groups"]["now"]
        if here not in (saved["groups"]["built"], now):
            there = [len(group) for group in now]
            if there != sizes:
                return _sizes(name, there, sizes)
            pairs = [pair for groups in zip(now, here, strict=True) for pair in zip(*groups, strict=True)]
            one, other = next(pair for pair in pairs if pair[0] != pair[1])
            return f"{_it(name)} had {one} where the learner's has {other}"
        unknown = {param for group in now for param in group} - self._params().keys()
        return f"{_it(name)} had a parameter {min(unknown)}, which the learner has not" if unknown else ""

    def group_state(self, name: str) -> dict[str, Any]:
        """Return the groups of an optimizer, as it was built and as they are now, by names of parameters.

        Raises:
            CheckpointError: A handler has left parameters in the optimizer, or in its state, that are nobody's.
        """
        self._check_groups(name)
        self.begin()
        return {"built": self._groups[name], "now": self._named(name)}

    def arrange(self, name: str, saved: Mapping[str, Any]) -> None:
        """Put the parameters into the groups of a checkpoint; its `load_state_dict` does the rest."""
        wanted = saved["groups"]["now"] if "groups" in saved else self._groups[name]
        if self._named(name) != wanted:
            optimizer, params = self._optimizers[name], self._params()
            optimizer.param_groups[:] = [
                {**optimizer.defaults, "params": [params[each] for each in group]} for group in wanted
            ]

    # --- how things are

    def _begun(self) -> dict[Key, Any]:
        self.begin()
        assert self._began is not None
        return self._began

    def _params(self) -> dict[str, torch.nn.Parameter]:
        return {
            _clean(f"{root}.{name}"): param
            for root, module in self._roots.items()
            for name, param in module.named_parameters()
        }

    def _owners(self) -> dict[str, Any]:
        """Return what has any of it, by name: modules, without the shells of compiled ones, and objects.

        Objects are optimizers, a loss function that is no module, and what is in an attribute of that or of a module.
        What is in the attributes of such an object is not looked at: it may be anything.
        """
        found = {**_modules_in(self._roots), **self._objects}
        seen = {id(each) for each in found.values()}
        for owner, each in list(found.items()):
            for name, part in () if isinstance(each, Optimizer) else _attributes(each).items():
                if id(part) not in seen and name not in _MODULE and _is_object(part):
                    seen.add(id(part))
                    inside = {f"{owner}.{name}": part}
                    found.update(_modules_in(inside) if isinstance(part, torch.nn.Module) else inside)
        return found

    def _look(self) -> dict[Key, Any]:
        found: dict[Key, Any] = {}
        modes = self._modes()
        for owner, each in self._owners().items():
            if isinstance(each, (torch.nn.Module, Optimizer)):
                _add_hooks(found, owner, "", each)
            if not isinstance(each, torch.nn.Module):
                for name, value in _attributes(each).items():
                    if not isinstance(each, Optimizer) or name not in _OPTIMIZER:
                        remembered = kept(value)
                        its_own = isinstance(remembered, Object) and owner != "lossfn"
                        found["attribute", owner, name] = LeftOver() if its_own else remembered
                continue
            found["type", owner, ""] = type(each).__name__
            found["order", owner, ""] = (*each._parameters, *each._modules)
            found["mode", owner, ""] = modes.get(each, each.training)
            for name, value in vars(each).items():
                if name not in _MODULE:
                    found["attribute", owner, name] = kept(value)
            for name in sorted(each._non_persistent_buffers_set & each._buffers.keys()):
                found["buffer", owner, name] = kept(each._buffers[name])
            for name, param in each._parameters.items():
                if param is not None:
                    found["requires_grad", owner, name] = param.requires_grad
                    _add_hooks(found, owner, name, param)
        return found


def _modules_in(roots: Mapping[str, Any]) -> dict[str, Any]:
    return {
        _clean(f"{root}.{name}" if name else root): inner
        for root, module in roots.items()
        if isinstance(module, torch.nn.Module)
        for name, inner in module.named_modules()
        if "_orig_mod" not in inner._modules
    }


def _attributes(each: Any) -> MutableMapping[str, Any]:
    """Return the attributes of an object by name, to be read and written; of a partial function its keywords."""
    return each.keywords if isinstance(each, partial) else getattr(each, "__dict__", {})


def _is_object(value: Any) -> bool:
    """Tell whether a value may have attributes that training changes; classes and the like are shared by others."""
    if type(value) in ProxyTypes or not hasattr(value, "__dict__"):
        return False  # what a weak reference leads to is another's, as the module around
    return not isinstance(value, (type, ModuleType, torch.Tensor, Optimizer))


def _add_hooks(found: dict[Key, Any], owner: str, name: str, each: Any) -> None:
    hooks = [
        f"{kind.strip('_').removesuffix('s')} {getattr(hook, '__qualname__', type(hook).__qualname__)}"
        for kind in _HOOKS
        for hook in (getattr(each, kind, None) or {}).values()
    ]
    if hooks:
        found["hooks", owner, name] = hooks


def _put(owner: Any, kind: str, name: str, value: Any) -> None:
    if kind == "mode":
        owner.training = value
    elif kind == "requires_grad":
        if owner._parameters.get(name) is not None and value is not _NOTHING:
            owner._parameters[name].requires_grad_(value)
    elif kind == "buffer" and value is _NOTHING:
        owner._buffers.pop(name, None)
        owner._non_persistent_buffers_set.discard(name)
    elif kind == "buffer":
        owner._buffers[name] = value
        owner._non_persistent_buffers_set.add(name)
    elif kind == "order":
        for part in (owner._parameters, owner._modules):
            ordered = {each: part.pop(each) for each in value if each in part}
            part.update(ordered)
    elif value is _NOTHING:
        _attributes(owner).pop(name, None)
    else:
        _attributes(owner)[name] = value  # past a __setattr__ that would register it


def _called(name: str) -> str:
    return f"optimizer.{name}" if name else "optimizer"


def _it(name: str) -> str:
    return f"optimizer {name!r}" if name else "it"


def _sizes(name: str, there: list[int], here: list[int]) -> str:
    return f"{_it(name)} had groups of {there} parameters, the learner's has groups of {here}"


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _dotted(key: Key) -> str:
    return f"{key[1]}.{key[2]}" if key[2] else key[1]


def _by_key(saved: Mapping[str, Any] | None) -> dict[Key, Mapping[str, Any]]:
    return {(each["kind"], each["owner"], each["name"]): each for each in (saved or {}).get("changed", ())}
