# pyright: reportPrivateUsage=false
# The tests read the private method that finds the direction of a metric.
"""EarlyStopping: when it ends training, what it prints, which state it resumes with, and what it refuses."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection, R2Score
from torchmetrics.classification import MulticlassF1Score

from flowtrain import (
    Access,
    Callback,
    CancelEpochException,
    CancelFittingException,
    EpochBegin,
    EpochEnd,
    Learner,
    LearnerView,
    MissingStateError,
    Phase,
    Read,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import (
    Checkpointer,
    CustomCallback,
    EarlyStopping,
    LearningRate,
    Metric,
    Metrics,
    Recorder,
    Scheduler,
    reduce_on_plateau,
    throttle,
)
from flowtrain.callbacks.stopping import GL, PQ, UP, InvalidValue, Never, NumberLimit, Patience, Threshold
from flowtrain.callbacks.stopping.criterion import Criterion, Warmup
from flowtrain.errors import CallbackError, CheckpointError
from flowtrain.graph.executor import Executor
from flowtrain.metrics import accuracy, mean_absolute_error, mean_squared_error, top_k_accuracy
from flowtrain.testing import assert_equivalent, tiny_batches, tiny_learner
from tests.support.phases import OtherValidation
from tests.support.scores import scored

SCORES = [4.0, 2.0, 3.0, 2.5, 2.0, 5.0, 1.0, 2.0, 3.0, 4.0]


class Good:
    """A metric function that says whether higher values are better, as torchmetrics objects do."""

    def __init__(self, higher_is_better: bool | None) -> None:
        self.higher_is_better = higher_is_better

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).mean()


def learner_with(stopping: EarlyStopping, values: Sequence[float] = SCORES, **options: Any) -> Learner:
    """Return a learner with one validation batch per epoch, so that an epoch's score is one of the values."""
    batches = tiny_batches(n_batches=4)
    return tiny_learner(stopping, scored(*values), data=(batches, batches[:1]), **options)


def epochs_of(learner: Learner, phase: type[Phase] = ValidationPhase) -> int:
    epochs: int = learner.cbstate.history[phase].epochs
    return epochs


def test_it_ends_training_and_says_why() -> None:
    """Best 2 in epoch 2; epochs 3, 4 and 5 are no better."""
    learner = learner_with(EarlyStopping(patience=3, monitor="Score", mode="min"))
    learner.fit(10)
    assert epochs_of(learner) == epochs_of(learner, TrainingPhase) == 5
    assert isinstance(learner.stopped, CancelFittingException)
    assert str(learner.stopped) == (
        "EarlyStopping ends training after epoch 5 of ValidationPhase. Patience(3): no improvement on 2 for 3 epochs. "
        "Score is 2; its best value was 2, in epoch 2."
    )


@pytest.mark.parametrize(
    ("stopping", "epochs"),
    [
        (lambda: EarlyStopping(1, monitor="Score", mode="min"), 3),
        (lambda: EarlyStopping(UP(2), monitor="Score", mode="min"), 9),  # 1, 2, 3
        (lambda: EarlyStopping(GL(99), monitor="Score", mode="min"), 6),  # 100 * (5 - 2) / 2 = 150
        (lambda: EarlyStopping(Threshold(1.5), monitor="Score", mode="min"), 7),
        (
            lambda: EarlyStopping(Threshold(1.5), UP(1), patience=9, monitor="Score", mode="min"),
            3,
        ),  # the criterion that stops first counts
        (lambda: EarlyStopping(2, monitor="Score", mode="max"), 3),  # 4 is the best value, 2 and 3 are worse
        (lambda: EarlyStopping(Threshold(4.5), monitor="Score", mode="max"), 6),
        (lambda: EarlyStopping(Never(), monitor="Score", mode="min"), 10),
    ],
)
def test_every_criterion_is_fed_the_values_of_the_epochs(stopping: Callable[[], EarlyStopping], epochs: int) -> None:
    learner = learner_with(stopping())
    learner.fit(10)
    assert epochs_of(learner) == epochs
    assert (learner.stopped is None) is (epochs == 10)


def test_the_best_value_is_best_in_its_mode_and_no_nan() -> None:
    learner = learner_with(EarlyStopping(1, monitor="Score", mode="max"), [1.0, 3.0, float("nan")])
    learner.fit(5)
    assert str(learner.stopped).endswith(
        "Patience(1): no improvement on 3 for 1 epoch. Score is nan; its best value was 3, in epoch 2."
    )


