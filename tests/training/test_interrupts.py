"""Rule 29: a first signal ends a fit at a batch boundary, a second one at once; signal handlers are restored."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

from flowtrain import (
    BatchBegin,
    BatchEnd,
    Callback,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    LearnerView,
    LossError,
    Phase,
    SerialExecutor,
    TrainingPhase,
    on,
)
from flowtrain.callbacks import Checkpointer
from flowtrain.graph.executor import Mailbox
from flowtrain.testing import tiny_batches, tiny_learner
from flowtrain.training.interrupts import Interrupts
from tests.support.interrupts import interrupted

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Set Python's own handler of Ctrl-C and none of SIGTERM; assert after each test that both are restored."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    after = [signal.getsignal(number) for number in SIGNALS]
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == [signal.default_int_handler, signal.SIG_DFL]


class Interrupt(Callback):
    """Sends a signal at the n-th event of a type, and notes the events that follow."""

    def __init__(self, number: signal.Signals, event: type[Event] = BatchBegin, at: int = 3, times: int = 1) -> None:
        self.number, self.event, self.at, self.times = number, event, at, times
        self.seen = 0
        self.log: list[str] = []

    @on(Event)
    def send(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if isinstance(event, self.event):
            self.seen += 1
            if self.seen == self.at:
                self.log.clear()
                for _ in range(self.times):
                    signal.raise_signal(self.number)
        self.log.append(type(event).__name__)


def test_rule_29_handlers_are_put_back_wherever_it_strikes() -> None:
    """The signal may come before flowtrain's handler of Ctrl-C is set, or while the handlers are restored."""
    numbers = (signal.SIGTERM, signal.SIGCHLD)

    def fit() -> None:
        with Interrupts(Mailbox(), lambda: None, workers=True):
            pass

    fit()  # this makes torch set its handler of SIGCHLD
    before = [signal.getsignal(number) for number in numbers]
    for raised in interrupted(fit, "training/interrupts.py", "contextlib.py"):
        assert raised
        assert [signal.getsignal(number) for number in numbers] == before


def test_rule_29_a_second_signal_leaves_no_context_open() -> None:
    """It may come after a generator has set up its context and before the block begins, or before it is left."""
    opened: list[str] = []
    kept: list[Any] = []  # holds the generator, as the traceback of `learner.stopped` does

    @contextmanager
    def noted() -> Generator[None]:
        try:
            opened.append("opened")
            yield
        finally:
            opened.clear()

    def fit() -> None:
        with Interrupts(Mailbox(), lambda: None, workers=False):
            signal.raise_signal(signal.SIGINT)
            kept[:] = [noted()]
            with kept[0]:
                opened.append("entered")

    for raised in interrupted(fit, "contextlib.py", "training/test_interrupts.py"):
        assert raised
        assert opened == []


@pytest.mark.parametrize("number", SIGNALS)
def test_rule_29_the_batch_is_finished_and_everything_closed(number: signal.Signals) -> None:
    """Rules 16, 17 and 29: the loop stops at the batch boundary, and closes the epoch and the fit with their events."""
    callback = Interrupt(number)
    learner = tiny_learner(callback)
    with pytest.raises(KeyboardInterrupt, match=f"training was interrupted by {number.name}") as caught:
        learner.fit(2)
    assert callback.log == [
        "BatchBegin", "LossBegin", "BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd", "BatchEnd",
        "EpochCancelled", "FitEnd",
    ]  # fmt: skip
    assert learner.stopped is caught.value
    assert caught.value.__notes__ == ["in TrainingPhase, epoch 1, after batch 3"]
    assert learner.cbstate.history[TrainingPhase].steps == 3
    learner.fit(1)  # the interrupt leaves no trace
    assert learner.cbstate.history[TrainingPhase].steps == 19


@pytest.mark.parametrize("number", SIGNALS)
def test_rule_29_a_second_signal_leaves_at_once(number: signal.Signals) -> None:
    """Rule 29: a second signal interrupts even a handler; open scopes are closed all the same."""
    callback = Interrupt(number, times=2)
    with pytest.raises(KeyboardInterrupt, match=f"interrupted by {number.name} for the second time"):
        tiny_learner(callback).fit(2)
    assert callback.log == ["BatchCancelled", "EpochCancelled", "FitEnd"]


