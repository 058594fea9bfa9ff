"""The parts of a checkpoint that differ between ranks: large tensors that are equal on all ranks are held once."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from flowtrain import CheckpointError
from flowtrain.training.checkpoint.rank_parts import check_size, digests, part_of, parts_in, reduced


def contents_of(rank: int) -> dict[str, Any]:
    """Return the contents of a checkpoint as a rank would write them; the averages are equal on all ranks."""
    averages = {"weight": torch.arange(2000.0), "noise": torch.full((2000,), float(rank)), "bias": torch.zeros(3)}
    return {
        "model": {"": {"weight": torch.ones(2000)}},
        "random": {"torch": torch.full((1500,), rank, dtype=torch.uint8)},
        "loaders": [{"taken": rank}, (torch.arange(1024) + rank,)],
        "position": {"phase": "", "stream": None},
        "numbers": {"TrainingPhase": 1},
        "passes": {},
        "cbstate": {"seen": [rank]},
        "callbacks": {"EMA": {"state": {"averages": averages}}},
        "group": {},
        "run": {"id": "a", "positions": {"log-{rank}.jsonl": 10 + rank}},
    }


def written(size: int) -> dict[str, Any]:
    """Return the contents that the main rank writes for a number of ranks."""
    main = contents_of(0)
    return {**main, "ranks": [reduced(contents_of(rank), digests(main)) for rank in range(1, size)]}


def test_each_rank_reads_what_it_has_written() -> None:
    contents = written(3)
    assert parts_in(contents) == 3
    for rank in range(3):
        found, wanted = part_of(contents, rank, 3), contents_of(rank)
        assert {name: str(each) for name, each in found.items() if name != "ranks"} == {
            name: str(each) for name, each in wanted.items()
        }
        assert found["callbacks"]["EMA"]["state"]["averages"]["noise"].unique().tolist() == [rank]


def test_a_large_tensor_that_is_equal_on_the_main_rank_is_held_once() -> None:
    [part] = written(2)["ranks"]
    assert "model" not in part, "the main rank holds it for all"
    averages = part["callbacks"]["EMA"]["state"]["averages"]
    assert not isinstance(averages["weight"], torch.Tensor)
    assert averages["noise"].tolist() == [1.0] * 2000
    assert isinstance(averages["bias"], torch.Tensor), "it is too small to be worth a comparison"


@pytest.mark.parametrize(
    "other",
    [torch.arange(2000.0).double(), torch.arange(2000.0).reshape(2, 1000), torch.arange(2000.0) + 1],
    ids=["type", "shape", "values"],
)
def test_tensors_that_differ_in_anything_are_both_held(other: torch.Tensor) -> None:
    main, second = contents_of(0), contents_of(1)
    second["callbacks"]["EMA"]["state"]["averages"]["weight"] = other
    held = reduced(second, digests(main))["callbacks"]["EMA"]["state"]["averages"]["weight"]
    assert held is other


def test_another_number_of_ranks_gets_the_part_of_the_main_rank() -> None:
    for size in (1, 3):
        assert part_of(written(2), size - 1, size)["cbstate"] == {"seen": [0]}
    folders = {**written(2), "run": {**contents_of(0)["run"], "folder": "runs/a"}}
    for rank, positions in enumerate([{"log-{rank}.jsonl": 10}, {"log-{rank}.jsonl": 11}, {}]):
        assert part_of(folders, rank, 3)["run"] == {"id": "a", "positions": positions, "folder": "runs/a"}
    assert parts_in(contents_of(0)) == 1


def test_another_number_of_ranks_is_told_and_refused_within_an_epoch() -> None:
    contents = written(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_size(contents, 2, stacklevel=1)
        assert not check_size(contents, 3, stacklevel=None)
    with pytest.warns(UserWarning, match="^The checkpoint was written by 2 ranks, and this training has one process"):
        assert not check_size(contents, 1, stacklevel=1)
    for within in ({"phase": "TrainingPhase", "stream": None}, {"phase": "", "stream": {"taken": 3}}):
        contents["position"] = within
        assert check_size(contents, 2, stacklevel=1)
        with pytest.raises(CheckpointError) as caught:
            check_size(contents, 3, stacklevel=1)
        assert str(caught.value) == (
            "The checkpoint was taken within an epoch by 2 ranks, and this training has 3 ranks: which samples were "
            "used is only known for 2 ranks. Resume with as many, or from a checkpoint of the end of an epoch; or take "
            "the weights alone, learner.load(path), and train anew. Nothing has been changed."
        )
