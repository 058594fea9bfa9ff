"""Interrupts: Ctrl-C and SIGTERM end a fit at the next batch boundary, in good order; a second one at once.

The first signal only leaves a note. Before the next batch the training thread finds it, takes the checkpoint that was
asked for, and raises `KeyboardInterrupt`, which closes epoch and fit with their events; deferred work is finished for
as long as the executor allows. SIGTERM raises `KeyboardInterrupt` too, so that a script has one thing to catch.

A terminal and a job manager signal every process of a group, so the workers of a data loader die of the same signal.
For each of them torch raises an error in the main thread, wherever that is: a batch would be left in the middle, with
no state that a checkpoint could hold. So this error waits for the batch boundary, and the interrupt comes before it.
Only where the main thread waits for the worker is the error raised at once, since no data will come.

The handlers are there during `fit`, in the main thread, and put back after it.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

from torch.utils.data._utils import signal_handling

from flowtrain.errors import raise_worst
from flowtrain.graph.executor import Mailbox

__all__ = ["Interrupts"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_PATIENCE = 1.0
"""Seconds for which the error of a dead worker waits for a signal to this process, which may be signalled after it."""


class Interrupts:
    """The context of a fit.

    Args:
        mailbox: Where the training thread looks after each batch; its ``stopping`` tells everybody.
        before_leaving: Called on the training thread before it leaves.
        workers: Whether a data loader has worker processes.
    """

    def __init__(self, mailbox: Mailbox, before_leaving: Callable[[], None], workers: bool) -> None:
        self._mailbox = mailbox
        self._before_leaving = before_leaving
        self._workers = workers
        self._replaced: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None
        self._changing = False  # handlers are being set up or put back: the second signal does not break in

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._changing = True
            if self._workers and hasattr(signal, "SIGCHLD"):
                # torch sets up its handler with the first workers, once in a process, and would put it over this one.
                getattr(signal_handling, "_set_SIGCHLD_handler", bool)()
                self._replace(signal.SIGCHLD, self._child_ended)
            for number in _SIGNALS:
                self._replace(number, self._receive)
            self._changing = False
        return self

    def _replace(self, number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> None:
        before = signal.getsignal(number)
        # What was set up outside of Python cannot be put back; what the process ignores it goes on to ignore.
        if before is not None and before is not signal.SIG_IGN:
            self._replaced[number] = before
            signal.signal(number, handler)

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._changing = True
        with ExitStack() as stack:  # each of them, since the one that is put back may be called, and raise, at once
            for number, before in self._replaced.items():
                stack.callback(signal.signal, number, before)
        self._mailbox.stopping = False
        if self._received is not None and (failure is None or isinstance(failure, Exception)):
            interrupt = KeyboardInterrupt(_text(self._received))  # too late for the last batch boundary
            raise_worst([interrupt] if failure is None else [failure, interrupt])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self._received is not None and not self._changing:
            raise KeyboardInterrupt(f"{_text(received)} for the second time")
        if self._received is None:
            self._received = received
            self._mailbox.put(self._leave)
        self._mailbox.stopping = True

    def _child_ended(self, number: int, frame: FrameType | None) -> None:
        before = self._replaced[signal.SIGCHLD]
        try:
            if callable(before):
                before(number, frame)
        except Exception as failure:  # of torch: a worker has died
            if _waits_for_a_worker(frame):
                self._await_signal()
                raise
            self._mailbox.put(partial(self._fail, failure))

    def _await_signal(self) -> None:
        """Wait a moment for a signal to this process, unless there was one."""
        deadline = time.monotonic() + _PATIENCE
        while self._received is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def _fail(self, failure: Exception) -> None:
        """Raise the error of a dead worker, unless it died of what interrupts training; called at a batch boundary."""
        self._await_signal()
        self._leave()
        raise failure

    def _leave(self) -> None:
        """Leave training; called by the training thread at a batch boundary."""
        if self._received is not None:
            try:
                self._before_leaving()
            except Exception as failure:
                interrupt = KeyboardInterrupt(_text(self._received))
                interrupt.add_note(f"the checkpoint for it could not be taken: {failure}")
                raise interrupt from failure
            raise KeyboardInterrupt(_text(self._received))


def _text(received: signal.Signals) -> str:
    return f"training was interrupted by {received.name}"


def _waits_for_a_worker(frame: FrameType | None) -> bool:
    """Tell whether a thread is in torch's loop that waits for the next batch of worker processes."""
    while frame is not None:
        if frame.f_code.co_name == "_get_data" and frame.f_globals.get("__name__") == "torch.utils.data.dataloader":
            return True
        frame = frame.f_back
    return False
