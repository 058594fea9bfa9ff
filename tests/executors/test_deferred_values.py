"""What a deferred callback may read and be, told when the learner is built, and any value on the other side."""

from __future__ import annotations

import contextvars
import datetime
import enum
import pathlib
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import cloudpickle  # type: ignore[import-untyped]  # it has no annotations
import numpy
import pytest
import torch

from flowtrain import (
    Access,
    AccessError,
    BatchBegin,
    BatchEnd,
    Callback,
    CallbackError,
    ExecutorError,
    FlowtrainError,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    Write,
    on,
)
from flowtrain.graph.executor import Executor
from flowtrain.graph.serial import SerialExecutor
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor, Limits
from flowtrain_dask.cluster.codec import dump_entries, load_entries
from flowtrain_dask.lanes.work import Entry, run_entries
from flowtrain_dask.parallel.torch_state import TorchState
from tests.support.lanes import job_of

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse (invariant checks|CSR tensor support|BSR tensor support):UserWarning"),
]


@dataclass
class Box:
    tensor: torch.Tensor
    name: str = "box"


@dataclass(frozen=True)
class Frozen:
    items: list[int]


class Pair(NamedTuple):
    left: torch.Tensor
    right: int


class Color(enum.Enum):
    RED = 1


class Thing:
    """Of a type that nobody said how to copy."""


def _shared() -> list[torch.Tensor]:
    whole = torch.arange(6.0)
    return [whole, whole[2:4], whole]


def _quantized(scales: list[float] | None = None) -> torch.Tensor:
    values = torch.tensor([[0.1, 0.5], [0.7, 1.0]])
    if scales is None:
        return torch.quantize_per_tensor(values, 0.1, 3, torch.quint8)
    return torch.quantize_per_channel(values, torch.tensor(scales), torch.zeros(2), 0, torch.qint8)


VALUES: dict[str, Callable[[], Any]] = {
    "bfloat16": lambda: torch.tensor([1.5, -0.0, float("nan")], dtype=torch.bfloat16),
    "float16": lambda: torch.tensor([65504.0, 1e-7], dtype=torch.float16),
    "float8": lambda: torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    "float64": lambda: torch.tensor([1e300], dtype=torch.float64),
    "uint16": lambda: torch.tensor([65535], dtype=torch.uint16),
    "boolean": lambda: torch.tensor([True, False]),
    "uint8": lambda: torch.tensor([255], dtype=torch.uint8),
    "complex64": lambda: torch.tensor([1 + 2j]),
    "conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "negative": lambda: torch.tensor([1 + 2j]).conj().imag,
    "quantized": _quantized,
    "per_channel": lambda: _quantized([0.1, 0.2]),
    "sparse": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 0, 1], [2, 2, 0]]), torch.arange(3.0), (2, 3)),
    "sparse_csr": lambda: torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse_csr(),
    "sparse_bsr": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "scalar": lambda: torch.tensor(3.25),
    "empty": lambda: torch.zeros(0, 3),
    "transposed": lambda: torch.arange(6.0).view(2, 3).t(),
    "strided": lambda: torch.arange(20.0)[1::3],
    "expanded": lambda: torch.tensor([[1.0], [2.0]]).expand(2, 3),
    "channels_last": lambda: torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "large": lambda: torch.arange(10_000.0),
    "shared": _shared,
    "requires_grad": lambda: torch.ones(2, requires_grad=True) * 2,
    "parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "dataclass": lambda: Box(torch.tensor([1.0, 2.0])),
    "frozen": lambda: Frozen([1, 2]),
    "named_tuple": lambda: Pair(torch.ones(1), 2),
    "numpy_float": lambda: numpy.float32(1.25),
    "numpy_int": lambda: numpy.int64(2**60),
    "numpy_bool": lambda: numpy.bool_(True),
    "numpy_array": lambda: numpy.arange(6.0).reshape(2, 3)[:, ::-1],
    "numpy_0d": lambda: numpy.array(2.5),
    "numpy_struct": lambda: numpy.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "numpy_text": lambda: numpy.array(["a", "bc"]),
    "numpy_time": lambda: numpy.array(["2020-01-01"], dtype="datetime64[D]"),
    "plain": lambda: [1, 2.5, "text", None, b"bytes", 1j, (1,), {2}, frozenset({3}), range(3)],
    "mappings": lambda: [{"a": [1]}, OrderedDict(b=2), defaultdict(list, c=[3]), deque([4], maxlen=2)],
    "odd": lambda: [Color.RED, pathlib.PurePosixPath("a/b"), datetime.timedelta(1), torch.float16, torch.Size([2])],
}


