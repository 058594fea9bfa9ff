"""Rules 13, 25, 26: backends are found wherever a callback holds them, and get their records under every executor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]  # it has no annotations
import pytest

from flowtrain import Access, BatchEnd, Callback, EpochEnd, LearnerView, Phase, Read, TrainingPhase, on
from flowtrain.callbacks import LogMetrics
from flowtrain.errors import LoggingError
from flowtrain.graph.executor import Executor
from flowtrain.graph.serial import SerialExecutor
from flowtrain.logging import JsonlBackend, Value, log
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.logs import log_fields
from tests.support.untyped import untyped

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

STEP = ("Step", "TrainingPhase")
BATCHES = 3


class Logger(Callback):
    """Logs to one backend, to the other one, and to both in the other order; says nothing of backends."""

    deferrable = True
    count = 0

    def state_access(self) -> Access:
        return {"batch.loss": Read()}

    @on(BatchEnd, TrainingPhase)
    def log_step(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Log three values."""
        self.count += 1
        self.write(self.count)

    def write(self, step: int) -> None:
        """Log; subclasses say from where."""
        raise NotImplementedError


class InOneTuple(Logger):
    def __init__(self, first: JsonlBackend, second: JsonlBackend) -> None:
        self.backends = (first, second)

    def write(self, step: int) -> None:
        log(self.backends[:1], Value(1), "First", step, STEP)
        log(self.backends[1:], Value(2), "Second", step, STEP)
        log(reversed(self.backends), Value(3), "Both", step, STEP)


class InAttributes(Logger):
    def __init__(self, first: JsonlBackend, second: JsonlBackend) -> None:
        self.loss, self.others = first, {"second": [second]}

    def write(self, step: int) -> None:
        log(self.loss, Value(1), "First", step, STEP)
        log(self.others["second"], Value(2), "Second", step, STEP)
        log((each for each in (*self.others["second"], self.loss)), Value(3), "Both", step, STEP)


class InSlots(Logger):
    __slots__ = ("first", "last", "second")

    def __init__(self, first: JsonlBackend, second: JsonlBackend) -> None:
        self.first, self.second, self.last = first, (second,), 0

    def write(self, step: int) -> None:
        self.last = step
        log([self.first], Value(1), "First", step, STEP)
        log(self.second, Value(2), "Second", step, STEP)
        log({self.second[0]: "", self.first: ""}, Value(3), "Both", step, STEP)


@dataclass(slots=True)
class Pen:
    backend: JsonlBackend
    last: int = 0

    def draw(self, value: int, name: str, step: int) -> None:
        self.last = step
        log(self.backend, Value(value), name, step, STEP)


class InHelpers(Logger):
    def __init__(self, first: JsonlBackend, second: JsonlBackend) -> None:
        self.pens: dict[str, Any] = {"first": Pen(first), "second": (Pen(second),)}

    def write(self, step: int) -> None:
        first, (second,) = self.pens["first"], self.pens["second"]
        first.draw(1, "First", step)
        second.draw(2, "Second", step)
        second.draw(3, "Both", step)
        first.draw(3, "Both", step)


class InFunctions(Logger):
    def __init__(self, first: JsonlBackend, second: JsonlBackend) -> None:
        self.first = partial(log, first)
        self.second: Callable[[int, str, int], None] = lambda one, name, step: log(second, Value(one), name, step, STEP)
        self.third = Pen(first).draw

    def write(self, step: int) -> None:
        self.first(Value(1), "First", step, STEP)
        self.second(2, "Second", step)
        self.second(3, "Both", step)
        self.third(3, "Both", step)


def in_a_class(first: JsonlBackend, second: JsonlBackend) -> Callback:
    """One is an attribute of the class, the other one a variable that its method uses."""

    class InAClass(Logger):
        mine = first

        def write(self, step: int) -> None:
            log(self.mine, Value(1), "First", step, STEP)
            log(second, Value(2), "Second", step, STEP)
            log((second, self.mine), Value(3), "Both", step, STEP)

    return InAClass()


