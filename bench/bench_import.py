"""The time of ``import flowtrain`` in addition to ``import torch``, in fresh interpreters.

Run ``python -m bench.bench_import`` from the root of the checkout.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from bench.pairs import Report, differences, figure, in_turns, median

REPETITIONS = 30
INSIDE = "import time, torch; start = time.perf_counter(); import flowtrain; print(time.perf_counter() - start)"


def main() -> None:
    report = Report("Import", "python -m bench.bench_import", "`python -c 'import torch'`, a whole process")
    runs = [partial(python, "import torch"), partial(python, "import torch, flowtrain")]
    times = in_turns(runs, REPETITIONS, warmup=2)
    more = differences(times)
    report.row(
        "`import torch, flowtrain`, a whole process",
        f"{median(times, 0):.2f} s",
        f"{median(times, 1):.2f} s",
        f"{more.text()} s more",
        "0.1 s more",
        reached=more.median <= 0.1,
    )
    inside = figure([float(python(INSIDE)) for _ in range(REPETITIONS)])
    report.row(
        "`import flowtrain` after `import torch`, timed inside the process",
        "",
        "",
        f"{inside.text()} s",
        "0.1 s",
        reached=inside.median <= 0.1,
    )


def python(code: str) -> str:
    """Run a fresh interpreter and return what it printed."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
