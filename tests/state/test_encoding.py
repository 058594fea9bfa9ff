"""Encoded state: decoding it gives equal values, in the containers that exist already."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, UserDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain import CheckpointError, Phase, TrainingPhase, ValidationPhase
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.encoding import Buffers, Packer, phase_of
from flowtrain.state.namespace import State
from flowtrain.state.series import SeriesMap
from flowtrain.testing import tiny_learner

PHASES: dict[str, Phase] = {"TrainingPhase": TrainingPhase(), "ValidationPhase": ValidationPhase()}


def test_copies_are_nobody_elses_and_share_what_was_shared() -> None:
    shared, inside = torch.zeros(3), {"deep": [torch.ones(1)]}
    copy = Packer().copy({"a": shared, "b": shared, "c": inside}, "x")
    shared += 1
    inside["deep"][0] += 1
    assert copy["a"] is copy["b"]
    assert copy["a"].tolist() == [0, 0, 0]
    assert copy["c"]["deep"][0].tolist() == [1]


def test_each_view_of_one_memory_has_a_copy_of_its_own() -> None:
    """They are told apart by the elements that they show, in whatever order they come; an equal view has the same."""
    whole = torch.arange(4.0)
    views = [whole[:2], whole.view(2, 2), whole[2:], whole.view(2, 2).T, whole[:2], whole.view(2, 2)]
    empty = torch.empty(0)
    copies = Packer().copy([*views, empty, empty], "x")
    whole.zero_()
    wanted = [[0, 1], [[0, 1], [2, 3]], [2, 3], [[0, 2], [1, 3]], [0, 1], [[0, 1], [2, 3]]]
    assert [each.tolist() for each in copies[:6]] == wanted
    assert copies[4] is copies[0]
    assert copies[5] is copies[1]
    assert copies[7] is copies[6]


# --- buffers


def test_the_memory_of_a_checkpoint_that_was_written_is_filled_again() -> None:
    """Two tensors of one shape have two buffers, and one that is new, or of another dtype, has new memory."""
    buffers, one = Buffers(), torch.ones(20_000)
    other = {"a": one, "b": one + 1, "c": one.double()}
    buffers.begin()
    first = Packer(buffers=buffers).copy(other, "x")
    places = {name: copied.data_ptr() for name, copied in first.items()}
    for tensor in other.values():
        tensor += 5
    buffers.begin()
    second = Packer(buffers=buffers).copy({**other, "d": one + 2}, "x")
    assert {second[name].data_ptr() for name in "abc"} == set(places.values())
    assert [second[name][0].item() for name in "abcd"] == [6, 7, 6, 8]
    assert second["d"].data_ptr() not in places.values()
    assert all(copied.untyped_storage().nbytes() == copied.nbytes for copied in second.values())


def test_memory_is_released() -> None:
    buffers, tensor = Buffers(), torch.ones(20_000)
    first = Packer(buffers=buffers).copy(tensor, "x")
    buffers.clear()
    buffers.begin()
    assert Packer(buffers=buffers).copy(tensor, "x").data_ptr() != first.data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(200, 300).T,
        torch.ones(1).expand(50_000),
        torch.ones(50_000).to_sparse(),
        torch.complex(torch.ones(50_000), torch.ones(50_000)).conj(),
        torch.ones(10),
    ],
    ids=["transposed", "expanded", "sparse", "conjugate", "small"],
)
def test_other_tensors_are_copied_as_before(tensor: torch.Tensor) -> None:
    copied = Buffers().copy(tensor)
    assert (copied.layout, copied.dtype) == (tensor.layout, tensor.dtype)
    assert torch.equal(copied.to_dense().resolve_conj(), tensor.to_dense().resolve_conj())


# --- errors


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            {"a": [1, object]},
            r"Mine\.state_dict\(\) cannot be in a checkpoint: \['a'\]\[1\] is <class 'object'> \(type\)",
        ),
        ({("a",): 1}, r"cannot be in a checkpoint: the key \('a',\) is \('a',\) \(tuple\)"),
        (print, r"itself is <built-in function print>"),
    ],
)
def test_what_is_not_plain_is_named(value: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        Packer().copy(value, "Mine.state_dict()")


def test_a_container_that_holds_itself_is_refused() -> None:
    value: dict[str, Any] = {"a": [1]}
    value["a"].append(value)
    with pytest.raises(CheckpointError) as caught:
        Packer().copy(value, "Mine.state_dict()")
    text = "Mine.state_dict() cannot be in a checkpoint: ['a'][1] holds itself, and is {'a': [1, {...}]} (dict). A ch"
    assert str(caught.value).startswith(text)
    twice = [1]
    assert Packer().copy([twice, twice], "x") == [[1], [1]]


def test_a_namespace_that_holds_itself_is_refused() -> None:
    state = State("cbstate")
    state.mine = State("cbstate.mine")
    state.mine.again = state.mine
    with pytest.raises(
        CheckpointError, match=r"^cbstate\.mine\.again cannot be in a checkpoint: it holds itself, and "
    ):
        Packer().pack(state, "cbstate")


def test_containers_are_filled_in_place() -> None:
    """Views hold the containers, so their identity stays; entries that were added since are removed."""
    state = State("cbstate")
    state.history, state.metrics = CountsMap("cbstate.history"), SeriesMap("cbstate.metrics")
    state.history[TrainingPhase()] = Counts((1, 2, 2, 2))
    state.metrics.push("Loss", 0.5, 1)
    state.mine = {"rate": 0.1}
    packed = {name: Packer().pack(getattr(state, name), f"cbstate.{name}") for name in state}
    history, loss = state.history, state.metrics["Loss"]
    history[ValidationPhase()] = history[TrainingPhase()] = Counts((9, 9, 9, 9))
    state.metrics.push("Loss", 0.25, 2)
    state.metrics.push("New", 1.0, 2)
    state.mine = 3
    for name, each in packed.items():
        state.__put__(name, each, PHASES)
    assert state.history is history
    assert state.metrics["Loss"] is loss
    assert history == {TrainingPhase(): Counts((1, 2, 2, 2))}
    assert list(loss) == [(1, 0.5)]
    assert len(state.metrics["New"]) == 0
    assert state.mine == {"rate": 0.1}


class Total:
    """An object with `state_dict` and `load_state_dict`."""

    def __init__(self) -> None:
        self.total = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = state["total"]


def test_namespaces_and_objects_by_phase_come_back_as_they_were() -> None:
    """The state is also loaded into a learner that has no entries for these phases yet."""

    def maps() -> State:
        state = State("cbstate")
        state.named = PhaseMap("cbstate.named", lambda: State("cbstate.named"))
        state.totals = PhaseMap("cbstate.totals", Total)
        return state

    state = maps()
    state.named[TrainingPhase].best, state.totals[TrainingPhase].total = [1], 5
    packed = Packer().pack(state, "cbstate")
    state.named[TrainingPhase].best, state.totals[TrainingPhase].total = [2], 7
    state.named[ValidationPhase].best = 3
    for restored in (state, maps()):
        restored.__fill__(Packer().copy(packed["namespace"], "cbstate"), PHASES)
        assert vars(restored.named[TrainingPhase]) == {"best": [1]}
        assert vars(restored.named[ValidationPhase]) == {}
        assert restored.totals[TrainingPhase].total == 5


def test_all_of_a_fit_goes_there_and_back() -> None:
    learner = tiny_learner(n_batches=2)
    learner.fit(1)
    cbstate = learner.state.cbstate
    packed = {name: Packer().pack(getattr(cbstate, name), name) for name in cbstate}
    before = {name: repr(getattr(cbstate, name)) for name in cbstate}
    learner.fit(1)
    assert before != {name: repr(getattr(cbstate, name)) for name in cbstate}
    for name, each in packed.items():
        cbstate.__put__(name, each, PHASES)
    assert before == {name: repr(getattr(cbstate, name)) for name in cbstate}


def test_phases_by_name() -> None:
    class SomewhereElsePhase(ValidationPhase):
        """A phase without data."""

    assert phase_of("TrainingPhase", PHASES) is PHASES["TrainingPhase"]
    assert isinstance(phase_of("SomewhereElsePhase", PHASES), SomewhereElsePhase)
    with pytest.raises(CheckpointError, match=r"no phase of that name is defined\. Import the module that def"):
        phase_of("NowherePhase", PHASES)


@pytest.mark.parametrize(
    ("setup", "trained"),
    [
        (defaultdict(int), defaultdict(int, a=1)),
        (Counter(), Counter("aab")),
        (OrderedDict(a=1), OrderedDict(b=2, a=1)),
        (UserDict(a=Counter()), UserDict(a=Counter("aab"), b=2)),
        ({"seen": defaultdict(list), "n": 1}, {"seen": defaultdict(list, a=[1]), "n": 2}),
        (frozenset({1}), frozenset({1, 2})),
        (torch.Size((1,)), torch.Size((2, 3))),
        ([1], [2]),
        ({"a": 1}, {"b": [2]}),
        (None, {"a": 1}),
        ({"a": 1}, [1]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("by_phase", [False, True])
def test_an_entry_comes_back_in_the_type_that_setup_made_it_in(setup: Any, trained: Any, by_phase: bool) -> None:
    """A file holds only dicts and sets; a resumed fit once failed at the first new key of a ``defaultdict``."""

    def entry(value: Any) -> Any:
        if not by_phase:
            return value
        made: PhaseMap[Any] = PhaseMap("cbstate.x")
        made[TrainingPhase] = value
        return made

    before, after = State("cbstate"), State("cbstate")
    before.x, after.x = entry(trained), entry(copy.deepcopy(setup))
    after.__fill__(Packer().pack(before, "cbstate")["namespace"], {"TrainingPhase": TrainingPhase()})
    found = after.x[TrainingPhase] if by_phase else after.x
    assert found == trained
    assert list(found) == list(trained)
    assert type(found) is type(trained)
    if isinstance(found, defaultdict):
        assert found["new"] == found.default_factory()  # type: ignore[misc]  # those here have one
    if isinstance(found, dict) and "seen" in found:
        assert found["seen"]["new"] == []


class Sub(torch.Tensor):
    """A subclass whose elements are in its own memory, as the classes of torchvision, MONAI and fastai."""


class Computes(torch.Tensor):
    """A subclass that computes its elements."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch documents a class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def test_a_tensor_of_a_subclass_is_stored_as_a_plain_one(tmp_path: Path) -> None:
    value = torch.arange(2.0).as_subclass(Sub)
    copied = Packer().copy({"x": value, "same": value}, "Mine.state_dict()")
    torch.save(copied, tmp_path / "file")
    again = torch.load(tmp_path / "file", weights_only=True)
    assert [type(each) for each in again.values()] == [torch.Tensor, torch.Tensor]
    assert again["x"].tolist() == [0, 1]
    assert copied["x"] is copied["same"]


