"""A run that is stopped and resumed from a checkpoint equals, to the bit, a run that was never stopped."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import (
    Access,
    BackwardEnd,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    CheckpointError,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    Learner,
    LearnerView,
    Phase,
    SerialExecutor,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import Checkpointer, LogMetrics, Metrics
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.logs import log_steps
from tests.support.resumed import FITS, Ask, Place, ask_at, everything, learner_of
from tests.support.untyped import untyped

Run = Callable[..., Any]


PLACES: list[Place] = [
    (EpochEnd, ValidationPhase, 2),
    (EpochEnd, TrainingPhase, 2),
    (BatchEnd, TrainingPhase, 1),
    (BatchEnd, TrainingPhase, 10),
    (BatchEnd, TrainingPhase, 12),
    (BatchEnd, ValidationPhase, 3),
    (BackwardEnd, TrainingPhase, 12),
    (EpochBegin, TrainingPhase, 2),
    (FitEnd, Phase, 1),
]


@pytest.mark.parametrize("fit", FITS)
def test_rule_28_a_resumed_run_is_the_run(fit: str, tmp_path: Path) -> None:
    """Rule 28: bit for bit, wherever the checkpoint was taken, with shuffling, dropout and schedules."""
    asks = ask_at(PLACES, tmp_path)
    whole = learner_of(*asks)
    whole.fit(**FITS[fit])
    wanted = everything(whole)
    for ask in asks:
        resumed = learner_of(seed=99)
        resumed.fit(**FITS[fit], resume=ask.path)
        assert everything(resumed) == wanted, ask.place


def test_epochs_are_the_total_and_a_finished_run_is_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "one.ckpt"
    learner_of(Ask(path, FitEnd, Phase, 1)).fit(2)
    whole = learner_of()
    whole.fit(5)
    wanted = everything(whole)
    resumed = learner_of(seed=3)
    resumed.fit(5, resume=path)
    assert everything(resumed) == wanted
    again = learner_of(seed=3)
    again.fit(2, resume=path)
    assert again.cbstate.history[TrainingPhase].epochs == 2
    again.fit(1)  # a fit of its own
    assert again.cbstate.history[TrainingPhase].epochs == 3


def test_rule_16_a_resumed_epoch_begins_and_ends(tmp_path: Path) -> None:
    """Rule 16: every Begin has an End in the resumed run too; `FitBegin` says that the fit continues another one."""
    path = tmp_path / "one.ckpt"
    tiny_learner(Ask(path, BatchEnd, TrainingPhase, 3), n_batches=4).fit(1)
    seen: list[str] = []

    class Watch(Callback):
        @on(Event)
        def note(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            if type(event) in (FitBegin, EpochBegin, BatchEnd, EpochEnd, FitEnd):
                seen.append(f"{event!r} {phase!r}")

    tiny_learner(Watch(), n_batches=4, data=tiny_batches(n_batches=4)).fit(1, resume=path)
    assert seen == [
        "FitBegin(epochs=1, steps=None, updates=4, resumed=True, done=0) Phase",
        "EpochBegin() TrainingPhase",
        "BatchEnd() TrainingPhase",
        "EpochEnd() TrainingPhase",
        "FitEnd() Phase",
    ]


@pytest.mark.parametrize("number", [2, 5])
def test_rule_28_what_torchmetrics_objects_hold(number: int, tmp_path: Path) -> None:
    """Rule 28: the value of an epoch covers all its batches, also those before the checkpoint."""
    torchmetrics = pytest.importorskip("torchmetrics")

    def metrics() -> Metrics:
        error = torchmetrics.MeanSquaredError()
        both = {"First": torchmetrics.MeanAbsoluteError(), "Second": torchmetrics.RelativeSquaredError(num_outputs=2)}
        return Metrics(error, torchmetrics.MetricCollection(both))

    path = tmp_path / "one.ckpt"
    whole = learner_of(Ask(path, BatchEnd, TrainingPhase, number), metrics())
    whole.fit(2)
    wanted = everything(whole)
    resumed = learner_of(metrics(), seed=99)
    resumed.fit(2, resume=path)
    assert everything(resumed) == wanted
    assert "metrics_epoch.TrainingPhase.First" in wanted


class Updates(Callback):
    """Keeps the number of updates at each end of a batch of training."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    @on(BatchEnd, TrainingPhase)
    def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.seen.append(learner.updates)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(("event", "batches", "updates"), [(EpochEnd, 10, 6), (BatchEnd, 7, 4)])
