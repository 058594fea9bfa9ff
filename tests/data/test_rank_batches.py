"""What ranks compare of their batches: fingerprints, lengths, and which batch is the last one."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from flowtrain import DataError, RankError
from flowtrain.core.prefetch import ahead
from flowtrain.data.rank_batches import EpochLength, RankBatches, agreed_length, check_ends, fingerprint

DATA = "The data for TrainingPhase()"


class Pair(NamedTuple):
    """Two parts of a batch."""

    x: Any
    y: Any


@dataclass
class Sample:
    """A sample of a user."""

    x: Any
    name: str = "a"


class Unknown:
    """An object that no walk looks into."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Unpicklable:
    """An object that cannot be compared."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


# --- fingerprints

MAKERS: list[Callable[[float], Any]] = [
    lambda x: torch.tensor([1.0, x]),
    lambda x: torch.tensor([1.0, x], dtype=torch.bfloat16),
    lambda x: torch.tensor([1.0, x], dtype=torch.complex64).conj(),
    lambda x: torch.tensor([[1, int(x)], [3, 4]], dtype=torch.uint8).t(),
    lambda x: torch.tensor([True, False, x == 2]),
    lambda x: torch.tensor([[0.0, x], [1.0, 0.0]]).to_sparse(),
    lambda x: torch.tensor([[0.0, x], [1.0, 0.0]]).to_sparse_csr(),
    lambda x: pack_sequence([torch.tensor([1.0, x])]),
    lambda x: torch.tensor([1.0, x], requires_grad=True),
    lambda x: torch.tensor([1.0, x]).numpy(),
    lambda x: [{"a": (torch.tensor([1.0, x]), None)}],
    lambda x: OrderedDict(a=Sample(torch.tensor([1.0, 2.0]), f"number {x}")),
    lambda x: Pair(torch.ones(2), [f"text {x}"]),
    lambda x: Unknown(x),
    lambda x: [Unknown(torch.tensor([1.0, x]))],
    lambda x: torch.tensor([[0.0, 2.0], [1.0, 0.0]] if x == 2 else [[2.0, 0.0], [1.0, 0.0]]).to_sparse(),
    lambda x: [torch.zeros(2), torch.tensor([1.0, 2.0]), int(x)],
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("make", MAKERS, ids=map(str, range(len(MAKERS))))
def test_equal_content_has_equal_fingerprints(make: Callable[[float], Any]) -> None:
    assert fingerprint(make(2)) == fingerprint(make(2)) != fingerprint(make(3))
    assert len(fingerprint(make(2))) == 32


def test_the_shape_the_type_and_the_place_count() -> None:
    one = torch.tensor([[1.0, 2.0]])
    different = [one, one.flatten(), one.double(), one.numpy(), [one], {"x": one}, {"y": one}, one.view(torch.int32)]
    assert len({fingerprint(each) for each in different}) == len(different)


@pytest.mark.parametrize(
    "batch",
    [
        7, 2.5, None, True, "", b"", [], {}, (None, 3), torch.zeros(3), torch.ones(2, 2), torch.tensor(4.0),
        torch.zeros(0, 5), torch.zeros(2).numpy(), torch.zeros(0).numpy(), torch.zeros(2, 2).to_sparse(), Unpicklable(),
    ],
)  # fmt: skip
def test_a_batch_without_data_says_nothing(batch: Any) -> None:
    assert fingerprint(batch) == fingerprint([batch, None]) == ""


# --- lengths


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([4, 4, 4], EpochLength(4, True)),
        ([None, None], EpochLength(None, False)),
        ([None, 5, 5], EpochLength(5, False)),
        (
            [7, 5, 9],
            EpochLength(
                5,
                True,
                f"{DATA} has 5 batches on rank 1, and 9 on rank 2: every epoch ends after 5 on all ranks "
                f'(uneven="stop").',
            ),
        ),
        (
            [7, None, 5],
            EpochLength(
                5,
                False,
                f"{DATA} has 5 batches on rank 2, and 7 on rank 0: every epoch ends after 5 on all ranks "
                f'(uneven="stop").',
            ),
        ),
    ],
)
def test_the_shortest_loader_ends_the_epoch(lengths: list[int | None], expected: EpochLength) -> None:
    assert agreed_length(lengths, DATA) == expected
    if expected.note:
        with pytest.raises(RankError) as caught:
            agreed_length(lengths, DATA, "error")
        assert str(caught.value) == (
            f'{expected.note.partition(":")[0]}, which TorchCore(uneven="error") refuses. Give each rank equally many, '
            f'as a DistributedSampler does; or write uneven="stop": then every epoch ends after {expected.most} '
            f"batches."
        )
    else:
        assert agreed_length(lengths, DATA, "error") == expected


def test_different_ends_without_a_length_are_found_after_the_epoch() -> None:
    check_ends([True, True], 3, DATA)
    check_ends([False, False], 3, DATA)  # a fit by steps has ended the epoch
    with pytest.raises(RankError) as caught:
        check_ends([False, True, False], 3, DATA)
    assert str(caught.value) == (
        f'{DATA} has 3 batches on rank 1, and more on rank 0, which TorchCore(uneven="error") refuses. Give each rank '
        f'equally many; or write uneven="stop": then every epoch ends with the shortest loader.'
    )


# --- the last batch


class Counting:
    """A loader without a length, which notes how many batches were taken from it."""

    def __init__(self, count: int, failing: bool = False) -> None:
        self.count, self.failing, self.taken = count, failing, 0

    def __iter__(self) -> Iterator[int]:
        for number in range(self.count):
            self.taken = number + 1
            yield number
        if self.failing:
            raise ZeroDivisionError


def test_without_a_length_the_next_batch_is_taken_when_it_is_asked_for() -> None:
    loader = Counting(3)
    batches = RankBatches(loader, None)
    assert loader.taken == 0
    lasts = []
    for number, raw in enumerate(batches, 1):
        assert (raw, loader.taken) == (number - 1, number)  # not taken earlier
        lasts.append([batches.last(number), batches.last(number)])
        assert loader.taken == min(number + 1, 3)
    assert lasts == [[False] * 2, [False] * 2, [True] * 2]


def test_with_a_length_no_batch_is_taken_early() -> None:
    loader = Counting(5)
    batches = RankBatches(loader, 3)
    taken = [(raw, batches.last(number), loader.taken) for number, raw in enumerate(batches, 1)]
    assert taken == [(0, False, 1), (1, False, 2), (2, True, 3)]
    assert list(batches) == []


def test_a_loader_that_ends_before_its_length_is_refused() -> None:
    batches = RankBatches(Counting(2), 3)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value) == (
        "The loader has 3 batches by its length, and has given 2. Several ranks need the true length, because they end "
        "an epoch together: correct __len__, or leave it out."
    )


def test_an_exception_of_the_loader_comes_when_its_batch_is_wanted() -> None:
    batches = RankBatches(Counting(2, failing=True), None)
    assert [(next(batches), batches.last(number)) for number in (1, 2)] == [(0, False), (1, False)]
    assert not batches.last(2)
    with pytest.raises(ZeroDivisionError):
        next(batches)


def test_under_prefetch_the_last_batch_is_known_too() -> None:
    """Prefetch takes a batch before it gives the one before, so nothing more is taken for `last`."""
    loader = Counting(3)
    batches, told = RankBatches(loader, None), list[bool]()
    fed = ahead(batches, None, told.append)
    assert [(raw, batches.last(number), loader.taken) for number, raw in enumerate(fed, 1)] == [
        (0, False, 2),
        (1, False, 3),
        (2, True, 3),
    ]
    assert told == [False, False, True]
    failing = RankBatches(Counting(2, failing=True), None)
    fed = ahead(failing, None, told.append)
    assert [(next(fed), failing.last(number)) for number in (1, 2)] == [(0, False), (1, False)]
    with pytest.raises(ZeroDivisionError):
        next(fed)


def test_the_states_are_those_before_the_batch_that_was_taken_early() -> None:
    states = iter(range(10))
    batches = RankBatches(Counting(2), None, lambda: next(states))
    assert batches.before(0) is None
    next(batches)
    assert batches.before(1) is None
    assert not batches.last(1)
    assert batches.before(1) == 1
    next(batches)
    assert batches.before(2) is None
    assert batches.last(2)
    assert batches.before(2) == 2  # the loader may have drawn numbers before it ended


def test_no_batch_is_held_after_it_was_given() -> None:
    made = list[weakref.ref[torch.Tensor]]()

    def make(number: int) -> torch.Tensor:
        batch = torch.tensor(number)
        made.append(weakref.ref(batch))
        return batch

    batches = RankBatches(map(make, range(3)), None)
    gc.disable()
    try:
        for number, _ in enumerate(map(id, batches), 1):
            assert batches.last(number) == (number == 3)
            assert [each() is not None for each in made] == [False] * number + [True] * (number < 3)
    finally:
        gc.enable()
