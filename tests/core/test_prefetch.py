"""Prefetch: the next batch is copied to the device while this one is computed, and training does not change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flowtrain import (
    AbstractTrainingPhase,
    BatchBegin,
    BatchEnd,
    CancelBatchException,
    CancelEpochException,
    CoreError,
    EpochEnd,
    Learner,
    LearnerView,
    Read,
    StepContext,
    TorchCore,
    TrainingPhase,
    UpdateEnd,
    ValidationPhase,
)
from flowtrain.callbacks import CustomCallback
from flowtrain.core.devices import change_tensors
from flowtrain.core.prefetch import StreamTransfer, Transfer, ahead, counted, transfer_to
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.accelerator import DEVICE, needs_accelerator
from tests.support.untyped import untyped


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Sample:
    """A batch as a dataclass whose constructor would refuse the values after the transfer."""

    image: Tensor
    label: Any

    def __post_init__(self) -> None:
        assert self.image.sum() == 0


class Logged:
    """A transfer that copies, and logs when it does."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.begun = self.finished = 0

    def start(self, raw: Any) -> tuple[int, Any]:
        self.begun += 1
        self.log.append(f"start {self.begun}")
        return self.begun, change_tensors(raw, Tensor.clone, lambda item: item)

    def finish(self, moving: tuple[int, Any]) -> Any:
        self.finished += 1
        assert moving[0] == self.finished, "batches are given in their order"
        self.log.append(f"finish {moving[0]}")
        return moving[1]


def logged_learner(transfer: Logged, **options: Any) -> Learner:
    steps = CustomCallback(lambda view: transfer.log.append("step"), BatchBegin, TrainingPhase)
    core = TorchCore(device="cpu", prefetch=transfer, **options.pop("core", {}))
    return tiny_learner(steps, core=core, **options)


def test_the_next_batch_is_on_its_way_before_this_one_is_computed() -> None:
    transfer = Logged()
    logged_learner(transfer, data=tiny_batches(n_batches=3)).epoch(TrainingPhase)
    assert transfer.log == [
        "start 1", "start 2", "finish 1", "step", "start 3", "finish 2", "step", "finish 3", "step",
    ]  # fmt: skip


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_result_is_the_same_with_and_without(sized: bool, accumulate: int) -> None:
    batches = tiny_batches(n_batches=7)

    class Unsized:
        def __iter__(self) -> Iterator[Any]:
            return iter(batches)

    data: Any = batches if sized else Unsized()
    plain = tiny_learner(data=data, core=TorchCore(device="cpu", accumulate=accumulate))
    fed = logged_learner(Logged(), data=data, core={"accumulate": accumulate})
    for learner in (plain, fed):
        learner.fit(2)
    assert torch.equal(plain.model.coeff, fed.model.coeff)
    assert list(plain.cbstate.metrics_step[TrainingPhase]["Loss"]) == list(
        fed.cbstate.metrics_step[TrainingPhase]["Loss"]
    )
    assert plain.cbstate.history[TrainingPhase] == fed.cbstate.history[TrainingPhase]


def test_a_failing_loader_is_heard_of_after_the_batches_before_it() -> None:
    def loader() -> Iterator[Any]:
        yield from tiny_batches(n_batches=3)
        raise OSError("the disk is gone")

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            return loader()

    transfer = Logged()
    learner = logged_learner(transfer, data=Loader(), core={"accumulate": 2})
    with pytest.raises(OSError, match="the disk is gone") as raised:
        learner.fit(1)
    assert transfer.log.count("step") == 3
    assert learner.cbstate.history[TrainingPhase].steps == 3
    assert learner.cbstate.history[TrainingPhase].updates == 1, "the third batch was not the last of the epoch"
    assert any("after batch 3" in note for note in raised.value.__notes__), raised.value.__notes__


def test_an_interrupt_in_the_loader_does_not_wait() -> None:
    def loader() -> Iterator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(ahead(loader(), None, lambda last: None))


def test_who_looks_ahead_knows_the_last_one() -> None:
    told: list[bool] = []
    assert list(ahead(iter("abc"), None, told.append)) == ["a", "b", "c"]
    assert told == [False, False, True]
    told.clear()
    assert list(ahead([], None, told.append)) == []
    assert list(ahead(["only"], None, told.append)) == ["only"]
    assert told == [True]
    for said, expected in ((3, [False, False, True]), (2, [False, True, False]), (4, [False, False, False])):
        told.clear()
        assert list(counted("abc", said, told.append)) == ["a", "b", "c"]
        assert told == expected


