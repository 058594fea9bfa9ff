# pyright: reportPrivateUsage=false
# A callback moves the lanes of an executor by hand.
"""Rules 20, 21 and 23 as a property: deferred handlers see what they would have seen in place, in that order.

Drawn are callbacks that write in place and deferred ones that read, at any events and paths, with conditions, shared
resources and ``run_after``; the model works in place, takes apart its input, and gives out buffers of its own.

``python -m pytest --hypothesis-profile=long tests/executors/test_deferred_properties.py`` is the longer run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import (
    Access,
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Callback,
    EpochEnd,
    Event,
    Learner,
    LearnerView,
    LossBegin,
    MissingStateError,
    NoConflict,
    Phase,
    Read,
    Resolution,
    TorchCore,
    UpdateBegin,
    UpdateEnd,
    Write,
)
from flowtrain.callback.handler import Handler
from flowtrain.callbacks import throttle
from flowtrain.graph.executor import Executor
from flowtrain.graph.serial import SerialExecutor
from flowtrain.state.series import Series
from flowtrain_dask import DaskExecutor
from tests.support.examples import examples

pytestmark = pytest.mark.slow

EVENTS = (BatchBegin, LossBegin, BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd, EpochEnd)
WRITABLE = ("batch.inputs", "batch.outputs", "batch.note", "cbstate.tensor", "cbstate.list", "cbstate.nested")
READABLE = (
    *WRITABLE,
    "batch",
    "batch.loss",
    "batch.grads",
    "params",
    "cbstate.history",
    "cbstate.metrics_step",
    "optimizer.hyperparams",
    "optimizer.state",
)
RESOURCES = ("resource.file", "resource.pyplot")


def plain(value: Any) -> Any:
    """Return what can be compared, made when it is called."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.tolist()
    if isinstance(value, Series):
        return [value.last()] if len(value) else []
    if isinstance(value, Mapping):
        return {str(key) if not isinstance(key, torch.Tensor) else "param": plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def at(learner: LearnerView, path: str) -> Any:
    """Return what is at a path; ``None`` where there is nothing yet."""
    if path == "batch":
        names = ("inputs", "targets", "outputs", "loss", "note")
        return {name: at(learner, f"batch.{name}") for name in names}
    found: Any = learner
    try:
        for name in path.split("."):
            found = getattr(found, name)
    except MissingStateError:
        return None
    return found


def work_on(value: Any) -> Any:
    """Change a value in place, all the way down; return one to put in its place, which is often the same."""
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            return value.add_(1) if value.is_floating_point() and not value.requires_grad else value
    if isinstance(value, dict):
        for item in value.values():
            work_on(item)
        value["more"] = len(value)
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, (list, torch.Tensor)):
                work_on(item)
        value.append(len(value))
        if len(value) > 4:
            return [value[0]]
    return value


@dataclass(frozen=True)
class Spec:
    """What a callback declares and when it runs."""

    deferred: bool
    paths: tuple[str, ...]
    events: tuple[type[Event], ...]
    resource: str | None
    after: frozenset[int]
    every: int


