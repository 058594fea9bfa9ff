"""The values of an epoch of several ranks are those of one process that has the batches of all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import (
    BatchBegin,
    Callback,
    CancelBatchException,
    Learner,
    LearnerView,
    LossBegin,
    MissingStateError,
    Phase,
    Read,
    ValidationPhase,
    Write,
)
from flowtrain.callbacks import CustomCallback, Metric, Metrics, Track
from flowtrain.errors import RankError
from flowtrain.metrics import accuracy
from flowtrain.metrics.means import exact_parts
from tests.support.examples import examples
from tests.support.merged import ranked

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing torchmetrics warns about what it finds installed
    import torchmetrics
    from torchmetrics import classification, regression, wrappers

Pair = tuple[torch.Tensor, torch.Tensor]
CLASSES = 3


def classes(sizes: Sequence[int]) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 4, generator=generator), torch.randint(CLASSES, (n,), generator=generator)) for n in sizes]


def numbers(sizes: Sequence[int]) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(n, 4, generator=generator), torch.randn(n, generator=generator)) for n in sizes]


class Flat(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  # torch's own name
        return super().forward(input).squeeze(1)


def skip(learner: LearnerView) -> None:
    raise CancelBatchException("this rank has no batch")


def nothing(learner: LearnerView) -> None:
    """Let the batch be."""


def evaluator(metrics: Callable[[], Callback], *others: Callback) -> Callable[[list[Pair], Callback], Learner]:
    """Return a function that makes a learner for the evaluation of some batches, each time with the same model."""

    def make(batches: list[Pair], first: Callback) -> Learner:
        torch.manual_seed(0)
        used = batches or classes([1])  # a loader without a batch is refused, so the only batch is cancelled
        real = used[0][1].is_floating_point()
        return Learner(
            Flat(4, 1) if real else torch.nn.Linear(4, CLASSES),
            torch.nn.functional.mse_loss if real else torch.nn.functional.cross_entropy,
            data={ValidationPhase: used},
            optimizer=partial(torch.optim.SGD, lr=0.1),
            callbacks=[first, metrics(), CustomCallback(nothing if batches else skip, BatchBegin), *others],
            default_callbacks="quiet",
        )

    return make


def split(batches: list[Pair], ranks: int) -> list[list[Pair]]:
    """Deal the batches out like cards, so that the first ranks may have one more."""
    return [batches[rank::ranks] for rank in range(ranks)]


def values(learner: Learner, phase: type[Phase] = ValidationPhase) -> dict[str, list[tuple[int, Any]]]:
    return {name: list(series) for name, series in learner.cbstate.metrics_epoch[phase].items()}


def one_process(make: Callable[[list[Pair], Callback], Learner], parts: list[list[Pair]]) -> Learner:
    """Return a learner that has evaluated the batches of all ranks, one rank after another."""
    learner = make([batch for part in parts for batch in part], CustomCallback(nothing, BatchBegin))
    learner.validate()
    return learner


# --- means


def weighted(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.detach().abs().sum()


def by_sign(outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a value whose name depends on the batch, so that ranks have other series."""
    return {"even" if len(targets) % 2 == 0 else "odd": outputs.mean()}


def several_metrics() -> Metrics:
    return Metrics(accuracy, Metric(accuracy, name="Weighted", weight=weighted), Metric(by_sign, name="Sign"))


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("sizes", [[8, 8, 8, 8], [5, 1, 4, 8, 3, 2], [3]])
def test_means_are_bit_for_bit_those_of_one_process(ranks: int, sizes: list[int]) -> None:
    make, parts = evaluator(several_metrics), split(classes(sizes), ranks)
    expected = values(one_process(make, parts))
    for learner in ranked(make, parts, Learner.validate):
        assert str(values(learner)) == str(expected)  # as text, because NaN does not equal itself
    assert {*expected} >= {"Loss", "Accuracy", "Weighted"}


def test_all_ranks_have_their_series_in_the_same_order() -> None:
    parts = [classes([3]), classes([4, 3]), []]  # the first rank has only odd batches, the last one has none
    found = [list(values(each)) for each in ranked(evaluator(several_metrics), parts, Learner.validate)]
    assert found == [["Loss", "Accuracy", "Weighted", "Sign.odd", "Sign.even"]] * 3


def test_values_of_batches_are_those_of_the_rank() -> None:
    parts = split(classes([5, 3, 4]), 2)
    alone = [one_process(evaluator(several_metrics), [part]) for part in parts]
    for single, learner in zip(alone, ranked(evaluator(several_metrics), parts, Learner.validate), strict=True):
        steps = learner.cbstate.metrics_step[ValidationPhase]
        assert {name: list(each) for name, each in steps.items()} == {
            name: list(each) for name, each in single.cbstate.metrics_step[ValidationPhase].items()
        }


