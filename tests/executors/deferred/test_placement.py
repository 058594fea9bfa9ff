# pyright: reportPrivateUsage=false
# The tests move callbacks by hand, and give the placements a clock.
"""Where callbacks run under ``defer="auto"``: in place or in their lane, decided by a clock that the tests move.

A handler moves the clock by its cost only where it costs training time: in place always, and in the lane if it holds
the interpreter's lock. So the decisions do not depend on the speed of the machine.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from flowtrain import (
    Access,
    BatchBegin,
    BatchEnd,
    Callback,
    CancelBatchException,
    EpochEnd,
    Event,
    Learner,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    UpdateBegin,
    Write,
    on,
)
from flowtrain.callbacks import Checkpointer, LogMetrics, throttle
from flowtrain.errors import DeferredCancelError, ExecutorError, LoggingError, UsageError
from flowtrain.logging import JsonlBackend, Value, log
from flowtrain.logging.records import identity
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor, register_copier
from flowtrain_dask.deferred.placement import TIMED, Placement
from tests.support.clock import Clock, Tick
from tests.support.logs import log_records


class Costs(Callback):
    """A deferrable callback that notes where it runs, and takes some seconds of a clock."""

    deferrable = True
    stochastic = False

    def __init__(self, clock: Clock, seconds: float, name: str = "Costs", *, holds_lock: bool = False) -> None:
        self.clock, self.seconds, self.name, self.holds_lock = clock, seconds, name, holds_lock
        self.places: list[str] = []
        self.losses: list[float] = []
        self.numbers: list[int | None] = []

    def state_access(self) -> Access:
        return {"batch.loss": Read()}

    @on(BatchEnd, TrainingPhase)
    def act(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        here = threading.current_thread() is threading.main_thread()
        self.places.append("here" if here else "lane")
        self.losses.append(float(learner.batch.loss))
        number = identity()
        self.numbers.append(None if number is None else number.sequence)
        if here or self.holds_lock:
            self.clock.now += self.seconds


def placements_of(learner: Learner) -> list[Placement]:
    executor = learner.executor
    assert isinstance(executor, DaskExecutor)
    assert executor._site is not None
    return executor._deferred.use(executor._site).placements


def timed(clock: Clock, *callbacks: Callback, **options: Any) -> Learner:
    """Return a learner whose placements have this clock, on which a batch takes 10 ms.

    Its handlers run in serial order: otherwise a race of an event in parallel, by the real clock, would decide whether
    the first round of a lane's race begins with the second event or with the third.
    """
    chosen: dict[str, Any] = {"executor": DaskExecutor(parallel="never"), "n_batches": 60, **options}
    learner = tiny_learner(Tick(clock, 0.010), *callbacks, **chosen)
    for placement in placements_of(learner):
        placement._clock = clock
    return learner


def explained(learner: Learner) -> str:
    text = learner.executor.explain(learner.callbacks.plan(BatchEnd, TrainingPhase))
    return text.split("\n")[1]


def test_a_callback_whose_event_costs_little_stays_in_place() -> None:
    clock = Clock()
    cheap = Costs(clock, 0.0001)
    with timed(clock, cheap) as learner:
        assert explained(learner) == "Costs.act runs in place, and not in lane Costs (a thread): it is being timed"
        learner.fit(1)
        assert set(cheap.places) == {"here"}
        [place] = learner.executor.report().places  # type: ignore[attr-defined]  # dask's
        assert (place.lane, place.where, place.handing_over) == ("Costs", "in place", None)
        assert place.in_place == pytest.approx(0.0001)
        why = "it takes 0.10 ms, and a lane gains nothing below 0.20 ms"
        assert explained(learner) == f"Costs.act runs in place, and not in lane Costs (a thread): {why}"
        report = str(learner.executor.report())  # type: ignore[attr-defined]  # dask's
        assert report == f"no deferred callbacks\n  Costs: in place: {why}"


def test_a_callback_that_saves_time_in_its_lane_moves_there() -> None:
    """Two events are timed, the second of which begins the first round of a race in the order A B B A."""
    clock = Clock()
    costly = Costs(clock, 0.010)
    with timed(clock, costly, n_batches=20) as learner:
        learner.fit(1)
        [place] = learner.executor.report().places  # type: ignore[attr-defined]  # dask's
        assert (place.lane, place.where, place.handing_over) == ("Costs", "lane", 0.0)
        assert place.in_place == pytest.approx(0.010)
        assert costly.places == ["here", "here", "lane", "lane", "here", *["lane"] * 15]
        assert costly.numbers == [None, None, 0, 1, None, *range(2, 17)], "the events of the lane are numbered"
        assert explained(learner) == (
            "Costs.act is deferred to lane Costs (a thread): 10.00 ms in place, 0.00 ms to hand over; "
            "from one event to the next 10.00 ms with the lane and 20.00 ms without"
        )
    with tiny_learner(alone := Costs(clock, 0.0), n_batches=20) as learner:
        learner.fit(1)
    assert costly.losses == alone.losses


def test_a_callback_that_holds_the_lock_of_the_interpreter_stays_in_place() -> None:
    clock = Clock()
    costly = Costs(clock, 0.010, holds_lock=True)
    with timed(clock, costly) as learner:
        learner.fit(1)
        assert explained(learner).endswith("from one event to the next 20.00 ms with the lane and 20.00 ms without")
    assert Counter(costly.places) == {"here": 55, "lane": 5}
    assert set(costly.places[15:]) == {"here"}


def test_a_callback_moves_back_when_its_cost_has_changed_and_not_before_its_lane_is_empty() -> None:
    clock = Clock()
    costly = Costs(clock, 0.010)
    with timed(clock, costly, n_batches=20) as learner:
        learner.fit(1)
        costly.holds_lock = True
        learner.fit(1)  # it is too early to measure again
        assert set(costly.places[-20:]) == {"lane"}
        clock.now += 100.0
        learner.fit(1)
        assert set(costly.places[-5:]) == {"here"}
        # An event of no lane has no number, and the lane counts on.
        assert [number for number in costly.numbers if number is not None] == list(range(costly.places.count("lane")))
        clock.now += 1000.0
        costly.holds_lock = False
        learner.fit(1)
        assert costly.places[-1] == "lane"


def test_callbacks_of_one_event_race_together_and_the_frequent_ones_first() -> None:
    """A race whose rounds are long gives way to one with short rounds."""
    clock = Clock()
    rare = throttle(Costs(clock, 0.050, "rare"), BatchEnd, every=10)
    often, more = Costs(clock, 0.010, "often"), Costs(clock, 0.010, "more")
    with timed(clock, rare, often, more, n_batches=200) as learner:
        learner.fit(1)
        where = {each.lane: each.where for each in learner.executor.report().places}  # type: ignore[attr-defined]  # dask's
    assert where == {"rare": "lane", "often": "lane", "more": "lane"}
    first = {each.name: each.places.index("lane") for each in (often, more)}
    assert first == {"often": 2, "more": 2}
    assert rare.places.count("here") < 10


def places_of(learner: Learner) -> dict[str, str]:
    return {each.lane: each.where for each in learner.executor.report().places}  # type: ignore[attr-defined]  # dask's


class Sleeps(Costs):
    """Takes a millisecond of the real clock too, so that its event is raced in parallel."""

    @on(BatchEnd, TrainingPhase)
    def act(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        time.sleep(0.001)
        super().act(event, phase, learner)


class Before(Sleeps):
    """Costs time before the deferrable callback in serial order, and after it in parallel."""

    deferrable = False

    @on(BatchEnd, TrainingPhase)
    def act(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        time.sleep(0.001)
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.001)
            self.places.append("strand")
        self.clock.now += self.seconds


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("holds_lock", [False, True])
def test_an_event_that_is_raced_in_parallel_does_not_shift_the_rounds_of_a_lane(holds_lock: bool, known: bool) -> None:
    """Each round has one call of each handler, whether the handlers run in serial order or at the same time."""
    with tiny_learner(alone := Costs(Clock(), 0.0), n_batches=60) as learner:
        learner.fit(1)
    for _ in range(1 + known):  # the event of the second learner may begin in parallel
        clock = Clock()
        two = [Sleeps(clock, 0.005, f"costly{number}", holds_lock=holds_lock) for number in range(2)]
        before = Before(clock, 0.010, "before")
        with timed(clock, before, *two, executor=DaskExecutor()) as learner:
            learner.fit(1)
            race = placements_of(learner)[0].race
            assert race is not None
            assert race.here == pytest.approx([0.030] * len(race.here))
            assert race.there == pytest.approx([0.030 if holds_lock else 0.020] * len(race.there))
            assert set(places_of(learner).values()) == {"in place" if holds_lock else "lane"}
        assert "strand" in before.places, "the event was raced too"
        assert [each.losses for each in two] == [alone.losses] * 2, "each snapshot is that of its event"


def test_callbacks_that_gain_little_each_are_in_their_lanes_after_one_race() -> None:
    """Each alone saves a sixth of the time, of which one is sure only after ten rounds; together they save most.

    The race ends as soon as two rounds in the lanes have taken less than the handlers alone take in place.
    """
    clock = Clock()
    five = [Costs(clock, 0.010, f"costs{number}") for number in range(5)]
    with timed(clock, *five, n_batches=20) as learner:
        learner.fit(1)
        assert explained(learner).endswith(
            "10.00 ms in place, 0.00 ms to hand over; from one event to the next 10.00 ms with the lane and 60.00 ms "
            "without, measured with 4 other lanes"
        )
    assert [each.places for each in five] == [["here", "here", *["lane"] * 18]] * 5


def test_callbacks_that_have_moved_together_are_measured_alone_later() -> None:
    clock = Clock()
    free, holds = Costs(clock, 0.010, "free"), Costs(clock, 0.010, "holds", holds_lock=True)
    with timed(clock, free, holds) as learner:
        learner.fit(1)
        assert places_of(learner) == {"free": "lane", "holds": "lane"}
        clock.now += 1000.0
        learner.fit(1)
        assert places_of(learner) == {"free": "lane", "holds": "in place"}


def test_callbacks_that_gain_nothing_together_race_alone() -> None:
    class Slower(Costs):
        """Takes longer in its lane."""

        @on(BatchEnd, TrainingPhase)
        def act(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            super().act(event, phase, learner)
            if self.places[-1] == "lane":
                self.clock.now += 0.030

    clock = Clock()
    gains, loses = Costs(clock, 0.010, "gains"), Slower(clock, 0.020, "loses", holds_lock=True)
    with timed(clock, gains, loses) as learner:
        learner.fit(1)
        assert places_of(learner) == {"gains": "lane", "loses": "in place"}
    assert "lane" in loses.places


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_failure_is_the_same_in_place_and_in_the_lane(on_error: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Fails(Costs):
        at = 0

        @on(BatchEnd, TrainingPhase)
        def act(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            super().act(event, phase, learner)
            if len(self.places) == self.at:
                raise ValueError("no table")

    for at, place in ((2, "here"), (15, "lane")):
        clock = Clock()
        fails = Fails(clock, 0.010, "Fails")
        fails.at = at
        executor = DaskExecutor(on_error=on_error)
        with timed(clock, fails, n_batches=30, executor=executor) as learner:
            if on_error == "raise":
                with pytest.raises(ValueError, match="no table") as caught:
                    learner.fit(1)
                notes = "; ".join(caught.value.__notes__)
                assert "raised in Fails.act at (BatchEnd, TrainingPhase)" in notes
            else:
                caplog.clear()
                learner.fit(1)
                assert "retires lane Fails, its callbacks see no more events: ValueError: no table" in caplog.text
                assert executor.report().lanes[0].retired
            assert (fails.places[-1], len(fails.places)) == (place, at)


def test_a_deferrable_callback_steers_training_nowhere_wherever_it_runs() -> None:
    class Steers(Costs):
        do: Callable[[LearnerView], object]

        @on(BatchEnd, TrainingPhase)
        def act(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            self.do(learner)

    class Asked(Event): ...

    def cancel(learner: LearnerView) -> None:
        raise CancelBatchException("enough")

    ways: list[tuple[Callable[[LearnerView], object], type[Exception], str]] = [
        (cancel, DeferredCancelError,
         "Steers.act raised CancelBatchException('enough') at (BatchEnd, TrainingPhase), but it is deferrable: in "
         "its lane it runs when training has gone on, and there is no batch left to end. Set deferrable = False in "
         "Steers."),
        (lambda learner: learner.fire(Asked()), UsageError, "Steers calls learner.fire(Asked()), but it is deferrab"),
        (lambda learner: learner.request_checkpoint("x"), UsageError, "Steers calls learner.request_checkpoint("),
        (lambda learner: learner.request_weights("x"), UsageError, "Steers calls learner.request_weights("),
        (lambda learner: learner.updates, UsageError, "Steers is deferrable and reads learner.updates: "),
    ]  # fmt: skip
    executors: list[Callable[[], Any]] = [
        lambda: "serial",
        *(partial(DaskExecutor, defer=defer) for defer in ("auto", "always", "never")),
        partial(DaskExecutor, parallel="always"),
    ]
    for do, kind, text in ways:
        found = set()
        for executor in executors:
            steers = Steers(Clock(), 0.0, "Steers")
            steers.do = do
            with (
                tiny_learner(steers, n_batches=3, executor=executor()) as learner,
                pytest.raises(kind) as raised,
            ):
                learner.fit(1)
            found.add(str(raised.value))
        assert len(found) == 1
        assert found.pop().startswith(text)


_elsewhere: dict[str, JsonlBackend] = {}  # where no learner looks for the backends of its callbacks


def test_a_deferrable_callback_logs_to_no_backend_that_another_one_holds_wherever_it_runs(tmp_path: Path) -> None:
    class Logs(Costs):
        def state_access(self) -> Access:
            return {}

        @on(BatchEnd, TrainingPhase)
        def act(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            log(_elsewhere["backend"], Value(1.0), "Mine", 1, ("Step",))

    executors: list[Any] = ["serial", DaskExecutor(), DaskExecutor(defer="always")]
    for number, executor in enumerate(executors):
        _elsewhere["backend"] = backend = JsonlBackend(tmp_path / f"{number}.jsonl")
        with (
            tiny_learner(LogMetrics(backend), Logs(Clock(), 0.0, "Logs"), n_batches=2, executor=executor) as learner,
            pytest.raises(LoggingError, match=r"is none of the backends that the callback held .* it held none"),
        ):
            learner.fit(1)
        assert "Mine" not in Path(backend.path).read_text()


class Counted:
    """An object whose copies are counted."""

    copies = 0


def copied(value: Counted) -> Counted:
    Counted.copies += 1
    return value


class Owns(Callback):
    def state_access(self) -> Access:
        return {"cbstate.counted": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.counted = Counted()

    @on(BatchBegin)
    def use(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None: ...


class Reads(Costs):
    def state_access(self) -> Access:
        return {"batch.loss": Read(), "cbstate.counted": Read()}


def test_the_snapshot_of_a_callback_in_place_costs_nothing() -> None:
    """Nothing is copied, and once it is decided on a step makes the calls of a serial one."""
    register_copier(Counted, copied)
    Counted.copies = 0

    def count(executor: Any) -> Counter[str]:
        clock = Clock()
        learner = tiny_learner(
            Tick(clock), Owns(), *(Reads(clock, 0.0, f"reads{number}") for number in range(4)),
            n_batches=TIMED + 5, executor=executor, default_callbacks=False,
        )  # fmt: skip
        calls = Counter[str]()

        def note(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call":
                calls[f"{frame.f_globals.get('__name__')}.{frame.f_code.co_qualname}"] += 1

        with learner:
            if isinstance(learner.executor, DaskExecutor):
                for placement in placements_of(learner):
                    placement._clock = clock
            learner.epoch(TrainingPhase)
            batches = list(learner.data[TrainingPhase])
            sys.setprofile(note)
            try:
                for raw in batches:
                    learner.step(TrainingPhase, raw)
            finally:
                sys.setprofile(None)
        return calls

    serial, dask = count("serial"), count(DaskExecutor(parallel="never"))
    assert Counted.copies == 0
    assert {name: number for name, number in dask.items() if "dask" in name} == {}
    assert dask == serial


def test_always_and_never_and_the_resources_of_workers() -> None:
    clock = Clock()
    for defer, place in ((True, "lane"), ("always", "lane"), (False, "here"), ("never", "here")):
        costs = Costs(clock, 0.0)
        with tiny_learner(costs, n_batches=3, executor=DaskExecutor(defer=defer)) as learner:  # type: ignore[arg-type]  # words
            learner.fit(1)
            assert learner.executor.report().places == ()  # type: ignore[attr-defined]  # dask's
        assert costs.places == [place] * 3
    assert DaskExecutor()._deferred.defer == "auto"
    assert DaskExecutor("tcp://127.0.0.1:1", resources={"gpu": 1})._deferred.defer == "always"
    assert DaskExecutor("tcp://127.0.0.1:1", resources={"gpu": 1}, defer="never")._deferred.defer == "never"
    with pytest.raises(ExecutorError) as caught:
        DaskExecutor(defer="alway")  # type: ignore[arg-type]  # a wrong value
    assert str(caught.value) == (
        "DaskExecutor(defer='alway'): defer is 'auto', where cost decides which callbacks are deferred, 'always' or "
        "'never'. Did you mean 'always'? Write DaskExecutor(defer=\"auto\")."
    )


class Moves(Callback):
    """Moves all callbacks to their lanes at every third batch, and back at the next one."""

    learners: list[Learner]

    def __init__(self) -> None:
        self.numbers = iter(range(100))

    def state_access(self) -> Access:
        return {"resource.rng": Write()}  # on the training thread

    @on(BatchBegin)
    def move(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        number = next(self.numbers)
        for placement in placements_of(self.learners[0]):
            placement.mode, placement.anchor = "lane", None
            moved = placement.move(number % 3 == 0)
            assert moved or (placement.lane is not None and placement.lane.over), "it has failed, and nobody knows yet"


def test_a_run_whose_callbacks_move_is_resumed_as_a_serial_one(tmp_path: Path) -> None:
    """Rules 13, 26 and 28: a checkpoint after each epoch, moves, and an error at any of five events."""

    class Counts(Costs):
        def state_dict(self) -> dict[str, Any]:
            return {"losses": list(self.losses)}

        def load_state_dict(self, state: Any) -> None:
            self.losses = list(state["losses"])

        @on(BatchEnd, TrainingPhase)
        def act(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            super().act(event, phase, learner)
            if len(self.losses) == self.fails_at:
                raise ValueError("broken")

        fails_at = 0

    def fit(name: str, fails_at: int, executor: Any, **options: Any) -> tuple[list[float], list[str]]:
        folder = tmp_path / name
        counts, moves = Counts(Clock(), 0.0), Moves()
        counts.fails_at = fails_at
        callbacks = [counts, LogMetrics(JsonlBackend(folder / "log.jsonl")), Checkpointer(folder / "saved")]
        more = [] if executor == "serial" else [moves]
        with tiny_learner(*more, *callbacks, n_batches=5, executor=executor) as learner:
            moves.learners = [learner]
            if fails_at:
                with pytest.raises(ValueError, match="broken"):
                    learner.fit(3, **options)
            else:
                learner.fit(3, **options)
            moves.learners.clear()
        lines = (folder / "log.jsonl").read_text().splitlines()
        return counts.losses, [line.partition('"time"')[0] for line in lines]

    serial = fit("serial", 0, "serial")
    for fails_at in range(6, 11):
        name = f"failed{fails_at}"
        fit(name, fails_at, DaskExecutor())
        assert fit(name, 0, DaskExecutor(), resume="auto") == serial


def test_the_log_of_a_callback_that_moves_is_the_serial_one(tmp_path: Path, dask_processes: Any) -> None:
    """Its values of a series begin where the last event left off, wherever that ran, and its state comes back."""
    logs: list[list[str]] = []
    makes: list[Callable[[], Any]] = [lambda: "serial", DaskExecutor, partial(DaskExecutor, dask_processes.address)]
    for index, make in enumerate(makes):
        path = tmp_path / f"{index}.jsonl"
        moves = Moves()
        with tiny_learner(moves, LogMetrics(JsonlBackend(path)), n_batches=4, executor=make()) as learner:
            moves.learners = [learner]
            if not index:
                learner.remove_callback(Moves)
            learner.fit(2)
        moves.learners.clear()
        logs.append([line.partition('"time"')[0] for line in path.read_text().splitlines()])
    assert logs[1:] == [logs[0]] * 2
    assert len(logs[0]) > 8


class Slow(Callback):
    """Logs the number of its updates, and takes 3 ms for it."""

    deferrable = True

    def __init__(self, backend: JsonlBackend) -> None:
        self.backends = (backend,)
        self.updates = 0

    @on(UpdateBegin, TrainingPhase, access={})
    def write(self, event: UpdateBegin, phase: Phase, learner: LearnerView) -> None:
        self.updates += 1
        time.sleep(0.003)
        log(self.backends, Value(float(self.updates)), "Updates", self.updates, ("Step",))


def test_a_slow_callback_of_a_lane_in_which_another_one_has_settled(tmp_path: Path) -> None:
    """Rule 23: `LogMetrics` is called directly by then, and must not overtake the events that go to the lane now."""
    for executor in ("serial", "dask"):
        backend = JsonlBackend(tmp_path / executor)
        both = LogMetrics(backend), throttle(Slow(backend), UpdateBegin, every=15)
        with tiny_learner(*both, n_batches=300, executor=executor) as learner:
            learner.fit(1)
            assert executor == "serial" or placements_of(learner)[0].race is not None
    assert log_records(tmp_path / "dask") == log_records(tmp_path / "serial")


@pytest.mark.parametrize("event_type", [EpochEnd])
def test_a_callback_with_few_events_is_timed_until_it_has_had_enough(event_type: type[Event]) -> None:
    clock = Clock()

    class Epochs(Costs):
        @on(EpochEnd, TrainingPhase)
        def end(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            here = threading.current_thread() is threading.main_thread()
            self.places.append("end here" if here else "end lane")
            if here:
                self.clock.now += 1.0

    epochs = Epochs(clock, 0.0)
    with timed(clock, epochs, n_batches=40) as learner:
        learner.fit(12)
    ends = [place for place in epochs.places if place.startswith("end")]
    assert ends[:2] == ["end here"] * 2
    assert ends[-1] == "end lane"
    assert epochs.places[-2:] == ["lane", "end lane"], "all events of the lane move together"
