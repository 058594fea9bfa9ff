"""Rules 20 to 22: what a snapshot holds is what was there at its place in the plan, whatever training does next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flowtrain import (
    Access,
    AccessError,
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Callback,
    Event,
    Learner,
    LearnerView,
    LossBegin,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UsageError,
    Write,
    on,
)
from flowtrain.callback.access import declare
from flowtrain.state.batch import BatchState
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.parameters import Parameters
from flowtrain.state.readonly import readonly
from flowtrain.state.series import Series, SeriesMap
from flowtrain.testing import tiny_learner
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.taker import CopiesOfFiring, Snapshot, Taker, copy_groups
from tests.support.accelerator import DEVICE, needs_accelerator

LOSS = ("batch", "loss")


def taker(state: LearnerState, access: Access, *, tail: bool = False) -> Taker:
    return Taker(declare(access, "me"), state, Pool(1 << 20), tail=tail)


def state_with(**batch: Any) -> LearnerState:
    state = LearnerState()
    state.show(BatchState())
    for name, value in batch.items():
        setattr(state.batch, name, value)
    return state


# --- in training


class InPlace(nn.Module):
    """Overwrites its inputs and its own results."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return F.relu_(self.layer(x.clone()))


class Popping(nn.Module):
    """Takes its inputs out of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.layer(x.pop("pixels"))  # type: ignore[no-any-return]  # a tensor


class Spoiler(Callback):
    """Writes into the outputs after they were read."""

    def state_access(self) -> Access:
        return {"batch.outputs": Write()}

    def run_after(self) -> tuple[type[Callback], ...]:
        return (Snapper,)

    @on(LossBegin)
    def spoil(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        learner.batch.outputs.mul_(3)


class Snapper(Callback):
    """Takes a snapshot and, beside it, a text of what is there now."""

    def __init__(self, event_type: type[Event], path: str) -> None:
        self.event_type = event_type
        self.path = path
        self.expected: list[str] = []
        self.snapshots: list[Snapshot] = []
        self._taker: Taker | None = None

    def state_access(self) -> Access:
        return {self.path: Read()}

    @on(Event)
    def take(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if not isinstance(event, self.event_type):
            return
        if self._taker is None:
            self._taker = taker(attrgetter("_state")(learner), {self.path: Read()})
        self.snapshots.append(self._taker.take())
        self.expected.append(shown(attrgetter(self.path)(learner)))


def shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(value.detach().tolist())
    return str({name: shown(value[name]) for name in value})


def one_buffer() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A loader that fills the same memory again and again."""
    inputs, targets = torch.zeros(300, 4), torch.zeros(300, 1)
    for number in range(5):
        yield inputs.fill_(number), targets.fill_(number)


class Loader:
    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return self.make()


def pixels() -> Iterator[Any]:
    return (({"pixels": inputs.clone()}, targets) for inputs, targets in one_buffer())


@pytest.mark.parametrize(
    ("event_type", "path", "model", "data"),
    [
        (BatchBegin, "batch.inputs", InPlace, one_buffer),
        (LossBegin, "batch.outputs", lambda: nn.Linear(4, 1), one_buffer),
        (BatchBegin, "batch.inputs", Popping, pixels),
        (BatchEnd, "batch.inputs", lambda: nn.Linear(4, 1), one_buffer),
        (BackwardEnd, "batch.grads", lambda: nn.Linear(4, 1), one_buffer),
        (BatchEnd, "params", lambda: nn.Linear(4, 1), one_buffer),
        (BatchEnd, "batch.loss", lambda: nn.Linear(4, 1), one_buffer),
    ],
)
def test_a_snapshot_is_what_was_there(
    event_type: type[Event], path: str, model: Callable[[], nn.Module], data: Callable[[], Iterator[Any]]
) -> None:
    """Rule 21: in-place models, models that pop from the batch, loaders that reuse memory, gradients clipped later."""
    torch.manual_seed(0)
    snapper = Snapper(event_type, path)
    learner = Learner(
        model(), F.mse_loss, data=Loader(data), default_callbacks=False, core=TorchCore(clip_grad_norm=1e-3),
        callbacks=[snapper, Spoiler()] if path == "batch.outputs" else [snapper],
    )  # fmt: skip
    learner.fit(1)
    assert len(snapper.snapshots) == 5
    found = [shown(snapshot.payload[tuple(path.split("."))]) for snapshot in snapper.snapshots]
    assert found == snapper.expected
    assert len(set(found)) == 5


