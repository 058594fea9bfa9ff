"""Dry runs: they suggest the least access that a callback must declare."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, TensorDataset

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
from flowtrain.callback.access import dotted
from flowtrain.callbacks import (
    CustomCallback,
    LogMetrics,
    LogVisualization,
    Traces,
)
from flowtrain.diagnostics.recording_view import Log, RecordingView
from flowtrain.diagnostics.scratch_learner import CannotLook, first_batch, same_rng, shared_copy
from flowtrain.logging import JsonlBackend, Value
from flowtrain.state.namespace import State
from flowtrain.state.partial_view import Owner
from flowtrain.testing import record_access, tiny_batches, tiny_learner
from tests.support.untyped import untyped


def _loss_squared(learner: LearnerView) -> Any:
    return learner.batch.loss**2


def _logged_loss(learner: LearnerView) -> Any:
    return Value(learner.batch.loss)


class Undeclared(Callback):
    """Touches state of every kind, and declares nothing."""

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
        """Handle nothing: in ValidationPhase the more specific handler runs, so a trial run never calls this one."""


def test_a_callback_that_takes_its_access_is_told_what_to_pass(tmp_path: Path) -> None:
    """The callback declares its counts and its backend itself, so they are not suggested."""
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
    """Sets the learning rate through the parameter groups, which contain the parameters too."""

    @on(BatchEnd, TrainingPhase)
    def set_rate(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.optimizer.param_groups[0]["lr"] = 0.05


def test_who_goes_through_the_parameter_groups_is_told_the_narrow_way(capsys: pytest.CaptureFixture[str]) -> None:
    """Rule 5: for the hyperparameters alone there is a narrower path than ``param_groups``."""
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
    assert "No event of the trial run reached: other." in text


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
    assert "The trial run ended with ValueError: the loss is 0-dimensional\nThe callback may need more." in str(found)


def test_a_declaration_that_does_not_fit_is_no_obstacle() -> None:
    found = record_access(CustomCallback(_loss_squared, BatchEnd, TrainingPhase, {"batch.lss": Read()}))
    assert found.union == ((("batch", "loss"), Read()),)


def test_declared_exchanges_between_ranks_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    class Worst(Callback):
        def state_access(self) -> Access:
            return {"batch.loss": Read(gather=True), "cbstate.worst": Write(broadcast=True), "batch.inputs": Read()}

        @on(BatchEnd, TrainingPhase)
        def look(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            learner.cbstate.worst = max(map(float, learner.batch.loss))

    found = record_access(Worst())
    assert found.failure is None
    wanted = '{"batch.loss": Read(gather=True), "cbstate.worst": Write(broadcast=True)}'
    assert f"        return {wanted}\n" in capsys.readouterr().out


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
    with pytest.raises(UsageError, match=r"suggest_access\(\) takes a callback, got 3\. Write learner\.sugg"):
        tiny_learner().suggest_access(untyped(3))


def test_a_misspelt_name_is_pointed_out() -> None:
    found = record_access(CustomCallback(lambda learner: learner.batch.lss, BatchEnd))
    assert "There was no batch.lss when it was read, so it is optional here. Did you mean 'batch.loss'?" in str(found)
    assert repr(found) == '<Recording of CustomCallback: {"batch.lss": Read(optional=True)}>'


def test_a_learner_that_only_validates_is_not_warned_of() -> None:
    """The trial run calls `fit` itself, so a warning about that call would not concern the user."""

    class Shows(Callback):
        @on(BatchEnd, ValidationPhase)
        def show(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            float(learner.batch.loss)

    found = record_access(Shows(), data={ValidationPhase: tiny_batches()})
    assert {dotted(path) for path, _ in found.union} == {"batch.loss"}
    assert found.failure is None


# --- recording


PHASE = TrainingPhase()


def recorded(f: Callable[[LearnerView], Any]) -> dict[str, Read | Write]:
    """Return the paths that a function touches in a learner after one batch."""
    learner = tiny_learner()
    learner.step(PHASE, (torch.ones(2, 1), torch.ones(2, 1)))
    learner.state.cbstate.space = State("cbstate.space")
    log: Log = {}
    f(RecordingView(learner.state, Owner("it", "It", "state_access", ()), log))
    return {dotted(path): kind for path, kind in log.items()}


def _assign(learner: LearnerView) -> None:
    learner.cbstate.mine = 1
    learner.batch.more = 2
    learner.cbstate.space.inner = 3
    del learner.batch.more


CASES: list[Any] = [
    (lambda learner: learner.batch.loss, {"batch.loss": Read()}),
    (lambda learner: learner.batch.nothing, {"batch.nothing": Read(optional=True)}),
    (lambda learner: "nothing" in learner.batch, {"batch.nothing": Read(optional=True)}),
    (_assign, {"cbstate.mine": Write(), "batch.more": Write(), "cbstate.space.inner": Write()}),
    (lambda learner: learner.cbstate.history[PHASE].steps, {"cbstate.history": Read()}),
    (lambda learner: learner.cbstate.metrics_step[PHASE]["Loss"].last(), {"cbstate.metrics_step.Loss": Read()}),
    (lambda learner: list(learner.cbstate.metrics_step[PHASE]), {"cbstate.metrics_step": Read()}),
    (lambda learner: len(learner.cbstate.metrics_step), {"cbstate.metrics_step": Read()}),
    (
        lambda learner: learner.cbstate.tracehistory[PHASE].push("New", 1.0, 1),
        {"cbstate.tracehistory.New": Write()},
    ),
    (
        lambda learner: learner.cbstate.hyperparams.push("LearningRate", 0.1, 1),
        {"cbstate.hyperparams.LearningRate": Write()},
    ),
    pytest.param(
        lambda learner: learner.model(torch.ones(1)),
        {"model": Read()},
        marks=pytest.mark.cpu_only("calls the model with tensors of the CPU"),
    ),
    (lambda learner: learner.params["coeff"], {"params.coeff": Read()}),
    (lambda learner: dict(learner.params.items()), {"params": Read(), "params.coeff": Read()}),
    (lambda learner: learner.batch.grads["coeff"], {"batch.grads": Read()}),
    (lambda learner: learner.optimizer.hyperparams[0]["lr"], {"optimizer.hyperparams": Read()}),
    (lambda learner: learner.optimizer.state, {"optimizer.state": Read()}),
    (lambda learner: learner.optimizer.state_dict(), {"optimizer": Read()}),
    (lambda learner: len(learner.data[PHASE]), {"data": Read()}),
    (lambda learner: (learner.lossfn, len(learner.callbacks)), {"lossfn": Read(), "callbacks": Read()}),
]


@pytest.mark.parametrize(("f", "paths"), CASES)
def test_what_is_touched_is_logged_by_path(f: Callable[[LearnerView], Any], paths: dict[str, Read | Write]) -> None:
    assert recorded(f) == paths


def test_a_plain_read_beats_an_optional_one_and_a_write_beats_both() -> None:
    def touch(learner: LearnerView) -> None:
        _ = learner.cbstate.mine
        learner.cbstate.mine = 1
        _ = learner.cbstate.mine
        _ = "loss" in learner.batch
        _ = learner.batch.loss

    assert recorded(touch) == {"cbstate.mine": Write(), "batch.loss": Read()}


def test_what_no_view_allows_is_refused_here_too() -> None:
    with pytest.raises(UsageError, match=r"it calls learner\.fit\(\) in a handler"):
        recorded(lambda learner: untyped(learner).fit)
    with pytest.raises(AttributeError, match="Did you mean 'batch'"):
        recorded(lambda learner: untyped(learner).bacth)


# --- the trial run


class Stateful(Sampler[int]):
    """A sampler that gives other indices in every pass."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        return iter([self.passes, self.passes + 1, self.passes + 2, self.passes + 3])


