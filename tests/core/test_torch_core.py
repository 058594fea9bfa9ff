"""The training core compared with hand-written torch loops: the same parameters, to the bit in fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flowtrain import (
    Access,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    CoreError,
    EpochEnd,
    Event,
    Learner,
    LearnerView,
    MissingStateError,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callback.events import BackwardBegin, BackwardEnd, BatchBegin, BatchCancelled, BatchEnd, LossBegin
from flowtrain.callbacks import CustomCallback
from flowtrain.core.settings import CoreSettings
from tests.support.models import Tempered

Pairs = list[tuple[Tensor, Tensor]]
ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


class Net(nn.Sequential):
    """A small network with dropout, so that its result depends on the random numbers that it draws."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def batches(count: int = 7, size: int = 5) -> Pairs:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def make(make_loss: Callable[[], Any]) -> tuple[Net, Any]:
    torch.manual_seed(0)
    return Net(), make_loss()


def entropy() -> Callable[[Tensor, Tensor], Tensor]:
    return cross_entropy


def cpu(**options: Any) -> TorchCore:
    return TorchCore(device="cpu", **options)


def learner_of(model: Any, lossfn: Any = cross_entropy, **options: Any) -> Learner:
    chosen: dict[str, Any] = {"default_callbacks": False, "optimizer": ADAMW, "data": batches(), **options}
    chosen.setdefault("core", cpu())
    return Learner(model, lossfn, **chosen)


def train_by_hand(
    model: nn.Module,
    lossfn: Any,
    *,
    epochs: int,
    precision: str = "fp32",
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    init_scale: float = 65536.0,
) -> None:
    """Train in a hand-written loop."""
    params = [*model.parameters(), *(lossfn.parameters() if isinstance(lossfn, nn.Module) else ())]
    optimizer = ADAMW(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, enabled=precision == "fp16")
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model.train()
    data = batches()
    for _ in range(epochs):
        for start in range(0, len(data), accumulate):
            group = data[start : start + accumulate]
            optimizer.zero_grad()
            for inputs, targets in group:
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    loss = lossfn(model(inputs), targets)
                scaler.scale(loss / accumulate).backward()
            scaler.unscale_(optimizer)
            for param in params:
                if param.grad is not None and len(group) < accumulate:
                    param.grad.mul_(accumulate / len(group))
            if clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(params, clip_grad_norm)
            if clip_grad_value is not None:
                nn.utils.clip_grad_value_(params, clip_grad_value)
            scaler.step(optimizer)
            scaler.update()


def assert_same(one: nn.Module, other: nn.Module) -> None:
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"these parameters differ: {different}"


# --- the same result as a loop written by hand


@pytest.mark.parametrize("make_loss", [entropy, Tempered])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 2},
        {"accumulate": 3},
        {"accumulate": 100},
        {"clip_grad_norm": 0.3},
        {"clip_grad_value": 0.02},
        {"clip_grad_norm": 0.3, "clip_grad_value": 0.02, "accumulate": 3},
        {"precision": "bf16"},
        {"precision": "bf16", "accumulate": 2, "clip_grad_norm": 0.3},
        {"precision": "fp16"},
        {"precision": "fp16", "accumulate": 3, "clip_grad_norm": 0.3, "init_scale": 2.0**20},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items()) or "plain",
)
def test_the_parameters_are_those_of_a_loop_by_hand(options: dict[str, Any], make_loss: Callable[[], Any]) -> None:
    model, lossfn = make(make_loss)
    train_by_hand(model, lossfn, epochs=3, **options)
    expected, expected_loss = model, lossfn

    model, lossfn = make(make_loss)
    learner_of(model, lossfn, core=cpu(**options)).fit(3)

    assert_same(model, expected)
    if isinstance(lossfn, nn.Module):
        assert_same(lossfn, expected_loss)
        assert lossfn.get_parameter("temperature").detach() != 1.5, "the loss function's parameter was not trained"


