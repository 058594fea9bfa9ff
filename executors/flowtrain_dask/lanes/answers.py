"""Answers: what the handlers of a lane write with a lag, from the lane to the training thread that waits for it.

The training thread makes an `Answer` when it puts an event whose handler writes with a lag, and asks for it when the
writes are to arrive. The thread that works on the lane gives the writes once the event is done. It gives none if the
handler has failed or is skipped, and leaves the failure to the training thread first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flowtrain.errors import ExecutorError
from flowtrain.state.arrivals import Changes
from flowtrain_dask.lanes.transport import LaneContext
from flowtrain_dask.lanes.work import BatchResult, Entry

if TYPE_CHECKING:
    from flowtrain_dask.lanes.lane import Lane

__all__ = ["Answer", "Answers"]

_POLL = 0.002
_PATIENCE = 30.0  # seconds for which an answer is waited for while an interrupt waits


class Answer:
    """The late writes of one event of a lane; an `flowtrain.state.arrivals.Awaited`.

    Args:
        lane: The lane.
        number: The number of the result that the writes are for.
        callback: The name of the callback.
        readers: The callbacks that read what the handler writes, for the report.

    Attributes:
        number: The same.
        changes: The writes; ``None`` as long as they are not there, or if there are none to come.
        done: Whether the lane has given its answer.
    """

    def __init__(self, lane: Lane, number: int, callback: str, readers: tuple[str, ...] = ()) -> None:
        self.number = number
        self.changes: Changes | None = None
        self.done = False
        self._lane = lane
        self._callback = callback
        self._readers = readers

    def is_there(self) -> bool:
        """Return whether the lane has answered, or will not answer any more."""
        return self.done or self._lane.refuses

    def get(self) -> Changes | None:
        """Return the writes, after waiting for them; ``None`` if the handler was skipped or its lane has retired.

        Raises:
            ExecutorError: The answer has not come in time after an interrupt.
            Exception: A handler of the lane has failed.
        """
        if not self.is_there():
            with self._lane.answers.waited_for(self._callback, self._readers):
                self._wait()
        if self.changes is None:
            self._lane.raise_failure()
        return self.changes

    def _wait(self) -> None:
        end, pause = 0.0, _POLL / 64
        while not self.is_there():
            if self._lane.answers.stopping() and time.monotonic() > (end := end or time.monotonic() + _PATIENCE):
                raise ExecutorError(
                    f"{self._callback} has not returned {_PATIENCE:g} s after the interrupt, and what it writes with a "
                    f"lag is due now. Resume from the last checkpoint."
                )
            self._lane.wake()
            time.sleep(pause)
            pause = min(2 * pause, _POLL)


class Answers:
    """The answers that a lane owes.

    Args:
        context: The context of the lane, in which waits for it are counted.
        stopping: Returns whether training is about to stop.

    Attributes:
        stopping: The same.
        wanted: Entries before this one are awaited, so the lane does not let events gather.
    """

    def __init__(self, context: LaneContext, stopping: Callable[[], bool]) -> None:
        self._context = context
        self.stopping = stopping
        self.wanted = 0  # the training thread writes this
        self._awaited: dict[int, Answer] = {}

    def expect(self, sequence: int, answer: Answer) -> int:
        """Expect the answer for an entry, which the training thread puts next; return the number of the answer."""
        self._awaited[sequence] = answer
        self.wanted = sequence + 1
        return answer.number

    @contextmanager
    def waited_for(self, callback: str, readers: tuple[str, ...]) -> Generator[None]:
        """Return a context in which training waits for what a handler writes; the wait is counted."""
        begin = time.perf_counter_ns()
        with self._context.wait(f"waits for {callback}"):
            yield
        self._context.counts.answered_late(callback, readers, (time.perf_counter_ns() - begin) * 1e-9)

    def give(self, result: BatchResult) -> None:
        """Give the writes of the entries that are done, each once; the thread that works on the lane calls this."""
        for sequence, changes in result.changes.items():
            if (answer := self._awaited.pop(sequence, None)) is not None:  # an entry may run again for the state
                answer.changes = changes
                answer.done = True

    def give_none(self, entries: Iterable[Entry]) -> None:
        """Say that no writes will come from some entries, which have failed or are skipped."""
        for entry in entries:
            if (answer := self._awaited.pop(entry.sequence, None)) is not None:
                answer.done = True
