"""Dry runs: the least that a callback must declare, and the proof that the bundled ones declare exactly that."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import flowtrain.callbacks
from flowtrain import (
    AbstractValidationPhase,
    Access,
    BatchEnd,
    Callback,
    EpochEnd,
    FitBegin,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callback.access import Declaration, dotted
from flowtrain.callbacks import (
    EMA,
    Checkpointer,
    CustomCallback,
    DeviceStats,
    EarlyStopping,
    GarbageCollect,
    GradNorm,
    LearningRate,
    LearningRateMonitor,
    LogHistograms,
    LogHyperParams,
    LogMetrics,
    LogTraces,
    LogVisualization,
    Metrics,
    MetricsPrinter,
    ModelSummary,
    ProgressBar,
    Recorder,
    SanityCheck,
    Scheduler,
    SmoothLoss,
    StopOnNaNLoss,
    Timer,
    Traces,
    one_cycle,
)
from flowtrain.callbacks.stopping.criteria import PQ
from flowtrain.logging import JsonlBackend, Value
from flowtrain.metrics import mean_absolute_error
from flowtrain.testing import record_access, tiny_batches, tiny_learner


def kinds(declaration: Declaration) -> dict[str, type]:
    """Paths and kinds of access; whether a read is optional cannot be seen from outside."""
    return {dotted(path): type(kind) for path, kind in declaration}


def _nan_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).mean() * float("nan")


def _loss_squared(learner: LearnerView) -> Any:
    return learner.batch.loss**2


def _traces() -> Traces:
    return Traces({"Squared": _loss_squared}, TrainingPhase, access={"batch.loss": Read()})


def _logged_loss(learner: LearnerView) -> Any:
    return Value(learner.batch.loss)


FOLDER = Path(tempfile.gettempdir()) / "flowtrain-dryrun"  # what is written there is overwritten by the next run

BUNDLED: dict[str, tuple[Callable[[], Callback], dict[str, Any]]] = {
    "Checkpointer": (lambda: Checkpointer(FOLDER, every_steps=1), {}),
    "CustomCallback": (lambda: CustomCallback(_loss_squared, BatchEnd, access={"batch.loss": Read()}), {}),
    "DeviceStats": (lambda: DeviceStats(every=1), {}),
    "EarlyStopping": (lambda: EarlyStopping(PQ()), {}),
    "EMA": (EMA, {}),
    "GarbageCollect": (GarbageCollect, {}),
    "GradNorm": (GradNorm, {}),
    "LearningRateMonitor": (LearningRateMonitor, {}),
    "LogHistograms": (lambda: LogHistograms(JsonlBackend(FOLDER / "log"), every=1, gradients=True), {}),
    "LogHyperParams": (lambda: LogHyperParams(JsonlBackend(FOLDER / "log"), settings={"rate": 0.1}), {}),
    "LogMetrics": (lambda: LogMetrics(JsonlBackend(FOLDER / "log")), {}),
    "LogTraces": (lambda: LogTraces(JsonlBackend(FOLDER / "log")), {}),
    "LogVisualization": (
        lambda: LogVisualization(_logged_loss, JsonlBackend(FOLDER / "log"), every=1, access={"batch.loss": Read()}),
        {},
    ),
    "Metrics": (lambda: Metrics(mean_absolute_error), {}),
    "MetricsPrinter": (MetricsPrinter, {}),
    "ProgressBar": (lambda: ProgressBar(redraw=0, report=0), {}),
    "ModelSummary": (ModelSummary, {}),
    "Recorder": (Recorder, {}),
    "SanityCheck": (SanityCheck, {}),
    "Scheduler": (lambda: Scheduler({LearningRate: one_cycle(0.2)}), {}),
    "SmoothLoss": (SmoothLoss, {}),
    "StopOnNaNLoss": (StopOnNaNLoss, {"lossfn": _nan_loss}),
    "Timer": (Timer, {}),
    "Traces": (_traces, {}),
}
MAKERS: dict[str, Callable[[], Callback]] = {"LogTraces": _traces}
"""What makes the state that a bundled callback reads, where no default callback does."""


AFTER_A_GROUP = {"take_in_last", "take_in_cancelled"}
"""Handlers that touch something only where a group was left unfilled by its last batch, which no dry run does."""

PUTS_BACK = {"ModelSummary", "SanityCheck"}
"""They draw random numbers and put the generators back, which leaves no trace; others must not draw meanwhile."""


def test_every_bundled_callback_is_in_the_table() -> None:
    public = [getattr(flowtrain.callbacks, name) for name in flowtrain.callbacks.__all__]
    assert {each.__name__ for each in public if isinstance(each, type) and issubclass(each, Callback)} == set(BUNDLED)


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.filterwarnings("ignore:The loss is NaN:RuntimeWarning")
def test_the_bundled_callbacks_declare_exactly_what_they_touch(name: str) -> None:
    make, options = BUNDLED[name]
    callback = make()
    others = [MAKERS[name]()] if name in MAKERS else []
    found = record_access(callback, *others, **options)
    assert found.failure is None
    learner = tiny_learner(callback, *others, **options)
    node = next(node for node in learner.callbacks.nodes if node.callback is callback)
    declared = kinds(node.stated(node.union))
    if name in PUTS_BACK:
        del declared["resource.rng"]
    assert kinds(found.union) == declared
    for _, handler in node.handlers:
        if handler.access is not None and handler.attribute in found.handlers.keys() - AFTER_A_GROUP:
            stated = kinds(node.stated(node.access[handler]))
            assert kinds(found.handlers[handler.attribute]) == stated, handler.attribute


class Undeclared(Callback):
    """Touches all kinds of state, and declares nothing."""

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.seen = 0

    @on(BatchEnd, TrainingPhase)
    def batch(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.cbstate.seen += 1
        learner.batch.inputs.add_(float(learner.batch.loss))
        for group in learner.optimizer.hyperparams:
            group["lr"] = group["lr"] / 2
        learner.params["coeff"].data.mul_(1.1)
        learner.cbstate.tracehistory[phase].push("Loss", learner.batch.loss, 1)

    @on(EpochEnd, ValidationPhase)
    def epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        self.steps = learner.cbstate.history[phase].steps
        self.loss = learner.cbstate.metrics_epoch[phase]["Loss"]
        self.rate = torch.rand(1)
        if "maybe" in learner.cbstate:
            raise AssertionError("there is no such entry")

    @on(EpochEnd, AbstractValidationPhase)
    def other(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Shadowed for ValidationPhase by the more specific handler, so the dry run never gets here."""