def test_epochs_one_by_one_and_steps_are_the_same_training() -> None:
    expected, lossfn = make(entropy)
    train_by_hand(expected, lossfn, epochs=2)

    model, _ = make(entropy)
    learner = learner_of(model)
    learner.epoch(TrainingPhase)
    for raw in batches():
        learner.step(TrainingPhase, raw)

    assert_same(model, expected)


def test_validation_in_between_changes_nothing() -> None:
    expected, lossfn = make(entropy)
    train_by_hand(expected, lossfn, epochs=2)

    model, _ = make(entropy)
    learner_of(model, data=(batches(), batches(2))).fit(2)

    assert_same(model, expected)


@pytest.mark.cpu_only("the expected gradients are computed on the CPU")
def test_a_last_group_of_one_counts_as_much_as_a_full_one() -> None:
    """With 7 batches in groups of 2, the last update uses the undivided loss of the last batch alone."""
    model, lossfn = make(entropy)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batches()
    model.eval()  # without dropout, so that both ways of computing the gradients start from the same random state
    learner = learner_of(model, optimizer=sgd, core=cpu(accumulate=2))
    snapshots: list[dict[str, Tensor]] = []

    def keep(view: LearnerView) -> None:
        snapshots.append({name: param.detach().clone() for name, param in model.named_parameters()})

    learner.add_callback(CustomCallback(keep, UpdateEnd))
    model[2] = nn.Identity()
    learner.fit(1)

    assert len(snapshots) == 4
    before, after = snapshots[-2:]
    model.load_state_dict(before)
    model.zero_grad()
    lossfn(model(data[-1][0]), data[-1][1]).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(after[name], before[name] - 0.1 * param.grad)


def test_several_optimizers_over_one_model_are_clipped_together() -> None:
    def optimizers(model: Net) -> dict[str, torch.optim.Optimizer]:
        return {"body": torch.optim.SGD(model[0].parameters(), 0.1), "head": ADAMW(model[3].parameters())}

    expected, lossfn = make(entropy)
    by_hand = optimizers(expected)
    for inputs, targets in batches():
        for optimizer in by_hand.values():
            optimizer.zero_grad()
        lossfn(expected(inputs), targets).backward()
        nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        for optimizer in by_hand.values():
            optimizer.step()

    model, _ = make(entropy)
    learner = learner_of(model, optimizer=optimizers(model), core=cpu(clip_grad_norm=0.5))
    learner.fit(1)

    assert_same(model, expected)
    assert list(learner.optimizer) == ["body", "head"]


@pytest.mark.cpu_only("torch.compile cannot trace a device that is written in Python")
@pytest.mark.usefixtures("forget_compilations")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_and_not_is_the_same_training(backend: str) -> None:
    torch.manual_seed(0)
    expected = Net(dropout=0.0)
    learner_of(expected).fit(2)

    torch.manual_seed(0)
    model = Net(dropout=0.0)
    learner = learner_of(model, core=cpu(compile={"backend": backend}))
    learner.fit(2)

    assert learner.model is model, "only the core has the compiled wrapper"
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("forget_compilations")
def test_compile_reaches_torch_once() -> None:
    calls: list[str] = []

    def backend(module: Any, inputs: Any) -> Any:
        calls.append("compiled")
        return module.forward

    model = Net(dropout=0.0)
    norm = CustomCallback(lambda view: None, UpdateEnd, TrainingPhase, {"batch.grad_norm": Read()})
    learner = learner_of(model, core=cpu(compile={"backend": backend}))
    learner.fit(2)
    learner.add_callback(norm)  # the callback changes the step, and the compiled model is kept
    learner.fit(1)
    assert calls == ["compiled"]


# --- fp16


def test_a_step_with_infinite_gradients_is_skipped_and_the_scale_halved() -> None:
    model, _ = make(entropy)
    learner = learner_of(model, core=cpu(precision="fp16", init_scale=1024.0))
    good, (inputs, targets) = batches()[:2]
    learner.step(TrainingPhase, good)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [entry["exp_avg"].clone() for entry in learner.optimizer.state.values()]

    learner.step(TrainingPhase, (inputs * 1e6, targets))  # above the largest fp16 value

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    now = [entry["exp_avg"] for entry in learner.optimizer.state.values()]
    assert all(map(torch.equal, moments, now))
    assert learner.core.state_dict()["scaler"]["scale"] == 512.0

    learner.step(TrainingPhase, good)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())


