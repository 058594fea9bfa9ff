"""`Reach`, the model of conflicts, knows every pair of paths where a write through one is seen through the other."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from flowtrain import (
    Access,
    Callback,
    Learner,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    UpdateBegin,
    Write,
    WriteConflictError,
    on,
)
from flowtrain.callback.access import Declaration, declare
from flowtrain.callbacks import LearningRate, LearningRateMonitor, Scheduler, one_cycle
from flowtrain.errors import AccessError
from flowtrain.graph.reach import Reach, meetings
from flowtrain.state.optimizer_view import OptimizerParts
from flowtrain.state.partial_view import Owner
from flowtrain.state.views import bind_view
from flowtrain.testing import tiny_learner
from tests.callback.test_access import declarations


class Scaled(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ((outputs - targets) ** 2).mean() * self.scale.sum()


class Net(nn.Module):
    """A model with a shared weight, a layer under two names, a property, a buffer, and a value that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(2)
        self.again = self.norm
        self.head = nn.Linear(2, 1)
        self.temperature = 1.0

    @property
    def backbone(self) -> nn.Module:
        """Return a layer under another name."""
        return self.first

    @property
    def parts(self) -> list[nn.Module]:
        """Return several layers, which have no names here."""
        return [self.tied, self.head]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.tied(self.first(inputs)))) / self.temperature  # type: ignore[no-any-return]  # a tensor


class Bystander(Callback):
    """Has an attribute, which a reader of ``callbacks`` sees."""

    def __init__(self) -> None:
        self.kept = torch.zeros(2)


class Both(TrainingPhase):
    """Trains two models in one batch."""

    provides = None

    def step(self, learner: Any, raw: Any) -> None:
        inputs, targets = raw
        with learner.run_batch(self, inputs=inputs, targets=targets) as batch:
            with learner.forward():
                batch.outputs = learner.model.disc(learner.model.gen(inputs))
                batch.loss = learner.lossfn(batch.outputs, targets)
            learner.backward(self, batch.loss)
            learner.update(self)


def learner_of(model: Any, optimizer: Any, phase: type[Phase]) -> Learner:
    """Return a learner with a value at every path, as at the end of a batch."""
    batches = [(torch.rand(4, 2), torch.rand(4, 1))]  # a list returns the same tensors in each pass
    learner = Learner(
        model, Scaled(), data={phase: batches}, optimizer=optimizer, callbacks=[Bystander()], default_callbacks="quiet"
    )
    learner.state.cbstate.kept = {"value": 1.0, "tensor": torch.ones(2)}
    learner.state.cbstate.other = torch.ones(2)
    learner.step(phase, batches[0])
    return learner


def one_model() -> Learner:
    return learner_of(Net(), partial(torch.optim.Adam, lr=0.1), TrainingPhase)


def two_models() -> Learner:
    adam = partial(torch.optim.Adam, lr=torch.tensor(0.1), foreach=False)  # both optimizers share the tensor
    return learner_of({"gen": nn.Linear(2, 2), "disc": nn.Linear(2, 1)}, {"gen": adam, "disc": adam}, Both)


