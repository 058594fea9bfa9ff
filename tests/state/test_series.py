"""Series, and series by name, each with its read-only twin."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowtrain.errors import ProtectedException, UsageError
from flowtrain.state.encoding import Packer
from flowtrain.state.readonly import readonly
from flowtrain.state.series import Series, SeriesMap
from tests.support.untyped import untyped

# --- one series


def test_a_series_gives_values_with_their_steps() -> None:
    series = Series("cbstate.smooth_loss")
    for step, value in enumerate("abc", start=1):
        series.push(value, step * 10)
    assert series.last() == (30, "c")
    assert list(series) == [(10, "a"), (20, "b"), (30, "c")]
    assert len(series) == 3
    assert series.since(1) == ["b", "c"]
    assert series.since(3) == []
    assert repr(series) == "<Series cbstate.smooth_loss: 3 values>"


def test_an_empty_series_has_no_last_value() -> None:
    with pytest.raises(LookupError) as caught:
        Series("cbstate.smooth_loss").last()
    assert str(caught.value) == "cbstate.smooth_loss is empty: nothing has been recorded yet. Test len() first."


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(0.5),
        torch.nn.Parameter(torch.tensor(0.5)),
        torch.tensor([[0.5]]) * torch.nn.Parameter(torch.ones(1)),
    ],
    ids=["tensor", "parameter", "result"],
)
def test_a_tensor_is_recorded_as_the_number_it_is_now(value: torch.Tensor) -> None:
    series = Series("s")
    series.push(value, step=1)
    value.detach().add_(1)
    assert series.last() == (1, 0.5)
    assert type(series.last()[1]) is float


def test_a_larger_tensor_is_copied() -> None:
    value = torch.nn.Parameter(torch.zeros(3))
    series = Series("s")
    series.push(value, step=1)
    value.detach().add_(1)
    found = series.last()[1]
    assert found.tolist() == [0, 0, 0]
    assert not found.requires_grad
    assert next(iter(series))[1] is found


def test_what_is_pushed_while_iterating_comes_with_the_next_iteration() -> None:
    series = Series("s")
    series.push(1, 1)
    seen = []
    for step, value in series:
        series.push(value + 1, step + 1)
        seen.append(value)
    assert seen == [1]
    assert len(series) == 2


@given(st.lists(st.integers(0, 2**63 - 1)), st.data())
def test_a_series_comes_back_to_a_mark(values: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(values)))
    series = Series("s")
    for value in values[:cut]:
        series.push(value, value)
    mark = series.__mark__()
    for value in values[cut:]:
        series.push(value, value)
    series.__rewind__(mark)
    assert list(series) == [(value, value) for value in values[:cut]]


def test_the_twin_of_a_series_is_live_and_refuses_to_push() -> None:
    series = Series("cbstate.smooth_loss")
    twin = readonly(series, "ignored")
    series.push(1.0, 1)
    assert list(twin) == [(1, 1.0)]
    assert twin.last() == (1, 1.0)
    assert isinstance(twin, Series)
    with pytest.raises(ProtectedException, match=r"Write access to Learner\.cbstate\.smooth_loss disallowed"):
        twin.push(2.0, 2)
    assert len(series) == 1


# --- a series as a sequence of pairs


@pytest.fixture(params=["series", "twin", "late"])
def three(request: pytest.FixtureRequest) -> Series:
    series = Series("cbstate.example", late=request.param == "late")
    for step, value in ((1, 0.5), (2, 0.25), (4, 0.125)):
        series.push(torch.tensor(value), step)
    found: Series = readonly(series, "ignored") if request.param == "twin" else series
    return found


def test_arrays_of_a_series_are_its_pairs(three: Series) -> None:
    pairs = [[1, 0.5], [2, 0.25], [4, 0.125]]
    for array in (np.asarray(three), np.array(three), np.array(three, dtype=np.float32)):
        assert array.tolist() == pairs
    assert np.asarray(three).dtype == np.float64
    assert np.array(three, dtype=np.float32).dtype == np.float32
    steps, values = np.asarray(three).T
    assert (steps.tolist(), values.min()) == ([1, 2, 4], 0.125)
    assert torch.as_tensor(three).tolist() == torch.tensor(three).tolist() == pairs
    assert (three.steps, three.values) == ([1, 2, 4], [0.5, 0.25, 0.125])


def test_positions_and_slices_are_those_of_the_list(three: Series) -> None:
    pairs = list(three)
    assert [three[position] for position in range(-3, 3)] == pairs + pairs
    assert (three[1:], three[::2], three[:-1], three[5:]) == (pairs[1:], pairs[::2], pairs[:-1], [])
    assert list(reversed(three)) == pairs[::-1]
    assert (2, 0.25) in three
    for position in (3, -4):
        with pytest.raises(IndexError, match=rf"^cbstate\.example has 3 values, and none at position {position}\.$"):
            _ = three[position]
    with pytest.raises(TypeError, match=r"^cbstate\.example\['Loss'\]: a series is indexed by position, as in \[0\]"):
        _ = three[untyped("Loss")]


def test_an_empty_series_is_an_empty_table() -> None:
    series = Series("s")
    assert np.asarray(series).shape == (0, 2)
    assert torch.as_tensor(series).numel() == 0
    assert (series[:], series.steps, series.values, bool(series)) == ([], [], [], False)
    with pytest.raises(IndexError, match=r"^s has 0 values, and none at position -1\."):
        _ = series[-1]


def test_a_series_of_tensors_is_no_table_of_numbers() -> None:
    series = Series("cbstate.example")
    series.push(torch.zeros(3), 1)
    with pytest.raises(ValueError, match=r"^cbstate\.example holds tensors, so it is no table of numbers\. Use its"):
        np.asarray(series)
    with pytest.raises(ValueError, match="Leave out copy=False"):
        np.array(series, copy=False)


def test_a_copy_grows_for_itself(three: Series) -> None:
    for made in (copy.copy(three), copy.deepcopy(copy.copy(three))):
        made.push(1.0, 5)
        assert (len(made), len(three), made.last()) == (4, 3, (5, 1.0))
        three_again = copy.copy(three)
        assert list(three_again) == list(three)
        assert three_again != three  # compared by identity, as documented
    same = {three: 1}
    assert same[three] == 1


# --- by name


def test_series_by_name() -> None:
    metrics = SeriesMap("cbstate.metrics_step")
    metrics.push("Loss", 0.5, 1)
    metrics.push("Loss", 0.25, 2)
    assert metrics["Loss"].last() == (2, 0.25)
    assert metrics.series("Accuracy") is metrics["Accuracy"]
    assert dict(metrics) == {"Loss": metrics["Loss"], "Accuracy": metrics["Accuracy"]}
    assert repr(metrics) == "<SeriesMap cbstate.metrics_step: Loss, Accuracy>"
    with pytest.raises(KeyError):
        metrics["loss"]


def test_the_twin_of_series_by_name_is_live_and_protected() -> None:
    metrics = SeriesMap("cbstate.metrics_step")
    twin = readonly(metrics, "ignored")
    metrics.push("Loss", 0.5, 1)
    assert list(twin) == ["Loss"]
    assert twin["Loss"].last() == (1, 0.5)
    refusals: list[Callable[[], Any]] = [
        lambda: twin.push("Loss", 1.0, 2),
        lambda: twin["Loss"].push(1.0, 2),
        lambda: next(iter(twin.values())).push(1.0, 2),
        lambda: twin.get("Loss").push(1.0, 2),
        lambda: twin.series("Loss").push(1.0, 2),
    ]
    for refused in refusals:
        with pytest.raises(ProtectedException) as caught:
            refused()
        assert caught.value.path == "cbstate.metrics_step.Loss"
    with pytest.raises(KeyError):
        twin.series("new")
    assert list(metrics) == ["Loss"]
    assert len(metrics["Loss"]) == 1


def test_a_name_that_is_not_there_is_named() -> None:
    series = SeriesMap("cbstate.metrics_epoch")
    series.push("Loss", 1.0, 1)
    for each in (series, readonly(series, "cbstate.metrics_epoch")):
        with pytest.raises(KeyError, match=r"cbstate\.metrics_epoch has no series 'Los'; it has: Loss\. Did you mean"):
            _ = each["Los"]


# --- kept short


@given(st.lists(st.integers()), st.integers(1, 5), st.booleans())
def test_a_series_that_is_kept_short_has_its_newest_values(values: list[int], keep: int, late: bool) -> None:
    series = Series("cbstate.x", late=late)
    twin: Series = readonly(series, "cbstate.x")
    for step, value in enumerate(values):
        series.push(torch.tensor(value % 1000) if late else value, step)
        series.shorten(keep)
    pushed = list(enumerate(value % 1000 if late else value for value in values))
    assert min(keep, len(values)) <= len(series) < 2 * keep
    assert series.dropped + len(series) == twin.dropped + len(twin) == len(values)
    assert list(series) == list(twin) == pushed[series.dropped :]
    for made in (copy.deepcopy(twin), copy.copy(series)):
        assert (type(made), made.dropped, list(made)) == (Series, series.dropped, list(series))
    again = Series("cbstate.x")
    again.__fill__(series.__packed__(Packer(), "cbstate.x"), {})
    assert (again.dropped, list(again)) == (series.dropped, list(series))


def test_a_mark_is_of_all_values_that_were_given() -> None:
    series = pushed(9)
    series.shorten(4)
    mark = series.__mark__()
    for step in range(9, 20):
        series.push(0.5, step)
    series.__rewind__(mark)
    assert (series.steps, series.dropped) == ([5, 6, 7, 8], 5)
    series.__fill__({}, {})
    assert (len(series), series.dropped) == (0, 0)


def test_only_the_writer_keeps_a_series_short(three: Series) -> None:
    with pytest.raises(ProtectedException):
        three.__twin__().shorten(1)


# --- packed for checkpoints


def pushed(count: int, values: Callable[[int], Any] = float) -> Series:
    series = Series("cbstate.x")
    for step in range(count):
        series.push(values(step), step)
    return series


def packed(series: Series) -> tuple[list[int], list[float]]:
    found = series.__packed__(Packer(), "cbstate.x")
    return found["steps"].tolist(), found["values"].tolist()


class Sliced(list[Any]):
    """A list that counts the items that were taken out of it."""

    taken = 0

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        self.taken += len(found) if isinstance(at, slice) else 1
        return found

    def __iter__(self) -> Iterator[Any]:
        self.taken += len(self)
        return super().__iter__()


@pytest.mark.parametrize("before", [10, 1_000, 100_000])
def test_a_checkpoint_converts_what_is_new_however_long_the_series_is(before: int) -> None:
    series = pushed(before)
    packed(series)
    inside = untyped(series)
    inside._steps, inside._values = Sliced(inside._steps), Sliced(inside._values)
    for step in range(7):
        series.push(0.5, before + step)
    packed(series)
    assert (inside._steps.taken, inside._values.taken) == (7, 7)
    packed(series)
    assert (inside._steps.taken, inside._values.taken) == (7, 7)


def test_what_is_packed_stays_as_it_was_while_the_series_changes() -> None:
    """A checkpoint is written while training goes on, and while a run goes back."""
    series = pushed(3)
    first = series.__packed__(Packer(), "")
    for step in range(3, 5000):
        series.push(float(step), step)
        if step % 500 == 0:
            assert packed(series)[1] == [float(each) for each in range(step + 1)]
    last = series.__packed__(Packer(), "")
    series.__rewind__(2)
    series.push(-1.0, 2)
    assert packed(series) == ([0, 1, 2], [0.0, 1.0, -1.0])
    assert first["values"].tolist() == [0.0, 1.0, 2.0]
    assert last["steps"].tolist() == list(range(5000))
    assert last["values"].untyped_storage().nbytes() == 5000 * 8  # torch saves the whole storage of a tensor


def test_whole_numbers_are_packed_as_whole_numbers() -> None:
    series = pushed(3, int)
    found = series.__packed__(Packer(), "")
    assert (found["values"].dtype, found["values"].tolist()) == (torch.int64, [0, 1, 2])
    series.push(2**70, 3)
    assert series.__packed__(Packer(), "")["values"] == [0, 1, 2, 2**70]


@pytest.mark.parametrize("other", [1, True, None, "a", torch.ones(2)])
def test_other_values_are_packed_as_they_are(other: Any) -> None:
    series = pushed(3)
    packed(series)
    series.push(other, 3)
    found: dict[str, Any] = {}
    for _ in range(2):
        found = series.__packed__(Packer(), "")
        assert (found["steps"], found["values"][:3]) == ([0, 1, 2, 3], [0.0, 1.0, 2.0])
        last = found["values"][3]
        assert torch.equal(last, other) if isinstance(other, torch.Tensor) else last == other
    again = Series("cbstate.x")
    again.__fill__(found, {})
    assert len(again) == 4
    assert Series("cbstate.x").__packed__(Packer(), "") == {"steps": [], "values": []}


def test_copies_and_pickles_have_no_packed_memory() -> None:
    series = pushed(1000)
    size = len(pickle.dumps(series))
    packed(series)
    assert len(pickle.dumps(series)) == size
    copied = copy.deepcopy(series)
    copied.push(1.0, 1000)
    assert (len(packed(copied)[0]), len(packed(series)[0])) == (1001, 1000)


@pytest.mark.parametrize("step", [0.5, None, "a", True, -1, np.int64(-1), torch.tensor(1)])
def test_a_step_that_no_checkpoint_can_hold_is_refused_at_once(step: Any) -> None:
    series = SeriesMap("cbstate.tracehistory")
    with pytest.raises(UsageError) as raised:
        series.push("Mine", 1.0, step)
    assert str(raised.value) == (
        f"cbstate.tracehistory.Mine: the step of push() is a whole number, at least 0, got {step!r}."
    )
    series.push("Mine", 1.0, untyped(np.int64(3)))
    assert list(series["Mine"]) == [(3, 1.0)]
    assert type(series["Mine"].steps[0]) is int


@pytest.mark.parametrize("step", [2**63, np.uint64(2**63)])
def test_a_step_of_more_than_64_bits_is_refused_at_once(step: Any) -> None:
    series = Series("cbstate.mine")
    series.push(1.0, 2**63 - 1)
    with pytest.raises(UsageError) as raised:
        series.push(1.0, step)
    assert str(raised.value) == (
        "cbstate.mine: the step of push() has at most 64 bits, got 9223372036854775808. Number the batches."
    )
    assert packed(series) == ([2**63 - 1], [1.0])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(np.float64(0.5), 0.5), (np.float32(0.5), 0.5), (np.int64(3), 3), (np.bool_(1), True), (np.array(0.5), 0.5)],
)
def test_a_number_of_numpy_is_recorded_as_the_number_that_a_checkpoint_gives_back(given: Any, wanted: Any) -> None:
    series = Series("cbstate.x")
    series.push(given, 1)
    found = series.values[0]
    assert (found, type(found)) == (wanted, type(wanted))
    packed = series.__packed__(Packer(), "cbstate.x")
    assert isinstance(packed["steps"], torch.Tensor) == (type(wanted) is not bool)  # as quick as other numbers
