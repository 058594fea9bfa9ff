"""Models of several inputs, and models that compute their loss: a phase calls them, without a module around them."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flowtrain import Learner, LossError, TorchCore, TrainingPhase, ValidationPhase
from flowtrain.callbacks import Metric, Metrics, ModelSummary, SanityCheck
from flowtrain.metrics import accuracy, model_loss
from tests.support.console import printed
from tests.support.untyped import untyped


class Several(TrainingPhase):
    """Train a model of several inputs."""

    unpack = True


class SeveralValid(ValidationPhase):
    """Evaluate a model of several inputs."""

    unpack = True


class Gated(nn.Module):
    """A classifier of two inputs, with the loss in its outputs if it gets labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor, gate: Tensor, labels: Tensor | None = None) -> Any:
        scores = self.head(x * gate)
        return scores if labels is None else Outputs(loss=cross_entropy(scores, labels), logits=scores)


class Outputs(OrderedDict[str, Tensor]):
    """A mapping with attributes, as the models of Hugging Face return."""

    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        super().__init__(loss=loss, logits=logits)
        self.loss, self.logits = loss, logits


class Around(nn.Module):
    """The wrapper that these phases save: the model is called with the items of one argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return self.model(**inputs) if isinstance(inputs, dict) else self.model(*inputs)


def batches(form: str) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    made: list[Any] = []
    for size in (4, 4, 2):
        x, gate = torch.randn(2, size, 3, generator=generator)
        labels = torch.randint(2, (size,), generator=generator)
        forms = {
            "nested": ((x, gate), labels),
            "flat": [x, gate, labels],
            "named": ({"gate": gate, "x": x}, labels),
            "mapping": {"x": x, "gate": gate, "labels": labels},
        }
        made.append(forms[form])
    return made


def trained(model: nn.Module, lossfn: Any, data: Any, *callbacks: Any, **core: Any) -> Learner:
    learner = Learner(
        model,
        lossfn,
        data=data,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        callbacks=callbacks,
        default_callbacks="quiet",
        core=TorchCore("cpu", **core),
    )
    learner.fit(2)
    return learner


def losses(learner: Learner, phase: type[TrainingPhase | ValidationPhase]) -> list[float]:
    return learner.cbstate.metrics_epoch[phase]["Loss"].values  # type: ignore[no-any-return]  # of a series


COMPILED = {"backend": "aot_eager"}
NOT_COMPILED = pytest.mark.cpu_only("torch.compile cannot trace a device that is written in Python")


@pytest.mark.usefixtures("forget_compilations")
@pytest.mark.parametrize(
    ("form", "core"),
    [
        pytest.param(form, core, id=f"{name}-{form}", marks=NOT_COMPILED if "compile" in core else ())
        for name, core, forms in (
            ("plain", {}, ("nested", "flat", "named", "mapping")),
            ("bf16", {"precision": "bf16"}, ("nested", "flat", "named", "mapping")),
            ("accumulate", {"accumulate": 2}, ("nested", "flat", "named", "mapping")),
            # A compilation takes a second.
            ("compile", {"compile": COMPILED}, ("nested", "named")),
            ("compile loss", {"compile": {**COMPILED, "loss": True}}, ("flat", "mapping")),
        )
        for form in forms
    ],
)
def test_a_model_of_several_inputs_trains_as_one_in_a_wrapper(form: str, core: Any) -> None:
    lossfn = model_loss if form == "mapping" else cross_entropy
    found = trained(Gated(), lossfn, {Several: batches(form), SeveralValid: batches(form)}, **core)
    pairs = batches("nested")
    plain = {name: value for name, value in core.items() if name != "compile"}
    expected = trained(Around(Gated()), cross_entropy, (pairs, pairs), **plain)
    for name, tensor in found.model.state_dict().items():
        torch.testing.assert_close(tensor, expected.model.model.state_dict()[name])
    assert list(found.model.state_dict()) == ["head.weight", "head.bias"]
    assert losses(found, Several) == pytest.approx(losses(expected, TrainingPhase), rel=1e-5)
    assert losses(found, SeveralValid) == pytest.approx(losses(expected, ValidationPhase), rel=1e-5)


@pytest.mark.cpu_only("calls the model with tensors of the CPU")
def test_metrics_see_the_outputs_of_the_model() -> None:
    hits = Metric(lambda outputs, targets: accuracy(outputs.logits, targets), name="Accuracy")
    data = batches("mapping")
    learner = trained(Gated(), model_loss, {Several: data, SeveralValid: data}, Metrics(hits))
    with torch.no_grad():
        scores = torch.cat([learner.model.eval()(raw["x"], raw["gate"]) for raw in data])
    expected = (scores.argmax(1) == torch.cat([raw["labels"] for raw in data])).float().mean().item()
    assert learner.cbstate.metrics_epoch[SeveralValid]["Accuracy"].last()[1] == pytest.approx(expected)


def test_a_phase_calls_the_model_in_its_own_way() -> None:
    class ByName(TrainingPhase):
        def call_model(self, model: Any, inputs: Any) -> Any:
            return model(gate=inputs[1], x=inputs[0])

    pairs = batches("nested")
    found, expected = trained(Gated(), cross_entropy, {ByName: pairs}), trained(Around(Gated()), cross_entropy, pairs)
    assert torch.equal(found.model.head.weight, expected.model.model.head.weight)


@pytest.mark.parametrize("form", ["nested", "named"])
def test_the_error_of_a_model_that_gets_one_argument_says_how_to_pass_several(form: str) -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'gate'") as caught:
        trained(Gated(), cross_entropy, batches(form))
    assert caught.value.__notes__[1] == (
        "To pass its items as arguments, set unpack = True in a subclass of TrainingPhase."
    )
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'gate'") as caught:
        trained(Gated(), cross_entropy, {Several: [(torch.ones(2, 3), torch.ones(2))]})
    assert "unpack" not in str(caught.value.__notes__)


def test_checks_and_summaries_call_the_model_as_the_phase_does() -> None:
    data = batches("mapping")
    with printed(100) as text:
        learner = trained(Gated(), model_loss, {Several: data, SeveralValid: data}, SanityCheck(), ModelSummary())
        inputs = {"x": data[0]["x"], "gate": data[0]["gate"]}
        trained(Gated(), model_loss, {Several: data}, ModelSummary(inputs=inputs))
    assert "loss: (), logits: (4, 2)" in text.getvalue()
    assert "Some shapes are missing" not in text.getvalue()
    assert untyped(learner.get_callback(SanityCheck)).skipped == []


@pytest.mark.parametrize("outputs", [{"loss": torch.tensor(2.0)}, SimpleNamespace(loss=torch.tensor(2.0))])
def test_the_loss_of_the_model(outputs: Any) -> None:
    assert model_loss(outputs, None).item() == 2.0


def test_a_model_that_gives_no_loss_is_explained() -> None:
    unlabelled = [{"x": raw["x"], "gate": raw["gate"]} for raw in batches("mapping")]
    with pytest.raises(LossError) as caught:
        trained(Gated(), model_loss, {Several: unlabelled})
    assert str(caught.value) == (
        "model_loss takes the loss from the outputs of the model, and there is none in Tensor of shape (4, 2), "
        "float32. A model of Hugging Face computes it if the batch has labels: let the dataset return them, or pass a "
        "loss function of (outputs, targets), such as lambda outputs, targets: cross_entropy(outputs.logits, targets)."
    )


@pytest.mark.cpu_only("calls the model with tensors of the CPU")
@pytest.mark.parametrize("form", ["nested", "flat", "named", "mapping"])
def test_predictions_of_a_model_of_several_inputs(form: str) -> None:
    """Labels in a mapping are left out, so that the model computes no loss, which could not be concatenated."""
    data = batches(form)
    learner = trained(Gated(), model_loss if form == "mapping" else cross_entropy, {Several: data, SeveralValid: data})
    model = learner.model.eval()
    with torch.no_grad():
        expected = torch.cat([model(*inputs) for inputs, _ in batches("nested")])
    assert torch.equal(learner.predict(data), expected)


def test_predictions_by_a_call_of_the_phase() -> None:
    class ByName(ValidationPhase):
        def call_model(self, model: Any, inputs: Any) -> Any:
            return model(gate=inputs[1], x=inputs[0])

    learner = Learner(Gated(), cross_entropy, default_callbacks=False, core=TorchCore("cpu"))
    pairs = batches("nested")
    assert torch.equal(learner.predict(pairs, ByName), learner.predict(pairs, SeveralValid))
