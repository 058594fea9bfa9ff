"""Freeze: parameters that are not trained in some epochs, chosen by patterns of their names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import EpochBegin, FitBegin
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.resolution import NoConflict, Resolution
from flowtrain.callback.view import LearnerView
from flowtrain.callbacks.averaging import Averaging
from flowtrain.core.optimizers import match_names
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, switch, whole_number

__all__ = ["Freeze"]

_KEEPS_FROZEN = torch.__version__.startswith("2.6.")
"""Whether a compiled model goes on to train the parameters that it trained when it was compiled, and no others."""

_Epochs: TypeAlias = int | tuple[int, int | None] | None
"""How long parameters are frozen: for so many epochs, for ever, or from one epoch to another; see `Freeze`."""


class Freeze(Callback):
    """Freeze parameters for some epochs: a backbone until the new head is trained, or layer by layer.

    The number for a pattern is how many training epochs its parameters are frozen; ``None`` freezes them for ever. A
    pair ``(3, 5)`` trains them for three epochs, freezes them until five are complete, and trains them again; ``(3,
    None)`` freezes them for ever after three. Epochs are counted over the life of the learner.

    Normalisation layers that keep running statistics, such as `torch.nn.BatchNorm2d`, are put into eval mode while they
    are frozen, so that the statistics do not drift. When they are trained they are put into train mode, also if you had
    called ``eval()`` on them. No other mode changes: a dropout in a frozen part drops as ever.

    Give the parts learning rates of their own with `flowtrain.param_groups`; frozen parameters may be in an optimizer,
    which skips them.

    Writes ``model`` at `FitBegin` and at the `EpochBegin` of training, and reads ``cbstate.history`` there, so it runs
    after `Recorder`. Costs a walk through the model for each epoch.

    Args:
        patterns: How long parameters are frozen, by patterns of their names, as for `fnmatch`. The first pattern that
            fits a name counts; other parameters are left alone. With several models a name begins with the model's.
        norms: Whether normalisation layers are put into eval mode too.

    Raises:
        UsageError: `patterns` has another form. When the learner is built: a pattern fits no parameter, or only names
            that an earlier pattern fits.

    >>> from flowtrain.testing import tiny_learner
    >>> learner = tiny_learner(Freeze({"weight": 1}), model=torch.nn.Linear(1, 1), n_batches=4)
    >>> before = learner.model.weight.item()
    >>> _ = learner.fit(1)
    >>> learner.model.weight.item() == before
    True
    >>> _ = learner.fit(1)
    >>> learner.model.weight.item() == before
    False
    """

    def __init__(self, patterns: Mapping[str, _Epochs], *, norms: bool = True) -> None:
        if not is_a(patterns, Mapping) or not patterns or not all(is_a(pattern, str) for pattern in patterns):
            raise UsageError(
                f"Freeze({patterns!r}) takes a mapping from patterns of names to epochs: Freeze({{'backbone.*': 2}}) "
                f"freezes for two epochs, and Freeze({{'backbone.*': None}}) for ever."
            )
        self.patterns = {pattern: _epochs(pattern, epochs) for pattern, epochs in patterns.items()}
        self.norms = switch("Freeze", "norms", norms)

    def state_access(self) -> Access:
        """Declare a write of the model, and a read of the number of epochs."""
        return {"model": Write(), "cbstate.history": Read()}

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        """Find no conflict with `EMA` and `SWA`, which change parameters, and not whether they are trained."""
        return NoConflict() if isinstance(other, Averaging) else None

    def setup(self, learner: LearnerView) -> None:
        """Check that every pattern fits a parameter."""
        names = [name for root, module in _models(learner) for name, _ in module.named_parameters(root)]
        # A pattern that fits nothing is mostly a typing error, which would train a backbone that should be frozen.
        match_names("Freeze", map(_plain, names), self.patterns)

    @on(FitBegin)
    def begin_fit(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Freeze already now, for callbacks that look at the model when a fit begins."""
        history = learner.cbstate.history
        # No training phase has begun yet, and several may train. The largest number frees all that one of them has
        # freed, and the next `EpochBegin` decides by the epochs of its own phase.
        trained = [counts.epochs for each, counts in history.items() if isinstance(each, AbstractTrainingPhase)]
        self._freeze(learner, max(trained, default=0))

    @on(EpochBegin, AbstractTrainingPhase)
    def begin_epoch(self, event: EpochBegin, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Freeze and unfreeze for this epoch."""
        self._freeze(learner, learner.cbstate.history[phase].epochs)

    def _freeze(self, learner: LearnerView, done: int) -> None:
        """Set the parameters and the modes as they must be after so many complete epochs."""
        changed = False
        for root, model in _models(learner):
            for name, param in model.named_parameters(root):
                frozen = self._is_frozen(name, done)
                # Parameters that no pattern fits keep the user's own choice, and others are written only when the
                # choice changes.
                if frozen is not None and param.requires_grad is frozen:
                    param.requires_grad_(not frozen)
                    changed = True
            for name, module in model.named_modules(prefix=root) if self.norms else ():
                if getattr(module, "running_mean", None) is not None:
                    # A layer of BatchNorm may have no parameters, so the name of its buffer decides: a pattern like
                    # "backbone.*" fits both. A model that is such a layer itself has the empty name, whose dot is
                    # removed.
                    frozen = self._is_frozen(f"{name}.running_mean".lstrip("."), done)
                    if frozen is not None:
                        module.train(not frozen)
        if changed and _KEEPS_FROZEN and "torch._dynamo" in sys.modules:  # something may be compiled
            torch.compiler.reset()

    def _is_frozen(self, name: str, done: int) -> bool | None:
        """Tell whether a parameter or buffer is frozen after so many epochs; ``None`` if no pattern fits its name."""
        # The order of the mapping counts, so that a user can write an exception before the general pattern.
        for pattern, (first, last) in self.patterns.items():
            if fnmatchcase(_plain(name), pattern):
                return done >= first and (last is None or done < last)
        return None


def _epochs(pattern: object, given: Any) -> tuple[int, int | None]:
    """Return the number of epochs after which parameters are frozen, and the number after which they are trained again.

    Raises:
        UsageError: `given` is neither a whole number, nor ``None``, nor a pair of them.
    """
    what = f"Freeze(): the number of epochs for {pattern!r}"
    if not is_a(given, tuple):
        return 0, None if given is None else whole_number(what, given, least=0)
    if len(given) != 2:
        raise UsageError(f"{what} is a number, None, or a pair (first, last); got {given!r}.")
    first = whole_number(what, given[0], least=0)
    last = None if given[1] is None else whole_number(what, given[1], least=0)
    if last is not None and last <= first:
        raise UsageError(f"{what} is the pair {given!r}: the second number is larger than the first.")
    return first, last


def _models(learner: LearnerView) -> Iterator[tuple[str, torch.nn.Module]]:
    model = learner.model
    yield from [("", model)] if isinstance(model, torch.nn.Module) else model.items()


def _plain(name: str) -> str:
    """Return the name that a parameter has if no part of the model is compiled."""
    # torch.compile puts this prefix before the names in a module, and a pattern must fit with and without compilation.
    return name.replace("_orig_mod.", "")
