"""Events: types that name the moments of training.

The loop fires an instance of an event type, and the type decides which handler of a callback is called. Most events of
the library have no fields; `FitBegin` says how long the fit will be, `UpdateBegin` and `UpdateEnd` whether a batch is
open. A user's event is a subclass, and a frozen dataclass if it has fields::

    @dataclass(frozen=True)
    class Improved(Event):
        loss: float

One fit fires, for each epoch and batch::

    FitBegin
      EpochBegin
        BatchBegin, LossBegin, BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd   (or BatchCancelled)
      EpochEnd                                                                                (or EpochCancelled)
    FitEnd

The optimizer update of an accumulation group that the epoch leaves incomplete comes between the last batch and
the end of the epoch (rule 16).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowtrain.callback.phases import Phase

__all__ = [
    "BackwardBegin",
    "BackwardEnd",
    "BatchBegin",
    "BatchCancelled",
    "BatchEnd",
    "EpochBegin",
    "EpochCancelled",
    "EpochEnd",
    "Event",
    "FitBegin",
    "FitEnd",
    "LossBegin",
    "UpdateBegin",
    "UpdateEnd",
]


class Event:
    """Base of all events. A handler on `Event` itself is called for every event."""

    __slots__ = ()  # the loop fires one instance of each type again and again, so handlers must not store in it

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@dataclass(frozen=True)
class FitBegin(Event):
    """`Learner.fit` begins. Fired with `Phase()`.

    Attributes:
        epochs: How many epochs of each phase the fit asks for; ``None`` if it counts steps.
        steps: How many training steps the fit asks for; ``None`` if it counts epochs.
        updates: How many updates the fit makes in all training phases together if nothing is cancelled; ``None`` where
            the length of a loader is not known.
        resumed: Whether the fit resumes from a checkpoint; `epochs`, `steps` and `updates` then count the whole fit,
            with the part before the checkpoint.
        done: How much of `epochs` or `steps` was complete at the checkpoint that the fit resumes from; 0 in a fit that
            begins anew. With `epochs` these are epochs of the first training phase.
        phases: The phases of the data, in the order in which an epoch of each is run.
    """

    epochs: int | None = None
    steps: int | None = None
    updates: int | None = None
    resumed: bool = False
    done: int = 0
    phases: tuple[Phase, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, repr=False)
class FitEnd(Event):
    """`Learner.fit` ends, for whatever reason. Fired with `Phase()`; every handler runs, also after failures.

    Attributes:
        stopped: Why a `CancelFittingException` or an interrupt has ended the fit, in one line: its text, the place, and
            the checkpoint of an interrupt. Empty if no such exception was raised; an error is raised by `fit` itself.
        complete: Whether no epoch was broken off: the fit ended by itself or by a cancel between two epochs, and not by
            an error, an interrupt or a cancel within an epoch.
    """

    stopped: str = ""
    complete: bool = True


class EpochBegin(Event):
    """An epoch begins. It has no batch yet."""

    __slots__ = ()


class EpochEnd(Event):
    """An epoch ended, normally or by `CancelEpochException`. The batch state is that of the last completed batch."""

    __slots__ = ()


class EpochCancelled(Event):
    """An error or `CancelFittingException` ended the epoch."""

    __slots__ = ()


class BatchBegin(Event):
    """A batch begins: its inputs and targets are on the device."""

    __slots__ = ()


class LossBegin(Event):
    """The model has computed the outputs; the loss comes next."""

    __slots__ = ()


class BackwardBegin(Event):
    """The loss has been computed and still has its graph; the backward pass comes next."""

    __slots__ = ()


class BackwardEnd(Event):
    """The gradients of this batch have been computed, and were added to those of its accumulation group."""

    __slots__ = ()


@dataclass(frozen=True, repr=False)
class UpdateBegin(Event):
    """The gradients of the group are complete, unscaled and not yet clipped; clipping and the update come next.

    Attributes:
        in_batch: Whether a batch is open. No batch is open where the epoch ended before the accumulation group was
            full: the update then follows the last batch, and handlers see the state of that batch.
    """

    in_batch: bool = True


@dataclass(frozen=True, repr=False)
class UpdateEnd(Event):
    """The optimizer has updated the parameters.

    Attributes:
        in_batch: Whether a batch is open, as for `UpdateBegin`.
    """

    in_batch: bool = True


class BatchEnd(Event):
    """A batch ended normally."""

    __slots__ = ()


class BatchCancelled(Event):
    """A cancel or an error ended the batch. Entries of the batch state may be missing."""

    __slots__ = ()
