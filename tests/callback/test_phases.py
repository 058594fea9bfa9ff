"""Phases: each type has one instance; the events that a phase promises to fire, and the modes that it sets."""

from __future__ import annotations

import copy
import pickle
import re
from collections import UserDict
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import pytest
import torch

from flowtrain import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    BatchBegin,
    BatchEnd,
    DataError,
    Event,
    FitBegin,
    FitEnd,
    Phase,
    StepContext,
    TrainingPhase,
    UsageError,
    ValidationPhase,
)
from flowtrain.testing import TinyModel, tiny_learner
from tests.support.untyped import untyped

TYPES = [Phase, AbstractTrainingPhase, TrainingPhase, AbstractValidationPhase, ValidationPhase]
SUPERVISED: list[type[AbstractTrainingPhase | AbstractValidationPhase]] = [
    AbstractTrainingPhase,
    AbstractValidationPhase,
]


class GANPhase(AbstractTrainingPhase):
    """A phase with a step of its own."""

    def step(self, learner: StepContext, raw: Any) -> None:
        """Do nothing."""


class SaysWhat(AbstractTrainingPhase):
    """A phase with a step of its own, which says which events the step fires."""

    events = (BatchBegin, BatchEnd)
    provides: ClassVar[Mapping[str, type[Event]] | None] = {"fake": BatchBegin}

    def step(self, learner: StepContext, raw: Any) -> None:
        """Do nothing."""


def lazy(self: Any, learner: StepContext, raw: Any) -> Any:
    yield raw


async def later(self: Any, learner: StepContext, raw: Any) -> None: ...


