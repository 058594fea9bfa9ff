"""What-if: the texts of an estimate, and what it says without times."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flowtrain import ExecutorError, SerialExecutor, UsageError
from flowtrain.graph.what_if import DeferredSavings, ParallelSavings, WhatIf, shown
from flowtrain.testing import tiny_learner

BOTH = ParallelSavings(
    "BatchEnd", "TrainingPhase", 500, 5e-3, 2e-3, ("A.work", "C.work"), (("A.work", "C.work"), ("B.work",)), 3e-3
)
NOT = ParallelSavings("EpochEnd", "TrainingPhase", 2, 30e-6, 30e-6, ("A.end",), (("A.end",),), 30e-6, "one chain")
LANE = DeferredSavings("Log.log", "BatchEnd", "TrainingPhase", 4e-3, 0.25e-3)
CHEAP = DeferredSavings("Cheap.log", "BatchEnd", "TrainingPhase", 12e-6, 9e-6, "a lane gains nothing below 200.0 µs")
KEPT = DeferredSavings("Kept.log", "BatchEnd", "TrainingPhase", 4e-3, None, "it may draw random numbers")


def test_the_text_of_an_estimate() -> None:
    assert str(WhatIf(2, (BOTH, NOT), (LANE, CHEAP, KEPT))) == (
        "In parallel, on 2 threads at most, for each event:\n"
        "  BatchEnd, TrainingPhase: 5.00 ms one after the other, 2.00 ms on the longest path (A.work → C.work), "
        "3.00 ms on 2 threads (A.work, C.work | B.work): saves up to 2.00 ms\n"
        "  EpochEnd, TrainingPhase: 30.0 µs one after the other: not worth it, one chain\n"
        "Deferred, for each event:\n"
        "  Log.log at BatchEnd, TrainingPhase: 4.00 ms to run, 250.0 µs to hand over: saves up to 3.75 ms\n"
        "  Cheap.log at BatchEnd, TrainingPhase: 12.0 µs to run, 9.0 µs to hand over: not worth it, a lane gains "
        "nothing below 200.0 µs\n"
        "  Kept.log at BatchEnd, TrainingPhase: 4.00 ms to run: not worth it, it may draw random numbers\n"
        "At best: handlers that compute in Python share the interpreter's lock, and then save less.\n"
        'executor="dask" measures both ways in a fit, and takes the quicker one.'
    )
    assert (BOTH.saves, NOT.saves, CHEAP.saves, KEPT.saves) == (2e-3, 0, 0, 0)
    assert LANE.saves == pytest.approx(3.75e-3)


def test_the_text_if_nothing_is_worth_it() -> None:
    assert str(WhatIf(1, (), ())) == (
        "In parallel, on 1 thread at most, for each event:\n"
        "  no event has two handlers with known times\n"
        "Deferred, for each event:\n"
        "  no handler with known times is of a deferrable callback\n"
        'Nothing is worth it: keep executor="serial".'
    )
    assert str(WhatIf(1, (NOT,), (CHEAP,))).endswith('Nothing is worth it: keep executor="serial".')


def test_times() -> None:
    assert [shown(seconds) for seconds in (0.0, 1e-7, 999e-6, 1e-3, 2.5)] == [
        "0.0 µs", "0.1 µs", "999.0 µs", "1.00 ms", "2500.00 ms",
    ]  # fmt: skip


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_without_times_it_says_what_to_do(executor: str) -> None:
    with tiny_learner(n_batches=1, executor=executor) as learner:
        learner.fit(1)
        text = 'Measure them first, in a fit with a timeline: learner.fit(steps=100, timeline="timeline.json").'
        with pytest.raises(UsageError, match=re.escape(text)):
            learner.what_if()


WITHOUT_DASK = """
import sys
from pathlib import Path
from typing import Any
from flowtrain.testing import tiny_learner
sys.modules["dask"] = None
with tiny_learner(n_batches=1) as learner:
    learner.what_if()
"""


def test_without_dask_it_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_DASK], stderr=subprocess.PIPE, text=True, check=False)
    *_, last = done.stderr.splitlines()
    assert "ExecutorError: what_if() estimates what executor='dask' would save, which is not installed (" in last
    assert last.endswith("): pip install 'flowtrain[dask]'")


def test_an_executor_without_a_learner() -> None:
    with pytest.raises(ExecutorError, match="This SerialExecutor has no learner yet"):
        SerialExecutor().what_if()


class Silent(SerialExecutor):
    """An executor that gives no estimate."""

    name = "silent"
    what_if: Any = None


def test_an_executor_that_gives_no_estimate_is_named() -> None:
    with tiny_learner(n_batches=1, executor=Silent()) as learner:
        text = (
            r"^what_if\(\) asks the executor for an estimate, and 'silent' \(Silent\) gives none\. Give it a method "
            r"what_if\(self\), or make the learner with executor=\"serial\" and fit it with a timeline"
        )
        with pytest.raises(ExecutorError, match=text):
            learner.what_if()


def test_an_executor_of_one_s_own_may_answer() -> None:
    class Answers(SerialExecutor):
        """An executor with an estimate of its own."""

        def what_if(self) -> WhatIf:
            return WhatIf(3, (), ())

    with tiny_learner(n_batches=1, executor=Answers()) as learner:
        assert learner.what_if() == WhatIf(3, (), ())


def test_a_closed_learner_gives_no_estimate(tmp_path: Path) -> None:
    learner = tiny_learner(n_batches=1)
    learner.fit(1, timeline=tmp_path / "timeline.json")
    assert learner.what_if().workers > 0
    learner.close()
    with pytest.raises(ExecutorError, match=r"^what_if\(\) on a closed learner"):
        learner.what_if()
