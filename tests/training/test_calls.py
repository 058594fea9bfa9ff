"""`evaluate`, `validate` and `predict`: the values that they return, the traces that they leave, and their errors."""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import (
    AbstractValidationPhase,
    BatchBegin,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    CoreError,
    DataError,
    ExecutorError,
    Learner,
    LearnerView,
    Phase,
    StepContext,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import EMA, Checkpointer, Metric, Metrics
from flowtrain.errors import merge
from flowtrain.metrics import mean_absolute_error
from flowtrain.testing import TinyModel, tiny_batches, tiny_learner
from flowtrain.training.calls import without_frames
from tests.support.fired import OODPhase, Raise, Watch
from tests.support.loaders import end_workers

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Pair(NamedTuple):
    first: torch.Tensor
    second: None


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    width: int = 3


class Outputs(nn.Module):
    """A model that returns one kind of structure around its inputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> Any:
        x = self.weight * x
        made: dict[str, Any] = {
            "tuple": (x, x + 1),
            "dict": {"a": x, "b": {"c": [2 * x]}},
            "named": Pair(x, None),
            "dataclass": Output(x),
            "ordered": OrderedDict(logits=x, width=3),
            "number": {"logits": x, "loss": x.mean()},
            "text": {"logits": x, "text": "a" * len(x)},
            "wide": {"logits": x, "wide": torch.zeros(len(x), len(x))},
            "long": [x] * len(x),
        }
        return made[self.kind]


# --- evaluate and validate


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_evaluate_returns_the_values_of_its_epoch(executor: str) -> None:
    data = (tiny_batches(n_batches=3), tiny_batches(n_batches=2))
    with tiny_learner(Metrics(mean_absolute_error), data=data, executor=executor) as learner:
        learner.fit(1)
        x, y = map(torch.cat, zip(*data[1], strict=True))
        error = learner.model.coeff.detach().cpu() * x - y
        measured = learner.evaluate()
        assert measured == {
            "Loss": pytest.approx(error.square().mean().item()),
            "MeanAbsoluteError": pytest.approx(error.abs().mean().item()),
        }
        assert {type(value) for value in measured.values()} == {float}
        recorded = learner.cbstate.metrics_epoch[ValidationPhase]
        assert measured == {name: series.values[-1] for name, series in recorded.items()}
        assert learner.validate() == measured
        assert recorded["Loss"].steps == [1, 1, 1]
        other = learner.evaluate([(x, torch.zeros_like(y))])
        assert other["MeanAbsoluteError"] == pytest.approx((learner.model.coeff.detach().cpu() * x).abs().mean().item())


def test_validate_returns_the_values_by_phase_if_there_are_several() -> None:
    near, far = tiny_batches(n_batches=1), tiny_batches(coeff=-3.0, n_batches=1)
    learner = tiny_learner(data={TrainingPhase: near, ValidationPhase: near, OODPhase: far})
    measured = learner.validate()
    assert list(measured) == [ValidationPhase(), OODPhase()]
    assert measured[ValidationPhase] == learner.evaluate()
    assert measured[OODPhase()] == learner.evaluate(far, OODPhase)


def test_a_value_of_an_earlier_epoch_is_not_returned() -> None:
    """A metric that is computed in some epochs only, and an epoch without a complete batch, give nothing."""

    class Cancel(Callback):
        now = False

        @on(BatchBegin, ValidationPhase)
        def cancel(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
            if self.now:
                raise CancelEpochException

    cancel = Cancel()
    learner = tiny_learner(cancel, Metrics(Metric(mean_absolute_error, phase=TrainingPhase)))
    learner.fit(1)
    assert list(learner.evaluate()) == ["Loss"]
    cancel.now = True
    assert learner.evaluate() == learner.validate() == {}
    assert tiny_learner(default_callbacks=False).evaluate() == {}


def test_the_only_phase_that_evaluates_is_meant() -> None:
    class Halves(AbstractValidationPhase):
        def split(self, raw: Any) -> Any:
            return raw["x"], raw["y"]

    [(x, y)] = tiny_batches(n_batches=1)
    learner = tiny_learner(data={TrainingPhase: [(x, y)], Halves: [{"x": x, "y": y}]})
    expected = y.square().mean().item()
    assert learner.evaluate() == {"Loss": pytest.approx(expected)} == learner.evaluate([{"x": x, "y": y}])
    assert torch.equal(learner.predict([{"x": x, "y": y}]), 0 * x)
    learner.fit(1)
    assert list(learner.cbstate.metrics_epoch) == [Halves(), TrainingPhase()]


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (
            lambda learner: learner.evaluate(),
            UsageError,
            "There is no data for ValidationPhase. Pass it: learner.evaluate(loader).",
        ),
        (lambda learner: learner.validate(), UsageError, "validate() has no data of a phase that does not "),
        (lambda learner: learner.evaluate([]), DataError, "The loader for ValidationPhase (list) gives no batch. Is"),
        (
            lambda learner: learner.evaluate(iter([])),
            DataError,
            "The loader for ValidationPhase (list_iterator) gives no batch. It is an iterator, used up after one pass",
        ),
        (
            lambda learner: learner.evaluate(None, TrainingPhase),
            UsageError,
            "evaluate() takes a phase that evaluates, got TrainingPhase, which trains. Write learner.evaluate(loader, "
            "ValidationPhase).",
        ),
        (lambda learner: learner.evaluate([torch.ones(2, 1)]), DataError, "ValidationPhase needs (inputs, targets)"),
        (lambda learner: learner.evaluate(None, 3), UsageError, "evaluate() takes a phase first, got 3."),
    ],
)
def test_an_evaluation_that_cannot_be_made(act: Any, error: type[Exception], message: str) -> None:
    learner = tiny_learner(data=tiny_batches(n_batches=1))
    with pytest.raises(error) as raised:
        act(learner)
    assert str(raised.value).startswith(message)
    learner.fit(1)


def test_a_cancel_of_the_fit_leaves_an_evaluation() -> None:
    learner = tiny_learner(Raise(BatchBegin, CancelFittingException("enough")))
    with pytest.raises(CancelFittingException, match="enough"):
        learner.evaluate()


# --- predict


def rich_learner(data: Any = None, **options: Any) -> Learner:
    """Return a learner whose model draws in train mode, has statistics, and has a part in eval mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2))
    model[4].eval()
    chosen = tiny_batches(n_batches=4) if data is None else data

    def lossfn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.sum(1, keepdim=True) - targets).square().mean()

    optimizer = partial(torch.optim.SGD, lr=0.01)  # with 0.1 the loss becomes NaN for the dropout of torch 2.6
    return tiny_learner(model=model, data=chosen, lossfn=lossfn, optimizer=optimizer, **options)


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_predict_returns_the_outputs_in_eval_mode(executor: str) -> None:
    batches = tiny_batches(n_batches=3)
    with rich_learner(executor=executor) as learner:
        learner.fit(1)
        model = learner.model.eval()
        with torch.no_grad():
            device = model[0].weight.device
            expected = model(torch.cat([x for x, _ in batches]).to(device)).cpu()
        learner.model.train()
        found = learner.predict(batches)
    torch.testing.assert_close(found, expected)
    assert (found.shape, found.device.type, found.requires_grad) == ((24, 2), "cpu", False)