def test_rule_28_the_number_of_updates_is_that_of_the_run(
    event: type[Event], batches: int, updates: int, old: bool, tmp_path: Path
) -> None:
    whole, resumed = Updates(), Updates()
    ask = Ask(tmp_path / "cut.ckpt", event, TrainingPhase, batches if event is BatchEnd else batches // 5)
    tiny_learner(whole, ask, n_batches=5, core=TorchCore(device="cpu", accumulate=2)).fit(4)
    assert whole.seen == [0, 1, 1, 2, 3, 3, 4, 4, 5, 6, 6, 7, 7, 8, 9, 9, 10, 10, 11, 12]  # three groups an epoch
    if old:  # early checkpoints lack the number, and have those of the history
        contents = torch.load(tmp_path / "cut.ckpt", weights_only=True)
        del contents["updates"]
        torch.save(contents, tmp_path / "cut.ckpt")
    again = tiny_learner(resumed, n_batches=5, core=TorchCore(device="cpu", accumulate=2))
    again.fit(4, resume=tmp_path / "cut.ckpt")
    assert resumed.seen == whole.seen[batches:]
    loaded = tiny_learner(n_batches=5, core=TorchCore(device="cpu", accumulate=2))
    loaded.load(tmp_path / "cut.ckpt")
    assert loaded.state.updates == updates


def test_without_a_history_an_early_checkpoint_begins_to_count_updates_anew(tmp_path: Path) -> None:
    learner = tiny_learner(Ask(tmp_path / "cut.ckpt", EpochEnd, TrainingPhase, 1), default_callbacks=False)
    learner.fit(1)
    contents = torch.load(tmp_path / "cut.ckpt", weights_only=True)
    assert contents.pop("updates") == learner.state.updates == 16
    torch.save(contents, tmp_path / "old.ckpt")
    learner.load(tmp_path / "old.ckpt")
    assert learner.state.updates == 0


# --- when a checkpoint is taken


class Said(Event):
    """An event that `Says` fires."""


class Says(Callback):
    """At the end of the training epoch, requests a checkpoint, fires an event, and raises if the test says so."""

    def __init__(self, path: Path, failure: BaseException | None = None) -> None:
        self.path, self.failure = path, failure

    @on(EpochEnd, TrainingPhase)
    def ask(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        learner.request_checkpoint(self.path)
        learner.fire(Said())
        if self.failure is not None:
            raise self.failure


class Hears(Callback):
    """Counts its handled events in an entry of ``cbstate``."""

    def state_access(self) -> Access:
        return {"cbstate.heard": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.heard = []

    @on(Said)
    def hear(self, event: Said, phase: Phase, learner: LearnerView) -> None:
        learner.cbstate.heard.append("Said")

    @on(EpochEnd, TrainingPhase)
    def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        learner.cbstate.heard.append("EpochEnd")


def test_rule_28_it_is_taken_when_the_event_and_all_that_it_fired_have_ended(tmp_path: Path) -> None:
    """Rule 28: the checkpoint includes the changes of the event's later handlers, and of handlers of fired events."""
    tiny_learner(Says(tmp_path / "one.ckpt"), Hears()).fit(1)
    contents = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert contents["cbstate"]["heard"] == {"value": ["EpochEnd", "Said"]}


def test_rule_28_a_cancel_keeps_the_request_and_an_error_drops_it(tmp_path: Path) -> None:
    """Rules 18 and 28: early stopping at the event keeps the request for a checkpoint; an error drops it."""
    tiny_learner(Says(tmp_path / "one.ckpt", CancelFittingException("enough")), Hears()).fit(1)
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["cbstate"]["heard"] == {"value": ["EpochEnd"]}
    with pytest.raises(ValueError, match="broken"):
        tiny_learner(Says(tmp_path / "two.ckpt", ValueError("broken")), Hears()).fit(1)
    assert not (tmp_path / "two.ckpt").exists()


def test_a_cancel_of_the_fit_at_the_event_of_a_request_keeps_it(tmp_path: Path) -> None:
    learner = tiny_learner(Says(tmp_path / "one.ckpt", CancelFittingException("enough")), Hears())
    learner.fit(3)
    resumed = tiny_learner(Hears())
    resumed.fit(2, resume=tmp_path / "one.ckpt")
    assert resumed.cbstate.history[TrainingPhase].epochs == 2  # the epoch that was cancelled at its end, and one more
    assert resumed.cbstate.history[ValidationPhase].epochs == 2


def test_a_request_in_a_batch_outside_of_an_epoch_is_taken_after_it(tmp_path: Path) -> None:
    learner = tiny_learner(Ask(tmp_path / "one.ckpt", BackwardEnd, TrainingPhase, 1))
    learner.step(TrainingPhase, tiny_batches(n_batches=1)[0])
    learner.flush()
    assert torch.load(tmp_path / "one.ckpt", weights_only=True)["position"]["unit"] == ""
    with pytest.raises(CheckpointError, match=r"in no fit, so no fit can resume from it.* Write fit\(epochs") as c:
        tiny_learner().fit(1, resume=tmp_path / "one.ckpt")
    assert "learner.load(path)" in str(c.value)


@pytest.mark.parametrize("run", ["epoch", "validate", "evaluate"])
def test_a_request_in_an_epoch_outside_of_a_fit_can_be_loaded(run: str, tmp_path: Path) -> None:
    phase = TrainingPhase if run == "epoch" else ValidationPhase
    learner = tiny_learner(Ask(tmp_path / "one.ckpt", BatchEnd, phase, 2))
    arguments = {"epoch": (TrainingPhase, tiny_batches()), "validate": (), "evaluate": (tiny_batches(),)}[run]
    getattr(learner, run)(*arguments)
    learner.flush()
    position = torch.load(tmp_path / "one.ckpt", weights_only=True)["position"]
    assert (position["unit"], position["phase"], position["batches"], position["steps"]) == ("", "", 0, 0)
    other = tiny_learner()
    other.load(tmp_path / "one.ckpt")
    with pytest.raises(CheckpointError, match="in no fit, so no fit can resume from it"):
        other.fit(1, resume=tmp_path / "one.ckpt")


@pytest.mark.parametrize("validate_every", [None, 4, 10])
def test_a_fit_resumes_that_asks_for_fewer_steps_than_it_has(validate_every: int | None, tmp_path: Path) -> None:
    """The open epoch ends where the checkpoint was taken, as a fit ends whose number of epochs is reached."""
    first = learner_of(Leave(tmp_path / "one.ckpt", CancelFittingException("enough"), number=7))
    first.fit(steps=20, validate_every=10)
    resumed = learner_of(seed=99)
    resumed.fit(steps=5, validate_every=validate_every, resume=tmp_path / "one.ckpt")
    assert resumed.cbstate.history[TrainingPhase].steps == 6  # the seventh batch was cancelled
    assert resumed.cbstate.history[TrainingPhase].epochs == resumed.cbstate.history[ValidationPhase].epochs == 1
    resumed.fit(steps=3)
    assert resumed.cbstate.history[TrainingPhase].steps == 9


def test_no_gradient_of_the_weights_before_survives_a_load(tmp_path: Path) -> None:
    """An accumulation group that is open when a checkpoint is loaded ends: its gradients are of other weights."""
    batches = tiny_batches(n_batches=3)

    def learner_with(path: Path | None) -> Learner:
        learner = tiny_learner(core=TorchCore(accumulate=2))
        if path is not None:
            learner.load(path)
        return learner

    asking = tiny_learner(Ask(tmp_path / "one.ckpt", BatchEnd, TrainingPhase, 2), core=TorchCore(accumulate=2))
    asking.epoch(TrainingPhase, batches[:2])
    asking.flush()
    fresh, used = learner_with(tmp_path / "one.ckpt"), learner_with(None)
    used.step(TrainingPhase, batches[0])
    used.load(tmp_path / "one.ckpt")
    for batch in batches[1:]:
        fresh.step(TrainingPhase, batch)
        used.step(TrainingPhase, batch)
    for name, param in fresh.params.items():
        assert torch.equal(param, used.params[name])


def test_a_path_is_a_path() -> None:
    class Wrong(Callback):
        @on(FitBegin)
        def ask(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
            learner.request_checkpoint(untyped(3))

    with pytest.raises(Exception, match=r"request_checkpoint\(\) takes the path of a file, got 3"):
        tiny_learner(Wrong()).fit(1)


@pytest.mark.parametrize(
    ("name", "weights", "holds"),
    [
        ("latest", False, "the name of a checkpoint"),
        ("Best", False, "the name of a checkpoint"),
        ("a.safetensors", True, "its weights"),
    ],
)
def test_a_path_that_is_overwritten_by_a_file_beside_it(name: str, weights: bool, holds: str, tmp_path: Path) -> None:
    """A checkpoint in the file ``latest`` was replaced by its own name."""

    class Asks(Callback):
        @on(FitBegin)
        def ask(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
            learner.request_checkpoint(tmp_path / name, weights=weights)

    with pytest.raises(UsageError) as caught:
        tiny_learner(Asks()).fit(1)
    assert str(caught.value) == (
        f"request_checkpoint('{tmp_path}/{name}'): flowtrain writes the file {name} itself, with {holds}, and would "
        f"overwrite the checkpoint. Choose another name, such as '{tmp_path}/mine.ckpt'."
    )
    assert list(tmp_path.iterdir()) == []


# --- checkpoints that do not fit


def test_another_kind_of_fit_or_other_data(tmp_path: Path) -> None:
    tiny_learner(Ask(tmp_path / "one.ckpt", BatchEnd, ValidationPhase, 3)).fit(1)
    with pytest.raises(CheckpointError, match=r"taken in a fit by epochs, and this fit counts steps\. Write fit"):
        tiny_learner().fit(steps=3, resume=tmp_path / "one.ckpt")
    with pytest.raises(CheckpointError, match="in an epoch of ValidationPhase, and this fit has data for Train"):
        tiny_learner(data=tiny_batches()).fit(1, resume=tmp_path / "one.ckpt")
    fewer = {TrainingPhase: tiny_batches(), ValidationPhase: tiny_batches(n_batches=2)}
    with pytest.raises(CheckpointError, match=r"after batch 3 of an epoch of ValidationPhase, and the loader .*only 2"):
        tiny_learner(data=fewer).fit(1, resume=tmp_path / "one.ckpt")


def test_load_leaves_random_numbers_and_begins_anew(tmp_path: Path) -> None:
    whole = learner_of(Ask(tmp_path / "one.ckpt", EpochEnd, ValidationPhase, 2))
    whole.fit(2)
    loaded = learner_of(seed=5)
    before = torch.get_rng_state()
    loaded.load(tmp_path / "one.ckpt")
    assert torch.equal(torch.get_rng_state(), before)
    one, other = everything(whole), everything(loaded)
    del one["next"], other["next"]
    assert one == other
    loaded.fit(1)
    assert loaded.cbstate.history[TrainingPhase].epochs == 3


def test_an_executor_may_keep_state_of_its_own(tmp_path: Path) -> None:
    """Rule 28: an executor that can save the pending events of its lanes does so; any other is flushed first."""
    flushed: list[str] = []

    class Keeps(SerialExecutor):
        loaded: Any = None

        def flush(self) -> None:
            flushed.append("flush")

        def state_dict(self) -> dict[str, Any]:
            return {"lane": {"pending": [1, 2]}}

        def load_state_dict(self, state: Any) -> None:
            self.loaded = state

    class Flushes(SerialExecutor):
        def flush(self) -> None:
            flushed.append("flush")

    path = tmp_path / "one.ckpt"
    tiny_learner(Ask(path, EpochEnd, TrainingPhase, 1), executor=Keeps()).fit(1)
    assert flushed == ["flush"]  # the flush at the end of the fit
    executor = Keeps()
    tiny_learner(executor=executor).fit(1, resume=path)
    assert executor.loaded == {"lane": {"pending": [1, 2]}}

    class Differs(Keeps):
        """Has a state of its own, which it gets back if the fit cannot resume."""

        def state_dict(self) -> dict[str, Any]:
            return {"lane": {"pending": [3]}}

    class Breaks(JsonlBackend):
        def restore(self, position: Any) -> None:
            raise OSError("gone")

    log = tmp_path / "log.jsonl"
    tiny_learner(Ask(path, EpochEnd, TrainingPhase, 1), LogMetrics(JsonlBackend(log)), executor=Keeps()).fit(1)
    executor = Differs()
    with pytest.raises(OSError, match="gone"):
        tiny_learner(LogMetrics(Breaks(log)), executor=executor).fit(1, resume=path)
    assert executor.loaded == {"lane": {"pending": [3]}}
    flushed.clear()
    tiny_learner(Ask(path, EpochEnd, TrainingPhase, 1), executor=Flushes()).fit(1)
    assert flushed == ["flush", "flush"]


def test_a_run_that_was_moved_as_a_whole_goes_on_where_it_is_now(tmp_path: Path) -> None:
    """Rule 28: the log is found at its new place, and records from after the checkpoint are removed there."""

    def run(folder: Path, *more: Callback) -> Learner:
        logs = LogMetrics(JsonlBackend(folder / "log.jsonl"))
        return tiny_learner(logs, Checkpointer(folder / "kept"), *more, n_batches=3)

    with run(tmp_path / "one") as learner:
        learner.fit(2)
    steps = log_steps(tmp_path / "one" / "log.jsonl")
    (tmp_path / "one").rename(tmp_path / "two")
    with run(tmp_path / "two") as learner:
        learner.fit(2, resume=tmp_path / "two" / "kept" / "epoch-0001.ckpt")
    assert log_steps(tmp_path / "two" / "log.jsonl") == steps
    with run(tmp_path / "two", Ask(tmp_path / "again.ckpt", FitBegin, Phase, 1)) as learner:
        learner.fit(2, resume=tmp_path / "two" / "kept" / "epoch-0001.ckpt")
    with run(tmp_path / "two") as learner:
        learner.fit(2, resume=tmp_path / "again.ckpt")  # the checkpoint that was saved again knows the new place too
    assert log_steps(tmp_path / "two" / "log.jsonl") == steps
    with (
        tiny_learner(
            LogMetrics(JsonlBackend(tmp_path / "new.jsonl")), Checkpointer(tmp_path / "two" / "kept")
        ) as other,
        pytest.warns(
            UserWarning, match=r"logged to .*two/log\.jsonl, and the learner does not.* New records go to Jsonl.*new"
        ) as w,
    ):
        other.fit(2, resume=tmp_path / "two" / "kept")
    assert w[0].filename == __file__


class Leave(Callback):
    """Requests a checkpoint within a training batch, and then raises there, or has sent a signal before."""

    def __init__(self, path: Path, raises: Exception | None = None, *, signals: bool = False, number: int = 7) -> None:
        self.path, self.raises, self.signals, self.number = path, raises, signals, number
        self.seen = 0

    @on(BackwardEnd, TrainingPhase)
    def look(self, event: BackwardEnd, phase: Phase, learner: LearnerView) -> None:
        self.seen += 1
        if self.seen == self.number:
            if self.signals:
                signal.raise_signal(signal.SIGINT)
            learner.request_checkpoint(self.path)
            if self.raises is not None:
                raise self.raises


@pytest.mark.parametrize("fit", ["epochs", "steps"])
@pytest.mark.parametrize(
    ("raises", "does"),
    [
        (CancelFittingException("enough"), CancelBatchException("the same for the batch")),
        (CancelEpochException("enough"), CancelEpochException("enough")),
        (None, None),
    ],
)
def test_rule_28_a_request_in_a_batch_that_ends_its_epoch_or_fit(
    fit: str, raises: Exception | None, does: Exception | None, tmp_path: Path
) -> None:
    """Rules 28 and 29: a cancel or an interrupt in the batch does not prevent its checkpoint; a fit resumes from it."""
    whole = learner_of(Leave(tmp_path / "other.ckpt", does))
    whole.fit(**FITS[fit])
    wanted = everything(whole)
    stopped = learner_of(Leave(tmp_path / "one.ckpt", raises, signals=raises is None))
    with pytest.raises(KeyboardInterrupt) if raises is None else nullcontext():
        stopped.fit(**FITS[fit])
    resumed = learner_of(seed=99)
    resumed.fit(**FITS[fit], resume=tmp_path / "one.ckpt")
    assert everything(resumed) == wanted


def test_rule_28_a_batch_that_fails_takes_no_checkpoint(tmp_path: Path) -> None:
    """Rule 28: after a failed batch no checkpoint is written, neither a requested one nor one for an interrupt."""

    class Fail(Callback):
        @on(BatchEnd, TrainingPhase)
        def fail(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            raise ValueError("broken")

    class OnInterrupt(Callback):
        @on(FitBegin)
        def ask(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
            learner.request_checkpoint(tmp_path / "interrupted.ckpt", on_interrupt=True)

    learner = learner_of(OnInterrupt(), Leave(tmp_path / "one.ckpt", signals=True, number=1), Fail())
    with pytest.raises(KeyboardInterrupt) as caught:
        learner.fit(1)
    assert [repr(each) for each in untyped(caught.value).others] == ["ValueError('broken')"]
    learner.flush()
    assert list(tmp_path.iterdir()) == []


def test_rule_28_resumed_twice_in_an_epoch_whose_beginning_draws_random_numbers(tmp_path: Path) -> None:
    """Rule 28: the second checkpoint saves the order that the loader drew after the first checkpoint was restored."""

    class Draw(Callback):
        def state_access(self) -> Access:
            return {"resource.rng": Write()}

        @on(EpochBegin)
        def draw(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
            torch.rand(1)

    whole = learner_of(Draw(), Ask(tmp_path / "one.ckpt", EpochBegin, TrainingPhase, 2))
    whole.fit(3)
    wanted = everything(whole)
    again = learner_of(Draw(), Ask(tmp_path / "two.ckpt", BatchEnd, TrainingPhase, 2), seed=98)
    again.fit(3, resume=tmp_path / "one.ckpt")
    assert everything(again) == wanted
    resumed = learner_of(Draw(), seed=99)
    resumed.fit(3, resume=tmp_path / "two.ckpt")
    assert everything(resumed) == wanted


class Begins(Callback):
    """Draws a number at the beginning of the fit and of each epoch, and counts the epochs that have begun."""

    def __init__(self) -> None:
        self.epochs = 0

    def state_access(self) -> Access:
        return {"resource.rng": Write()}

    @on(FitBegin)
    def draw(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        torch.rand(1)

    @on(EpochBegin, TrainingPhase)
    def begin(self, event: EpochBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        self.epochs += 1
        torch.rand(1)

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epochs = state["epochs"]


@pytest.mark.parametrize("fit", FITS)
def test_rule_28_a_request_at_the_beginning_of_a_fit_that_resumes(fit: str, tmp_path: Path) -> None:
    """Rule 28: at these events the fit is not yet back at its position, so the first checkpoint is saved again."""
    counted = Begins()
    firsts = ask_at(
        [(BatchEnd, TrainingPhase, 8), (BatchEnd, ValidationPhase, 3), (EpochEnd, ValidationPhase, 2)], tmp_path
    )
    whole = learner_of(counted, *firsts)
    whole.fit(**FITS[fit])
    wanted = (everything(whole), counted.epochs)
    (tmp_path / "again").mkdir()
    # In the fits of one kind at one of the places by turns, in the plain ones at all.
    for first in firsts if fit in ("epochs", "steps") else firsts[[*FITS].index(fit) % 3 :][:1]:
        seconds = ask_at([(FitBegin, Phase, 1), (EpochBegin, TrainingPhase, 1)], tmp_path / "again")
        for path, callbacks in ((first.path, seconds), *((second.path, []) for second in seconds)):
            resumed = learner_of(counted := Begins(), *callbacks, seed=99)
            resumed.fit(**FITS[fit], resume=path)
            assert (everything(resumed), counted.epochs) == wanted, (first.place, str(path))


def test_rule_28_a_request_at_the_end_of_a_fit_that_resumes_and_has_nothing_to_train(tmp_path: Path) -> None:
    """A request at `FitEnd` saves the learner, which is back at its position, with the changes of earlier handlers."""

    class Doubles(Callback):
        """Doubles a weight at the end of the fit."""

        def state_access(self) -> Access:
            return {"model": Write()}

        @on(FitEnd)
        def double(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
            learner.model[0].bias.data.fill_(2.0)

    learner_of(Ask(tmp_path / "one.ckpt", EpochEnd, ValidationPhase, 1)).fit(1)
    resumed = learner_of(Doubles(), Ask(tmp_path / "two.ckpt", FitEnd, Phase, 1))
    resumed.fit(1, resume=tmp_path / "one.ckpt")
    assert torch.load(tmp_path / "two.ckpt", weights_only=True)["model"][""]["0.bias"].tolist() == [2.0] * 8


def test_what_was_resumed_from_is_held_until_its_epoch_has_begun(tmp_path: Path) -> None:
    """A checkpoint is as large as the model and its optimizer, so the learner drops it once the epoch has begun."""
    learner_of(Ask(tmp_path / "one.ckpt", BatchEnd, TrainingPhase, 2)).fit(1)
    held: list[bool] = []

    class Look(Callback):
        @on(Event, TrainingPhase)
        def look(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            if isinstance(event, (EpochBegin, BatchEnd)):
                held.append(resumed.loop.checkpoints.resumed is not None)

    resumed = learner_of(Look())
    resumed.fit(1, resume=tmp_path / "one.ckpt")
    assert held == [True, False, False, False]


def test_rule_28_a_fired_event_that_cancels_asks_for_what_holds_all_fired_events(tmp_path: Path) -> None:
    """Rule 28: the checkpoint is written after all fired events, even those that follow the event that requested it."""
    path = tmp_path / "one.ckpt"

    class Asks(Event):
        """Its handler requests a checkpoint and cancels."""

    class Follows(Event):
        """Fired before the cancel, and handled after it."""

    class Fires(Callback):
        def __init__(self) -> None:
            self.followed = 0

        def state_dict(self) -> dict[str, Any]:
            return {"followed": self.followed}

        @on(EpochEnd, TrainingPhase)
        def fire(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
            learner.fire(Asks())
            learner.fire(Follows())

        @on(Asks)
        def ask(self, event: Asks, phase: Phase, learner: LearnerView) -> None:
            learner.request_checkpoint(path)
            raise CancelFittingException("enough")

        @on(Follows)
        def follow(self, event: Follows, phase: Phase, learner: LearnerView) -> None:
            self.followed += 1

    learner = tiny_learner(Fires())
    learner.fit(1)
    assert repr(learner.stopped) == "CancelFittingException('enough')"
    assert torch.load(path, weights_only=True)["callbacks"]["Fires"]["state"] == {"followed": 1}
