"""How much work of deferred callbacks may wait, and what happens when there is more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowtrain.callback.callback import Callback
from flowtrain.errors import ExecutorError, nearest, whole_number

__all__ = ["Limits", "WhenFull", "check_droppable"]

WhenFull = Literal["block", "drop"]

_CHOICES = ("block", "drop")


@dataclass(frozen=True)
class Limits:
    """The bounds of each lane. An empty lane takes one event of any size.

    Args:
        pending: How many events may wait.
        bytes: How many bytes their snapshots may hold.
        when_full: ``"block"``: the training thread waits until there is room. ``"drop"``: the event is dropped and
            counted; callbacks that are ``durable``, or that read a series, do not take that.

    Raises:
        ExecutorError: A value means nothing.
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


def check_droppable(callback: Callback, reads_series: bool, limits: Limits) -> None:
    """Check that a callback may be deferred to a lane that drops events.

    Args:
        callback: The callback.
        reads_series: Whether it declares to read a series.
        limits: The limits of its lane.

    Raises:
        ExecutorError: It may not.
    """
    if limits.when_full != "drop" or not (callback.durable or reads_series):
        return
    name = callback.name or type(callback).__name__
    why = "is durable" if callback.durable else "reads a series, of which an event holds only what is new"
    raise ExecutorError(
        f'{name} {why}, so no event of it may be dropped, but when_full="drop" drops events. Write '
        f'Limits(when_full="block"), or set {name}.deferrable = False.'
    )