def test_at_most_one_batch_more_is_in_memory() -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    class Token:
        pass

    class Tokens:
        def start(self, raw: int) -> Token:
            token = Token()
            alive.append(weakref.ref(token))
            return token

        def finish(self, moving: Token) -> Token:
            return moving

    for batch in ahead(range(8), Tokens(), lambda last: None):
        gc.collect()
        most = max(most, sum(each() is not None for each in alive))
        del batch
        gc.collect()
        # The prefetcher keeps no reference to the batches that it has returned.
        assert sum(each() is not None for each in alive) <= 1
    assert most == 2


def test_a_cancelled_epoch_lets_go_of_the_batch_ahead() -> None:
    alive: list[weakref.ref[Tensor]] = []

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            for inputs, targets in tiny_batches(n_batches=5):
                copied = inputs.clone()
                alive.append(weakref.ref(copied))
                yield copied, targets

    def cancel(view: Any) -> None:
        raise CancelEpochException("enough")

    core = TorchCore(device="cpu", prefetch=Untouched())
    learner = tiny_learner(CustomCallback(cancel, BatchEnd, TrainingPhase), data=Loader(), core=core)
    learner.fit(1)
    gc.collect()
    assert [each() is not None for each in alive] == [True, False], "the last batch stays, as without prefetch"


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("at", [2, 5, 6])
def test_an_endless_stream_loses_no_batch_when_its_epoch_is_cancelled(prefetch: bool, at: int) -> None:
    """The batch that was fetched ahead begins the next epoch, even if it was the first of a new pass over the data."""
    seen: list[float] = []

    class Stays:
        def start(self, raw: Any) -> Any:
            return raw

        def finish(self, moving: Any) -> Any:
            return moving

    def cancel(learner: LearnerView) -> None:
        seen.append(float(learner.batch.inputs[0]))
        if len(seen) == at:
            raise CancelEpochException("enough")

    learner = Learner(
        torch.nn.Linear(1, 1),
        torch.nn.functional.mse_loss,
        data=[(torch.full((1, 1), float(each)), torch.zeros(1, 1)) for each in range(5)],
        callbacks=[CustomCallback(cancel, UpdateEnd, TrainingPhase, access={"batch.inputs": Read()})],
        default_callbacks=False,
        core=TorchCore("cpu", prefetch=Stays() if prefetch else False),
    )
    learner.fit(steps=12, validate_every=3)
    assert seen == [each % 5 for each in range(len(seen))]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("looks", [False, True])
