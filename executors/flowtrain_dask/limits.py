"""How much work of deferred callbacks may wait, and what happens when there is more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowtrain.errors import ExecutorError, is_a, nearest

__all__ = ["Limits", "WhenFull"]

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
            if not is_a(value, int) or is_a(value, bool) or value < 1:
                raise ExecutorError(
                    f"Limits({name}={value!r}): a lane holds at least one, given as an integer. Write "
                    f"Limits(pending=10_000, bytes=1 << 30)."
                )
        if self.when_full not in _CHOICES:
            raise ExecutorError(
                f"Limits(when_full={self.when_full!r}) is neither 'block' nor 'drop'."
                f"{nearest(str(self.when_full), _CHOICES)}"
            )
