"""Data: the loaders by phase, checked as early as their kind allows, and the number of updates of a fit over them.

A loader is any iterable of batches. A loader that knows its length is checked before the fit, any other after its first
epoch. The number of updates is known before a fit if every training loader knows its length; schedules that span a
whole fit need it. Every accumulation group of batches is one update; the last group of an epoch may be shorter.

A fit with ``limit_batches`` runs over `LimitedLoader` objects, so that lengths, positions and passes are those of the
limited loaders everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import ceil, floor
from numbers import Real
from typing import Any

import torch

from flowtrain.callback.phases import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Phase,
    TrainingPhase,
    ValidationPhase,
    as_phase,
)
from flowtrain.data.loaders import DATA_EXAMPLE, LimitedLoader, check_iterable, empty, is_array, length, make_loader
from flowtrain.data.rank_loaders import without_share
from flowtrain.errors import DataError, UsageError
from flowtrain.errors.arguments import is_a, is_whole, whole_number
from flowtrain.errors.describing import describe
from flowtrain.state.by_phase import PhaseMap

__all__ = [
    "check_fit_data",
    "check_gave",
    "check_loader",
    "has_workers",
    "limited",
    "loader_parts",
    "loaders_by_phase",
    "planned_updates",
    "same_name",
    "set_epoch",
    "shortest",
    "unlimited",
]

_PARTS = ("sampler", "batch_sampler", "dataset", "datasets", "loader", "loaders", "dataloader", "base_dataloader")
"""The attributes in which a loader, or a part of one, holds its parts, in torch and in the usual wrappers."""


def loaders_by_phase(data: Any) -> PhaseMap[Any]:
    """Return the loaders by phase.

    Args:
        data: ``None``; one loader, for training; a tuple of a training and a validation loader; or a mapping from
            phases or phase types to loaders, in the order in which an epoch of each is run.

    Raises:
        DataError: `data` is none of these, two of the phases have one name, or one of the loaders is a tensor, a
            dataset, or empty.
    """
    found: PhaseMap[Any] = PhaseMap("data")
    if data is None:
        return found
    if isinstance(data, Mapping):
        pairs = [(_phase(key), loader) for key, loader in data.items()]
    elif isinstance(data, tuple):
        if data and all(is_array(item) for item in data):
            kind = "tensors" if all(isinstance(item, torch.Tensor) for item in data) else "arrays"
            raise DataError(f"data is {describe(data)}: {kind}, not loaders. {make_loader(*data)}")
        if not 1 <= len(data) <= 2:
            raise DataError(f"data is a tuple of {len(data)} loaders. Pass {DATA_EXAMPLE}.")
        pairs = list(zip((TrainingPhase(), ValidationPhase()), data, strict=False))
    else:
        pairs = [(TrainingPhase(), data)]
    for phase, loader in pairs:
        _check_name(phase, found)
        check_loader(loader, phase)
        found[phase] = loader
    return found


def _check_name(phase: Phase, others: PhaseMap[Any]) -> None:
    """Check that no other phase has the name of this one.

    Raises:
        DataError: Another phase has it, or the phase itself is among them.
    """
    if phase in others:
        raise DataError(f"data has the phase {phase!r} twice: the type and its instance are the same key.")
    for other in others:
        if repr(other) == repr(phase):
            raise same_name("data has", other, phase)


def same_name(what: str, one: Phase, other: Phase) -> DataError:
    """Return the error for two phases of one name, which begins with `what`."""
    places = [f"{type(each).__module__}.{type(each).__qualname__}" for each in (one, other)]
    return DataError(
        f"{what} two phases with the name {other!r}, {' and '.join(places)}. Logs, checkpoints and conditions know a "
        f"phase by its name. Give one of them another name."
    )


def _is_loader(value: object) -> bool:
    """Tell whether a value is certainly a loader. A list is not certain: it may be one batch, or hold batches."""
    return isinstance(value, torch.utils.data.DataLoader)


def _phase(key: object) -> Phase:
    phase = as_phase(key)
    if phase is None:
        raise DataError(f"data has the key {key!r}, which is no phase. Pass {DATA_EXAMPLE}.")
    if type(phase) in (Phase, AbstractTrainingPhase, AbstractValidationPhase):
        raise DataError(f"data has the key {phase!r}, which is abstract. Use a subclass of it.")
    return phase


def check_loader(loader: Any, phase: Phase, call: str = DATA_EXAMPLE) -> None:
    """Check a loader as far as possible without taking a batch from it.

    Args:
        loader: The loader.
        phase: The phase that the batches are for.
        call: How the loader is passed, for messages.

    Raises:
        DataError: `loader` is a tensor, a dataset, a list of loaders, not iterable, or has the length 0.
    """
    inside = list(loader.values()) if isinstance(loader, Mapping) else loader
    if isinstance(inside, (list, tuple)) and inside and all(map(_is_loader, inside)):
        remedy = "For training and validation pass a tuple: data=(train, valid)."
        several = "For a batch of each in every step pass CombinedLoader(...) of flowtrain.data."
        if not isinstance(phase, AbstractTrainingPhase):
            remedy = (
                "Give each of them a phase of its own: class OtherPhase(ValidationPhase): ..., and "
                "data={TrainingPhase: train, ValidationPhase: valid, OtherPhase: other}."
            )
        raise DataError(
            f"The data for {phase!r} is a {type(loader).__name__} of {len(inside)} loaders, and each of them would be "
            f"taken for a batch. {remedy} {several}"
        )
    check_iterable(loader, f"The data for {phase!r}", call)
    if length(loader) == 0:
        raise DataError(empty(f"for {phase!r}", loader))


def check_fit_data(data: PhaseMap[Any], *, by_steps: bool, stacklevel: int | None) -> None:
    """Check that a fit has data, and, if it counts steps, exactly one training phase.

    A fit in which every phase evaluates is allowed but rarely intended, so it warns.

    Args:
        data: The loaders by phase.
        by_steps: Whether the fit counts steps.
        stacklevel: The frame that the warning points to, as `warnings.warn` in the caller would count it; ``None``
            for no warning, because the main rank of several warns.

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
    if stacklevel is not None and all(isinstance(phase, AbstractValidationPhase) for phase in data):
        warnings.warn(
            f"fit() has no training phase in its data, only {', '.join(map(repr, data))}: nothing is trained. Use "
            f"validate(), or add the data to train on: data={{TrainingPhase: loader, ...}}.",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def check_gave(count: int, phase: Phase, loader: object) -> None:
    """Check, after a pass over a loader, that it gave at least one batch, or other ranks have all batches.

    Raises:
        DataError: `count` is 0.
    """
    if not count and not without_share(loader):
        raise DataError(empty(f"for {phase!r}", loader))


def limited(data: PhaseMap[Any], limit: object) -> PhaseMap[Any]:
    """Return the loaders of a fit, each with its limit on the number of batches.

    Args:
        data: The loaders by phase.
        limit: The argument ``limit_batches`` of `Learner.fit`; ``None`` for no limits.

    Raises:
        UsageError: A limit is neither a whole number from 1 nor a share from above 0 to 1, is a share of a loader that
            does not know its length, or is for a phase that `data` does not have.
    """
    if limit is None or not data:  # a fit without data is refused later
        return data
    limits: Mapping[Any, Any] = limit if isinstance(limit, Mapping) else dict.fromkeys(data, limit)
    found: PhaseMap[Any] = PhaseMap("data")
    found.update(data)
    for key, each in limits.items():
        phase = as_phase(key)
        if phase is None or phase not in data:
            raise UsageError(
                f"fit(limit_batches={limit!r}) limits {key!r}, and the fit has data for {', '.join(map(repr, data))}. "
                f"Write limit_batches={{{next(iter(data))!r}: 100}}."
            )
        found[phase] = LimitedLoader(data[phase], _most(each, phase, data[phase]))
    return found


def _most(limit: object, phase: Phase, loader: Any) -> int:
    """Return the number of batches that a limit of the user allows in a pass over a loader."""
    what = f"fit(): limit_batches of {phase!r}"
    if is_whole(limit):
        return whole_number(what, limit)
    if is_a(limit, bool) or not isinstance(limit, Real) or not 0 < float(limit) <= 1:
        raise UsageError(
            f"{what} is a whole number of batches, at least 1, or a share of the loader, above 0.0 and up to 1.0, got "
            f"{limit!r}. To leave a phase out, leave it out of data."
        )
    known = length(loader)
    if known is None:
        raise UsageError(
            f"{what} is the share {limit!r}, and the loader ({type(loader).__name__}) does not know how many batches "
            f"it has. Write a number of batches: limit_batches={{{phase!r}: 100}}."
        )
    return max(1, floor(round(known * float(limit), 6)))  # rounded: 0.29 * 100 is a little less than 29


def unlimited(loader: Any) -> Any:
    """Return the loader itself; for a `LimitedLoader`, the loader that it limits."""
    return loader.loader if isinstance(loader, LimitedLoader) else loader


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


def loader_parts(loader: Any) -> list[Any]:
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
    for part in loader_parts(loader):
        setter = _part(part, "set_epoch")
        if callable(setter):
            setter(number)


def has_workers(loader: Any) -> bool:
    """Tell whether a loader has worker processes."""
    counts = [_part(part, "num_workers") for part in loader_parts(loader)]
    return any(isinstance(count, int) and count > 0 for count in counts)