def test_it_watches_the_validation_loss_unless_told_otherwise() -> None:
    learner = tiny_learner(EarlyStopping(Threshold(0.01)), n_batches=2)
    learner.fit(50)
    losses = [loss for _, loss in learner.cbstate.metrics_epoch[ValidationPhase]["Loss"]]
    assert losses[-1] < 0.01 <= min(losses[:-1])


def test_by_steps_an_epoch_is_validate_every_batches() -> None:
    learner = learner_with(EarlyStopping(3, monitor="Score", mode="min"))
    learner.fit(steps=100, validate_every=3)
    assert learner.cbstate.history[TrainingPhase][:2] == (5, 15)
    assert str(learner.stopped).startswith("EarlyStopping ends training after epoch 5 of ValidationPhase. ")


def test_training_itself_can_be_watched() -> None:
    learner = tiny_learner(EarlyStopping(NumberLimit(2), phase=TrainingPhase))
    learner.fit(5)
    assert epochs_of(learner, TrainingPhase) == 2
    assert epochs_of(learner, ValidationPhase) == 1  # the first epoch already ends the fit


def test_it_has_a_handler_at_epochs_of_the_watched_phase_alone() -> None:
    """Rule 2: at other events it has no handler. Rule 7: it runs after the callback that writes the metric."""
    plan_of = partial(tiny_learner(EarlyStopping(2)).callbacks.plan, EpochEnd)
    labels = [each.label for each in plan_of(ValidationPhase).handlers]
    assert labels == ["Recorder.end_epoch", "Metrics.end", "EarlyStopping.watch"]
    assert "EarlyStopping.watch" not in [each.label for each in plan_of(TrainingPhase).handlers]


def test_strips_of_several_epochs() -> None:
    """A strip is two epochs, so UP(2) sees every second value of SCORES: 2, 2.5, 5, and stops after epoch 6."""
    learner = learner_with(throttle(EarlyStopping(UP(2), monitor="Score", mode="min"), EpochEnd, every=2))
    learner.fit(10)
    assert epochs_of(learner) == 6


def test_criteria_that_need_training_get_its_values() -> None:
    """The same criterion, fed by hand with the recorded values, stops at the same epoch."""
    learner = tiny_learner(EarlyStopping(PQ(alpha=1e-3, k=3)), data=(tiny_batches(), tiny_batches(coeff=2.9)))
    learner.fit(30)
    by_hand = PQ(alpha=1e-3, k=3)
    series = learner.cbstate.metrics_epoch
    rows = zip(series[ValidationPhase]["Loss"], series[TrainingPhase]["Loss"], strict=True)
    answers = [by_hand.update(value, [training]) for (_, value), (_, training) in rows]
    assert answers[-1] is not None
    assert answers[:-1] == [None] * (len(answers) - 1)
    assert answers[-1] in str(learner.stopped)


def test_strips_bring_all_values_of_training_since_the_last_one() -> None:
    criterion = PQ(alpha=1e9, k=4)
    learner = tiny_learner(throttle(EarlyStopping(criterion), EpochEnd, every=2), n_batches=2)
    learner.fit(2)
    assert len(criterion.training) == 2
    learner.fit(2)
    assert criterion.training == [loss for _, loss in learner.cbstate.metrics_epoch[TrainingPhase]["Loss"]]


def test_outside_of_fit_nothing_is_watched() -> None:
    learner = learner_with(EarlyStopping(2, monitor="Score", mode="min"))
    learner.validate()  # the score 4, not watched
    learner.fit(2)  # the scores 2 and 3
    assert learner.stopped is None
    learner.validate()  # the score 2.5, not watched
    learner.fit(1)  # the score 2: the second epoch without improvement
    assert isinstance(learner.stopped, CancelFittingException)
    learner.validate()
    learner.epoch(ValidationPhase)


def test_criteria_go_on_over_fits_and_begin_anew_when_they_have_ended_one() -> None:
    learner = learner_with(EarlyStopping(3, monitor="Score", mode="min"))
    for _ in range(5):
        assert learner.stopped is None
        learner.fit(1)
    assert isinstance(learner.stopped, CancelFittingException)
    learner.fit(10)  # the scores 5, 1, 2, 3, 4
    assert epochs_of(learner) == 10
    assert "no improvement on 1 for 3 epochs" in str(learner.stopped)