LAZY = (
    "Own.step has async or yield in it, so calling it runs nothing of it. Write a plain function def step(self, "
    "learner, raw) that runs the batch and returns None."
)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            {"events": (BatchBegin, BatchEnd)},
            "Own.provides has 'outputs' from LossBegin on, and Own.events lacks that event. Add it to events, or "
            "define provides in Own with the events that its step fires.",
        ),
        (
            {"events": BatchBegin},
            "Own.events is <class 'flowtrain.callback.events.BatchBegin'>. It is a tuple of types of events, in the "
            "order in which they are fired: events = (EpochBegin, BatchBegin, BatchEnd, EpochEnd).",
        ),
        (
            {"events": (BatchBegin, "BatchEnd")},
            "Own.events is (<class 'flowtrain.callback.events.BatchBegin'>, 'BatchEnd'). It is a tuple of types of "
            "events, in the order in which they are fired: events = (EpochBegin, BatchBegin, BatchEnd, EpochEnd).",
        ),
        (
            {"provides": {"inputs": "BatchBegin"}},
            "Own.provides has 'BatchBegin' for 'inputs'. Write the name of an entry and a type of events: "
            '{"inputs": BatchBegin}.',
        ),
        (
            {"provides": {1: BatchBegin}},
            "Own.provides has <class 'flowtrain.callback.events.BatchBegin'> for 1. Write the name of an entry and a "
            'type of events: {"inputs": BatchBegin}.',
        ),
        ({"unpack": "no"}, "Own(unpack='no'): unpack is True or False."),
        ({"step": lazy}, LAZY),
        ({"step": later}, LAZY),
        (
            {"provides": ("inputs",)},
            "Own.provides is ('inputs',). It is a mapping from entries of the batch to types of events: "
            'provides = {"inputs": BatchBegin}.',
        ),
    ],
)
def test_lists_of_a_phase_that_do_not_fit_are_refused_in_the_class(body: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as raised:
        type("Own", (TrainingPhase,), body)
    assert str(raised.value) == text


# --- singletons


@pytest.mark.parametrize("kind", [*TYPES, GANPhase], ids=lambda kind: kind.__name__)
def test_one_instance_of_each_type(kind: type[Phase]) -> None:
    one = kind()
    assert type(one) is kind
    assert kind() is one
    assert copy.copy(one) is one
    assert copy.deepcopy({one: [one]}) == {one: [one]}
    assert pickle.loads(pickle.dumps(one)) is one
    assert repr(one) == kind.__name__


def test_a_subclass_has_an_instance_of_its_own() -> None:
    base = TrainingPhase()

    class Mine(TrainingPhase):
        """A subclass that adds nothing."""

    assert type(Mine()) is Mine
    assert len({base, Mine(), TrainingPhase()}) == 2


def test_a_phase_has_no_fields() -> None:
    with pytest.raises(UsageError) as caught:

        class Mine(TrainingPhase):  # pyright: ignore[reportUnusedClass]  # making it is the test
            """A subclass with a field."""

            def __init__(self) -> None:
                self.weight = 1.0

    assert str(caught.value) == (
        "Mine defines __init__, but a phase has no fields: there is one instance of each type. Keep such values in "
        "the learner's cbstate or in a callback."
    )
    with pytest.raises(TypeError):
        untyped(TrainingPhase)(1)


# --- the events and entries that a phase promises


def bullets(kind: type[Phase]) -> list[str]:
    return re.findall(r"^ *- (.+)$", kind.__doc__ or "", flags=re.MULTILINE)  # Python 3.13 strips the indentation


def named(text: str) -> list[str]:
    return re.findall(r"`([A-Z]\w+)`", text)


@pytest.mark.parametrize("kind", SUPERVISED)
def test_the_docstring_lists_the_events_in_order(kind: type[Phase]) -> None:
    """The docstring of each phase lists the events in the order in which a fit fires them, and no other events."""
    listed = [name for line in bullets(kind) for name in named(line)]
    *_, last = (kind.__doc__ or "").strip().splitlines()
    begin, *ends = named(last)
    assert [begin, *listed, *ends] == [event.__name__ for event in kind.events or ()]


@pytest.mark.parametrize("kind", SUPERVISED)
def test_the_docstring_says_what_each_event_makes_available(kind: type[Phase]) -> None:
    first: dict[str, str] = {}
    for line in bullets(kind):
        for entry in re.findall(r"``batch\.(\w+)``", line):
            first.setdefault(entry, named(line)[0])
    assert first == {entry: event.__name__ for entry, event in (kind.provides or {}).items()}


@pytest.mark.parametrize("kind", SUPERVISED)
def test_what_is_provided_comes_with_an_event_that_is_fired(kind: type[Phase]) -> None:
    assert kind.events is not None
    assert kind.provides is not None
    assert set(kind.provides.values()) <= set(kind.events)


def test_every_phase_has_the_promises_of_its_base() -> None:
    assert Phase.events == (FitBegin, FitEnd)
    assert Phase.provides is None
    assert TrainingPhase.events is AbstractTrainingPhase.events
    assert ValidationPhase.provides is AbstractValidationPhase.provides


def test_a_step_of_ones_own_takes_the_promises_back() -> None:
    """A phase that overrides `step` loses the promises of its base, which may be wrong for the new step."""
    assert (GANPhase.events, GANPhase.provides) == (None, None)
    assert SaysWhat.events == (BatchBegin, BatchEnd)
    assert SaysWhat.provides == {"fake": BatchBegin}

    class Further(GANPhase):
        """A subclass that inherits the step."""

    class Half(AbstractValidationPhase):
        """A phase that says only one of the two: the events that it fires, or the entries that it provides."""

        events = (BatchEnd,)

        def step(self, learner: StepContext, raw: Any) -> None:
            """Do nothing."""

    assert (Further.events, Further.provides) == (None, None)
    assert (Half.events, Half.provides) == ((BatchEnd,), None)


def test_another_split_keeps_the_promises() -> None:
    class FromDict(TrainingPhase):
        """A phase for data that is not a pair."""

        def split(self, raw: Any) -> tuple[Any, Any]:
            """Split a dict."""
            return raw["x"], raw["y"]

    assert FromDict.provides is TrainingPhase.provides
    learner = tiny_learner(data={FromDict: [{"x": torch.ones(2, 1), "y": torch.ones(2, 1)}]})
    batch = learner.step(FromDict, {"x": torch.ones(2, 1), "y": 3 * torch.ones(2, 1)})
    assert batch.targets.tolist() == [[3], [3]]


def test_a_phase_without_a_step() -> None:
    learner = tiny_learner()
    with pytest.raises(UsageError) as caught:
        learner.step(Phase, None)
    assert str(caught.value) == (
        "Phase has no step. Subclass TrainingPhase, ValidationPhase or their abstract bases, or define step()."
    )


# --- mode


def test_mode_restores_the_mode_of_each_module() -> None:
    """A layer that the user put into eval mode stays in eval mode during training and afterwards."""
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(1))
    shared = torch.nn.ModuleList([model[0]])
    model[1].eval()
    before = [module.training for module in model.modules()]
    assert before == [True, True, False]
    for phase, training in ((TrainingPhase(), True), (ValidationPhase(), False)):
        with torch.enable_grad(), phase.mode([model, shared]):
            assert [module.training for module in model.modules()] == [training, training, False]
            assert torch.is_grad_enabled() is training
        assert [module.training for module in model.modules()] == before


