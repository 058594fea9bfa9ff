"""Rule 3: strict mode compares the state around every handler, and finds changes that no view can refuse."""

from __future__ import annotations

import array
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flowtrain import (
    Access,
    BatchBegin,
    BatchEnd,
    Callback,
    LearnerView,
    Read,
    TrainingPhase,
    UndeclaredWriteError,
    Write,
    on,
)
from flowtrain.callback.access import Path, declare
from flowtrain.callbacks import CustomCallback, Metrics, Recorder, SmoothLoss, StopOnNaNLoss, Traces, throttle
from flowtrain.diagnostics.strict import changes, fingerprint, fingerprints, undeclared
from flowtrain.metrics import mean_absolute_error
from flowtrain.state.by_phase import CONTAINERS
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.namespace import State
from flowtrain.testing import tiny_batches, tiny_learner


def fit(f: Callable[[LearnerView], Any], access: Access) -> None:
    """Fit for one batch in strict mode, with a callback that calls `f`."""
    tiny_learner(CustomCallback(f, BatchEnd, TrainingPhase, access), n_batches=1, strict=True).fit(1)


CASES: list[tuple[Callable[[LearnerView], Any], Access, str]] = [
    (lambda learner: learner.batch.inputs.add_(1), {"batch.inputs": Read()}, "batch.inputs"),
    (lambda learner: learner.batch.outputs.data.add_(1), {"batch": Read()}, "batch.outputs"),
    (lambda learner: learner.params["coeff"].data.mul_(2), {"params": Read()}, "model.coeff"),
    (lambda learner: learner.model.coeff.data.mul_(2), {"model": Read()}, "model.coeff"),
    (lambda learner: learner.batch.grads["coeff"].mul_(2), {"batch.grads": Read()}, "batch.grads"),
    (lambda learner: torch.rand(1), {}, "resource.rng"),
]


@pytest.mark.parametrize(("f", "access", "path"), CASES)
def test_an_undeclared_change_is_an_error_that_says_who_and_what(
    f: Callable[[LearnerView], Any], access: Access, path: str
) -> None:
    with pytest.raises(UndeclaredWriteError) as caught:
        fit(f, access)
    error = caught.value
    assert error.handler == "CustomCallback.call"
    assert error.paths == (path,)
    text = str(error)
    assert text.startswith(
        f"CustomCallback.call at (BatchEnd, TrainingPhase) changed {path} and does not declare to write it."
    )
    assert ("It drew random numbers: declare:" in text) == (path == "resource.rng")
    # The declaration that the error suggests allows the change.
    pasted: Access = eval(text.split("declare:")[1].strip(), {"Read": Read, "Write": Write})
    fit(f, pasted)


def test_what_is_declared_is_no_error() -> None:
    fit(lambda learner: learner.params["coeff"].data.mul_(2), {"params": Write()})
    fit(lambda learner: learner.params["coeff"].data.mul_(2), {"params.coeff": Write()})
    fit(lambda learner: learner.batch.inputs.add_(1), {"batch": Write()})
    fit(lambda learner: torch.rand(1), {"resource.rng": Write()})