def test_a_fit_that_was_ended_by_another_is_gone_on_with() -> None:
    ends = CustomCallback(cancel_fit, EpochEnd, ValidationPhase)
    learner = learner_with(EarlyStopping(3, monitor="Score", mode="min"))
    learner.add_callback(ends)
    learner.fit(10)
    assert str(learner.stopped) == "enough"
    learner.remove_callback(CustomCallback)
    learner.fit(10)
    assert epochs_of(learner) == 5


def cancel_fit(learner: LearnerView) -> None:
    raise CancelFittingException("enough")


def test_an_epoch_without_a_batch_is_not_counted() -> None:
    """Rule 16: a cancelled epoch ends normally; without a completed batch there is no value to compare."""
    empty = iter([False, True, True, False, False, True])

    def cancel(learner: LearnerView) -> None:
        if next(empty, False):
            raise CancelEpochException("no data today")

    learner = learner_with(EarlyStopping(2, monitor="Score", mode="min"))
    learner.add_callback(CustomCallback(cancel, EpochBegin, ValidationPhase))
    learner.fit(20)  # scores: 4, none, none, 2, 3, none, 2.5
    assert epochs_of(learner) == 7


def test_the_state_goes_on_in_another_learner() -> None:
    """Rule 28: ``torch.load(weights_only=True)`` reads the state, and another learner continues with it."""
    whole, first = (
        learner_with(EarlyStopping(3, UP(4), monitor="Score", mode="min")),
        EarlyStopping(3, UP(4), monitor="Score", mode="min"),
    )
    whole.fit(10)
    learner_with(first).fit(3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = EarlyStopping(3, UP(4), monitor="Score", mode="min")
    second.load_state_dict(torch.load(file, weights_only=True))
    rest = learner_with(second, SCORES[3:])
    rest.fit(7)
    assert epochs_of(rest) == epochs_of(whole) - 3 == 2


def checkpointed(folder: Path, *criteria: Criterion) -> Learner:
    return tiny_learner(
        EarlyStopping(*criteria), Checkpointer(folder), data=(tiny_batches(n_batches=4), tiny_batches(2.9, n_batches=1))
    )


def test_a_resumed_run_stops_where_one_without_a_break_does(tmp_path: Path) -> None:
    """Rule 28: resuming does not change the epoch at which training stops."""
    whole = checkpointed(tmp_path / "whole", UP(2), PQ(1e9, k=3))
    whole.fit(30)
    checkpointed(tmp_path / "parts", UP(2), PQ(1e9, k=3)).fit(epochs_of(whole) - 1)
    rest = checkpointed(tmp_path / "parts", UP(2), PQ(1e9, k=3))
    rest.fit(30, resume=tmp_path / "parts")
    assert epochs_of(rest) == epochs_of(whole) < 30
    assert str(rest.stopped) == str(whole.stopped)
    assert torch.equal(rest.model.coeff, whole.model.coeff)


def test_a_run_that_it_has_ended_ends_at_once_when_it_is_resumed(tmp_path: Path) -> None:
    first = checkpointed(tmp_path, UP(2))
    first.fit(30)
    again = checkpointed(tmp_path, UP(2))
    again.fit(30, resume=tmp_path)
    assert epochs_of(again) == epochs_of(first) == 6
    assert str(again.stopped) == str(first.stopped)
    again.fit(2)  # a new fit counts from the beginning
    assert (epochs_of(again), again.stopped) == (8, None)


def test_with_other_criteria_it_goes_on_from_there(tmp_path: Path) -> None:
    """UP(2) stopped the run after the second rise in a row; the resumed run has UP(3), which waits for a third."""
    first = checkpointed(tmp_path, UP(2))
    first.fit(30)
    again = checkpointed(tmp_path, UP(3))
    again.fit(30, resume=tmp_path)
    assert epochs_of(again) == epochs_of(first) + 1
    assert "UP(3): the value became worse 3 times in a row" in str(again.stopped)


def test_the_state_of_other_criteria_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"has the criteria GL, and got the state of Patience, UP\. Go on with"):
        EarlyStopping(GL()).load_state_dict(EarlyStopping(3, UP(4)).state_dict())


def test_a_subclass_is_watched_where_the_data_has_it_in_place_of_the_phase() -> None:
    batches = tiny_batches(n_batches=2)
    learner = tiny_learner(EarlyStopping(NumberLimit(2)), data={TrainingPhase: batches, OtherValidation: batches})
    learner.fit(5)
    assert epochs_of(learner, OtherValidation) == 2
    both = tiny_learner(
        EarlyStopping(NumberLimit(2)), data={TrainingPhase: batches, OtherValidation: batches, ValidationPhase: batches}
    )
    both.fit(5)
    assert (epochs_of(both, OtherValidation), epochs_of(both, ValidationPhase)) == (2, 2)  # one value for each epoch


