"""Vector clocks: which work is certain to be done before other work, and the check of all uses of a piece of memory.

A clock says, for each stream, up to which number its work is certain to be done. A piece of work inherits the clock of
the work before it in its stream, of the events that its stream has waited for, and of all work that the thread which
submits it has waited for. Two uses of the same memory, one of which writes, are a race unless the earlier one is in
the clock of the later one. So a race is found where it is possible, and not only where it does harm.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

__all__ = ["Clock", "Race", "Use", "Uses", "merge"]

Clock: TypeAlias = dict[int, int]


class Race(RuntimeError):
    """Two pieces of work use the same memory, at least one of them writes, and nothing orders them."""


class Use(NamedTuple):
    """A piece of work that uses memory: the name of the work, its stream, and its number in that stream."""

    name: str
    stream: int
    number: int


def merge(clock: Clock, other: Clock) -> None:
    """Add the work that another clock knows to be done to a clock."""
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


class Uses:
    """The uses of one piece of memory that a later use may collide with."""

    def __init__(self) -> None:
        self._written: Use | None = None
        self._read: dict[int, Use] = {}

    def read(self, use: Use, clock: Clock) -> None:
        """Note that a piece of work with this clock reads the memory.

        Raises:
            Race: It may still be written.
        """
        self._check(use, "reads", clock, self._written, "writing")
        self._read[use.stream] = use

    def write(self, use: Use, clock: Clock) -> None:
        """Note that a piece of work with this clock writes the memory.

        Raises:
            Race: It may still be read or written.
        """
        self._check(use, "writes", clock, self._written, "writing")
        for each in self._read.values():
            self._check(use, "writes", clock, each, "reading")
        self._written, self._read = use, {}

    @staticmethod
    def _check(use: Use, does: str, clock: Clock, earlier: Use | None, doing: str) -> None:
        if earlier is not None and clock.get(earlier.stream, 0) < earlier.number:
            raise Race(
                f"{use.name} on stream {use.stream} {does} memory that {earlier.name} on stream {earlier.stream} may "
                f"still be {doing}: no event, no stream and no wait of the host orders them."
            )
