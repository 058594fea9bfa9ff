"""SanityCheck: it reports all problems at once, and its checks change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from flowtrain import AbstractTrainingPhase, Learner, SanityCheckError, TrainingPhase, ValidationPhase
from flowtrain.callbacks import SanityCheck
from flowtrain.callbacks.sanity_check import check_batch, check_loss, check_optimizers, check_outputs, check_targets
from flowtrain.graph.executor import Executor
from flowtrain.testing import assert_equivalent, tiny_batches, tiny_learner

Batches = list[Any]
Loss = Callable[[Any, Any], Any]


def fails(learner: Learner) -> list[tuple[str, str, str]]:
    """Call `fit`, assert that it is refused before any training, and return the problems."""
    before = copy.deepcopy(learner.model.state_dict())
    with pytest.raises(SanityCheckError) as raised:
        learner.fit(1)
    assert learner.cbstate.history[TrainingPhase].steps == 0
    after = learner.model.state_dict()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)
    assert raised.value.problems
    return list(raised.value.problems)


def only(learner: Learner) -> tuple[str, str]:
    [(where, what, remedy)] = fails(learner)
    assert remedy
    return where, what


def with_data(train: Any, valid: Any = None, **kwargs: Any) -> Learner:
    return tiny_learner(SanityCheck(), data=train if valid is None else (train, valid), **kwargs)


def classifier(targets: torch.Tensor, lossfn: Any = F.cross_entropy, outputs: int = 3) -> Learner:
    inputs = torch.randn(len(targets), 2)
    torch.manual_seed(0)
    return tiny_learner(SanityCheck(), model=nn.Linear(2, outputs), lossfn=lossfn, data=[(inputs, targets)])


def pair(inputs: torch.Tensor, targets: torch.Tensor | None = None) -> Batches:
    return [(inputs, inputs if targets is None else targets)]


def test_everything_wrong_is_in_one_report() -> None:
    """The report lists problems of the data of two phases, of the targets and of the optimizer together."""
    broken = torch.ones(4, 1)
    broken[1:3] = torch.tensor(float("nan"))
    model = nn.Linear(1, 2)
    rate_zero = torch.optim.SGD([model.weight], lr=0.0)
    learner = tiny_learner(
        SanityCheck(),
        model=model,
        lossfn=nn.CrossEntropyLoss(),
        optimizer=rate_zero,
        data={TrainingPhase: [(torch.ones(4, 1), torch.tensor([0, 1, 2, 5]))], ValidationPhase: pair(broken)},
    )
    with pytest.raises(SanityCheckError) as raised:
        learner.fit(1)
    assert str(raised.value).splitlines()[0] == "SanityCheck found 5 problems before the first batch:"
    assert [(where, what.partition(":")[0]) for where, what, _ in raised.value.problems] == [
        (
            "targets of TrainingPhase",
            "targets go from 0 to 5; cross_entropy over outputs with 2 classes takes 0 to 1.",
        ),
        ("data of ValidationPhase", "inputs has 2 of 4 values that are NaN or infinite."),
        ("data of ValidationPhase", "targets has 2 of 4 values that are NaN or infinite."),
        ("optimizer", "it does not hold bias, which require gradients"),
        ("optimizer", "the learning rate of group 0 is 0.0."),
    ]
    for number, (where, what, remedy) in enumerate(raised.value.problems, start=1):
        assert f"{number}. {where}: {what}\n   {remedy}\n" in str(raised.value)


@pytest.mark.parametrize(
    ("data", "where", "what"),
    [
        ([torch.ones(4, 1)], "data of TrainingPhase", "TrainingPhase needs (inputs, targets) from its loader and got"),
        (pair(torch.ones(4, 1), torch.ones(3, 1)), "data of TrainingPhase", "there are 4 inputs and 3 targets"),
        (pair(torch.ones(0, 1)), "data of TrainingPhase", "inputs is Tensor of shape (0, 1), float32: it holds"),
        (pair(torch.ones(4, 1) * float("inf"), torch.ones(4, 1)), "data of TrainingPhase", "inputs has 4 of 4 values"),
        ([({"a": torch.ones(2), "b": [torch.tensor([1.0, float("nan")])]}, torch.ones(2))], "data of TrainingPhase",
         "inputs['b'][0] has 1 of 2 values"),
    ],
    ids=["no pair", "lengths", "no samples", "infinite", "nested"],
)  # fmt: skip
def test_data(data: Batches, where: str, what: str) -> None:
    found = fails(with_data(data))
    assert found[0][0] == where
    assert found[0][1].startswith(what)


def test_a_dataset_that_raises() -> None:
    class Broken(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            raise OSError(f"no file {index}")

    where, what = only(with_data(DataLoader(Broken(torch.ones(4)), batch_size=2)))
    assert (where, what) == ("data of TrainingPhase", "it raised OSError: no file 0")


class NeedsTwo(nn.Module):
    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight * self.factor


def test_a_model_that_does_not_run_and_one_with_infinite_outputs() -> None:
    where, what = only(with_data(tiny_batches(), model=NeedsTwo()))
    assert where == "model in TrainingPhase"
    assert what.startswith("it raised RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert what.endswith("It was called with inputs: Tensor of shape (8, 1), float32.")
    where, what = only(with_data(pair(torch.ones(4, 2)), model=NeedsTwo(float("inf"))))
    assert (where, what) == (
        "model in TrainingPhase",
        "outputs has 4 of 4 values that are NaN or infinite, before any update.",
    )


@pytest.mark.parametrize(
    ("targets", "lossfn", "outputs", "what"),
    [
        (torch.tensor([1, 3]), F.cross_entropy, 3, "targets go from 1 to 3; cross_entropy over outputs with 3 classes"),
        (torch.tensor([-1, 2]), nn.NLLLoss(), 3, "targets go from -1 to 2; nll_loss"),
        (torch.tensor([[0.0], [2.0]]), F.binary_cross_entropy_with_logits, 1, "targets go from 0 to 2; binary_cross"),
        (torch.tensor([[-1.0], [1.0]]), nn.BCEWithLogitsLoss(), 1, "targets go from -1 to 1; binary_cross_entropy_wit"),
    ],
)
def test_targets_out_of_the_range_of_the_loss(targets: torch.Tensor, lossfn: Any, outputs: int, what: str) -> None:
    where, found = only(classifier(targets, lossfn, outputs))
    assert where == "targets of TrainingPhase"
    assert found.startswith(what)


RIGHT_LOSSES: list[Loss] = [
    nn.CrossEntropyLoss(ignore_index=7),
    partial(F.cross_entropy, ignore_index=7),
    lambda outputs, targets: F.cross_entropy(outputs, targets.clamp(max=2)),  # a user's loss is not checked
]


@pytest.mark.parametrize("lossfn", RIGHT_LOSSES, ids=["module", "partial", "own"])
def test_targets_that_are_right(lossfn: Any) -> None:
    classifier(torch.tensor([0, 7, 2]), lossfn).fit(1)


def test_outputs_of_binary_cross_entropy() -> None:
    learner = classifier(torch.tensor([[1.0], [0.0]]), nn.BCELoss(), 1)
    nn.init.constant_(learner.model.bias, 50.0)
    where, what = only(learner)
    assert where == "targets of TrainingPhase"
    assert what.startswith("outputs go from")


BAD_LOSSES: list[tuple[Loss, str]] = [
    (lambda outputs, targets: outputs - targets, "it returned Tensor of shape (8, 1), float32"),
    (lambda outputs, targets: (outputs - targets).mean().item(), "it returned float"),
    (lambda outputs, targets: (outputs - targets).mean() * float("nan"), "it is nan before any update"),
    (lambda outputs, targets: (outputs - targets).mean().detach(), "it has no graph"),
    (lambda outputs, targets: outputs.wrong, "it raised AttributeError"),
]


@pytest.mark.parametrize(("lossfn", "what"), BAD_LOSSES, ids=["not single", "no tensor", "nan", "no graph", "raises"])
def test_loss(lossfn: Any, what: str) -> None:
    where, found = only(with_data(tiny_batches(), lossfn=lossfn))
    assert where == "loss in TrainingPhase"
    assert found.startswith(what)


def test_a_loss_in_validation_needs_no_graph() -> None:
    tiny_learner(SanityCheck()).fit(1)


def test_optimizer() -> None:
    learner = with_data(tiny_batches())
    for rate in (-0.1, float("nan")):
        learner.optimizer.param_groups[0]["lr"] = rate
        assert only(learner) == ("optimizer", f"the learning rate of group 0 is {rate}.")
    learner.optimizer.param_groups[0]["lr"] = 0.1
    torch.optim.lr_scheduler.LambdaLR(learner.optimizer, lambda step: 0.0)  # a warm-up may start at zero
    learner.fit(1)


class Draws(TensorDataset):
    """A dataset that draws random numbers for its samples."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        x, y = (tensor[index] for tensor in self.tensors)
        return x + torch.rand(()), y


