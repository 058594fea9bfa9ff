"""A long run on a cluster: what grows that should not?

Memory, threads, open files and the tasks that the scheduler holds are measured along the way. The callback logs the
loss of each batch and keeps nothing, and nothing is recorded in place: series grow, and are to.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from distributed import Client
from torch.nn import functional as F

from flowtrain import Access, Callback, Learner, LearnerView, Phase, UpdateEnd, on
from flowtrain.logging import JsonlBackend
from flowtrain_dask import DaskExecutor
from tests.chaos.callbacks import Losses
from tests.support.dask_processes import DaskProcesses

__all__ = ["soak"]

_LOOKS = 10
_SLACK = {"memory": 48 << 20, "threads": 3, "files": 8, "tasks": 4}
"""How much more of each there may be at the end than after a fifth of the run."""


def soak(events: int, embedded: bool) -> bool:
    """Train for some events, print what was measured, and return whether nothing has grown and nothing is missing.

    Args:
        events: How many.
        embedded: Whether lanes are threads; otherwise they are on a cluster with one worker.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="flowtrain-soak-") as name:
        if embedded:
            return _soak(Path(name), events, None)
        processes = DaskProcesses(Path(name))
        try:
            processes.start_worker("w")
            return _soak(Path(name), events, processes)
        finally:
            processes.close()


def _soak(folder: Path, events: int, processes: DaskProcesses | None) -> bool:
    begin = time.monotonic()
    path = folder / "log.jsonl"
    looks = Looks(processes, events // _LOOKS)
    data = [(torch.randn(4, 8), torch.randint(3, (4,))) for _ in range(1000)]
    executor = DaskExecutor(None if processes is None else processes.address, defer="always")
    with Learner(
        torch.nn.Linear(8, 3), F.cross_entropy, data=data, callbacks=[Losses(JsonlBackend(path)), looks],
        default_callbacks=False, executor=executor,
    ) as learner:  # fmt: skip
        learner.fit(steps=events)
        print(executor.report())
    with path.open() as file:
        steps = [json.loads(line)["step"] for line in file]
    complete = steps == list(range(1, events + 1))
    first, last = looks.seen[_LOOKS // 5 - 1], looks.seen[-1]
    grown = [
        f"{what} of {who} by {last[who][what] - first[who][what]:,}"
        for who in last
        for what, slack in _SLACK.items()
        if what in last[who] and last[who][what] > first[who][what] + slack
    ]
    print(
        f"{events:,} events in {time.monotonic() - begin:.0f} s, log {'complete' if complete else 'INCOMPLETE'}; "
        f"grown: {', '.join(grown) or 'nothing'}",
        flush=True,
    )
    return complete and not grown


class Looks(Callback):
    """Measures now and then.

    Attributes:
        seen: What was measured, by process: ``{"training": {"memory": ..., ...}, "worker": ..., "scheduler": ...}``.
    """

    def __init__(self, processes: DaskProcesses | None, every: int) -> None:
        self.every = every
        self.count = 0
        self.seen: list[dict[str, dict[str, int]]] = []
        self._pids = {"training": os.getpid()}
        self._client: Any = None
        if processes is not None:
            self._pids |= {"scheduler": processes.scheduler.pid, "worker": processes.workers["w"].pid}
            self._client = Client(processes.address, set_as_default=False)  # type: ignore[no-untyped-call]  # none there

    def state_access(self) -> Access:
        return {}

    @on(UpdateEnd)
    def look(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
        """Measure."""
        self.count += 1
        if self.count % self.every == 0:
            self.seen.append({who: _measure(pid) for who, pid in self._pids.items()})
            if self._client is not None:
                self.seen[-1]["scheduler"]["tasks"] = self._client.run_on_scheduler(_tasks)
            row = "; ".join(f"{who} {_text(each)}" for who, each in self.seen[-1].items())
            print(f"{self.count:>9,}  {row}", flush=True)


def _measure(pid: int) -> dict[str, int]:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = {name: value.split() for name, _, value in (line.partition(":") for line in status)}
    return {
        "memory": int(fields["VmRSS"][0]) * 1024,
        "threads": int(fields["Threads"][0]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


def _text(measured: dict[str, int]) -> str:
    rest = ", ".join(f"{value} {what}" for what, value in measured.items() if what != "memory")
    return f"{measured['memory'] / 2**20:.0f} MiB, {rest}"


def _tasks(dask_scheduler: Any) -> int:
    return len(dask_scheduler.tasks)


_tasks.__module__ = "__main__"  # the scheduler has none of this: it travels by value