finite = st.floats(-1e300, 1e300)


@given(st.lists(st.lists(finite), min_size=1))
@settings(max_examples=examples(300))
def test_the_parts_of_all_ranks_have_the_sum_of_all_numbers(ranks: list[list[float]]) -> None:
    parts = [exact_parts(numbers) for numbers in ranks]
    try:
        whole = math.fsum(number for numbers in ranks for number in numbers)
    except OverflowError:
        return
    assert math.fsum(part for each in parts for part in each) == whole


@pytest.mark.parametrize(
    ("given", "expected"),
    [([], []), ([0.0, -0.0], []), ([1e300, 1e300, 1e308, 1e308], [math.inf]), ([math.inf, 1.0], [math.inf])],
)
def test_the_parts_of_special_numbers(given: list[float], expected: list[float]) -> None:
    assert exact_parts(given) == expected


@pytest.mark.parametrize("given", [[math.nan, 1.0], [math.inf, -math.inf]])
def test_the_parts_of_numbers_without_a_sum(given: list[float]) -> None:
    [part] = exact_parts(given)
    assert math.isnan(part)


def test_ten_thousand_batches_are_exchanged_as_a_few_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(10_000, generator=generator, dtype=torch.float64).tolist()
    assert len(exact_parts(numbers)) <= 4


# --- tracked values


def test_a_value_that_only_one_rank_has_tracked() -> None:
    def put(learner: LearnerView) -> None:
        if len(learner.batch.targets) == 5:
            learner.batch.kl = 0.25

    def make(batches: list[Pair], first: Callback) -> Learner:
        writer = CustomCallback(put, LossBegin, access={"batch.targets": Read(), "batch.kl": Write()})
        return evaluator(lambda: Metrics(Track("batch.kl", phase=ValidationPhase)), writer)(batches, first)

    missed: list[bool] = []

    def run(learner: Learner) -> None:
        try:
            learner.validate()
            missed.append(False)
        except MissingStateError:
            missed.append(True)

    for learner in ranked(make, [classes([4]), classes([5, 4])], run):
        assert values(learner)["Kl"] == [(0, 0.25)]
    assert missed == [True, False, False, False]  # the first rank alone misses it, and no rank when they merge
    ranked(make, [classes([4]), classes([4])], run)
    assert missed[4:] == [True] * 4


# --- torchmetrics objects


def f1(**options: Any) -> Any:
    return classification.MulticlassF1Score(CLASSES, **options)


def collection() -> Any:
    parts = [classification.MulticlassPrecision(CLASSES), classification.MulticlassRecall(CLASSES), f1(average=None)]
    return torchmetrics.MetricCollection([*parts, classification.MulticlassAUROC(CLASSES)], prefix="My")


EXACT: list[tuple[Callable[[], Any], Callable[..., list[Pair]]]] = [
    (f1, classes),  # states that are counts
    (partial(f1, average=None), classes),
    (collection, classes),
    (lambda: classification.MulticlassAUROC(CLASSES), classes),  # a state that is a list of all outputs
    (lambda: wrappers.ClasswiseWrapper(f1(average=None), labels=["a", "b", "c"]), classes),
    (lambda: classification.MulticlassAccuracy(CLASSES) + f1(), classes),
    (regression.SpearmanCorrCoef, numbers),
]
"""Metrics whose merged state is that of one process, bit for bit."""

ROUNDED: list[tuple[Callable[[], Any], Callable[..., list[Pair]]]] = [
    (regression.MeanSquaredError, numbers),
    (regression.R2Score, numbers),
    (regression.PearsonCorrCoef, numbers),  # its states have no reduction: `compute` takes them stacked
    (lambda: wrappers.MinMaxMetric(regression.MeanAbsoluteError()), numbers),
]
"""Metrics with states of floating point numbers: their sums are rounded in another order."""

PARTS = [[[8, 5], [4, 3]], [[5, 1, 4], [8], [3, 2]], [[], [4, 7], [6]], [[6], [], [], [2]]]