DATA = TensorDataset(torch.arange(12.0))


def seeded(**settings: Any) -> DataLoader[Any]:
    return DataLoader(DATA, shuffle=True, generator=torch.Generator().manual_seed(5), **settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: seeded(batch_size=4),
        lambda: seeded(batch_size=4, num_workers=1, persistent_workers=True, timeout=30),
        lambda: DataLoader(DATA, batch_size=3, sampler=Stateful()),
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(Stateful(), 2, drop_last=False)),
        lambda: DataLoader(DATA, batch_size=None, sampler=Stateful()),
        lambda: [[torch.zeros(2)], [torch.ones(2)]],
        lambda: ([torch.zeros(2)],),
    ],
    ids=["generator", "workers", "sampler", "batch sampler", "no batching", "list", "tuple"],
)
def test_the_first_batch_is_the_one_that_training_gets_next(make: Any) -> None:
    loader = make()
    with same_rng():
        [[seen]] = first_batch(loader)
        assert torch.equal(first_batch(loader)[0][0], seen)
    seen += 0
    assert torch.equal(next(iter(loader))[0], seen)


def test_what_is_done_to_the_batch_is_not_done_to_the_data() -> None:
    data = [torch.zeros(2)]
    first_batch(data)[0].add_(1)
    assert data[0].tolist() == [0, 0]


def test_no_batch() -> None:
    assert first_batch([]) == []
    assert first_batch(DataLoader(DATA, batch_size=20, drop_last=True)) == []


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("it was asked")


class Locked(Stateful):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies")


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (iter([1]), "a list_iterator may lose the batches that are taken from it before training"),
        (DataLoader(Stream()), "an IterableDataset may lose the batches that are taken from it before training"),
        (DataLoader(DATA, sampler=Locked()), "its samplers cannot be copied: TypeError: no copies"),
    ],
)
def test_loaders_that_are_left_alone(loader: Any, reason: str) -> None:
    with pytest.raises(CannotLook) as raised:
        first_batch(loader)
    assert str(raised.value) == reason


def test_a_shared_copy_shares_parameters_and_nothing_else() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    copied = shared_copy(model)
    assert all(a is b for a, b in zip(copied.parameters(), model.parameters(), strict=True))
    assert not any(a is b for a, b in zip(copied.buffers(), model.buffers(), strict=True))
    assert shared_copy(torch.nn.functional.mse_loss) is torch.nn.functional.mse_loss


def test_a_model_that_cannot_be_copied() -> None:
    model: Any = torch.nn.Linear(1, 1)
    model.kept = iter([1])
    model.lock = (each for each in [1])
    with pytest.raises(CannotLook, match="it cannot be copied: TypeError: cannot pickle 'generator' object"):
        shared_copy(model)