def test_inputs_with_and_without_targets() -> None:
    [(x, y), (x2, y2)] = tiny_batches(n_batches=2)
    learner = tiny_learner()
    learner.fit(1)
    expected = learner.model.coeff.detach().cpu() * torch.cat([x, x2])
    loader = DataLoader(TensorDataset(torch.cat([x, x2])), batch_size=5)  # gives lists of one tensor
    items: list[Any] = [[(x, y), [x2, y2]], [x, x2], [(x,), [x2]], loader, iter([x, x2])]
    for each in items:
        assert torch.equal(learner.predict(each), expected)


def test_inputs_that_are_a_mapping() -> None:
    class Sum(TinyModel):
        def forward(self, x: Any) -> torch.Tensor:
            total: torch.Tensor = x["a"] + x["b"]
            return total

    found = tiny_learner(model=Sum()).predict([{"a": torch.ones(2, 1), "b": torch.ones(2, 1)}])
    assert found.tolist() == [[2.0], [2.0]]


def draws() -> list[Any]:
    return [torch.rand(1).item(), random.random(), float(np.random.rand())]


def test_predict_leaves_no_trace() -> None:
    """A fit after `predict` gives the same bits: modes, random numbers, statistics, histories and loaders are kept."""

    def fit(*, predicts: bool) -> Any:
        x, y = map(torch.cat, zip(*tiny_batches(n_batches=4), strict=True))
        generator = torch.Generator().manual_seed(1)
        train = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True, generator=generator)
        watch = Watch()
        learner = rich_learner((train, DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)), callbacks=[watch])
        for _ in range(2):
            learner.fit(1)
            if predicts:
                modes = [module.training for module in learner.model.modules()]
                seen, counts = len(watch.log), dict(learner.cbstate.history)
                random.random()  # what is drawn before is not drawn again
                for loader in learner.data.values():
                    assert learner.predict(loader).shape == (32, 2)
                assert [module.training for module in learner.model.modules()] == modes
                assert (len(watch.log), learner.cbstate.history) == (seen, counts)
            else:
                random.random()
        learner.fit(1)
        steps = {name: list(series) for name, series in learner.cbstate.metrics_step[TrainingPhase].items()}
        return learner.model.state_dict(), steps, draws()

    random.seed(0)
    np.random.seed(0)
    plain = fit(predicts=False)
    random.seed(0)
    np.random.seed(0)
    predicted = fit(predicts=True)
    for name, value in plain[0].items():
        assert torch.equal(predicted[0][name], value), name
    assert predicted[1:] == plain[1:]


