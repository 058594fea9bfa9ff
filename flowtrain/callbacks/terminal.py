"""The terminal that callbacks print to: rich's global console, which is imported when a callback first prints.

A callback that prints declares ``resource.terminal``, so that two callbacks never print at the same time. A progress
bar stays visible while other callbacks print. On a terminal it has the `BottomLine`: the lines above it become the
region that scrolls, as in package managers. So all output appears above the bar, unchanged, from any writer and any
stream: a logging handler that was made earlier, a child process, half a line. rich's ``Live`` and tqdm handle only the
streams that they replace: other output is written into the bar, half a line is lost or broken in two, and rich takes
``[/tmp]`` in half a line for markup and raises. In a notebook the bar has a `CellOutput`.

Training does not depend on its output: where an output cannot be written, as on a full disk, a warning says so.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import os
import random
import warnings
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["BottomLine", "CellOutput", "console", "generator_kept", "place_for", "say"]

_LINE = "\u2500"
"""The line that rich draws under the titles of a table."""

_failed: list[BaseException] = []
"""The first failure of an output, about which the user was warned."""


def console() -> Console:
    """Return rich's global console, which a user may have set up with ``rich.reconfigure``."""
    with generator_kept():
        import rich

        return rich.get_console()


def say(text: str) -> None:
    """Print a text as it is, without markup and line breaks, with "?" for characters that the output cannot write.

    If nothing can be written, because the disk is full or the reader of a pipe has ended, a warning says so, once.
    """
    out = console()
    encoding = _encoding(out)
    try:
        text.encode(encoding)
    except UnicodeError:
        text = text.replace(_LINE, "-").encode(encoding, "replace").decode(encoding)
    with _may_fail(out):
        # Names of metrics may hold brackets, which rich would read as markup. A line is not wrapped, so that a file of
        # the output has one line for each epoch.
        out.print(text, markup=False, highlight=False, soft_wrap=True)


def _encoding(out: Console) -> str:
    # `Console.encoding` is that of UTF-8 for a console that writes to sys.stdout, whatever the encoding of sys.stdout.
    return getattr(out.file, "encoding", None) or "utf-8"


@contextlib.contextmanager
def _may_fail(out: Console) -> Generator[None]:
    """Give a context in which a failure to write ends the output and not the training."""
    try:
        yield
    except (OSError, ValueError, SystemExit) as failure:
        # Newer versions of rich answer a pipe without a reader with an exit of the program, after they have muted the
        # console. A `ValueError` comes from a file that is closed.
        exits = isinstance(failure, SystemExit) and not isinstance(failure.__context__, BrokenPipeError)
        if exits or (isinstance(failure, ValueError) and not out.file.closed):
            raise
        # rich has kept the text, and would write it again before the next one. The end of a capture writes nothing,
        # and may fail as this has.
        with contextlib.suppress(OSError, ValueError, SystemExit), out.capture():
            pass
        if not _failed:
            _failed.append(failure)
            why = failure.__context__ if isinstance(failure, SystemExit) else failure
            warnings.warn(
                f"The output of flowtrain cannot be written ({type(why).__name__}: {why}). Training continues without.",
                RuntimeWarning,
                stacklevel=4,
            )


@contextlib.contextmanager
def generator_kept() -> Generator[None]:
    """Restore Python's random generator after the context, since rich draws from it, even while it is imported."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)


def place_for(console: Console) -> BottomLine | CellOutput | None:
    """Return a place whose content can be replaced; ``None`` if the console can only print lines."""
    return CellOutput(console) if console.is_jupyter else BottomLine.of(console)


class CellOutput:
    """An output of a notebook's cell whose content can be replaced while other outputs are added. It needs no widgets.

    Args:
        console: The console of the notebook.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown: Any = None

    def show(self, content: Callable[[], Any]) -> None:
        """Replace the content by an object that rich can draw in a notebook; `content` returns it."""
        with generator_kept():
            if self._shown is None:
                self._shown = importlib.import_module("IPython.display").display(content(), display_id=True)
            else:
                self._shown.update(content())

    def close(self) -> None:
        """Empty the output."""
        if self._shown is not None:
            self._shown.update({"text/plain": ""}, raw=True)
            self._shown = None


class BottomLine:
    """The last line of a terminal, outside of the region that scrolls while the line shows content.

    There is one such line in a process. The object that shows content takes the line from the object that had it, as
    when a handler trains another learner; the other object takes it back when it shows content again.

    Args:
        console: The terminal.
    """

    _holder: ClassVar[BottomLine | None] = None  # the object that shows its content now

    def __init__(self, console: Console) -> None:
        self.console = console
        self._file = console.file  # kept, because the console may get another file while the terminal stays the same
        self._size: tuple[int, int] | None = None  # columns and lines of the terminal when the region was set

    @classmethod
    def of(cls, console: Console) -> Self | None:
        """Return the last line of a terminal, or ``None`` if the output cannot move its cursor."""
        # With FORCE_COLOR rich takes a file for a terminal, but the user wants only colours in that file.
        only_colours = "FORCE_COLOR" in os.environ and not console.file.isatty()
        able = console.is_interactive and console.is_terminal and not console.legacy_windows and not only_colours
        return cls(console) if able and console.size.height > 2 else None

    def show(self, content: Callable[[], Any]) -> None:
        """Show an object that rich can draw, cut to one line; `content` returns it. The cursor does not move."""
        if BottomLine._holder is not self:
            if BottomLine._holder is not None:
                BottomLine._holder.close()
            BottomLine._holder = self
            atexit.register(self.close)  # otherwise the terminal would keep the smaller region after the program
        width, height = self.console.size
        with generator_kept():
            text = self._render(content(), width)
        with _may_fail(self.console):
            self._file.write(f"{self._reserve(width, height)}\x1b7\x1b[{height};1H\x1b[2K{text}\x1b8")
            self._file.flush()

    def _reserve(self, width: int, height: int) -> str:
        """Return the control sequence that lets only the lines above the last one scroll; empty if they do already."""
        before, self._size = self._size, (width, height)
        if before == self._size:
            return ""
        # Move the cursor down and up: if it was on the last line, this scrolls its line up. Setting the region moves
        # the cursor to the top, so save its position before and restore it after.
        region = f"\x1bD\x1b[A\x1b7\x1b[1;{height - 1}r\x1b8"
        return region if before is None else f"\x1b7\x1b[r\x1b8\x1b[J{region}"  # after a resize, first undo the old one

    def _render(self, content: Any, width: int) -> str:
        from rich.console import Console

        output = io.TextIOWrapper(io.BytesIO(), _encoding(self.console), errors="replace", newline="")
        painter = Console(
            file=output,
            force_terminal=True,
            color_system=self.console.color_system,  # type: ignore[arg-type]  # typed as str; it is a valid name
            no_color=self.console.no_color,
            legacy_windows=False,
            width=width - 1,  # some terminals wrap a line that fills all columns
        )
        painter.print(content, no_wrap=True, overflow="ellipsis", crop=True)
        output.seek(0)
        return output.read().split("\n", 1)[0]

    def close(self) -> None:
        """Clear the line and let the whole terminal scroll again."""
        if BottomLine._holder is self:
            BottomLine._holder = None
            atexit.unregister(self.close)
        if self._size is None:
            return
        height = self._size[1]
        self._size = None
        with contextlib.suppress(OSError, ValueError):  # the terminal may be closed already
            self._file.write(f"\x1b7\x1b[{height};1H\x1b[2K\x1b[r\x1b8")
            self._file.flush()