def merged(make: Callable[[], Any], parts: list[list[Pair]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    make_learner = evaluator(lambda: Metrics(make()))
    return values(one_process(make_learner, parts)), [
        values(each) for each in ranked(make_learner, parts, Learner.validate)
    ]


def dealt(data: Callable[..., list[Pair]], sizes: list[list[int]]) -> list[list[Pair]]:
    batches = iter(data([size for each in sizes for size in each]))
    return [[next(batches) for _ in each] for each in sizes]


@pytest.mark.cpu_only("the expected value is computed on the CPU")
@pytest.mark.parametrize(("make", "data"), EXACT)
@pytest.mark.parametrize("sizes", PARTS)
@pytest.mark.filterwarnings("ignore:No .* samples in targets", "ignore:Metric `SpearmanCorrcoef` will save all")
def test_torchmetrics_objects_have_the_value_of_one_process(
    make: Callable[[], Any], data: Callable[..., list[Pair]], sizes: list[list[int]]
) -> None:
    expected, found = merged(make, dealt(data, sizes))
    assert all(each == expected for each in found)
    assert len(expected) > 1


@pytest.mark.cpu_only("the expected value is computed on the CPU")
@pytest.mark.parametrize(("make", "data"), ROUNDED)
@pytest.mark.parametrize("sizes", PARTS)
def test_torchmetrics_objects_with_sums_of_floating_point_numbers(
    make: Callable[[], Any], data: Callable[..., list[Pair]], sizes: list[list[int]]
) -> None:
    expected, found = merged(make, dealt(data, sizes))
    assert all(each == found[0] for each in found)  # all ranks have the same bits
    assert expected.keys() == found[0].keys()
    for name, [(step, value)] in expected.items():
        # A few additions in single precision, in another order.
        assert found[0][name] == [(step, pytest.approx(value, rel=2e-6))]


def refuse(*args: object, **options: object) -> None:
    raise AssertionError("torchmetrics has started a collective")


def test_torchmetrics_starts_no_collective() -> None:
    options: dict[str, Any] = {"dist_sync_fn": refuse, "distributed_available_fn": lambda: True}
    by_itself = f1(**options)
    by_itself.update(torch.eye(3), torch.tensor([0, 1, 2]))
    with pytest.raises(AssertionError, match=r"^torchmetrics has started a collective$"):
        by_itself.compute()
    both = torchmetrics.MetricCollection([f1(**options), classification.MulticlassAUROC(CLASSES, **options)])
    metrics = [both, wrappers.MinMaxMetric(f1(**options)), Metric(f1(**options), name="Each", on_step=True)]
    learner = one_process(evaluator(lambda: Metrics(*metrics)), [classes([4, 3])])
    assert {*values(learner)} >= {"MulticlassF1Score", "MinMaxMetric.raw", "Each"}


# --- accumulators of a user


class Own:
    """An accumulator of a user that is no torchmetrics object."""

    def __init__(self) -> None:
        self.seen = 0

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.seen += len(targets)

    def compute(self) -> int:
        return self.seen

    def reset(self) -> None:
        self.seen = 0


class Merging(Own):
    """The same with the two methods that ranks need."""

    def rank_state(self) -> int:
        return self.seen

    def merge_ranks(self, states: Sequence[int]) -> None:
        self.seen = sum(states)


def test_an_accumulator_that_says_how_it_is_merged() -> None:
    expected, found = merged(lambda: Metric(Merging(), name="Seen"), dealt(classes, [[5, 1], [], [4]]))
    assert expected["Seen"] == [(0, 10)]
    assert found == [expected] * 3


def test_an_accumulator_that_does_not_say_it() -> None:
    assert Metrics(f1(), Merging()).rank_state() == {"sums": {}, "running": {}}
    with pytest.raises(RankError) as raised:
        Metrics(Metric(Own(), name="Seen")).rank_state()
    assert str(raised.value) == (
        "The metric Seen is a Own, which adds up batches itself, and nothing says how to merge what several ranks have "
        "added up. Give Own two methods: rank_state(self), which returns what this rank has added up, and "
        "merge_ranks(self, states), which replaces it by the merged states of all ranks. Or make it a "
        "torchmetrics.Metric that declares its states: self.add_state('total', torch.tensor(0.0), "
        "dist_reduce_fx='sum')."
    )


class Undeclared(torchmetrics.Metric):
    """A torchmetrics object that keeps a number which it does not declare as a state."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("batches", default=torch.tensor(0), dist_reduce_fx="sum")
        self.samples = 0

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.batches: torch.Tensor = self.batches + 1
        self.samples += len(targets)

    def compute(self) -> float:
        return self.samples / self.batches.item()


def test_a_torchmetrics_object_with_a_state_that_is_not_declared() -> None:
    make = evaluator(lambda: Metrics(Undeclared()))
    with pytest.raises(RankError) as raised:
        ranked(make, dealt(classes, [[5], [4, 3], []]), Learner.validate)
    assert str(raised.value) == (
        "The metric Undeclared keeps 'samples' in Undeclared, which is no declared state. It is 5, 7 on the ranks with "
        "batches, and nothing says which value the ranks have together. Declare it with self.add_state('samples', ..., "
        "dist_reduce_fx='sum'), or give the object two methods, rank_state(self) and merge_ranks(self, states)."
    )
