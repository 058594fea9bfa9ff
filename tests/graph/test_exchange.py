"""Rule 33: exchanges of values between ranks, which are threads here, under the serial and the dask executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowtrain import (
    Access,
    BackwardBegin,
    BackwardEnd,
    BatchEnd,
    Callback,
    CancelBatchException,
    Event,
    LearnerView,
    MissingStateError,
    NoConflict,
    Phase,
    Read,
    Resolution,
    TrainingPhase,
    UpdateBegin,
    Write,
)
from flowtrain.callback.handler import Handler
from flowtrain.callbacks import throttle, when
from flowtrain.errors import RankError
from flowtrain.graph.exchange import combined
from flowtrain.graph.executor import Executor
from flowtrain.graph.serial import SerialExecutor
from flowtrain.graph.shared_state import Peers
from flowtrain_dask import DaskExecutor
from tests.support.meeting import Meeting, Rank, build
from tests.support.untyped import untyped

EXECUTORS: list[Callable[[], Executor]] = [SerialExecutor, lambda: DaskExecutor(workers=3, parallel="always")]
both = pytest.mark.parametrize("executor", EXECUTORS, ids=["serial", "dask"])


class Does(Callback):
    """Calls a function at events of training, with the declaration that the test gives."""

    def __init__(
        self,
        name: str,
        access: Access,
        do: Callable[[Any], object],
        *events: type[Event],
        ranks: Any = None,
        makes: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.access = access
        self.do = do
        self.events = events or (BatchEnd,)
        self.ranks = ranks
        self.makes = makes or {}

    def state_access(self) -> Access:
        return self.access

    def handlers(self) -> Iterator[tuple[type, Handler]]:
        for event in self.events:
            yield type(self), Handler(event, TrainingPhase, None, "Does", "handle")

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        return NoConflict()

    def setup(self, learner: LearnerView) -> None:
        for name, value in self.makes.items():
            setattr(learner.cbstate, name, value)

    def handle(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.do(learner)


def started(peers: Peers, *callbacks: Callback, executor: Callable[[], Executor] = SerialExecutor) -> Rank:
    return build(callbacks, peers, executor)


# --- reading the values of all ranks


@both
@pytest.mark.parametrize(
    ("how", "found"), [("mean", 2.0), ("sum", 6.0), ("min", 1.0), ("max", 3.0), (None, [1.0, 2.0, 3.0])]
)
def test_every_rank_gets_the_values_of_all(how: Any, found: Any, executor: Callable[[], Executor]) -> None:
    read = Read(gather=True) if how is None else Read(reduce=how)

    def train(peers: Peers) -> Any:
        """Return what a handler sees of the losses."""
        seen: list[Any] = []
        callback = Does("Look", {"batch.loss": read}, lambda learner: seen.append(learner.batch.loss), ranks="every")
        rank = started(peers, callback, executor=executor)
        rank.fire(BatchEnd(), loss=torch.tensor(peers.rank + 1.0, requires_grad=True))
        return seen

    meeting = Meeting(3)
    results: list[Any] = meeting.run(train)
    assert results == [[found]] * 3
    assert how is None or not results[0][0].requires_grad
    assert meeting.count == 1


def test_a_callback_of_the_main_rank_gets_the_values_and_the_others_take_part() -> None:
    def train(peers: Peers) -> Any:
        """Return what a handler sees of the losses."""
        seen: list[Any] = []
        rank = started(peers, Does("Log", {"batch.loss": Read(reduce="sum")}, lambda learner: seen.append(1)))
        for _ in range(3):
            rank.fire(BatchEnd(), loss=torch.tensor(1.0))
        return seen

    meeting = Meeting(2)
    assert meeting.run(train) == [[1, 1, 1], []]
    assert meeting.count == 3


def test_a_callback_of_the_main_rank_without_an_exchange_runs_there_alone() -> None:
    def train(peers: Peers) -> Any:
        """Return how often the handler ran, and the callbacks that an executor gets."""
        seen: list[Any] = []
        rank = started(peers, Does("Log", {"batch.loss": Read()}, lambda learner: seen.append(1)))
        rank.fire(BatchEnd(), loss=torch.tensor(1.0))
        return len(seen), len(rank.callbacks.running), len(rank.callbacks.nodes)

    meeting = Meeting(2)
    assert meeting.run(train) == [(1, 1, 1), (0, 0, 1)]
    assert meeting.count == 0


def test_conditions_are_asked_on_every_rank() -> None:
    """Rule 35: they count the same events everywhere, so all ranks come to the same exchanges."""

    def train(peers: Peers) -> Any:
        """Return how often the handler ran."""
        seen: list[Any] = []
        callback = Does("Log", {"batch.loss": Read(reduce="sum")}, lambda learner: seen.append(1))
        rank = started(peers, throttle(when(callback, BatchEnd, lambda number, phase: number > 2), BatchEnd, every=2))
        for _ in range(8):
            rank.fire(BatchEnd(), loss=torch.tensor(1.0))
        return len(seen)

    meeting = Meeting(2)
    assert meeting.run(train) == [3, 0]
    assert meeting.count == 3


def test_a_rank_without_a_value() -> None:
    def train(peers: Peers) -> Any:
        """Return what a handler sees of an entry that only one rank has."""
        seen: list[Any] = []
        access: Access = {"batch.extra": Read(optional=True, reduce="sum"), "batch.more": Write()}
        rank = started(peers, Does("Look", access, lambda learner: seen.append(learner.batch.extra)))
        rank.fire(BatchEnd())
        if peers.rank == 1:
            rank.state.batch.extra = 5
        rank.fire(BatchEnd())
        return seen

    assert Meeting(2).run(train) == [[None, 5], [None, 5]]


def test_a_rank_whose_value_is_missing_fails_alone_and_nobody_waits() -> None:
    def run(peers: Peers) -> Any:
        """Fire an event at which only one rank has the value."""
        made = Does("Make", {"cbstate.x": Write(), "batch.loss": Read()}, lambda learner: None, makes={"x": 1})
        seen: list[Any] = []
        look = Does("Look", {"cbstate.x": Read(reduce="sum"), "cbstate.y": Write()}, seen.append)
        rank = started(peers, made, look)
        if peers.rank == 1:
            del rank.state.cbstate.x
        try:
            rank.fire(BatchEnd(), loss=torch.tensor(1.0))
        except MissingStateError as error:
            return str(error)
        return seen

    fine, failed = Meeting(2).run(run)
    assert fine == []  # the handler did not run, since it would have had the values of some ranks only
    assert failed == (
        "Look.handle at (BatchEnd, TrainingPhase) exchanges cbstate.x with all ranks, and this rank has none. "
        "Learner.cbstate has no 'x'. It has: nothing."
    ) or str(failed).startswith("Look.handle at (BatchEnd, TrainingPhase) exchanges cbstate.x with all ranks")


# --- sending the value of the main rank


@both
@pytest.mark.parametrize("where", ["main", "every"])
def test_every_rank_gets_the_value_of_the_main_rank(where: Any, executor: Callable[[], Executor]) -> None:
    access: Access = {
        "batch.loss": Read(),
        "cbstate.best": Write(broadcast=True),
        "params": Write(broadcast=True),
        "optimizer.hyperparams": Write(broadcast=True),
    }

    def change(learner: LearnerView) -> None:
        """Write values that depend on the batch of this rank."""
        value = float(learner.batch.loss)
        learner.cbstate.best = {"loss": torch.tensor(value), "n": (1, 2)}
        learner.params["coeff"].data.fill_(value)
        learner.optimizer.hyperparams[0]["lr"] = value / 10

    def train(peers: Peers) -> Any:
        """Return the state that the handler has written."""
        rank = started(peers, Does("Best", access, change, ranks=where, makes={"best": None}), executor=executor)
        rank.fire(BatchEnd(), loss=torch.tensor(peers.rank + 3.0))
        return rank.shared()

    meeting = Meeting(2)
    first, second = untyped(meeting.run(train))
    assert first == second
    assert first["cbstate"] == {"best": {"loss": torch.tensor(3.0), "n": (1, 2)}}
    assert first["params"] == {"coeff": torch.tensor(3.0)}
    assert first["groups"][0]["lr"] == 0.3
    assert meeting.count == 1


def test_the_buffers_of_a_model_are_sent_with_it() -> None:
    def change(learner: LearnerView) -> None:
        """Change a parameter and a buffer."""
        learner.model[1].running_mean.fill_(7)
        learner.model[0].weight.data.fill_(2)

    def train(peers: Peers) -> Any:
        """Return the tensors of the model."""
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
        callback = Does("Change", {"model": Write(broadcast=True)}, change, ranks="main")
        rank = build([callback], peers, model=model)
        rank.fire(BatchEnd())
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    first, second = Meeting(2).run(train)
    assert isinstance(first, dict)
    assert isinstance(second, dict)
    assert first["1.running_mean"] == 7
    assert first["0.weight"] == 2
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_value_that_the_main_rank_has_not_written_is_not_sent() -> None:
    def train(peers: Peers) -> Any:
        """Return the entries of cbstate."""
        rank = started(peers, Does("Later", {"cbstate.best": Write(broadcast=True)}, lambda learner: None))
        rank.fire(BatchEnd())
        return vars(rank.state.cbstate)

    assert Meeting(2).run(train) == [{}, {}]


# --- failures


@both
def test_a_rank_on_which_an_earlier_handler_failed_takes_part_without_a_value(
    executor: Callable[[], Executor],
) -> None:
    """No rank runs the later handler, which depends on the failed one, and no rank waits for ever."""

    def fail(learner: LearnerView) -> None:
        """Fail on the second rank."""
        if float(learner.batch.loss) == 1:
            raise CancelBatchException("no")

    def train(peers: Peers) -> Any:
        """Return which handlers ran, and the failure."""
        seen: list[str] = []
        first = Does("First", {"batch.loss": Read(), "batch.inputs": Write()}, fail, ranks="every")
        second = Does(
            "Second", {"batch.inputs": Read(), "batch.loss": Read(reduce="sum"), "cbstate.x": Write()},
            lambda learner: seen.append("second"), ranks="every",
        )  # fmt: skip
        third = Does("Third", {"batch.loss": Read(gather=True)}, lambda learner: seen.append("third"), ranks="every")
        untyped(second).resolve_conflict = untyped(first).resolve_conflict = lambda other: None
        rank = started(peers, first, second, third, executor=executor)
        try:
            rank.fire(BatchEnd(), loss=torch.tensor(float(peers.rank)))
        except CancelBatchException:
            seen.append("cancelled")
        return seen

    assert Meeting(2).run(train) == [["third"], ["third", "cancelled"]]


def test_a_main_rank_whose_handler_fails_sends_nothing() -> None:
    def fail(learner: LearnerView) -> None:
        """Write a value, and then fail."""
        learner.cbstate.best = 5
        raise ValueError("no")

    def train(peers: Peers) -> Any:
        """Return the entry, and the failure."""
        rank = started(
            peers, Does("Best", {"cbstate.best": Write(broadcast=True)}, fail, ranks="main", makes={"best": 1})
        )
        try:
            rank.fire(BatchEnd())
        except ValueError as error:
            return str(error)
        return rank.state.cbstate.best

    assert Meeting(2).run(train) == ["no", 1]


def test_a_rank_that_has_left_the_batch_takes_part_in_the_exchanges_of_its_events() -> None:
    """The conditions count that event there too, so that later exchanges fit together."""

    def train(peers: Peers) -> Any:
        """Return how often the handler ran."""
        seen: list[Any] = []
        callback = Does("Look", {"batch.loss": Read(reduce="sum")}, lambda learner: seen.append(1), ranks="every")
        rank = started(peers, throttle(callback, BatchEnd, every=2))
        for step in range(6):
            rank.state.batch.loss = torch.tensor(1.0)
            if peers.rank == 1 and step in (0, 3):
                rank.callbacks.plan(BatchEnd, TrainingPhase).exchange_nothing(BatchEnd(), TrainingPhase())
            else:
                rank.fire(BatchEnd(), loss=torch.tensor(1.0))
        return len(seen)

    meeting = Meeting(2)
    assert meeting.run(train) == [2, 2]
    assert meeting.count == 3


def test_ranks_that_come_to_different_exchanges_are_told() -> None:
    """A condition that differs between ranks cannot be seen in a declaration."""

    def train(peers: Peers) -> Any:
        """Return the error of this rank, which comes to another exchange than the other one."""
        here = [Does(name, {"batch.loss": Read(reduce="sum")}, lambda learner: None) for name in ("One", "Two")]
        for number, callback in enumerate(here):
            when(callback, BatchEnd, partial(lambda number, _, phase: peers.rank == number, number))
        try:
            started(peers, *here).fire(BatchEnd(), loss=torch.tensor(1.0))
        except RankError as error:
            return str(error)
        return ""

    one, two = Meeting(2).run(train)
    assert str(two).startswith("Rank 1 exchanges values for Two.handle")
    assert one == (
        "Rank 0 exchanges values for One.handle at (BatchEnd, TrainingPhase), before the handler, and rank 1 is at "
        "Two.handle at (BatchEnd, TrainingPhase), before the handler. All ranks must come to the same exchanges: let "
        "conditions, such as the predicate of when(), depend on the number of the event and on the phase only, and "
        "fire events of your own on every rank."
    )


def test_a_deferrable_callback_with_an_exchange_stays_on_the_training_thread() -> None:
    import threading

    class Log(Does):
        deferrable = True
        stochastic = False

    def train(peers: Peers) -> Any:
        """Return the thread of the handler, and what the executor says."""
        seen: list[Any] = []
        callback = Log(
            "Log", {"batch.loss": Read(reduce="sum")},
            lambda learner: seen.append((threading.current_thread() is threading.main_thread(), learner.batch.loss)),
        )  # fmt: skip
        rank = started(peers, callback, executor=lambda: DaskExecutor(workers=2))
        mine = threading.current_thread()
        callback.do = lambda learner: seen.append((threading.current_thread() is mine, float(learner.batch.loss)))
        rank.fire(BatchEnd(), loss=torch.tensor(1.0))
        told = rank.executor.explain(rank.callbacks.plan(BatchEnd, TrainingPhase))
        rank.executor.close()
        return seen, told

    main, other = untyped(Meeting(2).run(train))
    assert main[0] == [(True, 2.0)]
    assert "it exchanges values with other ranks" in main[1]
    assert other[0] == []


# --- one value for the values of all ranks


class Pair(NamedTuple):
    """Two values."""

    a: Any
    b: Any


@pytest.mark.parametrize(
    ("values", "how", "found"),
    [
        ([1, 2], "mean", 1.5),
        ([1, 2], "sum", 3),
        ([True, False, True], "sum", 2),
        ([True, False], "max", True),
        ([{"a": [1, Pair(2.0, "x")]}, {"a": [3, Pair(4.0, "x")]}], "sum", {"a": [4, Pair(6.0, "x")]}),
        ([(1, 2), (3, 0)], "min", (1, 0)),
        ([1e100, 1.0, -1e100], "sum", 0.0),
    ],
)
def test_numbers_and_containers(values: list[Any], how: Any, found: Any) -> None:
    made = combined(values, ("batch", "x"), Read(reduce=how))
    assert made == found
    assert type(made) is type(found)


@pytest.mark.parametrize(
    ("values", "how", "found"),
    [
        ([torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0])], "mean", torch.tensor([2.0, 3.0])),
        ([torch.tensor([1.0, 4.0]), torch.tensor([3.0, 2.0])], "min", torch.tensor([1.0, 2.0])),
        ([torch.tensor([1, 2]), torch.tensor([2, 3])], "mean", torch.tensor([1.5, 2.5])),
        ([torch.tensor([True, True]), torch.tensor([True, False])], "sum", torch.tensor([2, 1])),
        (
            [torch.tensor(40000.0, dtype=torch.float16)] * 2,
            "mean",
            torch.tensor(40000.0, dtype=torch.float16),  # whose sum is more than the largest half
        ),
    ],
)
def test_tensors_element_by_element(values: list[torch.Tensor], how: Any, found: torch.Tensor) -> None:
    made = combined(values, ("batch", "x"), Read(reduce=how))
    assert torch.equal(made, found)
    assert made.dtype == found.dtype


@pytest.mark.parametrize("how", ["min", "max", "sum", "mean"])
def test_nan_on_one_rank_is_nan_on_all(how: Any) -> None:
    for values in ([float("nan"), 1.0], [1.0, float("nan")]):
        number = combined(values, ("batch", "x"), Read(reduce=how))
        tensor = combined([torch.tensor(value) for value in values], ("batch", "x"), Read(reduce=how))
        assert number != number
        assert tensor.isnan()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            [torch.zeros(2), torch.zeros(3)],
            "batch.x has shape (2,) and torch.float32 on one rank, and (3,) and torch.float32 on another, so it has no "
            "sum over all ranks. Declare a number, or Read(gather=True) for a list of all values.",
        ),
        (["a", "b"], "batch.x is a str on the ranks, so it has no sum over all ranks."),
        ([1, "b"], "batch.x is a int, str on the ranks, so it has no sum over all ranks."),
        ([{"a": "x"}, {"a": "y"}], "batch.x['a'] is a str on the ranks"),
        (
            [{"a": 1}, {"b": 1}],
            "batch.x is a dict with 'a' on the first rank that has it and a dict with 'b' on another one (number 1), "
            "so it has no sum over all ranks.",
        ),
        ([[1], (1,)], "batch.x is a list with 0 on the first rank that has it and a tuple with 0 on another one"),
    ],
)
def test_values_that_have_no_sum(values: list[Any], text: str) -> None:
    with pytest.raises(RankError) as error:
        combined(values, ("batch", "x"), Read(reduce="sum"))
    assert str(error.value).startswith(text)


# --- the property: what the build accepts keeps shared state the same on every rank

ENTRIES = ("a", "b", "c")
EVENTS: list[type[Event]] = [BackwardEnd, UpdateBegin, BatchEnd]
reads = st.sampled_from([Read(), Read(reduce="mean"), Read(reduce="max"), Read(gather=True)])
writes = st.sampled_from([Write(), Write(broadcast=True)])
declared: st.SearchStrategy[dict[str, Read | Write]] = st.dictionaries(
    st.sampled_from(["batch.loss", *(f"cbstate.{name}" for name in ENTRIES), "optimizer.hyperparams", "params"]),
    st.one_of(reads, writes),
    max_size=4,
)
sketches = st.lists(
    st.tuples(declared, st.sampled_from([None, "main", "every"]), st.sampled_from(EVENTS)),
    min_size=1,
    max_size=5,
)


def _legal(path: str, kind: Read | Write) -> Read | Write:
    """Return the access, without an exchange that no path of this kind can have."""
    if isinstance(kind, Write):
        return Write() if path == "batch.loss" else kind
    return kind if path.startswith(("batch", "cbstate")) else Read()


def _numbers(value: Any) -> float:
    if isinstance(value, (list, tuple)):
        return sum((place + 1) * _numbers(each) for place, each in enumerate(value))
    return float(value)


class Random(Does):
    """Reads all that it declares, and writes a number made of it to all that it declares to write."""

    def __init__(self, number: int, access: dict[str, Read | Write], ranks: Any, event: type[Event]) -> None:
        super().__init__(f"Random{number}", access, self.change, event, ranks=ranks)
        self.number = number

    def setup(self, learner: LearnerView) -> None:
        for path, kind in self.access.items():
            if path.startswith("cbstate") and isinstance(kind, Write):
                setattr(learner.cbstate, path.partition(".")[2], 0.5)

    def change(self, learner: Any) -> None:
        """Write a number that depends on all state that is read."""
        found = float(self.number)
        for path in sorted(self.access):
            root, _, name = path.partition(".")
            if path == "params":
                found = found * 0.7 + float(learner.params["coeff"].detach())
            elif path == "optimizer.hyperparams":
                found = found * 0.7 + learner.optimizer.hyperparams[0]["lr"]
            else:
                found = found * 0.7 + _numbers(getattr(getattr(learner, root), name))
        for path in sorted(path for path, kind in self.access.items() if isinstance(kind, Write)):
            root, _, name = path.partition(".")
            if path == "params":
                learner.params["coeff"].data.fill_(found)
            elif path == "optimizer.hyperparams":
                learner.optimizer.hyperparams[0]["lr"] = found
            else:
                setattr(getattr(learner, root), name, torch.tensor(found) if root == "batch" else found)


def _outcome(sketch: Any, executor: Callable[[], Executor]) -> Callable[[Peers], Any]:
    def train(peers: Peers) -> Any:
        """Return the shared state after some batches, or the reason why the callbacks are refused."""
        first: dict[str, Read | Write] = {f"cbstate.{name}": Write() for name in ENTRIES}  # so that reads have a writer
        callbacks = [Random(0, first, "every", BackwardBegin)]
        for number, (access, place, event) in enumerate(sketch, 1):
            legal = {path: _legal(path, kind) for path, kind in access.items()}
            callbacks.append(Random(number, legal, place, event))
        try:
            rank = started(peers, *callbacks, executor=executor)
        except (RankError, MissingStateError) as error:
            return str(error)
        for step in range(3):
            loss = torch.tensor(0.25 * peers.rank + step)
            for event in (BackwardBegin(), BackwardEnd(), UpdateBegin(), BatchEnd()):
                rank.fire(event, loss=loss)
        rank.executor.close()
        return rank.shared()

    return train


@given(sketches)
def test_accepted_callbacks_keep_shared_state_the_same(sketch: Any) -> None:
    first, *others = Meeting(3).run(_outcome(sketch, EXECUTORS[0]))
    assert not isinstance(first, BaseException), repr(first)
    assert all(other == first for other in others)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(sketches)
def test_accepted_callbacks_keep_it_under_dask_too(sketch: Any) -> None:
    serial = Meeting(2).run(_outcome(sketch, EXECUTORS[0]))
    assert Meeting(2).run(_outcome(sketch, EXECUTORS[1])) == serial


def test_without_the_refusal_the_ranks_would_diverge() -> None:
    """A rate that follows the loss of each rank: refused, unless the author says that it is the same everywhere."""

    class Sure(Does):
        agrees = True

    access: Access = {"batch.loss": Read(), "optimizer.hyperparams": Write()}

    def follow(learner: LearnerView) -> None:
        """Set the learning rate to the loss."""
        learner.optimizer.hyperparams[0]["lr"] = float(learner.batch.loss)

    def train(kind: type[Does]) -> Callable[[Peers], Any]:
        def run(peers: Peers) -> Any:
            """Return the learning rate."""
            rank = started(peers, kind("Rate", access, follow))
            rank.fire(BatchEnd(), loss=torch.tensor(float(peers.rank)))
            return rank.state.optimizer.param_groups[0]["lr"]

        return run

    assert Meeting(2).run(train(Sure)) == [0.0, 1.0]
    assert all(isinstance(each, RankError) for each in Meeting(2).run(train(Does)))
