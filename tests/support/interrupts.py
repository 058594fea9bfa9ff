"""Ctrl-C at every instruction of a piece of code, one instruction after the other.

When a signal comes, Python only notes it, and calls its handler at the next check: at the beginning of a function,
after a call, and where a loop begins its next round. So a test sends a real signal before every single instruction that
the code executes, and Python raises `KeyboardInterrupt` at the places where a user's Ctrl-C can raise it.
"""

from __future__ import annotations

import _thread
import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["interrupted"]

_HANGS = 20.0
"""Seconds after which code hangs: another interrupt ends its wait."""


class _Signal(int):
    """The number of a signal. Its attribute `sent` sends it without a Python call, after which Python would check."""

    sent = property(_thread.interrupt_main)


def interrupted(act: Callable[[], object], *within: str) -> Iterator[bool]:
    """Call a function again and again, with an interrupt before one more instruction each time.

    Yields after each call, in which the interrupt came, whether `KeyboardInterrupt` was raised, so that the test can
    look at what is left. The interrupt comes in the main thread. Ends when the function has no further instruction.

    Args:
        act: The function.
        within: The ends of the names of the files whose instructions count, such as ``"parallel/firing.py"``.

    Raises:
        AssertionError: The function did not end within 20 seconds after the interrupt.
    """
    number = 0
    while True:
        number += 1
        came, raised = _interrupt_once(act, number, within)
        if not came:
            return
        yield raised


def _interrupt_once(act: Callable[[], object], number: int, within: tuple[str, ...]) -> tuple[bool, bool]:
    left, hung = number, threading.Event()
    send = _Signal(signal.SIGINT)

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if event == "call":
            if left <= 0 or not frame.f_code.co_filename.endswith(within):
                return None
            frame.f_trace_opcodes = True
            frame.f_trace = trace  # Python 3.13 begins with opcodes when a frame has both attributes
        elif event == "opcode":
            left -= 1
            if left == 0:
                sys.settrace(None)  # otherwise Python would check for signals at every call of this function
                send.sent  # noqa: B018  # followed by the return alone, which does not look for signals
        return trace

    def end() -> None:
        hung.set()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    collecting = gc.isenabled()
    gc.disable()  # what is raised in a callback of the collector, such as hypothesis has one, goes no further
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = sys.gettrace()
    watch = threading.Timer(_HANGS, end)
    watch.daemon = True
    watch.start()
    try:
        # Python 3.12 traces opcodes only if a frame has asked for it before.
        sys._getframe().f_trace_opcodes = True  # pyright: ignore[reportPrivateUsage]  # documented
        sys.settrace(trace)
        act()
        sys.settrace(before)  # this call makes Python check: an interrupt that is still pending is raised here
        raised = False
    except KeyboardInterrupt:
        raised = True
    finally:
        sys.settrace(before)
        watch.cancel()
        left_handler = signal.signal(signal.SIGINT, handler)
        if collecting:
            gc.enable()
    assert left_handler is signal.default_int_handler, f"interrupt before instruction {number}: another handler is left"
    assert not hung.is_set(), f"the function hangs after an interrupt before instruction {number}"
    return left <= 0, raised
