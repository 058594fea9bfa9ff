"""The contract of containers in ``cbstate``: one class of tests, which runs with each type of container."""

from __future__ import annotations

import copy
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

import pytest
import torch

from flowtrain import Access, BatchEnd, Callback, LearnerView, Phase, Read, TrainingPhase, ValidationPhase, Write, on
from flowtrain.callback.access import Path
from flowtrain.callbacks import Checkpointer
from flowtrain.diagnostics.strict import fingerprint
from flowtrain.errors import ProtectedException
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.container import Container, Freezer, Tree, declared_items
from flowtrain.state.detached import detached
from flowtrain.state.encoding import Packer, unpack
from flowtrain.state.namespace import State, Twins, restore_point
from flowtrain.state.readonly import readonly
from flowtrain.state.series import Series, SeriesMap
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.fired import OODPhase

PHASES: dict[str, Phase] = {"TrainingPhase": TrainingPhase(), "ValidationPhase": ValidationPhase()}


class Deep:
    """A copier that uses a container's own method, and copies all other items deeply."""

    def copy(self, value: Any) -> Any:
        own = getattr(type(value), "__frozen__", None)
        return copy.deepcopy(value) if own is None else own(value, self, None)

    def part(self, value: Any, inside: Any, where: Any) -> Any:
        own = getattr(type(value), "__frozen__", None)
        return own(value, self, inside) if own is not None and isinstance(inside, dict) else self.copy(value)


def content(value: Any) -> Any:
    """Return the content of a container as plain values."""
    if isinstance(value, Series):
        return list(value)
    if isinstance(value, (State, Twins, Mapping)):
        items = value if isinstance(value, Mapping) else vars(value)
        return {key: content(items[key]) for key in items}
    return list(value) if isinstance(value, Window) else value


class Window(Container):
    """A container of a user that keeps only the last numbers."""

    __kind__ = "window"

    def __init__(self, path: str, size: int = 3) -> None:
        self.path = path
        self.numbers = deque[float](maxlen=size)

    def push(self, number: float) -> None:
        self.numbers.append(number)

    def __iter__(self) -> Iterator[float]:
        return iter(self.numbers)

    def __twin__(self) -> WindowTwin:
        return WindowTwin(self)

    def __frozen__(self, freezer: Freezer, inside: Tree | None = None) -> Window:
        return copy.deepcopy(self)

    def __packed__(self, packer: Packer, path: str) -> dict[str, Any]:
        return {"numbers": packer.copy(list(self.numbers), path)}

    def __fill__(self, content: Mapping[str, Any], phases: Mapping[str, Phase]) -> None:
        self.__rewind__(content.get("numbers", []))

    def __mark__(self) -> list[float]:
        return list(self.numbers)

    def __rewind__(self, mark: list[float]) -> None:
        self.numbers.clear()
        self.numbers.extend(mark)

    def __leaves__(self, fingerprint: Callable[[Any], object]) -> Iterator[tuple[Path, object]]:
        yield (), tuple(self.numbers)


class WindowTwin(Window):
    def __init__(self, window: Window) -> None:
        self.path, self.numbers = window.path, window.numbers

    def push(self, number: float) -> None:
        raise ProtectedException("Write", self.path, "It is read only.")

    def __reduce__(self) -> tuple[Any, ...]:
        return Window, (self.path,), vars(self)


def push(container: Any, step: int) -> None:
    container.push(step / 2, step)


def push_by_name(container: Any, step: int) -> None:
    container.push("Loss" if step % 2 else "encoder.norm", step / 2, step)


def append_by_phase(container: Any, step: int) -> None:
    container[TrainingPhase if step % 2 else ValidationPhase].append(step)


def push_by_phase(container: Any, step: int) -> None:
    container[TrainingPhase if step % 2 else ValidationPhase].push("Loss", step / 2, step)


