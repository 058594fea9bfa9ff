"""The link between training and its cluster is cut for some seconds, and is there again.

Training is in a network namespace, and the scheduler with its workers in another one. A pair of virtual devices joins
them, and is set down and up again. No packet arrives meanwhile, and nobody is told so: that is what a broken switch
looks like, and a killed process does not. Making namespaces takes root, or user namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.compare import compare
from tests.chaos.monkey import Seen
from tests.chaos.program import LOGS
from tests.chaos.run import Watch, is_back, program, tell
from tests.support.dask_processes import DaskProcesses
from tests.support.waiting import wait_for

__all__ = ["cut"]

_HERE, _THERE = "10.77.0.1", "10.77.0.2"
_BEFORE = 5.0
"""Seconds of training before the link is cut, and after the cluster is used again."""


def cut(seconds: float, seed: int) -> bool:
    """Do one run, print what was found, and return whether the logs are equal; do nothing without namespaces.

    Args:
        seconds: For how long the link is cut.
        seed: Chooses the data.
    """
    if os.environ.get("FLOWTRAIN_CHAOS") != "namespace":
        enter = ["unshare", "--map-root-user", "--net"]
        if shutil.which("ip") is None or not _works(
            *enter, "ip", "link", "add", "ft0", "type", "veth", "peer", "name", "ft1"
        ):
            print("the link that is cut: skipped, this process may not make network namespaces")
            return True
        words = [sys.executable, "-m", "tests.chaos", "--cut", str(seconds), "--seed", str(seed)]
        return subprocess.run([*enter, *words], env=os.environ | {"FLOWTRAIN_CHAOS": "namespace"}).returncode == 0
    other = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    try:
        within = ["nsenter", f"--net=/proc/{other.pid}/ns/net"]
        wait_for(lambda: os.readlink(f"/proc/{other.pid}/ns/net") != os.readlink("/proc/self/ns/net"))
        _link(str(other.pid), within)
        return _run(seconds, seed, within)
    finally:
        other.kill()
        other.wait()


def _works(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _link(process: str, within: Sequence[str]) -> None:
    """Join this network namespace and that of a process."""
    for command in (
        ["ip", "link", "add", "ft0", "type", "veth", "peer", "name", "ft1"],
        ["ip", "link", "set", "ft1", "netns", process],
        ["ip", "address", "add", f"{_HERE}/24", "dev", "ft0"],
        ["ip", "link", "set", "ft0", "up"],
        ["ip", "link", "set", "lo", "up"],
        [*within, "ip", "address", "add", f"{_THERE}/24", "dev", "ft1"],
        [*within, "ip", "link", "set", "ft1", "up"],
        [*within, "ip", "link", "set", "lo", "up"],
    ):
        subprocess.run(command, check=True)


def _run(seconds: float, seed: int, within: Sequence[str]) -> bool:
    folder = Path(tempfile.mkdtemp(prefix="flowtrain-cut-"))
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f} s  {text}", flush=True)

    watch = Watch([folder / "cluster" / log for log in LOGS], say)
    processes = DaskProcesses(folder, host=_THERE, within=within)
    training: subprocess.Popen[bytes] | None = None
    try:
        for name in ("a", "b"):
            processes.start_worker(name)
        training = program(folder, seed, "--cluster", processes.address)
        log = folder / "cluster" / LOGS[0]
        wait_for(lambda: log.exists() and log.stat().st_size, 120)
        watch.start()
        time.sleep(_BEFORE)
        say("the link is cut")
        subprocess.run(["ip", "link", "set", "ft0", "down"], check=True)
        time.sleep(seconds)
        subprocess.run(["ip", "link", "set", "ft0", "up"], check=True)
        say("the link is there again")
        wait_for(lambda: is_back(folder), 180)
        say("the cluster is used again")
        time.sleep(_BEFORE)
        watch.over.set()
        (folder / "stop").touch()
        if training.wait(300):
            raise RuntimeError(f"the training ended with {training.returncode}")
        program(folder, seed).wait()
        found = [compare(folder / "serial" / log, folder / "cluster" / log) for log in LOGS]
        serial, cluster = (json.loads((folder / each / "result.json").read_text()) for each in ("serial", "cluster"))
        print((folder / "cluster" / "report.txt").read_text())
        return tell(Seen(), found, watch, serial, cluster)
    finally:
        watch.over.set()
        if training is not None and training.poll() is None:
            training.kill()
            training.wait(20)
        processes.close()
        shutil.rmtree(folder, ignore_errors=True)