def test_workers_that_stay_are_started_by_the_fit() -> None:
    """Starting persistent workers draws a number, which the first pass of the fit draws, also after `predict`."""

    def fit(*, predicts: bool) -> list[Any]:
        torch.manual_seed(0)
        x, y = map(torch.cat, zip(*tiny_batches(n_batches=2), strict=True))
        loader = DataLoader(
            TensorDataset(x, y), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True,
            multiprocessing_context="forkserver",
        )  # fmt: skip
        learner = tiny_learner(data=loader)
        if predicts:
            assert learner.predict(loader).shape == (16, 1)
        learner.fit(2)
        end_workers([loader])
        return [list(learner.cbstate.metrics_step[TrainingPhase]["Loss"]), *draws()[:1]]

    assert fit(predicts=True) == fit(predicts=False)


def test_predict_uses_the_trained_weights_and_the_averages_where_they_are_applied() -> None:
    ema = EMA(0.5)
    learner = tiny_learner(ema, n_batches=2)
    learner.fit(1)
    one = [torch.ones(1, 1)]
    assert learner.predict(one).item() == learner.model.coeff.item()
    with ema.applied():
        assert learner.predict(one).item() == ema.averages["coeff"].item() != 0


def test_nested_outputs_keep_their_types() -> None:
    x, x2 = torch.ones(2, 1), torch.zeros(3, 1)
    both = torch.cat([x, x2])

    def predict(kind: str) -> Any:
        return tiny_learner(model=Outputs(kind)).predict([x, x2])

    first, second = predict("tuple")
    assert torch.equal(first, both)
    assert torch.equal(second, both + 1)
    nested = predict("dict")
    assert torch.equal(nested["a"], both)
    assert torch.equal(nested["b"]["c"][0], 2 * both)
    named = predict("named")
    assert (type(named), named.second) == (Pair, None)
    assert torch.equal(named.first, both)
    output = predict("dataclass")
    assert (type(output), output.width) == (Output, 3)
    assert torch.equal(output.logits, both)
    ordered = predict("ordered")
    assert (type(ordered), ordered["width"]) == (OrderedDict, 3)
    assert torch.equal(ordered["logits"], both)


def test_a_loader_may_use_its_memory_again() -> None:
    class Same(TinyModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    def reusing() -> Iterator[torch.Tensor]:
        buffer = torch.empty(2, 1)
        for number in range(3):
            yield buffer.fill_(number)

    assert tiny_learner(model=Same()).predict(reusing()).flatten().tolist() == [0, 0, 1, 1, 2, 2]


REMEDY = "Take the outputs of each batch: [learner.predict([batch]) for batch in loader]."


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "number",
            "predict() cannot concatenate the outputs of the batches: outputs['loss'] is one number for each batch, "
            f"without a dimension of samples. {REMEDY}",
        ),
        (
            "text",
            "predict() cannot concatenate the outputs of the batches: outputs['text'] is str 'aa', which is no tensor. "
            f"{REMEDY}",
        ),
        (
            "wide",
            "predict() cannot concatenate the outputs of the batches: outputs['wide'] is Tensor of shape (2, 2), "
            f"float32 in the first batch, and Tensor of shape (3, 3), float32 in batch 2. {REMEDY}",
        ),
        (
            "long",
            "predict() cannot concatenate the outputs of the batches: outputs[0] in the first batch, and outputs[0], "
            f"outputs[1] in batch 2. {REMEDY}",
        ),
    ],
)
def test_outputs_that_cannot_be_concatenated(kind: str, message: str) -> None:
    learner = tiny_learner(model=Outputs(kind))
    batches = [torch.ones(2, 1), torch.ones(3, 1)]
    if kind == "long":
        learner = tiny_learner(model=Growing())
    with pytest.raises(DataError) as raised:
        learner.predict(batches)
    assert str(raised.value) == message
    assert len([learner.predict([batch]) for batch in batches if kind != "number" and kind != "text"]) in (0, 2)