PARTS = ("hyperparams", "param_groups", "state", "defaults")
COMMON: dict[str, Callable[[Any], Any]] = {
    "lossfn": lambda view: view.lossfn,
    "lossfn.scale": lambda view: view.lossfn.scale,
    "params": lambda view: view.params,
    "data": lambda view: view.data,
    "batch": lambda view: [getattr(view.batch, name) for name in ("inputs", "targets", "outputs", "loss", "grads")],
    "batch.inputs": lambda view: view.batch.inputs,
    "batch.targets": lambda view: view.batch.targets,
    "batch.outputs": lambda view: view.batch.outputs,
    "batch.loss": lambda view: view.batch.loss,
    "batch.grads": lambda view: view.batch.grads,
    "cbstate": lambda view: [view.cbstate.kept, view.cbstate.other],
    "cbstate.kept": lambda view: view.cbstate.kept,
    "cbstate.kept.value": lambda view: (view.cbstate.kept, "value"),
    "cbstate.other": lambda view: view.cbstate.other,
    "callbacks": lambda view: view.callbacks,
}
ONE = COMMON | {
    "model": lambda view: view.model,
    "model.first": lambda view: view.model.first,
    "model.first.weight": lambda view: view.model.first.weight,
    "model.tied.weight": lambda view: view.model.tied.weight,
    "model.norm": lambda view: view.model.norm,
    "model.again.running_mean": lambda view: view.model.again.running_mean,
    "model.backbone.bias": lambda view: view.model.backbone.bias,
    "model.parts": lambda view: view.model.parts,
    "model.temperature": lambda view: (vars(view._state.model), "temperature"),
    "params.first.weight": lambda view: view.params["first.weight"],
    "params.tied.weight": lambda view: view.params["tied.weight"],
    "params.head.bias": lambda view: view.params["head.bias"],
    "batch.grads.first.weight": lambda view: view.batch.grads["first.weight"],
    "batch.grads.head.bias": lambda view: view.batch.grads["head.bias"],
    "optimizer": lambda view: [getattr(view.optimizer, name) for name in PARTS],
    "optimizer.hyperparams": lambda view: view.optimizer.hyperparams,
    "optimizer.param_groups": lambda view: view.optimizer.param_groups,
    "optimizer.state": lambda view: view.optimizer.state,
    "optimizer.defaults": lambda view: view.optimizer.defaults,
}
TWO = COMMON | {
    "model": lambda view: view.model,
    "model.gen": lambda view: view.model.gen,
    "model.disc.weight": lambda view: view.model.disc.weight,
    "params.gen": lambda view: [view.params["gen.weight"], view.params["gen.bias"]],
    "params.disc.weight": lambda view: view.params["disc.weight"],
    "batch.grads.gen.weight": lambda view: view.batch.grads["gen.weight"],
    "optimizer": lambda view: [view.optimizer.gen, view.optimizer.disc],
    "optimizer.gen": lambda view: view.optimizer.gen,
    "optimizer.gen.hyperparams": lambda view: view.optimizer.gen.hyperparams,
    "optimizer.gen.param_groups": lambda view: view.optimizer.gen.param_groups,
    "optimizer.gen.state": lambda view: view.optimizer.gen.state,
    "optimizer.disc": lambda view: view.optimizer.disc,
    "optimizer.disc.hyperparams": lambda view: view.optimizer.disc.hyperparams,
    "optimizer.disc.param_groups": lambda view: view.optimizer.disc.param_groups,
    "optimizer.disc.state": lambda view: view.optimizer.disc.state,
}


