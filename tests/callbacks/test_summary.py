"""ModelSummary: when and where it prints, and that it changes nothing."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import rich
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import AbstractTrainingPhase, UsageError
from flowtrain.callback.phases import StepContext
from flowtrain.callbacks import ModelSummary
from flowtrain.callbacks.summary import summarize
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.testing import TinyModel, assert_equivalent, tiny_batches, tiny_learner


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    """What rich's console prints."""
    before = dict(rich.get_console().__dict__)
    written = io.StringIO()
    rich.reconfigure(file=written, force_terminal=False, width=40, _environ={})
    yield written
    rich.get_console().__dict__ = before


def test_prints_the_summary_of_the_first_batch_once(output: io.StringIO) -> None:
    """Also on a console that is narrower than the table."""
    learner = tiny_learner(ModelSummary(), n_batches=2)
    learner.fit(1)
    learner.fit(1)
    assert output.getvalue() == f"{summarize(TinyModel(), torch.zeros(8, 1))}\n"
    assert "(8, 1)" in output.getvalue()


def test_inputs_that_are_given_go_first(output: io.StringIO) -> None:
    tiny_learner(ModelSummary(inputs=torch.zeros(5, 7)), n_batches=2).fit(1)
    assert "(5, 7)" in output.getvalue()


@pytest.mark.parametrize("kind", ["iterator", "no pair"])
def test_without_a_batch_there_are_no_shapes(output: io.StringIO, kind: str) -> None:
    data = iter(tiny_batches(n_batches=2)) if kind == "iterator" else [torch.ones(1)]
    learner = tiny_learner(ModelSummary(), data=data)
    if kind == "iterator":
        learner.fit(1)
        assert learner.cbstate.history[next(iter(learner.data))].steps == 2
    else:
        with pytest.raises(Exception, match="needs \\(inputs, targets\\)"):
            learner.fit(1)
    assert output.getvalue() == f"{summarize(TinyModel())}\n"


def test_several_models_have_a_table_each(output: io.StringIO) -> None:
    class Both(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: torch.Tensor) -> None:
            with learner.run_batch(self, inputs=raw):
                pass

    learner = tiny_learner(
        ModelSummary(), model={"gen": TinyModel(), "disc": nn.Linear(1, 1)}, data={Both: [torch.ones(2, 1)]}
    )
    learner.fit(1)
    assert output.getvalue() == f"gen\n{summarize(TinyModel())}\ndisc\n{summarize(nn.Linear(1, 1))}\n"


def test_depth_is_checked() -> None:
    with pytest.raises(UsageError, match=r"ModelSummary\(\): depth is a whole number, at least 0, got -1\."):
        ModelSummary(depth=-1)


@pytest.mark.usefixtures("output")
def test_the_same_under_every_executor_and_as_without_it() -> None:
    """Shuffling and dropout draw what they would have drawn."""

    def make(executor: Executor, *callbacks: ModelSummary) -> Learner:
        data = DataLoader(TensorDataset(torch.randn(8, 1), torch.randn(8, 1)), batch_size=4, shuffle=True)
        model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
        return tiny_learner(*callbacks, model=model, data=data, executor=executor)

    assert_equivalent(lambda executor: make(executor, ModelSummary()), executors=["dask"], epochs=1)
    weights: list[torch.Tensor] = []
    for callbacks in ([ModelSummary()], []):
        torch.manual_seed(0)
        learner = make(tiny_learner().executor.__class__(), *callbacks)
        learner.fit(1)
        weights.append(torch.cat([value.flatten().float() for value in learner.model.state_dict().values()]))
    assert torch.equal(*weights)
