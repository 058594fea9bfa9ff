"""Interrupts: Ctrl-C and SIGTERM end a fit at the next batch boundary; a second signal ends it at once.

The first signal only puts a call into the mailbox; if a callback prints, a line says at once that training will stop.
Before the next batch the training thread makes that call: it takes the checkpoint that was requested for this case and
raises `KeyboardInterrupt`, which closes epoch and fit with their events; deferred work is finished for as long as the
executor allows. SIGTERM raises `KeyboardInterrupt` too, so that a script has one exception to catch.

A terminal or a job manager signals every process of a group, so the workers of a data loader die of the same signal.
For each dead worker torch raises an error at any line of the main thread, even within a batch, where no checkpoint can
be taken. Therefore this error waits for the batch boundary too, and the interrupt is raised before it. Only if the main
thread is waiting for a batch of the dead worker is the error raised at once, since that batch will never come.

A second signal waits for the next instruction at which Python looks for signals if it comes while a context is entered
or left: an exception there would leave a generator of `contextlib` neither entered nor closed, with the modes that it
has set.

The signal handlers are installed during `fit`, only in the main thread, and the earlier ones are restored after it.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any, Self

from torch.utils.data._utils import signal_handling

from flowtrain.errors import CancelFittingException, text_of
from flowtrain.graph.executor import Mailbox
from flowtrain.training.checkpoint.remote import Place
from flowtrain.training.failures import Failures

__all__ = ["Interrupts", "why_stopped"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

_PATIENCE = 1.0
"""Seconds for which the error of a dead worker waits for a signal to this process, which may arrive a little later."""


class _Signal(int):
    """The number of a signal. Its attribute `again` sends it without a call, after which Python would look for it."""

    again = property(_thread.interrupt_main)


class Interrupts:
    """A context in which signals end the fit at a batch boundary.

    Args:
        mailbox: The calls that the training thread makes after each batch. Its ``stopping`` is true from the first
            signal until the fit has ended, so that a thread that waits can give up.
        before_leaving: Called on the training thread at the batch boundary, before `KeyboardInterrupt` is raised.
        workers: Whether a data loader has worker processes.
        answers: Whether to write a line to the standard error output when the first signal comes.
        hold: Called, in the signal handler, with the function that ends the fit at a batch boundary; by default it goes
            into the mailbox.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        before_leaving: Callable[[], None],
        workers: bool,
        answers: bool = False,
        hold: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self._mailbox = mailbox
        self._hold = hold or mailbox.put
        self._answers = answers
        self._before_leaving = before_leaving
        self._workers = workers
        self._replaced: dict[signal.Signals, Any] = {}
        self._received: signal.Signals | None = None
        self._changing = False  # signal handlers are being replaced, and a second signal must not raise in between

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._changing = True
            try:
                for number in _SIGNALS:  # SIGINT first: from then on Ctrl-C raises nothing here
                    self._replace(number, self._receive)
                if self._workers and hasattr(signal, "SIGCHLD"):
                    # Torch installs its handler once in a process, with the first workers, and would replace this one.
                    getattr(signal_handling, "_set_SIGCHLD_handler", bool)()
                    self._replace(signal.SIGCHLD, self._child_ended)
            except BaseException:  # raised by a handler that was still in place
                self._restore()
                raise
            self._changing = False
        return self

    def _replace(self, number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> None:
        before = signal.getsignal(number)
        # A handler of C code (None) could not be restored, and a signal that the process ignores stays ignored.
        if before is not None and before is not signal.SIG_IGN:
            self._replaced[number] = before
            signal.signal(number, handler)

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._changing = True
        self._restore()
        if self._received is not None and (failure is None or isinstance(failure, Exception)):
            interrupt = KeyboardInterrupt(_text(self._received))  # the signal came after the last batch boundary
            failures = Failures(interrupt) if failure is None else Failures(failure, interrupt)
            failures.raise_worst()

    def _restore(self) -> None:
        """Install the earlier handlers again, that of SIGINT last."""
        with ExitStack() as stack:  # a restored handler may be called and raise at once; the others are restored then
            for number, before in self._replaced.items():
                stack.callback(signal.signal, number, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM: the first one is noted, the second one raises."""
        received = signal.Signals(number)
        if self._received is not None and not self._changing:
            code = None if frame is None else frame.f_code
            if code is not None and (code.co_filename == contextlib.__file__ or code is Interrupts.__exit__.__code__):
                _Signal(number).again  # noqa: B018  # Python calls this handler again when it next looks for signals
                return
            raise KeyboardInterrupt(f"{_text(received)} for the second time")
        if self._received is None:
            self._received = received
            self._hold(self._leave)
            if self._answers:
                _answer(received)
        self._mailbox.stop_waiting()

    def _child_ended(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGCHLD: call the earlier handler, and let its error wait for the batch boundary."""
        before = self._replaced[signal.SIGCHLD]
        try:
            if callable(before):
                before(number, frame)
        except Exception as failure:  # torch's handler raises if a worker has died
            if _waits_for_a_worker(frame):
                self._await_signal()
                raise
            self._hold(partial(self._fail, failure))

    def _await_signal(self) -> None:
        """Wait until this process has received a signal too, at most for `_PATIENCE`."""
        deadline = time.monotonic() + _PATIENCE
        while self._received is None and time.monotonic() < deadline:
            time.sleep(0.01)

    def _fail(self, failure: Exception) -> None:
        """Raise the error of a dead worker at a batch boundary, or `KeyboardInterrupt` if a signal came as well."""
        self._await_signal()
        self._leave()
        raise failure

    def _leave(self) -> None:
        """Raise `KeyboardInterrupt` at a batch boundary, after `before_leaving`, if a signal has come."""
        if self._received is not None:
            try:
                self._before_leaving()
            except Exception as failure:
                interrupt = KeyboardInterrupt(_text(self._received))
                interrupt.add_note(f"the checkpoint for it could not be taken: {text_of(failure)}")
                raise interrupt from failure
            raise KeyboardInterrupt(_text(self._received))

    @staticmethod
    def short(failure: BaseException) -> None:
        """Remove the traceback of an interrupt that was raised at a batch boundary: all its frames are of the loop.

        The frames of any other exception stay, as those of a second interrupt, which was raised within a batch.
        """
        frames = failure.__traceback__
        while frames is not None and frames.tb_next is not None:
            frames = frames.tb_next
        if frames is not None and frames.tb_frame.f_code is Interrupts._leave.__code__:
            failure.__traceback__ = None


def why_stopped(why: BaseException | None, saved: Sequence[Place]) -> str:
    """Return why a cancel or an interrupt has ended a fit, and where, in one line; an empty string without one.

    Args:
        why: The first failure of the fit.
        saved: The checkpoints that an interrupt has taken. The interrupt gets a note that names them.
    """
    if not isinstance(why, (CancelFittingException, KeyboardInterrupt)):
        return ""
    if isinstance(why, KeyboardInterrupt) and saved:
        files = " and ".join(map(str, saved))
        why.add_note(f"saved in {files}: fit(..., resume={str(saved[0].parent)!r}) continues from there")
    text, notes = str(why), list(getattr(why, "__notes__", ()))
    if not text:
        return ", ".join([type(why).__name__, *notes])
    if not notes or re.search(r"\bepoch \d", text):  # a text that names the epoch says where it was
        return text
    return f"{text} ({'; '.join(notes)})"


def _answer(received: signal.Signals) -> None:
    """Say that training will stop.

    The line is written to the file of the process, since the signal may have come while Python writes to a stream,
    which must not be entered again.
    """
    again = "; press it again to stop at once" if received is signal.SIGINT else ""
    name = "Ctrl-C" if received is signal.SIGINT else received.name
    with suppress(OSError):  # the terminal may be closed
        line = "\n" if os.isatty(2) else ""  # a terminal shows ^C on the line of the cursor
        os.write(2, f"{line}{name}: training stops after this batch{again}.\n".encode())


def _text(received: signal.Signals) -> str:
    return f"training was interrupted by {received.name}"


def _waits_for_a_worker(frame: FrameType | None) -> bool:
    """Tell whether a stack of frames is within torch's loop that waits for the next batch of a worker process."""
    while frame is not None:
        if frame.f_code.co_name == "_get_data" and frame.f_globals.get("__name__") == "torch.utils.data.dataloader":
            return True
        frame = frame.f_back
    return False
