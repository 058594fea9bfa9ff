"""Events: types that say which moment of training it is.

The loop fires an instance of an event type; a callback's handlers are chosen by the type. Most events of the library
carry nothing; `FitBegin` says how long the fit will be, `UpdateBegin` and `UpdateEnd` whether a batch is open. An event
of your own is a subclass, as a frozen dataclass if it carries something::

    @dataclass(frozen=True)
    class Improved(Event):
        loss: float

One fit fires, for each epoch and batch::

    FitBegin
      EpochBegin
        BatchBegin, LossBegin, BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd   (or BatchCancelled)
      EpochEnd                                                                                (or EpochCancelled)
    FitEnd

An accumulation group that waits for more batches when there are none is updated between the last batch
and the end of the epoch (rule 16).
"""

from __future__ import annotations

from dataclasses import dataclass

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

    __slots__ = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@dataclass(frozen=True)
class FitBegin(Event):
    """`Learner.fit` begins. Fired with `Phase()`.

    Attributes:
        epochs: How many epochs of each phase the fit asks for; ``None`` if it counts steps.
        steps: How many training steps the fit asks for; ``None`` if it counts epochs.
        updates: How many updates that comes to, of all training phases together, if nothing is cancelled; ``None``
            where the length of a loader is not known.
        resumed: Whether this goes on with a fit that a checkpoint holds; the counts are those of the whole fit then.
    """

    epochs: int | None = None
    steps: int | None = None
    updates: int | None = None
    resumed: bool = False


@dataclass(frozen=True, repr=False)
class FitEnd(Event):
    """`Learner.fit` ends, whatever ended it. Fired with `Phase()`; every handler runs, also after failures.

    Attributes:
        stopped: Why a `CancelFittingException` ended it: the text of that, or, if it has none, where it was raised.
            Empty if nothing was cancelled, and after an error, which is raised.
    """

    stopped: str = ""


class EpochBegin(Event):
    """An epoch begins. There is no batch yet."""

    __slots__ = ()


class EpochEnd(Event):
    """An epoch ended, normally or by `CancelEpochException`. The batch state is that of the last completed batch."""

    __slots__ = ()


class EpochCancelled(Event):
    """An error or `CancelFittingException` ended the epoch."""

    __slots__ = ()


class BatchBegin(Event):
    """A batch begins: its data is there, on the device."""

    __slots__ = ()


class LossBegin(Event):
    """The model has run; the loss comes next."""

    __slots__ = ()


class BackwardBegin(Event):
    """The loss is there, with its graph; the backward pass comes next."""

    __slots__ = ()


class BackwardEnd(Event):
    """The gradients of this batch are there. They are added to those of its accumulation group."""

    __slots__ = ()


@dataclass(frozen=True, repr=False)
class UpdateBegin(Event):
    """The gradients of the group are complete, unscaled and not yet clipped; the optimizer's step comes next.

    Attributes:
        in_batch: Whether a batch is open. It is not for an accumulation group that waited for more batches when the
            epoch ended: its update follows the last batch, whose state the handlers see.
    """

    in_batch: bool = True


@dataclass(frozen=True, repr=False)
class UpdateEnd(Event):
    """The optimizer has stepped.

    Attributes:
        in_batch: As for `UpdateBegin`.
    """

    in_batch: bool = True


class BatchEnd(Event):
    """A batch ended normally."""

    __slots__ = ()


class BatchCancelled(Event):
    """A cancel or an error ended the batch. Some of the batch state may be missing."""

    __slots__ = ()
