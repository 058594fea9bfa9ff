"""The files of recordings: their format, the backend that writes them, and a function that reads them.

A file begins with a line of text that has the version of the format. Frames follow. A frame has a head of fixed size
(`_HEAD`: whether the body is compressed, its bytes in the file, its bytes when it is not compressed, and a checksum of
its bytes in the file), and a body: a document of JSON, and the bytes to which the document refers.

A body is data. No part of the format names code to run.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from flowtrain.errors import LoggingError
from flowtrain.logging.backend import Group, Loggable, Run
from flowtrain.logging.files import AppendingFile, FileBackend

__all__ = ["VERSION", "Frame", "FrameReader", "RecordingBackend", "pack_frame", "version_of"]

VERSION = 1
"""The version of the format. A later version of flowtrain reads the files of all earlier ones."""

_MAGIC = b"flowtrain recording "
_FIRST = _MAGIC + b"%d\n" % VERSION
_HEAD = struct.Struct("<BQQI")
_LENGTH = struct.Struct("<Q")
_SAMPLE = 1 << 16
"""The bytes of a body that are compressed for a trial: the weights of a model hardly get smaller, and take long."""


@dataclass(frozen=True, eq=False)
class Frame(Loggable):
    """One frame of a recording, as the bytes that are written to the file.

    Args:
        data: The bytes.
    """

    data: bytes


def pack_frame(document: dict[str, Any], content: bytes) -> bytes:
    """Return the bytes of a frame.

    Args:
        document: The document, of values that JSON has.
        content: The bytes to which the document refers.
    """
    text = json.dumps(document, separators=(",", ":")).encode()
    body = b"".join((_LENGTH.pack(len(text)), text, content))
    sample = body[:_SAMPLE]
    stored = body
    if len(body) <= _SAMPLE or len(zlib.compress(sample, 1)) < 0.85 * len(sample):
        stored = zlib.compress(body, 1)
    compressed = len(stored) < len(body)
    stored = stored if compressed else body
    return _HEAD.pack(compressed, len(stored), len(body), zlib.crc32(stored)) + stored


class RecordingBackend(FileBackend):
    """Writes the frames of a recording to a file; `flowtrain.record` makes one.

    As the other backends of files it appends to the file of a run that is resumed, after its frames up to the
    checkpoint, and opens no file but its own.

    Args:
        path: The file. With ``{rank}`` in it each rank writes a file of its own.
        append: Whether recordings of other runs are expected in the file. Otherwise training begins with a warning.
    """

    accepts = (Frame,)

    def encode(self, loggable: Loggable, name: str, step: int, group: Group) -> bytes:
        """Return the bytes of the frame."""
        if not isinstance(loggable, Frame):
            raise LoggingError(
                f"{self!r} writes the events of one callback, and {type(loggable).__name__} is a loggable of others. "
                f"Log it to a JsonlBackend(path)."
            )
        return loggable.data

    def _open_file(self, run: Run) -> AppendingFile:
        file = AppendingFile(self.path, self._whole_frames)
        if not file.size:
            file.append(_FIRST)
        return file

    def _whole_frames(self, descriptor: int) -> int:
        """Return the number of bytes up to the end of the last whole frame.

        Raises:
            LoggingError: The file is no recording, or one of another version. It has not been changed.
        """
        with os.fdopen(os.dup(descriptor), "rb") as file:
            file.seek(0)
            begin = file.read(len(_FIRST))
            if not begin or (len(begin) < len(_FIRST) and _FIRST.startswith(begin)):
                return 0  # a process was killed when it had begun the file
            version_of(begin, self.path, " The file has not been changed.")
            if begin != _FIRST:
                raise LoggingError(
                    f"{self.path} is a recording of another version of the format than {VERSION}, to which this "
                    f"version of flowtrain appends nothing. Record to another path. The file has not been changed."
                )
            size, end = os.fstat(descriptor).st_size, len(_FIRST)
            while end + _HEAD.size <= size:
                file.seek(end)
                _, stored, _, _ = _HEAD.unpack(file.read(_HEAD.size))
                if end + _HEAD.size + stored > size:
                    break
                end += _HEAD.size + stored
            return end


def version_of(begin: bytes, path: str, then: str = "") -> int:
    """Return the version of the format, from the first bytes of a file.

    Args:
        begin: The first line, or the beginning of it.
        path: The file, for the message.
        then: A sentence to add to the message.

    Raises:
        LoggingError: The file is no recording.
    """
    number = begin[len(_MAGIC) :].partition(b"\n")[0]
    if not begin.startswith(_MAGIC) or not number.isdigit():
        raise LoggingError(
            f"{path} begins with {begin[:30].decode(errors='replace')!r}, so it is no recording, which begins with "
            f"{_MAGIC.decode()!r} and the version. Name a file that record(callback, to=path) has made.{then}"
        )
    return int(number)


class FrameReader:
    """Reads the frames of a recording, as far as they are whole.

    Args:
        path: The file.

    Attributes:
        version: The version of the format.
        cut: Where and why reading has ended before the end of the file; empty if the file is whole.

    Raises:
        LoggingError: The file cannot be read, is no recording, or is of a later version.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.cut = ""
        try:
            self._file: BinaryIO = open(path, "rb")  # noqa: SIM115  # closed by `close`
        except OSError as error:
            raise LoggingError(f"{path} cannot be read: {error.strerror}.") from error
        try:
            begin = self._file.readline(len(_FIRST) + 20)
            if not begin or (len(begin) < len(_FIRST) and _FIRST.startswith(begin)):
                self.version = VERSION
                self.cut = f"{path} is cut off within its first line: it has {len(begin)} bytes."
                return
            self.version = version_of(begin, path)
            if self.version > VERSION:
                raise LoggingError(
                    f"{path} is a recording of version {self.version} of the format, and this flowtrain reads versions "
                    f"up to {VERSION}. Install the version of flowtrain that has made it, or a later one."
                )
        except BaseException:
            self._file.close()
            raise

    def __iter__(self) -> Iterator[tuple[dict[str, Any], memoryview]]:
        """Yield the document and the content of each whole frame, in order."""
        number = 0
        while not self.cut:
            at = self._file.tell()
            head = self._file.read(_HEAD.size)
            if not head:
                return
            body, why = self._body(head)
            if body is None:
                self.cut = f"{self.path} is {why} in frame {number + 1}, at byte {at}: the {number} before it are read."
                return
            number += 1
            yield body

    def _body(self, head: bytes) -> tuple[tuple[dict[str, Any], memoryview] | None, str]:
        """Return the document and the content of a frame, or ``None`` and the word for what is wrong with it."""
        if len(head) < _HEAD.size:
            return None, "cut off"
        compressed, length, raw, checksum = _HEAD.unpack(head)
        left = os.fstat(self._file.fileno()).st_size - self._file.tell()
        if length > left:
            return None, "cut off"
        stored = self._file.read(length)
        if zlib.crc32(stored) != checksum or compressed > 1:
            return None, "damaged"
        try:
            body = _expanded(stored, raw) if compressed else stored
            (size,) = _LENGTH.unpack_from(body)
            text = body[_LENGTH.size : _LENGTH.size + size]
            document = json.loads(text)
        except (zlib.error, struct.error, ValueError, RecursionError):
            return None, "damaged"
        if len(body) != raw or len(text) != size or type(document) is not dict:
            return None, "damaged"
        return (document, memoryview(body)[_LENGTH.size + size :]), ""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _expanded(stored: bytes, size: int) -> bytes:
    """Return the bytes that were compressed: not more than `size`, whatever a forged file may hold.

    Raises:
        ValueError: There are more.
    """
    expander = zlib.decompressobj()
    body = expander.decompress(stored, size + 1)
    if len(body) > size or not expander.eof:
        raise ValueError("a frame is larger than its head says")
    return body
