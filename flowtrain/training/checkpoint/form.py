"""The form of a checkpoint: which entries it has, and which values they can have.

A file that has its checksum may still hold impossible values, if a program or a person has changed it. Every entry that
flowtrain itself writes is compared with its form here, before a learner or a log is touched. What a callback, a model,
an optimizer or a loader of the user saves has no form: these refuse their state themselves when they load it.

A form is a function that tells whether a value is possible, or a mapping from the names of entries to their forms. A
name that ends with ``?`` may be missing, since early checkpoints lack it; the name `_EACH` stands for all names.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch

from flowtrain.errors import CheckpointError

__all__ = ["check_form"]

_Form: TypeAlias = "Callable[[Any], bool] | Mapping[str, _Form]"

_EACH = "*"


def check_form(contents: Mapping[str, Any]) -> None:
    """Check that the contents of a checkpoint have the form of a checkpoint.

    Raises:
        CheckpointError: They have not.
    """
    wrong = next(_wrong(contents, _CONTENTS, ""), "") or _contradiction(contents)
    if wrong:
        raise CheckpointError(
            f"The checkpoint has impossible contents: {wrong}. It was changed after flowtrain wrote it. Pass another "
            f"checkpoint. Nothing has been changed."
        )


def _wrong(value: Any, form: _Form, place: str) -> Iterator[str]:
    """Yield a text for each part of a value that does not have the form."""
    if callable(form):
        if not form(value):
            yield f"{place} is {value!r:.60}"
    elif not isinstance(value, Mapping):
        yield f"{place} is {value!r:.60}, and no mapping"
    elif _EACH in form:
        for name, each in value.items():
            yield from _wrong(each, form[_EACH], f"{place}[{name!r}]" if place else str(name))
    else:
        for name, inner in form.items():
            key = name.removesuffix("?")
            if key in value:
                yield from _wrong(value[key], inner, f"{place}[{key!r}]" if place else key)
            elif key == name:
                yield f"{place or 'it'} has no {name!r}"


def _contradiction(contents: Mapping[str, Any]) -> str:
    """Return what in the position of a fit contradicts another part of it; empty if nothing does."""
    position = contents["position"]
    phase, stream = position["phase"], position["stream"]
    if phase and contents["numbers"].get(phase, 0) < 1:
        return f"an epoch of {phase} is open, and numbers[{phase!r}] is {contents['numbers'].get(phase)}"
    if phase and stream is None and contents.get("passes", {}).get(phase, 1) < 1:
        return f"an epoch of {phase} is open, and passes[{phase!r}] is 0"
    if position["batches"] and (not phase or (stream is None and position["begun"] is None)):
        return f"position['batches'] is {position['batches']}, and no epoch has begun"
    if stream is not None and stream["count"] and stream["begun"] is None:
        return f"position['stream']['count'] is {stream['count']}, and no pass has begun"
    if position["unit"] == "" and (phase or position["rounds"] or position["steps"]):
        return "position['unit'] is '', and a fit is open"
    return ""


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: type(value) in kinds


def _one_of(*values: str) -> Callable[[Any], bool]:
    return lambda value: type(value) is str and value in values


def _list_of(form: _Form) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and not any(text for each in value for text in _wrong(each, form, ""))


def _or_none(form: _Form) -> Callable[[Any], bool]:
    return lambda value: value is None or not any(_wrong(value, form, ""))


def _accepted(load: Callable[[Any], object]) -> Callable[[Any], bool]:
    """Return a form: the values that a function accepts, which changes nothing outside of it."""

    def accepts(value: Any) -> bool:
        """Tell whether the function accepts the value."""
        try:
            load(value)
        except Exception:  # whatever a generator raises for a state that is none
            return False
        return True

    return accepts


def _load_python(state: Any) -> None:
    version, numbers, gauss = state
    random.Random().setstate((version, tuple(numbers), gauss))


def _load_numpy(state: Any) -> None:
    numpy = sys.modules.get("numpy")
    if numpy is not None and state is not None:
        kind, keys, *rest = state
        numpy.random.RandomState().set_state((kind, keys.numpy().astype("uint32"), *rest))


_GENERATOR = _accepted(lambda state: torch.Generator().set_state(state))

_RANDOM: _Form = {
    "python": _accepted(_load_python),
    "torch": _GENERATOR,
    "numpy": _accepted(_load_numpy),
    "own?": {"seed": _is(int), "counts": _is(dict)},
}

_LOADER: _Form = {
    "generators": _list_of(_is(torch.Tensor)),  # also of generators on an accelerator, which have another form
    "seeds?": _list_of(_is(int)),
    "workers?": _is(bool),
    "own": lambda state: True,
    "given?": _count,
}

_START: _Form = {"random": _or_none(_RANDOM), "loader": _LOADER, "number?": _count}

_STATES: _Form = {_EACH: _is(dict)}

_CHANGE: _Form = {
    "lag": lambda value: _count(value) and value > 0,
    "keys": lambda keys: type(keys) is list and keys != [] and all(type(key) in (str, list) for key in keys),
    "step": _is(int, type(None)),
}


def _pair(value: Any) -> bool:
    return type(value) is tuple and len(value) == 2 and all(map(_count, value))


_ARRIVALS: _Form = {
    "number": _count,
    "counts": {_EACH: _count},
    "under way": _list_of(
        {
            "number": _count,
            "stream": _is(str),
            "callback": _is(str),
            "event": _pair,
            "lags": {_EACH: _count},
            "changes": _or_none(_list_of(_CHANGE)),
        }
    ),
    "arrived": {_EACH: _pair},
}

_CONTENTS: _Form = {
    "model": _STATES,
    "trained?": _STATES,
    "loss module": _is(dict),
    "structure?": _or_none({"frozen": _list_of(_is(str)), "eval": _list_of(_is(str))}),
    "optimizer": {_EACH: {"type": _is(str), "state": _is(dict)}},
    "core": _is(dict),
    "updates?": _count,
    "arrivals?": _or_none(_ARRIVALS),
    "group": _or_none({"state": _is(dict), "gradients": _list_of(_is(torch.Tensor, type(None)))}),
    "cbstate": {_EACH: lambda packed: type(packed) is dict and len(packed) == 1},
    "callbacks": {
        _EACH: {
            "type": _is(str),
            "state": _is(dict),
            "conditions": _list_of({"type": _is(str)}),
            "recording?": _is(dict),
        }
    },
    "random": _RANDOM,
    "loaders": {_EACH: _LOADER},
    "position": {
        "unit": _one_of("", "epochs", "steps"),
        "rounds": _count,
        "steps": _count,
        "done": _list_of(_is(str)),
        "phase": _is(str),
        "batches": _count,
        "begun": _or_none(_START),
        "stream": _or_none({"begun": _or_none(_START), "count": _count}),
    },
    "numbers": {_EACH: _count},
    "passes?": {_EACH: _count},
    "run": {"id": lambda value: type(value) is str and value != "", "positions": _is(dict), "folder?": _is(str)},
    "lanes": _is(dict, type(None)),
    "finite?": _is(bool),
    "ranks?": _is(list, tuple),
}
