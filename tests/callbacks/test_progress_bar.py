"""ProgressBar on an emulated terminal: the lines that a person sees during training and after it."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import random
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec

import pytest
import rich
import torch

from flowtrain import (
    Access,
    BatchBegin,
    BatchEnd,
    Callback,
    CancelEpochException,
    CancelFittingException,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    Learner,
    LearnerView,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import (
    Checkpointer,
    EarlyStopping,
    Metric,
    Metrics,
    MetricsPrinter,
    ProgressBar,
    Recorder,
)
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.clock import Clock, Tick
from tests.support.console import printed
from tests.support.terminal import Terminal

P = ParamSpec("P")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """Return a terminal for tests under `on_terminal`."""
    terminal = Terminal()
    console = rich.get_console()
    before = dict(console.__dict__)
    rich.reconfigure(force_terminal=True, width=70, height=8, _environ={})
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    yield terminal
    console.__dict__ = before


def on_terminal(test: Callable[P, None]) -> Callable[P, None]:
    """Run a test with the terminal as standard output and error; pytest would replace them if a fixture set them."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        terminal = kwargs["terminal"]
        assert isinstance(terminal, Terminal)
        with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
            test(*args, **kwargs)
            assert sys.stdout is sys.stderr is terminal  # the bar has replaced no stream

    return run


@pytest.fixture
def plain() -> Iterator[io.StringIO]:
    """Return the output of rich's console as a file."""
    with printed(70) as written:
        yield written


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("time.monotonic", clock)
    return clock