def places(value: Any, seen: dict[int, Any] | None = None) -> Iterator[Any]:
    """Yield all changeable places of a value: tensors, and numbers as ``(mapping, key)``."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return
    seen[id(value)] = value  # kept alive, so that no other object gets its id
    inner: Iterable[Any] = ()
    if isinstance(value, torch.Tensor):
        yield value
        inner = [value.grad] if value.is_leaf else []
    elif isinstance(value, (nn.Module, Callback)):
        inner = [vars(value)]
    elif isinstance(value, OptimizerParts):
        inner = [getattr(value, name) for name in PARTS]
    elif isinstance(value, Mapping):
        for key, item in value.items():
            inner = [*inner, key, *([] if isinstance(item, float) else [item])]
            if isinstance(item, float):
                yield value, key
    elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], dict) and isinstance(value[1], str):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        inner = value
    for each in inner:
        yield from places(each, seen)


def shown(value: Any) -> list[Any]:
    """Return the content of all changeable places of a value."""
    return [each.tolist() if isinstance(each, torch.Tensor) else each[0][each[1]] for each in places(value)]


def change(value: Any) -> None:
    """Change the content of all changeable places of a value."""
    with torch.no_grad():
        for each in places(value):
            if isinstance(each, torch.Tensor):
                each.add_(1)
            else:
                each[0][each[1]] += 1


def seen_through(make: Callable[[], Learner], paths: Mapping[str, Callable[[Any], Any]], written: str) -> set[str]:
    """Return the paths through which a change through the path `written` is seen, each declared alone."""
    learner = make()

    def look(path: str) -> Any:
        declaration = declare({path: Write()}, "me")
        owner = Owner("me", "Me", "state_access", declaration)
        return paths[path](bind_view(declaration, learner.state, owner))

    before = {path: shown(look(path)) for path in paths}
    assert all(before.values()), [path for path, content in before.items() if not content]
    change(look(written))
    return {path for path in paths if shown(look(path)) != before[path]}


@pytest.mark.cpu_only("on the CPU a batch shares its memory with the data")
@pytest.mark.parametrize(("make", "paths"), [(one_model, ONE), (two_models, TWO)])
def test_no_change_is_seen_through_a_path_that_the_model_of_conflicts_keeps_apart(
    make: Callable[[], Learner], paths: Mapping[str, Callable[[Any], Any]]
) -> None:
    """Rule 5: for every pair of documented paths, the test writes through one and looks through the other."""
    reach = Reach(make().state)
    seen = {(one, other) for one in paths for other in seen_through(make, paths, one)}
    parts = {path: tuple(path.split(".")) for path in paths}
    known = {(one, other) for one in paths for other in paths if reach.overlap(parts[one], parts[other])}
    assert {(path, path) for path in paths} <= seen
    assert seen <= known, sorted(seen - known)
    # `MORE` lists the few pairs that `Reach` reports without a visible change; more would refuse independent callbacks.
    assert {tuple(sorted(pair)) for pair in known - seen} == MORE[make]


MORE: dict[Callable[[], Learner], set[tuple[str, ...]]] = {
    one_model: {
        # `params` and the optimizer count as the whole model, with its buffers and other attributes.
        *((name, path) for name in ("model.temperature", "model.again.running_mean")
          for path in ("optimizer", "optimizer.param_groups", "params")),
        # An attribute of a model that torch has not registered may show any part of the model.
        *((path, "model.parts") for path in ("model.again.running_mean", "model.backbone.bias", "model.norm")),
        ("model.parts", "model.temperature"),
        *((path, "model.backbone.bias") for path in ("batch.grads.first.weight", "batch.grads.head.bias",
          "model.again.running_mean")),
        *(("model.backbone.bias", path) for path in ("model.first.weight", "model.norm", "model.temperature",
          "model.tied.weight", "params.first.weight", "params.head.bias", "params.tied.weight")),
    },
    # A phase without `provides` may take any entry of the batch from its data.
    two_models: {("batch.loss", "data"), ("batch.outputs", "data")},
}  # fmt: skip


# --- objects with several paths


class Perceptual(nn.Module):
    """A loss that holds the first layer of a model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class Plain:
    """A loss that holds the first layer, and is not a module."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs - targets).mean()


class Viewed(nn.Module):
    """A model with two parameters that share memory, and one that does not."""

    def __init__(self) -> None:
        super().__init__()
        memory = torch.zeros(6)
        self.whole, self.part = nn.Parameter(memory[:4]), nn.Parameter(memory[2:4])
        self.beside = nn.Parameter(memory[4:])


def regions(learner: Learner, path: str) -> set[str]:
    return {".".join(region) for region in Reach(learner.state)(tuple(path.split(".")))}


@pytest.mark.parametrize("loss", [Perceptual, Plain])
def test_a_loss_that_holds_a_part_of_the_model_reaches_it(loss: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    learner = tiny_learner(model=model, lossfn=loss(model[0]))
    assert regions(learner, "params.0.bias") == {"model.0.bias", "lossfn.layer.bias", "batch.grads.0.bias"}
    assert regions(learner, "lossfn.layer") >= {"lossfn.layer", "model.0", "batch.grads.0"}
    assert regions(learner, "batch.grads.0.bias") == {"batch.grads.0.bias"}
    assert regions(learner, "params.1.bias") == {"model.1.bias", "batch.grads.1.bias"}


@pytest.mark.cpu_only("a model that moves to a device copies each parameter")
def test_parameters_in_one_piece_of_memory_are_one_piece_of_state() -> None:
    learner = tiny_learner(model=Viewed(), optimizer=partial(torch.optim.SGD, lr=0.1))
    assert regions(learner, "params.whole") >= {"model.whole", "model.part"}
    assert regions(learner, "params.beside") == {"model.beside", "batch.grads.beside"}


def test_models_that_share_a_layer_are_trained_by_each_others_optimizer() -> None:
    trunk = nn.Linear(1, 1)
    learner = Learner(
        {"one": nn.Sequential(trunk), "other": nn.Sequential(trunk), "third": nn.Linear(1, 1)},
        nn.functional.mse_loss,
        optimizer=dict.fromkeys(("one", "other", "third"), partial(torch.optim.SGD, lr=0.1)),
        default_callbacks="quiet",
    )
    assert regions(learner, "params.one.0.bias") >= {"model.one.0.bias", "model.other.0.bias"}
    assert regions(learner, "optimizer.one.param_groups") >= {"model.one", "model.other", "optimizer.one.hyperparams"}
    assert regions(learner, "optimizer.third") == {"model.third", "batch.grads.third", "optimizer.third"}


def test_a_model_without_a_size_yet_and_properties_that_fail_are_no_obstacle() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LazyLinear(1)

        @property
        def features(self) -> Any:
            """Raise, as there are no features before a forward pass."""
            raise RuntimeError("no forward pass yet")

    state = tiny_learner().state
    state.model = Lazy()
    assert Reach(state)(("model", "features")) == (("batch.grads",), ("model",))
    assert Reach(state)(("model", "layer", "weight"))[-1] == ("model", "layer", "weight")
    assert Reach(state)(("model", "layer", "in_features")) == (("model", "layer", "in_features"),)


class Drawing(nn.Module):
    """A model with a spectral norm, and with attributes that run the user's code."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    @property
    def noise(self) -> torch.Tensor:
        """Return random numbers."""
        return torch.rand(1)

    def __getattr__(self, name: str) -> Any:
        if name == "later":
            return torch.rand(1)
        return super().__getattr__(name)


