"""GradNorm: compared with norms computed from the gradients themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowtrain import Access, Callback, LearnerView, Read, TorchCore, TrainingPhase, UpdateBegin, UsageError, on
from flowtrain.callbacks import GradNorm
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.testing import assert_equivalent, tiny_batches, tiny_learner
from tests.support.untyped import untyped


class Keeps(Callback):
    """Keeps a copy of the gradients of every update, before clipping."""

    def __init__(self) -> None:
        self.kept: list[dict[str, torch.Tensor]] = []

    def state_access(self) -> Access:
        return {"batch.grads": Read()}

    @on(UpdateBegin, TrainingPhase)
    def keep(self, event: UpdateBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        self.kept.append({name: gradient.clone() for name, gradient in learner.batch.grads.items()})


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def norm(gradients: list[torch.Tensor]) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients]).double().norm())


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({}, [1, 2, 3, 4, 5]), ({"accumulate": 2}, [2, 4, 5]), ({"clip_grad_norm": 1e-3}, [1, 2, 3, 4, 5])],
    ids=["plain", "accumulated", "clipped"],
)
def test_norms_before_clipping_of_whole_groups(settings: dict[str, Any], steps: list[int]) -> None:
    keeps = Keeps()
    core = TorchCore(device="cpu", **settings)
    learner = tiny_learner(GradNorm(layers=True), keeps, model=model(), n_batches=5, core=core)
    learner.fit(1)
    series = learner.cbstate.tracehistory[TrainingPhase]
    assert sorted(series) == ["GradNorm", "GradNorm.0", "GradNorm.2"]
    for name in series:
        layer = name.partition(".")[2]
        expected = [norm([gradient for key, gradient in kept.items() if key.startswith(layer)]) for kept in keeps.kept]
        assert [step for step, _ in series[name]] == steps
        assert [value for _, value in series[name]] == pytest.approx(expected, rel=1e-5)


def test_without_layers_nothing_handles_update_begin() -> None:
    """Rule 2: norms of layers that nobody asked for cost no handler."""
    learner = tiny_learner(GradNorm())
    assert not learner.callbacks.plan(UpdateBegin, TrainingPhase).handlers
    learner.fit(1)
    assert list(learner.cbstate.tracehistory[TrainingPhase]) == ["GradNorm"]


def test_frozen_layers_have_no_series() -> None:
    frozen = model()
    frozen.get_submodule("0").requires_grad_(False)
    learner = tiny_learner(GradNorm(layers=True), model=frozen, data=tiny_batches(n_batches=1))
    learner.fit(1)
    assert sorted(learner.cbstate.tracehistory[TrainingPhase]) == ["GradNorm", "GradNorm.2"]


def test_layers_is_a_bool() -> None:
    with pytest.raises(UsageError, match=r"GradNorm\(layers=\['encoder'\]\): layers is True or False\."):
        GradNorm(layers=untyped(["encoder"]))


def test_the_same_under_every_executor() -> None:
    def make(executor: Executor) -> Learner:
        return tiny_learner(GradNorm(layers=True), Keeps(), model=model(), n_batches=3, executor=executor)

    assert_equivalent(make, executors=["dask"])


def test_strict_mode_finds_nothing_to_complain_about() -> None:
    """A series whose name has a dot lies below the declared path, so strict mode finds no undeclared write."""
    tiny_learner(GradNorm(layers=True), model=model(), n_batches=2, strict=True).fit(1)


@pytest.mark.parametrize("limits", [{}, {"clip_grad_norm": 1.0}, {"clip_grad_value": 0.5}], ids=str)
def test_sparse_gradients_have_the_norm_of_dense_ones(limits: dict[str, Any]) -> None:
    """An index that is twice in a batch has two gradients, whose sum counts."""

    class Net(torch.nn.Module):
        def __init__(self, sparse: bool) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(5, 2, sparse=sparse)
            torch.nn.init.ones_(self.table.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.table(x).sum((1, 2)).unsqueeze(1) * 3
            return found

    found: list[Any] = []
    for sparse in (False, True):
        learner = tiny_learner(
            GradNorm(layers=True),
            model=Net(sparse),
            data=[(torch.tensor([[1, 1, 2], [0, 2, 2]]), torch.zeros(2, 1))] * 2,
            core=TorchCore(device="cpu", **limits),
        )
        learner.fit(1)
        traces = learner.cbstate.tracehistory[TrainingPhase]
        norms = [[value for _, value in traces[name]] for name in ("GradNorm", "GradNorm.table")]
        found.append((*norms, learner.model.table.weight.detach()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    assert found[0][0][0] == pytest.approx(285.74115)
