"""Events: they hold no data, except the fields that a subclass defines."""

from __future__ import annotations

import dataclasses
import pickle
import re
from dataclasses import dataclass

import pytest

import flowtrain
from flowtrain import BatchEnd, Event, FitBegin
from flowtrain.callback import events
from flowtrain.callback.phases import AbstractTrainingPhase
from tests.support.untyped import untyped

ALL = [getattr(events, name) for name in events.__all__]


@dataclass(frozen=True)
class Improved(Event):
    """A user's event with a field."""

    loss: float


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_every_event_is_a_documented_type_of_the_face(kind: type[Event]) -> None:
    assert issubclass(kind, Event)
    assert kind.__doc__
    assert getattr(flowtrain, kind.__name__) is kind
    assert repr(kind()).startswith(f"{kind.__name__}(")
    assert type(pickle.loads(pickle.dumps(kind()))) is kind


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not FitBegin], ids=lambda kind: kind.__name__)
def test_an_event_without_data_has_no_room_for_it(kind: type[Event]) -> None:
    with pytest.raises(AttributeError):
        untyped(kind()).loss = 1.0


def test_the_docstring_lists_the_events_of_a_batch_in_order() -> None:
    listed = re.findall(r"\w+(?:Begin|End|Cancelled)\b", (events.__doc__ or "").split("One fit fires")[1])
    batch = [kind.__name__ for kind in AbstractTrainingPhase.events or () if "Epoch" not in kind.__name__]
    assert listed == ["FitBegin", "EpochBegin", *batch, "EpochEnd", "EpochCancelled", "FitEnd"]


def test_fit_begin_says_how_long() -> None:
    assert FitBegin(epochs=3) == FitBegin(3, None)
    assert FitBegin(steps=10).epochs is None
    assert repr(FitBegin(epochs=3)) == "FitBegin(epochs=3, steps=None, updates=None, resumed=False, done=0)"
    with pytest.raises(dataclasses.FrozenInstanceError):
        untyped(FitBegin()).epochs = 2


def test_an_event_of_ones_own_carries_fields() -> None:
    assert Improved(0.5).loss == 0.5
    assert Improved(0.5) == Improved(0.5)
    assert repr(Improved(0.5)) == "Improved(loss=0.5)"
    assert pickle.loads(pickle.dumps(Improved(0.5))) == Improved(0.5)


def test_a_subclass_of_an_event_is_that_event_too() -> None:
    class LastBatchEnd(BatchEnd):
        """A more specific event."""

    assert isinstance(LastBatchEnd(), BatchEnd)
    assert repr(LastBatchEnd()) == "LastBatchEnd()"
