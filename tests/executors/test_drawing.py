# pyright: reportPrivateUsage=false
# The tests compare the private lists of names with what the packages have.
"""Deferred callbacks that draw random numbers: the same numbers wherever they run, and training is never changed."""

from __future__ import annotations

import inspect
import json
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    ExecutorError,
    FitEnd,
    Learner,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    Write,
    on,
)
from flowtrain.callbacks import Checkpointer, LogMetrics, LogVisualization
from flowtrain.graph.held_backends import names_in
from flowtrain.graph.nodes import Node
from flowtrain.logging import JsonlBackend, Value
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import tiny_learner
from flowtrain_dask import DaskExecutor
from flowtrain_dask.cluster.worker import leave_random_numbers_alone
from flowtrain_dask.deferred.policy import _DRAWING, _DRAWING_MODULES, may_draw
from tests.support.dask_processes import DaskProcesses
from tests.support.logs import log_fields

Where = Literal["serial", "dask", "cluster"]
PLACES = ("serial", "dask", pytest.param("cluster", marks=pytest.mark.slow))


def drawn(learner: LearnerView) -> dict[str, Value]:
    """Draw from each generator of the process."""
    found = {"torch": float(torch.rand(())), "python": random.random(), "numpy": float(np.random.randn())}
    return {name: Value(value) for name, value in found.items()}