def told(value: Any) -> Any:
    """Describe a value by all that should be the same on the other side."""
    if isinstance(value, torch.Tensor):
        how: tuple[Any, ...] = (str(value.dtype), str(value.layout), tuple(value.shape))
        dense = value.detach()
        if value.is_quantized:
            how += (str(value.qscheme()),)
            dense = dense.dequantize()
        elif value.layout is not torch.strided:
            dense = dense.to_dense()
        return *how, repr(dense.resolve_conj().resolve_neg().to(torch.complex128).tolist())
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return type(value).__name__, str(value.dtype), value.shape, repr(value.tolist())
    if isinstance(value, (Box, Frozen)):
        return type(value).__name__, {name: told(item) for name, item in vars(value).items()}
    if isinstance(value, Pair):
        return "Pair", told(value.left), value.right
    if isinstance(value, Mapping):
        return {key: told(item) for key, item in value.items()}
    if isinstance(value, (Sequence, deque)) and not isinstance(value, (str, bytes, range)):
        return [told(item) for item in value]
    if isinstance(value, Set):
        return {repr(item) for item in value}
    return repr(value)


def spoil(value: Any) -> None:
    """Change a value in place, as later training would."""
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            fixed = value.is_quantized or value.is_nested or value.dtype is torch.float8_e4m3fn
            if not fixed and value.layout is torch.strided:
                value[...].copy_(torch.zeros(())) if 0 not in value.stride() else value[:, 0].zero_()
            elif value.layout is torch.sparse_coo:
                value._values().zero_()
    elif isinstance(value, numpy.ndarray):
        value[...] = value.dtype.type(0) if value.dtype.names is None and value.dtype.kind == "f" else value[...]
    elif isinstance(value, Box):
        spoil(value.tensor)
        value.name = "spoiled"
    elif isinstance(value, Frozen):
        value.items.append(9)
    elif isinstance(value, Pair):
        spoil(value.left)
    elif isinstance(value, list):
        for each in value:
            spoil(each)
        value.append("spoiled")