def test_a_cancel_after_unscaling_leaves_the_scaler_usable() -> None:
    """Rule 16, with a gradient scaler: it forgets gradients that it unscaled for an update that was then cancelled."""

    class Once(Callback):
        done = False

        @on(UpdateBegin, TrainingPhase)
        def cancel(self, event: UpdateBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            if not self.done:
                self.done = True
                raise CancelBatchException("once")

    expected, lossfn = make(entropy)
    data = batches()
    torch.manual_seed(3)
    expected(data[0][0])  # the cancelled batch also draws its random numbers
    other = learner_of(expected, lossfn, core=cpu(precision="fp16"))
    other.fit(1, data=data[1:])

    model, _ = make(entropy)
    torch.manual_seed(3)
    learner_of(model, callbacks=[Once()], core=cpu(precision="fp16")).fit(1)

    assert_same(model, expected)


def test_state_dict_carries_the_scale_over() -> None:
    core = cpu(precision="fp16", init_scale=1024.0)
    learner_of(Net(), core=core)
    other = cpu(precision="fp16")
    learner_of(Net(), core=other)
    other.load_state_dict(core.state_dict())
    assert other.state_dict()["scaler"]["scale"] == 1024.0
    plain = cpu()
    learner_of(Net(), core=plain)
    plain.load_state_dict(core.state_dict())
    assert plain.state_dict() == {"scaler": {}}


@pytest.mark.cpu_only("looks at the autocast of the CPU")
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_covers_forward_and_loss_but_not_the_parameters(precision: Any, dtype: torch.dtype) -> None:
    seen: dict[str, Any] = {}

    def look(view: LearnerView) -> None:
        seen["outputs"], seen["autocast"] = view.batch.outputs.dtype, torch.is_autocast_enabled("cpu")

    model = Net()
    look_at_it = CustomCallback(look, LossBegin, TrainingPhase, {"batch.outputs": Read()})
    learner = learner_of(model, callbacks=[look_at_it], core=cpu(precision=precision))
    learner.step(TrainingPhase, batches()[0])
    assert seen == {"outputs": dtype, "autocast": False}
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    with learner.forward():
        assert torch.is_autocast_enabled("cpu")
    with learner_of(Net()).forward():
        assert not torch.is_autocast_enabled("cpu")


# --- the gradients that handlers see


class Updates(Callback):
    """Records the batch number and the gradients of each update."""

    def __init__(self) -> None:
        self.batch = 0
        self.at: list[int] = []
        self.gradients: list[dict[str, Tensor]] = []

    def state_access(self) -> Access:
        return {"batch.grads": Read()}

    @on(BatchBegin, TrainingPhase, access={})
    def count(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        self.batch += 1

    @on(UpdateBegin, TrainingPhase)
    def keep(self, event: UpdateBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        self.at.append(self.batch)
        self.gradients.append({name: gradient.clone() for name, gradient in learner.batch.grads.items()})


def test_updates_come_at_the_end_of_each_group() -> None:
    updates = Updates()
    learner_of(Net(), callbacks=[updates], core=cpu(accumulate=3)).fit(2)
    assert updates.at == [3, 6, 7, 10, 13, 14]


@pytest.mark.cpu_only("the expected gradients are computed on the CPU")
def test_at_update_begin_gradients_are_whole_unscaled_and_not_clipped() -> None:
    torch.manual_seed(0)
    model = Net(dropout=0.0)
    inputs, targets = batches(1)[0]
    cross_entropy(model(inputs), targets).backward()
    expected = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    norm = nn.utils.get_total_norm(expected.values())
    updates = Updates()
    core = cpu(clip_grad_norm=1e-3, accumulate=2)
    learner = learner_of(model, callbacks=[updates], core=core, optimizer=partial(torch.optim.SGD, lr=0.0))

    learner.fit(1, data=[(inputs, targets)] * 2)

    for name, gradient in updates.gradients[0].items():
        torch.testing.assert_close(gradient, expected[name])
    torch.testing.assert_close(learner.batch.grad_norm, norm)
    clipped = list(learner.batch.grads.values())
    torch.testing.assert_close(nn.utils.get_total_norm(clipped), torch.tensor(1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close(learner.batch.loss, cross_entropy(model(inputs), targets).detach())


def test_the_loss_is_detached_from_backward_end_on() -> None:
    seen: list[tuple[str, bool]] = []

    class Look(Callback):
        def state_access(self) -> Access:
            return {"batch.loss": Read()}

        @on(BackwardBegin, TrainingPhase)
        def before(self, event: BackwardBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            seen.append(("BackwardBegin", learner.batch.loss.requires_grad))

        @on(BackwardEnd, TrainingPhase)
        def after(self, event: BackwardEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            seen.append(("BackwardEnd", learner.batch.loss.requires_grad))

    learner_of(Net(), callbacks=[Look()]).step(TrainingPhase, batches()[0])
    assert seen == [("BackwardBegin", True), ("BackwardEnd", False)]


def test_a_handler_may_change_gradients_before_the_update() -> None:
    class Halve(Callback):
        def state_access(self) -> Access:
            return {"batch.grads": Write()}

        @on(UpdateBegin, TrainingPhase)
        def halve(self, event: UpdateBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            for name in list(learner.batch.grads):
                learner.batch.grads[name] = learner.batch.grads[name] / 2

    expected, lossfn = make(entropy)
    sgd = partial(torch.optim.SGD, lr=0.1)
    learner_of(expected, lossfn, optimizer=partial(torch.optim.SGD, lr=0.05)).fit(1)
    model, _ = make(entropy)
    learner_of(model, optimizer=sgd, callbacks=[Halve()]).fit(1)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])


def test_grad_norm_is_computed_only_where_somebody_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    original = nn.utils.get_total_norm

    def counted(gradients: Any) -> Tensor:
        computed.append(1)
        return original(gradients)

    monkeypatch.setattr(nn.utils, "get_total_norm", counted)
    seen: list[float] = []
    reader = CustomCallback(
        lambda view: seen.append(float(view.batch.grad_norm)), BatchEnd, TrainingPhase, {"batch.grad_norm": Read()}
    )
    expected, lossfn = make(entropy)
    train_by_hand(expected, lossfn, epochs=3)
    model, _ = make(entropy)
    learner = learner_of(model)
    data = batches()

    learner.fit(1)
    with pytest.raises(MissingStateError, match=r"batch\.grad_norm does not exist"):
        _ = learner.batch.grad_norm
    assert computed == []
    learner.add_callback(reader)
    learner.fit(1)
    assert len(computed) == len(seen) == len(data)
    assert all(norm > 0 for norm in seen)
    learner.remove_callback(CustomCallback)
    evaluating = CustomCallback(lambda view: None, BatchEnd, ValidationPhase, {"batch": Read()})
    learner.add_callback(evaluating)  # it declares the whole batch, but in a phase that has no norm
    learner.fit(1)
    assert len(computed) == len(data)
    assert_same(model, expected)
    learner.replace_callback(CustomCallback(lambda view: None, BatchEnd, Phase, {"batch": Read()}))  # rule 4
    learner.fit(1)
    assert len(computed) == 2 * len(data)

    clipping = learner_of(Net(), core=cpu(clip_grad_norm=1.0))
    clipping.step(TrainingPhase, data[0])
    assert clipping.batch.grad_norm.ndim == 0
    assert len(computed) == 2 * len(data) + 1


# --- accumulation and cancelled batches


class Canceller(Callback):
    """Raises an exception at one event of the given batches, counted from 1 over all epochs."""

    def __init__(self, event_type: type[Event], numbers: Iterable[int], exception: type[Exception]) -> None:
        self.event_type, self.numbers, self.exception = event_type, set(numbers), exception
        self.batch = 0

    @on(Event, TrainingPhase)
    def cancel(self, event: Event, phase: TrainingPhase, learner: LearnerView) -> None:
        self.batch += isinstance(event, BatchBegin)
        if type(event) is self.event_type and self.batch in self.numbers:
            self.numbers.discard(self.batch)
            raise self.exception(f"batch {self.batch}")


def train_groups(groups: list[list[int]], divided_by: int) -> Net:
    """Train without dropout on groups; a group is a list of batch numbers from 1."""
    torch.manual_seed(0)
    model = Net(dropout=0.0)
    optimizer = ADAMW(model.parameters())
    data = batches()
    for group in groups:
        optimizer.zero_grad()
        for number in group:
            (cross_entropy(model(data[number - 1][0]), data[number - 1][1]) / divided_by).backward()
        for param in model.parameters():
            if param.grad is not None and len(group) < divided_by:
                param.grad.mul_(divided_by / len(group))
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("event", "numbers", "exception", "groups"),
    [
        # a cancel before the backward pass leaves the batch out, and its group continues
        (BatchBegin, [2], CancelBatchException, [[1, 3, 4], [5, 6, 7]]),
        (LossBegin, [1], CancelBatchException, [[2, 3, 4], [5, 6, 7]]),
        # a cancel from BackwardBegin on discards the gradients of the group, and the next batch begins a new group
        (BackwardBegin, [2], CancelBatchException, [[3, 4, 5], [6, 7]]),
        (BackwardEnd, [5], CancelBatchException, [[1, 2, 3], [6, 7]]),
        (UpdateBegin, [3], CancelBatchException, [[4, 5, 6], [7]]),
        # a cancel after the update does not undo the update
        (UpdateEnd, [3], CancelBatchException, [[1, 2, 3], [4, 5, 6], [7]]),
        # the last group of an epoch is shorter if the epoch has no more batches
        (BatchBegin, [7], CancelBatchException, [[1, 2, 3], [4, 5, 6]]),
        (BatchBegin, [6, 7], CancelBatchException, [[1, 2, 3], [4, 5]]),
        (LossBegin, [6, 7], CancelBatchException, [[1, 2, 3], [4, 5]]),
        (BackwardEnd, [7], CancelBatchException, [[1, 2, 3], [4, 5, 6]]),
        (BatchEnd, [5], CancelEpochException, [[1, 2, 3], [4, 5]]),
        (BatchEnd, [6], CancelEpochException, [[1, 2, 3], [4, 5, 6]]),
        (LossBegin, [3], CancelEpochException, [[1, 2]]),
        (BackwardBegin, [2], CancelEpochException, []),
        (BatchBegin, [5], CancelFittingException, [[1, 2, 3], [4]]),
        (BatchEnd, [1], CancelFittingException, [[1]]),
        (BackwardEnd, [5], CancelFittingException, [[1, 2, 3]]),
        (BatchEnd, [2], CancelBatchException, [[1, 2, 3], [4, 5, 6], [7]]),
    ],
)
def test_a_cancelled_batch_and_its_group(
    event: type[Event], numbers: list[int], exception: type[Exception], groups: list[list[int]]
) -> None:
    """Rule 16: a cancel from `BackwardBegin` on discards the accumulation group; a group ends with its epoch."""
    torch.manual_seed(0)
    model = Net(dropout=0.0)
    learner = learner_of(model, callbacks=[Canceller(event, numbers, exception)], core=cpu(accumulate=3))
    learner.fit(1)
    assert_same(model, train_groups(groups, 3))
    learner.fit(1)
    assert_same(model, train_groups([*groups, [1, 2, 3], [4, 5, 6], [7]], 3))


def test_an_error_leaves_no_gradients_for_the_next_fit() -> None:
    torch.manual_seed(0)
    model = Net(dropout=0.0)
    learner = learner_of(model, callbacks=[Canceller(BatchEnd, [2], ValueError)], core=cpu(accumulate=3))
    with pytest.raises(ValueError, match="batch 2"):
        learner.fit(1)
    learner.fit(1)
    assert_same(model, train_groups([[1, 2, 3], [4, 5, 6], [7]], 3))


def test_single_steps_make_groups_too_and_an_epoch_begins_a_new_one() -> None:
    torch.manual_seed(0)
    model = Net(dropout=0.0)
    data = batches()
    learner = learner_of(model, data=(data, data[:1]), core=cpu(accumulate=2))
    learner.step(TrainingPhase, data[0])
    learner.validate()  # this leaves the gradients as they are
    learner.step(TrainingPhase, data[1])
    assert_same(model, train_groups([[1, 2]], 2))
    learner.step(TrainingPhase, data[2])
    learner.epoch(TrainingPhase, data[3:5])
    assert_same(model, train_groups([[1, 2], [4, 5]], 2))


# --- devices


# --- a core and its learner


def test_a_core_belongs_to_one_learner() -> None:
    core = cpu()
    learner_of(Net(), core=core)
    with pytest.raises(CoreError, match=r"^TorchCore\(.* belongs to another learner\. Give each learner a core of its"):
        learner_of(Net(), core=core)


def test_a_learner_that_is_refused_leaves_the_core_of_another_one_in_use() -> None:
    core = cpu()
    learner = learner_of(Net(), core=core)
    with pytest.raises(CoreError, match="belongs to another learner"):
        learner_of(Net(), core=core)
    with pytest.raises(CoreError, match="belongs to another learner"):
        learner_of(Net(), core=core)
    learner.fit(1)


def test_modes_are_those_of_the_phase_and_put_back() -> None:
    model, lossfn = Net(), Tempered()
    model[2].eval()
    seen: list[tuple[str, bool, bool, bool]] = []

    class Look(Callback):
        @on(EpochEnd)
        def look(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
            seen.append((repr(phase), model[2].training, lossfn.training, torch.is_grad_enabled()))

    learner = learner_of(model, lossfn, callbacks=[Look()], data=(batches(1), batches(1)))
    with torch.no_grad():
        learner.fit(1)
        assert not torch.is_grad_enabled()
    assert seen == [("TrainingPhase", False, True, True), ("ValidationPhase", False, False, False)]
    assert (model.training, model[2].training, lossfn.training) == (True, False, True)
    learner.add_callback(Canceller(BatchEnd, [1], ValueError))
    with pytest.raises(ValueError, match="batch 1"):
        learner.fit(1)
    assert (model.training, model[2].training, torch.is_grad_enabled()) == (True, False, True)
    assert learner.step(ValidationPhase, batches(1)[0]).loss.requires_grad is False


def test_the_cancelled_event_is_seen_with_the_gradients_gone() -> None:
    """Rule 16: the gradients are discarded before `BatchCancelled` is fired."""
    seen: list[list[str]] = []
    look = CustomCallback(
        lambda view: seen.append(list(view.batch.grads)), BatchCancelled, TrainingPhase, {"batch.grads": Read()}
    )
    learner = learner_of(Net(), callbacks=[Canceller(BackwardEnd, [1], CancelBatchException), look])
    learner.step(TrainingPhase, batches()[0])
    assert seen == [[]]


def test_one_optimizer_may_have_a_name() -> None:
    expected, lossfn = make(entropy)
    train_by_hand(expected, lossfn, epochs=1)
    model, _ = make(entropy)
    learner = learner_of(model, optimizer={"only": ADAMW(model.parameters())})
    learner.fit(1)
    assert_same(model, expected)


# --- settings


def test_what_means_something() -> None:
    settings = CoreSettings(accumulate=4, clip_grad_norm=1, lag=0, tf32=False)
    assert (settings.accumulate, settings.clip_grad_norm, settings.lag, settings.tf32) == (4, 1, 0, False)
    assert (CoreSettings().precision, CoreSettings().lag, CoreSettings().clip_grad_value) == ("fp32", None, None)