def test_the_same_under_dask() -> None:
    """Rule 13."""

    def make(executor: Executor) -> Learner:
        criteria = (Patience(2), GL(1), PQ(1e-3, k=2), UP(3), InvalidValue())
        return tiny_learner(EarlyStopping(*criteria), data=(tiny_batches(), tiny_batches(2.9)), executor=executor)

    assert_equivalent(make, executors=["dask"], epochs=20)


def test_the_watched_values_fell_or_the_tests_above_show_nothing() -> None:
    assert [late < early for early, late in pairwise(SCORES)].count(True) == 4


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((), {}, r"^EarlyStopping\(\) has no criterion\. Write EarlyStopping\(patience=5\) or"),
        ((0,), {}, r"^Patience\(\): n is a whole number, at least 1, got 0\."),
        ((2.5,), {}, r"^2\.5 is no criterion\."),
        ((), {"patience": 2.5}, r"^EarlyStopping\(patience=2\.5\): patience is a whole number, at least 1; with 1"),
        ((), {"patience": 0}, r"^EarlyStopping\(patience=0\): .* ends training, as with 0 in Keras\.$"),
        ((GL,), {}, r"^<class .*GL'> is no criterion.* Write GL\(\.\.\.\), an instance\."),
        (("Loss",), {}, r"^EarlyStopping\('Loss'\): a metric is named by monitor=\. Write EarlyStopping\(patience=5,"),
        ((3,), {"monitor": "valid."}, r"^EarlyStopping\(monitor='valid\.'\): monitor is the name of a metric"),
        ((3,), {"monitor": ""}, r"^EarlyStopping\(monitor=''\)"),
        ((3,), {"phase": "valid"}, r"^EarlyStopping\(phase='valid'\) is no phase type\. Write phase=ValidationPhase\."),
        ((3,), {"phase": ValidationPhase()}, r"^EarlyStopping\(phase=ValidationPhase\) is no phase type"),
        (
            (3,),
            {"monitor": "Accuracy", "mode": "maximum"},
            r"^EarlyStopping\(mode='maximum'\): mode is 'min' if small values of Accuracy are good, otherwise 'max'\.$",
        ),
    ],
)
def test_mistakes(arguments: tuple[Any, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        EarlyStopping(*arguments, **options)


def test_a_metric_that_nobody_computes_is_refused_when_the_learner_is_built() -> None:
    with pytest.raises(MissingStateError) as refused:
        learner_with(EarlyStopping(3, monitor="Scores", mode="min"))
    assert str(refused.value).startswith(
        "EarlyStopping reads cbstate.metrics_epoch.Scores, and no callback declares to write it. In "
        "cbstate.metrics_epoch there is Loss, Score. Did you mean 'Score'? "
    )


def test_a_metric_of_another_phase_is_refused_at_the_end_of_the_first_epoch() -> None:
    batches = tiny_batches(n_batches=2)
    data = {ValidationPhase: batches[:1], TrainingPhase: batches}
    stopping = EarlyStopping(3, monitor="Score", mode="min", phase=TrainingPhase)
    learner = tiny_learner(stopping, scored(*SCORES), data=data)
    with pytest.raises(UsageError) as refused:
        learner.fit(3)
    assert str(refused.value) == (
        "EarlyStopping needs 'Score' of TrainingPhase, and nothing was recorded by the end of its first epoch; it is "
        "recorded in ValidationPhase. Give Metrics a metric that is computed in this phase, or name another phase: "
        "EarlyStopping(..., phase=...). If the metric is recorded in every n-th epoch only, write "
        "throttle(EarlyStopping(...), EpochEnd, every=n)."
    )
    learner = learner_with(EarlyStopping(PQ(), monitor="Score", mode="min"))
    with pytest.raises(UsageError, match=r"^EarlyStopping needs 'Score' of TrainingPhase, and nothing was recorded"):
        learner.fit(3)


@pytest.mark.parametrize(
    ("stopping", "phases", "message"),
    [
        (
            lambda: EarlyStopping(3),
            [TrainingPhase],
            r"^EarlyStopping watches ValidationPhase, which the data does not have\. The data has TrainingPhase\. "
            r"Write EarlyStopping\(\.\.\., phase=TrainingPhase\)\.",
        ),
        (
            lambda: EarlyStopping(3, phase=Phase),
            [TrainingPhase, ValidationPhase],
            r"^EarlyStopping watches Phase, and the data has several of that kind\. The data has TrainingPhase, Val",
        ),
        (
            lambda: EarlyStopping(PQ()),
            [ValidationPhase],
            r"PQ\(0\.75, k=5\)\) needs the values of one training phase, and the data has ValidationPhase\. Use a crit",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:fit\\(\\) has no training phase:UserWarning")
def test_a_phase_that_the_data_does_not_have_is_refused_before_training(
    stopping: Callable[[], EarlyStopping], phases: list[type[Phase]], message: str
) -> None:
    learner = tiny_learner(stopping(), data=dict.fromkeys(phases, tiny_batches(n_batches=2)))
    with pytest.raises(UsageError, match=message):
        learner.fit(1)
    assert all(counts.epochs == 0 for counts in learner.cbstate.history.values())


def test_a_criterion_belongs_to_one_callback() -> None:
    """A shared criterion would get the values of two phases, or each value twice, and stop too early."""
    shared = Patience(2)
    with pytest.raises(CallbackError, match=r"EarlyStopping and EarlyStopping#2 have the same Patience\(2\), w"):
        tiny_learner(EarlyStopping(shared), EarlyStopping(GL(5), Warmup(shared, 1), phase=TrainingPhase))
    with pytest.raises(UsageError, match=r"Patience\(2\) is in Disjunction twice, as one object .* Make another one\."):
        EarlyStopping(shared, GL(5) | shared)


# --- which values are good


def score(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).abs().mean()


RISING = [1.0, 2.0, 3.0, 4.0, 5.0]


class Own(Callback):
    """Records an epoch metric itself, and says whether higher values are better."""

    def __init__(self, mode: Literal["min", "max"]) -> None:
        self.mode: Literal["min", "max"] = mode

    def state_access(self) -> Access:
        return {"cbstate.metrics_epoch.Own": Write(), "cbstate.history": Read()}

    def metric_modes(self) -> dict[str, Literal["min", "max"]]:
        return {"Own": self.mode}

    @on(EpochEnd, ValidationPhase)
    def push(self, event: EpochEnd, phase: ValidationPhase, learner: LearnerView) -> None:
        epoch = learner.cbstate.history[phase].epochs
        learner.cbstate.metrics_epoch[phase].push("Own", float(epoch), epoch)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        (accuracy, "max"),
        (top_k_accuracy(2), "max"),
        (mean_squared_error, "min"),
        (Metric(partial(mean_absolute_error), name="Mae"), "min"),
        (Metric(accuracy, name="Share"), "max"),
        (Metric(accuracy, name="Wrong", mode="min"), "min"),
        (Metric(score, mode="max"), "max"),
        (Metric(Good(higher_is_better=True), name="Good"), "max"),
        (Metric(Good(higher_is_better=False), name="Good"), "min"),
        (MulticlassF1Score(num_classes=2), "max"),
        (MeanSquaredError(), "min"),
        (Metric(R2Score(), name="R2"), "max"),
        (Own("max"), "max"),
        (Own("min"), "min"),
    ],
)
def test_which_values_are_good_is_known(metric: Any, mode: str, tmp_path: Path) -> None:
    callbacks: list[Callback] = [metric] if isinstance(metric, Callback) else [Metrics(metric)]
    [name] = [*callbacks[0].metric_modes()]
    stops, saves = EarlyStopping(2, monitor=name), Checkpointer(tmp_path, monitor=name)
    plateau = Scheduler({LearningRate: reduce_on_plateau(1.0, monitor=name, patience=1)})
    learner = tiny_learner(*callbacks, stops, saves, plateau)
    assert learner.callbacks.find(EarlyStopping) is stops
    values = [float(number) for number in range(1, 6)]
    stops.criterion.begin(stops._direction)
    answers = [stops.criterion.update(value) for value in values]
    assert [answer is not None for answer in answers] == (
        [False, False, True, True, True] if mode == "min" else [False] * 5
    )
    assert (saves._direction, plateau._judging["LearningRate"].mode) == (mode, mode)


def test_each_of_a_torchmetrics_collection_is_known() -> None:
    collection = MetricCollection(
        {"Error": MeanSquaredError(), "Fit": R2Score(), "Mean": MeanMetric()}, prefix="valid_"
    )
    known = Metrics(collection).metric_modes()
    assert known == {"valid_Error": "min", "valid_Fit": "max"}


def test_an_accuracy_that_rises_is_better() -> None:
    """EarlyStopping knows that a higher accuracy is better: all five epochs run, and the last one is the best."""
    for monitor, mode, wanted in (("Accuracy", None, 5), ("Accuracy", "min", 3), ("Accuracy", "max", 5)):
        rest = iter(RISING)

        def rising(outputs: torch.Tensor, targets: torch.Tensor, rest: Iterator[float] = rest) -> float:
            return next(rest)

        rising.__dict__["higher_is_better"] = True
        metrics = Metrics(Metric(rising, name="Accuracy", phase=ValidationPhase))
        batches = tiny_batches(n_batches=1)
        stopping = EarlyStopping(2, monitor=monitor, mode=cast(Any, mode))
        learner = tiny_learner(stopping, metrics, data=(batches, batches))
        learner.fit(5)
        assert epochs_of(learner) == wanted, mode


@pytest.mark.parametrize(
    ("make", "call"),
    [
        (lambda: EarlyStopping(3, monitor="Score"), "EarlyStopping(..., monitor='Score'"),
        (lambda: Checkpointer("unused", monitor="Score"), "Checkpointer(..., monitor='Score'"),
        (
            lambda: Scheduler({LearningRate: reduce_on_plateau(0.1, monitor="Score")}),
            "reduce_on_plateau(0.1, monitor='Score'",
        ),
    ],
    ids=["stopping", "checkpointer", "plateau"],
)
@pytest.mark.parametrize("metric", [score, Metric(Good(None), name="Score")], ids=["function", "says nothing"])
def test_which_values_are_good_is_asked_for(make: Callable[[], Callback], call: str, metric: Any) -> None:
    with pytest.raises(UsageError) as raised:
        tiny_learner(make(), Metrics(metric))
    assert str(raised.value) == (
        f'{call}) does not know whether large values of Score are good or small ones. Write {call}, mode="max") if '
        f'large ones are, or mode="min" if small ones are; or say it where the metric is made: '
        f"Metric(f, name='Score', mode=\"max\")."
    )
    learner = tiny_learner(Metrics(metric))
    before = list(learner.callbacks)
    with pytest.raises(UsageError, match="does not know whether"):
        learner.add_callback(make())
    assert list(learner.callbacks) == before
    tiny_learner(make(), Metrics(Metric(score, mode="max")))


def test_a_refused_change_leaves_which_values_are_good() -> None:
    stopping = EarlyStopping(3, monitor="Score")
    learner = tiny_learner(stopping, Metrics(Metric(score, mode="max")))
    refused = [
        Recorder(),
        stopping,
        Metrics(Metric(score, mode="min"), Metric(score, name="Other")),
        EarlyStopping(3, monitor="Other"),
    ]
    with pytest.raises(UsageError, match="does not know whether large values of Other"):
        learner.set_callbacks(refused)
    kept: str = stopping._direction
    assert kept == "max"
    learner.replace_callback(Metrics(Metric(score, mode="min")))
    assert stopping._direction == "min"


def test_a_metric_that_is_nan_from_the_first_epoch_on_ends_training() -> None:
    learner = learner_with(EarlyStopping(3, monitor="Score", mode="max"), [float("nan")] * 10)
    learner.fit(10)
    assert str(learner.stopped) == (
        "EarlyStopping ends training after epoch 3 of ValidationPhase. Patience(3): the value is NaN for 3 epochs. "
        "Score is nan; it never was a number."
    )


def test_the_first_reason_is_the_one_that_is_kept() -> None:
    """If two criteria stop at the same event, the reason of the first in the list is kept, the other is attached."""
    nan = [float("nan")] * 10
    one = EarlyStopping(2, monitor="Score", mode="min")
    other = EarlyStopping(InvalidValue(), monitor="Score", mode="min")
    learner = tiny_learner(one, other, scored(*nan), data=(tiny_batches(n_batches=1), tiny_batches(n_batches=1)))
    learner.fit(10)
    assert "InvalidValue(): there is a value of nan" in str(learner.stopped)
    assert epochs_of(learner) == 1
    both = tiny_learner(
        EarlyStopping(1, monitor="Score", mode="min"), EarlyStopping(InvalidValue(), monitor="Score", mode="min"),
        scored(*nan), data=(tiny_batches(n_batches=1), tiny_batches(n_batches=1)),
    )  # fmt: skip
    both.fit(10)
    assert "Patience(1): the value is NaN for 1 epoch" in str(both.stopped)
    assert any("InvalidValue()" in str(each) for each in getattr(both.stopped, "others", ()))
