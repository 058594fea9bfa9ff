"""What a handler sees of a namespace: whole, in parts, and where nothing is there yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowtrain import Access, Read, TrainingPhase, Write
from flowtrain.errors import MissingStateError, ProtectedException, UsageError
from flowtrain.state.readonly import ReadOnlyDict, ReadOnlyList
from tests.support.views import made, view_of


@pytest.mark.parametrize("root", ["batch", "cbstate"])
def test_a_whole_namespace_to_read(root: str) -> None:
    state = made()
    learner = view_of({root: Read()}, state)
    space = getattr(learner, root)
    name = {"batch": "inputs", "cbstate": "seen"}[root]
    assert getattr(space, name) == getattr(getattr(state, root), name)
    assert isinstance(getattr(space, name), (ReadOnlyDict, ReadOnlyList))
    assert name in space
    assert "absent" not in space
    changes: list[Callable[[], None]] = [
        lambda: setattr(space, name, 1),
        lambda: setattr(space, "new", 1),
        lambda: delattr(space, name),
    ]
    for change in changes:
        with pytest.raises(ProtectedException, match="Write access"):
            change()
    with pytest.raises(MissingStateError) as caught:
        _ = space.absent
    said = f"Mine reads Learner.{root}.absent, and there is nothing. {root}.absent does not exist (yet). "
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize("root", ["batch", "cbstate"])
def test_a_whole_namespace_to_write(root: str) -> None:
    state = made()
    space = getattr(view_of({root: Write()}, state), root)
    target = getattr(state, root)
    space.new = [1]
    space.new.append(2)
    assert target.new == [1, 2]
    assert "new" in space
    del space.new
    assert "new" not in vars(target)
    with pytest.raises(MissingStateError):
        _ = space.new


@pytest.mark.parametrize("root", ["batch", "cbstate"])
@pytest.mark.parametrize("value", [[1], {"a": [1]}, ({"a": 1}, 2)], ids=["list", "dict", "tuple"])
def test_an_assigned_container_is_raw_to_writers_and_read_only_to_readers(root: str, value: Any) -> None:
    """Rule 3: wrapped when it is assigned; a batch that only held tensors gets its twin then."""
    state = made()
    state.batch = state.batch_twin = type(state.batch)()
    readers = [view_of({f"{root}.mine": Read()}, state), view_of({root: Read()}, state)]
    writer = view_of({f"{root}.mine": Write()}, state)
    getattr(writer, root).mine = value
    assert getattr(writer, root).mine is value
    for reader in readers:
        seen = getattr(reader, root).mine
        assert seen is not value
        assert seen == value
    getattr(writer, root).mine = 5
    assert all(getattr(reader, root).mine == 5 for reader in readers)
    getattr(writer, root).mine = torch.ones(2)
    assert all(getattr(reader, root).mine is getattr(writer, root).mine for reader in readers)
    delattr(getattr(writer, root), "mine")
    for reader in readers:
        with pytest.raises(MissingStateError):
            _ = getattr(reader, root).mine


def test_a_view_shows_the_batch_of_the_moment() -> None:
    state = made()
    learner = view_of({"batch.loss": Read()}, state)
    batch = type(state.batch)()
    batch.loss = torch.zeros(())
    state.show(batch)
    assert learner.batch.loss is batch.loss


@pytest.mark.parametrize("value", [None, 5, [1]], ids=repr)
def test_a_series_is_filled_and_never_replaced(value: Any) -> None:
    """Others hold it: also a plain value does not take its place."""
    state = made()
    for access in ({"cbstate.tracehistory": Write()}, {"cbstate": Write()}):
        with pytest.raises(UsageError, match=r"^cbstate\.tracehistory is a PhaseMap and is filled, never replaced"):
            view_of(access, state).cbstate.tracehistory = value
    assert state.cbstate.tracehistory is not value


# --- optional reads


@pytest.mark.parametrize("entry", ["batch.absent", "cbstate.absent", "cbstate.mine.absent", "cbstate.absent.deep",
                                   "cbstate.tracehistory.Absent", "batch.grads.absent"])  # fmt: skip
def test_an_optional_read_of_nothing_is_none(entry: str) -> None:
    def read(access: Access) -> Any:
        found: Any = view_of(access, made())
        for name in entry.split("."):
            found = found[name] if name in ("Absent", "absent") and "grads" in entry else getattr(found, name)
            if name == "tracehistory":
                found = found[TrainingPhase]
        return found

    assert read({entry: Read(optional=True)}) is None
    with pytest.raises(MissingStateError) as caught:
        read({entry: Read()})
    assert caught.value.path == entry
    assert f'declare {{"{entry}": Read(optional=True)}} and handle None.' in str(caught.value)


def test_an_optional_read_of_what_is_there_is_the_plain_getter() -> None:
    """Rule 4."""
    state = made()
    plain, optional = (view_of({"batch.loss": kind}, state) for kind in (Read(), Read(optional=True)))
    assert optional.batch.loss is plain.batch.loss is state.batch.loss
    getters = [type(view.batch).__dict__["loss"] for view in (plain, optional)]
    assert [type(getter.fget).__name__ for getter in getters] == ["attrgetter", "attrgetter"]


def test_a_whole_optional_read() -> None:
    learner = view_of({"cbstate": Read(optional=True)}, made())
    assert learner.cbstate.absent is None
    assert learner.cbstate.best == 0.5
