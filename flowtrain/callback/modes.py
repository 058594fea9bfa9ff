"""The modes of modules while a phase runs: train or eval, by module, as the user wants them and as the phase has them.

A module that is in eval mode before an epoch stays there in training: batch normalisation of a frozen part goes on to
use the statistics that it has. A whole model in eval mode stays there where all its parameters are frozen, as those of
a teacher are; otherwise it is trained in train mode. A phase that evaluates puts every module into eval mode.

A mode that a handler sets in between is the module's own from then on. In a phase that evaluates every module is in
eval mode already, so there only `train` changes anything.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["Modes"]


class Modes:
    """Sets the modes of a phase, and knows which ones the modules have without it.

    Args:
        roots: The models, and the loss function where it is a module.
        training: Whether the phase trains.

    Attributes:
        woken: Those of the roots that were in eval mode as a whole, and are trained in train mode.
    """

    def __init__(self, roots: Iterable[torch.nn.Module], *, training: bool) -> None:
        self._roots, self._training = list(roots), training
        self.woken: list[torch.nn.Module] = []
        self.begin()

    def begin(self) -> None:
        """Take the modes that the modules have as their own, and set those of the phase."""
        self._before = {module: module.training for root in self._roots for module in root.modules()}
        self.woken = []
        for root in self._roots:
            self._set(root)
        self._phase = [module.training for module in self._before]

    def _set(self, root: torch.nn.Module) -> None:
        """Set the modes of one root, by its own `train`, which may have been overridden."""
        if not self._training:
            root.train(False)
            return
        asleep = [module for module in root.modules() if not self._before[module]]
        whole = not any(self._before[module] for module in root.modules())
        if whole and not any(param.requires_grad for param in root.parameters()):
            return
        root.train()
        if whole:
            self.woken.append(root)
            return
        for module in asleep:
            module.training = False

    def own(self) -> dict[torch.nn.Module, bool]:
        """Return the modes that the modules have without the phase: those from before, but for what was set since."""
        return {
            module: before if module.training is phase else module.training
            for (module, before), phase in zip(self._before.items(), self._phase, strict=True)
        }

    def end(self) -> None:
        """Give every module its own mode back."""
        for module, mode in self.own().items():
            if module.training is not mode:
                module.training = mode
