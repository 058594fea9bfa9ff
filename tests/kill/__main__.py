"""The command line; see `tests.kill`."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.kill.compare import differences
from tests.kill.faults import CLEAR, DISKS, attempt, draw_fault, mounted, mounts
from tests.kill.training import EXECUTORS, VARIANTS, prepare
from tests.support.dask_processes import DaskProcesses

DEAD = (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)


@dataclass
class Found:
    """What all runs have found so far.

    Attributes:
        faults: How many faults of each kind have ended a process.
        executors: How many processes had each executor.
        differences: How many differences there were, by variant and kind.
        runs: How many runs were complete.
    """

    runs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    executors: Counter[str] = field(default_factory=Counter)
    differences: Counter[str] = field(default_factory=Counter)


def main() -> int:
    """Do the runs, print what was found, and return the exit code: 0 if no run differs."""
    parser = argparse.ArgumentParser("python -m tests.kill", description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the number of the first run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the folders of runs that differ")
    arguments = parser.parse_args()
    begin_in_namespace()
    names = prepare()
    place = Path(tempfile.mkdtemp(prefix="flowtrain-kill-"))
    found, wholes = Found(), dict[str, Path]()
    (place / "dask").mkdir()
    cluster = DaskProcesses(place / "dask")
    try:
        for name in ("a", "b"):
            cluster.start_worker(name, "--preload", "flowtrain_dask.cluster.worker")
        for number in range(arguments.first, arguments.first + arguments.runs):
            name = names[number % len(names)]
            if name not in wholes:
                wholes[name] = place / f"whole {name}"
                wholes[name].mkdir()
                code = attempt(wholes[name], VARIANTS[name], "serial", "", None)
                assert code == 0, (wholes[name] / "output.txt").read_text()
            folder = place / str(number)
            folder.mkdir()
            before = found.faults.total()
            draw = random.Random(f"{arguments.seed} {number}")
            disks = mounts() and draw.random() < 0.3
            with mounted(folder / "checkpoints", disks), mounted(folder / "logs", disks):
                wrong = one_run(folder, wholes[name], name, draw, cluster.address, found)
                if wrong and arguments.keep:
                    shutil.copytree(folder, folder.with_name(f"{number} kept"), dirs_exist_ok=True)
            found.runs += 1
            found.differences.update(f"{name}: {each}" for each in wrong)
            said = ", ".join(wrong) or "no difference"
            print(f"run {number}, {name}: {found.faults.total() - before} faults, {said}", flush=True)
            shutil.rmtree(folder)
    except KeyboardInterrupt:
        print("ended early", flush=True)
    finally:
        cluster.close()
        if not arguments.keep:
            shutil.rmtree(place)
    report = {
        "runs": found.runs, "faults": found.faults.total(), "by kind": found.faults,
        "processes by executor": found.executors, "differences": found.differences,
    }  # fmt: skip
    print(json.dumps(report, indent=1))
    return 1 if found.differences else 0


def begin_in_namespace() -> None:
    """Begin again in a namespace in which this process may mount file systems, if the system lets it."""
    if mounts():
        return
    enter = ["unshare", "--map-root-user", "--mount"]
    try:
        possible = not subprocess.run([*enter, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode
    except FileNotFoundError:
        possible = False
    if not possible:
        print("disks that turn read-only: skipped, this process may not mount a file system", flush=True)
        return
    os.environ["FLOWTRAIN_KILL"] = "mounts"
    os.execvp(enter[0], [*enter, sys.executable, "-m", "tests.kill", *sys.argv[1:]])


def one_run(folder: Path, whole: Path, name: str, draw: random.Random, cluster: str, found: Found) -> list[str]:
    """Train with faults until the training is complete, and return in what it differs."""
    wanted = draw.randint(1, 4)
    executors = [name for name in EXECUTORS for _ in range(1 if name == "local" else 4)]
    for _ in range(20):
        fault = draw_fault(draw, disk=os.path.ismount(folder / "checkpoints")) if wanted else None
        executor = draw.choice(executors)
        code = attempt(folder, VARIANTS[name], executor, cluster, fault)
        found.executors[executor] += 1
        kind = fault.kind if fault is not None else "no fault"
        # A run without its folder begins anew, after the records in its logs, which the next one removes.
        # A result that is not there was deleted.
        if code == 0 and kind != "no folder" and (folder / "result.pt").exists():
            return differences(whole, folder)
        if code not in (0, 3, CLEAR, *DEAD) or (code == CLEAR and (fault is None or fault.where not in DISKS)):
            text = (folder / "output.txt").read_text()[-1500:]
            return [f"exit code {code} under {executor} after {kind}: {text}"]
        found.faults[kind] += 1
        wanted -= 1
    return ["no end"]


if __name__ == "__main__":
    sys.exit(main())