@pytest.mark.parametrize("value", [bytearray(b"a"), array.array("i", [1])])
def test_a_buffer_that_no_view_can_protect_is_compared(value: Any) -> None:
    """Rule 3 names these beside tensors: a reader gets the object itself."""

    class Keeps(Callback):
        def state_access(self) -> Access:
            return {"cbstate.buffer": Write()}

        def setup(self, learner: LearnerView) -> None:
            learner.cbstate.buffer = value

        @on(BatchBegin, TrainingPhase)
        def nothing(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None: ...

    def change(learner: LearnerView) -> None:
        learner.cbstate.buffer.append(1)

    reader = CustomCallback(change, BatchEnd, TrainingPhase, {"cbstate.buffer": Read()})
    with pytest.raises(UndeclaredWriteError, match=r"changed cbstate\.buffer and does not declare to write it"):
        tiny_learner(Keeps(), reader, n_batches=1, strict=True).fit(1)


def test_the_bundled_callbacks_pass() -> None:
    callbacks = [
        Recorder(),
        Metrics(mean_absolute_error),
        StopOnNaNLoss(),
        SmoothLoss(),
        throttle(Traces({"Squared": lambda learner: learner.batch.loss**2}, TrainingPhase), BatchEnd, every=2),
    ]
    learner = tiny_learner(*callbacks, strict=True, n_batches=3)
    learner.fit(2)
    assert learner.stopped is None
    assert len(learner.cbstate.tracehistory[TrainingPhase]["Squared"]) == 3


def test_training_is_the_same_with_and_without() -> None:
    coeffs = []
    for strict in (False, True):
        learner = tiny_learner(strict=strict)
        learner.fit(2)
        coeffs.append(learner.model.coeff.detach())
    assert torch.equal(*coeffs)


def test_a_write_covers_what_lies_below_and_aliases() -> None:
    changed = [("model", "0", "weight"), ("optimizer", "state"), ("cbstate", "seen", "a")]
    assert undeclared(changed, declare({"params": Write(), "optimizer": Write(), "cbstate.seen": Write()}, "it")) == []
    assert undeclared(changed, declare({"model": Read(), "optimizer.hyperparams": Write()}, "it")) == changed


def test_a_write_of_gradients_explains_no_change_of_values_and_the_other_way_round_it_does() -> None:
    """Rule 5: a declared write of parameters covers their gradients; one of gradients does not cover the values."""
    with pytest.raises(UndeclaredWriteError, match=r"changed model\.coeff and does not declare"):
        fit(lambda learner: learner.params["coeff"].data.mul_(2), {"params": Read(), "batch.grads": Write()})
    fit(lambda learner: learner.params["coeff"].grad.mul_(2), {"params": Write()})
    fit(lambda learner: learner.optimizer.param_groups[0].update(lr=0.5), {"optimizer.param_groups": Write()})
    rate: Access = {"optimizer": Read(), "params": Write()}
    with pytest.raises(UndeclaredWriteError, match=r"changed optimizer\.hyperparams and does not declare"):
        fit(lambda learner: dict.update(learner.optimizer.param_groups._container[0], lr=2), rate)


class Same(TrainingPhase):
    """A phase whose targets are the inputs, as for an autoencoder."""

    def split(self, raw: Any) -> tuple[Any, Any]:
        return raw[0], raw[0]


def test_one_object_at_two_paths_by_the_users_own_code_is_found() -> None:
    """Rule 5: the user's code puts one object at two paths, which flowtrain cannot know beforehand."""
    change = CustomCallback(lambda learner: learner.batch.inputs.add_(1), BatchBegin, Same, {"batch.inputs": Write()})
    learner = tiny_learner(change, data={Same: tiny_batches(n_batches=1)}, strict=True)
    with pytest.raises(UndeclaredWriteError, match=r"changed batch\.targets and does not declare"):
        learner.fit(1)
    kept: Access = {"cbstate.kept": Write()}
    change = CustomCallback(lambda learner: learner.cbstate.kept.data.add_(1), BatchEnd, access=kept)
    learner = tiny_learner(default_callbacks=False, strict=True)
    learner.cbstate.kept = learner.model.coeff
    learner.add_callback(change)
    with pytest.raises(UndeclaredWriteError, match=r"changed model\.coeff and does not declare"):
        learner.fit(1)


def test_a_changed_mode_is_found_and_named() -> None:
    with pytest.raises(UndeclaredWriteError, match=r"changed model\.training and does not declare to write it"):
        fit(lambda learner: learner.model.eval(), {"model": Read()})


def test_what_is_read_by_another_name_is_to_be_declared_by_that_name() -> None:
    with pytest.raises(UndeclaredWriteError, match=r'or declare:\n\n    \{"params": Write\(\)\}'):
        fit(lambda learner: learner.params["coeff"].data.mul_(2), {"params": Read()})


# --- fingerprints


@pytest.fixture
def state() -> LearnerState:
    """Return a learner's state after one batch, with entries of every kind in ``cbstate``."""
    learner = tiny_learner(optimizer=torch.optim.Adam)
    learner.step(TrainingPhase, (torch.ones(2, 1), torch.ones(2, 1)))
    cbstate = learner.state.cbstate
    cbstate.tensor = torch.zeros(3)
    cbstate.numbers = [1, [2, {"deep": torch.ones(1)}]]
    cbstate.array = np.zeros(3)
    cbstate.names = {"a", "b"}
    cbstate.nan = float("nan")
    cbstate.space = State("cbstate.space")
    cbstate.space.inner = 1
    cbstate.hyperparams = CONTAINERS["hyperparams"]("cbstate.hyperparams")
    cbstate.thing = torch.nn.Linear(1, 1)
    return learner.state


def _deep(state: LearnerState) -> None:
    state.cbstate.numbers[1][1]["deep"].add_(1)


CHANGES: list[Any] = [
    (lambda state: state.model.coeff.data.add_(1), ("model", "coeff")),
    pytest.param(
        lambda state: state.model.coeff.detach().numpy().__iadd__(1),
        ("model", "coeff"),
        marks=pytest.mark.cpu_only("makes numpy arrays of tensors"),
    ),
    (lambda state: state.params["coeff"].grad.mul_(2), ("batch", "grads")),
    (lambda state: state.optimizer.param_groups[0].update(lr=7.0), ("optimizer", "hyperparams")),
    (lambda state: next(iter(state.optimizer.state.values()))["exp_avg"].add_(1), ("optimizer", "state")),
    (lambda state: state.batch.inputs.zero_(), ("batch", "inputs")),
    (lambda state: setattr(state.batch, "more", 1), ("batch", "more")),
    (lambda state: setattr(state.batch, "loss", state.batch.loss.clone()), ("batch", "loss")),
    (lambda state: state.cbstate.tensor.add_(0), ("cbstate", "tensor")),
    (_deep, ("cbstate", "numbers")),
    (lambda state: state.cbstate.array.__setitem__(0, 1), ("cbstate", "array")),
    (lambda state: state.cbstate.names.add("c"), ("cbstate", "names")),
    (lambda state: setattr(state.cbstate.space, "inner", 2), ("cbstate", "space", "inner")),
    (lambda state: state.cbstate.hyperparams.push("LearningRate", 0.1, 1), ("cbstate", "hyperparams", "LearningRate")),
    (lambda state: state.cbstate.metrics_step[TrainingPhase].push("Mine", 1, 1), ("cbstate", "metrics_step", "Mine")),
    (lambda state: state.cbstate.thing.weight.data.zero_(), ("cbstate", "thing")),
    (lambda state: delattr(state.cbstate, "tensor"), ("cbstate", "tensor")),
    (lambda state: torch.rand(1), ("resource", "rng")),
    (lambda state: random.random(), ("resource", "rng")),
    (lambda state: np.random.rand(), ("resource", "rng")),
]


@pytest.mark.parametrize(("change", "path"), CHANGES)
def test_a_change_is_found_at_its_path_and_nowhere_else(
    state: LearnerState, change: Callable[[LearnerState], Any], path: Path
) -> None:
    before = fingerprints(state)
    assert changes(before, fingerprints(state)) == []
    change(state)
    assert changes(before, fingerprints(state)) == [path]


def test_looking_is_no_change(state: LearnerState) -> None:
    before = fingerprints(state)
    _ = state.cbstate.history[TrainingPhase], state.cbstate.metrics_epoch[TrainingPhase]  # reading adds the entry
    _ = state.model(state.batch.inputs), state.batch.inputs.sum(), list(state.cbstate.names), state.params["coeff"].grad
    assert changes(before, fingerprints(state)) == []


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, 3, dtype=torch.bfloat16),
        torch.ones(0),
        torch.tensor(1 + 2j),
        torch.ones(4, 4)[:, ::2],
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        frozenset({1, 2}),
        object(),
    ],
)
def test_every_kind_of_value_has_one(value: object) -> None:
    assert fingerprint(value) == fingerprint(value)


def test_inference_tensors_have_no_version_but_content() -> None:
    with torch.inference_mode():
        value = torch.ones(2)
        before = fingerprint(value)
        value.add_(1)
        assert fingerprint(value) != before
