"""Values of the device that the host reads a fixed number of batches late."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import TorchCore, TrainingPhase
from flowtrain.callbacks import Metrics, SmoothLoss
from flowtrain.metrics import mean_squared_error
from flowtrain.state.device_values import CHUNK, Lagged, Reading, reading, watched_waits
from flowtrain.state.readonly import readonly
from flowtrain.state.series import Series, SeriesMap
from flowtrain.testing import assert_equivalent, tiny_learner
from tests.support.examples import examples


def test_a_reading_gives_the_values_of_when_it_began() -> None:
    value = torch.tensor(1.0)
    one, several = Reading([value]), Reading([value, value + 1])
    value.fill_(7)
    assert one.numbers() == [1.0]
    assert several.numbers() == [1.0, 2.0]


def test_numbers_keep_their_types_and_order() -> None:
    values = [torch.tensor(2), torch.tensor([0.5]), torch.tensor(True), torch.tensor([[3]]), torch.tensor(1.5)]
    found = Reading(values).numbers()
    assert found == [2, 0.5, True, 3, 1.5]
    assert [type(each) for each in found] == [int, float, bool, int, float]
    assert Reading([torch.tensor(2**62 + 1)]).numbers() == [2**62 + 1]


@given(st.lists(st.floats(width=32, allow_nan=False)), st.integers(0, 4))
def test_each_value_comes_once_in_order_and_exactly_lag_pushes_later(values: list[float], lag: int) -> None:
    late = Lagged(lag)
    seen = [late.push(torch.tensor(value), position) for position, value in enumerate(values)]
    assert seen[:lag] == [None] * min(lag, len(values))
    found = [each for each in seen[lag:] if each is not None]
    assert len(found) == max(len(values) - lag, 0), "each value is read exactly `lag` batches late"
    assert found + late.flush() == list(enumerate(values))
    assert late.flush() == []


def test_reading_is_told_while_numbers_are_read() -> None:
    assert not reading()
    Reading([torch.tensor(1.0)]).numbers()
    assert not reading()


# --- series


def on_device(series: Series) -> int:
    values: list[Any] = series._values  # pyright: ignore[reportPrivateUsage]  # only there it shows
    return sum(isinstance(value, torch.Tensor) for value in values)


def late_series(count: int) -> Series:
    series = Series("s", late=True)
    for step in range(count):
        series.push(torch.tensor(float(step)), step)
    return series


@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_a_series_keeps_at_most_a_chunk_on_the_device(count: int) -> None:
    series = late_series(count)
    assert on_device(series) == count % CHUNK
    assert len(series) == count
    assert list(series) == [(step, float(step)) for step in range(count)]
    assert on_device(series) == 0


def test_the_newest_value_is_given_without_waiting() -> None:
    series = late_series(3)
    newest = series.newest()
    assert isinstance(newest, torch.Tensor)
    assert newest.item() == 2
    assert series.last() == (2, 2.0)
    assert series.newest() == 2.0
    assert type(series.newest()) is float
    assert on_device(series) == 2, "later values are still on the device"
    full = late_series(CHUNK)
    assert full.newest() == CHUNK - 1


@settings(max_examples=examples(30))
@given(st.integers(0, CHUNK + 40), st.integers(0, CHUNK + 40))
def test_what_is_taken_back_is_gone_and_the_rest_is_whole(count: int, cut: int) -> None:
    series = late_series(count)
    series.__rewind__(min(cut, count))
    series.push(torch.tensor(-1.0), count)
    assert list(series) == [*((step, float(step)) for step in range(min(cut, count))), (count, -1.0)]


READS: dict[str, Callable[[Series], Any]] = {
    "last": lambda series: series.last()[1],
    "an item": lambda series: series[-1][1],
    "values": lambda series: series.values[-1],
    "newest": lambda series: series.newest(),
    "since": lambda series: series.since(-1)[0],
}


@pytest.mark.parametrize("other", READS)
@pytest.mark.parametrize("first", [name for name in READS if name != "newest"])
def test_a_thread_that_reads_while_another_one_waits_for_the_value_gets_the_number(
    first: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lane reads a series while the training thread does: it must not see the place from which a tensor has gone."""
    waits, reads = threading.Event(), threading.Event()
    numbers = Reading.numbers

    def late(of: Reading) -> list[Any]:
        """Read the numbers after the other thread has begun to read, too."""
        waits.set()
        reads.wait(0.2)
        return numbers(of)

    series = late_series(1)
    monkeypatch.setattr(Reading, "numbers", late)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(READS[first](series)))
    thread.start()
    assert waits.wait(10)
    mine = READS[other](series)
    reads.set()
    thread.join()
    number = series.last()[1]
    assert type(number) is float
    assert found == [number]
    assert mine == number


