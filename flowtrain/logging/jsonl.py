"""JSON lines: one JSON object for each record, in a file that any program can read.

::

    {"name": "Loss", "group": "Step/TrainingPhase", "step": 1, "kind": "Value", "value": 0.5, "time": 1735689600.0}

The type of ``value`` depends on ``kind``:

=============  =====================================================================================================
``Value``      a number; ``"NaN"``, ``"Infinity"`` or ``"-Infinity"``, for which JSON has no numbers and which
               Python's ``float`` reads
``Text``       a text
``Histogram``  ``{"edges": [...], "counts": [...], "left_out": n}``; n values were NaN or infinite
``Settings``   an object
``Image``      the path of a PNG file, relative to the folder of this file
``Figure``     the path of a PNG file, relative to the folder of this file
``File``       the path of a copy of the file, relative to the folder of this file
=============  =====================================================================================================

These files are in a folder beside the log: those of ``log.jsonl`` in ``log.jsonl.files/<group>/<name>/<step>.png``. A
file is complete before the line with its path is written, so a line never names a file that is missing or incomplete.
"""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any
from urllib.parse import quote

from flowtrain.errors import LoggingError
from flowtrain.logging.backend import Figure, File, Group, Histogram, Image, Loggable, Run, Settings, Text, Value
from flowtrain.logging.distribution import distribution
from flowtrain.logging.files import AppendingFile, FileBackend, read_file, remove_temporary, replace_file
from flowtrain.logging.names import readable
from flowtrain.logging.pictures import figure_png, image_png
from flowtrain.logging.values import number, refused, settings

__all__ = ["JsonlBackend"]

_quoted = json.encoder.encode_basestring_ascii
_BLOCK = 1 << 16  # bytes that are read at once while the last line break is looked for
_WITH_FILE = b"\0"
"""The first byte of a record with a file. The line and the content of the file follow."""


class JsonlBackend(FileBackend):
    """Write JSON lines.

    Give each run its own file: records are added after those that the file has. A record is in the file when `write`
    returns, and on the disk when `flush` returns.

    Args:
        path: The file, such as ``"runs/a/log.jsonl"``; it is made with its folders when training begins. With
            ``{rank}`` in it, as in ``"runs/a/log-{rank}.jsonl"``, each rank of a training writes a file of its own.
        append: Whether the file may have records of another run. Otherwise training begins with a warning of them.

    >>> JsonlBackend("/tmp/log.jsonl").encode(Value(0.5), "Loss", 1, ("Step", "TrainingPhase"))[:61]
    b'{"name": "Loss", "group": "Step/TrainingPhase", "step": 1, "k'
    """

    accepts = (Value, Image, Text, Histogram, Figure, File, Settings)

    def encode(self, loggable: Loggable, name: str, step: int, group: Group) -> bytes:
        """Return a line of JSON; for an image, a figure or a file, the line and the content of the file."""
        if type(loggable) is Value and type(step) is int and type(name) is str:  # nearly all records: the fast form
            return _line(number(loggable.value), name, step, group)
        kind = next((each.__name__ for each in self.accepts if isinstance(loggable, each)), "")
        record = {"name": name, "group": "/".join(group), "step": step, "kind": kind}
        content = b""
        if isinstance(loggable, Value):
            value: Any = _valid(number(loggable.value))
        elif isinstance(loggable, (Image, Figure, File)):
            content, suffix = _content(loggable)
            folders = map(_part, "/".join((*group, name)).split("/"))
            value = "/".join((f"{os.path.basename(self.path)}.files", *folders, f"{step}{suffix}"))
        elif isinstance(loggable, Text):
            value = readable(str(loggable.text))
        elif isinstance(loggable, Histogram):
            counted = distribution(loggable)
            value = {"edges": counted.edges, "counts": counted.counts, "left_out": counted.left_out}
        elif isinstance(loggable, Settings):
            value = _valid(settings(loggable.values))
        else:
            raise refused(self, loggable)
        line = json.dumps({**record, "value": value, "time": time.time()}, allow_nan=False).encode() + b"\n"
        return b"".join((_WITH_FILE, line, content)) if isinstance(loggable, (Image, Figure, File)) else line

    def _open_file(self, run: Run) -> AppendingFile:
        if run.resumed:  # a process that was killed may have left a picture unfinished
            remove_temporary(f"{self.path}.files", within=True)
        return AppendingFile(self.path, self._whole_lines)

    def _whole_lines(self, descriptor: int) -> int:
        """Return the number of bytes up to the last line break of a file, which is read from its end.

        Raises:
            LoggingError: The file is none of JSON lines. It has not been changed.
        """
        begin = os.pread(descriptor, 40, 0)
        if begin[:1] not in (b"", b"{"):
            raise LoggingError(
                f"{self.path} begins with {begin.decode(errors='replace')!r}, so it is no file of a JsonlBackend, "
                f"whose lines begin with {{. Log to another path. The file has not been changed."
            )
        end = os.fstat(descriptor).st_size
        while end > 0:
            start = max(0, end - _BLOCK)
            found = os.pread(descriptor, end - start, start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
        return 0

    def _append(self, file: AppendingFile, record: bytes) -> None:
        if record.startswith(_WITH_FILE):
            end = record.index(b"\n") + 1
            line, content = record[1:end], record[end:]
            replace_file(os.path.join(os.path.dirname(self.path), json.loads(line)["value"]), content)
            record = line
        file.append(record)

    def _append_all(self, file: AppendingFile, records: Sequence[bytes]) -> None:
        for with_file, group in groupby(records, lambda record: record.startswith(_WITH_FILE)):
            if with_file:
                for record in group:
                    self._append(file, record)
            else:
                file.append_all(list(group))


def _line(value: float | int, name: str, step: int, group: Group) -> bytes:
    """Return the line of a number, the same as `json.dumps` would write in more than twice the time."""
    written = repr(value) if type(value) is int or math.isfinite(value) else json.dumps(_valid(value))
    return (
        f'{{"name": {_quoted(name)}, "group": {_quoted("/".join(group))}, "step": {step}, "kind": "Value", '
        f'"value": {written}, "time": {time.time()}}}\n'
    ).encode()


def _valid(value: Any) -> Any:
    """Return a value in which texts replace the numbers that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: _valid(item) for name, item in value.items()}
    return [_valid(item) for item in value] if isinstance(value, list) else value


def _content(loggable: Image | Figure | File) -> tuple[bytes, str]:
    if isinstance(loggable, Image):
        return image_png(loggable), ".png"
    if isinstance(loggable, Figure):
        return figure_png(loggable), ".png"
    return read_file(loggable), os.path.splitext(os.fspath(loggable.path))[1]


def _part(name: str) -> str:
    """Return a name as a part of a path: it cannot lead to another folder, and is not too long for a file system."""
    quoted = quote(name, safe=" ()[]+,=@")
    if len(quoted) > 200:
        quoted = f"{quoted[:190]}~{zlib.crc32(name.encode()):08x}"
    return {"": "%", ".": "%2E", "..": "%2E%2E"}.get(quoted, quoted)  # these parts would name another folder
