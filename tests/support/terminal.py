"""A terminal, emulated in the process of the tests."""

from __future__ import annotations

import io

import pyte
import pyte.modes

from flowtrain.callbacks.terminal import BottomLine


class Terminal(io.StringIO):
    """A stream into an emulated terminal, which also keeps the lines that have scrolled off.

    Attributes:
        written: All text written to the stream.
        draws: How often the last line was drawn.
    """

    encoding = "utf-8"

    def __init__(self, columns: int = 70, rows: int = 8) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000)
        self.screen.set_mode(pyte.modes.LNM)  # terminal drivers start a new line at the left edge
        self._stream = pyte.Stream(self.screen)
        self.written = ""
        self.draws = 0

    def write(self, text: str) -> int:
        self._stream.feed(text)
        self.written += text
        self.draws += f"\x1b[{self.screen.lines};1H\x1b[2K" in text and "\x1b[r" not in text
        return len(text)

    def isatty(self) -> bool:
        return True

    @property
    def last(self) -> str:
        """The last line of the screen."""
        return self.screen.display[-1].rstrip()

    def above(self, rows: int) -> list[str]:
        """Return all lines since the first output, without the last rows of the screen and blank lines at the end."""
        columns = range(self.screen.columns)
        scrolled = ["".join(row[column].data for column in columns) for row in self.screen.history.top]
        shown = self.screen.display
        lines = [line.rstrip() for line in [*scrolled, *shown[: len(shown) - rows]]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def assert_clean(self) -> None:
        """Assert that no part of a bar is visible and that the terminal has its usual modes."""
        assert BottomLine._holder is None  # pyright: ignore[reportPrivateUsage]  # what a leak would leave
        assert self.screen.margins is None
        assert not self.screen.cursor.hidden
        assert "\x1b[?25l" not in self.written
        assert not any("━" in line or "epoch 1/" in line for line in self.above(0))
