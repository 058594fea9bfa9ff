"""The lock of a folder of checkpoints: one process at a time trains into a folder.

The lock is the file ``.in-use`` in the folder, with a line of JSON that names its owner: host, process and time. It
appears complete (a link to a file that is written already), and goes when the fit has ended. It is no lock of the
operating system, because not every network file system has these, and because worker processes would inherit one.

A process that dies leaves the file behind. On the same machine the table of processes tells whether the owner lives; a
process number that was given out again has another start time. On any other machine a sign of life tells it: the owner
touches the file every `BEAT` seconds, and is dead if the file has not changed for `SILENCE` seconds. Both times are
those of the file system, so the clocks of the machines need not agree.

An owner that was only silent (a suspended machine) finds another owner in the file when it wakes up: it writes no
checkpoint any more, and its fit ends with an error.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from flowtrain.errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # tested before each use

__all__ = ["BEAT", "NAME", "PATIENCE", "SILENCE", "Folders", "check_owned", "started"]

NAME = ".in-use"
"""The name of the lock file."""

BEAT = 10.0
"""Seconds between two signs of life of an owner."""

SILENCE = 60.0
"""Seconds without a sign of life after which an owner on another machine counts as dead."""

PATIENCE = 90.0
"""Seconds for which a fit that resumes waits for an owner to end: longer than `SILENCE`, and than the usual 30 seconds
between the SIGTERM and the SIGKILL of a batch system."""

_LOOK = 0.25
_SETTLE = 1.0
"""Seconds between two looks at a lock, and after a takeover where the file system lets no process exclude another."""

_logger = logging.getLogger("flowtrain")


@dataclass(frozen=True)
class _Owner:
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
    def here(cls) -> _Owner:
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


@dataclass
class _Lock:
    """A folder that this process owns.

    Attributes:
        folder: The folder.
        owner: This process, as the lock file names it.
        learner: The `Folders` of the learner that trains into the folder, or was the last to do so.
        busy: Whether that learner trains.
        lost: The process that has taken the folder over, if any.
    """

    folder: Path
    owner: _Owner
    learner: Folders
    busy: bool = True
    lost: _Owner | None = None

    @property
    def file(self) -> Path:
        """The lock file."""
        return self.folder / NAME

    def beat(self) -> None:
        """Give a sign of life, or notice that another process has taken the folder over."""
        found = _read(self.file)
        if found is not None and found[0].token == self.owner.token:
            with suppress(OSError):  # the next sign of life may succeed
                os.utime(self.file)
        elif found is not None and self.lost is None:
            self.lost = found[0]
            self.learner.surface(self.check)

    def check(self) -> None:
        """Check that the folder is still that of this process; a lock file that is gone is written again.

        Raises:
            CheckpointError: Another process has taken the folder over.
        """
        if self.lost is None:
            found = _read(self.file)
            if found is not None and found[0].token != self.owner.token:
                self.lost = found[0]
            elif found is None and self.folder.is_dir():
                self.lost = _take(self.folder, self.owner)
        if self.lost is not None:
            raise CheckpointError(
                f"Another run has taken over the folder {self.folder}: {self.lost}. This process ({self.owner}) had "
                f"shown no sign of life for {SILENCE:g} s, as a suspended one does, or its lock file {NAME} was "
                f"removed. It writes nothing more there. Continue this run in another folder, from an earlier "
                f"checkpoint."
            )

    def remove(self) -> None:
        """Remove the lock file, unless it is that of another process."""
        found = _read(self.file)
        if found is not None and found[0].token == self.owner.token:
            with suppress(OSError):
                self.file.unlink()


_held: dict[str, _Lock] = {}
"""The folders that this process owns, by their real paths."""

_changing = threading.RLock()
_beating: list[threading.Thread] = []


def check_owned(folder: Path) -> None:
    """Check that no other process has taken over a folder that this process has locked.

    Raises:
        CheckpointError: One has.
    """
    lock = _held.get(os.path.realpath(folder))
    if lock is not None and lock.owner.process == os.getpid():
        lock.check()


@dataclass(eq=False)
class Folders:
    """The folders of checkpoints that one learner trains into.

    Args:
        surface: Called with a callable that raises an error, which the training thread is to call soon.
    """

    surface: Callable[[Callable[[], None]], None]
    _locks: list[_Lock] = field(default_factory=list[_Lock])

    def hold(self, folders: Iterable[Path], waits: bool) -> None:
        """Own these folders from now on.

        Args:
            folders: The folders, which are made if they do not exist.
            waits: Whether to wait up to `PATIENCE` seconds for the owner of a folder, which may be ending.

        Raises:
            CheckpointError: A folder cannot be written, another process owns it and does not end, or another learner
                of this process trains into it. No folder is owned then.
        """
        try:
            for path in dict.fromkeys(map(os.path.realpath, folders)):
                with _changing:
                    self._hold_here(Path(path))
                if path not in _held:
                    owner = _Owner.here()
                    _wait_for(Path(path), owner, PATIENCE if waits else 0.0)
                    with _changing:
                        _held[path] = _Lock(Path(path), owner, self)
                        self._locks.append(_held[path])
                        _begin_beating()
        except BaseException:
            self.release()
            raise

    def _hold_here(self, path: Path) -> None:
        """Take a folder over from another learner of this process, which does not train.

        Raises:
            CheckpointError: The other learner trains.
        """
        lock = _held.get(str(path))
        if lock is None:
            return
        if lock.owner.process != os.getpid() or lock.lost is not None:  # this process was forked, or has lost it
            del _held[str(path)]
        elif lock.busy:
            raise CheckpointError(
                f"Another learner of this process trains into the folder {path}, and the two would replace each "
                f"other's checkpoints. Nothing has been changed. Wait until its fit has ended, or give this run a "
                f"folder of its own."
            )
        else:
            lock.learner, lock.busy = self, True
            self._locks.append(lock)

    def idle(self) -> None:
        """Take note that the fit has ended, while work of it is still being written: keep the folders."""
        for lock in self._locks:
            lock.busy = lock.busy and lock.learner is not self

    def release(self) -> None:
        """Own no folder any more."""
        with _changing:
            for lock in self._locks:
                if lock.learner is self and lock.owner.process == os.getpid():
                    _held.pop(str(lock.folder), None)
                    lock.remove()
            self._locks.clear()


def _wait_for(folder: Path, owner: _Owner, patience: float) -> None:
    """Take a folder, and wait for its present owner if there is one.

    Raises:
        CheckpointError: The folder cannot be written, or its owner did not end in time.
    """
    end, told = time.monotonic() + patience, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while (other := _take(folder, owner)) is not None:
            left = end - time.monotonic()
            if left <= 0:
                raise _in_use(folder, other, patience)
            if not told:
                told = True
                text = "flowtrain: the folder %s is in use by %s; waiting up to %g s for it to end"
                _logger.warning(text, folder, other, patience)
            time.sleep(min(_LOOK, left))
    except OSError as error:
        raise CheckpointError(
            f"Checkpointer cannot write into the folder {folder}: {error}. Nothing has been trained. Choose another "
            f"folder, or make this one writable."
        ) from error


def _take(folder: Path, owner: _Owner) -> _Owner | None:
    """Take a folder that nobody owns, or whose owner is dead; otherwise return the owner.

    Raises:
        OSError: The folder cannot be written.
    """
    lock, own = folder / NAME, folder / f"{NAME}.{owner.token}.tmp"
    try:
        own.write_text(json.dumps(asdict(owner)) + "\n", "utf-8")
        while not _appears(own, lock):
            with _alone(folder) as alone:
                found = _read(lock)
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
        found = _read(lock)
        return None if found is None or found[0].token == owner.token else found[0]
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


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


def _read(lock: Path) -> tuple[_Owner, float] | None:
    """Return the owner in a lock file and the time of its last sign of life; ``None`` if there is no such file.

    A file that is damaged, or of another version, has an owner without a name.
    """
    try:
        with lock.open(encoding="utf-8") as file:  # opening it has a network file system ask for the time again
            text, seen = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return _Owner(), time.time()
    try:
        return _Owner(**json.loads(text)), seen
    except (ValueError, TypeError):
        return _Owner(), seen


def _in_use(folder: Path, other: _Owner, patience: float) -> CheckpointError:
    stopped = "Wait until that process has ended"
    if other.is_near:
        with suppress(OSError):
            state = Path(f"/proc/{other.process}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
            if state == "T":
                stopped = (
                    f"That process is stopped by a signal: continue it (kill -CONT {other.process}) or end it (kill "
                    f"-KILL {other.process})"
                )
    else:
        stopped += f" (one that is dead counts as ended {SILENCE:g} s after its last sign of life, the time of {NAME})"
    waited = f" It did not end within {patience:g} s." if patience else ""
    waits = "" if patience else f" fit(..., resume='auto') waits up to {PATIENCE:g} s for a run that is ending."
    return CheckpointError(
        f"The folder {folder} is in use by another run: {other}.{waited} Two runs in one folder would replace each "
        f"other's checkpoints and mix their logs. Nothing has been changed. {stopped}, or give this run a folder of "
        f"its own.{waits}"
    )


def _begin_beating() -> None:
    """Start the thread that gives signs of life, once in a process."""
    if not any(each.is_alive() for each in _beating):
        if not _beating:
            atexit.register(_release_all)
        _beating[:] = [threading.Thread(target=_beat, name="flowtrain-in-use", daemon=True)]
        _beating[0].start()


def _beat() -> None:
    while True:
        time.sleep(BEAT)
        for lock in list(_held.values()):
            lock.beat()


def _release_all() -> None:
    """Remove the lock files of a process that ends, after its lanes have ended."""
    for lock in list(_held.values()):
        if lock.owner.process == os.getpid():
            lock.remove()
