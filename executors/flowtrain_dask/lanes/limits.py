"""The limits of a lane: how many deferred events may wait, and what happens when there are more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowtrain.callback.callback import Callback
from flowtrain.errors import ExecutorError
from flowtrain.errors.arguments import whole_number
from flowtrain.errors.describing import nearest

__all__ = ["Limits", "WhenFull", "check_droppable"]

WhenFull = Literal["block", "drop"]
"""What happens to an event that comes to a full lane; see `Limits`."""

_CHOICES = ("block", "drop")


@dataclass(frozen=True)
class Limits:
    """The limits of each lane. An empty lane takes one event of any size.

    Args:
        pending: How many events may wait.
        bytes: How many bytes their snapshots may hold.
        when_full: ``"block"``: the training thread waits until there is room. ``"drop"``: the event is dropped and
            counted, which is refused for callbacks that are ``durable``, read a series, or write with a lag.

    Raises:
        ExecutorError: `pending` or `bytes` is no whole number of at least 1, or `when_full` is another word.
    """

    pending: int = 10_000
    bytes: int = 1 << 30
    when_full: WhenFull = "block"

    def __post_init__(self) -> None:
        for name, value in (("pending", self.pending), ("bytes", self.bytes)):
            object.__setattr__(self, name, whole_number(f"Limits(): {name}", value, error=ExecutorError))
        if self.when_full not in _CHOICES:
            raise ExecutorError(
                f"Limits(when_full={self.when_full!r}) is neither 'block' nor 'drop'."
                f"{nearest(str(self.when_full), _CHOICES)}"
            )


def check_droppable(callback: Callback, reads_series: bool, limits: Limits, *, answers: bool = False) -> None:
    """Check that a callback may be deferred to a lane with these limits, which may drop events.

    Args:
        callback: The callback.
        reads_series: Whether the callback declares to read a series.
        limits: The limits of its lane.
        answers: Whether the callback writes with a lag.

    Raises:
        ExecutorError: The lane may drop events, and the callback needs all of them.
    """
    if limits.when_full != "drop" or not (callback.durable or reads_series or answers):
        return
    name = callback.name or type(callback).__name__
    why = "is durable" if callback.durable else "reads a series, of which an event holds only the new values"
    if answers and not callback.durable:
        why = "writes with Write(lag=...), and its readers would lack what a dropped event should have written"
    raise ExecutorError(
        f'{name} {why}, so no event of it may be dropped, but when_full="drop" drops events. Write '
        f'Limits(when_full="block"), or set {name}.deferrable = False.'
    )
