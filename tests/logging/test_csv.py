"""CSV: a table that gets a new column for each new name."""

from __future__ import annotations

import csv
import os
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain.errors import LoggingError
from flowtrain.logging import CsvBackend, LoggerBackend, Run, Text, Value
from flowtrain.testing import BackendContract
from tests.support.examples import examples

STEP = ("Step", "TrainingPhase")


class TestContract(BackendContract):
    """`CsvBackend` is a backend."""

    def make_backend(self, folder: Path) -> LoggerBackend:
        return CsvBackend(folder / "runs" / "values.csv")

    def read(self, folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
        found: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
        with open(folder / "runs" / "values.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name not in ("group", "step") and value:
                        found[row["group"], name].append((int(row["step"]), float(value)))
        return found


def write(backend: CsvBackend, name: str, step: int, value: float, group: tuple[str, ...] = STEP) -> None:
    backend.write(backend.encode(Value(value), name, step, group))


def test_a_full_disk_takes_no_cell_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell is added by writing its row again."""
    path = tmp_path / "values.csv"
    backend = CsvBackend(path)
    backend.open(Run("r"))
    write(backend, "A", 1, 1.0)
    write(backend, "B", 1, 1.5)
    write(backend, "A", 2, 2.0)
    before, room, system_write = path.read_text(), path.stat().st_size, os.write

    def full(descriptor: int, data: bytes) -> int:
        """Write as much as there is room for."""
        left = room - path.stat().st_size
        if not left:
            raise OSError(28, "No space left on device")
        return system_write(descriptor, data[:left])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(LoggingError, match="cannot be written: No space left on device"):
            write(backend, "B", 2, 2.5)
        assert path.read_text() == before
        with pytest.raises(LoggingError, match="cannot be written: No space left on device"):
            write(backend, "A", 3, 3.0)
        assert path.read_text() == before
    write(backend, "B", 2, 2.5)
    assert path.read_text() == before.replace("2,2.0,", "2,2.0,2.5")
    backend.restore(backend.flush())  # the position knows of no row that was not written
    assert path.read_text() == before.replace("2,2.0,", "2,2.0,2.5")
    backend.close()


def test_the_table(tmp_path: Path) -> None:
    """One row for each step of a group; a new name adds a column at the end, which is empty in earlier rows."""
    path = tmp_path / "values.csv"
    backend = CsvBackend(path)
    backend.open(Run("r"))
    write(backend, "Loss", 1, 0.75)
    write(backend, "Loss", 2, 0.5)
    write(backend, "Accuracy, top 5", 2, 1.0)
    write(backend, "Loss", 1, float("nan"), ("Epoch", "TrainingPhase"))
    backend.close()
    assert path.read_text("utf-8") == (
        'group,step,Loss,"Accuracy, top 5"\n'
        "Step/TrainingPhase,1,0.75,\n"
        "Step/TrainingPhase,2,0.5,1.0\n"
        "Epoch/TrainingPhase,1,nan,\n"
    )


def test_a_second_value_of_one_name_and_step_is_another_row(tmp_path: Path) -> None:
    """As an evaluation after training, which has the number of the last training epoch."""
    path, group = tmp_path / "values.csv", ("Epoch", "ValidationPhase")
    backend = CsvBackend(path)
    backend.open(Run("r"))
    for value in (0.5, 8.5):
        write(backend, "Loss", 1, value, group)
        write(backend, "Accuracy", 1, value / 10, group)
    backend.close()
    assert path.read_text("utf-8") == (
        "group,step,Loss,Accuracy\nEpoch/ValidationPhase,1,0.5,0.05\nEpoch/ValidationPhase,1,8.5,0.85\n"
    )


@given(
    entries=st.lists(st.tuples(st.sampled_from(["A", "B", 'C"\n,']), st.integers(1, 3)), min_size=1, max_size=12),
    data=st.data(),
)
@settings(max_examples=examples(40))
def test_restoring_anywhere_gives_the_file_of_that_moment(
    entries: list[tuple[str, int]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rule 28: restoring to a position gives the earlier bytes, also within a row and before a column was added."""
    place = data.draw(st.integers(0, len(entries)))
    path = tmp_path_factory.mktemp("csv") / "values.csv"
    backend = CsvBackend(path)
    backend.open(Run("r"))
    moments = [(backend.flush(), path.read_bytes())]
    for number, (name, step) in enumerate(entries):
        write(backend, name, step, number / 4)
        moments.append((backend.flush(), path.read_bytes()))
    again = CsvBackend(path)
    again.open(Run("r", resumed=True))
    again.restore(moments[place][0])
    assert path.read_bytes() == moments[place][1]
    for number, (name, step) in list(enumerate(entries))[place:]:
        write(again, name, step, number / 4)
    assert path.read_bytes() == moments[-1][1]
    backend.close()
    again.close()


def test_another_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "values.csv"
    path.write_text("a,b\n1,2\n", "utf-8")
    with pytest.raises(LoggingError, match=r"values\.csv begins with the columns a, b, so it is no table of a CsvB"):
        CsvBackend(path, append=True).open(Run("r"))
    assert path.read_text("utf-8") == "a,b\n1,2\n"
    path.write_text("group,step\n", "utf-8")
    backend = CsvBackend(path)
    backend.open(Run("r", resumed=True))
    with pytest.raises(LoggingError, match=r"has 0 rows of group, step, and had 2 of group, step, Loss when the che"):
        backend.restore({"columns": ["group", "step", "Loss"], "rows": 2, "last": ["Step", "2", "1.0"]})
    backend.close()


def test_values_only(tmp_path: Path) -> None:
    with pytest.raises(LoggingError, match=r"CsvBackend\('.*v\.csv'\) takes Value, and got a Text\."):
        CsvBackend(tmp_path / "v.csv").encode(Text("t"), "Name", 1, STEP)


def test_a_table_without_its_last_row_is_brought_back(tmp_path: Path) -> None:
    """Each cell of a row writes the row again: a process that is killed meanwhile leaves the table without the row."""
    path = tmp_path / "values.csv"
    backend = CsvBackend(path)
    backend.open(Run("a"))
    for step in (1, 2, 3):
        write(backend, "a", step, step / 2)
        write(backend, "b", step, step / 4)
    position, whole = backend.flush(), path.read_bytes()
    backend.close()
    for rows in (3, 2):
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[: rows + 1]))
        backend = CsvBackend(path)
        backend.open(Run("a", resumed=True))
        backend.restore(position)
        backend.close()
        assert path.read_bytes() == whole
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    backend = CsvBackend(path)
    backend.open(Run("a", resumed=True))
    with pytest.raises(LoggingError, match=r"has 1 rows of .* and had 3 of"):
        backend.restore(position)
    backend.close()


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    kept = [tmp_path / name for name in ("values.csv.tmp", "other.csv.12.tmp", "values.csv.a.tmp")]
    for path in (*kept, tmp_path / "values.csv.12.tmp"):
        path.touch()
    backend = CsvBackend(tmp_path / "values.csv")
    backend.open(Run("a"))
    backend.close()
    assert {*tmp_path.iterdir()} == {*kept, tmp_path / "values.csv"}


