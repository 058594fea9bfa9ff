# pyright: reportPrivateUsage=false
# A test kills the process that formats.
"""Trace files: their format, their end, wherever they are cut off, and several of them in one."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from flowtrain import BatchEnd, LoggingError, TrainingPhase, UsageError
from flowtrain.diagnostics.trace_file import TraceWriter, join, read_trace
from flowtrain.graph.clock import HANDLER, Clock, Mark, TimelineRow
from tests.support.traces import events_of, slices_of
from tests.support.waiting import wait_for

AWKWARD = 'a "quoted" 100% name: ü, \\ and \n'


def clock() -> Clock:
    return Clock(lambda: (1, 2))


def written(path: Path, *marks: Mark, rank: int = 0, limit: int = 1 << 20) -> Path:
    """Write a file with one stamp of 5.25 us for each mark; return the path."""
    made = clock()
    writer = TraceWriter(made, path, rank, limit, {"run": "tiny"})
    now = time.perf_counter_ns()
    for number, mark in enumerate(marks):
        made.add(mark, now + 10_000 * number, now + 10_000 * number + 5_250)
    writer.close()
    return writer.path


def test_names_and_values_are_kept_as_they_are(tmp_path: Path) -> None:
    mark = Mark(AWKWARD, "stall", {"callback": AWKWARD, "number": 3})
    (one,) = slices_of(written(tmp_path / "a.json", mark))
    assert (one.name, one.kind, one.args) == (AWKWARD, "stall", {"callback": AWKWARD, "number": 3})
    assert one.end - one.begin == pytest.approx(5.25)
    assert (one.process[:8], one.thread) == ("rank 0 (", "training")


def test_the_values_of_a_stamp_follow_those_of_its_mark(tmp_path: Path) -> None:
    made = clock()
    writer = TraceWriter(made, tmp_path / "a.json", 0, 1 << 20, {})
    now = time.perf_counter_ns()
    for mark in (Mark("a", "lane"), Mark("b", "batch", {"x": 1})):
        for args in (None, {}, {"y": "100%", "path": Path("z")}):
            made.add(mark, now, now + 1, args=args)
    made.stamps.append((mark, now, now + 1, 1, (4, 5)))  # the numbers of an epoch and a batch
    writer.close()
    found = [each["args"] for each in events_of(writer.path) if each["ph"] == "X"]
    more = {"y": "100%", "path": "z"}
    assert found == [{}, {}, more, {"x": 1}, {"x": 1}, {"x": 1, **more}, {"x": 1, "epoch": 4, "batch": 5}]


def test_threads_and_tracks_have_lines_of_their_own(tmp_path: Path) -> None:
    made = clock()
    writer = TraceWriter(made, tmp_path / "a.json", 1, 1 << 20, {})
    ended = threading.Event()
    now = time.perf_counter_ns()

    def work() -> None:
        made.add(Mark("on a thread", "handler"), now, now + 1)
        ended.wait(10)

    thread = threading.Thread(target=work, name="strand 1")
    thread.start()
    for lane in ("A", "B", "A"):
        made.add(Mark("in a lane", "deferred"), now, now + 1, TimelineRow("worker tcp://x", f"lane {lane}"))
    time.sleep(0.4)  # the writer looks four times a second, and names threads that still run
    ended.set()
    thread.join()
    writer.close()
    found = sorted({(one.process.partition(" (")[0], one.thread) for one in slices_of(writer.path)})
    assert found == [("rank 1", "strand 1"), ("worker tcp://x", "lane A"), ("worker tcp://x", "lane B")]


def test_a_thread_that_has_ended_is_named_by_what_it_did(tmp_path: Path) -> None:
    """The thread of a checkpoint may end before anybody asks for its name."""
    made = clock()
    writer = TraceWriter(made, tmp_path / "a.json", 0, 1 << 20, {})
    now = time.perf_counter_ns()
    made.add(Mark("writes a.ckpt", "checkpoint"), now, now + 1, -1)  # no thread has this number
    writer.close()
    assert [one.thread for one in slices_of(writer.path)] == ["checkpoint thread"]


def test_a_file_that_is_cut_off_anywhere_has_the_events_before(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json", *(Mark(f"part {number}", "part") for number in range(4)))
    whole, text = events_of(path), path.read_bytes()
    cut = tmp_path / "cut.json"
    longest = 0
    for size in range(text.index(b"\n") + 1, len(text)):
        cut.write_bytes(text[:size])
        found, unix = read_trace(cut)
        assert found == whole[: len(found)]
        assert len(found) >= longest
        assert unix is None or unix > 10**18
        longest = len(found)
    assert longest == len(whole)


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    paths = [written(tmp_path / "a.json", Mark("x", "part")) for _ in range(3)]
    assert [path.name for path in paths] == ["a.json", "a-2.json", "a-3.json"]
    assert len({path.read_text() for path in paths}) == 3


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert slices_of(written(Path("a.json"), Mark("x", "part")))


def test_beyond_the_limit_stamps_are_counted(tmp_path: Path) -> None:
    made = clock()
    writer = TraceWriter(made, tmp_path / "a.json", 0, 100, {})
    for _ in range(3):
        made.add(Mark("x", "part"), 1, 2)
    writer.close()
    *_, last = events_of(writer.path)
    assert writer.dropped == 3
    assert (last["ph"], last["name"]) == ("i", "3 times after this are not in the file, which has reached its limit")


def base(path: Path) -> int:
    found = read_trace(path)[1]
    assert found is not None
    return found


def test_files_are_joined_on_one_clock(tmp_path: Path) -> None:
    first = written(tmp_path / "a.json", Mark("a", "part"))
    second = written(tmp_path / "b.json", Mark("b", "part"))
    torch_like = tmp_path / "torch.json"
    op = {"name": "op", "ph": "X", "pid": 1, "tid": 5, "ts": 100.0, "dur": 1.0}
    spans = {"name": "spans", "ph": "X", "pid": "Spans", "tid": 0, "ts": 3, "dur": 1}
    torch_like.write_text(json.dumps({"traceEvents": [op, spans], "baseTimeNanoseconds": base(first) - 50_000}))
    join([first, second, torch_like], tmp_path / "all.json")
    whole = json.loads((tmp_path / "all.json").read_text())
    events = {each["name"]: each for each in whole["traceEvents"] if each["ph"] == "X"}
    assert whole["baseTimeNanoseconds"] == base(first) - 50_000
    assert events["op"]["ts"] == 100.0
    own = {one.name: one for path in (first, second) for one in slices_of(path)}
    assert events["a"]["ts"] == pytest.approx(own["a"].begin + 50)
    assert events["b"]["ts"] == pytest.approx(own["b"].begin + 50 + (base(second) - base(first)) / 1000)
    assert len({events[name]["pid"] for name in ("a", "b", "op")}) == 3, "each file has processes of its own"
    assert events["spans"]["pid"] == "Spans"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read: No such file or directory."),
        ("", "has no trace events. Pass files of Timeline, and of torch.profiler's export_chrome_trace."),
        ("{}", "has no trace events."),
        ("[1, 2", "has no trace events."),
        ("[1, 2]", "has no trace events."),
        ('[{"name": "clock"}]', "cannot be joined: the file does not tell when it began."),
        ('{"traceEvents": [], "baseTimeNanoseconds": "soon"}', "cannot be joined: the file does not tell when"),
        ('{"traceEvents": []}', "cannot be joined: the file does not tell when it began."),
        ("[]", "cannot be joined: the file does not tell when it began."),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str | None, text: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=re.escape(text)):
        join([path], tmp_path / "b.json")
    assert not (tmp_path / "b.json").exists()


def test_a_joined_file_that_cannot_be_written(tmp_path: Path) -> None:
    path = written(tmp_path / "a.json")
    with pytest.raises(UsageError, match=r"The joined trace .*none.* cannot be written: No such file or directory"):
        join([path], tmp_path / "none" / "b.json")


def test_the_process_that_formats_is_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The clock goes on, and the file ends with whole events."""
    made = clock()
    writer = TraceWriter(made, tmp_path / "a.json", 0, 1 << 20, {})
    process = writer._process
    assert process is not None
    made.add(Mark("x", "part"), 1, 2)
    wait_for(lambda: '"name": "x"' in (tmp_path / "a.json").read_text())
    process.kill()
    process.wait()
    mark = made.measured.mark((BatchEnd, TrainingPhase), "Mine.work", HANDLER)
    made.add(mark, 1, 3)
    wait_for(lambda: writer._process is None)
    assert caplog.messages == [
        f"flowtrain: the timeline {writer.path} ends here, since it cannot be written: the process that formats it has "
        f"ended with code {process.returncode}. What it has can be opened; training is not affected."
    ]
    made.add(mark, 1, 5)
    writer.close()
    assert [each["name"] for each in read_trace(writer.path)[0] if each["ph"] == "X"] == ["x"]
    assert mark.seconds is not None
    assert [*mark.seconds] == [2e-9, 4e-9], "handlers are measured without a file"
    assert len(caplog.messages) == 1


def test_without_an_interpreter_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for executable, kind in (("", LoggingError), (str(tmp_path / "none"), OSError)):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(kind, match=r"Python interpreter|No such file"):
            TraceWriter(clock(), tmp_path / "a.json", 0, 1 << 20, {})
        assert not [*tmp_path.iterdir()]


def test_the_thread_ends_with_the_file(tmp_path: Path) -> None:
    def alive() -> list[Any]:
        return [each for each in threading.enumerate() if each.name == "flowtrain-timeline"]

    writer = TraceWriter(clock(), tmp_path / "a.json", 0, 1 << 20, {})
    assert len(alive()) == 1
    writer.close()
    assert not alive()
