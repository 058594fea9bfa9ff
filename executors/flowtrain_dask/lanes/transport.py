"""The seam between a lane and the place where its handlers run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, TypeAlias

from flowtrain_dask.lanes.report import Tally
from flowtrain_dask.lanes.work import Entry, Outcome

__all__ = ["Abandoned", "OnLoss", "Transport"]

OnLoss: TypeAlias = Literal["local", "raise"]
"""What happens to a lane when its cluster is lost: it goes on in this process, or that is an error."""


class Abandoned(Exception):
    """The lane is being closed, so a transport has stopped waiting. It never leaves the lane."""


class Transport(Protocol):
    """Runs batches somewhere. All but `open` is called by one thread, which is the lane's.

    Attributes:
        linger: For how many seconds a lane lets events gather before it hands them over.
    """

    linger: float

    @property
    def largest(self) -> int:
        """How many bytes of events it takes at once, if one of them is not more; that may change."""
        ...

    @property
    def where(self) -> str:
        """Where it runs them, for the report: ``"thread"``, or an address."""
        ...

    def open(self, timeout: float) -> None:
        """Get ready, before training.

        Raises:
            ExecutorError: It cannot; the text says what to do.
        """

    def process(
        self, entries: Sequence[Entry], gate: AbstractContextManager[Any], closing: Callable[[], bool], tally: Tally
    ) -> Outcome:
        """Run a batch, or the first part of it, and return what it gave; what is left is handed over again.

        Records of events that were handed back before may be among it.

        Args:
            entries: The next entries, in order.
            gate: To be held while something happens that a fork must not interrupt.
            closing: Whether to give up.
            tally: Where restarts and replays are counted.

        Raises:
            Abandoned: `closing` said so.
        """
        ...

    def collect(self, closing: Callable[[], bool], tally: Tally) -> None:
        """Bring the state home: the callbacks' attributes are those after all entries so far."""

    def close(self) -> None:
        """Give back what is held."""
