"""How the batches of this process stay in step with those of other ranks: the interface, and that of one process.

`flowtrain.training.step.Steps` calls a `StepSync` at the places in a batch that its methods name. `NoSync` is that of
one process, `flowtrain.training.ranks.batch_sync.BatchSync` that of several ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch

from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.core.torch_core import TorchCore
from flowtrain.graph.executor import Runner
from flowtrain.training.dispatch import StepRunners

__all__ = ["NoSync", "StepCalls", "StepSync", "Update"]

Update: TypeAlias = Callable[[Phase], None]
"""A function that updates the parameters in a batch of a phase, if an accumulation group is due."""

StepCalls: TypeAlias = tuple[Callable[..., Any], Callable[[torch.Tensor], Any], Update]
"""The functions by which a bundled training step runs the model and the backward pass of its loss, and updates."""


class StepSync(Protocol):
    """Synchronises the batches of one learner with those of the other ranks."""

    @property
    def alone(self) -> bool:
        """Whether there are no other ranks, so that a step may leave out the calls of these methods."""
        ...

    def begin(self, phase: AbstractTrainingPhase, update: Update) -> StepCalls:
        """Begin a batch of a bundled training step, and return the functions that it calls.

        Args:
            phase: The phase.
            update: The update of one process.
        """
        ...

    def begin_own(self, phase: Phase) -> None:
        """Begin a batch of a user's step."""

    def end_own(self, phase: Phase) -> None:
        """Agree with the other ranks how a batch of a user's step ends, before its `BatchEnd`."""

    def around(self, phase: Phase, step: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return the step of a user's phase in a form in which ranks agree on each batch, whatever the step does."""
        ...

    def updating(
        self, phase: Phase, names: list[str], on: StepRunners, *, in_batch: bool
    ) -> tuple[Runner | None, Runner | None]:
        """Agree that all ranks make an update, with the same gradients.

        Args:
            phase: The phase.
            names: The optimizers.
            on: The runners of the events of the phase.
            in_batch: Whether the update belongs to a batch that is running.

        Returns:
            The runners that fire `UpdateBegin` and `UpdateEnd`; ``None`` for one that has nothing to do.
        """
        ...

    def check_own_update(self, phase: Phase) -> None:
        """Check that a step may call its optimizer itself.

        Raises:
            RankError: There are other ranks, whose gradients that update would leave out.
        """

    def leave(self, phase: Phase, failure: BaseException) -> BaseException:
        """Leave the present batch for a failure of this process, before it is cancelled here.

        Returns:
            The worst failure of all ranks.
        """
        ...


class NoSync:
    """The batches of one process, which no other rank waits for: a `StepSync`.

    Args:
        core: The core of the learner.
    """

    alone = True

    def __init__(self, core: TorchCore) -> None:
        self._core = core

    def begin(self, phase: AbstractTrainingPhase, update: Update) -> StepCalls:
        """Return the functions of the core, and the update as it is."""
        return self._core.model, self._core.backward, update

    def begin_own(self, phase: Phase) -> None:
        """Do nothing: no other rank has a batch at the same time."""

    def end_own(self, phase: Phase) -> None:
        """Do nothing: there is no rank to agree with."""

    def around(self, phase: Phase, step: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return the step as it is: there is no rank to agree with."""
        return step

    def updating(
        self, phase: Phase, names: list[str], on: StepRunners, *, in_batch: bool
    ) -> tuple[Runner | None, Runner | None]:
        """Return the runners as they are: no other rank makes the update."""
        return on.update_begin, on.update_end

    def check_own_update(self, phase: Phase) -> None:
        """Accept it: the gradients of this process are all that there are."""

    def leave(self, phase: Phase, failure: BaseException) -> BaseException:
        """Return the failure of this process, the only one."""
        return failure
