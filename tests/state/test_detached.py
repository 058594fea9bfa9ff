"""Rules 19 and 21: a deferrable handler that runs in place reads the same detached values as on a snapshot."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from flowtrain import (
    Access,
    BackwardEnd,
    BatchEnd,
    Callback,
    Learner,
    LearnerView,
    LossBegin,
    Phase,
    Read,
    TrainingPhase,
    Write,
    on,
)
from flowtrain.callback.phases import ValidationPhase
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.detached import detached
from flowtrain.state.namespace import State
from flowtrain_dask import DaskExecutor


class Pair(NamedTuple):
    mean: Any
    scale: Any


@dataclass(frozen=True)
class Found:
    logits: torch.Tensor
    hidden: list[torch.Tensor]


class Output(OrderedDict[str, torch.Tensor]):
    """A mapping with attributes, as model libraries return it."""

    logits: torch.Tensor


def output(value: torch.Tensor) -> Output:
    made = Output(logits=value)
    made.logits = value
    return made


class Shares(Callback):
    """Puts objects with graphs into ``cbstate`` and the batch."""

    def state_access(self) -> Access:
        return {"batch.outputs": Read(), "batch.extra": Write(), "cbstate.kept": Write(), "cbstate.inner": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.kept = {}
        learner.cbstate.inner = State("cbstate.inner")
        learner.cbstate.inner.last = None

    @on(LossBegin, TrainingPhase)
    def share(self, event: LossBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        outputs = learner.batch.outputs
        learner.batch.extra = {"pair": Pair(outputs, outputs.exp()), "found": Found(outputs, [outputs]), "n": 3}
        learner.cbstate.kept["outputs"] = [outputs]
        learner.cbstate.inner.last = outputs * 2


class Reads(Callback):
    """Keeps the results of a function of the learner at one event."""

    deferrable = True

    def __init__(self, access: Access, f: Callable[[LearnerView], Any], run_after: bool = True) -> None:
        self.access = access
        self.f = f
        self.found: list[Any] = []

    def state_access(self) -> Access:
        return self.access

    @on(BatchEnd, TrainingPhase)
    def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.found.append(self.f(learner))


def looked(value: torch.Tensor) -> Any:
    """Return the content of a tensor, and the properties by which a detached tensor differs from one with a graph."""
    about = type(value).__name__, value.requires_grad, value.is_leaf, value.grad_fn is None, value.grad is None
    return about, value.numpy().tolist()


def model_called(learner: LearnerView) -> Any:
    return looked(learner.model(learner.batch.inputs))


def own_graph(learner: LearnerView) -> Any:
    with torch.enable_grad():
        x = learner.batch.inputs.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((x**2).sum(), x)
    return looked(gradient), torch.is_grad_enabled()


READINGS: list[tuple[Access, Callable[[LearnerView], Any]]] = [
    ({"batch.outputs": Read()}, lambda learner: looked(learner.batch.outputs)),
    ({"batch": Read()}, lambda learner: [looked(learner.batch.outputs), looked(learner.batch.loss)]),
    ({"batch.extra": Read()}, lambda learner: [looked(each) for each in learner.batch.extra["pair"]]),
    ({"batch.extra": Read()}, lambda learner: looked(learner.batch.extra["found"].hidden[0])),
    ({"batch": Read()}, lambda learner: looked(learner.batch.extra["found"].logits)),
    ({"batch.extra.pair": Read()}, lambda learner: looked(learner.batch.extra.pair.scale)),
    ({"batch.grads": Read()}, lambda learner: {name: looked(each) for name, each in learner.batch.grads.items()}),
    ({"batch.grads": Read()}, lambda learner: looked(learner.batch.grads["0.weight"])),
    ({"cbstate.kept": Read()}, lambda learner: looked(learner.cbstate.kept["outputs"][0])),
    ({"cbstate.inner": Read()}, lambda learner: looked(learner.cbstate.inner.last)),
    ({"cbstate.inner.last": Read()}, lambda learner: looked(learner.cbstate.inner.last)),
    ({"cbstate": Read()}, lambda learner: looked(learner.cbstate.inner.last)),
    ({"params": Read()}, lambda learner: {name: looked(each) for name, each in learner.params.items()}),
    ({"params": Read()}, lambda learner: looked(learner.params["0.bias"])),
    ({"params.0.bias": Read()}, lambda learner: looked(learner.params["0.bias"])),
    ({"model": Read(), "batch.inputs": Read()}, model_called),
    ({"batch.inputs": Read()}, own_graph),
    (
        {"params": Read(), "optimizer.state": Read()},
        lambda learner: [learner.optimizer.state[each]["momentum_buffer"].tolist() for each in learner.params.values()],
    ),
]


def run(access: Access, f: Callable[[LearnerView], Any], executor: Any, strict: bool = False) -> list[Any]:
    torch.manual_seed(0)
    reads = Reads(access, f)
    reads.stochastic = False  # so that a thread may run the handler whatever paths it declares
    with Learner(
        nn.Sequential(nn.Linear(3, 2)),
        nn.functional.mse_loss,
        data=[(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(2)],
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        callbacks=[Shares(), reads],
        default_callbacks="quiet",
        executor=executor,
        strict=strict,
    ) as learner:
        learner.fit(1)
    return reads.found


@pytest.mark.cpu_only("makes numpy arrays of tensors")
@pytest.mark.parametrize(("access", "f"), READINGS)
def test_a_handler_reads_the_same_in_place_as_deferred(access: Access, f: Callable[[LearnerView], Any]) -> None:
    """``.numpy()`` on the outputs once worked under dask and failed serially."""
    serial = run(access, f, "serial")
    assert len(serial) == 2
    for defer in ("auto", "always", "never"):
        assert run(access, f, DaskExecutor(defer=defer)) == serial
    assert run(access, f, "serial", strict=True) == serial


class Trains(Reads):
    deferrable = False


@pytest.mark.cpu_only("makes numpy arrays of tensors")
def test_a_handler_that_training_waits_for_sees_the_tensors_in_use() -> None:
    with pytest.raises(RuntimeError, match="numpy"):
        Learner(
            nn.Linear(3, 2),
            nn.functional.mse_loss,
            data=[(torch.randn(4, 3), torch.randn(4, 2))],
            callbacks=[Trains({"batch.outputs": Read()}, lambda learner: learner.batch.outputs.numpy())],
            default_callbacks=False,
        ).fit(1)


class Keeps(Callback):
    deferrable = True

    def state_access(self) -> Access:
        return {"batch.outputs": Read(), "batch.loss": Read()}

    @on(BackwardEnd, TrainingPhase)
    def keep(self, event: BackwardEnd, phase: Phase, learner: LearnerView) -> None:
        self.outputs = learner.batch.outputs

    @on(BatchEnd, ValidationPhase)
    def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.same = self.outputs.grad_fn is None


def test_who_keeps_an_output_keeps_no_graph() -> None:
    keeps = Keeps()
    data = [(torch.randn(4, 3), torch.randn(4, 2))]
    learner = Learner(
        nn.Linear(3, 2), nn.functional.mse_loss, data=(data, data), callbacks=[keeps], default_callbacks=False
    )
    learner.fit(1)
    assert keeps.same


@pytest.mark.parametrize(
    "make",
    [
        lambda x: [1, x],
        lambda x: (1, (x,)),
        lambda x: Pair(x, 2),
        lambda x: {"a": x, "b": 1},
        lambda x: output(x),
        lambda x: deque([x], maxlen=3),
        lambda x: UserDict({"a": [x]}),
        lambda x: SimpleNamespace(a=x),
        lambda x: Found(x, []),
        lambda x: {"deep": [{"er": (x,)}]},
    ],
)
def test_containers_keep_their_type_and_the_original_its_graph(make: Callable[[torch.Tensor], Any]) -> None:
    x = torch.ones(2, requires_grad=True) * 3
    value = make(x)
    found = detached(value)
    assert type(found) is type(value)
    tensors = [each for each in leaves(found) if isinstance(each, torch.Tensor)]
    assert tensors
    assert not any(each.requires_grad for each in tensors)
    assert all(each.data_ptr() == x.data_ptr() for each in tensors)
    assert all(each is x for each in leaves(value) if isinstance(each, torch.Tensor))
    plain = make(x.detach())
    assert detached(plain) is plain


def leaves(value: Any) -> list[Any]:
    """Return all leaves of a value, including those of its containers and of its objects' attributes."""
    if isinstance(value, torch.Tensor):
        return [value]
    inner: list[Any] = [*getattr(value, "__dict__", {}).values()]
    if isinstance(value, (list, tuple, deque)):
        inner += value
    elif isinstance(value, (dict, UserDict)):
        inner += value.values()
    return [leaf for each in inner for leaf in leaves(each)] or [value]


def test_values_by_phase_and_namespaces_and_what_holds_itself() -> None:
    x = torch.ones(2, requires_grad=True)
    by_phase: PhaseMap[Any] = PhaseMap("cbstate.x")
    by_phase[TrainingPhase] = [x]
    assert not detached(by_phase)[TrainingPhase][0].requires_grad
    assert by_phase[TrainingPhase][0] is x
    state = State("cbstate.y")
    state.a, state.b = x, 1
    found = detached(state)
    assert (found.a.requires_grad, found.b, state.a.requires_grad) == (False, 1, True)
    assert not found.__twins__.a.requires_grad
    loop: list[Any] = [1]
    loop.append(loop)
    assert detached(loop) is loop
