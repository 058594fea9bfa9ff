"""Data: the loaders by phase, checked as early as their kind allows, and the number of updates of a fit over them.

A loader is any iterable of batches. A loader that knows its length is checked before the fit, any other after its first
epoch. The number of updates is known before a fit if every training loader knows its length; schedules that span a
whole fit need it. Every accumulation group of batches is one update; the last group of an epoch may be shorter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from math import ceil
from typing import Any

import torch

from flowtrain.callback.phases import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Phase,
    TrainingPhase,
    ValidationPhase,
)
from flowtrain.errors import DataError, UsageError, describe
from flowtrain.state.by_phase import PhaseMap

__all__ = [
    "check_fit_data",
    "check_gave",
    "has_workers",
    "length",
    "loaders",
    "parts",
    "planned_updates",
    "set_epoch",
    "shortest",
]

_EXAMPLE = "data=(train_loader, valid_loader), or data={TrainingPhase: a, ValidationPhase: b}"

_PARTS = ("sampler", "batch_sampler", "dataset", "datasets", "loader", "loaders", "dataloader", "base_dataloader")
"""The attributes in which a loader, or a part of one, holds its parts, in torch and in the usual wrappers."""


def loaders(data: Any) -> PhaseMap[Any]:
    """Return the loaders by phase.

    Args:
        data: ``None``; one loader, for training; a tuple of a training and a validation loader; or a mapping from
            phases or phase types to loaders, in the order in which an epoch of each is run.

    Raises:
        DataError: `data` is none of these, or one of the loaders is a tensor, a dataset, or empty.
    """
    found: PhaseMap[Any] = PhaseMap("data")
    if data is None:
        return found
    if isinstance(data, Mapping):
        pairs = [(_phase(key), loader) for key, loader in data.items()]
    elif isinstance(data, tuple):
        if data and all(_is_array(item) for item in data):
            kind = "tensors" if all(isinstance(item, torch.Tensor) for item in data) else "arrays"
            raise DataError(f"data is {describe(data)}: {kind}, not loaders. {_make_loader(*data)}")
        if not 1 <= len(data) <= 2:
            raise DataError(f"data is a tuple of {len(data)} loaders. Pass {_EXAMPLE}.")
        pairs = list(zip((TrainingPhase(), ValidationPhase()), data, strict=False))
    else:
        pairs = [(TrainingPhase(), data)]
    for phase, loader in pairs:
        check_loader(loader, phase)
        found[phase] = loader
    return found


def _is_loader(value: object) -> bool:
    """Tell whether a value is certainly a loader. A list is not certain: it may be one batch, or hold batches."""
    return isinstance(value, torch.utils.data.DataLoader)


def _is_array(value: object) -> bool:
    # The attributes tell an array of numpy or another library, none of which flowtrain needs to import.
    return isinstance(value, torch.Tensor) or all(hasattr(value, name) for name in ("__array__", "shape", "dtype"))


def _make_loader(*arrays: object) -> str:
    names = ("inputs", "targets")
    if not all(isinstance(array, torch.Tensor) for array in arrays):
        names = ("torch.as_tensor(inputs)", "torch.as_tensor(targets)")
    made = f"DataLoader(TensorDataset({', '.join(names)}), batch_size=32)"
    return f"Make batches of {'it' if len(arrays) == 1 else 'them'}: {made}, and pass {_EXAMPLE}."


def _phase(key: object) -> Phase:
    phase = key() if isinstance(key, type) and issubclass(key, Phase) else key
    if not isinstance(phase, Phase):
        raise DataError(f"data has the key {key!r}, which is no phase. Pass {_EXAMPLE}.")
    if type(phase) in (Phase, AbstractTrainingPhase, AbstractValidationPhase):
        raise DataError(f"data has the key {phase!r}, which is abstract. Use a subclass of it.")
    return phase


def check_loader(loader: Any, phase: Phase) -> None:
    """Check a loader as far as possible without taking a batch from it.

    Raises:
        DataError: `loader` is a tensor, a dataset, a list of loaders, not iterable, or has the length 0.
    """
    inside = list(loader.values()) if isinstance(loader, Mapping) else loader
    if isinstance(inside, (list, tuple)) and inside and all(map(_is_loader, inside)):
        remedy = "For training and validation pass a tuple: data=(train, valid)."
        if not isinstance(phase, AbstractTrainingPhase):
            remedy = (
                "Give each of them a phase of its own: class OtherPhase(ValidationPhase): ..., and "
                "data={TrainingPhase: train, ValidationPhase: valid, OtherPhase: other}."
            )
        raise DataError(
            f"The data for {phase!r} is a {type(loader).__name__} of {len(inside)} loaders, and each of them would be "
            f"taken for a batch. {remedy}"
        )
    if _is_array(loader):
        raise DataError(
            f"The data for {phase!r} is {describe(loader)}, not a loader of batches. {_make_loader(loader)}"
        )
    if isinstance(loader, torch.utils.data.Dataset) and not isinstance(loader, torch.utils.data.IterableDataset):
        raise DataError(
            f"The data for {phase!r} is a {type(loader).__name__}, a dataset of single samples. "
            f"Make batches of it: DataLoader(dataset, batch_size=32)."
        )
    if isinstance(loader, (str, bytes)) or not (isinstance(loader, Iterable) or hasattr(type(loader), "__getitem__")):
        raise DataError(f"The data for {phase!r} is {describe(loader)}, not a loader of batches. Pass {_EXAMPLE}.")
    if length(loader) == 0:
        raise DataError(_empty(phase, loader))


def check_fit_data(data: PhaseMap[Any], *, by_steps: bool, stacklevel: int) -> None:
    """Check that a fit has data, and, if it counts steps, exactly one training phase.

    A fit in which every phase evaluates is allowed but rarely intended, so it warns.

    Args:
        data: The loaders by phase.
        by_steps: Whether the fit counts steps.
        stacklevel: The frame that the warning points to, as `warnings.warn` in the caller would count it.

    Raises:
        UsageError: `data` is empty, or a fit by steps has no training phase or several.
    """
    if not data:
        raise UsageError("fit() has no data. Pass data=(train_loader, valid_loader) to Learner or to fit.")
    training = [repr(phase) for phase in data if isinstance(phase, AbstractTrainingPhase)]
    if by_steps and len(training) != 1:
        raise UsageError(
            f"fit(steps=...) counts the batches of one training phase; the data has "
            f"{', '.join(training) or 'none'}. Use fit(epochs), or data with one."
        )
    if all(isinstance(phase, AbstractValidationPhase) for phase in data):
        warnings.warn(
            f"fit() has no training phase in its data, only {', '.join(map(repr, data))}: nothing is trained. Use "
            f"validate(), or add the data to train on: data={{TrainingPhase: loader, ...}}.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def check_gave(count: int, phase: Phase, loader: object) -> None:
    """Check, after a pass over a loader, that it gave at least one batch.

    Raises:
        DataError: `count` is 0.
    """
    if not count:
        raise DataError(_empty(phase, loader))


def _empty(phase: Phase, loader: object) -> str:
    text = f"The loader for {phase!r} ({type(loader).__name__}) gives no batch."
    if isinstance(loader, Iterator):
        return f"{text} It is an iterator, used up after one pass: pass a list, a DataLoader, or another iterable."
    return f"{text} Is the dataset empty, or smaller than one batch with drop_last=True?"


def length(loader: object) -> int | None:
    """Return the number of batches in a loader, or ``None`` if the loader does not know it for certain."""
    if isinstance(getattr(loader, "dataset", None), torch.utils.data.IterableDataset):
        return None  # a DataLoader divides the length that the dataset claims; with workers it may give more batches
    try:
        return len(loader)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # no __len__: TypeError
    except (TypeError, NotImplementedError):
        return None


def shortest(*lengths: int | None) -> int | None:
    """Return the smallest known length; ``None`` if no length is known."""
    return min((each for each in lengths if each is not None), default=None)


def planned_updates(
    data: PhaseMap[Any], accumulate: int, epochs: int | None, steps: int | None, validate_every: int | None
) -> int | None:
    """Return the number of updates of a fit without cancels; ``None`` if a training loader does not know its length.

    Args:
        data: The loaders by phase.
        accumulate: The number of batches in an accumulation group.
        epochs: As for `Learner.fit`.
        steps: As for `Learner.fit`.
        validate_every: As for `Learner.fit`.

    >>> from flowtrain.callback.phases import TrainingPhase
    >>> loaders = PhaseMap("data")
    >>> loaders[TrainingPhase] = range(10)
    >>> planned_updates(loaders, 4, epochs=2, steps=None, validate_every=None)
    6
    """
    lengths = [length(loader) for phase, loader in data.items() if isinstance(phase, AbstractTrainingPhase)]
    if epochs is not None:
        known = [each for each in lengths if each is not None]
        return epochs * sum(ceil(each / accumulate) for each in known) if len(known) == len(lengths) else None
    if steps is None or accumulate == 1:
        return steps
    batches = validate_every or lengths[0]
    if not batches:
        return None
    # Every epoch ends its last group, so the groups of complete epochs and of the last, shorter one are counted apart.
    return steps // batches * ceil(batches / accumulate) + ceil(steps % batches / accumulate)


def parts(loader: Any) -> list[Any]:
    """Return a loader and its parts, each object once: its samplers, its dataset, and the parts of these."""
    found, known = [loader], {id(loader)}
    for part in found:  # the list grows in the loop, so parts of parts are visited too
        for name in _PARTS:
            inner = _part(part, name)
            several = name in ("datasets", "loaders") and isinstance(inner, (list, tuple, Mapping))
            for each in (inner.values() if isinstance(inner, Mapping) else inner) if several else (inner,):
                if each is not None and id(each) not in known:
                    known.add(id(each))
                    found.append(each)
    return found


def _part(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name, None)
    except Exception:  # a property of the user's class may raise anything
        return None


def set_epoch(loader: Any, number: int) -> None:
    """Call ``set_epoch(number)`` of a loader and of each of its parts that has this method.

    Args:
        loader: Any loader.
        number: The number of the pass, from 0.
    """
    for part in parts(loader):
        setter = _part(part, "set_epoch")
        if callable(setter):
            setter(number)


def has_workers(loader: Any) -> bool:
    """Tell whether a loader has worker processes."""
    counts = [_part(part, "num_workers") for part in parts(loader)]
    return any(isinstance(count, int) and count > 0 for count in counts)