class Counts(nn.Module):
    """A model with dropout, a batch norm and a counter of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 1))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        outputs: torch.Tensor = self.layers(x)
        return outputs


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("own_generator", [False, True])
def test_a_run_with_it_is_the_run_without(workers: int, own_generator: bool) -> None:
    """The same weights, buffers, attributes, order of both shuffled loaders, and later random numbers."""

    def run(*callbacks: SanityCheck) -> tuple[dict[str, torch.Tensor], int, torch.Tensor]:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(1) if own_generator else None
        data = Draws(torch.randn(12, 1), torch.randn(12, 1))
        loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator, num_workers=workers)
        learner = tiny_learner(*callbacks, model=Counts(), data=(loader, loader))
        learner.fit(1)
        return learner.model.state_dict(), learner.model.calls, torch.rand(3)

    if workers and own_generator:
        pytest.skip("one run with workers is enough")
    (with_it, calls, drawn), (without, calls_without, drawn_without) = run(SanityCheck()), run()
    assert all(torch.equal(with_it[name], without[name]) for name in without)
    assert calls == calls_without
    assert torch.equal(drawn, drawn_without)


class Stream(IterableDataset[Any]):
    """A stream that counts its passes."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter([(torch.ones(1), torch.ones(1))] * 4)