class Swapping(Logger):
    """Puts backends into other attributes as it runs."""

    def __init__(self, first: JsonlBackend, second: JsonlBackend) -> None:
        self.first, self.second = first, second

    def write(self, step: int) -> None:
        one, other = (self.first, self.second) if step % 2 else (self.second, self.first)
        log(one, Value(1), "First", step, STEP)
        log(other, Value(2), "Second", step, STEP)
        log((other, one), Value(3), "Both", step, STEP)
        self.first, self.second = self.second, self.first


MAKERS: list[Callable[[JsonlBackend, JsonlBackend], Callback]] = [
    InOneTuple, InAttributes, InSlots, InHelpers, InFunctions, in_a_class, Swapping,
]  # fmt: skip


def executor_of(kind: str, dask_processes: Any) -> Executor:
    if kind == "serial":
        return SerialExecutor()
    return DaskExecutor(dask_processes.address if kind == "cluster" else None, defer="always")


def records(path: Path) -> list[tuple[str, int, float]]:
    return log_fields(path, "name", "step", "value")


@pytest.mark.parametrize("kind", ["serial", "threads", "cluster"])
def test_each_backend_gets_its_records(kind: str, tmp_path: Path, dask_processes: Any) -> None:
    """All ways of holding them at once, each with files of its own."""
    pairs = [
        (JsonlBackend(tmp_path / f"{number}a"), JsonlBackend(tmp_path / f"{number}b")) for number in range(len(MAKERS))
    ]
    callbacks = [make(*pair) for make, pair in zip(MAKERS, pairs, strict=True)]
    with tiny_learner(*callbacks, n_batches=BATCHES, executor=executor_of(kind, dask_processes)) as learner:
        learner.fit(1)
    for number, make in enumerate(MAKERS):
        steps = range(1, BATCHES + 1)
        name = getattr(make, "__name__", "")
        first = [record for step in steps for record in (("First", step, 1), ("Both", step, 3))]
        assert records(tmp_path / f"{number}a") == first, name
        second = [record for step in steps for record in (("Second", step, 2), ("Both", step, 3))]
        assert records(tmp_path / f"{number}b") == second, name
    one, attributes, slots, helpers, *_ = callbacks
    assert isinstance(one, InOneTuple)
    assert one.backends[1] is pairs[0][1]  # rule 26: the objects that the user made
    assert isinstance(attributes, InAttributes)
    assert attributes.others["second"][0] is pairs[1][1]
    assert isinstance(slots, InSlots)
    assert (slots.first, slots.second, slots.last) == (pairs[2][0], (pairs[2][1],), BATCHES)
    assert isinstance(helpers, InHelpers)
    pen = helpers.pens["first"]
    assert isinstance(pen, Pen)
    assert pen.backend is pairs[3][0]
    assert pen.last == BATCHES
    assert all(untyped(callback).count == BATCHES for callback in callbacks)


class Ends(Logger):
    """Logs to a backend of another callback, held by an object of its own."""

    def __init__(self, backend: JsonlBackend) -> None:
        self.pen = Pen(backend)

    @on(EpochEnd, TrainingPhase)
    def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Log the end."""
        self.pen.draw(0, "End", self.count)

    def write(self, step: int) -> None:
        self.pen.draw(step, "Mine", step)


@pytest.mark.parametrize("kind", ["serial", "threads", "cluster"])
def test_holding_a_backend_keeps_the_order_of_its_records(kind: str, tmp_path: Path, dask_processes: Any) -> None:
    """Rules 6 and 23: nothing is declared, and two callbacks share a lane, in serial order."""
    backend = JsonlBackend(tmp_path / "log")
    callbacks = (LogMetrics(backend), Ends(backend), LogMetrics(JsonlBackend(tmp_path / "other")))
    with tiny_learner(*callbacks, n_batches=BATCHES, executor=executor_of(kind, dask_processes)) as learner:
        learner.fit(1)
        explained = " ".join(learner.callbacks.explain().split())
        assert "after Ends: both use resource.JsonlBackend(" in explained
        if kind != "serial":
            assert "Ends.log_step is deferred to lane LogMetrics+Ends (" in explained
            assert "LogMetrics#2.log_step is deferred to lane LogMetrics#2 (" in explained
    found = [name for name, _, _ in records(tmp_path / "log")]
    assert found[: 2 * BATCHES + 2] == ["Mine", "Loss"] * BATCHES + ["End", "Loss"]


def test_in_place_beside_a_deferred_one(tmp_path: Path) -> None:
    """Rule 19: a callback that must run in place keeps the one in place that shares its backend."""
    backend = JsonlBackend(tmp_path / "log")
    mine = Ends(backend)
    mine.deferrable = False
    with tiny_learner(LogMetrics(backend), mine, n_batches=1, executor=DaskExecutor(defer="always")) as learner:
        learner.fit(1)
        explained = learner.callbacks.explain()
        assert "LogMetrics.log_step runs in place: Ends runs in place and shares resource." in explained
    assert [name for name, _, _ in records(tmp_path / "log")][:2] == ["Mine", "Loss"]


class Making(Logger):
    """Makes a backend as it runs."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, step: int) -> None:
        self.backend = JsonlBackend(self.path)
        log(self.backend, Value(1), "First", step, STEP)


