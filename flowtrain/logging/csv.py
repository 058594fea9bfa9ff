"""CSV: values as a table, one row for each step of a group, one column for each name.

::

    group,step,Loss,Accuracy
    Step/TrainingPhase,1,0.75,0.5
    Step/TrainingPhase,2,0.5,
    Epoch/TrainingPhase,1,0.625,0.5

A value with the group and the step of the last row is added to that row. A new name gets a column at the end: the whole
file is then written again under another name and renamed. The names ``group`` and ``step`` get ``_`` at their end,
because the first columns have these names; so do ``group_``, ``group__`` and so on. The file has no clock times, so
equal runs write equal files.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from flowtrain.errors import LoggingError
from flowtrain.logging.backend import Group, Loggable, Run, Value
from flowtrain.logging.files import AppendingFile, FileBackend, impossible, remove_temporary, replace_file
from flowtrain.logging.values import number, refused

__all__ = ["CsvBackend"]

_FIXED = ["group", "step"]


class CsvBackend(FileBackend):
    """Write values as a table. It takes only `Value`.

    Give each run its own file: rows are added after those that the table has.

    Args:
        path: The file, such as ``"runs/a/values.csv"``; it is made with its folders when training begins. With
            ``{rank}`` in it, as in ``"runs/a/values-{rank}.csv"``, each rank of a training writes a file of its own.
        append: Whether the table may have rows of another run. Otherwise training begins with a warning of them.
    """

    accepts = (Value,)

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        super().__init__(path, append=append)
        self._columns = list(_FIXED)
        self._rows = 0
        self._last: list[str] = []  # the cells of the last row
        self._start = 0  # the position in bytes at which the last row begins
        self._own = False  # whether the last row is of this run, so that cells may be added to it
        self._kept = False  # whether the table has rows that must survive a power failure

    def encode(self, loggable: Loggable, name: str, step: int, group: Group) -> bytes:
        """Return the group, step, name and value as JSON."""
        if not isinstance(loggable, Value):
            raise refused(self, loggable)
        return json.dumps(["/".join(group), str(step), name, repr(number(loggable.value))]).encode()

    def flush(self) -> Any:
        """Bring the file to the disk; return its columns, the number of its rows, and the cells of the last one."""
        if super().flush() is None:
            return None
        self._kept = True
        return {"columns": list(self._columns), "rows": self._rows, "last": list(self._last), "own": self._own}

    def check(self, position: Any) -> None:
        """Check that the table reaches to a position.

        Raises:
            LoggingError: The table has fewer rows, or other columns, than at that position, or it is impossible.
        """
        if self._file is None or position is None:
            return
        if not _is_position(position):
            raise impossible(self.path, position)
        columns, count = position["columns"], position["rows"]
        # The last row is written again for each of its cells. A process that is killed meanwhile leaves the table
        # without this row, and the position has its cells.
        if count > self._rows + 1 or self._columns[: len(columns)] != columns:
            raise LoggingError(
                f"{self.path} has {self._rows} rows of {', '.join(self._columns)}, and had {count} of "
                f"{', '.join(columns)} when the checkpoint was made: it is not the same file, or has been cut. Put it "
                f"back, or log this run to another path."
            )

    def restore(self, position: Any) -> None:
        """Remove the rows, columns and cells that were written after a position.

        Raises:
            LoggingError: As for `check`.
        """
        self.check(position)
        if self._file is not None and position is not None:
            kept = list(islice(self._read(), max(position["rows"] - 1, 0)))
            self._rewrite(position["columns"], [*kept, position["last"]] if position["rows"] else [])
            self._own = position.get("own", True)  # early checkpoints lack it

    def _open_file(self, run: Run) -> AppendingFile:
        remove_temporary(self.path)
        file = AppendingFile(self.path, self._whole_rows)
        try:
            self._load()
            self._own = run.resumed or run.id == self._run
            self._kept = self._rows > 0
            if not file.size:
                file.append(_text([self._columns]))
        except BaseException:  # the backend does not have the file yet, so nothing else would close it
            file.close()
            raise
        return file

    def _append(self, file: AppendingFile, record: bytes) -> None:
        group, step, name, value = json.loads(record)
        if name.rstrip("_") in _FIXED:
            name += "_"
        if name not in self._columns:
            file = self._rewrite([*self._columns, name], self._read())
        cell = self._columns.index(name)
        # Add the cell to the last row, by writing that row again, unless the row has a value there already.
        if self._own and self._last[:2] == [group, step] and not any(self._last[cell : cell + 1]):
            row = [*self._last[:cell], value, *self._last[cell + 1 :]]
            file.truncate(self._start)
            try:
                file.append(_text([row]))
            except BaseException:
                file.append(_text([self._last]))  # there is room for what was there
                raise
        else:
            row = [group, step, *[""] * (len(self._columns) - 2)]
            row[cell] = value
            start = file.size
            file.append(_text([row]))
            self._start = start
            self._rows += 1
        self._last, self._own = row, True

    def _rewrite(self, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> AppendingFile:
        """Write the whole file again with these columns, and continue with the new file."""
        width = len(columns)
        data = _text([columns, *([*row[:width], *[""] * (width - len(row))] for row in rows)])
        # Most columns come with the first rows. Before the first `flush` nothing must be on the disk, and a thousand
        # columns would wait for the disk a thousand times.
        replace_file(self.path, data, sync=self._kept)
        if self._file is not None:
            self._file.leave()
        self._file = AppendingFile(self.path, self._whole_rows)
        self._load()
        return self._file

    def _read(self) -> Iterator[list[str]]:
        """Yield the rows of the file, without the names of the columns."""
        return islice(self._table(), 1, None)

    def _table(self) -> Iterator[list[str]]:
        """Yield the columns, then the rows of the file.

        Raises:
            LoggingError: The file is gone, or is no table any more: another program has changed it.
        """
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                yield from csv.reader(file)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise LoggingError(
                f"{self.path} cannot be read as the table that CsvBackend has written: {error}. Another program has "
                f"moved or changed it. Put it back, or log to another path."
            ) from error

    def _load(self) -> None:
        """Read the columns, the number of rows and the last row of the file."""
        table = list(self._table())
        self._columns = table[0] if table else list(_FIXED)
        self._rows = max(len(table) - 1, 0)
        self._last = table[-1] if self._rows else []
        self._start = os.path.getsize(self.path) - len(_text([self._last])) if self._rows else 0

    def _whole_rows(self, descriptor: int) -> int:
        """Return the number of bytes up to the last line break of the table.

        Raises:
            LoggingError: The file is no table of a `CsvBackend`. It has not been changed.
        """
        data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        head = data.partition(b"\n")[0].decode(errors="replace").replace(",", ", ")
        begin = ", ".join(_FIXED)
        if head[: len(begin)] != begin[: len(head)]:  # a killed process may have written a part of it
            raise LoggingError(
                f"{self.path} begins with the columns {head:.80}, so it is no table of a CsvBackend, which begins with "
                f"{begin}. Log to another path. The file has not been changed."
            )
        return data.rfind(b"\n") + 1


def _is_position(position: Any) -> bool:
    """Tell whether a value is a position that `CsvBackend.flush` can have returned."""
    if type(position) is not dict or {*position, "own"} != {"columns", "rows", "last", "own"}:
        return False
    columns, rows, last = position["columns"], position["rows"], position["last"]
    return (
        all(type(each) is list and all(type(cell) is str for cell in each) for each in (columns, last))
        and columns[:2] == _FIXED
        and type(rows) is int
        and rows >= 0
        and type(position.get("own", True)) is bool
        and (2 <= len(last) <= len(columns) if rows else not last)
    )


def _text(rows: Iterable[Sequence[str]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode()
