"""Which objects an object refers to, and which backends a callback holds."""

from __future__ import annotations

import types
from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from flowtrain import (
    BatchEnd,
    Callback,
    LearnerView,
    Phase,
    ProtectedException,
    Read,
    TrainingPhase,
    UndeclaredWriteError,
    Write,
    on,
)
from flowtrain.callbacks import LogMetrics
from flowtrain.graph.held_backends import backends_of, reachable
from flowtrain.logging import CsvBackend, JsonlBackend, Run, Value, log
from flowtrain.testing import tiny_learner
from tests.support.untyped import untyped


@dataclass
class Plain:
    backend: Any
    more: list[Any] = field(default_factory=list)


@dataclass(slots=True)
class Slotted:
    backend: Any


class Deeper(Slotted):
    __slots__ = ("never",)


class Tuple(NamedTuple):
    number: int
    backend: Any


class Module(torch.nn.Module):
    def __init__(self, backend: Any) -> None:
        super().__init__()
        self.backend = backend


class Holder(Callback):
    def __init__(self, held: Any) -> None:
        self.held = held


def _in_a_closure(backend: Any) -> Any:
    return lambda: log(backend, Value(1), "One", 1, ("Step",))


def _encodes(backend: Any) -> Any:
    return Plain(backend).__repr__


def _as_default(backend: Any) -> Any:
    def write(*, to: Any = backend) -> None:
        log(to, Value(1), "One", 1, ("Step",))

    return write


def _in_a_cycle(backend: Any) -> Any:
    made = Plain(backend)
    made.more = [made, {"again": made}]
    return made


WAYS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda backend: backend,
    "list of tuples": lambda backend: [(1, backend)],
    "dictionary": lambda backend: {"a": {"b": [backend]}},
    "key": lambda backend: {backend: "name"},
    "set": lambda backend: {backend},
    "ordered": lambda backend: OrderedDict(a=backend),
    "of the library": lambda backend: UserDict({"a": backend}),
    "deque": lambda backend: deque([backend]),
    "proxy": lambda backend: types.MappingProxyType({"a": backend}),
    "dataclass": Plain,
    "slots": Slotted,
    "inherited slots": Deeper,
    "named tuple": lambda backend: Tuple(1, backend),
    "object of objects": lambda backend: Plain([Plain(Slotted(backend))]),
    "namespace": lambda backend: types.SimpleNamespace(a=backend),
    "module": Module,
    "method": _encodes,
    "partial": lambda backend: partial(log, backend),
    "partial of a keyword": lambda backend: partial(log, backends=[backend]),
    "closure": _in_a_closure,
    "default": _as_default,
    "cycle": _in_a_cycle,
    "callback": lambda backend: LogMetrics(backend),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_backend_is_found_wherever_it_is_held(way: str, tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log")
    [found] = backends_of(Holder(WAYS[way](backend)))
    assert found is backend


def test_backends_of_the_class_are_held_too(tmp_path: Path) -> None:
    first, second, third = (JsonlBackend(tmp_path / name) for name in "abc")

    class Base(Callback):
        several = (first,)

        @staticmethod
        def write() -> None:
            log(second, Value(1), "One", 1, ("Step",))

        @property
        def nothing(self) -> None:
            log(third, Value(1), "One", 1, ("Step",))

    class Derived(Base):
        pass

    assert set(backends_of(Derived())) == {first, second, third}


def test_each_is_found_once_and_in_the_order_of_the_attributes(tmp_path: Path) -> None:
    one, other = JsonlBackend(tmp_path / "a"), CsvBackend(tmp_path / "b")
    callback = Holder(one)
    callback.backends = (other, one)
    assert backends_of(callback) == (one, other)


class Talkative:
    """An object that runs code at every attribute access."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(name)

    @property  # type: ignore[misc]  # as a proxy does
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # as a proxy does
        raise AssertionError("class")

    def __eq__(self, other: object) -> bool:
        raise AssertionError("eq")

    def __iter__(self) -> Any:
        raise AssertionError("iter")

    __hash__ = None  # type: ignore[assignment]  # as for lists


def test_no_code_of_the_objects_is_run(tmp_path: Path) -> None:
    class Items(dict[str, Any]):
        def items(self) -> Any:
            raise AssertionError("items")

    backend = JsonlBackend(tmp_path / "log")
    assert backends_of(Holder([Talkative(), Items(a=backend)])) == (backend,)


def test_what_belongs_to_a_learner_is_not_followed(tmp_path: Path) -> None:
    """A callback that refers to the learner does not hold the backends of the learner's other callbacks."""
    backend = JsonlBackend(tmp_path / "log", append=True)  # both runs log to one file
    for executor in ("serial", "dask"):
        with tiny_learner(LogMetrics(backend), n_batches=1, executor=executor) as learner:
            learner.fit(1)
            callback = Holder([learner, learner.state, learner.cbstate, learner.executor])
            assert backends_of(callback) == ()
    assert learner in list(reachable(callback))


def test_slots_of_builtin_types_are_not_followed() -> None:
    """Builtin types have slots too; following a function's globals would reach almost every object."""
    assert len(list(reachable(Holder(_in_a_closure(1))))) < 20


class Inner(Callback):
    """Logs through a callback of another type."""

    def __init__(self, backend: JsonlBackend) -> None:
        self.log = Plain(backend)

    @on(BatchEnd, TrainingPhase)
    def end(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        log(self.log.backend, Value(float(learner.batch.loss)), "Loss", 1, ("Step",))


def test_errors_do_not_advise_to_declare_a_backend(tmp_path: Path) -> None:
    """A held backend needs no declaration, so the error lists only the path that is missing."""
    backend = JsonlBackend(tmp_path / "log")
    with pytest.raises(ProtectedException, match=r"Inner declares nothing\. In Inner\.state_access") as caught:
        tiny_learner(Inner(backend), n_batches=1).fit(1)
    assert '{"batch.loss": Read()}' in str(caught.value)
    assert "resource" not in str(caught.value)

    class Drawing(Inner):
        @on(BatchEnd, TrainingPhase)
        def end(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            torch.rand(())

    with pytest.raises(UndeclaredWriteError) as undeclared:
        tiny_learner(Drawing(JsonlBackend(tmp_path / "other")), n_batches=1, strict=True).fit(1)
    assert "JsonlBackend" not in str(undeclared.value)


def test_a_backend_that_may_be_declared_as_well(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log")
    callback = Inner(backend)
    untyped(callback).state_access = lambda: {"batch.loss": Read(), backend.resource: Write()}
    with tiny_learner(callback, n_batches=1) as learner:
        learner.fit(1)
        [node] = [node for node in learner.callbacks.nodes if node.callback is callback]
        assert {".".join(path) for path, _ in node.union} == {"batch.loss", backend.resource}
        assert node.backends == (backend,)


def test_a_backend_that_a_backend_opens_is_not_opened_by_the_learner(tmp_path: Path) -> None:
    """The learner opens only the outer backend, which opens the inner one itself."""
    inner = JsonlBackend(tmp_path / "inner")

    class Both(JsonlBackend):
        def open(self, run: Run) -> None:
            super().open(run)
            inner.open(run)

    both = Both(tmp_path / "outer")
    both.inner = inner  # type: ignore[attr-defined]  # for the test
    assert backends_of(Holder(both)) == (both,)
