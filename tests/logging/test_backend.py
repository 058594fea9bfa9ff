"""Records: which objects can be logged, and how records get from a handler to the backends, in place and deferred."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import logging
from flowtrain.errors import LoggingError
from flowtrain.logging import (
    CsvBackend,
    Histogram,
    JsonlBackend,
    Loggable,
    Run,
    Settings,
    TensorBoardBackend,
    Text,
    Value,
)
from flowtrain.logging.records import Identity, collecting, deliver, identity, log
from tests.support.untyped import untyped

STEP = ("Step", "TrainingPhase")


def test_each_backend_gets_what_it_takes(tmp_path: Path) -> None:
    backends = CsvBackend(tmp_path / "v.csv"), JsonlBackend(tmp_path / "l.jsonl")
    for backend in backends:
        backend.open(Run("r"))
    log(backends, Value(0.5), "Loss", 1, STEP)
    log(backends, Text("hello"), "Note", 1, STEP)
    for backend in backends:
        backend.close()
    assert (tmp_path / "v.csv").read_text("utf-8") == "group,step,Loss\nStep/TrainingPhase,1,0.5\n"
    assert [line.split(",")[0] for line in (tmp_path / "l.jsonl").read_text("utf-8").splitlines()] == [
        '{"name": "Loss"',
        '{"name": "Note"',
    ]


def test_what_nobody_takes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LoggingError, match=r"Text 'Note' was logged to CsvBackend\(.*\), and none takes that kind\. "):
        log([CsvBackend(tmp_path / "v.csv")], Text("hello"), "Note", 1, STEP)
    with pytest.raises(LoggingError, match=r"Value 'Loss' was logged to no backend"):
        log([], Value(1), "Loss", 1, STEP)


def test_a_failure_says_what_was_logged_where(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "l.jsonl")
    with pytest.raises(LoggingError, match=r"is not open") as caught:
        log([backend], Value(1), "Loss", 7, STEP)
    assert caught.value.__notes__ == [f"raised when 'Loss' of Step/TrainingPhase, step 7, was logged to {backend.sink}"]
    with pytest.raises(LoggingError) as caught:
        deliver([backend], [(0, b"{}\n")])
    assert caught.value.__notes__ == [f"raised when records were written to {backend.sink}"]


def test_a_sink_that_fails_keeps_nothing_from_the_others(tmp_path: Path) -> None:
    """The other backend writes its records, those in a batch too."""
    failing, other = CsvBackend(tmp_path / "v.csv"), JsonlBackend(tmp_path / "l.jsonl")
    other.open(Run("r"))
    records = [(0, b"[]"), (1, b'{"step": 1}\n'), (0, b"[]"), (1, b'{"step": 2}\n')]
    with pytest.raises(LoggingError, match=r"v\.csv'\) is not open"):
        deliver([failing, other], records)
    other.close()
    assert (tmp_path / "l.jsonl").read_text("utf-8").splitlines() == ['{"step": 1}', '{"step": 2}']


def test_collected_records_know_their_backend_and_write_nothing(tmp_path: Path) -> None:
    """Rule 25: a record names its backend by position, because a deferred callback has copies of the backends."""
    backends = CsvBackend(tmp_path / "v.csv"), JsonlBackend(tmp_path / "l.jsonl")
    who = Identity("run", "lane", 3)
    assert identity() is None
    with collecting(who, backends) as collector:
        assert identity() is who
        log(backends, Text("hello"), "Note", 1, STEP)
        log(backends, Value(0.5), "Loss", 1, STEP)
    assert identity() is None
    assert [position for position, _ in collector.records] == [1, 0, 1]
    assert not list(tmp_path.iterdir())


def test_a_record_belongs_to_the_backend_it_was_logged_to(tmp_path: Path) -> None:
    """Rule 25: a handler may log to some of its callback's backends, to one of them, or to those of a generator."""
    first, second = JsonlBackend(tmp_path / "a"), JsonlBackend(tmp_path / "b")
    with collecting(Identity("run", "lane", 3), (first, second)) as collector:
        log((first, second)[1:], Value(1), "One", 1, STEP)
        log(second, Value(1), "One", 1, STEP)
        log((each for each in (second, first)), Value(1), "One", 1, STEP)
        with pytest.raises(LoggingError) as caught:
            log(JsonlBackend(tmp_path / "a"), Value(1), "One", 1, STEP)
    assert [place for place, _ in collector.records] == [1, 1, 1, 0]
    path = str(tmp_path)
    assert str(caught.value).replace(path, "runs") == (
        "JsonlBackend('runs/a') is none of the backends that the callback held when it was given to the learner: "
        "JsonlBackend('runs/a'), JsonlBackend('runs/b'). A learner opens the backends that its callbacks hold when it "
        "is built or its callbacks change. Make all of them in __init__ and keep them in attributes, as in "
        "self.backend = JsonlBackend(path); to use another one later, put it into the callback between two fits and "
        "call learner.set_callbacks(list(learner.callbacks))."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("log.jsonl", Value(1), "Loss", 1, STEP), r"was given 'log\.jsonl' to log to, which is no LoggerBackend"),
        (([None], Value(1), "Loss", 1, STEP), r"log\(\) was given None to log to"),
        ((JsonlBackend, Value(1), "Loss", 1, STEP), r"log\(\) was given <class .*JsonlBackend'> to log to"),
        (([], Value(1), "", 1, STEP), r"was given the name ''\. A name is a text that is not empty"),
        (([], Value(1), 1, 1, STEP), r"was given the name 1\."),
        (([], Value(1), "Loss", 1.5, STEP), r"log\('Loss'\) was given the step 1\.5\. A step is a whole number"),
        (([], Value(1), "Loss", 2**63, STEP), r"was given the step 9223372036854775808\. .* of at most 64 bits"),
        (([], Value(1), "Loss", 1, "Step"), r"was given the group 'Step'\. A group is a tuple of texts"),
        (([], Value(1), "Loss", 1, ()), r"was given the group \(\)"),
        (([], Value(1), "Loss", 1, ("Step", 1)), r"was given the group \('Step', 1\)"),
    ],
)
def test_arguments_of_another_type_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(LoggingError, match=message):
        log(*arguments)