def frames(failure: BaseException) -> list[str]:
    """Return the names of the functions in the traceback of an exception, from the test to where it was raised."""
    return [each.name for each in traceback.extract_tb(failure.__traceback__)]


def test_the_traceback_of_an_interrupt_is_short() -> None:
    """An interrupt at a batch boundary has no frame that says where; a second one shows where training was."""
    with pytest.raises(KeyboardInterrupt) as caught:
        tiny_learner(Interrupt(signal.SIGINT)).fit(2)
    assert frames(caught.value)[1:] == ["fit"]
    assert caught.value.__context__ is None
    with pytest.raises(KeyboardInterrupt) as second:
        tiny_learner(Interrupt(signal.SIGINT, times=2)).fit(2)
    assert "send" in frames(second.value)
    assert len(frames(second.value)) > 6


CAPTURES: list[pytest.CaptureFixture[str]] = []
"""The capture of a test. If a callback held it, flowtrain would look for backends in all of pytest, for seconds."""


@pytest.fixture
def capture(capfd: pytest.CaptureFixture[str]) -> Iterator[pytest.CaptureFixture[str]]:
    """Capture the output of the process, for the test and for `Heard`."""
    CAPTURES.append(capfd)
    yield capfd
    CAPTURES.clear()


class Heard(Callback):
    """Sends a signal in the third training batch, notes the answer to it, and the reason in `FitEnd`."""

    def __init__(self, number: signal.Signals, times: int = 1) -> None:
        self.number, self.times, self.seen = number, times, 0
        self.answer = self.stopped = ""

    @on(BatchBegin, TrainingPhase)
    def send(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        self.seen += 1
        if self.seen == 3:
            CAPTURES[0].readouterr()
            try:
                for _ in range(self.times):
                    signal.raise_signal(self.number)
            finally:
                self.answer = CAPTURES[0].readouterr().err

    @on(FitEnd)
    def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        self.stopped = event.stopped


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        (signal.SIGINT, "Ctrl-C: training stops after this batch; press it again to stop at once.\n"),
        (signal.SIGTERM, "SIGTERM: training stops after this batch.\n"),
    ],
)
def test_a_signal_is_answered_at_once_where_a_callback_prints(
    number: signal.Signals, answer: str, capture: pytest.CaptureFixture[str]
) -> None:
    heard = Heard(number)
    with pytest.raises(KeyboardInterrupt):
        tiny_learner(heard, default_callbacks=True).fit(2)
    assert heard.answer == answer, "the answer comes within the batch, and once"
    line = f"training was interrupted by {number.name} (in TrainingPhase, epoch 1, after batch 3)"
    assert (heard.stopped, capture.readouterr().out) == (line, f"{line}\n")
    quiet = Heard(number)
    with pytest.raises(KeyboardInterrupt):
        tiny_learner(quiet).fit(2)
    assert (quiet.answer, quiet.stopped, capture.readouterr()) == ("", line, ("", ""))


