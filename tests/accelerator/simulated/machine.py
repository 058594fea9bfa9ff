"""The machine: streams of queued work, a schedule that decides when work runs, and the waits of the host.

Host threads submit work to the stream that is current in them, and continue without waiting. Work runs in the order of
its stream, and after the event that its stream was told to wait for; nothing else is promised. The schedule decides
which of the work that may run is run before the host waits for it:

- ``"eager"``: all of it, at once. The order is that of a program without streams.
- ``"lazy"``: none of it. The host reads old values unless it waits.
- ``"side first"``: all of the side streams, none of the main stream (0). A side stream that does not wait for the main
  one comes too early.
- ``"main first"``: all of the main stream, none of the side streams. A main stream that does not wait comes too early.
- a number: some of it, drawn from random numbers of this seed.
"""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from tests.accelerator.simulated.clocks import Clock, Use, Uses, merge

__all__ = ["SCHEDULES", "DeviceFailure", "Machine", "Schedule", "Wait", "Work"]

Schedule: TypeAlias = Literal["eager", "lazy", "side first", "main first"] | int

SCHEDULES: tuple[Schedule, ...] = ("eager", "lazy", "side first", "main first", 1, 2, 3)
"""All kinds of schedules, and three seeds."""

Wait: TypeAlias = Literal["item", "value", "copy", "pageable", "event", "stream", "device"]
"""The kinds of waits of the host:

- ``"item"`` is a wait for a number;
- ``"value"`` is a wait for a result whose size depends on values;
- ``"copy"`` is a wait for a copy;
- ``"pageable"`` is a wait for a copy that would not have been one with pinned memory;
- ``"event"``, ``"stream"`` and ``"device"`` are waits for an event, for a stream, and for all streams.
"""

_INTERNALS: Any = vars(torch)["_C"]
_AUTOCAST = _INTERNALS.DispatchKeySet(_INTERNALS.DispatchKey.AutocastCPU)
_NO_MODES: tuple[Callable[[], Any], ...] = (
    _INTERNALS.DisableTorchFunction,
    _INTERNALS._DisableTorchDispatch,
    lambda: _INTERNALS._ExcludeDispatchKeyGuard(_AUTOCAST),
    lambda: torch.inference_mode(False),
    torch.no_grad,
)


if TYPE_CHECKING:
    _AcceleratorError = RuntimeError
else:
    _AcceleratorError = getattr(torch, "AcceleratorError", RuntimeError)  # torch 2.8


class DeviceFailure(_AcceleratorError):
    """Work failed while it ran. Like an accelerator's, the failure comes up at a later call, and stays."""


class Work:
    """One piece of work of a stream.

    Args:
        use: Its name, its stream and its number there.
        run: The function that does the work; ``None`` for a mark in the stream.
        after: Work of another stream that must be done before this work.
        clock: For each stream, the number up to which its work is done when this work is done.

    Attributes:
        count: How much of the stream's work, marks left out, was submitted up to this one.
    """

    __slots__ = ("after", "clock", "count", "done", "run", "use")

    def __init__(self, use: Use, run: Callable[[], object] | None, after: Work | None, clock: Clock) -> None:
        self.use = use
        self.run = run
        self.after = after
        self.clock = clock
        self.count = 0
        self.done = False


