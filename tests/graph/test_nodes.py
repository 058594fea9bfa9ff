"""The callback graph as users inspect it: callbacks, and edges with their reasons and events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from flowtrain import (
    BatchEnd,
    Callback,
    CallbackError,
    EpochEnd,
    Event,
    LearnerView,
    NoConflict,
    Phase,
    Read,
    TrainingPhase,
    ValidationPhase,
    Write,
    callback_graph,
    on,
)
from flowtrain.callback.conditions import Every
from flowtrain.graph.nodes import Node
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import tiny_learner
from tests.support.ordered import At

W, R = Write(), Read()


def test_the_graph_has_reasons_and_events_on_every_edge() -> None:
    class Twice(At):
        @on(EpochEnd, TrainingPhase)
        def end(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    class Reader(Twice): ...

    writer, reader = Twice({"cbstate.x": W}), Reader({"cbstate.x": R})
    alone = At(name="alone")
    graph = callback_graph([reader, writer, alone])
    assert list(graph.nodes(data=True)) == [
        ("Reader", {"callback": reader}),
        ("Twice", {"callback": writer}),
        ("alone", {"callback": alone}),
    ]
    assert list(graph.edges(data=True)) == [
        (
            "Twice",
            "Reader",
            {
                "reason": "Twice writes cbstate.x, Reader reads it",
                "events": (
                    (BatchEnd, TrainingPhase),
                    (EpochEnd, TrainingPhase),
                    (BatchEnd, ValidationPhase),
                ),
            },
        )
    ]


def test_a_node_is_in_one_place() -> None:
    """Names, positions and declarations of the nodes follow the list of callbacks."""
    one, other = At({"batch.loss": R}), At({"cbstate.x": W})
    nodes: Sequence[Node] = Callbacks([one, other], LearnerState()).nodes
    assert [(node.callback, node.name, node.position) for node in nodes] == [(one, "At", 0), (other, "At#2", 1)]
    assert [node.union for node in nodes] == [((("batch", "loss"), R),), ((("cbstate", "x"), W),)]


# --- attributes of callbacks


class Plain(Callback):
    """Has one handler."""

    @on(EpochEnd)
    def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None: ...


def with_attribute(name: str, value: Any) -> Callback:
    callback = Plain()
    setattr(callback, name, value)
    return callback


class Titled(Plain):
    @property
    def name(self) -> str:  # type: ignore[override]  # what the test is about
        return "Mine"


class Untitled(Plain):
    @property
    def name(self) -> str:  # type: ignore[override]  # what the test is about
        return ""


@dataclass(frozen=True)
class Frozen(Plain):
    width: int = 1


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: with_attribute("name", None),
            "Plain.name is None. A name is a text, such as 'Printer', or '' for the name of the type.",
        ),
        (
            lambda: with_attribute("name", 5),
            "Plain.name is 5. A name is a text, such as 'Printer', or '' for the name of the type.",
        ),
        (
            lambda: with_attribute("conditions", None),
            "Plain.conditions is None. It is a tuple of conditions of flowtrain.callback.conditions, such as "
            "(Every(BatchEnd, 10),).",
        ),
        (
            lambda: with_attribute("conditions", Every(BatchEnd, 2)),
            "Plain.conditions is <flowtrain.callback.conditions.Every object",
        ),
        (lambda: with_attribute("conditions", [print]), "Plain.conditions is [<built-in function print>]. It is a tup"),
        (
            lambda: with_attribute("deferrable", "no"),
            "Plain.deferrable is 'no'. It is True or False: any other value, as 'no', would count as true.",
        ),
        (lambda: with_attribute("durable", None), "Plain.durable is None. It is True or False: any other value"),
        (lambda: with_attribute("may_cancel", 1), "Plain.may_cancel is 1. It is True or False"),
        (
            Untitled,
            "Untitled cannot be given its name, 'Untitled': property 'name' of 'Untitled' object has no setter. Let "
            "the name be an attribute that can be assigned, in no frozen dataclass, or give the class a name of its "
            "own.",
        ),
        (Frozen, "Frozen cannot be given its name, 'Frozen': cannot assign to field 'name'. Let the name"),
    ],
)
def test_attributes_that_no_learner_can_use(make: Callable[[], Callback], text: str) -> None:
    first = Plain()
    with pytest.raises(CallbackError) as raised:
        tiny_learner(first, make())
    assert str(raised.value).startswith(text)
    assert first.name == ""


def test_a_name_that_is_right_already_is_not_assigned() -> None:
    assert [each.name for each in tiny_learner(Titled(), default_callbacks=False).callbacks] == ["Mine"]


@dataclass
class Compared(Plain):
    weights: torch.Tensor


def test_callbacks_are_compared_by_identity() -> None:
    """The comparison of two dataclasses with tensors would raise."""
    one, other = Compared(torch.zeros(2)), Compared(torch.zeros(2))
    assert len(tiny_learner(one, other).audit_syncs()) == 0
    with pytest.raises(CallbackError, match=r"is in the list twice, at 1 and 2\. Make two instances"):
        tiny_learner(Compared(torch.zeros(2)), other := Compared(torch.zeros(2)), other)


# --- methods of callbacks that fail


@pytest.mark.parametrize(
    "method", ["handlers", "state_access", "run_after", "resolve_conflict", "setup", "check_callbacks"]
)
def test_an_error_in_a_method_that_a_learner_calls_names_the_callback(method: str) -> None:
    """The traceback of a method that several callbacks inherit does not say whose it was."""

    def fail(self: Any, *arguments: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    body = {"state_access": lambda self: {"cbstate.x": W}, "resolve_conflict": lambda self, other: NoConflict()}
    broken: Any = type("Broken", (Plain,), {**body, method: fail})
    other: Any = type("Other", (Plain,), body)
    with pytest.raises(ZeroDivisionError) as raised:
        tiny_learner(broken(), other(), default_callbacks=False)
    assert raised.value.__notes__ == [f"raised in Broken.{method}"]
