"""SWA: compared with torch's AveragedModel and update_bn; validation, checkpoints and what training does not notice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_swa_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from flowtrain import (
    AbstractTrainingPhase,
    BatchBegin,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelFittingException,
    EpochEnd,
    Event,
    Executor,
    FitBegin,
    Learner,
    LearnerView,
    Phase,
    Read,
    ResolutionError,
    TorchCore,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    UsageError,
    ValidationPhase,
    on,
    seed_everything,
)
from flowtrain.callback.phases import StepContext
from flowtrain.callbacks import EMA, SWA, Checkpointer, CustomCallback, LearningRate, Scheduler, per_epoch, swa_lr
from flowtrain.testing import TinyModel, assert_equivalent, record_access, tiny_batches, tiny_learner
from tests.support.untyped import untyped

SGD = partial(torch.optim.SGD, lr=0.01)


def make_model() -> nn.Sequential:
    """Return a model with BatchNorm that is trained, one in eval mode, and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(1, 4), nn.Dropout(0.3), nn.BatchNorm1d(4), nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)
        )
    model[4].eval()
    return model


def loader(**options: Any) -> DataLoader[Any]:
    x = torch.cat([x for x, _ in tiny_batches(n_batches=6)])
    chosen: dict[str, Any] = {"shuffle": True, **options}
    return DataLoader(TensorDataset(x, 3 * x), 8, **chosen)


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(one: Any, other: Any) -> None:
    assert sorted(one) == sorted(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def learner_of(swa: SWA, *callbacks: Callback, **options: Any) -> Learner:
    chosen: dict[str, Any] = {
        "model": make_model(),
        "optimizer": SGD,
        "data": (loader(), tiny_batches(n_batches=3)),
        **options,
    }
    return tiny_learner(swa, *callbacks, **chosen)


# --- the averages


def by_hand(numbers: list[int], batches: int, accumulate: int = 1) -> tuple[nn.Module, nn.Module]:
    """Train and average with torch alone, after the updates of these numbers; return the model and the average."""
    model = make_model()
    optimizer, averaged = SGD(model.parameters()), AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    done = 0
    for number, (x, y) in enumerate(tiny_batches(n_batches=batches) * 4, start=1):
        (nn.functional.mse_loss(model(x), y) / accumulate).backward()
        if number % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done in numbers:
                averaged.update_parameters(model)
    return model, averaged.module


@pytest.mark.parametrize(
    ("arguments", "accumulate", "numbers"),
    [
        ({"start_epoch": 2}, 1, [12, 18, 24]),
        ({"start_epoch": 2}, 3, [4, 6, 8]),
        ({"start_epoch": 1, "every": 2}, 1, [6, 18]),
        ({"start_update": 5, "every": 7}, 1, [5, 12, 19]),
        ({"start_update": 3, "every": 2}, 3, [3, 5, 7]),
    ],
)
def test_it_is_torchs_averaged_model_to_the_bit(arguments: dict[str, Any], accumulate: int, numbers: list[int]) -> None:
    swa = SWA(**arguments)
    core = TorchCore(device="cpu", accumulate=accumulate)
    seed_everything(1)
    learner = learner_of(swa, data=tiny_batches(n_batches=6), core=core)
    learner.fit(4)
    seed_everything(1)
    model, averaged = by_hand(numbers, 6, accumulate)
    assert swa.taken == len(numbers)
    assert_same(swa.averages, dict(averaged.named_parameters()))
    assert_same(values_of(learner.model), values_of(model))  # training is as without it


# --- the statistics of BatchNorm


def test_statistics_are_those_of_update_bn() -> None:
    """At the end of the fit, in the modes of training; the layer in eval mode keeps its statistics."""
    batches = tiny_batches(n_batches=6)
    swa = SWA(2)
    seed_everything(1)
    learner = learner_of(swa, data=batches)
    learner.fit(3)
    trained, drawn = values_of(learner.model), torch.get_rng_state()
    with swa.applied():
        shown = values_of(learner.model)
    assert_same(values_of(learner.model), trained)
    other = make_model()
    other.load_state_dict(trained)
    for name, average in swa.averages.items():
        other.get_parameter(name).data.copy_(average)
    other[4] = nn.Identity()  # `update_bn` would renew it; the statistics of the other layer do not depend on it
    with torch.random.fork_rng():
        torch.set_rng_state(drawn)
        update_bn([x for x, _ in batches], other)
    for name, value in other[2].state_dict().items():
        assert torch.equal(shown[f"2.{name}"], value), name
    assert shown["2.num_batches_tracked"].item() == 6
    assert not torch.equal(shown["2.running_var"], trained["2.running_var"])
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(shown[f"4.{key}"], trained[f"4.{key}"])


def test_validation_uses_averages_with_their_own_statistics() -> None:
    """The loss that is recorded is that of the averaged model with statistics of `update_bn`."""
    batches = tiny_batches(n_batches=6)
    model = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    swa = SWA(1)
    learner = learner_of(swa, model=model, data=(batches, batches))
    learner.fit(3)
    with swa.applied():
        other = copy.deepcopy(model).cpu()
    update_bn([x for x, _ in batches], other)
    other.eval()
    with torch.no_grad():
        losses = [nn.functional.mse_loss(other(x), y).item() for x, y in batches]
    assert learner.cbstate.metrics_epoch[ValidationPhase]["Loss"].last()[1] == pytest.approx(sum(losses) / 6, rel=1e-5)


class Augmented(torch.utils.data.Dataset[Any]):
    """Samples with noise, from all generators of the process."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        x = torch.rand(1) + index / 40
        return x, 3 * x


@pytest.mark.parametrize("executor", ["serial", "dask"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_does_not_notice_the_passes_over_its_data(workers: int, executor: str) -> None:
    """Rule 13: shuffling, dropout, augmentation and the loader's own generator are as without SWA."""
    results: list[Any] = []
    for callbacks in ([], [SWA(1)]):
        seed_everything(3)
        generator = torch.Generator().manual_seed(4)
        data = DataLoader(
            Augmented(),
            8,
            shuffle=True,
            generator=generator,
            num_workers=workers,
            multiprocessing_context=context(workers),
        )
        with tiny_learner(
            *callbacks,
            model=make_model(),
            optimizer=SGD,
            data=(data, tiny_batches(n_batches=2)),
            executor=executor,
        ) as learner:
            learner.fit(3)
        losses = list(learner.cbstate.metrics_step[TrainingPhase]["Loss"])
        results.append((losses, torch.rand(2).tolist(), generator.get_state().tolist(), data_of(learner)))
    assert results[0] == results[1]


def context(workers: int) -> str | None:
    return "forkserver" if workers else None


def data_of(learner: Learner) -> dict[str, Any]:
    return {name: value.tolist() for name, value in learner.model.state_dict().items()}


class Counted(Callback):
    """Counts the forward passes of the model, by its mode."""

    def __init__(self) -> None:
        self.passes = [0, 0]

    @on(FitBegin, access={"model": Read()})
    def hook(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        learner.model.register_forward_pre_hook(self.count)

    def count(self, module: nn.Module, inputs: Any) -> None:
        self.passes[module.training] += 1


@pytest.mark.parametrize(
    ("swa", "expected"),
    [
        (SWA(3), [4 * 2, 4 * 6 + 2 * 6]),  # two validations with averages, each after a new one
        (SWA(1, every=3), [4 * 2, 4 * 6 + 2 * 6]),  # the averages of one epoch are validated three times
        (SWA(3, batches=4), [4 * 2, 4 * 6 + 2 * 4]),
        (SWA(9), [4 * 2, 4 * 6]),
    ],
    ids=["each", "every", "some batches", "never"],
)
def test_how_many_passes_there_are(swa: SWA, expected: list[int]) -> None:
    counted = Counted()
    learner_of(swa, counted, data=(tiny_batches(n_batches=6), tiny_batches(n_batches=2))).fit(4)
    assert counted.passes == expected


def test_a_model_without_batch_norm_needs_no_pass() -> None:
    counted = Counted()
    tiny_learner(SWA(1), counted, n_batches=5).fit(2)
    assert counted.passes == [10, 10]


@pytest.mark.parametrize(
    ("error", "passes"),
    [(None, 3 * 3 + 3), (CancelFittingException("enough"), 5), (ValueError("no"), 5)],
    ids=["complete", "cancelled", "failed"],
)
def test_a_fit_that_is_broken_off_needs_no_pass(error: BaseException | None, passes: int) -> None:
    class Stops(Callback):
        @on(UpdateBegin, TrainingPhase, access={"cbstate.history": Read()})
        def stop(self, event: UpdateBegin, phase: TrainingPhase, learner: LearnerView) -> None:
            if error is not None and learner.cbstate.history[phase].steps == 4:
                raise error

    counted = Counted()
    learner = learner_of(SWA(1), counted, Stops(), data=tiny_batches(n_batches=3))
    with pytest.raises(ValueError, match="no") if isinstance(error, ValueError) else nullcontext():
        learner.fit(3)
    assert counted.passes == [0, passes]


def test_data_of_its_own() -> None:
    """`data` gives the inputs, as `update_bn` takes them; its generator is put back."""
    other = [x for x, _ in tiny_batches(n_batches=2)]
    tracked: list[int] = []
    generator = torch.Generator().manual_seed(1)
    shuffled = DataLoader(TensorDataset(torch.cat(other)), 8, shuffle=True, generator=generator)
    before = generator.get_state()
    for data in (other, shuffled):
        swa = SWA(1, data=data)
        learner = learner_of(swa)
        learner.fit(2)
        with swa.applied():
            tracked.append(int(learner.model[2].num_batches_tracked))
    assert tracked == [2, 2]
    assert torch.equal(generator.get_state(), before)


class Sums(nn.Module):
    """A model of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.norm(one + two)
        return outputs


class TwoInputs(TrainingPhase):
    """A phase whose model has several inputs."""

    unpack = True


def test_the_model_is_called_as_its_phase_calls_it() -> None:
    batches = [(x, x + 1, y) for x, y in tiny_batches(n_batches=3)]
    swa = SWA(1)
    learner = learner_of(swa, model=Sums(), data={TwoInputs: batches})
    learner.fit(1)
    expected = torch.cat([one + two for one, two, _ in batches]).mean()
    with swa.applied():
        assert learner.model.norm.running_mean.item() == pytest.approx(expected.item(), rel=1e-5)


# --- validation and checkpoints


def test_validation_uses_the_averages_from_the_first_on() -> None:
    seen: list[float] = []

    class Seen(Callback):
        @on(BatchEnd, ValidationPhase, access={"model": Read()})
        def look(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            seen.append(learner.model.coeff.item())

    weights: list[float] = []

    class Weights(Callback):
        @on(EpochEnd, TrainingPhase, access={"model": Read()})
        def look(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
            weights.append(learner.model.coeff.item())

    swa = SWA(2)
    learner = tiny_learner(swa, Seen(), Weights(), data=(tiny_batches(n_batches=2), tiny_batches(n_batches=1)))
    learner.fit(4)
    assert seen == pytest.approx([weights[0], weights[1], sum(weights[1:3]) / 2, sum(weights[1:]) / 3])
    assert learner.model.coeff.item() == weights[-1]
    assert swa.averages["coeff"].item() == pytest.approx(sum(weights[1:]) / 3)


class Ask(Callback):
    """Asks for a checkpoint at one event of one phase, at its `number`-th occurrence."""

    def __init__(self, path: Path, event: type[Event], phase: type[Phase], number: int) -> None:
        self.path, self.event, self.phase, self.number, self.seen = path, event, phase, number, 0

    def ask(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if isinstance(event, self.event) and isinstance(phase, self.phase):
            self.seen += 1
            if self.seen == self.number:
                learner.request_checkpoint(self.path)

    @on(BatchEnd)
    def batch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.ask(event, phase, learner)

    @on(EpochEnd)
    def epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        self.ask(event, phase, learner)


@pytest.mark.parametrize("arguments", [{"start_epoch": 2}, {"start_update": 8, "every": 3}], ids=str)
@pytest.mark.parametrize(
    ("event", "phase", "number"),
    [
        (BatchEnd, TrainingPhase, 10),
        (BatchEnd, TrainingPhase, 16),
        (EpochEnd, TrainingPhase, 2),
        (BatchEnd, ValidationPhase, 5),
        (EpochEnd, ValidationPhase, 2),
        (EpochEnd, ValidationPhase, 3),
    ],
)
def test_a_resumed_run_is_the_run(
    arguments: dict[str, Any], event: type[Event], phase: type[Phase], number: int, tmp_path: Path
) -> None:
    """Rule 28: weights, averages, statistics and validation losses, wherever the checkpoint was taken."""
    rate = {LearningRate: per_epoch(swa_lr(0.1, 0.05, start=1, length=2))}

    def run(*callbacks: Callback, **resume: Any) -> Any:
        seed_everything(11 if not resume else 12)
        swa = SWA(**arguments)
        learner = learner_of(swa, Scheduler(rate), *callbacks)
        learner.fit(4, **resume)
        with swa.applied():
            shown = data_of(learner)
        losses = list(learner.cbstate.metrics_epoch[ValidationPhase]["Loss"])
        return shown, data_of(learner), losses, swa.taken, torch.rand(1).item()

    whole = run(Ask(tmp_path / "one.ckpt", event, phase, number))
    assert run(resume=tmp_path / "one.ckpt") == whole


def test_a_checkpoint_holds_what_was_judged(tmp_path: Path) -> None:
    batches = tiny_batches(n_batches=3)
    swa = SWA(1)
    learner = learner_of(swa, Checkpointer(tmp_path), data=(loader(), batches))
    learner.fit(3)
    contents = torch.load(tmp_path / "epoch-0003.ckpt", weights_only=True)
    assert_same(contents["trained"][""], values_of(learner.model))
    model = make_model().eval()
    model.load_state_dict(contents["model"][""])
    with torch.no_grad():
        losses = [nn.functional.mse_loss(model(x), y).item() for x, y in batches]
    assert sum(losses) / 3 == pytest.approx(learner.cbstate.metrics_epoch[ValidationPhase]["Loss"].last()[1], rel=1e-6)
    other = learner_of(SWA(1))
    other.load(tmp_path / "epoch-0003.ckpt")
    assert_same(values_of(other.model), contents["model"][""])
    other.validate()
    assert_same(values_of(other.model), contents["model"][""])
    with swa.applied():
        assert_same(values_of(learner.model), contents["model"][""])


def test_executors_agree() -> None:
    """Rule 13."""

    def make(executor: Executor) -> Learner:
        return learner_of(SWA(1), executor=executor, data=(tiny_batches(n_batches=2), tiny_batches(n_batches=2)))

    assert_equivalent(make, executors=["dask"], interleavings=4)


def test_declares_what_it_touches() -> None:
    learner = learner_of(SWA(1), strict=True)
    learner.fit(2)
    assert {".".join(path) for path, _ in record_access(SWA(1)).union} <= {
        "cbstate.history",
        "data",
        "model",
        "resource.rng",
    }


# --- bad input


class Own(AbstractTrainingPhase):
    """A phase with a step of its own."""

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
            batch.outputs = learner.model(batch.inputs)
            batch.loss = learner.lossfn(batch.outputs, batch.targets)
            learner.backward(self, batch.loss)
            learner.update(self)


class Stream(IterableDataset[Any]):
    """A stream of pairs."""

    def __iter__(self) -> Iterator[Any]:
        return iter(tiny_batches(n_batches=2))


ABOUT = "SWA renews the statistics of BatchNorm (2, 4) by a pass over the training data, and cannot: "


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {Own: tiny_batches()},
            "no training phase uses the bundled step, which would tell the inputs of the model. Pass the batches to "
            "use: SWA(..., data=loader).",
        ),
        (
            DataLoader(Stream(), batch_size=None),
            "an IterableDataset may lose the batches that are taken from it before training. Pass the batches to use: "
            "SWA(..., data=loader).",
        ),
    ],
    ids=["step", "stream"],
)
def test_data_that_cannot_be_read_beside_training(data: Any, message: str) -> None:
    learner = learner_of(SWA(1), data=data)
    with pytest.raises(UsageError) as caught:
        learner.fit(2)
    assert str(caught.value) == ABOUT + message
    fine = learner_of(SWA(1, data=tiny_batches()), data=data)
    fine.fit(2)
    assert fine.get_callback(SWA) is not None


def test_several_models_with_batch_norm() -> None:
    class Both(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
                batch.outputs = learner.model.one(batch.inputs) + learner.model.two(batch.inputs)
                batch.loss = learner.lossfn(batch.outputs, batch.targets)
                learner.backward(self, batch.loss)
                learner.update(self)

    def make(swa: SWA) -> Learner:
        models = {"one": make_model(), "two": TinyModel()}
        return learner_of(swa, model=models, optimizer={"one": SGD, "two": SGD}, data={Both: tiny_batches()})

    with pytest.raises(UsageError) as caught:
        make(SWA(1, data=tiny_batches())).fit(1)
    assert str(caught.value) == (
        "SWA renews the statistics of BatchNorm (one.2, one.4) by a pass over the training data, and cannot: the "
        "learner has several models. Name one: SWA(..., model='gen')."
    )
    swa = SWA(1, data=tiny_batches(n_batches=2), model="one")
    learner = make(swa)
    learner.fit(1)
    with swa.applied():
        assert int(learner.model.one[2].num_batches_tracked) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SWA(),
            "SWA(start_epoch=None, start_update=None): one of the two says from when on the weights are averaged. "
            "Write SWA(start_epoch=10).",
        ),
        (
            lambda: SWA(1, start_update=2),
            "SWA(start_epoch=1, start_update=2): one of the two says from when on the weights are averaged. Write "
            "SWA(start_epoch=10).",
        ),
        (lambda: SWA(0), "SWA(): start_epoch is a whole number, at least 1, got 0."),
        (lambda: SWA(untyped(0.8)), "SWA(): start_epoch is a whole number, at least 1, got 0.8."),
        (lambda: SWA(start_update=True), "SWA(): start_update is a whole number, at least 1, got True."),
        (lambda: SWA(1, every=0), "SWA(): every is a whole number, at least 1, got 0."),
        (lambda: SWA(1, batches=0), "SWA(): batches is a whole number, at least 1, got 0."),
        (
            lambda: SWA(1, model="a.b"),
            "SWA(model='a.b'): model is the name of one of several models, as in {'gen': ...}.",
        ),
        (
            lambda: SWA(1, data=untyped(5)),
            "SWA(data=5): data is a loader or a list of batches, which is read once for each average. Write "
            "data=DataLoader(dataset, batch_size=256).",
        ),
        (
            lambda: SWA(5).applied().__enter__(),
            "SWA has no averages yet: it begins with start_epoch or start_update, so fit for longer, or begin earlier.",
        ),
    ],
)
def test_arguments_that_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("other", [SWA(2), EMA()], ids=repr)
def test_one_model_has_one_average(other: Callback) -> None:
    """Each would take the averages of the other for trained weights, in whatever order they run."""
    with pytest.raises(ResolutionError, match=r"SWA and (SWA#2|EMA) cannot be used together: .* Remove one\."):
        tiny_learner(SWA(1), other)


def test_a_state_of_another_model() -> None:
    swa, other = SWA(1), SWA(1)
    tiny_learner(swa)
    learner = learner_of(other)
    learner.fit(1)
    with pytest.raises(UsageError) as caught:
        swa.load_state_dict(other.state_dict())
    assert str(caught.value) == (
        "The state of SWA has nothing for 'coeff', of shape (). Load a state of the same model."
    )
    assert (swa.averages, swa.taken) == ({}, 0)


@pytest.mark.parametrize(("arguments", "taken"), [({"start_epoch": 4}, 2), ({"start_update": 13}, 8)], ids=str)
def test_a_callback_that_is_added_late_counts_the_life_of_the_learner(
    arguments: dict[str, Any], taken: int, tmp_path: Path
) -> None:
    """The usual use: a run is resumed, or continued, and its last epochs are averaged."""
    first = SWA(**arguments)
    whole = tiny_learner(first, optimizer=SGD, n_batches=4)
    whole.fit(5)
    assert first.taken == taken
    added = SWA(**arguments)
    learner = tiny_learner(optimizer=SGD, n_batches=4)
    learner.fit(3)
    learner.add_callback(added)
    learner.fit(2)
    tiny_learner(Checkpointer(tmp_path), optimizer=SGD, n_batches=4).fit(3)
    resumed = SWA(**arguments)
    tiny_learner(Checkpointer(tmp_path), resumed, optimizer=SGD, n_batches=4).fit(5, resume=tmp_path)
    for swa in (added, resumed):
        assert swa.taken == taken
        assert torch.equal(swa.averages["coeff"], first.averages["coeff"])


def test_a_state_with_counts_of_its_own_is_loaded() -> None:
    """Early checkpoints have the counts of the callback, which are those of the learner."""
    swa, other = SWA(start_epoch=2), SWA(start_epoch=2)
    tiny_learner(swa, n_batches=2).fit(3)
    tiny_learner(other, n_batches=2)
    other.load_state_dict({**swa.state_dict(), "counts": {"TrainingPhase": 3}})
    assert other.taken == 2
    assert torch.equal(other.averages["coeff"], swa.averages["coeff"])


def test_data_without_a_batch_cannot_renew_the_statistics() -> None:
    learner = learner_of(SWA(1, data=[]))
    before = values_of(learner.model)
    with pytest.raises(UsageError) as caught:
        learner.fit(1)
    assert str(caught.value) == (
        "SWA renews the statistics of BatchNorm (2, 4) by a pass over the training data, and cannot: it gives no "
        "batch. Pass the batches to use: SWA(..., data=loader)."
    )
    assert learner.model[2].num_batches_tracked == before["2.num_batches_tracked"] + 6, "those of training are back"


def test_an_update_after_the_last_batch_counts() -> None:
    """The last batch, which would make the update, is cancelled, so the update follows it (rule 16)."""

    class Skips(Callback):
        def __init__(self) -> None:
            self.in_batch: list[bool] = []

        @on(BatchBegin, access={"cbstate.history": Read()})
        def skip(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
            if learner.cbstate.history[phase].steps == 5:
                raise CancelBatchException

        @on(UpdateEnd, access={})
        def look(self, event: UpdateEnd, phase: Phase, learner: LearnerView) -> None:
            self.in_batch.append(event.in_batch)

    skips, swa = Skips(), SWA(start_update=2)
    core = TorchCore(device="cpu", accumulate=4)
    tiny_learner(skips, swa, data=tiny_batches(n_batches=6), core=core).fit(1)
    assert (swa.taken, skips.in_batch) == (1, [True, False])


@pytest.mark.parametrize("arguments", [{"start_epoch": 1}, {"start_update": 3}], ids=str)
def test_a_run_resumed_at_its_end_has_the_statistics(arguments: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is left to train, and only the end of the fit renews the statistics, as there is no validation."""

    def shown(**resume: Any) -> dict[str, Any]:
        swa = SWA(**arguments)
        learner = learner_of(swa, Checkpointer(tmp_path), data=tiny_batches(n_batches=3))
        learner.fit(2, **resume)
        with swa.applied():
            return data_of(learner)

    seed_everything(1)
    whole = shown()
    assert whole["2.num_batches_tracked"] == 3
    seed_everything(2)
    assert shown(resume=tmp_path / "epoch-0002.ckpt") == whole


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize(
    ("event", "kind", "passes"), [(EpochEnd, TrainingPhase, [0, 3]), (EpochEnd, ValidationPhase, [2, 6])]
)
def test_an_error_at_the_end_of_an_epoch_breaks_the_fit_off(
    event: type[Event], kind: type[Phase], passes: list[int], error: BaseException
) -> None:
    """The training epoch was complete, and yet no pass over the data delays the error."""

    def fail(learner: LearnerView) -> None:
        raise error

    counted = Counted()
    fails = CustomCallback(fail, event, kind, access={})
    learner = learner_of(SWA(1), fails, counted, data=(tiny_batches(n_batches=3), tiny_batches(n_batches=2)))
    with pytest.raises(type(error)):
        learner.fit(3)
    assert counted.passes == passes


def test_a_cancel_between_two_epochs_is_an_end_as_any_other() -> None:
    """Early stopping without validation: the averages are used afterwards, so they need their statistics."""

    def stop(learner: LearnerView) -> None:
        raise CancelFittingException("enough")

    counted, swa = Counted(), SWA(1)
    learner = learner_of(swa, CustomCallback(stop, EpochEnd, TrainingPhase, access={}), counted, data=tiny_batches())
    learner.fit(3)
    with swa.applied():
        assert int(learner.model[2].num_batches_tracked) == len(tiny_batches())
    assert counted.passes == [0, 2 * len(tiny_batches())]
