"""The program that formats the trace events of a timeline, in a process of its own.

Formatting a trace event takes about 1 us of the interpreter's lock, and a step has dozens of them. In the process that
trains, training would wait for each. So `flowtrain.diagnostics.trace_file.TraceWriter` only packs numbers, and this
program makes text of them. It is run by its path and imports the standard library alone, so that it starts in some 20
ms, without torch.

Its standard input has messages, packed by `marshal`, and its standard output is the file. When it ends, it writes one
line to its standard error: how many times it has left out, and why it could not write the rest, if that is so. It ends
with the message ``None``, or when the process that trains has died. Either way the file gets its last line.
"""

from __future__ import annotations

import json
import marshal
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeAlias

__all__ = ["Message", "TraceFormatter", "main"]

Message: TypeAlias = "tuple[list[str], dict[int, str], list[Any]]"
"""Whole trace events, the templates of further trace events by number, and rows, one after the other in one list.

A row has four entries: the number of a template or a template that is used once, the begin and the end in ns, and
further values: the numbers of an epoch and a batch, the text of further arguments, or ``None``. A template has four
places for numbers: the whole microseconds of the begin and the rest in ns, and the same of the duration.
"""

_TOGETHER = 200
"""How many trace events are written at once, and so the most by which a file exceeds its limit."""


class TraceFormatter:
    """Appends trace events to a file.

    Args:
        file: The descriptor of the file, which is open for appending.
        zero: The ns of the clock at which the times of the file begin.
        limit: The most bytes of the file; later rows are left out.
        pid: The number of the process in the file that tells of rows left out.

    Attributes:
        dropped: How many rows were left out.
    """

    def __init__(self, file: int, zero: int, limit: int, pid: int) -> None:
        self.dropped = 0
        self._file, self._zero, self._limit, self._pid = file, zero, limit, pid
        self._last = zero  # the end of the last row that is in the file
        self._size = os.fstat(file).st_size
        self._templates: dict[int, str] = {}

    def take(self, message: Message) -> None:
        """Append the trace events of a message.

        Raises:
            OSError: The file cannot be written. It has as many trace events as fit.
        """
        texts, templates, rows = message
        self._templates.update(templates)
        self._append(texts)
        for start in range(0, len(rows), 4 * _TOGETHER):
            part = rows[start : start + 4 * _TOGETHER]
            if self._size > self._limit:
                self.dropped += len(part) // 4
            else:
                self._append([*self._formatted(part)])

    def close(self) -> None:
        """Append the end of the file, and how many times are not in it.

        Raises:
            OSError: The file cannot be written.
        """
        if self.dropped:
            text = f"{self.dropped:,} times after this are not in the file, which has reached its limit"
            at = (self._last - self._zero) / 1000
            instant = {"name": text, "ph": "i", "s": "p", "ts": at, "pid": self._pid, "tid": 0}
            self._append([",\n" + json.dumps(instant)])
        self._append(["\n]\n"])

    def _formatted(self, rows: Sequence[Any]) -> Iterator[str]:
        """Yield the text of each trace event."""
        zero, templates, fields = self._zero, self._templates, iter(rows)
        for number, begin, end, args in zip(fields, fields, fields, fields, strict=True):
            at, took, self._last = begin - zero, end - begin, end
            template: str = templates[number] if isinstance(number, int) else number
            text = template % (at // 1000, at % 1000, took // 1000, took % 1000)
            if args is None:
                yield text
            else:
                more = args if isinstance(args, str) else f'"epoch": {args[0]}, "batch": {args[1]}'
                yield f"{text[:-2]}{'' if text.endswith('{}}') else ', '}{more}}}}}"

    def _append(self, parts: Sequence[str]) -> None:
        """Append whole trace events; if they do not all fit, as many as do."""
        try:
            self._write("".join(parts).encode())
        except OSError:
            for part in parts:
                self._write(part.encode())

    def _write(self, data: bytes) -> None:
        """Append bytes, or none of them if they do not fit."""
        written = 0
        try:
            while written < len(data):
                written += os.write(self._file, data[written:])
        except OSError:
            os.ftruncate(self._file, self._size)
            raise
        self._size += written


def _messages(source: BinaryIO) -> Iterator[Any]:
    """Yield the messages up to the last one, or as many as there are if the process that trains has died."""
    try:
        while (message := marshal.load(source)) is not None:
            yield message
    except (EOFError, TypeError, ValueError):  # cut off between two messages, or within one
        return


def main(arguments: Sequence[str]) -> Mapping[str, Any]:
    """Format what the standard input has, and return the number of times that were left out, and the error if any.

    Args:
        arguments: The last three arguments of `TraceFormatter`.
    """
    zero, limit, pid = map(int, arguments)
    formatter, error = TraceFormatter(sys.stdout.fileno(), zero, limit, pid), ""
    try:
        for message in _messages(sys.stdin.buffer):
            formatter.take(message)
        formatter.close()
    except OSError as failure:
        error = failure.strerror or str(failure)
    return {"dropped": formatter.dropped, "error": error}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])), file=sys.stderr, flush=True)
