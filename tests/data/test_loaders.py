"""`CombinedLoader`: one batch of each loader in every step, also in a fit that resumes in the middle of an epoch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from flowtrain import (
    BatchEnd,
    Callback,
    DataError,
    Learner,
    LearnerView,
    Phase,
    Read,
    StepContext,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import SanityCheck
from flowtrain.data import CombinedLoader
from flowtrain.data.loaders import length
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.untyped import untyped


class Endless(IterableDataset[int]):
    """A dataset whose length nobody knows."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


# --- one pass


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [(1, "x"), (2, "y")]),
        ("max_size_cycle", [(1, "x"), (2, "y"), (3, "x"), (4, "y"), (5, "x")]),
    ],
)
def test_batches_of_two_loaders(mode: Any, expected: list[Any]) -> None:
    numbers, letters = [1, 2, 3, 4, 5], ["x", "y"]
    both = CombinedLoader((numbers, letters), mode)
    assert list(both) == list(both) == expected
    assert len(both) == len(expected)
    swapped = CombinedLoader({"letters": letters, "numbers": numbers}, mode)
    assert [(raw["numbers"], raw["letters"]) for raw in swapped] == expected
    assert list(next(iter(swapped))) == ["letters", "numbers"]


def test_three_loaders_end_with_the_longest_one() -> None:
    three = CombinedLoader([[1], [1, 2, 3], [1, 2]], "max_size_cycle")
    assert list(three) == [(1, 1, 1), (1, 2, 2), (1, 3, 1)]
    assert list(CombinedLoader([[1, 2]])) == [(1,), (2,)]


def test_loaders_of_one_length_begin_once() -> None:
    """A loader must not be begun again only to find that the epoch is over: that would start its workers in vain."""

    class Counted(list[int]):
        begun = 0

        def __iter__(self) -> Iterator[int]:
            self.begun += 1
            return super().__iter__()

    loaders = Counted([1, 2]), Counted([1, 2]), Counted([1])
    assert len(list(CombinedLoader(loaders, "max_size_cycle"))) == 2
    assert [each.begun for each in loaders] == [1, 1, 2]


def test_a_length_that_is_not_known() -> None:
    unknown: DataLoader[int] = DataLoader(Endless(), batch_size=None)
    for mode, batches in (("min_size", 3), ("max_size_cycle", 5)):
        both = CombinedLoader({"a": [1, 2, 3], "b": unknown}, untyped(mode))
        with pytest.raises(TypeError, match=r"the length of 'b' is not known\. Iterate it without len\(\)"):
            len(both)
        assert length(both) is None
        assert len(list(both)) == batches


def test_a_loader_that_is_begun_again_is_shuffled_anew() -> None:
    short: DataLoader[int] = DataLoader(untyped(list(range(20))), batch_size=None, shuffle=True)
    torch.manual_seed(0)
    given = [raw[0] for raw in CombinedLoader((short, range(60)), "max_size_cycle")]
    orders = given[:20], given[20:40], given[40:]
    assert [sorted(order) for order in orders] == [list(range(20))] * 3
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_the_order_does_not_depend_on_the_numbers_that_are_drawn_meanwhile() -> None:
    def given(draws: int) -> list[int]:
        torch.manual_seed(0)
        short: DataLoader[int] = DataLoader(untyped(list(range(5))), batch_size=None, shuffle=True)
        found: list[int] = []
        for number, _ in CombinedLoader((short, range(20)), "max_size_cycle"):
            found.append(number)
            before = torch.rand(draws), random.random()
            del before
        return found

    assert given(0) == given(3)


def test_beginning_again_draws_nothing_from_training() -> None:
    torch.manual_seed(0)
    for _ in CombinedLoader((DataLoader(untyped(list(range(5))), shuffle=True), range(20)), "max_size_cycle"):
        pass
    cycled = torch.rand(1)
    torch.manual_seed(0)
    for _ in CombinedLoader((DataLoader(untyped(list(range(20))), shuffle=True), range(20)), "max_size_cycle"):
        pass
    assert torch.equal(torch.rand(1), cycled)


# --- bad input