class Growing(TinyModel):
    """A model that returns one output more for each sample more."""

    def forward(self, x: torch.Tensor) -> Any:
        return [self.coeff * x + number for number in range(len(x) - 1)]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "The loader for ValidationPhase (list) gives no batch."),
        (iter([]), "The loader for ValidationPhase (list_iterator) gives no batch. It is an iterator"),
        (
            torch.ones(4, 1),
            "The data for ValidationPhase is Tensor of shape (4, 1), float32, not a loader of batches. Make batches of "
            "it: DataLoader(TensorDataset(inputs, targets), batch_size=32), and pass learner.predict(loader).",
        ),
        (
            (torch.ones(4, 1), torch.ones(4, 1)),
            "predict() takes a loader of batches, and got tuple of 2: Tensor of shape (4, 1), float32, Tensor of shape "
            "(4, 1), float32, which may be one batch or several. Write learner.predict([inputs]) for one batch of",
        ),
        (None, "The data for ValidationPhase is NoneType None, not a loader of batches. Pass learner.predict(loader)."),
        ([()], "predict() takes (inputs, targets) or inputs from its loader, and got tuple of 0. Say in a phase"),
        (
            [(torch.ones(4, 1),) * 3],
            "predict() takes (inputs, targets) or inputs from its loader, and got tuple of 3: Tensor of shape (4, 1)",
        ),
    ],
)
def test_loaders_that_predict_cannot_use(loader: Any, message: str) -> None:
    with pytest.raises(DataError) as raised:
        tiny_learner().predict(loader)
    assert str(raised.value).startswith(message)


