"""The contract of logging backends as a test class: subclass it, define how to make a backend and read its sink.

::

    class TestMyBackend(BackendContract):
        def make_backend(self, folder: Path) -> LoggerBackend:
            return MyBackend(folder / "log")

        def read(self, folder: Path) -> Entries:
            ...

pytest then runs every test on the backend, each with an empty folder from ``tmp_path``. The class itself does not
import pytest.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch

from flowtrain.errors import LoggingError
from flowtrain.logging.backend import (
    Figure,
    File,
    Group,
    Histogram,
    Image,
    Loggable,
    LoggerBackend,
    Run,
    Settings,
    Text,
    Value,
)
from flowtrain.logging.records import Identity, collecting, deliver, log
from flowtrain.testing.probes import catching

__all__ = ["BackendContract", "Entries", "samples"]

Entries: TypeAlias = Mapping[tuple[str, str], Sequence[tuple[int, float]]]
"""The values in a sink: for each group, written with slashes, and name the pairs ``(step, value)`` in their order."""

_STEP: Group = ("Step", "TrainingPhase")
_RUN = Run("contract")


class BackendContract:
    """The promises of every backend, each as a test. A subclass defines `make_backend` and `read`."""

    def make_backend(self, folder: Path) -> LoggerBackend:
        """Return a new backend that writes into a folder; backends for one folder have the same sink."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define make_backend(folder). Return a new backend, such as "
            f"MyBackend(folder / 'log')."
        )

    def read(self, folder: Path) -> Entries:
        """Return the values of the closed sink in a folder, read with the sink's own reader if there is one."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define read(folder). Return the (step, value) pairs in the sink by group "
            f"and name."
        )

    # --- the constructor, and copies

    def test_the_constructor_only_stores(self, tmp_path: Path) -> None:
        """Making a backend touches no file, and two backends for one place have the same sink."""
        one, other = self.make_backend(tmp_path), self.make_backend(tmp_path)
        assert not list(tmp_path.rglob("*")), "the constructor made something: leave it to open()"
        assert one.sink == other.sink, f"one place is {one.sink!r} and {other.sink!r}"
        assert one.resource.startswith("resource."), one.resource
        assert one.resource.count(".") == 1, f"{one.resource!r} is more than one part of a path"

    def test_a_copy_encodes_what_the_original_writes(self, tmp_path: Path) -> None:
        """A backend pickles before and after it is opened; the copy encodes without being opened."""
        backend = self.make_backend(tmp_path)
        early = pickle.loads(pickle.dumps(backend))
        self._open(backend)
        late = pickle.loads(pickle.dumps(backend))
        for step, copy in enumerate((early, late), start=1):
            assert copy.sink == backend.sink
            backend.write(copy.encode(Value(step / 2), "Loss", step, _STEP))
        with catching(LoggingError):  # the copy of an open backend is not open
            late.write(late.encode(Value(9.0), "Loss", 9, _STEP))
        late.close()
        backend.write(backend.encode(Value(1.5), "Loss", 3, _STEP))
        backend.close()
        self._expect(tmp_path, {"Loss": [(1, 0.5), (2, 1.0), (3, 1.5)]})

    def test_encode_is_pure(self, tmp_path: Path) -> None:
        """The same loggable gives the same record in every thread and at any time, and no file is touched."""
        backend = self.make_backend(tmp_path)
        logged = [sample for sample in samples(tmp_path) if isinstance(sample, backend.accepts)]
        logged = [sample for sample in logged if not isinstance(sample, Figure)]  # threads must not share a figure
        before = sorted(tmp_path.rglob("*"))
        jobs = [(sample, f"Name{n}", step) for step in range(8) for n, sample in enumerate(logged)]
        with mock.patch("time.time", return_value=1_700_000_000.0):  # records may have the clock time in them
            alone = [backend.encode(sample, name, step, _STEP) for sample, name, step in jobs]
            with ThreadPoolExecutor(4) as pool:
                beside = list(pool.map(backend.encode, *zip(*jobs, strict=True), [_STEP] * len(jobs)))
        for record in alone:
            assert isinstance(record, bytes), f"encode() returned {record!r}"
        differing = [job for job, one, other in zip(jobs, alone, beside, strict=True) if one != other]
        assert not differing, f"encoded differently in another thread: {differing[0]}"
        assert sorted(tmp_path.rglob("*")) == before, "encode() made something: it may run on another machine"

    # --- the records

    def test_records_are_kept_in_order(self, tmp_path: Path) -> None:
        """The sink has all records, for each group and name in the order in which they were written."""
        backend = self._open(self.make_backend(tmp_path))
        for step in range(1, 30):
            self._write(backend, "Loss", step, 1 / step)
            if step % 3 == 0:
                backend.write(backend.encode(Value(step), "Loss", step // 3, ("Epoch", "TrainingPhase")))
                self._write(backend, "Accuracy", step, -step)
        backend.close()
        found = self.read(tmp_path)
        assert _rounded(found["Step/TrainingPhase", "Loss"]) == [(n, _single(1 / n)) for n in range(1, 30)]
        assert _rounded(found["Step/TrainingPhase", "Accuracy"]) == [(n, -float(n)) for n in range(3, 30, 3)]
        assert _rounded(found["Epoch/TrainingPhase", "Loss"]) == [(n, 3.0 * n) for n in range(1, 10)]

    def test_records_written_together_are_those_written_one_by_one(self, tmp_path: Path) -> None:
        """`write_all` gives the same sink as a `write` for each record, for records of all types."""
        backend = self._open(self.make_backend(tmp_path))
        kinds = [sample for sample in samples(tmp_path) if isinstance(sample, backend.accepts)]
        others = [backend.encode(sample, f"Name{number}", 1, _STEP) for number, sample in enumerate(kinds)]
        values = [backend.encode(Value(step), "Loss", step, _STEP) for step in range(1, 5)]
        backend.write_all([values[0], *others, *values[1:3]])
        backend.write_all([])
        backend.write_all(values[3:])
        backend.close()
        with catching(LoggingError):
            backend.write_all(values)
        found = self.read(tmp_path)["Step/TrainingPhase", "Loss"]
        assert _rounded(found) == [(step, float(step)) for step in range(1, 5)]

    def test_any_number_is_a_value(self, tmp_path: Path) -> None:
        """NaN and infinite values are kept; tensors with one element are numbers; every other object is refused."""
        backend = self._open(self.make_backend(tmp_path))
        numbers = [3, True, math.inf, -math.inf, 1e-30, torch.tensor(0.5), torch.tensor([[2]])]
        for step, value in enumerate(numbers, start=1):
            self._write(backend, "Loss", step, value)
        self._write(backend, "Loss", 8, math.nan)
        for wrong in ("text", None, torch.zeros(2), 1j):
            with catching(LoggingError):
                backend.encode(Value(wrong), "Loss", 9, _STEP)
        backend.close()
        found = self.read(tmp_path)["Step/TrainingPhase", "Loss"]
        wanted = [3.0, 1.0, math.inf, -math.inf, _single(1e-30), 0.5, 2.0]
        assert _rounded(found[:7]) == list(enumerate(wanted, start=1))
        assert found[7][0] == 8
        assert math.isnan(found[7][1]), f"NaN came back as {found[7][1]}"

    def test_it_takes_what_it_says_and_refuses_the_rest(self, tmp_path: Path) -> None:
        """Every type in ``accepts`` can be written; loggables of other types are refused by `encode`."""

        class Other(Loggable):
            """A type that no backend knows."""

        backend = self._open(self.make_backend(tmp_path))
        for number, sample in enumerate([*samples(tmp_path), Other()]):
            if isinstance(sample, backend.accepts):
                backend.write(backend.encode(sample, f"Name{number}", 1, _STEP))
            else:
                with catching(LoggingError):
                    backend.encode(sample, f"Name{number}", 1, _STEP)
        backend.close()

    def test_what_was_collected_elsewhere_is_what_is_logged_in_place(self, tmp_path: Path) -> None:
        """Rule 25: a worker encodes with a copy of the backend, and the training process writes."""
        backend = self._open(self.make_backend(tmp_path))
        log([backend], Value(0.5), "Loss", 1, _STEP)
        copy = pickle.loads(pickle.dumps(backend))
        with collecting(Identity("contract", "lane", 0), [copy]) as collector:
            log([copy], Value(0.25), "Loss", 2, _STEP)
        deliver([backend], collector.records)
        backend.close()
        self._expect(tmp_path, {"Loss": [(1, 0.5), (2, 0.25)]})

    # --- opening and closing

    def test_closing_may_be_repeated_and_ends_writing(self, tmp_path: Path) -> None:
        """`close` may be called at any time; writing before `open` or after `close` is an error."""
        backend = self.make_backend(tmp_path)
        record = backend.encode(Value(0.5), "Loss", 1, _STEP)
        backend.close()
        with catching(LoggingError):
            backend.write(record)
        self._open(backend).write(record)
        backend.close()
        backend.close()
        with catching(LoggingError):
            backend.write(record)
        self._expect(tmp_path, {"Loss": [(1, 0.5)]})

    def test_it_can_be_opened_again(self, tmp_path: Path) -> None:
        """A backend that is opened again, or another one with the same sink, continues the sink."""
        backend = self._open(self.make_backend(tmp_path))
        self._write(backend, "Loss", 1, 0.5)
        backend.close()
        self._open(backend)
        self._write(backend, "Loss", 2, 0.25)
        backend.close()
        other = self.make_backend(tmp_path)
        other.open(Run("contract", resumed=True))
        self._write(other, "Loss", 3, 0.125)
        other.close()
        self._expect(tmp_path, {"Loss": [(1, 0.5), (2, 0.25), (3, 0.125)]})

    def test_only_rank_0_writes(self, tmp_path: Path) -> None:
        """In the other processes of a distributed run every method may be called, and no file is touched."""
        backend = self.make_backend(tmp_path)
        backend.open(Run("contract", rank=1))
        self._write(backend, "Loss", 1, 0.5)
        position = backend.flush()
        backend.restore(position)
        self._write(backend, "Loss", 2, 0.5)
        backend.close()
        assert not list(tmp_path.rglob("*")), f"rank 1 made {list(tmp_path.rglob('*'))}"

    # --- flush and restore

    def test_restore_drops_what_came_later(self, tmp_path: Path) -> None:
        """A position consists of plain values, and `restore` leads back to the records at that `flush`."""
        backend = self._open(self.make_backend(tmp_path))
        position = self._fill(backend)
        backend.restore(position)
        self._write(backend, "Loss", 3, 3.5)
        backend.close()
        self._expect(tmp_path, {"Loss": [(1, 0.5), (2, 0.25), (3, 3.5)], "Accuracy": [(2, 0.75)]})

    def test_another_process_goes_on_from_a_position(self, tmp_path: Path) -> None:
        """`restore` works in another process too, after the first one was killed without closing its backend."""
        killed = self._open(self.make_backend(tmp_path))
        position = self._fill(killed)
        killed.flush()
        backend = self.make_backend(tmp_path)
        backend.open(Run("contract", resumed=True))
        backend.restore(position)
        self._write(backend, "Loss", 3, 3.5)
        assert backend.flush() != position
        backend.close()
        self._give_up(killed)
        self._expect(tmp_path, {"Loss": [(1, 0.5), (2, 0.25), (3, 3.5)], "Accuracy": [(2, 0.75)]})

    def test_restoring_the_newest_position_changes_nothing(self, tmp_path: Path) -> None:
        """A run that is resumed from its newest checkpoint keeps all records, and so it does a second time."""
        backend = self._open(self.make_backend(tmp_path))
        self._write(backend, "Loss", 1, 0.5)
        for step in (2, 3):
            backend.restore(json.loads(json.dumps(backend.flush())))
            self._write(backend, "Loss", step, 0.5)
        backend.close()
        self._expect(tmp_path, {"Loss": [(1, 0.5), (2, 0.5), (3, 0.5)]})

    # --- helpers

    def _open(self, backend: LoggerBackend) -> LoggerBackend:
        backend.open(_RUN)
        return backend

    def _give_up(self, backend: LoggerBackend) -> None:
        """Close a backend whose sink another backend has continued; it may refuse to close, and need not."""
        with suppress(LoggingError):
            backend.close()

    def _fill(self, backend: LoggerBackend) -> Any:
        """Write, flush, and write more; return the position of the flush, as a checkpoint would give it back."""
        self._write(backend, "Loss", 1, 0.5)
        self._write(backend, "Loss", 2, 0.25)
        self._write(backend, "Accuracy", 2, 0.75)
        position = backend.flush()
        assert json.loads(json.dumps(position)) == position, f"the position {position!r} is not made of plain values"
        for step in (2, 3, 4):
            self._write(backend, "Later", step, 9.0)
            self._write(backend, "Loss", step + 1, 9.0)
        return json.loads(json.dumps(position))

    def _write(self, backend: LoggerBackend, name: str, step: int, value: Any) -> None:
        backend.write(backend.encode(Value(value), name, step, _STEP))

    def _expect(self, folder: Path, wanted: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        found = {key: list(entries) for key, entries in self.read(folder).items()}
        assert found == {("Step/TrainingPhase", name): list(entries) for name, entries in wanted.items()}


def samples(folder: Path) -> Iterator[Loggable]:
    """Yield one loggable of each type; a figure only if matplotlib is installed."""
    path = folder / "sample.txt"
    path.write_text("sample", "utf-8")
    yield Value(0.5)
    yield Image(torch.linspace(0, 1, 12).reshape(3, 2, 2))
    yield Text("**text**")
    yield Histogram(torch.arange(10.0))
    yield File(path)
    yield Settings({"batch_size": 32, "optimizer": {"name": "SGD", "momentum": None}, "tags": ["a", "b"]})
    if find_spec("matplotlib"):
        from matplotlib.figure import Figure as Drawing

        drawing = Drawing((1, 1))
        drawing.subplots().plot([1, 2])
        yield Figure(drawing)


def _single(value: float) -> float:
    """Return a number rounded to single precision, which some sinks keep."""
    return float(torch.tensor(value, dtype=torch.float32))


def _rounded(entries: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return pairs of ``(step, value)`` with the values in single precision."""
    return [(step, _single(value)) for step, value in entries]