class Giver(Callback):
    """Makes values anew for each batch, and spoils those of the batch before."""

    def __init__(self, values: Mapping[str, Callable[[], Any]]) -> None:
        self.values = values

    def state_access(self) -> Access:
        return {"batch.values": Write(), **{f"cbstate.{name}": Write() for name in self.values}}

    def setup(self, learner: LearnerView) -> None:
        for name, make in self.values.items():
            setattr(learner.cbstate, name, make())

    @on(BatchBegin, TrainingPhase)
    def give(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        for name in self.values:
            spoil(getattr(learner.cbstate, name))
        self.setup(learner)
        learner.batch.values = {name: make() for name, make in self.values.items()}


class Taker(Callback):
    """Describes what it reads, and keeps it."""

    deferrable = True

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.names = list(values)
        self.told: list[dict[str, Any]] = []
        self.kept: dict[str, Any] = {}

    def state_access(self) -> Access:
        return {"batch.values": Read(), **{f"cbstate.{name}": Read() for name in self.names}}

    @on(BatchEnd, TrainingPhase)
    def take(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.told.append({name: told(getattr(learner.cbstate, name)) for name in self.names})
        self.told.append({name: told(value) for name, value in learner.batch.values.items()})
        self.kept = {name: getattr(learner.cbstate, name) for name in self.names}


def check_values(executor: Executor) -> Taker:
    taker = Taker(VALUES)
    with tiny_learner(Giver(VALUES), taker, n_batches=2, executor=executor) as learner:
        learner.fit(1)
        spoil(learner.cbstate.shared)
    wanted = {name: told(make()) for name, make in VALUES.items()}
    assert len(taker.told) == 4
    for found in taker.told:
        assert {name: (found[name], wanted[name]) for name in wanted if found[name] != wanted[name]} == {}
    return taker


def test_any_value_is_right_in_place() -> None:
    """What the others are measured by."""
    check_values(SerialExecutor())


def test_any_value_is_right_in_a_thread() -> None:
    """Rule 21."""
    taker = check_values(DaskExecutor(defer="always"))
    assert told(taker.kept["shared"]) == told(_shared())
    assert not any(tensor.requires_grad for tensor in (taker.kept["requires_grad"], taker.kept["parameter"]))


def test_any_value_is_right_in_a_process(dask_processes: Any) -> None:
    """Rules 21 and 26: also when it comes home again in an attribute."""
    taker = check_values(DaskExecutor(dask_processes.address, defer="always"))
    assert {name: told(value) for name, value in taker.kept.items()} == {n: told(make()) for n, make in VALUES.items()}


# --- what is refused


class Reader(Callback):
    """A deferred callback that reads what it is told to."""

    deferrable = True

    def __init__(self, access: Access, *, durable: bool = False, **attributes: Any) -> None:
        self.access = access
        self.durable = durable
        self.events = 0
        vars(self).update(attributes)

    def state_access(self) -> Access:
        return self.access

    @on(BatchEnd, TrainingPhase)
    def read(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.events += 1


THING: dict[str, Callable[[], Any]] = {"thing": lambda: {"deep": [Thing()]}}
OBJECTS: dict[str, Callable[[], Any]] = {"thing": lambda: numpy.array([Thing()])}
NESTED: dict[str, Callable[[], Any]] = {"thing": lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])}
LOSS: Access = {"batch.loss": Read()}
DROPS = Limits(when_full="drop")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("callback", "before", "options", "kind", "text"),
    [
        (lambda: Reader({"cbstate.best": Write()}), {}, {}, CallbackError, r"is deferrable and declares Write\(\) on"),
        (
            lambda: Reader(LOSS, mine=[tiny_learner()]), {}, {}, CallbackError,
            r"Reader(#2)? is deferred and keeps Learner in its attribute 'mine'.*read it from their `learner`",
        ),
        (
            lambda: Reader({"cbstate.thing": Read()}), THING, {}, AccessError,
            r"(?s)cbstate\.thing\['deep'\]\[0\] is a \S*Thing.*register_copier\(Thing, copy.deepcopy\)",
        ),
        (lambda: Reader({"cbstate.thing": Read()}), OBJECTS, {}, AccessError, r"cbstate\.thing is a numpy\.ndarray"),
        (lambda: Reader({"cbstate.thing": Read()}), NESTED, {}, AccessError, r"\(nested\) cannot be copied"),
        (
            lambda: Reader(LOSS, durable=True), {}, {"limits": DROPS}, ExecutorError,
            r'Reader(#2)? is durable, so no event of it may be dropped.*when_full="block"',
        ),
        (
            lambda: Reader({"cbstate.metrics_step": Read()}), {}, {"limits": DROPS}, ExecutorError,
            r"Reader(#2)? reads a series, .*holds only the new values",
        ),
    ],
    ids=["write", "learner", "unregistered", "objects", "nested", "durable", "series"],
)  # fmt: skip
def test_what_cannot_be_deferred_is_refused_and_nothing_changes(
    callback: Callable[[], Reader],
    before: dict[str, Callable[[], Any]],
    options: dict[str, Any],
    kind: type[FlowtrainError],
    text: str,
) -> None:
    """Rules 11, 19, 21 and 24: by `Learner` and by a change of callbacks; both can be used afterwards."""
    executor = DaskExecutor(defer="always", **options)
    with pytest.raises(kind, match=text):
        tiny_learner(Giver(before), callback(), executor=executor)
    good = Reader(LOSS)
    with tiny_learner(Giver(before), good, n_batches=3, executor=executor) as learner:
        learner.epoch(TrainingPhase)
        with pytest.raises(kind, match=text):
            learner.add_callback(callback())
        learner.fit(1)
        assert len([each for each in learner.callbacks if isinstance(each, Reader)]) == 1
        assert learner.executor is executor
        assert good.events == 6


def test_what_is_put_into_a_batch_is_refused_when_it_is_there() -> None:
    """Rule 21: nobody knows it earlier."""
    learner = tiny_learner(Giver(THING), Reader({"batch.values": Read()}), executor=DaskExecutor(defer="always"))
    text = r"learner\.batch\.values\['thing'\]\['deep'\]\[0\] is a \S*Thing"
    with learner, pytest.raises(AccessError, match=text):
        learner.fit(1)