def test_what_cannot_be_looked_into_is_left_alone_and_named() -> None:
    stream = Stream()
    check = SanityCheck()
    learner = tiny_learner(check, data=(DataLoader(stream, batch_size=2), iter(tiny_batches(n_batches=3))))
    learner.fit(1)
    assert stream.passes == 1
    assert learner.cbstate.history[ValidationPhase].steps == 3
    assert check.skipped == [
        "data of TrainingPhase: an IterableDataset may lose the batches that are taken from it before training",
        "data of ValidationPhase: a list_iterator may lose the batches that are taken from it before training",
    ]


def test_a_phase_of_ones_own_is_named() -> None:
    class OwnPhase(TrainingPhase):
        def step(self, learner: Any, raw: Any) -> None:
            with learner.run_batch(self, raw=raw):
                pass

    check = SanityCheck()
    tiny_learner(check, data={OwnPhase: [torch.ones(1)]}).fit(1)
    assert check.skipped == ["model and loss in OwnPhase: it has a step of its own"]


def test_several_models_have_their_optimizers_checked() -> None:
    class Both(AbstractTrainingPhase):
        def step(self, learner: Any, raw: Any) -> None:
            raise AssertionError("nothing is trained")

    learner = tiny_learner(
        SanityCheck(),
        model={"gen": nn.Linear(1, 1), "disc": nn.Linear(1, 1)},
        optimizer={"gen": partial(torch.optim.SGD, lr=0.0)},
        data={Both: [torch.ones(1)]},
    )
    with pytest.raises(SanityCheckError) as raised:
        learner.fit(1)
    assert [(where, what) for where, what, _ in raised.value.problems] == [
        ("optimizer", "it does not hold disc.weight, disc.bias, which require gradients: they would never change."),
        ("optimizer 'gen'", "the learning rate of group 0 is 0.0."),
    ]
    assert str(raised.value).endswith("\nNot looked at: model and loss in Both: it has a step of its own.")


def test_the_same_under_every_executor() -> None:
    def make(executor: Executor) -> Learner:
        return tiny_learner(SanityCheck(), model=Counts(), n_batches=2, executor=executor)

    assert_equivalent(make, executors=["dask"], epochs=1)


# --- shapes that a loss stretches, and types that it refuses


class Wrapped(nn.Module):
    """A module of a user around a loss of torch."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 2 * F.mse_loss(outputs, targets)


class Squeezed(nn.Module):
    """A model whose outputs lack the second dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        squeezed: torch.Tensor = self.linear(inputs).squeeze(1)
        return squeezed


