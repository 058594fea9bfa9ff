"""Interrupts: Ctrl-C and SIGTERM end a fit at the next batch boundary, in good order; a second one at once.

The first signal only leaves a note. Before the next batch the training thread finds it, takes the checkpoint that was
asked for, and raises `KeyboardInterrupt`, which closes epoch and fit with their events; deferred work is finished for
as long as the executor allows. SIGTERM raises `KeyboardInterrupt` too, so that a script has one thing to catch.

The handlers are there during `fit`, in the main thread, and put back after it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from flowtrain.errors import raise_worst
from flowtrain.training.dispatch import Dispatch

__all__ = ["Interrupts"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """The context of a fit.

    Args:
        dispatch: Where the training thread looks before each batch; its ``stopping`` tells everybody.
        before_leaving: Called on the training thread before it leaves.
    """

    def __init__(self, dispatch: Dispatch, before_leaving: Callable[[], None]) -> None:
        self._dispatch = dispatch
        self._before_leaving = before_leaving
        self._replaced: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None
        self._changing = False  # handlers are being set up or put back: the second signal does not break in

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._changing = True
            for number in _SIGNALS:
                before = signal.getsignal(number)
                # What was set up outside of Python cannot be put back; what the process ignores it goes on to ignore.
                if before is not None and before is not signal.SIG_IGN:
                    self._replaced[number] = before
                    signal.signal(number, self._receive)
            self._changing = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._changing = True
        # That of Ctrl-C is the last to be put back: it may raise here, and nothing is left to do then.
        for number, before in reversed(self._replaced.items()):
            signal.signal(number, before)
        self._dispatch.stopping = False
        if self._received is not None and (failure is None or isinstance(failure, Exception)):
            interrupt = KeyboardInterrupt(_text(self._received))  # too late for the last batch boundary
            raise_worst([interrupt] if failure is None else [failure, interrupt])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if self._received is not None and not self._changing:
            raise KeyboardInterrupt(f"{_text(received)} for the second time")
        if self._received is None:
            self._received = received
            self._dispatch.urgent.append(self._leave)
        self._dispatch.stopping = True

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