@pytest.mark.parametrize("kind", ["serial", "threads", "cluster"])
def test_a_backend_that_no_learner_knows_is_an_error(kind: str, tmp_path: Path, dask_processes: Any) -> None:
    text = r"JsonlBackend\('.*new'\) is (not open\.|none of the backends that the callback held when it was given to "
    text += r"the learner: it held none\.) A learner opens .* Make all of them in __init__ and keep them in attributes"
    with tiny_learner(Making(tmp_path / "new"), n_batches=1, executor=executor_of(kind, dask_processes)) as learner:
        with pytest.raises(LoggingError, match=text) as caught:
            learner.fit(1)
        assert "raised when 'First' of Step/TrainingPhase, step 1, was logged to" in caught.value.__notes__[0]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["serial", "threads", "cluster"])
def test_other_backends_after_a_change_of_callbacks(kind: str, tmp_path: Path, dask_processes: Any) -> None:
    """What the error advises, and `replace_callback`: the backends of then are found, opened and closed."""
    backends = [JsonlBackend(tmp_path / name) for name in "abcd"]
    callback = InAttributes(backends[0], backends[1])
    with tiny_learner(callback, n_batches=1, executor=executor_of(kind, dask_processes)) as learner:
        learner.fit(1)
        callback.loss = backends[2]
        learner.set_callbacks(list(learner.callbacks))
        learner.fit(1)
        learner.replace_callback(InAttributes(backends[0], backends[3]))
        learner.fit(1)
    names = {name: [record[:2] for record in records(tmp_path / name)] for name in "abcd"}
    assert names == {
        "a": [("First", 1), ("Both", 1), ("First", 1), ("Both", 1)],
        "b": [("Second", 1), ("Both", 1), ("Second", 2), ("Both", 2)],
        "c": [("First", 2), ("Both", 2)],
        "d": [("Second", 1), ("Both", 1)],
    }


IMPORTED = """
from flowtrain import BatchEnd, Callback, TrainingPhase, on
from flowtrain.logging import JsonlBackend, Value, log

BACKEND = JsonlBackend("global")


def write(step):
    log(BACKEND, Value(2), "Global", step, ("Step",))


class Imported(Callback):
    deferrable = True
    backend = JsonlBackend("class")

    @on(BatchEnd, TrainingPhase)
    def log_step(self, event, phase, learner):
        log(self.backend, Value(1), "Class", 1, ("Step",))
        write(1)
"""


@pytest.mark.slow
def test_backends_of_an_imported_class_and_of_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker imports the module, and so makes backends of its own; the records are those of the driver's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imported_logger.py").write_text(IMPORTED, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    import imported_logger  # type: ignore[import-not-found]  # it has just been written

    with tiny_learner(imported_logger.Imported(), n_batches=2, executor=DaskExecutor("local", workers=1)) as learner:
        learner.fit(1)
        learner.flush()
    assert records(tmp_path / "class") == [("Class", 1, 1)] * 2
    assert records(tmp_path / "global") == [("Global", 1, 2)] * 2