def test_predict_refuses_a_phase_that_trains_several_models_and_a_learner_that_is_closed() -> None:
    learner = tiny_learner()
    with pytest.raises(UsageError, match=r"predict\(\) takes a phase that evaluates, got TrainingPhase, which trains"):
        learner.predict([torch.ones(1, 1)], TrainingPhase)
    learner.close()
    with pytest.raises(ExecutorError, match=r"predict\(\) on a closed learner"):
        learner.predict([torch.ones(1, 1)])

    class GANPhase(TrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            raise NotImplementedError

    several = Learner(
        {"gen": TinyModel(), "critic": TinyModel()}, nn.functional.mse_loss, data={GANPhase: tiny_batches()}
    )
    with pytest.raises(UsageError) as raised:
        several.predict([torch.ones(1, 1)])
    assert str(raised.value) == (
        "predict() runs one model, and the learner has gen, critic. Call the one that you mean under torch.no_grad(): "
        "learner.model.gen.eval()(inputs)."
    )


def test_errors_of_the_model_and_of_split_say_where_they_come_from() -> None:
    learner = tiny_learner(model=nn.Linear(2, 1))
    with pytest.raises(RuntimeError) as raised:
        learner.predict([torch.ones(4, 3)])
    assert raised.value.__notes__ == ["raised by the model in predict(), called with Tensor of shape (4, 3), float32"]

    class Named(ValidationPhase):
        def split(self, raw: Any) -> Any:
            return raw["x"], raw["y"]

    with pytest.raises(KeyError) as missing:
        learner.predict([{"x": torch.ones(4, 2)}], Named)
    assert missing.value.__notes__ == [
        "raised by Named.split, called by predict() with dict with keys 'x'. For data without targets pass a phase "
        "whose split takes it: learner.predict(loader, OtherPhase)"
    ]
    assert learner.predict([torch.ones(4, 2)]).shape == (4, 1)  # a failure leaves the learner as it was


def test_the_calls_of_a_handler_are_refused() -> None:
    class Inside(Callback):
        learner: Any

        @on(BatchBegin, TrainingPhase)
        def call(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
            with pytest.raises(UsageError, match=r"predict\(\) was called inside fit"):
                self.learner.predict([torch.ones(1, 1)])
            with pytest.raises(UsageError, match=r"evaluate\(\) was called inside fit"):
                self.learner.evaluate()

    inside = Inside()
    inside.learner = learner = tiny_learner(inside)
    learner.fit(1)

    class Calling(TinyModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calling.validate()
            return x

    calling = tiny_learner(model=Calling())
    with pytest.raises(UsageError, match=r"validate\(\) was called inside a batch or an event"):
        calling.predict([torch.ones(1, 1)])


def test_a_phase_that_sets_the_core_is_not_needed() -> None:
    with pytest.raises(CoreError, match="TrainingPhase has nothing to train"):
        tiny_learner(model=Frozen())
    frozen = tiny_learner(model=Frozen(), data={ValidationPhase: tiny_batches(n_batches=1)})
    assert frozen.predict([torch.ones(2, 1)]).tolist() == [[0.0], [0.0]]


class Frozen(TinyModel):
    """A model without a parameter that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


# --- a phase that is defined again


def held(name: str = "Held", module: str = "__main__") -> type[ValidationPhase]:
    """Return a new class, as a cell of a notebook makes one whenever it runs."""
    return type(name, (ValidationPhase,), {"__module__": module})


def counted(learner: Learner) -> list[tuple[str, int, int]]:
    """Return the phases of the recorded metrics, the number of their values, and the number of their epochs."""
    recorded = learner.cbstate.metrics_epoch
    return [(repr(each), len(recorded[each]["Loss"]), learner.cbstate.history[each].epochs) for each in recorded]


def test_a_class_that_is_defined_again_is_the_same_phase(tmp_path: Path) -> None:
    learner = tiny_learner(Checkpointer(tmp_path), n_batches=2)
    for _ in range(3):
        learner.evaluate(tiny_batches(n_batches=2), held())
    learner.fit(1)
    expected = [("Held", 3, 3), ("TrainingPhase", 1, 1), ("ValidationPhase", 1, 1)]
    assert counted(learner) == expected
    newest = held()
    other = tiny_learner(Checkpointer(tmp_path), n_batches=2)
    other.load(tmp_path)
    assert counted(other) == expected
    other.evaluate(tiny_batches(n_batches=2), newest)
    assert counted(other) == [("Held", 4, 4), *expected[1:]]
    assert newest in other.cbstate.metrics_epoch
    assert len(other.history[newest]["Loss"]) == 4


def test_a_phase_of_the_data_that_is_defined_again_takes_over_its_loader() -> None:
    old, new = held(), held()
    learner = tiny_learner(
        data={
            TrainingPhase: tiny_batches(n_batches=2),
            old: tiny_batches(n_batches=2),
            ValidationPhase: tiny_batches(n_batches=2),
        }
    )
    learner.fit(1)
    assert learner.evaluate(phase=new)["Loss"] > 0
    assert [type(each) for each in learner.data] == [TrainingPhase, new, ValidationPhase]
    learner.fit(1)
    assert counted(learner) == [("TrainingPhase", 2, 2), ("Held", 3, 3), ("ValidationPhase", 2, 2)]


@pytest.mark.parametrize("call", ["evaluate", "epoch", "step", "fit"])
def test_another_class_of_the_same_name_is_refused(call: str) -> None:
    one, other = held(module="one"), held(module="other")
    learner = tiny_learner(data={TrainingPhase: tiny_batches(n_batches=2), one: tiny_batches(n_batches=2)})
    [batch] = tiny_batches(n_batches=1)
    calls: dict[str, Callable[[], object]] = {
        "evaluate": lambda: learner.evaluate([batch], other),
        "epoch": lambda: learner.epoch(other, [batch]),
        "step": lambda: learner.step(other, batch),
        "fit": lambda: learner.fit(1, data={TrainingPhase: [batch], other: [batch]}),
    }
    with pytest.raises(DataError) as raised:
        calls[call]()
    assert str(raised.value) == (
        "The learner has run or would run two phases with the name Held, one.Held and other.Held. Logs, checkpoints "
        "and conditions know a phase by its name. Give one of them another name."
    )
    learner.fit(1)
    assert counted(learner) == [("TrainingPhase", 1, 1), ("Held", 1, 1)]


# --- the exception that a closed learner keeps


class OwnNew(Exception):
    """An exception whose class takes other arguments than those in ``args``."""

    def __new__(cls, *, code: int) -> OwnNew:
        return super().__new__(cls)

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


def test_a_copy_without_frames_keeps_type_text_and_notes() -> None:
    failure = merge([ValueError("broken"), CancelBatchException("skip")])
    bare = without_frames(failure)
    assert (type(bare), str(bare)) == (ValueError, "broken")
    assert bare.__notes__ == ["also raised: CancelBatchException: skip"]
    assert [type(each) for each in vars(bare)["others"]] == [CancelBatchException]


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (OwnNew(code=3), "OwnNew: code 3"),
        (
            UnicodeDecodeError("utf8", b"\xff", 0, 1, "bad byte"),
            "UnicodeDecodeError: 'utf8' codec can't decode byte 0xff in position 0: bad byte",
        ),
    ],
)
def test_an_exception_that_cannot_be_made_again_keeps_its_text(failure: Exception, text: str) -> None:
    failure.add_note("a note")
    bare = without_frames(failure)
    assert (type(bare), str(bare)) == (RuntimeError, text)
    assert bare.__notes__ == ["a note"]
    assert bare.__traceback__ is None