def test_columns_that_come_before_the_first_flush_do_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A metric of a thousand classes has a thousand columns, which all come with the first row."""
    waits: list[int] = []
    monkeypatch.setattr("flowtrain.logging.files.os.fsync", waits.append)
    backend = CsvBackend(tmp_path / "values.csv")
    backend.open(Run("r"))
    for number in range(50):
        write(backend, f"F1.{number}", 1, 0.5)
    assert waits == []
    backend.flush()
    assert len(waits) == 1
    write(backend, "Loss", 1, 0.5)
    assert len(waits) == 2  # from the flush on, the rows must survive a power failure while they are written again
    backend.close()
    assert (tmp_path / "values.csv").read_text("utf-8").count(",0.5") == 51


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda path: path.unlink(), r".*No such file"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\xff,1,2\n"), r"'utf-8' codec can't decode byte"),
        (lambda path: path.write_text("group,step," + "a" * 200_000 + "\n"), r"field larger than field limit"),
    ],
)
def test_a_table_that_another_program_has_changed(change: Callable[[Path], Any], text: str, tmp_path: Path) -> None:
    path = tmp_path / "values.csv"
    backend = CsvBackend(path)
    backend.open(Run("r"))
    write(backend, "Loss", 1, 0.5)
    change(path)
    with pytest.raises(LoggingError) as raised:
        write(backend, "Other", 1, 0.5)
    with suppress(LoggingError):  # of a table that is gone, because its rows are lost
        backend.close()
    written = "cannot be read as the table that CsvBackend has written"
    assert re.match(rf"{path} {written}: {text}.* Another program has moved or changed it\. Put it", str(raised.value))