def by_hand(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return ((outputs - targets) ** 2).mean()


def with_keywords(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.l1_loss(input=outputs.float(), target=targets.float())


STRETCHING: list[tuple[Any, str]] = [
    (F.mse_loss, "mse_loss"),
    (nn.MSELoss(), "mse_loss"),
    (F.l1_loss, "l1_loss"),
    (F.smooth_l1_loss, "smooth_l1_loss"),
    (nn.HuberLoss(delta=2.0), "huber_loss"),
    (partial(F.huber_loss, delta=2.0), "huber_loss"),
    (F.binary_cross_entropy_with_logits, "binary_cross_entropy_with_logits"),
    (nn.BCEWithLogitsLoss(), "binary_cross_entropy_with_logits"),
    (F.poisson_nll_loss, "poisson_nll_loss"),
    (lambda outputs, targets: F.gaussian_nll_loss(outputs, targets, torch.ones_like(outputs)), "gaussian_nll_loss"),
    (Wrapped(), "mse_loss"),
    (by_hand, "sub"),
    (with_keywords, "l1_loss"),
    (lambda outputs, targets: (targets - outputs).abs().mean(), "sub"),
    (lambda outputs, targets: nn.MSELoss(reduction="none")(outputs, targets).mean(), "mse_loss"),
]


@pytest.mark.parametrize(("lossfn", "name"), STRETCHING)
def test_outputs_and_targets_that_are_stretched(lossfn: Any, name: str) -> None:
    inputs, targets = torch.randn(16, 1), torch.rand(16)
    for model, theirs, shapes in (
        (nn.Linear(1, 1), targets, "outputs of shape (16, 1) and targets of shape (16,)"),
        (Squeezed(), targets[:, None], "outputs of shape (16,) and targets of shape (16, 1)"),
    ):
        learner = tiny_learner(SanityCheck(), model=model, lossfn=lossfn, data=[(inputs, theirs)])
        [(where, what, remedy)] = fails(learner)
        assert where == "loss in TrainingPhase"
        assert what == (
            f"{name} gets {shapes}, and stretches them to (16, 16): it compares values that do not belong together."
        )
        assert "targets.unsqueeze(1) in the dataset, or .squeeze(1) at the end of the model" in remedy


def test_what_a_loss_has_reshaped_is_stretched() -> None:
    def lossfn(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(outputs, targets.view(-1))

    learner = tiny_learner(SanityCheck(), model=nn.Linear(1, 1), lossfn=lossfn, data=[(torch.ones(16, 1),) * 2])
    with pytest.warns(UserWarning, match="different to the input size"):  # torch's warning; it computes the loss
        [(_, what, _)] = fails(learner)
    assert what.startswith("mse_loss gets outputs of shape (16, 1) and targets of shape (16,), and stretches them to")


@pytest.mark.parametrize(("lossfn", "name"), STRETCHING)
def test_outputs_and_targets_of_one_shape(lossfn: Any, name: str) -> None:
    inputs, targets = torch.randn(16, 1), torch.rand(16)
    tiny_learner(SanityCheck(), model=Squeezed(), lossfn=lossfn, data=[(inputs, targets)]).fit(1)
    tiny_learner(SanityCheck(), model=nn.Linear(1, 1), lossfn=lossfn, data=[(inputs, targets[:, None])]).fit(1)


def contrastive(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss that compares all pairs of a batch on purpose."""
    same = (targets[:, None] == targets[None, :]).float()
    distances = (outputs[:, None, :] - outputs[None, :, :]).square().sum(2)
    return (same * distances).mean()


@pytest.mark.parametrize("lossfn", [F.cross_entropy, nn.CrossEntropyLoss(), contrastive])
@pytest.mark.parametrize("batch", [3, 16])
def test_a_loss_of_other_shapes_is_left_alone(lossfn: Any, batch: int) -> None:
    """The shapes of class losses are left alone, even if a batch has as many samples as there are classes."""
    classifier(torch.arange(batch) % 3, lossfn).fit(1)


@pytest.mark.cpu_only("the simulated device finds a wrong type only when it computes")
@pytest.mark.parametrize(
    ("lossfn", "targets", "what", "advice"),
    [
        (F.cross_entropy, torch.zeros(4), "cross_entropy takes class numbers of type int64", "targets.long()"),
        (
            nn.CrossEntropyLoss(),
            torch.zeros(4).int(),
            "cross_entropy takes class numbers of type int64",
            "targets.long()",
        ),
        (F.cross_entropy, torch.eye(3).long(), "cross_entropy takes class numbers of type int64", "targets.argmax(1)"),
        (
            F.cross_entropy,
            torch.zeros(4, 1).long(),
            "takes one class number for each row of outputs",
            "targets.squeeze(1)",
        ),
        (F.nll_loss, torch.zeros(4), "nll_loss takes class numbers of type int64", "targets.long()"),
        (lambda o, t: F.cross_entropy(o, t), torch.zeros(4), "it raised RuntimeError", ".long()"),
        (
            lambda o, t: F.huber_loss(o[:, 0], t),
            torch.zeros(4).long(),
            "its backward pass raised RuntimeError",
            ".float()",
        ),
        (lambda o, t: F.huber_loss(o[:, 0], t), torch.zeros(4).double(), "its backward pass raised", ".float()"),
    ],
)
def test_targets_of_a_type_or_shape_that_the_loss_does_not_take(
    lossfn: Any, targets: torch.Tensor, what: str, advice: str
) -> None:
    [(_, found, remedy)] = fails(classifier(targets, lossfn))
    assert what in found
    assert advice in remedy


@pytest.mark.cpu_only("the simulated device finds a wrong type only when it computes")
@pytest.mark.parametrize("targets", [torch.zeros(4).byte(), torch.zeros(4).long(), torch.eye(3), torch.eye(3).double()])
def test_targets_of_a_type_that_cross_entropy_takes(targets: torch.Tensor) -> None:
    classifier(targets).fit(1)


# --- the checks themselves, where a whole fit does not reach


NAN = float("nan")


@pytest.mark.parametrize(
    ("lossfn", "outputs", "targets"),
    [
        (F.cross_entropy, torch.zeros(2, 3), torch.tensor([-100, -100])),  # every target is the ignored index
        (F.cross_entropy, torch.zeros(2, 3), torch.tensor([[0.5, 0.5, 0.0], [9.0, 0.0, 0.0]])),  # probabilities
        (F.cross_entropy, torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 2)),  # one class for each pixel
        (F.cross_entropy, torch.zeros(3), torch.tensor(2)),  # one sample without a batch dimension
        (F.mse_loss, torch.zeros(2), torch.tensor([-5.0, 9.0])),
        (nn.BCELoss(), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])),
        (F.cross_entropy, {"logits": torch.zeros(2, 3)}, torch.tensor([7])),  # a user's loss in a module
    ],
)
def test_targets_that_a_loss_takes(lossfn: Any, outputs: Any, targets: torch.Tensor) -> None:
    assert list(check_targets("targets", lossfn, outputs, targets)) == []


def test_a_class_for_each_pixel_out_of_range() -> None:
    [problem] = check_targets("targets", F.cross_entropy, torch.zeros(2, 3, 4, 4), torch.full((2, 4, 4), 3))
    assert problem.what == "targets go from 3 to 3; cross_entropy over outputs with 3 classes takes 0 to 2."


def test_a_subclass_of_a_loss_may_take_other_targets() -> None:
    class Shifted(nn.CrossEntropyLoss):
        """A loss for classes numbered from 1."""

    assert not list(check_targets("targets", Shifted(), torch.zeros(2, 3), torch.tensor([1, 3])))


def test_only_floating_numbers_can_be_broken() -> None:
    assert not list(check_batch("data", torch.tensor([1, 2]), [torch.tensor([True]), "text"]))
    [problem] = check_outputs("model", (torch.zeros(2), torch.tensor([complex(NAN, 0), 1j])))
    assert problem.what.startswith("outputs[1] has 1 of 2 values")


def test_a_loss_of_one_element_with_a_shape_is_a_number() -> None:
    assert not list(check_loss("loss", torch.ones(1, 1, requires_grad=True), training=True))


def test_optimizers_together_hold_all_parameters() -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    trainable = {f"{name}.{key}": param for name, model in (("one", one), ("two", two))
                 for key, param in model.named_parameters()}  # fmt: skip
    first = torch.optim.SGD(one.parameters(), lr=0.1)
    assert not list(check_optimizers({"a": first, "b": torch.optim.SGD(two.parameters(), lr=0.1)}, trainable))
    [problem] = check_optimizers({"a": first}, {**trainable, "x": nn.Parameter(), "y": nn.Parameter()})
    assert problem.what.startswith("it does not hold two.weight, two.bias, x and 1 more,")