def count(container: Any, step: int) -> None:
    container[TrainingPhase() if step % 2 else ValidationPhase()] = Counts((0, step, step, step))


def assign(container: Any, step: int) -> None:
    if "inner" not in container:
        container.inner = Series("cbstate.x.inner")
    container.inner.push(step / 2, step)
    container.best = [step]


def push_number(container: Any, step: int) -> None:
    container.push(step / 2)


Change = Callable[[Any, int], None]
CONTAINERS: dict[str, tuple[Callable[[], Any], Change]] = {
    "series": (partial(Series, "cbstate.x"), push),
    "by name": (partial(SeriesMap, "cbstate.x"), push_by_name),
    "lists by phase": (partial(PhaseMap, "cbstate.x", list), append_by_phase),
    "series by phase": (partial(PhaseMap, "cbstate.x", partial(SeriesMap, "cbstate.x")), push_by_phase),
    "counts": (partial(CountsMap, "cbstate.x"), count),
    "namespace": (partial(State, "cbstate.x"), assign),
    "window": (partial(Window, "cbstate.x"), push_number),
}


@pytest.mark.parametrize("name", CONTAINERS)
class TestContainer:
    @pytest.fixture
    def write(self, name: str) -> Change:
        """Return the function that writes into the container; each of its steps changes the container."""
        return CONTAINERS[name][1]

    @pytest.fixture
    def filled(self, name: str, write: Change) -> Any:
        """Return a container after two writes."""
        made = CONTAINERS[name][0]()
        write(made, 1)
        write(made, 2)
        return made

    def test_the_twin_is_live_and_refuses_to_be_written(self, filled: Any, write: Change) -> None:
        twin = readonly(filled, "cbstate.x")
        write(filled, 3)
        before = content(filled)
        assert content(twin) == before
        with pytest.raises(TypeError if isinstance(twin, MappingProxyType) else ProtectedException):
            write(twin, 4)
        assert content(filled) == before

    def test_without_graphs_it_is_its_own_detached_value(self, filled: Any) -> None:
        assert isinstance(filled, Container)
        assert detached(filled) is filled

    def test_a_frozen_one_stays_as_it_was_and_pickles(self, filled: Any, write: Change) -> None:
        before = copy.deepcopy(content(filled))
        frozen = filled.__frozen__(Deep())
        write(filled, 3)
        assert isinstance(frozen, type(filled))
        assert content(frozen) == content(pickle.loads(pickle.dumps(frozen))) == before != content(filled)

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
    def test_a_copy_of_it_or_of_its_twin_is_a_container_of_its_own(
        self, filled: Any, write: Change, again: Callable[[Any], Any]
    ) -> None:
        before = copy.deepcopy(content(filled))
        twin = readonly(filled, "cbstate.x")
        # A mappingproxy, the twin of counts, can neither be copied nor pickled.
        for made in [again(each) for each in (filled, twin) if not isinstance(each, MappingProxyType)]:
            assert type(made) is type(filled)
            assert content(made) == before
            write(made, 3)
            assert content(readonly(made, "cbstate.x")) == content(made) != before
        assert content(filled) == before

    def test_it_is_filled_from_a_checkpoint_in_place(self, filled: Any, write: Change) -> None:
        before = copy.deepcopy(content(filled))
        packer = Packer()
        packed = packer.pack(filled, "cbstate.x")
        [(kind, inside)] = packer.copy(packed, "a checkpoint holds nothing but plain values").items()
        assert kind == type(filled).__kind__
        for step in (3, 4):
            write(filled, step)
        assert content(filled) != before
        assert not unpack(filled, "another kind", inside, PHASES)
        assert unpack(filled, kind, inside, PHASES)
        assert content(filled) == before

    def test_empty_content_empties_it(self, filled: Any, name: str) -> None:
        filled.__fill__({}, PHASES)
        kept = {"by name": {"Loss": [], "encoder.norm": []},  # series that views may hold stay, empty
                "series by phase": {phase: {"Loss": []} for phase in PHASES.values()}}.get(name)  # fmt: skip
        assert content(filled) == (kept or content(CONTAINERS[name][0]()))

    def test_it_comes_back_to_a_mark(self, filled: Any, write: Change) -> None:
        state = State("cbstate")
        state.x = filled
        before = copy.deepcopy(content(filled))
        restore = restore_point(state)
        for step in (3, 4):
            write(filled, step)
        restore()
        assert state.x is filled
        assert content(filled) == before
        assert content(state.__twins__.x) == before

    def test_a_write_changes_what_strict_mode_compares_and_a_look_does_not(self, filled: Any, write: Change) -> None:
        before = fingerprint(filled)
        content(filled)
        if isinstance(filled, PhaseMap):
            assert not any(readonly(filled, "cbstate.x")[OODPhase])
        assert fingerprint(filled) == before
        write(filled, 3)
        assert fingerprint(filled) != before


