"""The contract of backends: a backend that breaks a promise fails the test of this promise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowtrain.logging import JsonlBackend, Loggable, LoggerBackend, Run
from flowtrain.testing import BackendContract
from flowtrain.testing.backends import samples
from tests.support.logs import log_records


class ContractOf(BackendContract):
    """The contract, applied to a JSON lines backend."""

    __test__ = False

    def __init__(self, kind: type[JsonlBackend]) -> None:
        self.kind = kind

    def make_backend(self, folder: Path) -> LoggerBackend:
        return self.kind(folder / "log.jsonl")

    def read(self, folder: Path) -> dict[tuple[str, str], list[tuple[int, float]]]:
        found: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
        for record in log_records(folder / "log.jsonl"):
            if record["kind"] == "Value":
                found[record["group"], record["name"]].append((record["step"], float(record["value"])))
        return found


class WritesWhenMade(JsonlBackend):
    def __init__(self, path: Any) -> None:
        super().__init__(path)
        Path(path).touch()


class KeepsWhatCameLater(JsonlBackend):
    def restore(self, position: Any) -> None:
        pass


class WritesInEveryProcess(JsonlBackend):
    def open(self, run: Run) -> None:
        super().open(Run(run.id, run.resumed))


class BeginsAnew(JsonlBackend):
    def open(self, run: Run) -> None:
        if run.rank == 0:
            Path(self.path).unlink(missing_ok=True)
        super().open(run)


class LosesOne(JsonlBackend):
    def write(self, record: bytes) -> None:
        if b'"step": 3,' not in record:
            super().write(record)


BROKEN: list[tuple[type[JsonlBackend], Callable[[ContractOf, Path], None]]] = [
    (WritesWhenMade, ContractOf.test_the_constructor_only_stores),
    (KeepsWhatCameLater, ContractOf.test_restore_drops_what_came_later),
    (WritesInEveryProcess, ContractOf.test_only_rank_0_writes),
    (BeginsAnew, ContractOf.test_it_can_be_opened_again),
    (LosesOne, ContractOf.test_records_are_kept_in_order),
]


@pytest.mark.parametrize(("kind", "test"), BROKEN)
def test_what_breaks_a_promise_fails_its_test(
    kind: type[JsonlBackend], test: Callable[[ContractOf, Path], None], tmp_path: Path
) -> None:
    (tmp_path / "sound").mkdir()
    test(ContractOf(JsonlBackend), tmp_path / "sound")
    (tmp_path / "broken").mkdir()
    with pytest.raises((AssertionError, OSError)):
        test(ContractOf(kind), tmp_path / "broken")


def test_the_contract_logs_one_of_each_kind(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kinds = [type(sample).__name__ for sample in samples(tmp_path)]
    bundled = [kind.__name__ for kind in Loggable.__subclasses__() if kind.__module__ == Loggable.__module__]
    assert sorted(kinds) == sorted(bundled)
