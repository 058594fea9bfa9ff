"""The terminal that callbacks print to: rich's own console, imported when there is something to print.

A callback that prints declares ``resource.terminal``, so that two never print at the same time. A progress bar stays
in sight while others print. On a terminal it has the `BottomLine`: the lines above it become the region that scrolls,
as when a package manager installs. So all output goes above it, unchanged, whoever writes it and through whichever
stream: a logging handler that was made before, a child process, half a line. rich's ``Live`` and tqdm know only the
streams that they replace: other output is written into the bar, half a line is lost or broken in two, and rich takes
``[/tmp]`` in one for markup and raises. In a notebook the bar has a `CellOutput`.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import os
import random
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["BottomLine", "CellOutput", "console", "generator_kept", "place_for"]


def console() -> Console:
    """Return rich's global console, which a user may have set up with ``rich.reconfigure``."""
    with generator_kept():
        import rich

        return rich.get_console()


@contextlib.contextmanager
def generator_kept() -> Generator[None]:
    """Keep Python's generator as it is: rich draws from it, already when imported, and printing must change no run."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)


def place_for(console: Console) -> BottomLine | CellOutput | None:
    """Return where something can be shown and shown anew, or ``None`` where all that can be done is to print."""
    return CellOutput(console) if console.is_jupyter else BottomLine.of(console)


class CellOutput:
    """One output of a notebook's cell, which changes while others are added. It needs no widgets.

    Args:
        console: The console of the notebook.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown: Any = None

    def show(self, content: Callable[[], Any]) -> None:
        """Show something that rich can draw in a notebook."""
        with generator_kept():
            if self._shown is None:
                self._shown = importlib.import_module("IPython.display").display(content(), display_id=True)
            else:
                self._shown.update(content())

    def close(self) -> None:
        """Leave the output empty."""
        if self._shown is not None:
            self._shown.update({"text/plain": ""}, raw=True)
            self._shown = None


class BottomLine:
    """The last line of a terminal, kept out of what scrolls while something is shown on it.

    There is one such line, so showing something takes it from whoever had it, as when a handler trains another
    learner; the other one takes it back when it next has something to show.

    Args:
        console: The terminal.
    """

    _holder: ClassVar[BottomLine | None] = None

    def __init__(self, console: Console) -> None:
        self.console = console
        self._file = console.file  # may be replaced meanwhile; the terminal is the same
        self._size: tuple[int, int] | None = None

    @classmethod
    def of(cls, console: Console) -> Self | None:
        """Return the last line of a terminal, or ``None`` where the output is none that can move its cursor."""
        # FORCE_COLOR makes rich take a file for a terminal; it asks for colours, not for a cursor that moves.
        only_colours = "FORCE_COLOR" in os.environ and not console.file.isatty()
        able = console.is_interactive and console.is_terminal and not console.legacy_windows and not only_colours
        return cls(console) if able and console.size.height > 2 else None

    def show(self, content: Callable[[], Any]) -> None:
        """Show something that rich can draw, cut to one line. The cursor stays where it is."""
        if BottomLine._holder is not self:
            if BottomLine._holder is not None:
                BottomLine._holder.close()
            BottomLine._holder = self
            atexit.register(self.close)  # a terminal must not keep a smaller region when the program has ended
        width, height = self.console.size
        with generator_kept():
            text = self._render(content(), width)
        self._file.write(f"{self._reserve(width, height)}\x1b7\x1b[{height};1H\x1b[2K{text}\x1b8")
        self._file.flush()

    def _reserve(self, width: int, height: int) -> str:
        """Return what makes the lines above the last one the region that scrolls; nothing if they are already."""
        before, self._size = self._size, (width, height)
        if before == self._size:
            return ""
        # Down and up again: if the cursor is on the last line, its line moves up. Setting a region moves the cursor
        # to its top, so the position is saved around it.
        region = f"\x1bD\x1b[A\x1b7\x1b[1;{height - 1}r\x1b8"
        return region if before is None else f"\x1b7\x1b[r\x1b8\x1b[J{region}"  # the window has another size now

    def _render(self, content: Any, width: int) -> str:
        from rich.console import Console

        output = io.TextIOWrapper(io.BytesIO(), self.console.encoding, errors="replace", newline="")
        painter = Console(
            file=output,
            force_terminal=True,
            color_system=self.console.color_system,  # type: ignore[arg-type]  # a str; one of those it takes
            no_color=self.console.no_color,
            legacy_windows=False,
            width=width - 1,  # a full line would wrap on some terminals
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
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone needs no cleaning
            self._file.write(f"\x1b7\x1b[{height};1H\x1b[2K\x1b[r\x1b8")
            self._file.flush()
