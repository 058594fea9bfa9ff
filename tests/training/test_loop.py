"""The loop: every Begin gets one End or Cancelled, whatever exception is raised at whatever place (rules 15 to 18)."""

from __future__ import annotations

import linecache
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import (
    AbstractValidationPhase,
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    DataError,
    EpochBegin,
    EpochCancelled,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    Learner,
    LearnerView,
    LossBegin,
    Phase,
    Read,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import CustomCallback
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.examples import examples
from tests.support.fired import Raise, Watch, short, watched
from tests.support.phases import OwnPhase
from tests.support.untyped import untyped

Script = Mapping[int, str]

SUPERVISED: list[type[Event]] = [BatchBegin, LossBegin, BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd]
EVALUATED: list[type[Event]] = [BatchBegin, LossBegin, BatchEnd]
OWN: list[type[Event]] = [BatchBegin, BackwardBegin, BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd]


class Ping(Event):
    """An event that handlers fire."""


@dataclass
class Fired:
    """An event that was handled, and the actions of its handlers."""

    event: Event
    phase: Phase
    did: list[str] = field(default_factory=list)


class Record(Callback):
    """Writes down every event."""

    def __init__(self) -> None:
        self.log: list[Fired] = []

    @on(Event)
    def note(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.log.append(Fired(event, phase))

    @property
    def names(self) -> list[str]:
        return [type(fired.event).__name__ for fired in self.log]


RAISE: dict[str, Callable[[], BaseException]] = {
    "batch": lambda: CancelBatchException("script"),
    "epoch": lambda: CancelEpochException("script"),
    "fit": lambda: CancelFittingException("script"),
    "error": lambda: ValueError("script"),
    "interrupt": lambda: KeyboardInterrupt("script"),
}


class Actor(Callback):
    """Does at the n-th event what the script says for n."""

    def __init__(self, watch: Record, script: Script) -> None:
        self.watch, self.script = watch, script

    @on(Event)
    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        action = self.script.get(len(self.watch.log) - 1)
        if action is None:
            return
        self.watch.log[-1].did.append(action)
        if action == "fire":
            learner.fire(Ping())
        else:
            raise RAISE[action]()


class Automaton:
    """Derives from the rules alone which event must come next.

    It follows a fit of `epochs` rounds over `phases`, each a list of the events of a batch, with `n_batches` batches;
    or one direct epoch (no fit), or one direct step (no epoch either).
    """

    SEVERITY = ("", "batch", "epoch", "fit", "error")

    def __init__(self, kind: str, phases: list[list[type[Event]]], epochs: int, n_batches: int) -> None:
        self.kind, self.n_batches = kind, n_batches
        self.todo = phases * epochs if kind == "fit" else phases[:1]
        self.fit = self.epoch = self.batch = "closed"
        self.batches = 0
        self.place = -1
        self.pings = 0
        self.pending = ""
        self.ended = ""

    def scope_open(self, action: str) -> bool:
        if action == "fit":
            return self.fit != "closing"
        return {"batch": self.batch, "epoch": self.epoch}.get(action, "open") == "open"

    def take(self, fired: Fired) -> None:
        """Take an event that was fired, with the actions of its handlers."""
        self.enter(type(fired.event))
        raised = [action for action in fired.did if action != "fire" and self.scope_open(action)]
        for action in raised:
            severity = "error" if action == "interrupt" else action
            self.pending = max(self.pending, severity, key=self.SEVERITY.index)
        if "interrupt" in raised:
            self.pings = 0
        elif not raised:
            self.pings += fired.did.count("fire")

    def enter(self, event: type[Event]) -> None:
        if event is Ping:
            self.pings -= 1
        elif event is FitBegin:
            self.fit = "open"
        elif event is FitEnd:
            self.fit = "closing"
        elif event is EpochBegin:
            self.epoch, self.batches = "open", 0
        elif event in (EpochEnd, EpochCancelled):
            self.epoch = "closing"
        elif event is BatchBegin:
            self.batch, self.place = "open", 0
            self.batches += 1
        elif event in (BatchEnd, BatchCancelled):
            self.batch = "closing"
        else:
            self.place = self.todo[0].index(event)

    def expected(self) -> type[Event] | None:
        """Return the type of the event that must come next, or ``None`` if training is over."""
        if self.pings:
            return Ping
        if self.batch == "open":
            events = self.todo[0]
            return BatchCancelled if self.pending else events[self.place + 1]
        self.batch = "closed"
        if self.pending == "batch":
            self.pending = ""
        if self.kind == "step":
            return BatchBegin if not self.batches and not self.pending else None
        if self.epoch == "open":
            if self.pending:
                return EpochEnd if self.pending == "epoch" else EpochCancelled
            return BatchBegin if self.batches < self.n_batches else EpochEnd
        if self.epoch == "closing":
            self.epoch = "closed"
            self.todo = self.todo[1:]
        if self.pending == "epoch":
            self.pending = ""
        if self.kind == "epoch":
            return EpochBegin if self.todo and not self.pending else None
        if self.fit == "open":
            return EpochBegin if self.todo and not self.pending else FitEnd
        if self.fit == "closing":
            self.fit = "closed"
            return None
        return FitBegin


def run(kind: str, phase: type[Phase], events: list[type[Event]], *scripts: Script) -> None:
    """Run a fit, an epoch or a step with actors that follow the scripts; compare the fired events with the rules."""
    watch = Record()
    data = {phase: tiny_batches(n_batches=2), ValidationPhase: tiny_batches(n_batches=2)}
    actors = [Actor(watch, script) for script in scripts]
    learner = tiny_learner(watch, *actors, data=data, default_callbacks=False)
    raised: BaseException | None = None
    try:
        if kind == "fit":
            learner.fit(2)
        elif kind == "epoch":
            learner.epoch(phase)
        else:
            learner.step(phase, data[phase][0])
    except (ValueError, CancelFittingException, KeyboardInterrupt) as failure:
        raised = failure

    automaton = Automaton(kind, [events, EVALUATED], 2, 2)
    for number, fired in enumerate(watch.log):
        expected = automaton.expected()
        assert type(fired.event) is expected, f"event {number} of {watch.names}, after {watch.log[:number]}"
        automaton.take(fired)
    assert automaton.expected() is None, f"more must be fired after {watch.names}"

    did = [action for fired in watch.log for action in fired.did]
    if "interrupt" in did:
        assert isinstance(raised, KeyboardInterrupt)
    elif automaton.pending == "error":
        assert isinstance(raised, ValueError)
    elif automaton.pending == "fit" and kind != "fit":
        assert isinstance(raised, CancelFittingException)
    else:
        assert raised is None
    if kind == "fit":
        stopped = raised if automaton.pending != "fit" else learner.stopped
        assert learner.stopped is stopped
        assert isinstance(learner.stopped, CancelFittingException) is (automaton.pending == "fit")
    assert learner.model.training
    assert torch.is_grad_enabled()
    # The failures leave no trace: the same learner can train again.
    for actor in actors:
        actor.script = {}
    watch.log.clear()
    learner.fit(1)
    assert watch.names == names_of_a_fit([events, EVALUATED], 2)


def names_of_a_fit(phases: Iterable[list[type[Event]]], n_batches: int) -> list[str]:
    fired: list[type[Event]] = [FitBegin]
    for events in phases:
        fired += [EpochBegin, *events * n_batches, EpochEnd]
    fired.append(FitEnd)
    return [event.__name__ for event in fired]


SCRIPTS = st.dictionaries(st.integers(0, 55), st.sampled_from(["fire", *RAISE]), max_size=7)
EARLY = st.dictionaries(st.integers(0, 20), st.sampled_from(["fire", *RAISE]), max_size=5)
QUICK = settings(max_examples=examples(60), suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(SCRIPTS, SCRIPTS)
def test_every_begin_gets_one_end_or_cancelled_in_a_fit(one: Script, other: Script) -> None:
    """Rule 16."""
    run("fit", TrainingPhase, SUPERVISED, one, other)


@QUICK
@given(SCRIPTS, EARLY)
def test_every_begin_gets_one_end_or_cancelled_with_a_step_of_ones_own(one: Script, other: Script) -> None:
    """Rule 16, for a phase that uses `run_batch`, `backward` and `update`."""
    run("fit", OwnPhase, OWN, one, other)


@QUICK
@given(EARLY, EARLY)
def test_every_begin_gets_one_end_or_cancelled_in_a_direct_epoch(one: Script, other: Script) -> None:
    """Rule 16: `epoch` called directly lets `CancelFittingException` through."""
    run("epoch", TrainingPhase, SUPERVISED, one, other)


@QUICK
@given(EARLY, EARLY)
def test_every_begin_gets_one_end_or_cancelled_in_a_direct_step(one: Script, other: Script) -> None:
    run("step", OwnPhase, OWN, one, other)


# --- rule 16, sentence by sentence


@pytest.mark.parametrize(
    ("event", "exception", "fired"),
    [
        # a cancelled batch fires BatchCancelled, and the next one follows
        (BatchBegin, CancelBatchException(), "F( E( B( Bx B( B) E) F)"),
        (UpdateEnd, CancelBatchException(), "F( E( B( Bx B( B) E) F)"),
        # a cancelled epoch closes an open batch first, then fires EpochEnd
        (BackwardEnd, CancelEpochException(), "F( E( B( Bx E) F)"),
        (EpochBegin, CancelEpochException(), "F( E( E) F)"),
        # CancelFittingException closes batch, epoch and fit
        (LossBegin, CancelFittingException(), "F( E( B( Bx Ex F)"),
        (EpochBegin, CancelFittingException(), "F( E( Ex F)"),
        (FitBegin, CancelFittingException(), "F( F)"),
        # a cancel raised inside an End or Cancelled event takes effect after it, and fires nothing more for that scope
        (BatchEnd, CancelBatchException(), "F( E( B( B) B( B) E) F)"),
        (BatchEnd, CancelEpochException(), "F( E( B( B) E) F)"),
        (BatchEnd, CancelFittingException(), "F( E( B( B) Ex F)"),
        (EpochEnd, CancelEpochException(), "F( E( B( B) B( B) E) F)"),
        (EpochEnd, CancelFittingException(), "F( E( B( B) B( B) E) F)"),
        (FitEnd, CancelFittingException(), "F( E( B( B) B( B) E) F)"),
        # a cancel whose scope is not open has no effect
        (EpochBegin, CancelBatchException(), "F( E( B( B) B( B) E) F)"),
        (EpochEnd, CancelBatchException(), "F( E( B( B) B( B) E) F)"),
        (FitBegin, CancelEpochException(), "F( E( B( B) B( B) E) F)"),
        (FitEnd, CancelBatchException(), "F( E( B( B) B( B) E) F)"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None if isinstance(value, str) else repr(value),
)
def test_cancels(event: type[Event], exception: Exception, fired: str) -> None:
    """Rule 16: `fit` returns normally after each of these cancels."""
    watch, learner = watched(Raise(event, exception))
    learner.fit(1)
    assert short(watch.names) == fired
    ends_fit = isinstance(exception, CancelFittingException) and event is not FitEnd
    assert learner.stopped is (exception if ends_fit else None)


@pytest.mark.parametrize(
    ("event", "fired"),
    [
        (FitBegin, "F( F)"),
        (EpochBegin, "F( E( Ex F)"),
        (BackwardBegin, "F( E( B( Bx Ex F)"),
        (BatchEnd, "F( E( B( B) Ex F)"),
        (EpochEnd, "F( E( B( B) B( B) E) F)"),
        (FitEnd, "F( E( B( B) B( B) E) F)"),
    ],
)
@pytest.mark.parametrize("exception", [ValueError("broken"), KeyboardInterrupt("stop"), SystemExit(2)], ids=repr)
def test_errors_and_interrupts_close_everything(event: type[Event], fired: str, exception: BaseException) -> None:
    """Rule 16: an error closes the batch, the epoch and the fit, and is raised to the caller."""
    watch, learner = watched(Raise(event, exception))
    with pytest.raises(type(exception)) as raised:
        learner.fit(1)
    assert raised.value is learner.stopped is exception
    assert short(watch.names) == fired


def test_cancelled_events_can_be_cancelled_further() -> None:
    watch, learner = watched(
        Raise(LossBegin, CancelBatchException("first")), Raise(BatchCancelled, CancelEpochException("second"))
    )
    learner.fit(2)
    assert short(watch.names) == "F( E( B( Bx E) E( B( B) B( B) E) F)"


def test_an_error_after_a_cancel_is_what_counts() -> None:
    """Rule 15: an error counts before a cancel, even if it came later; all other exceptions are attached to it."""
    cancel, error = CancelFittingException("first"), ValueError("later")
    watch, learner = watched(Raise(LossBegin, cancel), Raise(EpochCancelled, error))
    with pytest.raises(ValueError, match="later") as raised:
        learner.fit(1)
    assert untyped(raised.value).others == (cancel,)
    assert "also raised: CancelFittingException: first" in raised.value.__notes__
    assert short(watch.names) == "F( E( B( Bx Ex F)"


def test_a_direct_epoch_lets_the_cancel_of_a_fit_through() -> None:
    """Rule 16: outside of a fit, an exception that cancels the fit reaches the caller."""
    watch, learner = watched(Raise(BatchEnd, CancelFittingException("enough")))
    with pytest.raises(CancelFittingException, match="enough"):
        learner.epoch(TrainingPhase)
    assert short(watch.names) == "E( B( B) Ex"
    assert learner.stopped is None


def test_a_direct_step() -> None:
    """Rule 16: a direct step has no epoch to cancel, and returns the batch state of a cancelled batch as it is."""
    raw = tiny_batches(n_batches=1)[0]
    watch, learner = watched(Raise(LossBegin, CancelEpochException()))
    assert list(vars(learner.step(TrainingPhase, raw))) == ["inputs", "targets", "outputs", "loss", "grads"]
    assert short(watch.names) == "B( B)"
    watch, learner = watched(Raise(LossBegin, CancelBatchException()))
    assert list(vars(learner.step(TrainingPhase, raw))) == ["inputs", "targets", "outputs"]
    assert short(watch.names) == "B( Bx"


def test_a_cancel_after_backward_begin_discards_the_gradients() -> None:
    """Rule 16: NaN gradients of a cancelled batch do not reach the next update."""
    poisoned = tiny_batches(n_batches=3)
    poisoned[1] = (poisoned[1][0] * float("nan"), poisoned[1][1])

    def skip(view: LearnerView) -> None:
        if view.batch.loss.isnan():
            raise CancelBatchException("NaN")

    guard = CustomCallback(skip, BackwardEnd, TrainingPhase, {"batch.loss": Read()})
    _, learner = watched(guard, data=poisoned)
    learner.fit(1)
    _, other = watched(data=[poisoned[0], poisoned[2]])
    other.fit(1)
    assert torch.equal(learner.model.coeff, other.model.coeff)


def test_at_epoch_end_the_batch_is_the_last_completed_one() -> None:
    seen: dict[str, list[str]] = {}

    class Look(Callback):
        def state_access(self) -> dict[str, Read]:
            return {"batch": Read()}

        @on(Event)
        def look(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            inputs = getattr(learner.batch, "inputs", None)
            same = (str(i) for i, (x, _) in enumerate(data) if inputs is not None and torch.equal(inputs.cpu(), x))
            number = next(same, "none")
            seen.setdefault(type(event).__name__, []).append(number)

    data = tiny_batches(n_batches=3)
    look = Look()
    _, learner = watched(look, Raise(LossBegin, CancelBatchException(), 3), data=data)
    learner.fit(2)
    assert seen["EpochEnd"] == ["1", "2"], "batch 2 of the first epoch was cancelled"
    assert seen["BatchCancelled"] == ["2"]
    assert seen["EpochBegin"] == ["none", "none"], "at EpochBegin there is no batch yet"
    assert seen["FitBegin"] == ["none"]
    assert seen["FitEnd"] == ["2"]
    seen.clear()
    _, learner = watched(Look(), Raise(BatchBegin, CancelEpochException()), data=data)
    learner.fit(1)
    assert seen["EpochEnd"] == ["none"], "no batch was completed"


# --- exceptions of the loader, the model and the step, which no handler raises


def test_a_loader_that_raises_midway_cancels_the_epoch() -> None:
    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield from tiny_batches(n_batches=2)
            raise OSError("disk gone")

    watch, learner = watched(data=Loader())
    with pytest.raises(OSError, match="disk gone"):
        learner.fit(1)
    assert short(watch.names) == "F( E( B( B) B( B) Ex F)"
    assert learner.model.training
    learner.fit(1, data=tiny_batches(n_batches=1))
    assert short(watch.names).endswith("F( E( B( B) E) F)")


def test_a_phase_whose_mode_fails_leaves_the_learner_usable() -> None:
    class Broken(TrainingPhase):
        def mode(self, modules: Any) -> Any:
            raise ValueError("no mode")

    watch, learner = watched()
    with pytest.raises(ValueError, match="no mode"):
        learner.fit(1, data={Broken: tiny_batches(n_batches=1)})
    assert short(watch.names) == "F( F)", "the epoch never began"
    learner.fit(1)


# --- rule 17


def test_fit_end_runs_for_every_callback_whatever_failed() -> None:
    """Rule 17: also for callbacks that depend on a failed one; the first error is raised with the others attached."""
    closed: list[str] = []

    class First(Callback):
        @on(FitEnd)
        def close(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
            closed.append("First")
            raise OSError("first cannot close")

    class Second(Callback):
        def run_after(self) -> tuple[type[Callback], ...]:
            return (First,)

        @on(FitEnd)
        def close(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
            closed.append("Second")
            raise LookupError("second neither")

    class Third(Second):
        @on(FitEnd)
        def close(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
            closed.append("Third")

    batch_error, epoch_error = ValueError("in the batch"), TypeError("in the epoch")
    _, learner = watched(Third(), Second(), First(), Raise(LossBegin, batch_error), Raise(EpochCancelled, epoch_error))
    with pytest.raises(ValueError, match="in the batch") as raised:
        learner.fit(1)
    assert closed == ["First", "Third", "Second"]
    assert raised.value is learner.stopped is batch_error
    others = untyped(raised.value).others
    wanted = ["TypeError('in the epoch')", "OSError('first cannot close')", "LookupError('second neither')"]
    assert [repr(other) for other in others] == wanted
    notes = [note for note in raised.value.__notes__ if note.startswith("also raised: ")]
    assert notes == [f"also raised: {type(other).__name__}: {other}" for other in others]


# --- rule 18


TRAINING = "Training is already running. In a handler raise CancelBatchException, CancelEpochException or"


CALLS: dict[str, tuple[Callable[[Learner], object], str]] = {
    "fit": (lambda learner: learner.fit(1), "fit()"),
    "epoch": (lambda learner: learner.epoch(ValidationPhase), "epoch()"),
    "step": (lambda learner: learner.step(TrainingPhase, None), "step()"),
    "validate": (lambda learner: learner.validate(), "validate()"),
    "set": (lambda learner: learner.set_callbacks([]), "Changing the callbacks"),
    "add": (lambda learner: learner.add_callback(Watch()), "Changing the callbacks"),
    "remove": (lambda learner: learner.remove_callback(Watch), "Changing the callbacks"),
    "replace": (lambda learner: learner.replace_callback(Watch()), "Changing the callbacks"),
}


@pytest.mark.parametrize(("call", "what"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("event", [FitBegin, EpochBegin, LossBegin, BatchEnd, EpochEnd, FitEnd, Ping])
def test_training_inside_a_handler_is_refused(call: Callable[[Learner], object], what: str, event: type[Event]) -> None:
    """Rule 18: even if the handler has the learner itself and not only its view."""
    captured: list[Learner] = []
    inside = CustomCallback(lambda view: call(captured[0]), event)
    watch, learner = watched(inside, n_batches=1)
    captured.append(learner)
    with pytest.raises(UsageError) as raised:
        learner.fit(1) if event is not Ping else learner.fire(Ping(), TrainingPhase())
    assert str(raised.value).startswith(f"{what} was called inside ")
    assert TRAINING in str(raised.value)
    assert len(learner.callbacks) == 2
    untyped(learner.get_callback(CustomCallback)).f = lambda view: None
    watch.log.clear()
    learner.fit(1)
    assert watch.names == names_of_a_fit([SUPERVISED], 1)


@pytest.mark.parametrize("direct", [False, True])
def test_training_inside_a_step_is_an_error(direct: bool) -> None:
    """Rule 18: a step is part of a running loop, so it cannot start another one."""

    class Delegating(AbstractValidationPhase):
        def step(self, learner: Any, raw: Any) -> None:
            learner.step(ValidationPhase, raw)

    _, learner = watched()
    with pytest.raises(UsageError, match=r"^step\(\) was called inside .*, from a handler or a step. Training is alr"):
        learner.step(Delegating, None) if direct else learner.epoch(Delegating, [1])
    learner.fit(1)


@pytest.mark.parametrize("name", ["fit", "epoch", "step", "validate", "run_batch"])
def test_a_view_says_that_the_loop_is_running(name: str) -> None:
    _, learner = watched(CustomCallback(lambda view: getattr(view, name)(), BatchEnd))
    with pytest.raises(UsageError, match=rf"CustomCallback calls learner.{name}\(\) in a handler, but the"):
        learner.fit(1)


# --- counting


def test_fit_by_steps_with_an_epoch_that_is_cancelled_before_its_first_batch() -> None:
    """An epoch that is cancelled before its first batch counts as run; otherwise the fit would never end."""
    watch, learner = watched(*(Raise(EpochBegin, CancelEpochException(), nth) for nth in range(1, 9)), n_batches=2)
    learner.fit(steps=4, validate_every=2)
    assert short(watch.names) == "F( E( E) E( E) F)"


def test_a_fit_by_steps_that_ends_within_a_pass_ends_the_workers_of_its_loader() -> None:
    data = DataLoader(TensorDataset(*map(torch.cat, zip(*tiny_batches(), strict=True))), batch_size=4, num_workers=1)
    learner = tiny_learner(data=data)
    learner.fit(steps=3, validate_every=2)
    assert not multiprocessing.active_children()


def test_cancelled_batches_are_steps_too() -> None:
    watch, learner = watched(*(Raise(LossBegin, CancelBatchException(), nth) for nth in range(1, 9)), n_batches=2)
    learner.fit(steps=3)
    assert short(watch.names) == "F( E( B( Bx B( Bx E) E( B( Bx E) F)"


def test_an_epoch_over_an_empty_iterator_is_cancelled() -> None:
    watch, learner = watched(data=iter(tiny_batches(n_batches=1)))
    learner.fit(1)
    with pytest.raises(DataError, match="is an iterator, used up after one pass"):
        learner.fit(1)
    assert short(watch.names) == "F( E( B( B) E) F) F( E( Ex F)"


@pytest.mark.parametrize("whole", [True, False])
def test_a_learner_is_of_use_after_an_interrupt_anywhere(whole: bool) -> None:
    """After a second signal at any line of the loop or of a step, no scope is open and the learner can train again."""
    learner = tiny_learner(data=tiny_batches(n_batches=1))

    def run() -> None:
        if whole:
            learner.fit(1)
        else:
            learner.epoch(TrainingPhase)

    run()
    struck = set[tuple[str, int]]()
    for line in range(1, 1000):
        hit = _interrupt(line, run)
        if hit is None:
            break
        struck.add(hit)
        run()
    assert len(struck) > 60
    assert {file.rpartition("/")[2] for file, _ in struck} == {"loop.py", "step.py"}


def _interrupt(nth: int, run: Callable[[], None]) -> tuple[str, int] | None:
    """Raise at the n-th line that runs in the loop or a step, except in code that closes scopes; return that line."""
    at, left = None, nth
    modules = ("flowtrain.training.loop", "flowtrain.training.step")

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        return strike if frame.f_globals.get("__name__") in modules else None

    def strike(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal at, left
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        clears_up = "self.scopes.close" in line
        if event == "line" and not clears_up:
            left -= 1
            if left == 0:
                at = frame.f_code.co_filename, frame.f_lineno
                sys.settrace(None)
                raise KeyboardInterrupt
        return strike

    before, handlers = sys.gettrace(), [(each, signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)]
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
        # The line of a `with` also comes before its context is left, where Python looks for no signal. An exception
        # there skips the exit, which puts the handlers of signals back.
        for number, handler in handlers:
            signal.signal(number, handler)
    return at