def test_the_line_names_the_checkpoint_and_how_to_continue(
    capture: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    heard = Heard(signal.SIGINT)
    learner = tiny_learner(heard, Checkpointer("runs/a"), Checkpointer("runs/b"))
    with pytest.raises(KeyboardInterrupt) as caught:
        learner.fit(2)
    files = Path("runs/a/interrupted.ckpt"), Path("runs/b/interrupted.ckpt")
    note = f"saved in {files[0]} and {files[1]}: fit(..., resume={str(files[0].parent)!r}) continues from there"
    place = "in TrainingPhase, epoch 1, after batch 3"
    assert heard.stopped == f"training was interrupted by SIGINT ({place}; {note})"
    assert caught.value.__notes__ == [place, note]
    resumed = tiny_learner(Checkpointer("runs/a"), Checkpointer("runs/b"))
    resumed.fit(2, resume="runs/a")
    assert resumed.cbstate.history[TrainingPhase].steps == 32
    learner.fit(1)
    assert heard.stopped == "", "a later fit has nothing to say of it"
    again = Heard(signal.SIGINT, times=2)
    with pytest.raises(KeyboardInterrupt):
        tiny_learner(again, Checkpointer("runs/c")).fit(2)
    assert again.stopped.startswith("training was interrupted by SIGINT for the second time (")
    assert "saved" not in again.stopped


@pytest.mark.parametrize(
    ("event", "at", "steps"), [(FitBegin, 1, 0), (EpochEnd, 1, 16), (BatchEnd, 16, 16), (FitEnd, 1, 32)]
)
def test_rule_29_wherever_it_strikes(event: type[Event], at: int, steps: int) -> None:
    """Rule 29: the signal may come between epochs, or after the last batch, whose results must not be lost."""
    callback = Interrupt(signal.SIGINT, event, at)
    learner = tiny_learner(callback, data=tiny_batches())
    with pytest.raises(KeyboardInterrupt):
        learner.fit(2)
    assert learner.cbstate.history[TrainingPhase].steps == steps
    assert callback.log[-1] == "FitEnd"


@pytest.mark.parametrize("at", [1, 3, 16, 20])
def test_rule_29_a_checkpoint_first_and_the_fit_goes_on_from_it(at: int, tmp_path: Path) -> None:
    """Rules 28 and 29: the checkpoint has every trained batch, and a fit can resume from it."""
    whole = tiny_learner(Checkpointer(tmp_path / "other"))
    whole.fit(3)
    learner = tiny_learner(Checkpointer(tmp_path), Interrupt(signal.SIGTERM, BatchEnd, at))
    with pytest.raises(KeyboardInterrupt):
        learner.fit(3)
    assert (tmp_path / "latest").read_text() == "interrupted.ckpt\n"
    resumed = tiny_learner(Checkpointer(tmp_path))
    resumed.fit(3, resume=tmp_path)
    assert torch.equal(resumed.model.coeff, whole.model.coeff)
    assert resumed.cbstate.history == whole.cbstate.history
    for phase, series in whole.cbstate.metrics_epoch.items():
        assert list(resumed.cbstate.metrics_epoch[phase]["Loss"]) == list(series["Loss"])
    assert sorted(each.name for each in tmp_path.glob("*.ckpt")) == [f"epoch-000{n}.ckpt" for n in (1, 2, 3)]


def test_rule_29_every_callback_that_asked_has_its_checkpoint(tmp_path: Path) -> None:
    places = tmp_path / "a", tmp_path / "b"
    learner = tiny_learner(*map(Checkpointer, places), Interrupt(signal.SIGTERM, BatchEnd, 3))
    with pytest.raises(KeyboardInterrupt):
        learner.fit(1)
    for place in places:
        resumed = tiny_learner(*map(Checkpointer, places))
        resumed.fit(1, resume=place)
        assert resumed.cbstate.history[TrainingPhase].steps == 16


def test_rule_29_interrupted_again_before_the_fit_has_got_back(tmp_path: Path) -> None:
    """Rule 28: handlers of `EpochBegin` run again on resume; the second interrupt's checkpoint has no trace of that."""

    class Begun(Callback):
        """Counts the epochs that begin."""

        def __init__(self) -> None:
            self.begun = 0

        @on(EpochBegin, TrainingPhase)
        def count(self, event: EpochBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            self.begun += 1

        def state_dict(self) -> dict[str, Any]:
            return {"begun": self.begun}

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.begun = state["begun"]

    whole = tiny_learner(Checkpointer(tmp_path / "whole"), Begun())
    whole.fit(2)
    with pytest.raises(KeyboardInterrupt):
        tiny_learner(Checkpointer(tmp_path), Begun(), Interrupt(signal.SIGTERM, BatchEnd, 19)).fit(2)
    for event in (EpochBegin, FitBegin):
        again = tiny_learner(Checkpointer(tmp_path), Begun(), Interrupt(signal.SIGTERM, event, 1))
        with pytest.raises(KeyboardInterrupt):
            again.fit(2, resume=tmp_path)
    begun = Begun()
    resumed = tiny_learner(Checkpointer(tmp_path), begun)
    resumed.fit(2, resume=tmp_path)
    assert begun.begun == 2
    assert torch.equal(resumed.model.coeff, whole.model.coeff)
    assert resumed.cbstate.history == whole.cbstate.history


class Draws:
    """A loader that draws two numbers for its order; a signal ends it between them, when it begins its n-th pass."""

    def __init__(self, fails_at: int) -> None:
        self.passes, self.fails_at = 0, fails_at
        self.generator = torch.Generator().manual_seed(1)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.passes += 1
        shift = torch.rand(()) + torch.rand((), generator=self.generator)
        if self.passes == self.fails_at:
            signal.raise_signal(signal.SIGTERM)
            raise RuntimeError("a worker was killed while it was started")
        shift += torch.rand(())
        for _ in range(4):
            x = 0.05 * (torch.rand(4, 1, generator=self.generator) + shift)
            yield x, 3 * x


@pytest.mark.parametrize("at", [1, 2])
def test_rule_29_a_loader_that_fails_before_its_first_batch_begins_the_epoch_again(at: int, tmp_path: Path) -> None:
    """It may have drawn a part of its numbers then; the checkpoint has those from before."""

    def run(fails_at: int = 0, resume: Path | None = None) -> list[Any]:
        torch.manual_seed(0 if resume is None else 9)
        model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        learner = tiny_learner(Checkpointer(tmp_path), model=model, data=Draws(fails_at), default_callbacks="quiet")
        learner.fit(3, resume=resume)
        return [*(each.tolist() for each in model.parameters()), torch.rand(()).item()]

    with pytest.raises(KeyboardInterrupt):
        run(at)
    assert (tmp_path / "latest").read_text() == "interrupted.ckpt\n"
    found = run(resume=tmp_path)
    for each in tmp_path.iterdir():
        each.unlink()
    assert found == run()


def test_a_checkpoint_that_cannot_be_taken_does_not_hold_up_the_interrupt(tmp_path: Path) -> None:
    class Odd(Callback):
        asked = 0

        def state_dict(self) -> dict[str, Any]:
            self.asked += 1
            return {"thread": threading.current_thread()} if self.asked > 1 else {}  # not at the beginning of the fit

    with pytest.raises(KeyboardInterrupt) as caught:
        tiny_learner(Checkpointer(tmp_path), Odd(), Interrupt(signal.SIGINT)).fit(1)
    told = "the checkpoint for it could not be taken: CheckpointError: Odd.state_dict()"
    assert any(told in note for note in caught.value.__notes__)


def test_rule_29_deferred_work_is_finished_and_knows_why() -> None:
    """Rule 29: the executor is flushed after the fit is closed, and its site says that training is stopping."""
    told: list[tuple[str, bool]] = []

    class Watching(SerialExecutor):
        def flush(self) -> None:
            assert self._site is not None
            told.append(("flush", self._site.mailbox.stopping))

    learner = tiny_learner(Interrupt(signal.SIGINT), executor=Watching())
    with pytest.raises(KeyboardInterrupt):
        learner.fit(1)
    learner.flush()
    assert told == [("flush", True), ("flush", False)]


def test_handlers_are_there_only_in_fit_and_ignored_signals_stay_ignored() -> None:
    found: list[Any] = []

    class Look(Callback):
        @on(BatchEnd, TrainingPhase)
        def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            found.append([signal.getsignal(number) for number in SIGNALS])

    learner = tiny_learner(Look(), n_batches=1)
    learner.fit(1)
    learner.epoch(TrainingPhase)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    learner.fit(1)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)
    ours, own, ignoring = found
    assert not {signal.default_int_handler, signal.SIG_DFL} & set(ours)
    assert own == [signal.default_int_handler, signal.SIG_DFL]
    assert ignoring[0] is signal.SIG_IGN
    assert ignoring[1] is not signal.SIG_DFL


def test_a_handler_of_the_users_is_put_back_after_a_failure_too() -> None:
    def mine(number: int, frame: FrameType | None) -> None: ...

    signal.signal(signal.SIGTERM, mine)
    with pytest.raises(LossError, match="broken"):
        tiny_learner(lossfn=_broken).fit(1)
    assert signal.getsignal(signal.SIGTERM) is mine
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _broken(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    raise ValueError("broken")


def test_another_thread_trains_without_handlers() -> None:
    """Rule 29: Python allows signal handlers in the main thread only."""
    failures: list[BaseException] = []
    learner = tiny_learner()

    def train() -> None:
        try:
            learner.fit(1)
        except BaseException as failure:  # the test shows it below
            failures.append(failure)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert failures == []
    assert learner.cbstate.history[TrainingPhase].epochs == 1
