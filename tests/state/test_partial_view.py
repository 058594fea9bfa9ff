"""Views of a container of which only a part is declared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowtrain import TrainingPhase, ValidationPhase
from flowtrain.callback.access import Access, Read, Write, declare
from flowtrain.errors import MissingStateError, ProtectedException
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.namespace import State
from flowtrain.state.partial_view import Owner, Part, tree, writes
from flowtrain.state.series import SeriesMap


def part(path: str, access: Access, container: Any) -> Part:
    """Return the part of a container at a path, as a callback with the given access sees it."""
    declaration = declare(access, "me")
    inside: Any = tree(declaration)
    for name in path.split("."):
        inside = inside[name]
    return Part(Owner("Mine", "Mine", "state_access", declaration), tuple(path.split(".")), inside, lambda: container)


def traces(*names: str) -> PhaseMap[SeriesMap]:
    found = PhaseMap("cbstate.tracehistory", lambda: SeriesMap("cbstate.tracehistory"))
    for name in names:
        found[TrainingPhase].push(name, 1.0, 1)
    return found


# --- declarations, nested


@pytest.mark.parametrize(
    ("access", "nested", "writing"),
    [
        ({}, {}, False),
        ({"batch": Read()}, {"batch": Read()}, False),
        ({"batch.x": Read(), "batch.y.z": Write()}, {"batch": {"x": Read(), "y": {"z": Write()}}}, True),
        ({"batch": Read(), "batch.x": Write()}, {"batch": {"": Read(), "x": Write()}}, True),
        (
            {"batch": Read(), "batch.x": Read(), "batch.x.y": Read()},
            {"batch": {"": Read(), "x": {"": Read(), "y": Read()}}},
            False,
        ),
    ],
)
def test_a_declaration_as_a_tree(access: Access, nested: Any, writing: bool) -> None:
    found = tree(declare(access, "me"))
    assert found == nested
    assert writes(found) is writing


# --- series


def test_one_series_of_many_in_every_phase() -> None:
    history = traces("GradNorm", "Other")
    mine = part("cbstate.tracehistory", {"cbstate.tracehistory.GradNorm": Write()}, history)
    mine[TrainingPhase].push("GradNorm", 2.0, 2)
    mine[ValidationPhase()].push("GradNorm", 3.0, 1)
    assert [value for _, value in history[TrainingPhase]["GradNorm"]] == [1.0, 2.0]
    assert history[ValidationPhase]["GradNorm"].last() == (1, 3.0)
    assert list(mine) == [TrainingPhase(), ValidationPhase()]
    assert list(mine[TrainingPhase]) == ["GradNorm"]
    assert len(mine[TrainingPhase]) == 1
    assert repr(mine) == "Part(Learner.cbstate.tracehistory: GradNorm)"
    refused: list[Callable[[], Any]] = [
        lambda: mine[TrainingPhase].push("Other", 1.0, 2),
        lambda: mine[TrainingPhase]["Other"],
        lambda: "Other" in mine[TrainingPhase],
        lambda: mine[TrainingPhase].get("Other"),
    ]
    for touch in refused:
        with pytest.raises(ProtectedException) as caught:
            touch()
        assert caught.value.path == "cbstate.tracehistory.Other"
    assert len(history[TrainingPhase]["Other"]) == 1


def test_a_writer_has_its_series_before_the_first_value() -> None:
    history = traces()
    mine = part("cbstate.tracehistory", {"cbstate.tracehistory.GradNorm": Write()}, history)
    assert "GradNorm" not in mine[TrainingPhase]
    assert list(history[TrainingPhase]) == []  # the read has added no entry
    mine[TrainingPhase]["GradNorm"].push(1.0, 1)
    assert history[TrainingPhase]["GradNorm"].last() == (1, 1.0)
    assert "GradNorm" in mine[TrainingPhase]


def test_a_reader_of_a_series_that_has_not_begun() -> None:
    history = traces()
    mine = part("cbstate.tracehistory", {"cbstate.tracehistory.GradNorm": Read()}, history)[TrainingPhase]
    with pytest.raises(MissingStateError) as caught:
        _ = mine["GradNorm"]
    assert str(caught.value) == (
        "Mine reads Learner.cbstate.tracehistory.GradNorm, and there is nothing. If that is expected, declare "
        '{"cbstate.tracehistory.GradNorm": Read(optional=True)} and handle None.'
    )
    assert "GradNorm" not in mine
    assert mine.get("GradNorm", 0) == 0
    optional = part("cbstate.tracehistory", {"cbstate.tracehistory.GradNorm": Read(optional=True)}, history)
    assert optional[TrainingPhase]["GradNorm"] is None
    history[TrainingPhase].push("GradNorm", 1.0, 1)
    assert mine["GradNorm"].last() == optional[TrainingPhase].GradNorm.last() == (1, 1.0)
    with pytest.raises(ProtectedException):
        mine["GradNorm"].push(2.0, 2)


def test_a_name_with_dots_and_spaces() -> None:
    history = traces()
    access: Access = {"cbstate.tracehistory.layer.0 norm": Write()}
    mine = part("cbstate.tracehistory", access, history)[TrainingPhase]
    mine.push("layer.0 norm", 1.0, 1)
    assert mine["layer.0 norm"].last() == (1, 1.0)
    assert list(mine) == list(history[TrainingPhase]) == ["layer.0 norm"]


def test_reading_all_and_writing_one() -> None:
    """Rule 4: a declared path covers what lies below it, and a `Write` below a `Read` is a `Write`."""
    history = traces("GradNorm", "Other")
    access: Access = {"cbstate.tracehistory": Read(), "cbstate.tracehistory.GradNorm": Write()}
    mine = part("cbstate.tracehistory", access, history)[TrainingPhase]
    mine["GradNorm"].push(2.0, 2)
    mine.push("GradNorm", 3.0, 3)
    assert dict(mine)["Other"].last() == (1, 1.0)
    with pytest.raises(ProtectedException, match=r"Learner\.cbstate\.tracehistory\.Other"):
        mine["Other"].push(2.0, 2)
    assert len(history[TrainingPhase]["GradNorm"]) == 3


def test_only_series_take_push() -> None:
    with pytest.raises(TypeError, match=r"^Learner\.params is a dict, and only series take push\(\)\. Assign to its "):
        part("params", {"params.w": Write()}, {}).push("w", 1, 1)


def test_a_whole_phase_is_more_than_a_series() -> None:
    history = traces()
    mine = part("cbstate.tracehistory", {"cbstate.tracehistory.GradNorm": Write()}, history)
    for key in (TrainingPhase, TrainingPhase()):
        with pytest.raises(ProtectedException) as caught:
            mine[key] = SeriesMap("x")
        assert caught.value.path == "cbstate.tracehistory"


# --- mappings, modules, namespaces


def test_parameters_by_name() -> None:
    weights = {"encoder.weight": torch.ones(1), "encoder.bias": torch.ones(2), "head.weight": torch.ones(3)}
    mine = part("params", {"params.encoder": Read(), "params.head.weight": Write()}, weights)
    assert mine["encoder.weight"] is weights["encoder.weight"]
    assert dict(mine) == weights
    mine["head.weight"] = torch.zeros(3)
    assert weights["head.weight"].tolist() == [0, 0, 0]
    with pytest.raises(ProtectedException) as caught:
        mine["encoder.weight"] = torch.zeros(1)
    assert caught.value.path == "params.encoder.weight"
    with pytest.raises(ProtectedException):
        del mine["encoder.weight"]
    del mine["head.weight"]
    assert list(weights) == ["encoder.weight", "encoder.bias"]


def test_a_module_by_attribute_and_by_number() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 2))
    mine = part("model", {"model.0": Read()}, model)
    assert mine[0] is mine["0"] is model[0]
    assert list(mine) == ["0"]
    with pytest.raises(ProtectedException, match=r"Read access to Learner\.model\.1 disallowed"):
        _ = mine[1]


def test_a_namespace_by_attribute() -> None:
    space = State("cbstate.mine")
    access: Access = {"cbstate.mine.a": Write(), "cbstate.mine.b": Read(), "cbstate.mine.deep.x": Write()}
    mine = part("cbstate.mine", access, space)
    mine.a = [1]
    mine.a.append(2)
    assert space.a == [1, 2]
    assert "a" in mine
    assert "b" not in mine
    space.b = [3]
    assert mine.b == [3]
    for statement in ("x.b = 1", "del x.b", "x.b.append(1)", "x.c = 1", "x.c", "x.deep = 1", "x.deep.y"):
        with pytest.raises(ProtectedException):
            exec(statement, {"x": mine})
    del mine.a
    assert list(space) == ["b"]
    space.deep = State("cbstate.mine.deep")
    mine.deep.x = 5
    assert space.deep.x == 5


def test_an_absent_container_is_missing_only_when_it_is_used() -> None:
    def absent() -> Any:
        raise MissingStateError("cbstate.mine", "cbstate.mine does not exist (yet).")

    declaration = declare({"cbstate.mine.a": Read(), "cbstate.mine.b": Read(optional=True)}, "me")
    inside: Any = tree(declaration)
    owner = Owner("Mine", "Mine", "state_access", declaration)
    mine = Part(owner, ("cbstate", "mine"), inside["cbstate"]["mine"], absent)
    assert mine.b is None
    assert "a" not in mine
    with pytest.raises(MissingStateError) as caught:
        _ = mine.a
    assert caught.value.path == "cbstate.mine.a"
    assert "cbstate.mine does not exist (yet)." in str(caught.value)
    assert isinstance(caught.value.__cause__, MissingStateError)


# --- refusals


def test_a_refusal_has_the_declaration_to_paste() -> None:
    """Rule 3: the refusal prints a declaration to paste, for the callback that was refused."""
    owner = Owner("Printer#2", "Printer", "state_access", declare({"batch.loss": Read()}, "me"))
    with pytest.raises(ProtectedException) as caught:
        owner.refuse("Write", ("batch", "loss"))
    assert str(caught.value) == (
        "Write access to Learner.batch.loss disallowed.\n"
        'Printer#2 declares {"batch.loss": Read()}. In Printer.state_access write:\n'
        "\n"
        "    def state_access(self) -> Access:\n"
        '        return {"batch.loss": Write()}\n'
    )


def test_a_refusal_to_a_handler_with_its_own_access() -> None:
    owner = Owner("Printer", "Printer", "show", declare({"batch.loss": Read()}, "me"), "@on(BatchEnd, TrainingPhase, ")
    with pytest.raises(ProtectedException) as caught:
        owner.refuse("Read", ("cbstate", "x"))
    assert str(caught.value) == (
        "Read access to Learner.cbstate.x disallowed.\n"
        'Printer declares {"batch.loss": Read()}. In Printer.show write:\n'
        "\n"
        '    @on(BatchEnd, TrainingPhase, access={"batch.loss": Read(), "cbstate.x": Read()})\n'
    )