def test_a_callback_that_does_not_pickle_is_refused_where_it_has_to(dask_processes: Any) -> None:
    """Rule 19: and the executor serves the next learner."""
    executor = DaskExecutor(dask_processes.address, defer="always")
    with pytest.raises(ExecutorError, match="Reader cannot be sent to another process: its attribute 'lock'"):
        tiny_learner(Reader(LOSS, lock=threading.Lock()), executor=executor)
    fine = Reader(LOSS)
    with tiny_learner(fine, n_batches=3, executor=executor) as learner:
        learner.fit(1)
    assert fine.events == 3


def test_a_reader_of_whole_series_stays_in_this_process(dask_processes: Any) -> None:
    """Rule 22: `explain` says so, and the report."""
    series: Access = {"cbstate.metrics_step": Read(full=True)}
    reader = Reader(series, lock=threading.Lock())  # need not pickle
    executor = DaskExecutor(dask_processes.address, defer="always")
    with tiny_learner(reader, Reader(LOSS), n_batches=2, executor=executor) as learner:
        learner.fit(1)
        text = learner.callbacks.explain()
        assert "Reader.read is deferred to lane Reader (a thread: Reader: it declares Read(full=True) on " in text
        assert f"Reader#2.read is deferred to lane Reader#2 ({dask_processes.address})" in text
        where = {lane.lane: lane.where for lane in executor.report().lanes}
        assert where["Reader"] == "thread"
        assert where["Reader#2"].startswith(f"{dask_processes.address}, worker tcp://")


# --- the state of torch and Python at the event

MARK = contextvars.ContextVar("MARK", default="unset")


class Looks(Callback):
    """Notes the settings that it sees, after a moment in which training sets others."""

    deferrable = True
    stochastic = False

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.dtypes: list[torch.dtype] = []
        self.go_on = threading.Event()

    @on(BatchEnd, TrainingPhase, access={"batch.loss": Read()})
    def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.go_on.wait(20)
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self.seen.append((MARK.get(), *autocast, torch.zeros(1).device.type, torch.is_grad_enabled()))
        self.dtypes.append(torch.get_default_dtype())
        MARK.set("changed by a handler")


@pytest.mark.parametrize("deferred", [False, True])
def test_rule_14_a_deferred_handler_sees_the_settings_of_its_event(deferred: bool) -> None:
    looks, executor = Looks(), DaskExecutor(defer=deferred)
    raw = torch.ones(2, 1), torch.ones(2, 1)
    with tiny_learner(looks, default_callbacks=False, executor=executor) as learner:
        if not deferred:
            looks.go_on.set()
        for mark in ("first", "second"):
            token = MARK.set(mark)
            with torch.autocast("cpu", torch.bfloat16, enabled=mark == "second"), torch.device("cpu"):
                learner.step(TrainingPhase, raw)
            MARK.reset(token)
        looks.go_on.set()
        learner.flush()
    enabled = [(one[0], one[1], one[3], one[4]) for one in looks.seen]
    assert enabled == [("first", False, "cpu", False), ("second", True, "cpu", False)]
    assert looks.seen[1][2] is torch.bfloat16


def test_a_lane_leaves_the_default_dtype_of_training_alone() -> None:
    """It is one for all threads: a lane that set it back to that of its first event would change training."""
    looks = Looks()
    raw = torch.ones(2, 1), torch.ones(2, 1)
    with tiny_learner(looks, default_callbacks=False, executor=DaskExecutor(defer="always")) as learner:
        looks.go_on.set()
        learner.step(TrainingPhase, raw)
        learner.flush()
        torch.set_default_dtype(torch.float64)
        try:
            learner.step(TrainingPhase, raw)
            learner.flush()
        finally:
            torch.set_default_dtype(torch.float32)
    assert looks.dtypes == [torch.float32, torch.float64]


def test_rule_14_another_process_has_the_torch_state_of_each_event() -> None:
    """The threads, autocast, inference mode and default dtype; context variables do not leave the process."""
    looks = Looks()
    looks.go_on.set()
    made: list[Entry] = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.inference_mode(enabled):
            state = TorchState.of_event()
        made.append(Entry(len(made), 0, BatchEnd(), TrainingPhase(), {("batch", "loss"): 1.0}, 8, torch=state))
    sent = load_entries(bytes(dump_entries([each._replace(context=contextvars.copy_context()) for each in made])))
    assert [each.torch for each in sent] == [each.torch for each in made]
    assert [each.context for each in sent] == [None, None]
    result = run_entries([looks], job_of(looks), sent, "run", "Looks", seeded=True)
    assert result.failure is None
    assert [(one[1], one[4]) for one in looks.seen] == [(False, False), (True, False)]
