"""The changes that training has made to modules and optimizers and that no ``state_dict`` holds.

`Changes.begin` records this state (`flowtrain.training.checkpoint.attributes`) when training begins. A checkpoint holds
only the differences since then. A learner that loads it gets these differences; everything else stays as its own script
built it. Replaced modules and hooks cannot be saved: the learner must already have them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from flowtrain.core.devices import to_device
from flowtrain.core.torch_core import TorchCore
from flowtrain.data.nested import leaves
from flowtrain.errors import CheckpointError
from flowtrain.state.encoding import Packer
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain.training.checkpoint.attributes import (
    ABSENT,
    Key,
    NotRecorded,
    Object,
    find_owners,
    frozensets,
    key_text,
    put,
    record,
    restored,
    same,
    with_frozensets,
)
from flowtrain.training.checkpoint.parameter_groups import ParameterGroups, optimizer_name

__all__ = ["Changes"]


class Changes:
    """Saves and restores the changes that training has made to the modules and optimizers of one learner.

    Args:
        state: The state of the learner.
        core: The core of the learner.

    Attributes:
        groups: The parameter groups of the optimizers.
    """

    def __init__(self, state: LearnerState, core: TorchCore) -> None:
        self._modules = {f"model.{name}" if name else "model": model for name, model in core.models.items()}
        if isinstance(state.lossfn, torch.nn.Module):
            self._modules["lossfn"] = state.lossfn
        self._state, self._core = state, core
        self._began: dict[Key, Any] | None = None
        self._owned: set[str] = set()
        self.use_optimizers()

    def use_optimizers(self) -> None:
        """Take the optimizers of the learner, whose present state counts as built by the script."""
        optimizers = by_name(self._state.optimizer)
        self._objects: dict[str, Any] = {optimizer_name(name): each for name, each in optimizers.items()}
        if not isinstance(self._state.lossfn, torch.nn.Module):
            self._objects["lossfn"] = self._state.lossfn
        self.groups = ParameterGroups(self._modules, optimizers)
        if self._began is not None:
            now = self._now()
            self._owned |= self._objects.keys()
            self._began = {key: value for key, value in self._began.items() if not _of_optimizer(key)}
            self._began |= {key: value for key, value in now.items() if _of_optimizer(key)}
            self.groups.begin()

    def begin(self) -> None:
        """Record the state that training begins with. A later call has no effect."""
        if self._began is None:
            self._began = self._now()
            self._owned = set(self._owners())
            self.groups.begin()

    def _beginning(self) -> dict[Key, Any]:
        self.begin()
        assert self._began is not None
        return self._began

    def _owners(self) -> dict[str, Any]:
        return find_owners(self._modules, self._objects)

    def _now(self, owners: Mapping[str, Any] | None = None) -> dict[Key, Any]:
        modes = self._core.modes.own() if self._core.modes is not None else {}
        return record(self._owners() if owners is None else owners, modes)

    # --- save

    def state_dict(self, packer: Packer, *, here: bool) -> dict[str, Any]:
        """Return the differences since training began, and the names that were frozen or in eval mode then.

        Args:
            packer: Copies the values.
            here: Whether the state is only for undoing a failed load in this process, so that it may hold unpicklable
                objects.

        Raises:
            CheckpointError: Training has replaced an object by another one, which no checkpoint can hold.
        """
        began, owners = self._beginning(), self._owners()
        now = self._now(owners)
        new = {name for name, each in owners.items() if not isinstance(each, torch.nn.Module)} - self._owned
        changed: list[dict[str, Any]] = []
        for key in {**began, **now}:
            before, value = began.get(key, ABSENT), now.get(key, ABSENT)
            if isinstance(value, NotRecorded) or same(before, value) or (key[0] == "attribute" and key[1] in new):
                continue
            if isinstance(value, Object) and not here:
                self._check_object(key, before, value.value)
                continue
            changed.append(self._entry(key, before, value, packer))
        return {
            "changed": changed,
            "frozen": [key_text(key) for key, value in began.items() if key[0] == "requires_grad" and not value],
            "eval": [key_text(key) for key, value in began.items() if key[0] == "mode" and not value],
        }

    def _entry(self, key: Key, before: Any, value: Any, packer: Packer) -> dict[str, Any]:
        entry: dict[str, Any] = dict(zip(("kind", "owner", "name"), key, strict=True))
        if key[0] == "hooks":
            now, then = (Counter(() if each is ABSENT else each) for each in (value, before))
            return {**entry, "added": [*(now - then).elements()], "removed": [*(then - now).elements()]}
        if value is ABSENT:
            return {**entry, "gone": True}
        if isinstance(value, Object):
            return {**entry, "object": value.value}
        found: Any = restored(value, key_text(key))
        on_device = any(isinstance(leaf, torch.Tensor) and not leaf.is_cpu for _, leaf in leaves(found))
        plain = packer.copy(found, key_text(key))
        return {**entry, "value": plain, "frozensets": frozensets(found), "device": on_device}

    def _check_object(self, key: Key, before: Any, value: Any) -> None:
        """Refuse an object that replaces an earlier value. An object in a new or empty attribute is not saved."""
        module: Any = self._owners().get(key[1])
        own = getattr(type(module), "get_extra_state", torch.nn.Module.get_extra_state)
        if own is not torch.nn.Module.get_extra_state:
            return  # the extra state of the module has the value, if the module needs it
        if before is ABSENT and callable(getattr(type(module), key[2], None)):
            before = key[2]  # the object replaces the method of that name
        if before is ABSENT or before is None or isinstance(before, NotRecorded):
            return
        more = f", or define get_extra_state() and set_extra_state() in {type(module).__name__}"
        more = more if isinstance(module, torch.nn.Module) else ""
        raise CheckpointError(
            f"{key_text(key)} cannot be in a checkpoint: training has replaced it by {value!r:.80} "
            f"({type(value).__name__}). A checkpoint holds changed attributes that are tensors or plain values (None, "
            f"bool, int, float, str, bytes; dict, list, tuple and set of them). Keep a plain value in the attribute "
            f"and build the object from it{more}. If a forward pass only caches a value there, set the attribute to "
            f"None in __init__."
        )

    # --- compare

    def differences(self, saved: Mapping[str, Any] | None) -> Iterator[str]:
        """Describe each module that has another type in the checkpoint than here.

        Args:
            saved: The result of `state_dict` in the checkpoint; ``None`` for an early checkpoint, which has none.
        """
        began, now, changed = self._beginning(), self._now(), _by_key(saved)
        for key in {**began, **now, **changed} if saved is not None else ():
            if key[0] != "type":
                continue
            # A type that the checkpoint does not list was not changed in training, so it is the one that began.
            there = changed[key].get("value", ABSENT) if key in changed else began.get(key, ABSENT)
            here = now.get(key, ABSENT)
            if there != here:
                was = f"a {there}" if there is not ABSENT else "nothing"
                yield f"training left {was} at {key[1]}, and the learner has " + (
                    f"a {here} there" if here is not ABSENT else "nothing there"
                )

    def warn_of_others(self, saved: Mapping[str, Any] | None, stacklevel: int) -> None:
        """Warn if the learner of a checkpoint was built differently; `_built_otherwise` describes `saved`."""
        otherwise = self._built_otherwise(saved)
        if otherwise:
            more = f", and {len(otherwise) - 3} more" if len(otherwise) > 3 else ""
            warnings.warn(
                f"The learner of the checkpoint was built differently: {', '.join(otherwise[:3])}{more}. The fit "
                f"continues with this learner. For the same result build it as the other one was built.",
                UserWarning,
                stacklevel=stacklevel + 1,
            )

    def _built_otherwise(self, saved: Mapping[str, Any] | None) -> list[str]:
        """Return the names that were frozen or in eval mode at the start of the saved run and not of this one.

        Names for which it is the other way round are returned too, each in a text that says how it was and is.

        Args:
            saved: The result of `state_dict` in the checkpoint; ``None`` for an early checkpoint, which has none.
        """
        found: list[str] = []
        for kind, listed, words in (
            ("requires_grad", "frozen", ("frozen", "trained")),
            ("mode", "eval", ("in eval mode", "in train mode")),
        ):
            there: set[str] = set(() if saved is None else saved[listed])
            for key, value in self._beginning().items():
                name = key_text(key)
                if saved is not None and key[0] == kind and value is (name in there):
                    found.append(f"{name} was {words[name not in there]} there and is {words[value]} here")
        return found

    def check_hooks(self, saved: Mapping[str, Any] | None) -> None:
        """Check that the hooks that training had added are here, and those that it had removed are not.

        Args:
            saved: The result of `state_dict` in the checkpoint; ``None`` for an early checkpoint, which has none.

        Raises:
            CheckpointError: A hook is missing, or is here again.
        """
        now, found = self._now(), list[str]()
        for key, entry in _by_key(saved).items():
            if key[0] == "hooks":
                here = Counter(now.get(key, ()))
                found += [f"{each}, added to {key_text(key)}" for each in (Counter(entry["added"]) - here)]
                found += [f"{each}, removed from {key_text(key)}" for each in (Counter(entry["removed"]) & here)]
        if found:
            raise CheckpointError(
                f"The checkpoint was taken with other hooks: {'; '.join(found[:3])} in training, and not in this "
                f"fit. A checkpoint holds no hooks. Add and remove them before fit, in setup, or at FitBegin, which is "
                f"fired when a fit resumes as well."
            )

    # --- restore

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Make the saved changes, and undo all others that training has made here.

        Args:
            saved: The result of `state_dict`; ``None`` for an early checkpoint, which has none: then nothing changes.

        Raises:
            CheckpointError: A change cannot be undone, because it was made in place in a tensor.
        """
        if saved is None:
            return
        began, now, changed = self._beginning(), self._now(), _by_key(saved)
        owners = self._owners()
        for key in {**began, **now, **changed}:
            kind, owner, name = key
            # Types and hooks cannot be set. An owner may be missing because the checkpoint was taken after training had
            # put it there: `differences` reports modules, and other objects are not saved.
            if kind in ("type", "hooks") or owner not in owners:
                continue
            before, present = began.get(key, ABSENT), now.get(key, ABSENT)
            if key in changed:
                value = self._value(changed[key])
            # Nothing to undo; or nothing was recorded that could be put back.
            elif (
                same(before, present)
                or isinstance(before, NotRecorded)
                or (isinstance(present, NotRecorded) and not isinstance(owners[owner], torch.nn.Module))
            ):
                continue
            elif before is not ABSENT:
                value = restored(before, key_text(key))
            elif isinstance(present, (NotRecorded, Object)):
                continue  # an object in a new attribute is not saved, so it is not removed either
            else:
                value = ABSENT
            put(owners[owner], kind, name, value)

    def _value(self, entry: Mapping[str, Any]) -> Any:
        if "object" in entry:
            return entry["object"]
        if "value" not in entry:
            return ABSENT
        value = Packer().copy(entry["value"], "a checkpoint")  # a copy, as the contents may be loaded once more
        value = with_frozensets(value, entry.get("frozensets"))  # early checkpoints lack them
        return to_device(value, self._core.device) if entry["device"] else value


def _of_optimizer(key: Key) -> bool:
    return key[1].partition(".")[0] == "optimizer"


def _by_key(saved: Mapping[str, Any] | None) -> dict[Key, Mapping[str, Any]]:
    return {(each["kind"], each["owner"], each["name"]): each for each in (saved or {}).get("changed", ())}
