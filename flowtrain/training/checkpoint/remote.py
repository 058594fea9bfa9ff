"""Places of checkpoints: paths of the file system, and addresses of a remote one, such as ``s3://bucket/runs/a``.

`fsspec <https://filesystem-spec.readthedocs.io>`_ gives access to remote file systems. `Remote` has the part of the
interface of `pathlib.Path` that checkpoints need, so that most code does not need to know the kind of a place; `place`
returns the one or the other for a user's path.

A remote file system has no rename that replaces a file at once, and no lock:

- A file is written within a transaction of fsspec. It has its name when all of it has arrived: an object store then
  completes the upload, other file systems rename a file. A failed upload is discarded. The pointers of a folder are
  written after the checkpoint that they name, so they never name one that is not complete.
- Only a file that is missing counts as missing. If the file system does not answer, this is an error (`Unreachable`):
  otherwise a fit with ``resume="auto"`` would begin anew, or continue from an early checkpoint.
- Nothing notices that two runs write into one folder.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from flowtrain.errors import CheckpointError, UsageError
from flowtrain.logging.extras import needed

__all__ = ["Place", "Remote", "Unreachable", "here", "place", "real_path", "written_at"]

_ADDRESS = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]+):(?P<slashes>/{1,2})(?P<rest>.*)")
"""An address. A protocol has two letters or more, so a drive of Windows is none."""


class Unreachable(CheckpointError):
    """A remote file system did not answer, so nobody knows whether a file is there."""


class Remote:
    """A file or folder of a remote file system, with the part of the interface of `pathlib.Path` that is needed here.

    Args:
        address: The address, such as ``"s3://bucket/runs/a/epoch-0001.ckpt"``.
    """

    __slots__ = ("_address",)

    def __init__(self, address: str) -> None:
        self._address = address.rstrip("/")

    @property
    def name(self) -> str:
        """The last part of the address."""
        return self._address.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        """The folder that this file or folder is in."""
        return Remote(self._address.rpartition("/")[0])

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self._address}/{name}")

    def with_suffix(self, suffix: str) -> Remote:
        """Return the address with another suffix."""
        return self.with_name(PurePath(self.name).with_suffix(suffix).name)

    def with_name(self, name: str) -> Remote:
        """Return the address of another file in the same folder."""
        return self.parent / name

    def resolve(self) -> Remote:
        """Return the address itself."""
        return self

    def is_file(self) -> bool:
        """Tell whether there is such a file."""
        return self._info().get("type") == "file"

    def is_dir(self) -> bool:
        """Tell whether there is such a folder. In an object store a folder is there if a file is in it."""
        return self._info().get("type") == "directory"

    def exists(self) -> bool:
        """Tell whether there is such a file or folder."""
        return bool(self._info())

    def _info(self) -> dict[str, Any]:
        """Return what the file system says about the address; empty if there is nothing."""
        try:
            with self.asked() as system:
                system.invalidate_cache()  # other programs write there too
                found: dict[str, Any] = system.info(self._address)
        except FileNotFoundError:
            return {}
        return found

    def read_text(self, encoding: str) -> str:
        """Return the content of a file.

        Raises:
            FileNotFoundError: There is no such file.
        """
        with self.asked() as system:
            content: bytes = system.cat_file(self._address)
        return content.decode(encoding)

    def iterdir(self) -> Iterator[Remote]:
        """Yield the files and folders in a folder; none if there is no such folder."""
        try:
            with self.asked() as system:
                system.invalidate_cache()
                found = system.ls(self._address, detail=False)
        except FileNotFoundError:
            return
        for each in found:
            yield self / each.rstrip("/").rpartition("/")[2]

    def glob(self, pattern: str) -> Iterator[Remote]:
        """Yield the files and folders in a folder whose names have a pattern."""
        return (each for each in self.iterdir() if fnmatchcase(each.name, pattern))

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file.

        Raises:
            FileNotFoundError: There is no such file, unless `missing_ok`.
        """
        with suppress(FileNotFoundError) if missing_ok else nullcontext(), self.asked() as system:
            system.rm_file(self._address)

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: `write_whole` makes a folder where a file needs one."""

    def write_whole(self, write: Callable[[Any], None], reached: Callable[[str], None], what: str) -> None:
        """Write a file that has its name when all of it has arrived. A failure leaves an earlier file as it was.

        Args:
            write: Writes the content into the open file.
            reached: Called at the points that `flowtrain.training.checkpoint.files.write_whole` names.
            what: The kind of the file, for those points.

        Raises:
            Unreachable: The file cannot be written.
            FileNotFoundError: The bucket does not exist.
        """
        with _system(self._address)[1]:
            try:
                self._write(write, reached, what)
            except FileNotFoundError:  # an object store needs no folders
                self._make_folders()
                self._write(write, reached, what)
        reached(f"{what} renamed")

    def _make_folders(self) -> None:
        """Make the folders that the file is in, but not the first part of the address: a bucket has an owner."""
        missing, folder = list[Remote](), self.parent
        while "/" in folder._address.partition("://")[2].strip("/") and not folder.exists():
            missing.append(folder)
            folder = folder.parent
        with self.asked() as system:
            for each in reversed(missing):
                system.mkdir(str(each), create_parents=False)

    def _write(self, write: Callable[[Any], None], reached: Callable[[str], None], what: str) -> None:
        with self.asked() as system, system.transaction:
            file = system.open(self._address, "wb")
            try:
                reached(f"{what} begun")
                write(file)
            except BaseException:
                with suppress(Exception):  # closed, and not completed: the transaction discards it
                    file.close()
                raise
            file.close()
            reached(f"{what} written")

    @contextmanager
    def asked(self) -> Generator[Any]:
        """Give the file system, in a context where its errors become those of a checkpoint.

        Raises:
            Unreachable: The file system has refused, or did not answer.
            FileNotFoundError: There is no such file.
        """
        try:
            yield _system(self._address)[0]
        except FileNotFoundError:
            raise
        except Exception as error:  # each file system has its own errors, few of which are an OSError
            raise Unreachable(
                f"{self._address} cannot be used: {type(error).__name__}: {error}. Check the address, the network, and "
                f"the credentials, which fsspec reads from the environment or its configuration."
            ) from error

    def __fspath__(self) -> str:
        return self._address

    def __str__(self) -> str:
        return self._address

    def __repr__(self) -> str:
        return f"Remote({self._address!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and other._address == self._address

    def __hash__(self) -> int:
        return hash(self._address)


Place: TypeAlias = "Path | Remote"


def place(path: str | os.PathLike[str]) -> Place:
    """Return the place that a user's path means.

    Args:
        path: A path; or the address of a file or folder. ``file://`` is a path of this machine.

    Raises:
        UsageError: The address names no folder, or has one slash, because it has been a `pathlib.Path`.
        CheckpointError: The package is missing that the protocol of the address needs, or there is no such protocol.
    """
    if isinstance(path, Remote):
        return path
    text = os.fspath(path)
    found = _ADDRESS.fullmatch(text)
    if found is None:
        return Path(text)
    if found["slashes"] == "/":
        whole = f"{found['protocol']}://{found['rest']}"
        raise UsageError(
            f"{path!r} is no address: it has one slash after the colon, and a Path removes the other one. Write "
            f"{whole!r}, as a text; for a folder of this machine write {f'./{text}'!r}."
        )
    if not found["rest"].strip("/"):
        raise UsageError(f"The address {text!r} names no folder. Write an address such as 's3://bucket/runs/a'.")
    if found["protocol"] in ("file", "local"):
        return Path(found["rest"])
    _system(text)  # so that a missing package is an error here
    return Remote(text)


def _system(address: str) -> tuple[Any, threading.Lock]:
    """Return the file system of an address, and the lock that a transaction needs."""
    found = _ADDRESS.fullmatch(address)
    assert found is not None
    return _system_of(f"{found['protocol']}://{found['rest'].partition('/')[0]}")


@lru_cache
def _system_of(root: str) -> tuple[Any, threading.Lock]:
    """Return a file system that belongs to checkpoints alone, since its transactions would hold the files of others.

    Several learners may share it, and it has one transaction at a time.

    Args:
        root: The beginning of an address: the protocol with the bucket or host.

    Raises:
        CheckpointError: The package is missing that the protocol needs, or there is no such protocol.
    """
    core = needed("fsspec.core", f"The address {root}", "remote", CheckpointError)
    try:
        return core.url_to_fs(root, skip_instance_cache=True)[0], threading.Lock()
    except ImportError as error:
        raise CheckpointError(
            f"The address {root} needs a package that cannot be imported: {error}. Install it beside "
            f"flowtrain[remote]: s3fs for s3://, gcsfs for gs://, adlfs for abfs://."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"The address {root} cannot be used: {error}. Write an address such as 's3://bucket/runs/a', or a path."
        ) from error


def real_path(path: Place) -> str:
    """Return a path absolute and without symbolic links; an address as it is."""
    return str(path) if isinstance(path, Remote) else os.path.realpath(path)


def written_at(path: Place) -> int:
    """Return when a file was written, in nanoseconds since the epoch."""
    if isinstance(path, Path):
        return path.stat().st_mtime_ns
    with path.asked() as system:
        return int(system.modified(str(path)).timestamp() * 1e9)


@contextmanager
def here(path: Place) -> Generator[Path]:
    """Give a context in which a file is on this machine: a remote one is copied, into the folder for temporary files.

    Raises:
        Unreachable: It cannot be copied.
        FileNotFoundError: There is no such file.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="flowtrain-") as folder:
        copy = Path(folder, path.name)
        with path.asked() as system:
            system.get_file(str(path), str(copy))
        yield copy
