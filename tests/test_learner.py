"""The learner: how long it trains, on which data, with which callbacks, and the errors for bad arguments."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    BatchEnd,
    Callback,
    CallbackError,
    CancelEpochException,
    CancelFittingException,
    EpochBegin,
    EpochEnd,
    ExecutorError,
    FitBegin,
    FlowtrainError,
    Learner,
    LearnerView,
    LossError,
    Phase,
    Read,
    SerialExecutor,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.testing import TinyModel, tiny_batches, tiny_learner
from tests.support.fired import OODPhase


class Count(Callback):
    """Counts batches, and notes the epochs as ``T3`` (training, three batches)."""

    def __init__(self) -> None:
        self.epochs: list[str] = []
        self.batches = 0
        self.fit: FitBegin | None = None

    @on(FitBegin)
    def keep(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        self.fit = event

    @on(EpochBegin)
    def begin(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        self.batches = 0

    @on(BatchEnd)
    def count(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.batches += 1

    @on(EpochEnd)
    def end(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        self.epochs.append(f"{repr(phase)[0]}{self.batches}")


def counted(train: int = 3, valid: int | None = 2, *callbacks: Callback, **options: Any) -> tuple[Count, Learner]:
    count = Count()
    data: dict[type[Phase], Any] = {TrainingPhase: tiny_batches(n_batches=train)}
    if valid is not None:
        data[ValidationPhase] = tiny_batches(n_batches=valid)
    chosen: dict[str, Any] = {"data": data, **options}
    return count, tiny_learner(count, *callbacks, **chosen)


# --- fit, epoch, step, validate


@pytest.mark.parametrize(
    ("how", "epochs"),
    [
        ({"epochs": 2}, "T3 V2 T3 V2"),
        ({"steps": 3}, "T3 V2"),
        ({"steps": 7}, "T3 V2 T3 V2 T1 V2"),
        ({"steps": 2}, "T2 V2"),
        ({"steps": 4, "validate_every": 2}, "T2 V2 T2 V2"),
        ({"steps": 5, "validate_every": 2}, "T2 V2 T2 V2 T1 V2"),
        ({"steps": 8, "validate_every": 4}, "T4 V2 T4 V2"),
        ({"steps": 1, "validate_every": 100}, "T1 V2"),
        ({"epochs": 2, "validate_every": 1}, "T3 V2 T3 V2"),
        ({"epochs": 4, "validate_every": 2}, "T3 T3 V2 T3 T3 V2"),
        ({"epochs": 5, "validate_every": 2}, "T3 T3 V2 T3 T3 V2 T3 V2"),
        ({"epochs": 2, "validate_every": 9}, "T3 T3 V2"),
        ({"epochs": 2, "limit_batches": 1}, "T1 V1 T1 V1"),
        ({"epochs": 1, "limit_batches": 100}, "T3 V2"),
        ({"epochs": 1, "limit_batches": 0.1}, "T1 V1"),
        ({"epochs": 1, "limit_batches": {TrainingPhase: 0.7}}, "T2 V2"),
        ({"epochs": 1, "limit_batches": {TrainingPhase(): 1.0, ValidationPhase: 1}}, "T3 V1"),
        ({"epochs": 3, "validate_every": 2, "limit_batches": 2}, "T2 T2 V2 T2 V2"),
        ({"steps": 5, "limit_batches": 2}, "T2 V2 T2 V2 T1 V2"),
        ({"steps": 5, "validate_every": 4, "limit_batches": {TrainingPhase: 2}}, "T4 V2 T1 V2"),
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_how_long_a_fit_is(how: dict[str, Any], epochs: str, accumulate: int) -> None:
    count, learner = counted(core=TorchCore(device="cpu", accumulate=accumulate))
    learner.fit(**how)
    assert " ".join(count.epochs) == epochs
    updates = learner.cbstate.history[TrainingPhase].updates  # the number of updates that were made
    assert count.fit == FitBegin(how.get("epochs"), how.get("steps"), updates)
    assert learner.stopped is None


def test_fit_by_steps_goes_on_in_the_loader_after_each_validation() -> None:
    data = tiny_batches(n_batches=3)
    seen: list[int] = []

    class Which(Callback):
        def state_access(self) -> Access:
            return {"batch.inputs": Read()}

        @on(BatchEnd, TrainingPhase)
        def note(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            inputs = learner.batch.inputs.cpu()
            seen.append(next(number for number, (x, _) in enumerate(data) if torch.equal(x, inputs)))

    tiny_learner(Which(), data=data).fit(steps=7, validate_every=2)
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_training_goes_on_in_a_second_fit() -> None:
    _, once = counted()
    once.fit(2)
    _, twice = counted()
    twice.fit(1)
    twice.fit(1)
    assert torch.equal(once.model.coeff, twice.model.coeff)
    assert twice.cbstate.history[TrainingPhase].epochs == 2


def test_steps_need_one_training_phase() -> None:
    _, learner = counted()
    with pytest.raises(UsageError, match=r"counts the batches of one training phase; the data has none\. Use fit\(epo"):
        learner.fit(steps=3, data={ValidationPhase: tiny_batches()})

    class Other(TrainingPhase):
        """A second training phase."""

    with pytest.raises(UsageError, match="the data has TrainingPhase, Other"):
        learner.fit(steps=3, data={TrainingPhase: tiny_batches(), Other: tiny_batches()})


def test_direct_epochs_and_validation() -> None:
    count, learner = counted()
    learner.epoch(TrainingPhase)
    learner.epoch(ValidationPhase())
    learner.validate()
    learner.epoch(OODPhase, tiny_batches(n_batches=5))
    assert count.epochs == ["T3", "V2", "V2", "O5"]
    assert count.fit is None
    _, lonely = counted(3, None)
    with pytest.raises(UsageError, match="has no data of a phase that does not train; the learner has TrainingPhase"):
        lonely.validate()


def test_a_direct_step_returns_the_batch() -> None:
    _, learner = counted()
    x, y = tiny_batches(n_batches=1)[0]
    batch = learner.step(ValidationPhase, (x, y))
    assert batch is learner.batch
    assert torch.equal(batch.outputs, torch.zeros_like(x))
    assert torch.equal(batch.loss, mse_loss(torch.zeros_like(x), y))
    before = learner.model.coeff.detach().clone()
    assert not torch.equal(learner.step(TrainingPhase, (x, y)).grads["coeff"], torch.zeros(()))
    assert not torch.equal(learner.model.coeff, before)


def test_stopped_says_what_ended_the_last_fit() -> None:
    class Stop(Callback):
        error: Exception | None = None

        @on(EpochEnd, TrainingPhase)
        def maybe(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            if self.error is not None:
                raise self.error

    stop = Stop()
    _, learner = counted(3, 2, stop)
    stop.error = CancelFittingException("flat")
    learner.fit(5)
    assert learner.stopped is stop.error
    assert learner.cbstate.history[TrainingPhase].epochs == 1
    stop.error = ValueError("broken")
    with pytest.raises(ValueError, match="broken"):
        learner.fit(5)
    assert repr(learner.stopped) == "ValueError('broken')"
    stop.error = CancelEpochException("that is not early")
    learner.fit(1)
    assert learner.stopped is None


@pytest.mark.cpu_only("on the CPU losses are read at once")
def test_a_nan_loss_stops_training_with_a_warning() -> None:
    data = tiny_batches(n_batches=3)
    data[1] = (data[1][0], data[1][1] * float("nan"))
    learner = tiny_learner(data=data)
    with pytest.warns(RuntimeWarning, match=r"The loss is NaN in batch 2 of epoch 1 of TrainingPhase \(step 2\)"):
        learner.fit(1)
    assert isinstance(learner.stopped, CancelFittingException)
    assert learner.model.coeff.isfinite()


# --- several models and optimizers


def test_several_optimizers_each_with_its_own_parameters() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow, self.fast = TinyModel(), TinyModel()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.slow.coeff * x + self.fast.coeff * x

    model = Two()
    optimizer = {
        "slow": torch.optim.SGD(model.slow.parameters(), lr=0.01),
        "fast": torch.optim.SGD(model.fast.parameters(), lr=0.1),
    }
    learner = tiny_learner(model=model, optimizer=optimizer)
    learner.fit(1)
    assert float(model.fast.coeff.detach()) == pytest.approx(10 * float(model.slow.coeff.detach()), rel=1e-5)
    assert learner.optimizer.fast is optimizer["fast"]
    assert list(learner.params) == ["slow.coeff", "fast.coeff"]
    assert learner.cbstate.history[TrainingPhase].updates == 16, "an update of both optimizers counts once"


def test_several_models_share_one_optimizer() -> None:
    class Both(AbstractTrainingPhase):
        def step(self, learner: Any, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
                outputs = learner.model.head(learner.model.body(batch.inputs))
                batch.loss = learner.lossfn(outputs, batch.targets)
                learner.backward(self, batch.loss)
                learner.update(self)

    torch.manual_seed(0)
    models = {"body": nn.Linear(1, 4), "head": nn.Linear(4, 1)}
    expected = nn.Sequential(nn.Linear(1, 4), nn.Linear(4, 1))
    expected[0].load_state_dict(models["body"].state_dict())
    expected[1].load_state_dict(models["head"].state_dict())
    tiny_learner(model=models, data={Both: tiny_batches()}).fit(2)
    tiny_learner(model=expected, data=tiny_batches()).fit(2)
    assert torch.equal(models["body"].weight, expected.get_parameter("0.weight"))
    assert torch.equal(models["head"].bias, expected.get_parameter("1.bias"))


# --- errors for bad arguments


BAD: dict[str, tuple[Callable[[], object], type[FlowtrainError], str]] = {
    "unknown executor": (
        lambda: tiny_learner(executor="serail"),
        ExecutorError, "There is no executor 'serail'. Did you mean 'serial'? Known are: ",
    ),
    "futures": (
        lambda: tiny_learner(executor=concurrent.futures.ThreadPoolExecutor(1)),
        ExecutorError, "ThreadPoolExecutor is an executor of concurrent.futures: it runs functions and knows nothing",
    ),
    "executor class": (
        lambda: tiny_learner(executor=SerialExecutor),
        ExecutorError, "executor=SerialExecutor is a class. Pass an instance: SerialExecutor().",
    ),
    "no executor": (lambda: tiny_learner(executor=3), ExecutorError, "executor=3 is no executor: it needs name, bind"),
    "callback class": (
        lambda: tiny_learner(callbacks=[Count]), CallbackError, "Count is a class. Pass an instance: Count().",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "text"), BAD.values(), ids=BAD)
def test_what_bad_input_gets(make: Callable[[], object], error: type[FlowtrainError], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        make()


def test_the_known_executors_are_listed() -> None:
    with pytest.raises(ExecutorError, match=r"Known are: .*'serial'"):
        tiny_learner(executor="nope")


def test_an_executor_belongs_to_one_learner() -> None:
    executor = SerialExecutor()
    tiny_learner(executor=executor)
    with pytest.raises(ExecutorError, match=r"belongs to another learner\. Give each learner its own"):
        tiny_learner(executor=executor)


@pytest.mark.parametrize("phase", [TrainingPhase, ValidationPhase])
def test_a_model_and_a_loss_that_do_not_fit(phase: type[Phase]) -> None:
    data = {phase: [(torch.zeros(4, 6), torch.zeros(4, 2))]}
    learner = tiny_learner(model=nn.Linear(6, 3), lossfn=cross_entropy, data=data)
    with pytest.raises(LossError) as raised:
        learner.epoch(phase)
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("The loss function cross_entropy raised RuntimeError: ")
    assert lines[-1] == (
        f"In {phase.__name__} it was called with batch.outputs: Tensor of shape (4, 3), float32 and batch.targets: "
        "Tensor of shape (4, 2), float32. The model and the loss must fit: change the model's last layer, the targets "
        "that the dataset returns, or wrap the loss in a function of (outputs, targets) that returns a tensor with one "
        "element."
    )
    assert isinstance(raised.value.__cause__, RuntimeError)


def half(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return 0.5


def mean(outputs: torch.Tensor) -> torch.Tensor:
    return outputs.mean()


@pytest.mark.parametrize(
    ("lossfn", "text"),
    [
        (nn.MSELoss(reduction="none"), "function MSELoss returned Tensor of shape (8, 1), float32, which is no single"),
        (half, "The loss function half returned float 0.5, which is no tensor\nIn TrainingPhase"),
        (mean, "The loss function mean raised TypeError: "),
        (partial(mse_loss, reduction="none"), "function partial returned Tensor of shape (8, 1), float32, which is"),
    ],
    ids=["no reduction", "a float", "one argument", "partial"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_no_single_number(lossfn: Any, text: str, precision: Any) -> None:
    learner = tiny_learner(lossfn=lossfn, core=TorchCore(device="cpu", precision=precision))
    with pytest.raises(LossError, match=re.escape(text)):
        learner.fit(1)
    learner.close()


def test_a_closed_learner_trains_no_more() -> None:
    with tiny_learner(data=tiny_batches()) as learner:
        learner.fit(1)
        learner.flush()
    learner.close()
    assert learner.cbstate.history[TrainingPhase].epochs == 1, "a closed learner can still be read"
    for call in (lambda: learner.fit(1), learner.validate, lambda: learner.step(TrainingPhase, None)):
        with pytest.raises(ExecutorError, match="on a closed learner: its executor has given back"):
            call()


class FailsAtItsEnd(SerialExecutor):
    """Has a failure that nobody has heard of when the learner is closed, as that of a lane."""

    def close(self) -> None:
        super().close()
        raise ValueError("of a lane")


@pytest.mark.parametrize(
    ("left", "raised", "others"),
    [
        (RuntimeError("of the user"), RuntimeError, [ValueError]),
        (CancelFittingException("of the user"), ValueError, [CancelFittingException]),
        (KeyboardInterrupt("of the user"), KeyboardInterrupt, [ValueError]),
        (None, ValueError, []),
    ],
    ids=["an error", "a cancel", "an interrupt", "nothing"],
)
def test_the_exception_of_a_with_block_is_not_lost(
    left: BaseException | None, raised: type[BaseException], others: list[type[BaseException]]
) -> None:
    """Rules 15 and 17: the first error is raised, and the others are attached to it."""
    learner = tiny_learner(executor=FailsAtItsEnd())

    def leave() -> None:
        with learner:
            if left is not None:
                raise left

    with pytest.raises(raised) as caught:
        leave()
    assert [type(each) for each in getattr(caught.value, "others", ())] == others
    assert len(getattr(caught.value, "__notes__", ())) == len(others)
    assert learner.closed


@pytest.mark.cpu_only("looks at the core of the CPU")
def test_what_a_learner_is() -> None:
    learner = tiny_learner()
    core = "TorchCore(device='cpu', precision='fp32', accumulate=1)"
    assert repr(learner) == f"Learner(TinyModel, {core}, executor='serial')"
    assert learner.lossfn is mse_loss
    assert learner.params["coeff"] is learner.model.coeff
    assert learner.executor.name == "serial"
    assert repr(learner.callbacks) == "<Callbacks: Recorder, Metrics, StopOnNaNLoss>"
    for _ in range(2):
        assert (learner.rank, learner.world_size) == (0, 1)
        learner.close()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_learner_is_not_copied(how: Callable[[Learner], object]) -> None:
    with pytest.raises(UsageError, match=r"A Learner cannot be copied or pickled: .* Copy its model"):
        how(tiny_learner())


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("data", "Pass the loaders to a fit, learner.fit(10, data=...), or to learner.evaluate(...)."),
        ("optimizer", "Call learner.replace_optimizer(...)."),
        ("callbacks", "Call learner.set_callbacks([...]) or learner.add_callback(...)."),
        ("core", "Make a new Learner(..., core=...)."),
        ("executor", "Make a new Learner(..., executor=...)."),
        ("strict", "Make a new Learner(..., strict=True)."),
        ("model", "Change the object itself, or make a new Learner."),
        ("history", "Change the object itself, or make a new Learner."),
    ],
)
def test_an_assignment_that_would_have_no_effect_is_refused(name: str, remedy: str) -> None:
    learner = tiny_learner()
    before = getattr(learner, name)
    with pytest.raises(UsageError) as raised:
        setattr(learner, name, 1)
    assert str(raised.value) == (
        f"learner.{name} cannot be assigned: other parts of the learner hold what it had. {remedy}"
    )
    assert getattr(learner, name) is before or name == "history"


def test_an_attribute_of_ones_own_may_be_assigned() -> None:
    class Own(Learner):
        mine: int

        @property
        def doubled(self) -> int:
            return 2 * self.mine

        @doubled.setter
        def doubled(self, value: int) -> None:
            self.mine = value // 2

    learner = Own(TinyModel(), mse_loss, default_callbacks=False, core=TorchCore(device="cpu"))
    learner.doubled = 6
    assert learner.mine == 3


def test_strict_is_true_or_false() -> None:
    assert [tiny_learner(strict=strict).strict for strict in (True, False)] == [True, False]
    with pytest.raises(UsageError) as raised:
        tiny_learner(strict="no")
    assert str(raised.value) == "Learner(strict='no'): strict is True or False."
