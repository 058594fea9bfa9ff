"""The processes that train together, as the loop sees them: one that trains alone, or one of several ranks.

`flowtrain.training.loop.Loop` calls a `Together` at each place where ranks must act alike. `Alone` is that of one
process, `flowtrain.training.ranks.ranks.Ranks` that of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from flowtrain.callback.phases import Phase
from flowtrain.core.torch_core import TorchCore
from flowtrain.state.by_phase import PhaseMap
from flowtrain.training.checkpoint.parts import Parts, WholeParts
from flowtrain.training.failures import Failures
from flowtrain.training.sync import NoSync, StepSync

__all__ = ["Alone", "Together"]


class Together(Protocol):
    """The processes that train one model."""

    @property
    def sync(self) -> StepSync:
        """Synchronises the batches."""
        ...

    @property
    def parts(self) -> Parts:
        """The parts of the checkpoints."""
        ...

    def begin(self, step: Phase | None = None) -> None:
        """Begin a call of the user outside of a fit; `step` is the phase of a single step."""

    def begin_fit(self, save: Callable[[], None]) -> Callable[[Callable[[], None]], None] | None:
        """Begin a fit.

        Args:
            save: Takes the checkpoints that were requested for an interrupt.

        Returns:
            A function for the handler of a signal: it takes the function that ends the fit, and keeps it until all
            ranks know of the signal. ``None``: the fit ends at the end of the batch.
        """
        ...

    def divide(self, data: PhaseMap[Any]) -> PhaseMap[Any]:
        """Return the loaders that this process uses: those of the user, or the shares of this rank."""
        ...

    def agree(self, value: Any) -> Any:
        """Return the value of the main rank. Every rank calls this at the same point."""
        ...

    def plan(self, updates: Callable[[], int | None]) -> int | None:
        """Return the number of updates of a fit, the same on all ranks, which are about to begin it.

        Args:
            updates: Returns the number of this rank, ``None`` if it is not known.
        """
        ...

    # --- sync points: each waits for the other ranks, tells them the failures of this one, and adds theirs to these

    def resumed(self, failures: Failures) -> None:
        """Meet when the checkpoint was read that the next fit resumes from."""

    def fit_begun(self, failures: Failures) -> None:
        """Meet when `FitBegin` was fired."""

    def epoch_begun(self, failures: Failures) -> None:
        """Meet when `EpochBegin` was fired. Ranks that have loaded different checkpoints are an error."""

    def batches_ended(self, failures: Failures) -> None:
        """Meet when the epoch has no further batch. A cancel from behind the sync point of the last batch ends here."""

    def merge(self, phase: Phase, failures: Failures) -> None:
        """Meet before `EpochEnd` is fired, and merge the measurements of all ranks, which its handlers read."""

    def epoch_ended(self, failures: Failures) -> None:
        """Meet when `EpochEnd` was fired. Shared state that is not the same on all ranks is an error."""

    def broke_off(self, failures: Failures) -> None:
        """Meet when a failure has ended the epochs of this rank, whichever point the other ranks are at."""

    def fit_ended(self, failures: Failures) -> None:
        """Meet when `FitEnd` was fired and all pending work is done."""

    # --- batches

    def batches(
        self, phase: Phase, source: Iterable[Any], done: int, total: int | None, *, announced: bool
    ) -> AbstractContextManager[Iterable[Any]]:
        """Return a context with the batches that are left in an epoch, on the device where that is done ahead of time.

        Args:
            phase: The phase.
            source: The batches, as the loader gives them.
            done: How many batches of the epoch were run before.
            total: The most batches that the whole epoch has; ``None`` if that is not known.
            announced: Whether the loader gives that many, unless `total` limits it.
        """
        ...

    def after_sync(self, phase: Phase) -> AbstractContextManager[None]:
        """Return a context for the end of a batch, behind the point at which ranks agree how the batch ends."""
        ...

    def predicting(self, phase: Phase, inputs: Iterable[Any]) -> AbstractContextManager[Iterable[Any]]:
        """Return a context that gives these inputs, in which the model runs on each of them."""
        ...


class Alone:
    """Training in one process: no data are divided, and no other process is told or awaited; a `Together`.

    Args:
        core: The core of the learner.
    """

    def __init__(self, core: TorchCore) -> None:
        self.sync = NoSync(core)
        self.parts = WholeParts()
        self._core = core

    def begin(self, step: Phase | None = None) -> None:
        """Do nothing: no other process begins with this one."""

    def begin_fit(self, save: Callable[[], None]) -> None:
        """Return ``None``: an interrupt ends the fit at the end of the batch, without asking other processes."""

    def _meet_nobody(self, failures: Failures) -> None:
        """Return at once: there is no other process to wait for."""

    resumed = fit_begun = epoch_begun = batches_ended = epoch_ended = broke_off = fit_ended = _meet_nobody

    def merge(self, phase: Phase, failures: Failures) -> None:
        """Do nothing: the measurements of this process are all that there are."""

    def divide(self, data: PhaseMap[Any]) -> PhaseMap[Any]:
        """Return the loaders of the user, which this process uses alone."""
        return data

    def agree(self, value: Any) -> Any:
        """Return the value of this process, which is the main rank."""
        return value

    def plan(self, updates: Callable[[], int | None]) -> int | None:
        """Return the number of updates of this process."""
        return updates()

    def batches(
        self, phase: Phase, source: Iterable[Any], done: int, total: int | None, *, announced: bool
    ) -> AbstractContextManager[Iterable[Any]]:
        """Return the batches as the core feeds them: on the device where it moves them ahead of time."""
        return nullcontext(self._core.feed(source, None if total is None else total - done))

    def after_sync(self, phase: Phase) -> AbstractContextManager[None]:
        """Return a context that does nothing, since ranks agree on nothing."""
        return nullcontext()

    def predicting(self, phase: Phase, inputs: Iterable[Any]) -> AbstractContextManager[Iterable[Any]]:
        """Return a context that gives the inputs as they are."""
        return nullcontext(inputs)