# --- what is in it


def test_exactly_the_declared_reads_are_captured() -> None:
    state = state_with(a=torch.ones(3), b={"x": torch.ones(2), "y": torch.ones(100)}, c=1)
    snapshot = taker(state, {"batch.a": Read(), "batch.b.x": Read(), "batch.d": Read(optional=True)}).take()
    assert set(snapshot.payload) == {("batch", "a"), ("batch", "b")}
    assert list(snapshot.payload["batch", "b"]) == ["x"]
    assert snapshot.nbytes == 20


def test_all_of_the_batch_is_what_is_there_at_the_time() -> None:
    state = state_with(a=1)
    take = taker(state, {"batch": Read()}).take
    state.batch.b = 2
    assert take().payload == {("batch", "a"): 1, ("batch", "b"): 2}


def test_a_parameter_that_a_model_has_twice_is_found_by_both_names() -> None:
    state = LearnerState()
    model = state.model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    state.params = Parameters({"": model})
    params = taker(state, {"params": Read()}).take().payload["params",]
    assert list(params) == list(state.params)
    assert params["b.weight"] is params["a.weight"]
    with pytest.raises(KeyError, match=r"there is no parameter 'a\.wieght'\. Did you mean 'a\.weight'"):
        params["a.wieght"]


def test_a_tail_begins_at_the_handlers_last_event() -> None:
    """Rule 22: another process gets the entries since the lane's previous event."""
    state = LearnerState()
    metrics = state.cbstate.metrics_step = PhaseMap("cbstate.metrics_step", lambda: SeriesMap("cbstate.metrics_step"))
    take = taker(state, {"cbstate.metrics_step": Read()}, tail=True).take
    found: list[tuple[int, list[float]]] = []
    for step in range(1, 4):
        for _ in range(step):
            metrics[TrainingPhase].push("Loss", step / 2, step)
        series = readonly(take().payload["cbstate", "metrics_step"], "cbstate.metrics_step")[TrainingPhase]["Loss"]
        found.append((len(series), series.since(len(series) - step)))
    assert found == [(1, [0.5]), (3, [1.0, 1.0]), (6, [1.5, 1.5, 1.5])]
    with pytest.raises(UsageError, match=r"cbstate\.x is declared with Read\(full=True\).*stays in the process"):
        taker(state, {"cbstate.x": Read(full=True)}, tail=True)


def test_a_series_at_two_paths_has_the_same_tail_at_both() -> None:
    state = LearnerState()
    state.cbstate.one = state.cbstate.other = Series("cbstate.one")
    state.cbstate.all = state.cbstate.them = PhaseMap("cbstate.all", lambda: SeriesMap("cbstate.all"))
    take = taker(state, {f"cbstate.{name}": Read() for name in ("one", "other", "all", "them")}, tail=True).take
    for event in range(3):
        state.cbstate.one.push(event / 2, event)
        state.cbstate.all[TrainingPhase].push("Loss", event / 4, event)
        payload = take().payload
        for name in "one", "other":
            assert payload["cbstate", name].since(event) == [event / 2]
        for name in "all", "them":
            assert readonly(payload["cbstate", name], name)[TrainingPhase]["Loss"].since(event) == [event / 4]


def test_a_tail_begins_anew_when_a_checkpoint_was_loaded() -> None:
    """Rule 22: the handler's own state went back too, so it asks for what it has seen before, under the same steps."""
    state = LearnerState()
    series = state.cbstate.x = Series("cbstate.x")
    take = taker(state, {"cbstate.x": Read()}, tail=True).take
    for step in range(300):
        series.push(step / 2, step)
    saved: dict[str, list[Any]] = {"steps": list(range(200)), "values": [each / 2 for each in range(200)]}
    assert take().payload["cbstate", "x"].since(0)[-1] == 149.5
    series.__fill__(saved, {})
    for step in range(200, 310):
        series.push(step / 4, step)
    tail = take().payload["cbstate", "x"]
    assert tail.since(200) == [step / 4 for step in range(200, 310)]
    series.push(1.0, 310)
    assert take().payload["cbstate", "x"].since(310) == [1.0]
    series.__rewind__(5)
    assert take().payload["cbstate", "x"].since(0) == [0.0, 0.5, 1.0, 1.5, 2.0]


