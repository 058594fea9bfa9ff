"""Trace files: the stamps of a clock as trace events, which Perfetto and Chrome show.

The format is that of https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU (trace events),
in its form as an array: a file that lacks its end opens as well. `TraceWriter` takes the stamps out of a clock on a
thread of its own, and packs them for a process of its own, which formats them and appends them to the file
(`flowtrain.diagnostics.trace_formatter`). `join` makes one file of several, such as those of several ranks and of
``torch.profiler``.
"""

from __future__ import annotations

import json
import logging
import marshal
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowtrain.diagnostics import trace_formatter
from flowtrain.errors import LoggingError, UsageError
from flowtrain.graph.clock import Clock, Mark, Stamp, TimelineRow

__all__ = ["TraceWriter", "join", "read_trace"]

_logger = logging.getLogger("flowtrain")

_PAUSE = 0.05
"""Seconds between two looks for new stamps, which are what a kill loses."""

_TOGETHER = 1000
"""How many stamps are packed before other threads get a turn: about 0.3 ms of the interpreter's lock."""

_BEHIND = 20_000
"""With more stamps than this in memory the thread no longer pauses between them."""

_FIRST_WORKER = 1000
"""Processes of workers are numbered from here, after the process that trains, which has the number of its rank + 1."""


class TraceWriter:
    """Writes the stamps of a clock to a file, on a thread, until `close`.

    Args:
        clock: The clock.
        path: The file. If it exists, the first of ``name-2``, ``name-3`` and so on that does not is made.
        rank: The number of this process among those that train together.
        limit: The most bytes of the file; later stamps are left out, and the file says so.
        about: Values that the file records about itself.

    Raises:
        OSError, ValueError or LoggingError: The file cannot be made.

    Attributes:
        path: The file that was made.
        dropped: How many stamps were left out.
    """

    def __init__(self, clock: Clock, path: Path, rank: int, limit: int, about: Mapping[str, Any]) -> None:
        self.path = _make(path)
        self.dropped = 0
        self._clock, self._pid = clock, rank + 1
        zero, unix = _now()
        self._process: subprocess.Popen[bytes] | None = self._start(zero, limit)
        self._numbers: dict[tuple[Mark, int | TimelineRow], int] = {}  # the numbers of templates
        self._lines: dict[int | TimelineRow, tuple[int, int]] = {}  # the numbers of process and thread of each track
        self._processes: dict[str, int] = {}
        self._ended = threading.Event()
        begin = [
            *self._name_process(self._pid, f"rank {rank} (process {os.getpid()})"),
            {"name": "clock", "ph": "M", "pid": self._pid, "args": {"unix_ns": unix, **about}},
        ]
        self._send((["[" + ",\n".join(map(json.dumps, begin))], {}, []))
        self._thread = threading.Thread(target=self._run, name="flowtrain-timeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Write the stamps that are left, and end the file."""
        self._ended.set()
        self._thread.join()

    def _start(self, zero: int, limit: int) -> subprocess.Popen[bytes]:
        """Start the process that formats trace events and appends them to the file."""
        try:
            if not sys.executable or getattr(sys, "frozen", False):
                raise LoggingError("it needs a Python interpreter, and this program has none that it could start")
            program = [sys.executable, "-I", "-S", str(Path(trace_formatter.__file__).absolute())]
            pipe, numbers = subprocess.PIPE, map(str, (zero, limit, self._pid))
            with self.path.open("ab") as file:  # in a session of its own, so that an interrupt reaches training alone
                return subprocess.Popen(
                    [*program, *numbers], stdin=pipe, stdout=file, stderr=pipe, start_new_session=True
                )
        except BaseException:
            self.path.unlink()
            raise

    def _run(self) -> None:
        while not self._ended.wait(_PAUSE):
            self._take()
        self._take()
        self._send(None)
        self._end()

    def _take(self) -> None:
        """Take out the stamps that are there now, and have them written."""
        stamps = self._clock.stamps
        left = len(stamps)
        while left:
            taken = [stamps.popleft() for _ in range(min(left, _TOGETHER))]
            left -= len(taken)
            self._send(self._packed(taken))
            if left < _BEHIND:
                time.sleep(0.001)

    def _packed(self, taken: Sequence[Stamp]) -> trace_formatter.Message:
        """Return stamps as a message, and note the times of handlers."""
        numbers, texts, templates, rows = self._numbers, list[str](), dict[int, str](), list[Any]()
        for mark, begin, end, track, args in taken:
            if mark.seconds is not None:
                mark.seconds.append((end - begin) * 1e-9)
            template: int | str | None = numbers.get((mark, track))
            if template is None:
                template = self._template(mark, track, texts)
                if mark.seconds is not None or mark.kind in ("part", "batch"):  # other marks have one stamp each
                    number = numbers[mark, track] = len(numbers)
                    templates[number], template = template, number
            if args is not None and not isinstance(args, tuple):
                args = json.dumps(dict(args), default=str)[1:-1] or None  # type: ignore[assignment]  # as text
            rows += (template, begin, end, args)
        return texts, templates, rows

    def _send(self, message: trace_formatter.Message | None) -> None:
        """Hand a message over to the process that formats; if this has ended, nothing more is written."""
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(marshal.dumps(message))
            self._process.stdin.flush()
        except OSError:
            self._end()

    def _end(self) -> None:
        """Wait for the end of the process that formats, and log its error if it had one."""
        process, self._process = self._process, None
        if process is None or process.stdin is None or process.stderr is None:
            return
        said = process.stderr.readline()  # not all of it: a process that was forked meanwhile may hold the other end
        with suppress(OSError):
            process.stdin.close()
        process.stderr.close()
        code = process.wait()
        try:
            report = json.loads(said)
            self.dropped, error = report["dropped"], report["error"]
        except ValueError:
            error = f"the process that formats it has ended with code {code}"
        if error:
            _logger.warning(
                "flowtrain: the timeline %s ends here, since it cannot be written: %s. What it has can be opened; "
                "training is not affected.",
                self.path,
                error,
            )

    # --- names and numbers of the lines of a timeline

    def _template(self, mark: Mark, track: int | TimelineRow, texts: list[str]) -> str:
        """Return the text of a trace event of a mark on a track, up to its numbers; a new track is named in `texts`."""
        if track not in self._lines:
            texts += [",\n" + json.dumps(each) for each in self._begin_line(track, mark.kind)]
        pid, tid = self._lines[track]
        head = json.dumps({"name": mark.name, "cat": mark.kind, "ph": "X", "pid": pid, "tid": tid}).replace("%", "%%")
        args = json.dumps(dict(mark.args), default=str).replace("%", "%%")
        return f',\n{head[:-1]}, "ts": %d.%03d, "dur": %d.%03d, "args": {args}}}'

    def _begin_line(self, track: int | TimelineRow, kind: str) -> Iterator[dict[str, Any]]:
        """Give a track its numbers, and yield the trace events that name it, by its first kind if it has ended."""
        if isinstance(track, TimelineRow):
            pid = self._processes.get(track.process) if track.process else self._pid
            if pid is None:
                pid = self._pid * _FIRST_WORKER + len(self._processes)
                self._processes[track.process] = pid
                yield from self._name_process(pid, track.process)
            name = track.thread
        else:
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            pid, name = self._pid, names.get(track, f"{kind} thread")
            name = "training" if name == "MainThread" else name
        tid = len(self._lines) + 1
        self._lines[track] = pid, tid
        yield {"name": "thread_name", "ph": "M", "pid": pid, "tid": tid, "args": {"name": name}}
        yield {"name": "thread_sort_index", "ph": "M", "pid": pid, "tid": tid, "args": {"sort_index": tid}}

    def _name_process(self, pid: int, name: str) -> Iterator[dict[str, Any]]:
        yield {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
        yield {"name": "process_sort_index", "ph": "M", "pid": pid, "args": {"sort_index": pid}}


def _now() -> tuple[int, int]:
    """Return the same moment in ns of `time.perf_counter_ns` and of the clock of the system, to about 1 us."""
    found = []
    for _ in range(5):
        before = time.perf_counter_ns()
        unix = time.time_ns()
        found.append((time.perf_counter_ns() - before, before, unix))
    took, before, unix = min(found)
    return before + took // 2, unix


def _make(path: Path) -> Path:
    """Make a file with a path, or with the first of ``name-2``, ``name-3`` and so on that does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number, found = 1, path
    while True:
        try:
            found.open("xb").close()  # so that no file of the user is lost
            return found
        except FileExistsError:
            if not found.is_file():  # a folder, or a device: another name beside it is not meant
                raise LoggingError(f"{found} exists and is no file") from None
            number += 1
            found = path.with_name(f"{path.stem}-{number}{path.suffix}")


def read_trace(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], int | None]:
    """Return the trace events of a file, and the moment of its zero in ns since 1970, or ``None`` if it has none.

    Args:
        path: A file of a timeline, also one that was cut off, or of ``torch.profiler``.

    Raises:
        UsageError: The file cannot be read, or has no trace events.
    """
    try:
        text = Path(path).read_text("utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"The trace {os.fspath(path)!r} cannot be read: {error.strerror}.") from error
    # A file that is cut off has a whole event at its end, or a part of one, which is left out.
    found, whole = None, text[: text.rfind("}", 0, max(text.rfind("\n"), 0)) + 1]
    for each in (text, text.rstrip(", \n") + "]", whole + "]"):
        with suppress(ValueError):
            found = json.loads(each)
            break
    if isinstance(found, dict):
        events, zero = found.get("traceEvents"), found.get("baseTimeNanoseconds")
    else:
        events, zero = found, None
    if not isinstance(events, list) or not all(isinstance(each, dict) for each in events):
        raise UsageError(
            f"{os.fspath(path)!r} has no trace events. Pass files of Timeline, and of torch.profiler's "
            f"export_chrome_trace."
        )
    if not isinstance(found, dict):
        clocks = (each.get("args") for each in events if each.get("name") == "clock")
        zero = next((args["unix_ns"] for args in clocks if isinstance(args, dict) and "unix_ns" in args), None)
    return events, zero if isinstance(zero, int) else None


def join(paths: Sequence[str | os.PathLike[str]], to: str | os.PathLike[str]) -> None:
    """Write the events of several trace files into one, with one clock.

    A process whose number another file has used already gets a new number.

    Args:
        paths: The files.
        to: The file to write, which is replaced if it exists.

    Raises:
        UsageError: A file cannot be read, does not tell the time of its beginning, or `to` cannot be written.
    """
    traces = [(os.fspath(path), *read_trace(path)) for path in paths]
    without = [name for name, _, zero in traces if zero is None]
    if without:
        raise UsageError(
            f"{', '.join(without)} cannot be joined: the file does not tell when it began. Timelines do, and traces of "
            f"torch.profiler since torch 2.3."
        )
    first = min(zero for _, _, zero in traces if zero is not None)
    joined: list[dict[str, Any]] = []
    taken: set[Any] = set()
    for _, events, zero in traces:
        own: dict[Any, Any] = {}
        for event in events:
            pid = event.get("pid")
            if pid not in own:
                own[pid] = _free_number(pid, {*taken, *own.values()})
            moved = {**event, "pid": own[pid]}
            if isinstance(event.get("ts"), (int, float)):
                moved["ts"] = event["ts"] + ((zero or 0) - first) / 1000
            joined.append(moved)
        taken |= {*own.values()}
    try:
        Path(to).write_text(json.dumps({"traceEvents": joined, "baseTimeNanoseconds": first}), "utf-8")
    except OSError as error:
        raise UsageError(f"The joined trace {os.fspath(to)!r} cannot be written: {error.strerror}.") from error


def _free_number(pid: Any, taken: set[Any]) -> Any:
    """Return the number of a process, or another one if it is taken; names of torch's lines are left as they are."""
    while isinstance(pid, int) and pid in taken:
        pid += 1_000_000
    return pid