@pytest.mark.parametrize(
    ("loaders", "message"),
    [
        ({}, "CombinedLoader has no loader. Pass a mapping of names to loaders, or a tuple of them."),
        (
            {"a": [1], "b": []},
            "The loader 'b' of CombinedLoader (list) gives no batch. Is the dataset empty, or smaller than one batch "
            "with drop_last=True?",
        ),
        (
            {"a": [1], "b": TensorDataset(torch.ones(2))},
            "The loader 'b' of CombinedLoader is a TensorDataset, a dataset of single samples. Make batches of it: "
            "DataLoader(dataset, batch_size=32).",
        ),
        (
            ([1], 5),
            "The loader 1 of CombinedLoader is int 5, not a loader of batches. Pass data=(train_loader, valid_loader), "
            "or data={TrainingPhase: a, ValidationPhase: b}.",
        ),
        (([1], torch.ones(2)), "The loader 1 of CombinedLoader is Tensor of shape (2,), float32, not a loader of"),
    ],
)
def test_loaders_that_are_refused(loaders: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        CombinedLoader(loaders)
    assert str(caught.value).startswith(message)


def test_arguments_that_are_refused() -> None:
    with pytest.raises(UsageError, match=r'mode=\'max_size\'\): mode is "min_size", which ends an epoch with the sho'):
        CombinedLoader([[1]], mode=untyped("max_size"))
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.ones(2)))
    with pytest.raises(UsageError, match=r"takes several loaders: a mapping, such as .*, or a tuple \(one, other\)\."):
        CombinedLoader(untyped(loader))


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_an_iterator_serves_one_epoch(mode: Any) -> None:
    both = CombinedLoader({"a": [1, 2], "b": iter("xy")}, mode)
    assert [raw["b"] for raw in both] == ["x", "y"]
    with pytest.raises(DataError) as caught:
        list(both)
    assert str(caught.value) == (
        "The loader 'b' of CombinedLoader (str_ascii_iterator) gives no batch. It is an iterator, used up after one "
        "pass: pass a list, a DataLoader, or another iterable."
    )


def test_an_iterator_that_ends_cannot_be_begun_again() -> None:
    both = CombinedLoader({"a": [1, 2, 3], "b": iter([1, 2])}, "max_size_cycle")
    with pytest.raises(DataError) as caught:
        list(both)
    assert str(caught.value) == (
        "The loader 'b' of CombinedLoader (list_iterator) has ended before the longest one, and it is an iterator, "
        'which cannot be begun again. Pass a list or a DataLoader, or mode="min_size".'
    )


def test_loaders_that_are_not_combined_are_refused_with_the_way_to_do_it() -> None:
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.ones(2)))
    with pytest.raises(DataError, match=r"For a batch of each in every step pass CombinedLoader\("):
        tiny_learner(data={TrainingPhase: {"a": loader, "b": loader}})


# --- in training


class BothPhase(TrainingPhase):
    """Train on the samples of two loaders."""

    def step(self, learner: StepContext, raw: Any) -> None:
        (few,), (many,) = raw["few"], raw["many"]
        with learner.run_batch(self, few=few, many=many) as batch:
            with learner.forward():
                batch.outputs = learner.model(torch.cat([batch.few, batch.many]))
                batch.loss = batch.outputs.square().mean()
            learner.backward(self, batch.loss)
            learner.update(self)


