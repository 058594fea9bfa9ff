"""What ranks compare of their batches: fingerprints, lengths, and which batch is the last one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from flowtrain import RankError
from flowtrain.data.rank_batches import EpochLength, agreed_length, check_ends, fingerprint

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
