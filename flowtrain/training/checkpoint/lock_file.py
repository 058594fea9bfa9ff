"""The lock file of a folder: the process that it names as its owner, and how another process takes it.

The file has a line of JSON that names its owner: host, process and time. It appears complete (a link to a file that is
written already). It is no lock of the operating system, because not every network file system has these, and because
worker processes would inherit one.

A process that dies leaves the file behind. On the same machine the table of processes tells whether the owner lives; a
process number that was given out again has another start time. On any other machine a sign of life tells it: the owner
touches the file, and is dead if the file has not changed for `SILENCE` seconds. Both times are those of the file
system, so the clocks of the machines need not agree.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module elsewhere

__all__ = ["NAME", "SILENCE", "LockOwner", "read", "started", "take"]

NAME = ".in-use"
"""The name of the lock file."""

SILENCE = 60.0
"""Seconds without a sign of life after which an owner on another machine counts as dead."""

_SETTLE = 1.0
"""Seconds after a takeover where the file system lets no process exclude another."""


@dataclass(frozen=True)
class LockOwner:
    """The process that a lock file names.

    Attributes:
        host: The name of its machine.
        machine: The boot of the machine and the namespace of the process, where the system tells them: process numbers
            can be compared within one of these only.
        process: The number of the process.
        started: When the process was started, as the system writes it; a number that is given out again has another.
        since: When it took the folder, in seconds since the epoch.
        token: Distinguishes this lock from any other.
    """

    host: str = ""
    machine: str = ""
    process: int = 0
    started: str = ""
    since: float = 0.0
    token: str = ""

    @classmethod
    def here(cls) -> LockOwner:
        """Return this process as an owner."""
        own = os.getpid()
        return cls(socket.gethostname(), _machine(), own, started(own), time.time(), secrets.token_hex(8))

    @property
    def is_near(self) -> bool:
        """Whether the table of processes of this system has the owner."""
        return bool(self.process) and (self.host, self.machine) == (socket.gethostname(), _machine())

    def lives(self, silence: float) -> bool:
        """Tell whether the owner lives.

        Args:
            silence: The seconds since its last sign of life.
        """
        if self.is_near and os.name == "posix":
            return self.started == started(self.process) != ""
        return silence < SILENCE

    def __str__(self) -> str:
        if not self.process:
            return "a process that is not named in it"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.process} on {self.host}, since {since}"


def started(process: int) -> str:
    """Return when a process was started, in the words of the system; empty if there is no such process.

    A process that has ended, and whose parent has not asked for its result, counts as ended.
    """
    try:
        stat = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        listed = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(process)], capture_output=True, text=True)
        state, _, start = listed.stdout.strip().partition(" ")
        return "" if state.startswith("Z") else start.strip()
    # The name of the program, in brackets, may contain anything; state and start time are fields 3 and 22.
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """Return the boot of this machine and the namespace of this process, as far as the system tells them."""
    found = []
    with suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def take(folder: Path, owner: LockOwner) -> LockOwner | None:
    """Take a folder that nobody owns, or whose owner is dead; otherwise return the owner.

    Raises:
        OSError: The folder cannot be written.
    """
    lock, own = folder / NAME, folder / f"{NAME}.{owner.token}.tmp"
    try:
        own.write_text(json.dumps(asdict(owner)) + "\n", "utf-8")
        _remove_dead(folder, own.stat().st_mtime)
        while not _appears(own, lock):
            with _alone(folder) as alone:
                found = read(lock)
                if found is not None and found[0].token != owner.token:
                    other, seen = found
                    if alone is None or other.lives(own.stat().st_mtime - seen):
                        return other
                    os.replace(own, lock)
                    break
                if found is not None:  # a network file system can say that a link exists which it has just made
                    return None
            # Its owner has just removed the file, so it can be linked again.
        else:
            return None
        if not alone:  # another process may have judged the same owner, and have replaced the file a moment later
            time.sleep(_SETTLE)
        found = read(lock)
        return None if found is None or found[0].token == owner.token else found[0]
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def _remove_dead(folder: Path, now: float) -> None:
    """Remove the files of processes that died before they had given them the name of the lock."""
    for path in folder.glob(f"{NAME}.*.tmp"):
        found = read(path)
        if found is not None and not found[0].lives(now - found[1]):
            path.unlink(missing_ok=True)


def _appears(own: Path, lock: Path) -> bool:
    """Give a complete file the name of the lock; return whether no other file had that name."""
    try:
        os.link(own, lock)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with lock.open("x", encoding="utf-8") as file:
                file.write(own.read_text("utf-8"))
        except FileExistsError:
            return False
    return True


@contextmanager
def _alone(folder: Path) -> Generator[bool | None]:
    """Give a context in which no other process takes the folder over, where the file system can exclude others.

    The value is ``False`` where it cannot, and ``None`` while another process is within this context.
    """
    if fcntl is None:
        yield False
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        except OSError:  # as on some network file systems
            yield False
        else:
            yield True
    finally:
        os.close(opened)


def read(lock: Path) -> tuple[LockOwner, float] | None:
    """Return the owner in a lock file and the time of its last sign of life; ``None`` if there is no such file.

    A file that is damaged, or of another version, has an owner without a name.
    """
    try:
        with lock.open(encoding="utf-8") as file:  # opening it has a network file system ask for the time again
            text, seen = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return LockOwner(), time.time()
    try:
        return LockOwner(**json.loads(text)), seen
    except (ValueError, TypeError):
        return LockOwner(), seen