def test_what_is_declared_at_a_key_is_found_by_its_name_with_dots() -> None:
    weight, inner = Read(), Read()
    inside: Tree = {"encoder": {"weight": weight}, "all": {"": Read(), "x": inner}, "leaf": weight, "3": weight}
    keys = ["encoder.weight", "encoder", "encoder.bias", "other", "all.y", "leaf.below", 3]
    assert list(declared_items(keys, inside)) == [
        ("encoder.weight", weight), ("encoder", {"weight": weight}), ("all.y", inside["all"]), ("leaf.below", weight),
        (3, weight)]  # fmt: skip
    assert list(declared_items(["a", "b.c"], None)) == [("a", None), ("b.c", None)]


def test_a_container_with_graphs_is_copied_to_be_detached() -> None:
    value = torch.ones(2, requires_grad=True) * 2
    by_phase, state = PhaseMap[Any]("cbstate.x", list), State("cbstate.y")
    by_phase[TrainingPhase].append(value)
    state.inner, state.other = State("cbstate.y.inner"), 1
    state.inner.last = value
    found = detached(by_phase), detached(state)
    assert not found[0][TrainingPhase][0].requires_grad
    assert found[0][ValidationPhase] == []
    assert not found[1].inner.last.requires_grad
    assert not found[1].__twins__.inner.last.requires_grad
    assert found[1].other == 1
    assert by_phase[TrainingPhase][0] is state.inner.last is value


# --- a container of a user


class Keeps(Callback):
    """A callback that keeps the last losses in a container of its own."""

    def state_access(self) -> Access:
        return {"batch.loss": Read(), "cbstate.window": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.window = Window("cbstate.window")

    @on(BatchEnd, TrainingPhase)
    def keep(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        learner.cbstate.window.push(learner.batch.loss.item())


class Looks(Callback):
    deferrable = True

    def __init__(self) -> None:
        self.found: list[list[float]] = []

    def state_access(self) -> Access:
        return {"cbstate.window": Read()}

    @on(BatchEnd, TrainingPhase)
    def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.found.append(list(learner.cbstate.window))


@pytest.mark.parametrize("executor", ["serial", DaskExecutor()], ids=["serial", "dask"])
def test_a_container_of_the_users_own_is_served_as_those_of_flowtrain_are(executor: Any, tmp_path: FilePath) -> None:
    looks = Looks()
    callbacks = [Keeps(), looks, Checkpointer(tmp_path)]
    with tiny_learner(*callbacks, n_batches=4, executor=executor, strict=executor == "serial") as learner:
        learner.fit(1)
        last = list(learner.state.cbstate.window)
        assert [len(each) for each in looks.found] == [1, 2, 3, 3]
        assert looks.found[-1] == last
        learner.fit(1)
        assert list(learner.state.cbstate.window) != last
        learner.load(tmp_path / "epoch-0001.ckpt")
        assert list(learner.state.cbstate.window) == last
