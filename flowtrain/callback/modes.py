"""The train and eval modes of modules while a phase runs, and the modules' own modes before and after it."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch

__all__ = ["Modes", "phase_modes"]


@contextmanager
def phase_modes(roots: Iterable[torch.nn.Module], *, training: bool) -> Generator[Modes]:
    """Return the context of a phase that trains, or of one that evaluates; it gives the object that sets the modes."""
    modes = Modes(roots, training=training)
    try:
        modes.begin()
        # For a phase that trains this is no formality: a user may call `fit` within `torch.no_grad()`.
        with torch.set_grad_enabled(training):
            yield modes
    finally:
        modes.end()


class Modes:
    """Sets the train and eval modes of modules while a phase runs, and gives the modules their own modes back.

    Every module has an own mode, which the user chose, and a mode that the phase gives it. A phase that evaluates puts
    every module into eval mode. A phase that trains puts every module into train mode, with two exceptions:

    - A module that is in eval mode before the epoch stays in eval mode, so the batch normalisation of a frozen part
      keeps its statistics.
    - A whole model in eval mode stays in eval mode if all its parameters are frozen, as those of a teacher are.

    A mode that a handler sets during the phase becomes the own mode of the module. In a phase that evaluates all
    modules are in eval mode, so only a call of `train` is noticed there.

    Args:
        roots: The models, and the loss function where it is a module.
        training: Whether the phase trains.

    Attributes:
        switched: The roots that were in eval mode as a whole and that the phase trains in train mode.
    """

    def __init__(self, roots: Iterable[torch.nn.Module], *, training: bool) -> None:
        self._roots, self._training = list(roots), training
        self.switched: list[torch.nn.Module] = []
        self._before: dict[torch.nn.Module, bool] = {}
        self._phase: list[bool] = []

    def begin(self) -> None:
        """Remember the present modes as the modules' own, and set those of the phase."""
        self._before = {module: module.training for root in self._roots for module in root.modules()}
        self._phase = []
        self.switched = []
        for root in self._roots:
            self._set(root)
        # Compared with the modes at the end: a module whose mode differs then was set by a handler.
        self._phase = [module.training for module in self._before]

    def _set(self, root: torch.nn.Module) -> None:
        """Set the modes of one root by its own `train`, since a user may have overridden that."""
        if not self._training:
            root.train(False)
            return
        in_eval = [module for module in root.modules() if not self._before[module]]
        all_in_eval = not any(self._before[module] for module in root.modules())
        if all_in_eval and not any(param.requires_grad for param in root.parameters()):
            return
        root.train()
        if all_in_eval:
            self.switched.append(root)
            return
        for module in in_eval:
            module.training = False  # not `eval`, which would put all submodules into eval mode

    def own(self) -> dict[torch.nn.Module, bool]:
        """Return the own mode of each module: the mode before the phase, or the one that a handler has set since."""
        if not self._phase:  # an interrupt within `begin`, before any handler could set a mode
            return self._before
        return {
            module: before if module.training is phase else module.training
            for (module, before), phase in zip(self._before.items(), self._phase, strict=True)
        }

    def end(self) -> None:
        """Give every module its own mode back."""
        # Assigned one by one: `train` and `eval` of a module would set its submodules too.
        for module, mode in self.own().items():
            if module.training is not mode:
                module.training = mode