class Late(Callback):
    """Draws at some events only, the first of them late."""

    deferrable = True

    def __init__(self, backend: JsonlBackend) -> None:
        self.backends = (backend,)
        self.count = 0
        self.found: list[float] = []

    def state_access(self) -> Access:
        return {"cbstate.history": Read(), self.backends[0].resource: Write()}

    @on(BatchEnd, TrainingPhase)
    def look(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.count += 1
        if self.count in (5, 6, 11):
            self.found.append(random.gauss(0, 1) + float(torch.randn(())))

    @on(FitEnd)
    def pick(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        self.found.append(random.choice(range(1000)))


def executor_at(where: Where, request: pytest.FixtureRequest) -> Any:
    if where == "serial":
        return where
    return DaskExecutor(
        request.getfixturevalue("dask_processes").address if where == "cluster" else None, defer="always"
    )


def learner_with(callbacks: list[Callback], executor: Any = "serial") -> Learner:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    data = [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(6)]
    return Learner(
        model, nn.functional.cross_entropy, data=data, callbacks=callbacks, default_callbacks="quiet", executor=executor
    )


def train(callbacks: list[Callback], executor: Any = "serial", epochs: int = 2, resume: Path | None = None) -> Any:
    """Train; return the last loss and the generators behind it."""
    with learner_with(callbacks, executor) as learner:
        learner.fit(epochs, resume=resume)
        state = random.getstate(), torch.get_rng_state().tolist(), repr(np.random.get_state())
        return float(learner.batch.loss), state


@pytest.mark.parametrize("where", PLACES)
def test_what_a_consumer_draws_is_the_same_everywhere_and_training_is_not_changed(
    where: Where, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def callbacks(name: str) -> list[Callback]:
        backend = JsonlBackend(tmp_path / name)
        return [LogVisualization(drawn, backend, every=3, access={}), Late(JsonlBackend(tmp_path / f"late {name}"))]

    here, there = callbacks("here"), callbacks("there")
    plain = train([])
    assert train(here) == plain
    assert train(there, executor_at(where, request)) == plain
    found = log_fields(tmp_path / "here", "step", "name", "value")
    assert [step for step, _, _ in found] == [3, 3, 3, 6, 6, 6, 9, 9, 9, 12, 12, 12]
    assert len({value for _, _, value in found}) == 12
    assert log_fields(tmp_path / "there", "step", "name", "value") == found
    late = [callback.found for callback in (here[1], there[1]) if isinstance(callback, Late)]
    assert late[0] == late[1]
    assert len(late[0]) == 4


@pytest.mark.parametrize(
    ("first", "then"),
    [("serial", "serial"), ("dask", "serial"), pytest.param("serial", "cluster", marks=pytest.mark.slow)],
)
def test_a_run_that_resumes_draws_what_it_would_have_drawn(
    first: Where, then: Where, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A fit that is resumed begins with one more event for who handles `FitBegin`."""

    def callbacks(name: str) -> list[Callback]:
        folder = tmp_path / name
        return [
            LogVisualization(drawn, JsonlBackend(folder / "log"), every=4, access={}),
            Checkpointer(folder / "checkpoints"),
        ]

    whole = train(callbacks("whole"), epochs=4)
    train(callbacks("parts"), executor_at(first, request), epochs=2)
    torch.manual_seed(99)  # as in another process
    resumed = train(callbacks("parts"), executor_at(then, request), epochs=4, resume=tmp_path / "parts/checkpoints")
    assert resumed == whole
    logs = [log_fields(tmp_path / name / "log", "step", "name", "value") for name in ("parts", "whole")]
    assert logs[0] == logs[1]


class Stochastic(Late):
    stochastic = True


class Steady(Late):
    stochastic = False


def explained(callback: Callback, executor: Any) -> str:
    with learner_with([callback], executor) as learner:
        return learner.callbacks.explain()


def test_explain_says_why_one_that_draws_is_not_deferred_to_a_thread(
    tmp_path: Path, dask_processes: DaskProcesses
) -> None:
    backend = JsonlBackend(tmp_path / "log")
    why = "runs in place: it may draw random numbers ({}), and a thread would take them from training; see stochastic"
    late = explained(Late(backend), DaskExecutor(defer="always"))
    assert f"Late.look {why.format('choice in Late.pick')}" in late.replace("gauss in Late.look", "choice in Late.pick")
    assert why.format("stochastic = True") in explained(Stochastic(backend), DaskExecutor(defer="always"))
    steady = explained(Steady(backend), DaskExecutor(defer="always"))
    assert "Steady.look is deferred to lane Steady (a thread)" in steady
    text = explained(Late(backend), DaskExecutor(dask_processes.address, defer="always"))
    assert f"Late.look is deferred to lane Late ({dask_processes.address})" in text


class Whole(Late):
    def state_access(self) -> Access:
        return {"cbstate.metrics_step": Read(full=True), **super().state_access()}


def test_a_lane_that_cannot_leave_the_process_takes_none_that_draws(
    tmp_path: Path, dask_processes: DaskProcesses
) -> None:
    backend = JsonlBackend(tmp_path / "log")
    text = explained(Whole(backend), DaskExecutor(dask_processes.address, defer="always"))
    assert "Whole.look runs in place: it may draw random numbers" in text
    joined: list[Callback] = [Steady(backend), Whole(backend)]
    with learner_with(joined, DaskExecutor(dask_processes.address, defer="always")) as learner:
        assert "Steady.look runs in place: Whole runs in place and shares resource" in learner.callbacks.explain()


# --- what is seen in the code


def helper() -> float:
    return deeper()


def deeper() -> float:
    return float(torch.rand(()))


class Picker:
    def pick(self) -> int:
        return random.randint(0, 3)


class Dropping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x)


def node(f: Callable[..., Any], access: Access | None = None) -> Node:
    callback = LogVisualization(f, JsonlBackend("log"), access={} if access is None else access)
    return tiny_learner(callback).callbacks.nodes[0]


def closing(value: Any) -> Callable[..., Any]:
    return lambda learner: value(learner)


@pytest.mark.parametrize(
    ("f", "what"),
    [
        (lambda learner: torch.rand(()), "rand in <lambda>"),
        (lambda learner: [np.random.rand() for _ in range(3)], "rand in <lambda>"),
        (lambda learner: helper(), "rand in deeper"),
        (closing(lambda learner: random.random()), "random in <lambda>"),
        (closing(Picker().pick), "randint in Picker.pick"),
        (closing(Dropping()), "dropout in Dropping.forward"),
        (closing(nn.Sequential(nn.Dropout())), "Dropout"),
        (closing(nn.LSTM(2, 2, 2, dropout=0.1)), "LSTM"),
        (lambda learner: learner.batch.outputs.mean(), ""),
        (closing(nn.Linear(2, 2)), ""),
        (closing(json.dumps), ""),
    ],
)
def test_what_draws_is_found_in_functions_objects_and_modules(f: Callable[..., Any], what: str) -> None:
    assert may_draw(node(f)) == what


def draws_in(source: str) -> str:
    """Return the evidence for a function of a user that is written so."""
    names: dict[str, Any] = {"__name__": "of_a_user"}
    exec(source, names)
    return may_draw(node(names["f"]))


def methods_of(module: Any, owner: object) -> list[str]:
    """Return the functions of a module that are methods of a hidden generator."""
    return [name for name in dir(module) if getattr(getattr(module, name), "__self__", None) is owner]


PYTHON = methods_of(random, vars(random)["_inst"])
NUMPY = methods_of(np.random, vars(np.random.mtrand)["_rand"])


@pytest.mark.parametrize(("module", "names"), [("random", PYTHON), ("numpy.random", NUMPY)])
def test_every_function_of_the_random_modules_is_known_however_it_is_imported(module: str, names: list[str]) -> None:
    """A new version of Python or NumPy may bring further ones."""
    assert {"choice", "shuffle"} < {*names}
    assert module == "random" or {"laplace", "bytes", "f", "power"} < {*names}
    for name in names:
        call = "other(1)\n"
        for source in (
            f"from {module} import {name} as other\ndef f(learner): {call}",
            f"import {module} as m\ndef f(learner): m.{name}(1)\n",
            f"def f(learner):\n  from {module} import {name} as other\n  {call}",
            f"def f(learner):\n  import {module} as m\n  m.{name}(1)\n",
            f"from {module} import {name}\nclass Held:\n  draw = staticmethod({name})\n"
            f"held = Held()\ndef f(learner): held.draw(1)\n",
        ):
            assert draws_in(source), source


def test_a_generator_of_ones_own_with_another_name_is_left_to_its_owner() -> None:
    assert draws_in("import json\nfrom math import pow as power\ndef f(learner): power(json.dumps(1), bytes(3))") == ""


def test_every_function_of_torch_that_draws_is_known() -> None:
    """torch tags them. Those like ``lstm``, which draw for a rate of dropout, are common names of attributes."""
    tagged = set()
    for name in {name[6:].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")}:
        packet = getattr(torch.ops.aten, name)
        if any(torch.Tag.nondeterministic_seeded in getattr(packet, each).tags for each in packet.overloads()):
            tagged.add(name)
    places = (torch, torch.Tensor, nn.functional, torch.special, torch.linalg)
    public = {name for name in tagged if not name.startswith("_") and any(hasattr(place, name) for place in places)}
    assert {"rand", "bernoulli_", "multinomial"} < public
    assert sorted(public - _DRAWING - {"lstm", "gru", "rnn_tanh", "rnn_relu", "miopen_rnn"}) == []


@pytest.mark.parametrize("module", [nn.functional, nn.init, torch], ids=lambda module: module.__name__)
def test_every_function_of_torch_in_python_that_calls_one_that_draws_is_known(module: ModuleType) -> None:
    functions = {name: each for name, each in vars(module).items() if isinstance(each, FunctionType)}
    calling = {name for name, each in functions.items() if {*names_in(each.__code__)} & _DRAWING}
    public = {name for name in calling if not name.startswith("_")} - {"get_rng_state", "initial_seed"}
    assert sorted(public - _DRAWING) == []


def test_every_module_of_torch_that_draws_is_known() -> None:
    """Those that draw when they are called, and those that draw their first parameters when they are made."""
    pools = nn.FractionalMaxPool2d(2, 2), nn.FractionalMaxPool3d(2, 2)
    for module in (nn.Dropout2d(), nn.AlphaDropout(), nn.RReLU(), *pools):
        assert may_draw(node(closing(module))) == type(module).__name__
    functions = _DRAWING & ({*dir(torch)} | {*dir(nn.functional)})
    drawing = {
        name
        for name, kind in vars(nn).items()
        if isinstance(kind, type) and issubclass(kind, nn.Module) and {*names_in(kind.forward.__code__)} & functions
        # A rate that is not 0 is found in the module.
        if "dropout" not in inspect.signature(kind).parameters and not issubclass(kind, nn.RNNBase)
    }
    assert {"Dropout", "FractionalMaxPool2d"} < drawing
    assert [name for name in sorted(drawing) if not any(part in name for part in _DRAWING_MODULES)] == []
    for name in ("Linear", "Conv2d", "Embedding", "LSTM", "Transformer", "MultiheadAttention", "Bilinear"):
        assert draws_in(f"import torch\ndef f(learner): return torch.nn.{name}(2, 2)\n") == f"{name} in f"
    assert draws_in("import torch\ndef f(learner): return isinstance(learner, torch.nn.BatchNorm2d)\n") == ""


def test_a_model_that_is_read_may_draw_when_it_is_called() -> None:
    state = LearnerState()
    state.model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    quiet = node(lambda learner: learner.model, {"model": Read()})
    assert may_draw(quiet, state) == "Dropout"
    state.model = nn.Linear(2, 2)
    assert may_draw(quiet, state) == ""


# --- dask's own


def test_dask_draws_from_a_generator_of_its_own() -> None:
    """It draws in threads of the process that trains, whenever it estimates a size."""
    from dask import sizeof
    from distributed.protocol import compression

    leave_random_numbers_alone()
    state = random.getstate()
    sizeof.sizeof(list(range(10_000)))
    compression.byte_sample(memoryview(bytes(10_000)), 10, 3)
    assert random.getstate() == state


def test_a_module_of_dask_that_is_imported_later_draws_from_that_generator_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave_random_numbers_alone()
    late = ModuleType("dask.late")
    vars(late).update(random=random, draw=random.random, choose=random.choice)
    monkeypatch.setitem(sys.modules, "dask.late", late)
    leave_random_numbers_alone()
    state = random.getstate()
    for draw in (late.random.random, late.draw, partial(late.choose, [1, 2])):
        draw()
    assert random.getstate() == state


class Noise:
    """Batches with numbers of all three generators of the process."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(6):
            x = 0.1 * (torch.rand(4, 1) + random.random() + float(np.random.rand()))
            yield x, 3 * x


@pytest.mark.slow
def test_rule_13_the_data_draws_the_same_numbers_beside_a_cluster_in_this_process(tmp_path: Path) -> None:
    """Its scheduler and its client run in a thread of the training process."""

    def run(executor: Any) -> list[Any]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        log = LogMetrics(JsonlBackend(tmp_path / f"{executor}.jsonl"))
        with tiny_learner(log, data=Noise(), executor=executor) as learner:
            learner.fit(3)
        return [learner.model.coeff.item(), random.random(), float(np.random.rand()), torch.rand(()).item()]

    assert run("local") == run("serial")


class Ends(Callback):
    """Ends the cluster at a batch."""

    def __init__(self, processes: DaskProcesses) -> None:
        self.processes = processes
        self.count = 0

    @on(BatchEnd, TrainingPhase)
    def end(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.count += 1
        if self.count == 3:
            self.processes.close()


def test_one_that_draws_is_not_processed_beside_training_when_the_cluster_is_lost(
    make_dask_processes: Callable[[], DaskProcesses], tmp_path: Path
) -> None:
    processes = make_dask_processes()
    processes.start_worker("a")
    logs = LogMetrics(JsonlBackend(tmp_path / "metrics"))
    draws = LogVisualization(drawn, JsonlBackend(tmp_path / "log"), every=1, access={})
    with (
        pytest.raises(ExecutorError) as caught,
        learner_with([Ends(processes), logs, draws], DaskExecutor(processes.address, defer="always")) as learner,
    ):
        learner.fit(2)
    text = str(caught.value)
    assert "of lane LogVisualization. They may draw random numbers (LogVisualization: " in text
    assert "Resume from the last checkpoint, or set stochastic = False on a callback that draws none." in text