def test_a_callback_that_takes_its_access_is_told_what_to_pass(tmp_path: Path) -> None:
    """What it adds by itself, such as the counts and its backend, is not for the user to write."""
    backend = JsonlBackend(tmp_path / "log.jsonl")
    wanted = 'access={"batch.loss": Read(), "params.coeff": Read()})\n'

    def shown(learner: LearnerView) -> Value:
        return Value(float(learner.batch.loss + learner.params["coeff"]))

    callbacks = [
        LogVisualization(shown, backend, every=1, access={"batch.loss": Read()}),
        Traces({"Sum": shown}, TrainingPhase),
        CustomCallback(shown, BatchEnd, TrainingPhase),
    ]
    for callback in callbacks:
        name = type(callback).__name__
        assert str(record_access(callback)).startswith(f"{name} needs:\n\n    {name}(..., {wanted}")


class ByGroups(Callback):
    """Sets the learning rate by the way that reaches the parameters too."""

    @on(BatchEnd, TrainingPhase)
    def set_rate(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.optimizer.param_groups[0]["lr"] = 0.05


def test_who_goes_through_the_parameter_groups_is_told_the_narrow_way(capsys: pytest.CaptureFixture[str]) -> None:
    """Rule 5: parameter groups are hyperparameters and parameters."""
    assert record_access(ByGroups()).union == ((("optimizer",), Write()),)
    hint = "optimizer reaches the parameters too: for learning rates use and declare optimizer.hyperparams.\n"
    assert hint in capsys.readouterr().out


def test_a_callback_that_declares_nothing_gets_its_whole_declaration(capsys: pytest.CaptureFixture[str]) -> None:
    found = record_access(Undeclared())
    assert found.handlers == {
        "setup": ((("cbstate", "seen"), Write()),),
        "batch": (
            (("batch", "inputs"), Write()),
            (("batch", "loss"), Read()),
            (("cbstate", "seen"), Write()),
            (("cbstate", "tracehistory", "Loss"), Write()),
            (("optimizer", "hyperparams"), Write()),
            (("params", "coeff"), Write()),
        ),
        "epoch": (
            (("cbstate", "history"), Read()),
            (("cbstate", "maybe"), Read(optional=True)),
            (("cbstate", "metrics_epoch", "Loss"), Read()),
            (("resource", "rng"), Write()),
        ),
    }
    assert found.idle == ("other",)
    text = capsys.readouterr().out
    assert '@on(EpochEnd, ValidationPhase, access={"cbstate.history": Read()' in text
    assert "No event of the dry run reached: other." in text


def test_what_is_printed_makes_the_callback_legal() -> None:
    text = str(record_access(Undeclared()))
    line = next(line for line in text.splitlines() if line.strip().startswith("return {"))
    access: Access = eval(line.strip().removeprefix("return "), {"Read": Read, "Write": Write})

    class Declared(Undeclared):
        def state_access(self) -> Access:
            return access

    tiny_learner(Declared(), strict=True, n_batches=2).fit(1)


def test_the_learner_and_the_random_numbers_stay_as_they_are() -> None:
    learner = tiny_learner(optimizer=partial(torch.optim.Adam, lr=0.1), strict=True)
    learner.fit(1)
    before = (learner.model.coeff.clone(), dict(vars(learner.cbstate)), len(learner.callbacks), learner.batch)
    states = torch.get_rng_state(), random.getstate()
    learner.suggest_access(Undeclared())
    assert torch.equal(learner.model.coeff, before[0])
    assert learner.optimizer.param_groups[0]["lr"] == 0.1
    assert (dict(vars(learner.cbstate)), len(learner.callbacks), learner.batch) == before[1:]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert learner.cbstate.history[TrainingPhase].steps == 16


def test_a_callback_that_fails_is_reported_with_what_it_touched_until_then() -> None:
    def fails(learner: LearnerView) -> None:
        raise ValueError(f"the loss is {learner.batch.loss.ndim}-dimensional")

    found = record_access(CustomCallback(fails, BatchEnd, TrainingPhase))
    assert found.union == ((("batch", "loss"), Read()),)
    assert "The dry run ended with ValueError: the loss is 0-dimensional\nThe callback may need more." in str(found)


def test_a_declaration_that_does_not_fit_is_no_obstacle() -> None:
    found = record_access(CustomCallback(_loss_squared, BatchEnd, TrainingPhase, {"batch.lss": Read()}))
    assert found.union == ((("batch", "loss"), Read()),)


def test_declared_resources_are_kept() -> None:
    printer = CustomCallback(lambda learner: None, EpochEnd, access={"resource.pyplot": Write(), "batch": Read()})
    assert record_access(printer).union == ((("resource", "pyplot"), Write()),)


def test_several_models_are_told_apart() -> None:
    class Step(TrainingPhase):
        def step(self, learner: Any, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw[0]) as batch:
                batch.loss = learner.model.gen(learner.model.disc(batch.inputs)).mean()
                learner.backward(self, batch.loss)
                learner.update(self)

    def touch(learner: LearnerView) -> None:
        learner.model.gen.weight.data.add_(1)
        for group in learner.optimizer.disc.hyperparams:
            group["lr"] = 0.5

    learner = tiny_learner(
        model={"gen": torch.nn.Linear(1, 1), "disc": torch.nn.Linear(1, 1)},
        optimizer={"gen": partial(torch.optim.SGD, lr=0.1), "disc": partial(torch.optim.SGD, lr=0.1)},
        data={Step: [(torch.ones(2, 1), None)]},
    )
    found = learner.suggest_access(CustomCallback(touch, BatchEnd, Step))
    assert found.union == ((("model", "gen"), Write()), (("optimizer", "disc", "hyperparams"), Write()))


def test_fit_events_are_reached() -> None:
    found = record_access(CustomCallback(lambda learner: len(learner.params), FitBegin))
    assert found.union == ((("params",), Read()),)


def test_what_is_logged_meanwhile_is_written_nowhere(tmp_path: Path) -> None:
    learner = tiny_learner(LogMetrics(JsonlBackend(tmp_path / "own" / "log")))
    found = learner.suggest_access(LogVisualization(_logged_loss, JsonlBackend(tmp_path / "log"), every=1))
    assert found.failure is None
    assert list(tmp_path.iterdir()) == []


def test_only_a_callback_can_be_recorded() -> None:
    with pytest.raises(UsageError, match=r"This takes a callback, got 3\. Write learner\.suggest_access\(Printer"):
        tiny_learner().suggest_access(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # on purpose


def test_a_misspelt_name_is_pointed_out() -> None:
    found = record_access(CustomCallback(lambda learner: learner.batch.lss, BatchEnd))
    assert "There was no batch.lss when it was read, so it is optional here. Did you mean 'batch.loss'?" in str(found)
    assert repr(found) == '<Recording of CustomCallback: {"batch.lss": Read(optional=True)}>'


def test_a_learner_that_only_validates_is_not_warned_of() -> None:
    """The dry run fits for the user; a warning about that fit would be about a call that nobody wrote."""

    class Shows(Callback):
        @on(BatchEnd, ValidationPhase)
        def show(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            float(learner.batch.loss)

    found = record_access(Shows(), data={ValidationPhase: tiny_batches()})
    assert {dotted(path) for path, _ in found.union} == {"batch.loss"}
    assert found.failure is None
