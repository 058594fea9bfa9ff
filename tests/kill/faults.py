"""What happens to the process of a training: signals at places of all kinds, and disks that fail."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flowtrain import CheckpointError, LoggingError
from flowtrain.callbacks import Checkpointer
from flowtrain.logging import CsvBackend, JsonlBackend, TensorBoardBackend
from flowtrain_dask import DaskExecutor
from tests.kill.training import Variant, train

__all__ = ["CLEAR", "DISKS", "ENDS", "Fault", "attempt", "draw_fault", "mounted", "mounts"]

ENDS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
INTERRUPTED, CLEAR = 3, 4
"""Exit codes of a training: after an interrupt, and after an error that says what is wrong."""

FULL = 40_000
"""The size in bytes of the largest file that a full disk takes: less than a checkpoint has."""

ROOM = 2_000_000
"""The size in bytes of a file system of its own."""

PLACES: dict[str, list[tuple[type, str]]] = {
    "a checkpoint": [(Checkpointer, "state_dict"), (DaskExecutor, "state_dict")],
    "a flush": [(JsonlBackend, "flush"), (CsvBackend, "flush"), (TensorBoardBackend, "flush"), (DaskExecutor, "flush")],
    "a resume": [
        (Checkpointer, "load_state_dict"),
        (DaskExecutor, "load_state_dict"),
        (DaskExecutor, "finish"),
        (JsonlBackend, "restore"),
        (TensorBoardBackend, "restore"),
    ],
}
"""Methods at whose calls a process is killed."""

DISKS = ("full disk", "read-only", "no room", "no folder", "deleted")


@dataclass(frozen=True)
class Fault:
    """What happens to one process.

    Attributes:
        where: ``"moment"``, ``"operation"``, a place of `PLACES`, ``"an interrupt"``, or one of `DISKS`.
        name: The name of the signal.
        second: The name of the signal that follows an interrupt.
        group: Whether the signal goes to the whole group of processes.
        number: The number of the file operation, or of the call.
        before: Whether it happens before the operation or the call, and not after it.
        delay: The seconds until the moment.
        after: The seconds from the interrupt to the second signal, or from the call to the signal.
        logs: Whether the disk of the logs has no room, and not that of the checkpoints.
    """

    where: str
    name: str
    second: str
    group: bool
    number: int
    before: bool
    delay: float
    after: float
    logs: bool

    @property
    def kind(self) -> str:
        """The words for the report."""
        if self.where in DISKS:
            return f"{self.where} for logs" if self.where == "no room" and self.logs else self.where
        if self.where == "an interrupt":
            return f"{self.second} after {self.name}{' to the group' if self.group else ''}"
        place = self.where if self.where in PLACES else f"a random {self.where}"
        return f"{self.name}{' to the group' if self.group else ''} at {place}"


def draw_fault(draw: random.Random, *, disk: bool) -> Fault:
    """Draw a fault.

    Args:
        draw: Draws.
        disk: Whether the folders of the checkpoints and of the logs are file systems of their own.
    """
    places = ["moment", "operation", "operation", *PLACES, "an interrupt", "full disk"]
    where = draw.choice([*places, "read-only", "no room", "no room"] if disk else [*places, "no folder", "deleted"])
    names = ["SIGTERM", "SIGINT"] if where == "an interrupt" else ["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"]
    most = {"operation": 260, "an interrupt": 260, "a resume": 3}.get(where, 14)
    return Fault(
        where, draw.choice(names), draw.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGINT"]), draw.random() < 0.4,
        draw.randint(1, most), draw.random() < 0.5, draw.uniform(0, 1.5),
        draw.uniform(0, 1.2 if where == "an interrupt" else 0.02), draw.random() < 0.5,
    )  # fmt: skip


def attempt(folder: Path, variant: Variant, executor: str, cluster: str, fault: Fault | None) -> int:
    """Train in a process of its own, which a fault may end, and return its exit code.

    Args:
        folder: The folder of the training.
        variant: The training.
        executor: The name of the executor.
        cluster: The address of a cluster.
        fault: The fault; ``None`` for none.
    """
    sys.stdout.flush()
    process = os.fork()
    if not process:
        _be_the_training(folder, variant, executor, cluster, fault)
    if fault is not None and fault.where in ("moment", "read-only", "no room", "no folder", "deleted"):
        time.sleep(fault.delay)
        if fault.where == "moment":
            with contextlib.suppress(ProcessLookupError):  # it may have ended, and may not lead a group yet
                (os.killpg if fault.group else os.kill)(process, ENDS[fault.name])
        else:
            name = "logs" if fault.where == "no room" and fault.logs else "checkpoints"
            return _with_bad_disk(folder / name, fault.where, process)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _be_the_training(folder: Path, variant: Variant, executor: str, cluster: str, fault: Fault | None) -> None:
    code = 1
    try:
        os.setsid()
        # A shell starts programs in the background with this signal ignored, and this process inherits that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        warnings.simplefilter("ignore")
        output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if fault is not None:
            _meet(fault)
        train(folder, variant, executor, cluster)
        code = 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except (CheckpointError, LoggingError):
        code = CLEAR  # before the next line, in which a signal may come
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# --- signals


def _meet(fault: Fault) -> None:
    """Prepare this process for its fault."""
    send = partial(os.killpg, 0) if fault.group else partial(os.kill, os.getpid())
    end = partial(send, ENDS[fault.name])
    if fault.where == "operation":
        _at_operation(fault.number, fault.before, end)
    elif fault.where == "an interrupt":

        def interrupt() -> None:
            threading.Timer(fault.after, send, (ENDS[fault.second],)).start()
            end()

        _at_operation(fault.number, fault.before, interrupt)
    elif fault.where in PLACES:
        counted = _counted(fault.number, fault.before, lambda: threading.Timer(fault.after, end).start())
        for kind, method in PLACES[fault.where]:
            setattr(kind, method, counted(getattr(kind, method)))
    elif fault.where == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def _at_operation(number: int, before: bool, end: Callable[[], object]) -> None:
    """Let this process end at its n-th file operation that changes something."""
    counted = _counted(number, before, end)
    for name in ("write", "ftruncate", "fsync", "replace", "rename", "unlink", "link", "mkdir", "open"):
        setattr(os, name, counted(getattr(os, name)))


def _counted(
    number: int, before: bool, end: Callable[[], object]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator; the n-th call of all functions that it decorates calls `end` before or after its work."""
    left = number

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            now = not left
            if now and before:
                end()
            done = function(*args, **kwargs)
            if now and not before:
                end()
            return done

        return call

    return decorate


