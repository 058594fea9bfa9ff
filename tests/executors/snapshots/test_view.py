"""A handler sees the same on copies as in place: values, and what it is refused (rules 3 and 20).

Each example is a declaration, and everything that a handler could look at; compared are what it finds and what it is
refused, in place, on a snapshot in this process, and on one that went through the codec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowtrain import BatchEnd, LearnerView, MissingStateError, Read, TrainingPhase, UsageError, ValidationPhase, Write
from flowtrain.callback.access import Declaration, declare, union
from flowtrain.state.batch import BatchState
from flowtrain.state.by_phase import Counts, CountsMap, PhaseMap
from flowtrain.state.learner_state import LearnerState, Named
from flowtrain.state.namespace import State
from flowtrain.state.optimizer_view import OptimizerParts
from flowtrain.state.parameters import Gradients, Parameters, named_parameters
from flowtrain.state.partial_view import Owner
from flowtrain.state.readonly import ReadOnlyDict
from flowtrain.state.series import Series, SeriesMap
from flowtrain.state.views import bind_view
from flowtrain_dask.cluster.codec import decode, encode
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.taker import Taker
from flowtrain_dask.snapshots.view import SnapshotLearner
from tests.support.examples import examples

PATHS = (
    "batch", "batch.loss", "batch.inputs", "batch.inputs.pixels", "batch.grads", "batch.grads.gen.0.weight",
    "batch.nothing", "cbstate", "cbstate.history", "cbstate.metrics_step", "cbstate.metrics_step.Loss",
    "cbstate.metrics_step.Loss2", "cbstate.smooth_loss", "cbstate.hyperparams", "cbstate.hyperparams.LearningRate",
    "cbstate.deep", "cbstate.deep.best", "cbstate.nothing", "cbstate.scores", "params", "params.gen.0.weight",
    "params.gen", "model", "model.gen", "model.disc.bias", "lossfn", "optimizer", "optimizer.gen",
    "optimizer.gen.hyperparams", "optimizer.disc.state", "resource.file",
)  # fmt: skip

LOOKS: dict[str, Callable[[Any], Any]] = {
    "loss": lambda v: v.batch.loss,
    "inputs": lambda v: v.batch.inputs,
    "pixels": lambda v: v.batch.inputs["pixels"],
    "labels": lambda v: v.batch.inputs["labels"],
    "put": lambda v: v.batch.inputs.update(a=1),
    "nothing": lambda v: v.batch.nothing,
    "in batch": lambda v: "loss" in v.batch,
    "write": lambda v: setattr(v.batch, "loss", 1),
    "grads": lambda v: v.batch.grads,
    "grad": lambda v: v.batch.grads["gen.0.weight"],
    "no grad": lambda v: v.batch.grads["disc.bias"],
    "put grad": lambda v: v.batch.grads.__setitem__("gen.0.weight", None),
    "history": lambda v: v.cbstate.history[TrainingPhase],
    "updates": lambda v: v.cbstate.history[TrainingPhase].updates,
    "no history": lambda v: v.cbstate.history[ValidationPhase],
    "metrics": lambda v: v.cbstate.metrics_step[TrainingPhase],
    "last": lambda v: v.cbstate.metrics_step[TrainingPhase]["Loss"].last(),
    "last2": lambda v: v.cbstate.metrics_step[TrainingPhase]["Loss2"].last(),
    "len": lambda v: len(v.cbstate.metrics_step[TrainingPhase]["Loss"]),
    "since": lambda v: v.cbstate.metrics_step[TrainingPhase]["Loss"].since(2),
    "no metrics": lambda v: v.cbstate.metrics_step[ValidationPhase],
    "phases": lambda v: list(v.cbstate.metrics_step),
    "push": lambda v: v.cbstate.metrics_step[TrainingPhase].push("Loss", 1.0, 1),
    "smooth": lambda v: v.cbstate.smooth_loss[TrainingPhase].last(),
    "rate": lambda v: v.cbstate.hyperparams["LearningRate"].last(),
    "deep": lambda v: v.cbstate.deep.best,
    "deeper": lambda v: v.cbstate.deep.worst,
    "scores": lambda v: v.cbstate.scores,
    "score": lambda v: v.cbstate.scores.append(3),
    "no entry": lambda v: v.cbstate.nothing,
    "params": lambda v: v.params,
    "weight": lambda v: v.params["gen.0.weight"],
    "no weight": lambda v: v.params["gen.0.wait"],
    "same": lambda v: v.params["gen.0.weight"] is v.model.gen[0].weight,
    "model": lambda v: v.model.gen(torch.ones(1, 2)),
    "disc": lambda v: v.model.disc.bias,
    "mode": lambda v: v.model.gen.training,
    "lossfn": lambda v: v.lossfn(torch.ones(2), torch.zeros(2)),
    "lr": lambda v: v.optimizer.gen.hyperparams[0]["lr"],
    "put lr": lambda v: v.optimizer.gen.hyperparams[0].__setitem__("lr", 1.0),
    "state": lambda v: [each["momentum_buffer"] for each in v.optimizer.disc.state.values()],
    "state of": lambda v: v.optimizer.disc.state[v.params["disc.weight"]]["momentum_buffer"],
    "state by name": lambda v: v.optimizer.disc.state["disc.weight"]["momentum_buffer"],
    "state names": lambda v: list(v.optimizer.disc.state),
    "data": lambda v: v.data,
    "fit": lambda v: v.fit(1),
    "typo": lambda v: v.bacth,
}


def make_state() -> LearnerState:
    torch.manual_seed(0)
    state = LearnerState()
    gen, disc = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), nn.Linear(2, 1)
    optimizers = {"gen": torch.optim.SGD(gen.parameters(), 0.1), "disc": torch.optim.SGD(disc.parameters(), 0.2, 0.9)}
    state.model = Named("model", {"gen": gen, "disc": disc})
    state.params = params = Parameters({"gen": gen, "disc": disc})
    state.optimizer = Named("optimizer", optimizers)
    named = partial(named_parameters, params, None)
    parts = {name: OptimizerParts(each, f"optimizer.{name}", named) for name, each in optimizers.items()}
    state.optimizers = Named("optimizer", parts)
    state.lossfn = nn.functional.mse_loss
    disc(gen(torch.ones(1, 2))).sum().backward()
    optimizers["disc"].step()
    disc.bias.grad = None
    state.show(BatchState())
    state.batch.loss = torch.tensor(0.5)
    state.batch.inputs = {"pixels": torch.ones(3), "labels": [1, 2]}
    state.batch.grads = Gradients(params)
    cbstate = state.cbstate
    cbstate.history = CountsMap("cbstate.history")
    cbstate.history[TrainingPhase] = Counts((1, 2, 3, 4))
    metrics = cbstate.metrics_step = PhaseMap("cbstate.metrics_step", lambda: SeriesMap("cbstate.metrics_step"))
    smooth = cbstate.smooth_loss = PhaseMap("cbstate.smooth_loss", lambda: Series("cbstate.smooth_loss"))
    cbstate.hyperparams = SeriesMap("cbstate.hyperparams")
    for step in range(4):
        metrics[TrainingPhase].push("Loss", step / 2, step)
        smooth[TrainingPhase].push(step / 4, step)
        cbstate.hyperparams.push("LearningRate", 0.1, step)
    cbstate.deep = State("cbstate.deep")
    cbstate.deep.best = [torch.ones(2)]
    cbstate.scores = [1, 2]
    return state


def plain(value: Any) -> Any:
    """Values as something that compares; what only one of both sides may iterate over by its length."""
    if isinstance(value, torch.Tensor):
        return ("tensor", value.tolist())
    if isinstance(value, Series):
        return ("series", len(value), value.last())
    if isinstance(value, (Mapping, ReadOnlyDict)):
        return ("mapping", [(str(key), plain(value[key])) for key in value])
    if isinstance(value, (list, tuple)) or (hasattr(value, "__iter__") and not isinstance(value, (str, State))):
        return [plain(item) for item in value]
    return str(value)


def look(view: LearnerView) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, act in LOOKS.items():
        try:
            found[name] = plain(act(view))
        except MissingStateError as error:
            found[name] = (type(error), error.path)  # the text lists what else is there
        except Exception as error:
            found[name] = (type(error), str(error).split(" Did you mean")[0])
    return found


kinds = st.sampled_from([Read(), Read(optional=True)])
entries = st.tuples(st.sampled_from(PATHS), kinds).map(
    lambda each: declare({each[0]: Write() if each[0].startswith("resource") else each[1]}, "me")
)
declarations = st.lists(entries, max_size=7).map(union)


@settings(max_examples=examples(150))
@given(declarations, st.booleans())
def test_the_same_on_copies_as_in_place(declaration: Declaration, tail: bool) -> None:
    owner = Owner("Reader", "Reader", "state_access", declaration)
    state = make_state()
    taker = Taker(declaration, state, Pool(1 << 20), tail=tail)
    replica = SnapshotLearner(declaration, owner)
    views = []
    for _ in range(2):  # the second event fills the same view
        payload = taker.take().payload
        views.append(replica.show(decode(encode(payload)) if tail else payload))
    expected = look(bind_view(declaration, state, owner))
    found = look(views[-1])
    if tail:  # the second event brought nothing new, so only the newest value is there
        assert found.pop("since") == expected.pop("since") or "Read(full=True)" in str(look(views[-1])["since"])
    if ("model",) not in dict(declaration) and ("model", "gen") in dict(declaration):
        expected["same"] = found["same"]  # a part of the model and its parameters are copied each by itself
    assert found == expected
    assert views[0] is views[1]


def test_a_handler_cannot_fire_events() -> None:
    declaration = declare({"batch.loss": Read()}, "me")
    view = SnapshotLearner(declaration, Owner("Reader", "Reader", "state_access", declaration)).show({})
    with pytest.raises(UsageError, match=r"Reader calls learner\.fire\(BatchEnd\(\)\), but it is deferrable"):
        view.fire(BatchEnd())


def test_each_event_is_shown_by_itself() -> None:
    """What one event had and the next one has not is gone."""
    declaration = declare({"batch.loss": Read(optional=True), "cbstate.best": Read(optional=True)}, "me")
    replica = SnapshotLearner(declaration, Owner("Reader", "Reader", "state_access", declaration))
    view = replica.show({("batch", "loss"): 1.0, ("cbstate", "best"): [1]})
    assert (view.batch.loss, list(view.cbstate.best)) == (1.0, [1])
    replica.show({("batch", "loss"): 2.0})
    assert (view.batch.loss, view.cbstate.best) == (2.0, None)
    replica.clear()
    assert view.batch.loss is None
