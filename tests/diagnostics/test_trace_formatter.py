"""The process that formats trace events: what it writes, where a disk is full, and how it ends."""

from __future__ import annotations

import errno
import json
import marshal
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from flowtrain.diagnostics import trace_formatter
from flowtrain.diagnostics.trace_file import read_trace
from flowtrain.diagnostics.trace_formatter import TraceFormatter

BEGIN = '[{"name": "begin", "ph": "M", "pid": 1}'
PLAIN = ',\n{"name": "plain", "ts": %d.%03d, "dur": %d.%03d, "args": {}}'
WITH = ',\n{"name": "with", "ts": %d.%03d, "dur": %d.%03d, "args": {"x": "100%%"}}'
ROWS = [
    0, 1_000_007, 1_002_000, None,
    1, 1_002_000, 1_002_001, None,
    0, 1_002_000, 1_002_000, (3, 4),
    1, 1_002_000, 1_002_000, (3, 4),
    1, 2_002_000, 1_002_002_000, '"y": [1]',
    PLAIN.replace("plain", "once"), 1_002_000, 1_002_000, '"y": "%d"',
]  # fmt: skip
WHOLE: list[tuple[str, float, float, dict[str, Any]]] = [
    ("plain", 0.007, 1.993, {}),
    ("with", 2.0, 0.001, {"x": "100%"}),
    ("plain", 2.0, 0.0, {"epoch": 3, "batch": 4}),
    ("with", 2.0, 0.0, {"x": "100%", "epoch": 3, "batch": 4}),
    ("with", 1002.0, 1_000_000.0, {"x": "100%", "y": [1]}),
    ("once", 2.0, 0.0, {"y": "%d"}),
]
MESSAGE = [BEGIN], {0: PLAIN, 1: WITH}, ROWS


@contextmanager
def formatter(path: Path, limit: int = 1 << 20) -> Generator[TraceFormatter]:
    with path.open("ab") as file:
        yield TraceFormatter(file.fileno(), 1_000_000, limit, 1)


def times(path: Path) -> list[tuple[str, float, float, dict[str, Any]]]:
    """Return the names, times and arguments in a file, whole or cut off."""
    return [(each["name"], each["ts"], each["dur"], each["args"]) for each in read_trace(path)[0] if "dur" in each]


def test_numbers_and_further_values_become_trace_events(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with formatter(path) as made:
        made.take(MESSAGE)
        made.take(([], {}, ROWS[:4]))
        made.close()
    assert json.loads(path.read_text())[0]["name"] == "begin"
    assert times(path) == [*WHOLE, WHOLE[0]]
    assert made.dropped == 0


def test_beyond_the_limit_rows_are_counted_and_the_file_says_after_which_moment(tmp_path: Path) -> None:
    with formatter(tmp_path / "a.json", 20_000) as made:
        made.take(([BEGIN], {0: PLAIN}, [entry for at in range(1000) for entry in (0, at * 10**6, 10**9, None)]))
        made.take(([], {}, ROWS[:4]))
        made.close()
    *_, last = json.loads((tmp_path / "a.json").read_text())
    assert made.dropped == 601, "they are written by 200"
    text = "601 times after this are not in the file, which has reached its limit"
    assert last == {"name": text, "ph": "i", "s": "p", "ts": 999_000.0, "pid": 1, "tid": 0}


def test_on_a_full_disk_the_file_has_the_events_that_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "a.json", os.write

    def full(file: int, data: bytes) -> int:
        """Write as much as a disk of 300 bytes has room for."""
        room = 300 - os.fstat(file).st_size if os.fstat(file).st_ino == path.stat().st_ino else len(data)
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, data[:room])

    monkeypatch.setattr(os, "write", full)
    with formatter(path) as made, pytest.raises(OSError, match="No space left"):
        made.take(MESSAGE)
    assert times(path) == WHOLE[:3]
    assert path.read_text().endswith("}}"), "a whole event is the last"


def run(path: Path, messages: bytes) -> dict[str, Any]:
    """Run the program with what a process has sent before it died; return its report."""
    with path.open("ab") as file:
        program = [sys.executable, "-I", "-S", trace_formatter.__file__, "1000000", "100000", "1"]
        done = subprocess.run(program, input=messages, stdout=file, stderr=subprocess.PIPE, check=True)
    report: dict[str, Any] = json.loads(done.stderr)
    return report


def test_wherever_the_other_process_dies_the_file_is_whole(tmp_path: Path) -> None:
    begin = marshal.dumps(([BEGIN], {0: PLAIN, 1: WITH}, []))
    sent = begin + marshal.dumps(([], {}, ROWS))
    sizes = len(begin), len(begin) + 1, (len(begin) + len(sent)) // 2, len(sent) - 1, len(sent)
    for number, size in enumerate(sizes):
        path = tmp_path / f"{number}.json"
        assert run(path, sent[:size]) == {"dropped": 0, "error": ""}
        assert json.loads(path.read_text())[0]["name"] == "begin"
        assert times(path) == (WHOLE if size == len(sent) else [])
    path = tmp_path / "ended.json"
    run(path, sent + marshal.dumps(None) + marshal.dumps(([], {}, ROWS)))
    assert times(path) == WHOLE, "nothing follows the end"


def test_a_disk_that_is_full_from_the_beginning(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "wb", buffering=0) as file:
        program = [sys.executable, "-I", "-S", trace_formatter.__file__, "0", "100000", "1"]
        done = subprocess.run(program, input=marshal.dumps(MESSAGE), stdout=file, stderr=subprocess.PIPE, check=True)
    report = json.loads(done.stderr)
    assert report["dropped"] == 0
    assert report["error"]