class Drawn(Callback):
    """Writes in place, or reads and remembers."""

    def __init__(self, spec: Spec, journal: list[Any]) -> None:
        self.spec = spec
        self.deferrable = spec.deferred
        self.journal = journal
        self.seen: list[Any] = []

    def state_access(self) -> Access:
        kind = Read(optional=True) if self.spec.deferred else Write()
        mine: dict[str, Any] = dict.fromkeys(self.spec.paths, kind)
        return mine if self.spec.resource is None else {**mine, self.spec.resource: Write()}

    def run_after(self) -> tuple[type[Callback], ...]:
        return tuple(KINDS[number] for number in self.spec.after)

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        return None if other.deferrable or self.deferrable else NoConflict()

    def handlers(self) -> Iterator[tuple[type, Handler]]:
        for event in self.spec.events:
            yield type(self), Handler(event, Phase, None, type(self).__name__, "act")

    def act(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        where = f"{type(event).__name__} {phase!r}"
        self.seen.append(where)
        for path in self.spec.paths:
            value = at(learner, path)
            if self.spec.deferred:
                self.seen.append((path, plain(value)))
            else:
                owner, name = getattr(learner, path.partition(".")[0]), path.partition(".")[2]
                if value is not None or name == "note":
                    setattr(owner, name, [1] if value is None else work_on(value))
        if self.spec.deferred:
            self.journal.append((type(self).__name__, where))


KINDS = [type(f"K{number}", (Drawn,), {}) for number in range(7)]


class Rude(torch.nn.Module):
    """Takes its input apart, works in place, and gives out one buffer in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)
        self.kept = torch.zeros(3, 2)

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        x = inputs.pop("x")
        # Times 1: what autograd has saved is not what callbacks write to.
        y = torch.relu_(self.linear(x.mul_(0.5) * 1)) * 1
        return y if torch.is_grad_enabled() else self.kept.copy_(y)


class Loss:
    """Gives out one number in validation, in the same place each time."""

    def __init__(self) -> None:
        self.kept = torch.zeros(())

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = (outputs - targets).square().mean()
        return loss if torch.is_grad_enabled() else self.kept.copy_(loss)


class Loader:
    """Fills the same tensors for each batch."""

    def __init__(self) -> None:
        self.x, self.targets = torch.zeros(3, 2), torch.zeros(3, 2)

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
        for number in range(3):
            self.x.fill_(number + 1)
            self.targets.fill_(-number)
            yield {"x": self.x, "name": f"batch {number}", "also": [self.x]}, self.targets


@st.composite
def specs(draw: st.DrawFn) -> list[Spec]:
    found: list[Spec] = []
    for number in range(draw(st.integers(2, len(KINDS)))):
        deferred = draw(st.booleans())
        paths = draw(st.sets(st.sampled_from(READABLE if deferred else WRITABLE), min_size=1, max_size=3))
        events = draw(st.sets(st.sampled_from(EVENTS), min_size=1, max_size=3))
        found.append(
            Spec(
                deferred=deferred,
                paths=tuple(sorted(paths)),
                events=tuple(event for event in EVENTS if event in events),
                resource=draw(st.sampled_from([None, None, *RESOURCES])) if deferred else None,
                after=frozenset(draw(st.sets(st.integers(0, number - 1), max_size=1)) if number else ()),
                every=draw(st.sampled_from([1, 1, 2])),
            )
        )
    # One that runs in place must not come after a deferred one, which would stay in place then.
    return [
        spec if spec.deferred else replace(spec, after=frozenset(i for i in spec.after if not found[i].deferred))
        for spec in found
    ]


def run(drawn: list[Spec], executor: Executor, moves: Sequence[Callback] = ()) -> tuple[Any, ...]:
    """Return what all callbacks saw, the order in which those of one lane did, and the parameters."""
    torch.manual_seed(0)
    journals: dict[str | None, list[Any]] = {resource: [] for resource in RESOURCES}
    callbacks: list[Callback] = []
    for number, spec in enumerate(drawn):
        callback: Callback = KINDS[number](spec, journals.get(spec.resource, []))
        callbacks.append(throttle(callback, spec.events[0], every=spec.every))
    for number, move in enumerate(moves):  # in the list before other callbacks, and behind them
        callbacks.insert(number * len(callbacks), move)
    learner = Learner(
        Rude(),
        Loss(),
        data=(Loader(), Loader()),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        callbacks=callbacks,
        default_callbacks="quiet",
        executor=executor,
        core=TorchCore(device="cpu", clip_grad_norm=0.01, accumulate=2),
    )
    with learner:
        cbstate: Any = learner.cbstate
        cbstate.tensor, cbstate.list, cbstate.nested = torch.zeros(2), [torch.ones(1), 2], {"t": torch.ones(2)}
        learner.fit(2)
        report = learner.executor.report() if isinstance(learner.executor, DaskExecutor) else None
        if report is not None:
            deferred = {f"K{number}" for number, spec in enumerate(drawn) if spec.deferred}
            assert {name for lane in report.lanes for name in lane.callbacks} <= deferred
            assert report.pending == 0
        seen = [callback.seen for callback in callbacks if isinstance(callback, Drawn)]
        return seen, journals, plain(learner.params)


@given(specs())
@settings(max_examples=examples(60))
def test_deferred_handlers_see_what_they_would_have_seen_in_place(drawn: list[Spec]) -> None:
    serial = run(drawn, SerialExecutor())
    assert run(drawn, DaskExecutor(defer="always")) == serial
    assert run(drawn, DaskExecutor(defer="always", parallel="always", workers=3)) == serial


class Moves(Callback):
    """Has lanes of the executor move at random events, in the middle of a plan too."""

    def __init__(self, random: Any, executor: DaskExecutor) -> None:
        self.random = random
        self.executor = executor

    def state_access(self) -> Access:
        return {"resource.rng": Write()}  # on the training thread

    def handlers(self) -> Iterator[tuple[type, Handler]]:
        for event in EVENTS:
            yield type(self), Handler(event, Phase, None, type(self).__name__, "move")

    def move(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        site = self.executor._site
        assert site is not None
        for placement in self.executor._deferred.use(site).placements:
            placement.mode, placement.anchor = "lane", None  # no race decides any more
            if self.random.random() < 0.5:
                assert placement.move(self.random.random() < 0.5)


@given(specs(), st.randoms(use_true_random=False), st.sampled_from(["auto", "always"]))
@settings(max_examples=examples(60))
def test_deferred_handlers_that_move_see_what_they_would_have_seen_in_place(
    drawn: list[Spec], random: Any, parallel: Any
) -> None:
    """Rules 13, 20, 23 and 26 across every move between the place and the lane."""
    serial = run(drawn, SerialExecutor())
    executor = DaskExecutor(parallel=parallel, workers=3)
    assert run(drawn, executor, [Moves(random, executor), Moves(random, executor)]) == serial