def test_bytes_that_snapshots_of_a_lane_share_count_once_in_it() -> None:
    """Rule 24: a limit of 1 GB is not reached by two handlers that share a copy of 600 MB."""
    state, pool = state_with(loss=torch.ones(300)), Pool(1 << 20)

    def of(lane: str) -> Taker:
        return Taker(declare({"batch.loss": Read()}, "me"), state, pool, tail=False, lane=lane)

    for _ in range(2):
        shared = CopiesOfFiring()
        assert [of(lane).take(shared).nbytes for lane in ("a", "a", "b", "a", "b")] == [1200, 0, 1200, 0, 0]


def test_what_cannot_be_copied_later_is_an_error_then() -> None:
    state = state_with()
    take = taker(state, {"batch.x": Read(optional=True)}).take
    take()
    state.batch.x = iter([1])
    with pytest.raises(AccessError, match=r"learner\.batch\.x is a builtins\.list_iterator"):
        take()


# --- sharing


class Reader(Callback):
    deferrable = True

    def state_access(self) -> Access:
        return {"batch.loss": Read(), "params": Read()}

    @on(BatchEnd, TrainingPhase)
    def read(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Nothing."""


class Writer(Callback):
    """Writes what the first reader has read and the third one will read."""

    def __init__(self, path: str) -> None:
        self.path = path

    def state_access(self) -> Access:
        return {self.path: Write()}

    def run_after(self) -> tuple[type[Callback], ...]:
        return (First,)

    @on(BatchEnd, TrainingPhase)
    def write(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        """Nothing."""


class First(Reader):
    """Goes before the writer."""


@pytest.mark.parametrize(
    ("path", "same_loss", "same_params"),
    [
        ("batch.loss", False, True),
        ("batch", False, True),
        ("model.coeff", True, False),
        ("batch.other", True, True),
        ("optimizer.param_groups", True, False),
        ("optimizer", True, False),
        ("optimizer.hyperparams", True, True),
        ("batch.grads", True, True),  # no copy of parameters has gradients
    ],
)
def test_a_copy_is_shared_where_nobody_writes_in_between(path: str, same_loss: bool, same_params: bool) -> None:
    """Rule 20; ``params`` are those of ``model``."""
    learner = tiny_learner(First(), Writer(path), Reader(), Reader(), default_callbacks=False)
    plan = learner.callbacks.plan(BatchEnd, TrainingPhase)
    names = [planned.node.name for planned in plan.handlers]
    assert names == ["First", "Writer", "Reader", "Reader#2"]
    groups = copy_groups(plan, [0, 2, 3])
    assert set(groups) == {0, 2, 3}
    assert groups[2] == groups[3]
    assert (groups[0][LOSS] == groups[2][LOSS]) == same_loss
    assert (groups[0]["params",] == groups[2]["params",]) == same_params
    state, shared, pool = state_with(loss=torch.ones(300)), CopiesOfFiring(), Pool(1 << 20)
    declaration = declare({"batch.loss": Read()}, "me")
    takers = [Taker(declaration, state, pool, tail=False).for_groups(groups[at]) for at in (0, 2, 3)]
    found = [taker.take(shared).payload[LOSS] for taker in takers]
    assert (found[0] is found[1]) == same_loss
    assert found[1] is found[2]


def test_memory_is_used_again_when_all_who_share_it_have_let_go() -> None:
    state, pool = state_with(loss=torch.ones(300)), Pool(1 << 20)
    takers = [Taker(declare({"batch.loss": Read()}, "me"), state, pool, tail=False)] * 2
    shared = CopiesOfFiring()
    one, other = (each.take(shared) for each in takers)
    address = one.payload[LOSS].data_ptr()
    shared.clear()
    del one
    third = takers[0].take()
    assert third.payload[LOSS].data_ptr() != address
    del other
    assert takers[0].take().payload[LOSS].data_ptr() == address


# --- from a device


@needs_accelerator
def test_from_an_accelerator_through_pinned_memory() -> None:
    """Rule 21: cloned on the current stream, then to the host on another one."""
    source = torch.zeros(1_000_000, device=DEVICE)
    state = state_with(x=source)
    take = taker(state, {"batch.x": Read()}).take
    snapshots = []
    for number in range(20):
        source.fill_(number)
        snapshots.append(take())
    source.fill_(-1)
    for number, snapshot in enumerate(snapshots):
        snapshot.ready()
        found = snapshot.payload["batch", "x"]
        assert (found.device.type, found.unique().tolist()) == ("cpu", [number])
