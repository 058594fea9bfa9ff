"""The report: what a user reads of it."""

from __future__ import annotations

import time
from collections import Counter

from flowtrain_dask.lanes.report import LaneCounts, LaneReport, Outage, Report, Stall, uncounted


def test_the_table_and_what_a_user_should_know() -> None:
    counts = LaneCounts(dropped=Counter({"LogImages": 3}), restarts=2, replays=40, records=9_000, local=7, skipped=5)
    counts.stalled("LogImages", 1.5)
    counts.stalled("LogImages", 0.75)
    counts.last_error = "ValueError: bad"
    slow = LaneReport("LogImages", ("LogImages",), "tcp://10.0.0.1:8786", 12_000, 11_900, 3 << 20, True, counts)
    fine = LaneReport("LogMetrics", ("LogMetrics",), "thread", 5, 5, 0, False, LaneCounts(records=10))
    report = Report((slow, fine))
    assert str(report).splitlines() == [
        "lane        where                events    done  pending  MiB  dropped  records",
        "LogImages   tcp://10.0.0.1:8786  12,000  11,900      100  3.0        3    9,000",
        "LogMetrics  thread                    5       5        0  0.0        0       10",
        "  LogImages made training wait 2.2 s in all (2 times): its lane was full",
        "  LogImages: 3 events dropped",
        "  LogImages: 2 batches given out again, 40 events replayed",
        "  LogImages: the cluster was lost; 7 events were run in this process",
        "  LogImages: 5 events not run, because an earlier one had failed",
        "  LogImages: retired",
        "  LogImages: last error: ValueError: bad",
    ]
    assert (report.dropped, report.pending, report.stalled) == (3, 100, 2.25)


def test_without_lanes() -> None:
    assert str(Report()) == "no deferred callbacks"


def test_the_times_without_the_cluster() -> None:
    outages = [Outage("tcp://10.0.0.1:8786", 60.0 * number, "it is gone", 60.0 * number + 5) for number in range(4)]
    outages.append(Outage("tcp://10.0.0.1:8786", 600.0, "it is gone"))
    times = [time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) for seconds in (120, 125, 180, 185, 600)]
    lost = "the cluster at tcp://10.0.0.1:8786 was lost at"
    lines = [
        "the cluster was lost 2 times before",
        f"{lost} {times[0]} (it is gone), and was back at {times[1]}",
        f"{lost} {times[2]} (it is gone), and was back at {times[3]}",
        f"{lost} {times[4]} (it is gone), and is not back",
    ]
    assert Report(outages=tuple(outages)).troubles() == lines
    outages[-1].refused = "other versions"
    lines[-1] = f"{lost} {times[4]} (it is gone); it is back, and is not used: other versions"
    report = Report(outages=tuple(outages))
    assert str(report).splitlines() == ["no deferred callbacks", *("  " + each for each in lines)]


def test_more_of_a_known_problem_is_no_new_one() -> None:
    def troubles(counts: LaneCounts) -> list[str]:
        return [*LaneReport("Log", ("Log",), "thread", 9, 9, 0, False, counts).troubles()]

    assert uncounted(troubles(LaneCounts(local=7))) == uncounted(troubles(LaneCounts(local=1_007)))
    assert uncounted(troubles(LaneCounts(local=7))) != uncounted(troubles(LaneCounts(local=7, skipped=1)))


def test_a_copy_does_not_count_on() -> None:
    counts = LaneCounts()
    counts.stalled("a", 1.0)
    copy = counts.copy()
    counts.stalled("a", 1.0)
    counts.dropped["a"] += 1
    assert copy.stalls == {"a": Stall(1, 1.0)}
    assert copy.dropped == Counter()