@pytest.mark.parametrize("loggable", [Value(0.5), Text("a"), Histogram([1.0, 2.0], bins=2), Settings({"lr": 0.1})])
def test_loggables_travel_to_other_processes_and_are_frozen(loggable: Loggable) -> None:
    copy = pickle.loads(pickle.dumps(loggable))
    assert type(copy) is type(loggable)
    assert vars(copy) == vars(loggable)
    with pytest.raises(AttributeError, match="cannot assign"):
        untyped(loggable).value = 1


def test_two_loggables_are_compared_by_identity() -> None:
    """Comparing tensors with ``==`` gives no single truth value."""
    assert Value(torch.ones(2)) != Value(torch.ones(2))


def test_all_loggables_are_public() -> None:
    kinds = {kind.__name__ for kind in Loggable.__subclasses__() if kind.__module__ == Loggable.__module__}
    assert kinds == {"Figure", "File", "Histogram", "Image", "Settings", "Text", "Value"}
    assert kinds <= set(logging.__all__)


@pytest.mark.parametrize("kind", [JsonlBackend, CsvBackend, TensorBoardBackend])
def test_names_that_no_file_can_hold_are_written_with_question_marks(kind: Any, tmp_path: Path) -> None:
    """A name that was made of a name of a file may have lone surrogates, which UTF-8 cannot write."""
    backend = kind(tmp_path / "log")
    backend.open(Run("a"))
    log(backend, Value(1.0), "Größe\udc80", -(2**63), ("Step", "a\udc80"))
    backend.close()
    files = [path for path in (tmp_path / "log", *tmp_path.rglob("events*")) if path.is_file()]
    assert len(files) == 1
    written = files[0].read_bytes()
    assert (b"Gr\\u00f6\\u00dfe?" if kind is JsonlBackend else "Größe?".encode()) in written