def test_an_entry_of_a_subclass_comes_back_in_its_class() -> None:
    state = State("cbstate")
    state.kept = torch.zeros(2).as_subclass(Sub)
    state.plain = torch.zeros(2)
    state.__fill__({name: {"value": torch.ones(2)} for name in ("kept", "plain")}, PHASES)
    assert (type(state.kept), type(state.plain)) == (Sub, torch.Tensor)
    assert state.kept.tolist() == state.plain.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (
            torch.empty(2, device="meta"),
            "['x'] is a Tensor on the device 'meta', without values. Give it values first: "
            "module.to_empty(device='cpu').",
        ),
        (
            torch.zeros(2).as_subclass(Computes),
            "['x'] is a Computes, which torch.load(weights_only=True) cannot read. Return plain tensors that it can be "
            "made from.",
        ),
    ],
)
def test_tensors_that_a_file_could_not_give_back_are_refused(value: torch.Tensor, text: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        Packer().copy({"x": value}, "Mine.state_dict()")
    assert str(raised.value) == f"Mine.state_dict() cannot be in a checkpoint: {text}"


@pytest.mark.parametrize("kind", [np.longdouble, np.clongdouble, np.datetime64])
def test_a_number_of_numpy_without_a_plain_value_is_refused(kind: Any) -> None:
    value = kind("2020-01-01") if kind is np.datetime64 else kind(1)
    with pytest.raises(CheckpointError, match=r"^Mine\.state_dict\(\) cannot be in a checkpoint: \['x'\] is "):
        Packer().copy({"x": value}, "Mine.state_dict()")


def test_of_two_classes_of_one_name_the_newer_one_is_meant() -> None:
    kinds = []
    for _ in range(2):

        class Renamed(ValidationPhase):
            """Defined twice, as by a cell of a notebook."""

        kinds.append(Renamed)
    assert type(phase_of("Renamed", {})) is kinds[1]
    assert phase_of("Renamed", {"Renamed": kinds[0]()}) is kinds[0]()