class Looks(Callback):
    """Declares to read one path, and does not use it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def state_access(self) -> Access:
        return {self.path: Read()}

    @on(UpdateBegin)
    def look(self, event: UpdateBegin, phase: Phase, learner: LearnerView) -> None:
        pass


@pytest.mark.parametrize("path", ["model.noise", "model.later", "model.layer.weight", "model.noise.of.its.own"])
def test_to_declare_a_path_runs_no_code_of_the_model(path: str) -> None:
    """Running a spectral norm changes a buffer, so a mere declaration would change training."""
    torch.manual_seed(0)
    model = Drawing()
    before, drawn = {name: each.clone() for name, each in model.state_dict().items()}, torch.get_rng_state()
    learner = tiny_learner(Looks(path), model=model)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    whole = "model.layer" if path == "model.layer.weight" else "model"
    assert regions(learner, path) == {whole, whole.replace("model", "batch.grads")}  # it may show any part


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_compiled_part_has_the_names_of_the_module_inside() -> None:
    part: Any = torch.compile(nn.Sequential(nn.Linear(1, 1)))
    model = nn.Sequential(OrderedDict(compiled=part))
    learner = tiny_learner(Looks("model.compiled.0.weight"), model=model)
    inside = "compiled._orig_mod.0.weight"
    assert regions(learner, "model.compiled.0.weight") == {f"model.{inside}", f"batch.grads.{inside}"}
    assert regions(learner, "params.compiled._orig_mod.0.weight") == regions(learner, "model.compiled.0.weight")
    with pytest.raises(AccessError, match=r"'model\.compiled\.0\.wieght', but model\.compiled\.0 has no 'wieght'"):
        tiny_learner(Looks("model.compiled.0.wieght"), model=model)


# --- errors and orders that users see


class Sets(Callback):
    """Sets the learning rate through the parameter groups."""

    def state_access(self) -> Access:
        return {"optimizer.param_groups": Write()}

    @on(UpdateBegin)
    def set_rate(self, event: UpdateBegin, phase: Phase, learner: LearnerView) -> None:
        learner.optimizer.param_groups[0]["lr"] = 0.5


class After(Sets):
    """Sets the learning rate through the parameter groups, after schedulers."""

    def run_after(self) -> tuple[type[Callback], ...]:
        return (Scheduler,)


def test_who_sets_the_rate_through_the_groups_beside_a_scheduler_has_to_say_in_which_order() -> None:
    """Rule 7: with .004, .0059, .0116 or .5 the rates depend on the order, so the list must not decide the order."""
    with pytest.raises(WriteConflictError) as caught:
        tiny_learner(Sets(), Scheduler({LearningRate: one_cycle(0.1)}))
    assert caught.value.paths == ("optimizer.param_groups", "optimizer.hyperparams")
    assert str(caught.value).startswith(
        "Sets and Scheduler both write at (UpdateBegin, TrainingPhase), and nothing says which goes first: Sets writes "
        "optimizer.param_groups, Scheduler writes optimizer.hyperparams (both reach optimizer.hyperparams). If Sets "
        "sets hyperparameters only, let it use and declare optimizer.hyperparams. Say it, in one of these ways:\n"
    )
    for turn in (1, -1):
        callbacks = [After(), LearningRateMonitor(), Scheduler({LearningRate: one_cycle(0.1)})][::turn]
        learner = tiny_learner(*callbacks, n_batches=3)
        learner.fit(1)
        # The monitor reads the hyperparameters, so it runs after both writers.
        assert list(learner.cbstate.tracehistory[TrainingPhase]["LearningRate"]) == [(1, 0.5)]


class Touches(Callback):
    """A callback without a declaration."""

    def __init__(self, access: Access) -> None:
        self.access = access

    def state_access(self) -> Access:
        return self.access

    @on(UpdateBegin)
    def touch(self, event: UpdateBegin, phase: Phase, learner: LearnerView) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("one", "other", "region"),
    [
        ("optimizer.param_groups", "params", "model"),
        ("optimizer", "model.coeff", "model.coeff"),
        ("batch.grads", "params.coeff", "batch.grads.coeff"),
        ("batch", "model", "batch.grads"),
        ("lossfn", "optimizer.param_groups", "lossfn"),
        ("data", "batch.inputs", "batch.inputs"),
    ],
)
def test_two_writers_of_one_object_are_refused_by_both_names(one: str, other: str, region: str) -> None:
    with pytest.raises(WriteConflictError) as caught:
        tiny_learner(Touches({one: Write()}), Touches({other: Write()}))
    assert caught.value.paths == (one, other)
    assert f"Touches writes {one}, Touches#2 writes {other} (both reach {region})." in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("optimizer.hyperparams", "optimizer.state"), ("optimizer.state", "params"), ("batch.grads", "lossfn"),
        ("optimizer.hyperparams", "model"), ("batch.inputs", "params"), ("optimizer.defaults", "optimizer.state"),
    ],
)  # fmt: skip
def test_two_writers_of_different_objects_need_no_order(one: str, other: str) -> None:
    learner = tiny_learner(Touches({one: Write()}), Touches({other: Write()}), default_callbacks=False)
    assert learner.callbacks.plan(UpdateBegin, TrainingPhase).edges == ()


# --- the index


def naive(several: Sequence[Declaration]) -> set[Any]:
    """Return the meetings found by comparing every path of every pair of declarations."""
    reach = Reach()
    return {
        (first, second, (one, other), (isinstance(how, Write), isinstance(what, Write)))
        for first, second in itertools.combinations(range(len(several)), 2)
        for one, how in several[first]
        for other, what in several[second]
        if reach.overlap(one, other) and (isinstance(how, Write) or isinstance(what, Write))
    }


@given(st.lists(declarations, max_size=8))
@example([declare({"params": Write(), "model.a": Write()}, "1"), declare({"model": Read(), "params.a": Write()}, "2")])
@example([declare({"batch": Write(), "batch.a": Write()}, "1"), declare({"batch": Write(), "batch.a": Read()}, "2")])
@example([declare({"optimizer": Write(), "batch": Write()}, "1"), declare({"optimizer.param_groups": Write()}, "2")])
def test_meetings_are_those_of_all_pairs_each_once(several: list[Declaration]) -> None:
    """Rule 7: two handlers meet if two of their paths reach one piece of state and one of them writes it."""
    found = [(each.first, each.second, each.paths, each.writes) for each in meetings(several)]
    assert len(found) == len(set(found))
    assert set(found) == naive(several)


def test_meetings_come_in_the_same_order_in_every_run() -> None:
    several = [declare({f"cbstate.{name}": Write(), "batch": Write()}, name) for name in "cabcab"]
    found = [each.paths[0] for each in meetings(several)]
    assert found == sorted(found)


def test_many_readers_of_one_path_do_not_meet() -> None:
    """The index searches from writers, so a thousand readers add no work."""
    assert list(meetings([declare({"batch": Read(), "model": Read()}, "me")] * 1000)) == []