# --- disks


def mounts() -> bool:
    """Tell whether this process can mount file systems, which it can in a namespace of its own."""
    return os.environ.get("FLOWTRAIN_KILL") == "mounts"


@contextlib.contextmanager
def mounted(place: Path, wanted: bool) -> Any:
    """Give a context in which a folder is a small file system in memory."""
    if not wanted:
        yield
        return
    place.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={ROOM}", "none", str(place))
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # a worker may still be ending


def _mount(*options: str) -> bool:
    return subprocess.run(["mount", *options], capture_output=True).returncode == 0


def _with_bad_disk(place: Path, where: str, process: int) -> int:
    """Let the file system of a folder fail until the training has ended, and then make it work again.

    If everything is deleted, the folder with all logs and checkpoints, it stays so: the training begins anew.

    A training that finds no folder is told that it begins another run beside the records of the first one, and its
    checkpoints go when the folder comes back. Its records in files go when the first run resumes, to the position of
    the checkpoint; its event files would stay beside those of the first run, with a warning, and are deleted here. If
    the folder comes back without a checkpoint, nothing continues the logs either, so they are deleted with it.
    """
    away, filler = place.with_name("away"), place / "filler"
    known = set[Path]()
    if where == "no folder" and place.exists():
        shutil.move(place, away)
        known = _event_files(place)
    elif where == "deleted":
        _delete(place)
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        # It cannot become read-only as long as a file is open for writing.
        if where == "read-only":
            _mount("-o", "remount,ro", str(place))
        elif where == "no room":
            _fill(filler)
        time.sleep(0.02)
    if where == "no folder" and away.exists():
        if place.exists():
            shutil.rmtree(place)
        shutil.move(away, place)
        if (place / "latest").exists():
            for each in _event_files(place) - known:
                each.unlink()
        else:
            _delete(place)
    elif where == "deleted":
        _delete(place)
    elif where == "read-only":
        _mount("-o", "remount,rw", str(place))
    filler.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(status)


def _event_files(checkpoints: Path) -> set[Path]:
    """Return the event files of TensorBoard that the runs with this folder of checkpoints have made."""
    return set(checkpoints.with_name("logs").rglob("*tfevents*"))


def _delete(checkpoints: Path) -> None:
    """Delete what a training has written, in which it may be writing."""
    for place in (checkpoints, checkpoints.with_name("logs")):
        while place.exists():
            shutil.rmtree(place, ignore_errors=True)
    checkpoints.with_name("result.pt").unlink(missing_ok=True)


def _fill(filler: Path) -> None:
    """Leave no room on the disk of a file."""
    for size in (1 << 16, 1 << 12, 1):
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(size)) == size:
                pass