def test_mode_is_restored_when_the_epoch_fails() -> None:
    model = TinyModel()
    with pytest.raises(ZeroDivisionError), ValidationPhase().mode([model]):
        raise ZeroDivisionError
    assert model.training
    assert torch.is_grad_enabled()


def test_training_has_gradients_also_where_the_caller_has_none() -> None:
    with torch.no_grad():
        with TrainingPhase().mode([]):
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()


def test_a_bare_phase_changes_nothing() -> None:
    model = TinyModel().eval()
    with torch.no_grad(), Phase().mode([model]):
        assert not model.training
        assert not torch.is_grad_enabled()


# --- data


class Batch(NamedTuple):
    """A pair as a NamedTuple, which collate functions preserve."""

    x: int
    y: int


@pytest.mark.parametrize("raw", [(1, 2), [1, 2], Batch(1, 2)])
def test_a_pair_is_inputs_and_targets(raw: Any) -> None:
    assert TrainingPhase().split(raw) == (1, 2)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (torch.ones(2, 3), "Tensor of shape (2, 3), float32"),
        ((torch.ones(2),), "tuple of 1: Tensor of shape (2,), float32"),
        ([1, 2, 3], "list of 3: int 1, int 2, int 3"),
        ({"x": 1, "y": 2}, "dict with keys 'x', 'y'"),
        (None, "NoneType None"),
        ("ab", "str 'ab'"),
    ],
)
@pytest.mark.parametrize("kind", [TrainingPhase, ValidationPhase])
def test_what_is_no_pair_is_said(kind: type[TrainingPhase | ValidationPhase], raw: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        kind().split(raw)
    name = kind.__name__
    assert str(caught.value) == (
        f"{name} needs (inputs, targets) from its loader and got {said}. Let the dataset return pairs, or override "
        f"{name}.split(raw) to return (inputs, targets). For a model of several inputs set unpack = True in a phase "
        f"of your own."
    )


class Several(TrainingPhase):
    """A phase of a model with several inputs."""

    unpack = True


class Encoding(UserDict[str, Any]):
    """A mapping that is no dict, as the tokenizers of Hugging Face return."""


@pytest.mark.parametrize(
    ("raw", "inputs", "targets"),
    [
        ((1, 2), 1, 2),
        (((1, 2), 3), (1, 2), 3),
        ([1, 2, 3], (1, 2), 3),
        (({"x": 1}, 2), {"x": 1}, 2),
        ({"x": 1, "labels": 2}, {"x": 1, "labels": 2}, 2),
        (Encoding(x=1, labels=2), {"x": 1, "labels": 2}, 2),
        ({"x": 1}, {"x": 1}, None),
    ],
)
def test_the_inputs_of_a_model_of_several(raw: Any, inputs: Any, targets: Any) -> None:
    assert Several().split(raw) == (inputs, targets)


@pytest.mark.parametrize("raw", [torch.ones(2, 3), (1,), None])
def test_one_part_is_no_batch_of_several_inputs(raw: Any) -> None:
    with pytest.raises(DataError, match=r"Several needs \(inputs, targets\) from its loader"):
        Several().split(raw)


@pytest.mark.parametrize(
    ("inputs", "called"),
    [
        ((1, 2), "(1, 2) {}"),
        ([1], "(1,) {}"),
        ({"x": 1}, "() {'x': 1}"),
        (Encoding(x=1), "() {'x': 1}"),
        (1, "(1,) {}"),
    ],
)
def test_the_items_of_inputs_are_the_arguments_of_the_model(inputs: Any, called: str) -> None:
    def model(*args: Any, **named: Any) -> str:
        return f"{args} {named}"

    assert Several().call_model(model, inputs) == called
    assert TrainingPhase().call_model(model, inputs) == f"({inputs!r},) {{}}"
