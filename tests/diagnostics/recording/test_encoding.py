"""The values of a recording: what comes back is equal, of the same types, and was never code."""

from __future__ import annotations

import json
import math
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from flowtrain import Event, TrainingPhase, UsageError, ValidationPhase
from flowtrain.diagnostics.recording.decoding import Decoder
from flowtrain.diagnostics.recording.encoding import Encoder, Marks
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.series import Series, SeriesMap
from tests.support.recorded import Color, Pair, Point, shown, values


@dataclass(frozen=True)
class Moment(Event):
    at: int = 0


class Output(OrderedDict[str, Any]):
    """As model outputs of the usual libraries are."""


class Plain:
    """No data."""


def again(value: Any, encoder: Encoder | None = None, decoder: Decoder | None = None) -> Any:
    encoder, decoder = encoder or Encoder(), decoder or Decoder()
    document = json.loads(json.dumps(encoder.encode(value, "batch.value")))
    decoder.begin(memoryview(bytes(encoder.content)))
    return decoder.decode(document)


def output() -> Any:
    made: Any = Output(logits=torch.ones(2))
    made.extra = [1]
    return made


VALUES: list[Any] = [
    None, True, 3, -(10**40), 0.1, -0.0, math.inf, "a\ud800\n", b"\x00\xff", 1 - 2j, Color.RED, torch.float16,
    torch.device("cpu"), torch.Size([2, 3]), (1, "a"), [1, [2.5]], {"a": 1, 2: (3,)}, {1, 2}, frozenset({3}),
    deque([1, 2]), OrderedDict(a=1), Pair(1, torch.ones(1)), Point(torch.zeros(2), [3]), Moment(4), TrainingPhase(),
    Counts((1, 2, 3, 4)), torch.tensor(3), torch.zeros(0, 3), torch.tensor([True]), torch.ones(2, dtype=torch.bfloat16),
    torch.arange(6).reshape(2, 3).T, torch.ones(2, dtype=torch.complex64).conj(), np.arange(4).reshape(2, 2),
    np.float64(0.5), np.int32(4), np.array(["ab"]), np.bool_(True),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_a_value_comes_back(value: Any) -> None:
    made = again(value)
    assert type(made) is type(value)
    assert shown(made) == shown(value)
    assert shown(again({"a": [value], "b": (value,)})) == shown({"a": [value], "b": (value,)})


def test_attributes_of_containers_and_kinds_of_dicts() -> None:
    made: Any = again(output())
    assert isinstance(made, Output)
    assert vars(made)["extra"] == [1]
    assert again(defaultdict(list, a=[1])) == {"a": [1]}
    assert math.isnan(again(math.nan))


def test_one_tensor_in_two_places_is_one_tensor() -> None:
    tensor = torch.rand(100)
    encoder = Encoder()
    made = again([tensor, {"b": tensor}], encoder)
    assert made[0] is made[1]["b"]
    assert len(encoder.content) == 400


@pytest.mark.parametrize(
    "value",
    [Plain(), len, Plain, torch.nn.functional.relu, torch.ones(2).to_sparse(), torch.ones(2, device="meta"),
     np.array([object()]), open],
    ids=repr,
)  # fmt: skip
def test_a_value_that_is_no_data_is_refused_by_its_path(value: Any) -> None:
    with pytest.raises(UsageError, match=r"batch\.value\['a'\]\[0\] is a .*, which cannot be recorded: it is "):
        again({"a": [value]})


def test_a_container_that_holds_itself_is_refused() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(UsageError, match="it holds itself"):
        again(value)


def test_a_series_continues_with_the_values_of_each_event() -> None:
    series, marks, decoder = Series("a"), Marks(), Decoder()
    sizes = []
    for number in range(1, 200):
        series.push(number / 3, number)
        if number == 150:
            series.push(torch.arange(2), number)  # no number
        if number in (40, 90, 170):
            series.shorten(20)
        encoder = Encoder(marks)
        made = again(series, encoder, decoder)
        assert shown(made) == shown(series)
        assert (len(made), made.dropped, shown(made.last())) == (len(series), series.dropped, shown(series.last()))
        sizes.append(len(encoder.content))
    assert sorted(sizes)[-10] == 16  # but for the events after values were dropped, an event has a step and a value


def test_series_by_phase_and_a_phase_that_is_new() -> None:
    maps: PhaseMap[SeriesMap] = PhaseMap("cbstate.metrics", lambda: SeriesMap("cbstate.metrics"))
    maps[TrainingPhase].push("Loss", 0.5, 1)
    made = again(maps)
    assert list(made[TrainingPhase]["Loss"]) == [(1, 0.5)]
    assert ValidationPhase not in made
    made[ValidationPhase].push("Loss", 1.0, 1)
    assert len(made[ValidationPhase]) == 1
    counts = CountsMap("cbstate.history")
    counts[TrainingPhase()] = Counts((1, 2, 3, 4))
    assert again(counts)[TrainingPhase].steps == 2
    assert again(counts)[ValidationPhase].steps == 0


@given(values)
def test_any_data_comes_back(value: Any) -> None:
    assert shown(again(value)) == shown(value)