class Noted(Callback):
    """Keep the samples of each batch, and ask for a checkpoint after each."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.given: list[tuple[list[float], list[float]]] = []

    def state_access(self) -> Any:
        return {"batch.few": Read(), "batch.many": Read()}

    @on(BatchEnd, BothPhase)
    def note(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        batch = learner.batch
        self.given.append((batch.few.flatten().tolist(), batch.many.flatten().tolist()))
        if self.folder is not None:
            learner.request_checkpoint(self.folder / f"{len(self.given)}.ckpt")


def shuffled(samples: int, workers: int, generator: bool) -> DataLoader[Any]:
    own = torch.Generator().manual_seed(samples) if generator else None
    data = TensorDataset(torch.arange(float(samples)).unsqueeze(1))
    return DataLoader(data, batch_size=2, shuffle=True, num_workers=workers, generator=own)


def both_learner(noted: Noted, workers: int, generator: bool, mode: Any, seed: int) -> Learner:
    torch.manual_seed(seed)
    loaders = {"few": shuffled(6, workers, generator), "many": shuffled(16, workers, generator)}
    model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))  # dropout draws between two batches
    return Learner(
        model,
        nn.functional.mse_loss,
        data={BothPhase: CombinedLoader(loaders, mode)},
        optimizer=partial(torch.optim.SGD, lr=1e-4),
        callbacks=[noted],
        default_callbacks="quiet",
    )


@pytest.mark.parametrize(
    ("workers", "mode", "generator"),
    [
        (0, "min_size", False),
        (0, "min_size", True),
        (0, "max_size_cycle", False),
        pytest.param(
            0,
            "max_size_cycle",
            True,
            marks=pytest.mark.cpu_only("docs/checkpoints.md: with prefetch, numbers drawn within an epoch differ"),
        ),
        (2, "max_size_cycle", False),
        (2, "max_size_cycle", True),
    ],
)
def test_a_fit_resumes_with_the_batches_of_all_loaders(
    tmp_path: Path, workers: int, mode: Any, generator: bool
) -> None:
    whole = Noted(tmp_path)
    learner = both_learner(whole, workers, generator, mode, seed=0)
    learner.fit(2)
    an_epoch = 8 if mode == "max_size_cycle" else 3
    assert len(whole.given) == 2 * an_epoch
    # Before the shorter loader begins again, right at that place, after it, and in the second epoch.
    places = [1, 2] if mode == "min_size" else [2, 3, 7, 12] if not workers else [5, 12]
    for place in places:
        rest = Noted()
        resumed = both_learner(rest, workers, generator, mode, seed=place)
        resumed.fit(2, resume=tmp_path / f"{place}.ckpt")
        assert rest.given == whole.given[place:]
        for name, tensor in resumed.model.state_dict().items():
            assert torch.equal(tensor, learner.model.state_dict()[name])


@pytest.mark.parametrize("place", [4, 9, 11])
def test_a_fit_by_steps_resumes_with_the_batches_of_all_loaders(tmp_path: Path, place: int) -> None:
    whole, rest = Noted(tmp_path), Noted()
    both_learner(whole, 0, False, "max_size_cycle", seed=0).fit(steps=14, validate_every=5)
    resumed = both_learner(rest, 0, False, "max_size_cycle", seed=place)
    resumed.fit(steps=14, validate_every=5, resume=tmp_path / f"{place}.ckpt")
    assert (len(whole.given), rest.given) == (14, whole.given[place:])


def test_loaders_that_keep_their_position_are_told_it() -> None:
    class Keeps(list[int]):
        start = 0

        def state_dict(self) -> dict[str, int]:
            return {"start": self.start}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.start = state["start"]

    loader = Keeps([1, 2])
    both = CombinedLoader({"a": loader, "b": [1]})
    loader.start = 5
    state = both.state_dict()
    assert state == {"loaders": [{"start": 5}, None]}
    loader.start = 8
    both.load_state_dict(state)
    assert loader.start == 5


def test_samplers_of_all_loaders_are_told_the_epoch() -> None:
    class Told(list[Any]):
        epochs: tuple[int, ...] = ()

        def set_epoch(self, number: int) -> None:
            self.epochs += (number,)

    loaders = Told(tiny_batches(n_batches=1)), Told(tiny_batches(n_batches=1))

    class First(TrainingPhase):
        def split(self, raw: Any) -> Any:
            return raw[0]

    tiny_learner(data={First: CombinedLoader(loaders)}).fit(2)
    assert [each.epochs for each in loaders] == [(0, 1), (0, 1)]


def test_the_mean_of_an_epoch_weighs_by_the_labelled_samples() -> None:
    """The other loader's samples have no targets, so their number is no weight."""

    class Labelled(ValidationPhase):
        def split(self, raw: Any) -> Any:
            (inputs, targets), (more,) = raw
            return {"labelled": inputs, "unlabelled": more}, targets

        def call_model(self, model: Any, inputs: Any) -> Any:
            return model(inputs["labelled"])

    sizes = 2, 6
    labelled = [(torch.zeros(size, 1), torch.full((size, 1), float(size))) for size in sizes]
    unlabelled: Iterable[Any] = [(torch.zeros(7, 1),), (torch.zeros(3, 1),)]
    learner = tiny_learner(data={Labelled: CombinedLoader((labelled, unlabelled))})
    learner.validate()
    expected = (2 * 4.0 + 6 * 36.0) / 8
    assert learner.cbstate.metrics_epoch[Labelled]["Loss"].last()[1] == pytest.approx(expected)


@pytest.mark.parametrize("named", [True, False])
def test_checks_and_dry_runs_take_a_batch_aside(named: bool) -> None:
    class Sum(TrainingPhase):
        def split(self, raw: Any) -> Any:
            (x, _), (y,) = raw.values() if named else raw
            return x, y

    first = DataLoader(TensorDataset(torch.ones(6, 1), torch.ones(6, 1)), batch_size=2, shuffle=True)
    loaders = first, [(torch.ones(2, 1),)]
    both = CombinedLoader(dict(zip("ab", loaders, strict=True)) if named else loaders)
    check = SanityCheck()
    learner = tiny_learner(check, data={Sum: both})
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    learner.dry_run()
    assert torch.equal(torch.rand(1), expected)
    learner.fit(1)
    assert check.skipped == []