def test_the_outputs_of_a_batch_go_when_the_next_begins_unless_somebody_may_look(looks: bool, own: bool) -> None:
    """The next batch has as much free memory as in a loop by hand, unless a handler of `EpochEnd` reads the outputs."""
    seen: list[weakref.ref[Tensor]] = []
    alive: list[bool] = []
    last: list[Any] = []

    class Model(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name for it
            alive.extend(each() is not None for each in seen[-1:])
            outputs = super().forward(input)
            seen.append(weakref.ref(outputs))
            return outputs

    def skip_the_last(learner: LearnerView) -> None:
        if len(seen) == 4:
            raise CancelBatchException("not this one")

    def look(learner: LearnerView) -> None:
        last.append(learner.batch.outputs is seen[2]())

    class Own(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, x=raw[0]) as batch:
                batch.outputs = learner.model(batch.x)
                learner.backward(self, batch.outputs.mean())
                learner.update(self)

    phase: type[AbstractTrainingPhase] = Own if own else TrainingPhase
    callbacks = [CustomCallback(skip_the_last, UpdateEnd, phase)]
    if looks:
        callbacks.append(CustomCallback(look, EpochEnd, phase, access={"batch.outputs": Read()}))
    learner = Learner(
        Model(1, 1), torch.nn.functional.mse_loss, data={phase: tiny_batches(n_batches=4)}, callbacks=callbacks,
        core=TorchCore("cpu", prefetch=Logged()),
    )  # fmt: skip
    learner.epoch(phase)
    assert (alive, last) == ([looks] * 3, [True] if looks else [])


class Untouched:
    """A transfer that leaves batches unchanged."""

    def start(self, raw: Any) -> Any:
        return raw

    def finish(self, moving: Any) -> Any:
        return moving


class TransferContract:
    """Tests that every transfer passes. A subclass has a fixture ``transfer``."""

    BATCH = (torch.arange(6.0).reshape(2, 3), {"labels": [torch.tensor([1, 2]), "text", None]}, 7)

    def test_it_gives_the_batch_that_it_was_given(self, transfer: Transfer) -> None:
        assert isinstance(transfer, Transfer)
        x, rest, number = transfer.finish(transfer.start(self.BATCH))
        assert torch.equal(x.cpu(), self.BATCH[0])
        assert rest["labels"][0].tolist() == [1, 2]
        assert (rest["labels"][1:], number) == (["text", None], 7)

    def test_the_next_batch_is_under_way_before_one_has_arrived(self, transfer: Transfer) -> None:
        """Prefetch begins batch 2 before it takes batch 1."""
        first, second = transfer.start([torch.zeros(3)]), transfer.start([torch.ones(3)])
        assert [each.tolist() for each in transfer.finish(first)] == [[0, 0, 0]]
        assert [each.tolist() for each in transfer.finish(second)] == [[1, 1, 1]]

    def test_the_loader_keeps_its_batch_as_it_is(self, transfer: Transfer) -> None:
        raw = [torch.zeros(3), torch.ones(1)]
        transfer.finish(transfer.start(raw))
        assert [(each.device.type, each.tolist()) for each in raw] == [("cpu", [0, 0, 0]), ("cpu", [1])]


class TestLogged(TransferContract):
    """The transfer of these tests that copies."""

    @pytest.fixture
    def transfer(self) -> Transfer:
        return Logged()


class TestUntouched(TransferContract):
    """The transfer of these tests that does nothing."""

    @pytest.fixture
    def transfer(self) -> Transfer:
        return Untouched()


@needs_accelerator
class TestStreamTransfer(TransferContract):
    """The transfer of every accelerator with streams and pinned memory."""

    @pytest.fixture
    def transfer(self) -> Transfer:
        return StreamTransfer(torch.device(DEVICE), lambda tensor: tensor)


def test_what_came_ahead_is_not_moved_again() -> None:
    moved: list[Any] = []

    class Own:
        def to(self, device: torch.device) -> Own:
            moved.append(device)
            return self

    class OwnPhase(TrainingPhase):
        def split(self, raw: Any) -> tuple[Any, Any]:
            inputs, targets = raw[0]
            return inputs, targets

    data = [(pair, Own()) for pair in tiny_batches(n_batches=3)]
    learner = tiny_learner(data={OwnPhase: data}, core=TorchCore(device="cpu", prefetch=Untouched()))
    learner.epoch(OwnPhase)
    assert not moved
    learner.step(OwnPhase, data[0])
    assert len(moved) == 1, "a single step has no prefetched batch"


def test_a_step_of_ones_own_gets_batches_ahead_too() -> None:
    class Own(TrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
                loss = learner.lossfn(learner.model(batch.inputs), batch.targets)
                learner.backward(self, loss)
                learner.update(self)

    transfer = Logged()
    learner = tiny_learner(data={Own: tiny_batches(n_batches=3)}, core=TorchCore(device="cpu", prefetch=transfer))
    learner.epoch(Own)
    assert transfer.log == ["start 1", "start 2", "finish 1", "start 3", "finish 2", "finish 3"]


def test_dataclasses_keep_their_type_and_are_not_constructed_anew() -> None:
    raw = {"a": [Sample(torch.zeros(2), Pair(torch.zeros(1), "cat"))]}
    changed = change_tensors(raw, lambda tensor: tensor + 1, lambda item: item)
    [sample] = changed["a"]
    assert type(sample) is Sample
    assert sample.image.tolist() == [1, 1]
    assert type(sample.label) is Pair
    assert (sample.label.left.item(), sample.label.right) == (1, "cat")
    assert raw["a"][0].image.tolist() == [0, 0]


@pytest.mark.cpu_only("the CPU has neither lag nor prefetch")
def test_the_cpu_needs_none() -> None:
    assert transfer_to(torch.device("cpu")) is None
    batches = tiny_batches()
    core = TorchCore(device="cpu")
    tiny_learner(core=core)
    assert core.feed(batches, len(batches)) is batches
    assert not core.places
    assert isinstance(Logged(), Transfer)


def test_validation_and_workers() -> None:
    dataset = torch.utils.data.TensorDataset(torch.randn(12, 1), torch.randn(12, 1))
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    learner = tiny_learner(data=(loader, loader), core=TorchCore(device="cpu", prefetch=Untouched()))
    learner.fit(2)
    assert learner.cbstate.history[ValidationPhase].steps == 6


# --- on an accelerator


@needs_accelerator
def test_an_accelerator_gives_the_same_batches() -> None:
    device = torch.device(DEVICE)
    busy = torch.ones(100, 100, device=device)
    transfer = transfer_to(device)
    assert isinstance(transfer, StreamTransfer)
    raw = [(torch.randn(1000, 100), {"labels": Sample(torch.zeros(3), Pair(torch.ones(2), 7))}) for _ in range(20)]
    for (x, rest), (expected, _) in zip(ahead(raw, transfer, lambda last: None), raw, strict=True):
        assert x.device.type == rest["labels"].image.device.type == rest["labels"].label.left.device.type == DEVICE
        busy = busy @ busy / 100
        assert torch.equal(x.cpu(), expected)


@needs_accelerator
@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_accelerator_trains_the_same_with_and_without(accumulate: int) -> None:
    updates: list[int] = []
    losses: list[list[Any]] = []
    for prefetch in (True, False):
        seen = CustomCallback(lambda view: updates.append(1), UpdateEnd, TrainingPhase)
        core = TorchCore(DEVICE, accumulate=accumulate, prefetch=prefetch)
        learner = tiny_learner(seen, data=tiny_batches(n_batches=7), core=core)
        learner.fit(2)
        losses.append(list(learner.cbstate.metrics_step[TrainingPhase]["Loss"]))
    assert losses[0] == losses[1]
    assert len(updates) == 2 * 2 * -(-7 // accumulate)


# --- placement: the memory format of a batch, and the lag of a device


def learner_of(core: TorchCore) -> Learner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    data = [(torch.randn(5, 3, 8, 8), torch.randint(2, (5,))) for _ in range(3)]
    return Learner(model, cross_entropy, data=data, core=core, default_callbacks="quiet")


def test_channels_last_reaches_model_and_data_and_changes_no_value() -> None:
    last, plain = learner_of(TorchCore("cpu", channels_last=True)), learner_of(TorchCore("cpu"))
    for learner in (last, plain):
        learner.fit(1)
    assert last.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert last.batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert last.batch.targets.dim() == 1
    assert not plain.batch.inputs.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.model[0].weight, plain.model[0].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.cpu_only("the CPU has neither lag nor prefetch")
@pytest.mark.parametrize(("options", "lag"), [({}, 0), ({"lag": 3}, 3), ({"lag": 0}, 0)])
def test_the_lag_of_the_cpu(options: dict[str, int], lag: int) -> None:
    learner = learner_of(TorchCore("cpu", **untyped(options)))
    assert learner.state.lag == lag


def test_a_copy_of_a_core_keeps_what_it_was_told() -> None:
    core = TorchCore("cpu", "bf16", 2, 1.0, True, clip_grad_value=0.5, lag=1, channels_last=True, prefetch=False)
    assert vars(core.like().settings) == {**vars(core.settings), "compile": False, "parallel": None}


@pytest.mark.cpu_only("with prefetch the last batch is known, whatever the loader announces")
def test_a_loader_of_another_length_than_it_says_loses_no_gradient() -> None:
    """Rule 16: the last group gets its update after the last batch, however many batches the loader has announced."""

    class Lies(list[Any]):
        def __len__(self) -> int:
            return 5

    made = torch.Generator().manual_seed(1)
    batches = [(torch.randn(2, 3, 8, 8, generator=made), torch.tensor([0, 1])) for _ in range(7)]
    for given in (3, 4, 5, 6, 7):
        lying, true = (learner_of(TorchCore("cpu", accumulate=4)) for _ in range(2))
        lying.epoch(TrainingPhase, Lies(batches[:given]))
        true.epoch(TrainingPhase, batches[:5])
        true.epoch(TrainingPhase, batches[5:given]) if given > 5 else None
        if given < 5:
            true = learner_of(TorchCore("cpu", accumulate=4))
            true.epoch(TrainingPhase, batches[:given])
        assert all(map(torch.equal, lying.model.state_dict().values(), true.model.state_dict().values())), given


def test_tf32_is_for_cuda() -> None:
    before = torch.get_float32_matmul_precision()
    learner_of(TorchCore("cpu", tf32=True))
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(CoreError, match="tf32 is True, False or None; got 'high'"):
        TorchCore(tf32=untyped("high"))


class Batch(list[Any]):
    """A batch that a weak reference can refer to."""


class NeverPlaces(AbstractTrainingPhase):
    """A phase whose step does not move its batch to the device, so that only the epoch can drop the batch."""

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self):
            pass


def test_a_fed_batch_is_forgotten_when_the_epoch_ends() -> None:
    alive: list[weakref.ref[Batch]] = []

    class Ahead:
        def start(self, raw: object) -> object:
            return raw

        def finish(self, moving: tuple[torch.Tensor, torch.Tensor]) -> Batch:
            batch = Batch(moving)
            alive.append(weakref.ref(batch))
            return batch

    learner = learner_of(TorchCore("cpu", prefetch=Ahead()))
    learner.epoch(NeverPlaces, learner.data[TrainingPhase][:2])
    assert len(alive) == 2
    assert [each() for each in alive] == [None, None]