def test_copies_and_twins_of_a_series_in_between() -> None:
    series = late_series(CHUNK + 2)
    twin = readonly(series, "s")
    for other in (copy.deepcopy(series), pickle.loads(pickle.dumps(series)), twin):
        assert list(other) == [(step, float(step)) for step in range(CHUNK + 2)]
    series.push(torch.tensor(0.25), 99)
    assert twin.last() == (99, 0.25)


def test_series_by_name_are_late_too() -> None:
    metrics = SeriesMap("m", late=True)
    metrics.push("Loss", torch.tensor(1.0), 1)
    assert isinstance(metrics["Loss"].newest(), torch.Tensor)
    assert metrics["Loss"].last() == (1, 1.0)


def test_numbers_and_larger_tensors_are_kept_as_ever() -> None:
    series = Series("s", late=True)
    values: list[Any] = [1.5, torch.zeros(2), None, torch.tensor(2.0)]
    for step, value in enumerate(values):
        series.push(value, step)
    assert series.since(0)[0] == 1.5
    assert series.since(0)[1].tolist() == [0, 0]
    assert series.since(0)[2:] == [None, 2.0]


# --- the whole loop


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loop_that_reads_late_comes_to_the_same_under_every_executor(accumulate: int) -> None:
    """Rule 13: the result is the serial result, also where values are read late."""

    def make(executor: Any) -> Any:
        core = TorchCore("cpu", lag=2, accumulate=accumulate)
        return tiny_learner(SmoothLoss(), Metrics(mean_squared_error), executor=executor, core=core, n_batches=7)

    assert_equivalent(make, executors=["dask"], interleavings=3)


def test_what_is_recorded_does_not_depend_on_the_lag() -> None:
    found = []
    for lag in (0, 1, 2, 300):
        learner = tiny_learner(Metrics(mean_squared_error), core=TorchCore("cpu", lag=lag), n_batches=CHUNK + 20)
        learner.fit(1)
        recorded = learner.cbstate.metrics_step[TrainingPhase]
        found.append({name: list(series) for name, series in recorded.items()})
    assert all(each == found[0] for each in found[1:])


def test_each_of_two_watchers_is_told_until_its_own_block_ends() -> None:
    """Fits with timelines may overlap in two threads, and need not end in the order of their beginnings."""
    told: dict[str, list[tuple[int, int]]] = {"first": [], "second": []}
    first = watched_waits(lambda begin, end: told["first"].append((begin, end)))
    second = watched_waits(lambda begin, end: told["second"].append((begin, end)))
    first.__enter__()
    Reading([torch.tensor(1.0)]).numbers()
    second.__enter__()
    Reading([torch.tensor(2.0)]).numbers()
    first.__exit__(None, None, None)
    Reading([torch.tensor(3.0)]).numbers()
    second.__exit__(None, None, None)
    Reading([torch.tensor(4.0)]).numbers()
    assert [len(each) for each in told.values()] == [2, 2]
    assert told["first"][1] == told["second"][0]
    assert all(0 < begin <= end for each in told.values() for begin, end in each)
