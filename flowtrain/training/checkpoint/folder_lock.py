"""The lock of a folder of checkpoints: one process at a time trains into a folder.

The lock is a file in the folder (`flowtrain.training.checkpoint.lock_file`), which goes when the fit has ended. One
thread gives signs of life for all folders of this process: it touches their lock files every `BEAT` seconds.

An owner that was only silent (a suspended machine) finds another owner in the file when it wakes up: it writes no
checkpoint any more, and its fit ends with an error.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from flowtrain.errors import CheckpointError
from flowtrain.training.checkpoint.lock_file import NAME, SILENCE, LockOwner, read, take

__all__ = ["BEAT", "PATIENCE", "Folders", "check_owned"]

BEAT = 10.0
"""Seconds between two signs of life of an owner."""

PATIENCE = 90.0
"""Seconds for which a fit that resumes waits for an owner to end: longer than `SILENCE`, and than the usual 30 seconds
between the SIGTERM and the SIGKILL of a batch system."""

_LOOK = 0.25
"""Seconds between two looks at a lock."""

_PATIENT = 1.0
"""Seconds for which the end of the thread that gives signs of life is waited for."""

_logger = logging.getLogger("flowtrain")


@dataclass
class _Lock:
    """A folder that this process owns.

    Attributes:
        folder: The folder.
        owner: This process, as the lock file names it.
        learner: The `Folders` of the learner that trains into the folder, or was the last to do so.
        made: Whether this process has made the folder.
        busy: Whether that learner trains.
        lost: The process that has taken the folder over, if any.
    """

    folder: Path
    owner: LockOwner
    learner: Folders
    made: bool
    busy: bool = True
    lost: LockOwner | None = None

    @property
    def file(self) -> Path:
        """The lock file."""
        return self.folder / NAME

    def beat(self) -> None:
        """Give a sign of life, or notice that another process has taken the folder over."""
        found = read(self.file)
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
            found = read(self.file)
            if found is not None and found[0].token != self.owner.token:
                self.lost = found[0]
            elif found is None and self.folder.is_dir():
                self.lost = take(self.folder, self.owner)
        if self.lost is not None:
            raise CheckpointError(
                f"Another run has taken over the folder {self.folder}: {self.lost}. This process ({self.owner}) had "
                f"shown no sign of life for {SILENCE:g} s, as a suspended one does, or its lock file {NAME} was "
                f"removed. It writes nothing more there. Continue this run in another folder, from an earlier "
                f"checkpoint."
            )

    def remove(self) -> None:
        """Remove the lock file, unless it is that of another process, and the folder if the fit has left it empty."""
        found = read(self.file)
        if found is not None and found[0].token == self.owner.token:
            with suppress(OSError):
                self.file.unlink()
                if self.made:
                    self.folder.rmdir()  # which fails if anything is in it


_held: dict[str, _Lock] = {}
"""The folders that this process owns, by their real paths."""

_changing = threading.RLock()


class _Beats(threading.Thread):
    """Gives signs of life for the folders of this process, every `BEAT` seconds, until it is ended."""

    def __init__(self) -> None:
        super().__init__(name="flowtrain-in-use", daemon=True)
        self._ended = threading.Event()

    def run(self) -> None:
        """Give signs of life."""
        while not self._ended.wait(BEAT):
            for lock in list(_held.values()):
                lock.beat()

    def end(self) -> None:
        """Return when the thread has ended, or is still busy with a file system that does not answer."""
        self._ended.set()
        if self.is_alive() and self is not threading.current_thread():
            self.join(_PATIENT)


_beating: list[_Beats] = []
"""The thread that gives signs of life; empty if this process owns no folder."""


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
                    owner, made = LockOwner.here(), not os.path.exists(path)
                    _wait_for(Path(path), owner, PATIENCE if waits else 0.0)
                    with _changing:
                        _held[path] = _Lock(Path(path), owner, self, made)
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
            ended = [] if _held else _beating[:]
            del _beating[: len(ended)]
        for thread in ended:  # outside of the lock, in case the thread waits for a file system
            thread.end()


def _wait_for(folder: Path, owner: LockOwner, patience: float) -> None:
    """Take a folder, and wait for its present owner if there is one.

    Raises:
        CheckpointError: The folder cannot be written, or its owner did not end in time.
    """
    end, told = time.monotonic() + patience, False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while (other := take(folder, owner)) is not None:
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


def _in_use(folder: Path, other: LockOwner, patience: float) -> CheckpointError:
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
    """Have signs of life given from now on, by one thread in a process."""
    if not any(each.is_alive() for each in _beating):  # a forked child has a copy of the list, and not the thread
        atexit.unregister(_release_all)
        atexit.register(_release_all)
        _beating[:] = [_Beats()]
        _beating[0].start()


def _release_all() -> None:
    """Remove the lock files of a process that ends, after its lanes have ended."""
    for lock in list(_held.values()):
        if lock.owner.process == os.getpid():
            lock.remove()