class Machine:
    """A device with any number of streams; stream 0 is the main one, which is current in every new thread.

    Attributes:
        lock: Held while anything is submitted, waited for, or given memory.
        waits: How often the host has waited, by kind.
        slack: For each wait for an event, how much work, marks left out, its stream had got after the event: 0 is a
            wait for everything that the stream has to do.
        ran: How many pieces of work were submitted, by stream and name.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.waits: Counter[Wait] = Counter()
        self.slack: list[int] = []
        self.ran: Counter[tuple[int, str]] = Counter()
        self._thread = threading.local()
        self._queues: defaultdict[int, deque[Work]] = defaultdict(deque)
        self._numbers: Counter[int] = Counter()
        self._counts: Counter[int] = Counter()
        self._clocks: defaultdict[int, Clock] = defaultdict(dict)
        self._begun: Clock = {}
        self._schedule: Schedule = "eager"
        self._random = random.Random(0)
        self._failure: Exception | None = None
        self._fails_in: int | None = None

    def begin(self, schedule: Schedule) -> None:
        """Finish all work, forget counts and failures, and run later work by a schedule.

        The main stream becomes the current one of the calling thread; other threads keep theirs.
        """
        with self.lock:
            self._fails_in = None
            self._finish(list(self._queues))
            self._failure = None
            self._begun = dict(self._numbers)
            self.current_stream = 0
            self._schedule, self._random = schedule, random.Random(str(schedule))
            self.forget_counts()

    def forget_counts(self) -> None:
        """Count from nothing again."""
        self.waits, self.slack, self.ran = Counter(), [], Counter()

    def fail_after(self, count: int) -> None:
        """Let the device fail once it has done `count` more pieces of work."""
        with self.lock:
            self._fails_in = count

    @property
    def current_stream(self) -> int:
        """The stream of the calling thread."""
        return int(getattr(self._thread, "stream", 0))

    @current_stream.setter
    def current_stream(self, stream: int) -> None:
        self._thread.stream = stream

    def submit(
        self,
        name: str,
        run: Callable[[], object] | None = None,
        reads: Iterable[Uses] = (),
        writes: Iterable[Uses] = (),
        *,
        stream: int | None = None,
        after: Work | None = None,
        past: Iterable[Work] = (),
    ) -> Work:
        """Queue work, and return it at once.

        Args:
            name: The name of the work, for the messages of races.
            run: The function that does the work, called without any mode of torch; ``None`` for a mark in the stream.
            reads: The memory that it reads.
            writes: The memory that it writes.
            stream: The stream; the current one of the thread, if not given.
            after: Work of another stream that must be done before this work.
            past: Work of other streams that was seen to be done.

        Raises:
            Race: Nothing orders it and another use of the same memory.
            DeviceFailure: The device has failed.
        """
        with self.lock:
            self._raise_failure()
            stream = self.current_stream if stream is None else stream
            self._numbers[stream] += 1
            use = Use(name, stream, self._numbers[stream])
            clock = self._clocks[stream]
            merge(clock, self._begun)
            merge(clock, self._known())
            for other in past if after is None else (after, *past):
                merge(clock, other.clock)
            clock[stream] = use.number
            for memory in reads:
                memory.read(use, clock)
            for memory in writes:
                memory.write(use, clock)
            work = Work(use, run, after, dict(clock))
            self._counts[stream] += run is not None
            work.count = self._counts[stream]
            self._queues[stream].append(work)
            self.ran[stream, name] += 1
            self._advance()
            return work

    def wait(self, work: Work, kind: Wait) -> None:
        """Let the host wait for work.

        Raises:
            DeviceFailure: The device has failed.
        """
        with self.lock:
            self.waits[kind] += 1
            if kind == "event":
                self.slack.append(self._counts[work.use.stream] - work.count)
            self._run_until(work)

    def wait_for_all(self) -> None:
        """Let the host wait for all streams."""
        with self.lock:
            self.waits["device"] += 1
            for stream in list(self._queues):
                self._run_until(self.submit("mark", stream=stream))

    def _run_until(self, work: Work) -> None:
        """Run what must run for some work to be done, and note that the calling thread knows it to be done."""
        todo: list[Work] = []
        self._collect(work, todo)
        self._run(todo)
        merge(self._known(), work.clock)
        self._raise_failure()

    def is_idle(self, stream: int) -> bool:
        """Tell whether all work of a stream is done."""
        return not self._queues[stream]

    def _known(self) -> Clock:
        """Return the clock of the calling thread: all work that the thread has waited for."""
        return self._thread.__dict__.setdefault("known", {})  # type: ignore[no-any-return]  # a dict

    def _advance(self) -> None:
        """Run the work that the schedule runs before the host waits."""
        todo: list[Work] = []
        while (stream := self._next_stream()) is not None:
            todo.append(self._take(stream))
        self._run(todo)

    def _next_stream(self) -> int | None:
        ready = [
            stream
            for stream, queue in sorted(self._queues.items())
            if queue and (queue[0].after is None or queue[0].after.done)
        ]
        if self._schedule == "lazy":
            return None
        if self._schedule == "side first":
            ready = [stream for stream in ready if stream != 0]
        elif self._schedule == "main first":
            ready = [stream for stream in ready if stream == 0]
        elif self._schedule != "eager" and self._random.random() < 0.5:
            return None
        return self._random.choice(ready) if ready else None

    def _take(self, stream: int) -> Work:
        """Take the first work of a stream; it counts as done, since the lock is held until it is."""
        work = self._queues[stream].popleft()
        work.done, work.after = True, None
        return work

    def _collect(self, work: Work, todo: list[Work]) -> None:
        """Take all work that must run for some work to be done, in an order in which it may run."""
        while not work.done:
            first = self._queues[work.use.stream][0]
            if first.after is not None:
                self._collect(first.after, todo)
            todo.append(self._take(work.use.stream))

    def _finish(self, streams: Iterable[int]) -> None:
        todo: list[Work] = []
        for stream in streams:
            while self._queues[stream]:
                self._collect(self._queues[stream][-1], todo)
        self._run(todo)

    def _run(self, todo: list[Work]) -> None:
        """Run work without the modes of torch that are set in this thread: they are the caller's, not the device's."""
        if not any(work.run for work in todo):
            return
        with ExitStack() as modes:
            for mode in _NO_MODES:
                modes.enter_context(mode())
            self._run_all(todo)

    def _run_all(self, todo: list[Work]) -> None:
        for work in todo:
            run, work.run = work.run, None  # the function holds the memory that the work uses
            if run is None or self._failure is not None:
                continue
            try:
                if self._fails_in is not None:
                    self._fails_in -= 1
                    if self._fails_in < 0:
                        raise RuntimeError(f"the device was told to fail at {work.use.name}")
                run()
            except Exception as error:
                self._failure = error

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise DeviceFailure(f"The device has failed: {self._failure}") from self._failure