class At(Callback):
    """Calls a function with the number of completed batches, after the bar was drawn."""

    def __init__(self, event_type: type[Event], f: Callable[[int], Any], phase_type: type[Phase] = Phase) -> None:
        self.event_type, self.f, self.phase_type = event_type, f, phase_type
        self.count = 0

    def run_after(self) -> tuple[type[Callback], ...]:
        return (ProgressBar,)

    @on(Event)
    def call(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if isinstance(event, self.event_type) and isinstance(phase, self.phase_type):
            self.count += 1
            self.f(self.count)


def showing(*callbacks: Callback, redraw: float = 0.0, n_batches: int = 5, **kwargs: Any) -> Learner:
    """Return a learner with a bar that is redrawn at every batch."""
    return tiny_learner(*callbacks, ProgressBar(redraw=redraw), n_batches=n_batches, **kwargs)


# --- on a terminal


@pytest.mark.cpu_only("on the CPU the bar shows the loss of the same batch")
@on_terminal
def test_the_bar_shows_phase_epoch_batches_and_loss(terminal: Terminal) -> None:
    seen: list[str] = []
    learner = showing(At(BatchEnd, lambda count: seen.append(terminal.last)), n_batches=2)
    learner.fit(2)
    losses: dict[type[Phase], list[float]] = {
        phase: [value for _, value in learner.cbstate.metrics_step[phase]["Loss"]]
        for phase in (TrainingPhase, ValidationPhase)
    }
    phases: tuple[type[Phase], ...] = (TrainingPhase, ValidationPhase)
    order = [(phase, epoch) for epoch in (1, 2) for phase in phases]
    expected = [
        (f"{phase.__name__} epoch {epoch}/2 ", f" {batch}/2 Loss {losses[phase][2 * epoch + batch - 3]:.4g} ")
        for phase, epoch in order
        for batch in (1, 2)
    ]
    assert len(seen) == len(expected)
    for line, (start, end) in zip(seen, expected, strict=True):
        assert line.startswith(start)
        assert end in line
        assert "━" in line
    terminal.assert_clean()
    assert terminal.above(0) == []


@on_terminal
def test_what_is_printed_goes_above_and_stays_whole(terminal: Terminal) -> None:
    """Output by print, older streams, older logging handlers, warnings, in partial lines and in long lines."""
    stream = sys.stderr
    log = logging.Logger("progress")
    log.addHandler(logging.StreamHandler())
    printed = ["$ python train.py"]
    print(printed[0])

    def above() -> list[str]:
        return [line for line in terminal.above(1) if not line.startswith("epoch   1")]  # the line of MetricsPrinter

    def write(count: int) -> None:
        assert "━" in terminal.last
        assert above() == printed
        print("print", count)
        printed.append(f"print {count}")
        stream.write(f"stderr {count}\n")
        log.warning("log %d", count)
        printed.extend((f"stderr {count}", f"log {count}"))
        sys.stderr.write(warnings.formatwarning("careful", UserWarning, "train.py", count, line="f()"))
        printed.extend((f"train.py:{count}: UserWarning: careful", "  f()"))
        print("x" * 100)
        printed.extend(("x" * 70, "x" * 30))
        print("parts", end="")
        assert above() == [*printed, "parts"]

    def finish(count: int) -> None:
        if printed[-1] == "x" * 30:  # the bar was drawn again in between
            assert above() == [*printed, "parts"]
            print(" of a line")
            printed.append("parts of a line")

    learner = showing(At(BatchEnd, write), At(BatchBegin, finish), At(EpochEnd, finish), MetricsPrinter(), n_batches=3)
    learner.fit(1)
    print("$")
    printed.append("$")
    assert above() == printed
    assert [line[:30] for line in terminal.above(0) if line not in printed] == [
        "epoch   1  TrainingPhase     L",
        "epoch   1  ValidationPhase   L",
    ]
    terminal.assert_clean()


@pytest.mark.parametrize("line", range(0, 12, 2))
@on_terminal
def test_the_bar_finds_its_place_wherever_the_cursor_is(terminal: Terminal, line: int) -> None:
    before = [f"line {number}" for number in range(line)]
    for text in before:
        print(text)
    print("prompt>", end="")
    seen: list[str] = []
    showing(At(BatchEnd, lambda count: seen.append(terminal.last))).fit(1)
    assert all("━" in line for line in seen)
    assert terminal.above(0) == [*before, "prompt>"]
    print("next")
    assert terminal.above(0) == [*before, "prompt>next"]
    terminal.assert_clean()


@on_terminal
def test_one_bar_for_each_fit(terminal: Terminal) -> None:
    learner = showing()
    learner.fit(3)
    assert terminal.written.count("\x1b[1;7r") == terminal.written.count("\x1b[r") == 1
    learner.fit(1)
    assert terminal.written.count("\x1b[1;7r") == terminal.written.count("\x1b[r") == 2
    terminal.assert_clean()


@on_terminal
def test_the_epochs_of_a_second_fit_go_on(terminal: Terminal) -> None:
    seen: list[str] = []
    learner = showing(At(EpochBegin, lambda count: seen.append(terminal.last), TrainingPhase))
    learner.fit(2)
    learner.fit(3)
    titles = [line.split(" ━")[0] for line in seen]
    assert titles == [f"TrainingPhase epoch {epoch}" for epoch in ("1/2", "2/2", "3/5", "4/5", "5/5")]


@pytest.mark.cpu_only("on the CPU the bar shows the loss of the same batch")
@on_terminal
def test_an_unknown_length(terminal: Terminal) -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return iter(tiny_batches(n_batches=3))

    seen: list[str] = []
    data = {ValidationPhase: tiny_batches(n_batches=3), TrainingPhase: Stream()}
    learner = showing(At(BatchEnd, lambda count: seen.append(terminal.last)), data=data)
    learner.fit(1)
    assert [line.split(" Loss")[0].split()[-1] for line in seen] == ["1/3", "2/3", "3/3", "1/?", "2/?", "3/?"]
    terminal.assert_clean()


@pytest.mark.cpu_only("on the CPU the bar shows the loss of the same batch")
@on_terminal
def test_a_fit_by_steps_counts_the_steps_of_the_fit(terminal: Terminal) -> None:
    seen: list[str] = []
    learner = showing(At(BatchEnd, lambda count: seen.append(terminal.last)), n_batches=2)
    learner.fit(1)
    seen.clear()
    learner.fit(steps=5, validate_every=3)
    shown = [(line.split(" ━")[0], line.split(" Loss")[0].split()[-1]) for line in seen]
    train = [("TrainingPhase steps", f"{step}/5") for step in range(1, 6)]
    first, second = ([(f"ValidationPhase epoch {epoch}", f"{batch}/2") for batch in (1, 2)] for epoch in (2, 3))
    assert shown == [*train[:3], *first, *train[3:], *second]


@pytest.mark.cpu_only("on the CPU the bar shows the loss of the same batch")
@pytest.mark.parametrize(
    ("length", "done"),
    [
        ({"epochs": 4}, {"3": 0, "4": 0, "4 and evaluated": 1, "5": 1}),
        ({"steps": 7}, {"3": 1, "4": 2, "4 and evaluated": 2, "5": 3}),
        ({"steps": 7, "validate_every": 3}, {"3": 1, "5": 3, "5 and evaluated": 3, "6": 4}),
    ],
    ids=str,
)
@on_terminal
def test_the_bar_of_a_resumed_fit_is_that_of_the_fit(
    length: dict[str, Any], done: dict[str, int], tmp_path: Path, terminal: Terminal
) -> None:
    """The checkpoints are taken after some batches of training, of which the fit before made the first two."""
    seen: list[str] = []
    begun: list[FitBegin] = []

    class Asks(Callback):
        @on(BatchEnd, TrainingPhase, access={"cbstate.history": Read()})
        def ask(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            steps = learner.cbstate.history[TrainingPhase].steps
            learner.request_checkpoint(tmp_path / f"{steps}.ckpt")

        @on(EpochEnd, ValidationPhase, access={"cbstate.history": Read()})
        def ask_between(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
            steps = learner.cbstate.history[TrainingPhase].steps
            learner.request_checkpoint(tmp_path / f"{steps} and evaluated.ckpt")

        @on(FitBegin)
        def note(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
            begun.append(event)

    def made() -> Learner:
        return showing(Asks(), At(BatchEnd, lambda count: seen.append(terminal.last)), n_batches=2)

    def shown() -> list[tuple[str, str]]:
        return [(line.split(" ━")[0], line.split(" Loss")[0].split()[-1]) for line in seen]

    learner = made()
    learner.fit(1)
    seen.clear()
    learner.fit(**length)
    whole = shown()
    last = ("TrainingPhase epoch 5/5", "2/2") if "epochs" in length else ("TrainingPhase steps", "7/7")
    assert [each for each in whole if "Training" in each[0]][-1] == last
    for name, count in done.items():
        seen.clear()
        made().fit(**length, resume=tmp_path / f"{name}.ckpt")
        assert shown() == whole[-len(seen) :], name
        assert begun[-1].done == count, name


@on_terminal
def test_a_direct_epoch_has_a_bar_of_its_own(terminal: Terminal) -> None:
    seen: list[str] = []
    learner = showing(At(BatchEnd, lambda count: seen.append(terminal.last)), n_batches=2)
    learner.validate()
    terminal.assert_clean()
    learner.epoch(TrainingPhase)
    terminal.assert_clean()
    assert [line.split(" ━")[0] for line in seen] == ["ValidationPhase epoch 0"] * 2 + ["TrainingPhase epoch 1"] * 2


@pytest.mark.cpu_only("on the CPU the bar shows the loss of the same batch")
@on_terminal
def test_a_direct_epoch_over_other_data_shows_their_length(terminal: Terminal) -> None:
    seen: list[str] = []
    learner = showing(At(BatchEnd, lambda count: seen.append(terminal.last)), n_batches=2)
    learner.epoch(ValidationPhase, tiny_batches(n_batches=3))
    assert [line.split(" Loss")[0].split()[-1] for line in seen] == ["1/3", "2/3", "3/3"]
    assert len(learner.data[ValidationPhase]) == 2


@on_terminal
def test_a_direct_step_shows_nothing(terminal: Terminal) -> None:
    learner = showing()
    learner.step(TrainingPhase, tiny_batches()[0])
    learner.fit(1)
    written = terminal.written
    learner.step(TrainingPhase, tiny_batches()[0])
    assert terminal.written == written
    assert terminal.above(0) == []


@on_terminal
def test_without_metrics_there_is_a_bar_without_a_loss(terminal: Terminal) -> None:
    seen: list[str] = []
    callbacks = [Recorder(), ProgressBar(redraw=0), At(BatchEnd, lambda count: seen.append(terminal.last))]
    tiny_learner(callbacks=callbacks, default_callbacks=False, n_batches=2).fit(1)
    assert [line.split()[-2] for line in seen] == ["1/2", "2/2"] * 2
    assert not any("Loss" in line for line in seen)


def monitored(tmp_path: Path, *others: Callback) -> tuple[Callback, ...]:
    """Return metrics of which two are monitored: one has values for batches, and one only for epochs."""

    class Count(torch.nn.Module):
        """A metric in the way of torchmetrics, the number of epochs."""

        epochs = 0

        def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
            pass

        def compute(self) -> float:
            self.epochs += 1
            return float(self.epochs)

        def reset(self) -> None:
            pass

    functions = {"Half": 0.5, "Other": 0.25}
    metrics = [Metric(lambda outputs, targets, value=value: value, name=name) for name, value in functions.items()]
    stopping = EarlyStopping(patience=9, monitor="Half", mode="max")
    saving = Checkpointer(tmp_path, monitor="Count", mode="max")
    return Metrics(*metrics, Metric(Count(), name="Count")), stopping, saving, *others


@pytest.mark.cpu_only("on the CPU the bar shows the loss of the same batch")
@on_terminal
def test_the_bar_has_the_loss_and_the_metrics_that_are_monitored(terminal: Terminal, tmp_path: Path) -> None:
    """A metric without values for batches has the value of the last epoch of the phase."""
    terminal.screen.resize(8, 120)
    rich.reconfigure(force_terminal=True, width=120, height=8, _environ={})
    seen: list[str] = []
    watch = At(BatchEnd, lambda count: seen.append(terminal.last))
    learner = tiny_learner(*monitored(tmp_path, ProgressBar(redraw=0), watch), n_batches=2)
    learner.fit(2)
    losses = {phase: learner.cbstate.metrics_step[phase]["Loss"].values for phase in (TrainingPhase, ValidationPhase)}
    texts = [re.split(r" \d/2 ", line)[-1].rpartition(" ")[0].strip() for line in seen]
    assert texts == [
        f"Loss {losses[phase][2 * epoch + batch]:.4g}  Half 0.5" + "  Count 1" * epoch
        for epoch in (0, 1)
        for phase in (TrainingPhase, ValidationPhase)
        for batch in (0, 1)
    ]
    learner.remove_callback(EarlyStopping)
    learner.remove_callback(Checkpointer)
    seen.clear()
    learner.epoch(TrainingPhase)
    assert not any("Half" in line or "Count" in line for line in seen)


@pytest.mark.cpu_only("on the CPU the bar shows the loss of the same batch")
@on_terminal
def test_the_bar_has_the_throughput_of_the_epoch(terminal: Terminal, clock: Clock) -> None:
    terminal.screen.resize(8, 120)
    rich.reconfigure(force_terminal=True, width=120, height=8, _environ={})
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(10, 1), torch.ones(10, 1)), 4)
    seen: list[str] = []
    learner = showing(Tick(clock, 2.0), At(BatchEnd, lambda count: seen.append(terminal.last)), data=data)
    learner.fit(2)
    assert [re.findall(r"  ([\d.]+) samples/s ", line) for line in seen] == [["2"], ["2"], ["1.67"]] * 2


@pytest.mark.parametrize("columns", [10, 25, 40])
@on_terminal
def test_a_narrow_terminal_has_one_line_of_bar(terminal: Terminal, columns: int) -> None:
    terminal.screen.resize(8, columns)
    rich.reconfigure(force_terminal=True, width=columns, height=8, _environ={})
    showing(At(BatchEnd, print), n_batches=3).fit(1)
    assert terminal.above(0) == ["1", "2", "3", "4", "5", "6"]
    terminal.assert_clean()


@pytest.mark.parametrize("rows", [6, 12])
@on_terminal
def test_another_size_of_the_window_meanwhile(terminal: Terminal, rows: int) -> None:
    def write(count: int) -> None:
        if count == 3:
            terminal.screen.resize(rows, 70)
            rich.reconfigure(force_terminal=True, width=70, height=rows, _environ={})
            bar._line.console = rich.get_console()  # type: ignore[union-attr]  # pyright: ignore[reportPrivateUsage, reportOptionalMemberAccess]  # as if it had measured the window
        print("line", count)

    bar = ProgressBar(redraw=0)
    tiny_learner(At(BatchEnd, write), bar, n_batches=4).fit(1)
    assert terminal.above(0)[-5:] == [f"line {number}" for number in range(4, 9)]
    terminal.assert_clean()


# --- how it ends


class Failed(Exception):
    """An exception that a test raises on purpose."""


@pytest.mark.parametrize("event", [FitBegin, EpochBegin, BatchBegin, BatchEnd, EpochEnd, FitEnd])
@pytest.mark.parametrize("failure", [Failed, KeyboardInterrupt])
@on_terminal
def test_a_failure_leaves_the_terminal_clean(
    terminal: Terminal, event: type[Event], failure: type[BaseException]
) -> None:
    def fail(count: int) -> None:
        print("printed")
        raise failure("on purpose")

    learner = showing(At(event, fail))
    try:
        learner.fit(2)
    except failure:
        terminal.assert_clean()
        traceback.print_exc()
    lines = terminal.above(0)
    reason = failure is KeyboardInterrupt and event is not FitEnd  # an interrupt has a line that says why
    assert lines[0] == "printed"
    assert lines[1].startswith("on purpose" if reason else "Traceback (most recent call last):")
    assert "Traceback (most recent call last):" in lines
    assert any(line.endswith("on purpose") for line in lines)
    terminal.assert_clean()
    learner.remove_callback(At)
    learner.fit(1)  # a further fit works
    terminal.assert_clean()


@pytest.mark.parametrize("event", [EpochBegin, BatchEnd, EpochEnd])
@pytest.mark.parametrize("failure", [Failed, KeyboardInterrupt, CancelFittingException])
@on_terminal
def test_a_failure_in_a_direct_epoch_leaves_the_terminal_clean(
    terminal: Terminal, event: type[Event], failure: type[BaseException]
) -> None:
    def fail(count: int) -> None:
        raise failure("on purpose")

    with pytest.raises(failure):
        showing(At(event, fail)).epoch(TrainingPhase)
    terminal.assert_clean()


@on_terminal
def test_a_failure_before_the_bar_begins_leaves_the_terminal_clean(terminal: Terminal) -> None:
    class Refuse(Callback):
        @on(FitBegin)
        def refuse(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
            raise Failed("no fit")

    learner = showing(Refuse())
    with pytest.raises(Failed):
        learner.fit(1)
    assert terminal.written == ""
    learner.remove_callback(Refuse)
    seen: list[str] = []
    learner.add_callback(At(EpochBegin, lambda count: seen.append(terminal.last)))
    learner.epoch(TrainingPhase)  # the failed fit is closed
    assert seen[0].startswith("TrainingPhase epoch 1 ")
    terminal.assert_clean()


@on_terminal
def test_cancelled_epochs_and_fits_end_normally(terminal: Terminal) -> None:
    def cancel(count: int) -> None:
        raise CancelFittingException("enough") if count == 7 else CancelEpochException("next")

    learner = showing(At(BatchEnd, cancel))
    learner.fit(10)
    assert str(learner.stopped) == "enough"
    terminal.assert_clean()


@on_terminal
def test_two_learners_after_each_other(terminal: Terminal) -> None:
    for name in ("one", "two"):
        showing(At(EpochEnd, lambda count, name=name: print(name, count))).fit(1)  # type: ignore[misc]  # a default
        terminal.assert_clean()
    assert terminal.above(0) == ["one 1", "one 2", "two 1", "two 2"]


@on_terminal
def test_a_learner_inside_a_handler_of_another(terminal: Terminal) -> None:
    """The inner bar is drawn instead of the outer one until it ends; then the outer bar is drawn again."""
    seen: list[str] = []

    def train(count: int) -> None:
        seen.append(terminal.last)
        print("before", count)
        showing(At(BatchEnd, lambda count: seen.append(terminal.last), ValidationPhase), n_batches=1).fit(1)
        print("after", count)

    showing(At(BatchEnd, train, TrainingPhase), n_batches=2).fit(1)
    assert [line.split(" Loss")[0].split()[0] for line in seen] == ["TrainingPhase", "ValidationPhase"] * 2
    assert terminal.above(0) == ["before 1", "after 1", "before 2", "after 2"]
    terminal.assert_clean()


# --- how often


@on_terminal
def test_it_is_redrawn_at_most_five_times_a_second(terminal: Terminal, clock: Clock) -> None:
    """The limit also holds over 300 short epochs: the begin of an epoch causes no extra redraw."""
    learner = tiny_learner(Tick(clock, 0.01), ProgressBar(), n_batches=5)
    begin = clock.now
    learner.fit(150)
    seconds = clock.now - begin
    assert seconds == pytest.approx(15.0)
    assert 0.8 * 5 * seconds <= terminal.draws <= 5 * seconds + 1


@on_terminal
def test_printing_causes_no_redraw(terminal: Terminal, clock: Clock) -> None:
    learner = tiny_learner(Tick(clock, 0.001), At(BatchEnd, print), ProgressBar(), n_batches=100)
    learner.fit(1)
    assert len(terminal.above(0)) == 200
    assert terminal.draws == 1 + 0  # the last batch begins before 0.2 seconds are over
    terminal.assert_clean()


@on_terminal
def test_it_draws_no_random_numbers(terminal: Terminal) -> None:
    """A run with a bar trains exactly as a run without one."""
    random.seed(3)
    expected = random.random()
    random.seed(3)
    showing().fit(1)
    assert random.random() == expected


# --- where there is no terminal


def test_a_short_epoch_prints_nothing(plain: io.StringIO) -> None:
    showing().fit(2)
    assert plain.getvalue() == ""


def test_the_reason_of_an_early_end_is_printed_once(plain: io.StringIO) -> None:
    def stop(count: int) -> None:
        raise CancelFittingException("enough")

    line = "enough (raised in At.call at (EpochEnd, TrainingPhase), epoch 1, batch 2)"
    showing(At(EpochEnd, stop), n_batches=2).fit(3)
    assert plain.getvalue().splitlines() == [line]
    showing(At(EpochEnd, stop), MetricsPrinter(), n_batches=2).fit(3)
    assert plain.getvalue().splitlines().count(line) == 2


@pytest.mark.cpu_only("on the CPU the bar shows the loss of the same batch")
def test_a_long_epoch_prints_plain_lines(plain: io.StringIO, clock: Clock) -> None:
    learner = tiny_learner(Tick(clock, 25.0), ProgressBar(), n_batches=6)
    learner.fit(2)
    losses: dict[type[Phase], list[float]] = {
        phase: [value for _, value in learner.cbstate.metrics_step[phase]["Loss"]]
        for phase in (TrainingPhase, ValidationPhase)
    }
    assert plain.getvalue().splitlines() == [
        f"{phase.__name__} epoch {epoch}/2  batch {batch}/6  Loss {losses[phase][6 * (epoch - 1) + batch - 1]:.4g}"
        for epoch in (1, 2)
        for phase in (TrainingPhase, ValidationPhase)
        for batch in (3, 6)
    ]


def test_plain_lines_by_steps_and_without_a_loss(plain: io.StringIO, clock: Clock) -> None:
    callbacks = [Recorder(), Tick(clock, 30.0), ProgressBar()]
    tiny_learner(callbacks=callbacks, default_callbacks=False, data=tiny_batches(n_batches=4)).fit(steps=6)
    assert plain.getvalue().splitlines() == [
        "TrainingPhase steps  batch 2/6",
        "TrainingPhase steps  batch 4/6",
        "TrainingPhase steps  batch 6/6",
    ]


@pytest.mark.cpu_only("on the CPU the bar shows the loss of the same batch")
@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": "unknown"}])
@on_terminal
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    terminal: Terminal, clock: Clock, environment: dict[str, str]
) -> None:
    rich.reconfigure(force_terminal=True, width=70, height=8, _environ=environment)
    tiny_learner(Tick(clock, 35.0), ProgressBar(), n_batches=2).epoch(TrainingPhase)
    assert len(terminal.above(0)) == 1
    assert "\x1b" not in terminal.written


def test_colours_that_are_forced_into_a_file_bring_no_bar(monkeypatch: pytest.MonkeyPatch, plain: io.StringIO) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    rich.reconfigure(file=plain, width=70, height=8)
    showing().fit(1)
    assert plain.getvalue() == ""


def test_quiet_prints_nothing_at_all(capfd: pytest.CaptureFixture[str], terminal: Terminal) -> None:
    learner = tiny_learner(Metrics())
    learner.fit(1)
    assert terminal.written == ""
    assert capfd.readouterr() == ("", "")
    assert learner.get_callback(ProgressBar) is learner.get_callback(MetricsPrinter) is None


@pytest.mark.parametrize("options", [{"redraw": -1}, {"report": float("nan")}, {"redraw": "fast"}])
def test_mistakes(options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    message = rf"^ProgressBar\({name}={value!r}\): {name} is a number of seconds, at least 0, such as (0\.2|60\.0)\.$"
    with pytest.raises(UsageError, match=message):
        ProgressBar(**options)


@on_terminal
def test_it_reads_what_it_declares_and_shows_the_state_of_this_batch(terminal: Terminal) -> None:
    """Rule 7: the bar is drawn after the callbacks that write the counts and the loss of the same batch."""
    metrics = dict.fromkeys(("cbstate.metrics_step", "cbstate.metrics_epoch"), Read(optional=True))
    before: Access = {"cbstate.history": Read(), "data": Read(), **metrics}
    assert before.items() <= ProgressBar().state_access().items()
    graph = tiny_learner(ProgressBar()).callbacks.graph
    assert graph.has_edge("Recorder", "ProgressBar")
    assert graph.has_edge("Metrics", "ProgressBar")


def test_the_loss_of_a_device_is_shown_a_fixed_number_of_batches_late(plain: io.StringIO, clock: Clock) -> None:
    core = TorchCore("cpu", lag=2)  # a lag treats the CPU as a device
    learner = tiny_learner(Tick(clock, 25.0), ProgressBar(), n_batches=9, core=core, data=tiny_batches(n_batches=9))
    learner.fit(1)
    losses = [value for _, value in learner.cbstate.metrics_step[TrainingPhase]["Loss"]]
    # Batches take 25 s, a line is due each minute: at batch 3, whose loss is read at batch 5, and at batch 8, whose
    # loss would be read after the epoch.
    assert plain.getvalue() == f"TrainingPhase epoch 1/1  batch 5/9  Loss {losses[2]:.4g}\n"


@on_terminal
def test_the_bar_of_a_device_counts_every_batch_and_shows_values_late(terminal: Terminal) -> None:
    seen: list[str] = []
    core = TorchCore("cpu", lag=2)
    learner = showing(At(BatchEnd, lambda count: seen.append(terminal.last), TrainingPhase), core=core)
    learner.fit(1)
    losses = [value for _, value in learner.cbstate.metrics_step[TrainingPhase]["Loss"]]
    assert [count for line in seen for count in line.split() if "/5" in count] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    shown = [line.partition(" Loss ")[2].split()[:1] for line in seen]
    assert shown == [[], [], *[[f"{losses[0]:.4g}"]] * 3]
