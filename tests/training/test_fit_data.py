"""Data: the loaders that a learner accepts, the errors for all others, and fits with limited numbers of batches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    BatchEnd,
    Callback,
    CheckpointError,
    DataError,
    EpochBegin,
    FitBegin,
    Learner,
    LearnerView,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    on,
)
from flowtrain.callbacks import Checkpointer, LearningRate, SanityCheck, Scheduler, one_cycle
from flowtrain.data.loaders import LimitedLoader, length
from flowtrain.state.by_phase import PhaseMap
from flowtrain.testing import tiny_batches, tiny_learner
from flowtrain.training.fit_data import (
    has_workers,
    loader_parts,
    loaders_by_phase,
    planned_updates,
    set_epoch,
    unlimited,
)
from tests.support.examples import examples
from tests.support.fired import OODPhase
from tests.support.phases import OtherTraining
from tests.support.untyped import untyped

Pairs = list[tuple[Tensor, Tensor]]
X, Y = torch.zeros(6, 1), torch.ones(6, 1)
HOW = "Pass data=(train_loader, valid_loader), or data={TrainingPhase: a, ValidationPhase: b}."


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """A dataset of single samples."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index >= len(self):
            raise IndexError(index)
        return X[index], Y[index]


class Endless(IterableDataset[tuple[Tensor, Tensor]]):
    """A dataset without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(list(zip(X, Y, strict=True)))


class OldStyle:
    """An object that can be iterated only by index."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return tiny_batches(n_batches=2)[index]


def learner_on(data: Any) -> Learner:
    return tiny_learner(data=data, default_callbacks=False)


# --- accepted data


@pytest.mark.parametrize(
    ("data", "phases"),
    [
        (None, []),
        ({}, []),
        (tiny_batches(), ["TrainingPhase"]),
        ((tiny_batches(),), ["TrainingPhase"]),
        ((tiny_batches(), tiny_batches()), ["TrainingPhase", "ValidationPhase"]),
        ({OODPhase: tiny_batches(), TrainingPhase(): tiny_batches()}, ["OODPhase", "TrainingPhase"]),
    ],
)
def test_loaders_by_phase(data: Any, phases: list[str]) -> None:
    assert [repr(phase) for phase in loaders_by_phase(data)] == phases


def test_a_phase_and_its_type_are_one_key() -> None:
    train = tiny_batches()
    found: Any = loaders_by_phase((train, OldStyle()))
    assert found[TrainingPhase] is found[TrainingPhase()] is train
    assert OODPhase not in found


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(Samples(), batch_size=2),
        DataLoader(Endless(), batch_size=4),
        OldStyle(),
        [[X, Y], (X, Y)],
        (pair for pair in tiny_batches(n_batches=2)),
    ],
    ids=["DataLoader", "DataLoader without length", "by index", "lists and tuples", "generator"],
)
def test_anything_that_gives_pairs_is_trained_on(data: Any) -> None:
    learner = learner_on(data)
    learner.fit(1)
    assert learner.loop.scopes.batch_number in (2, 3)


class Pair(NamedTuple):
    inputs: Tensor
    targets: Tensor


def test_a_named_pair_is_a_pair() -> None:
    learner_on([Pair(X, Y)]).fit(1)


# --- data that is refused when the learner is built


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (
            (X, Y),
            "data is tuple of 2: Tensor of shape (6, 1), float32, Tensor of shape (6, 1), float32: tensors, not "
            "loaders. Make batches of them: DataLoader(TensorDataset(inputs, targets), batch_size=32), and pass "
            "data=(train_loader, valid_loader), or data={TrainingPhase: a, ValidationPhase: b}.",
        ),
        (
            (X.numpy(), Y.numpy()),
            "data is tuple of 2: ndarray of shape (6, 1), float32, ndarray of shape (6, 1), float32: arrays, not "
            "loaders. Make batches of them: DataLoader(TensorDataset(torch.as_tensor(inputs), "
            "torch.as_tensor(targets)), batch_size=32), and pass "
            "data=(train_loader, valid_loader), or data={TrainingPhase: a, ValidationPhase: b}.",
        ),
        (
            X,
            "The data for TrainingPhase is Tensor of shape (6, 1), float32, not a loader of batches. Make batches of "
            "it: DataLoader(TensorDataset(inputs, targets), batch_size=32), and pass data=(train_loader, "
            "valid_loader), or data={TrainingPhase: a, ValidationPhase: b}.",
        ),
        (
            (tiny_batches(), X.numpy()),
            "The data for ValidationPhase is ndarray of shape (6, 1), float32, not a loader of batches. Make batches "
            "of it: DataLoader(TensorDataset(torch.as_tensor(inputs), torch.as_tensor(targets)), batch_size=32), and "
            "pass data=(train_loader, valid_loader), or data={TrainingPhase: a, ValidationPhase: b}.",
        ),
        (
            [DataLoader(Samples()), DataLoader(Endless())],
            "The data for TrainingPhase is a list of 2 loaders, and each of them would be taken for a batch. For "
            "training and validation pass a tuple: data=(train, valid). For a batch of each in every step pass "
            "CombinedLoader(...) of flowtrain.data.",
        ),
        *(
            (
                (DataLoader(Samples()), several),
                f"The data for ValidationPhase is a {kind} of 2 loaders, and each of them would be taken for a batch. "
                f"Give each of them a phase of its own: class OtherPhase(ValidationPhase): ..., and "
                f"data={{TrainingPhase: train, ValidationPhase: valid, OtherPhase: other}}. For a batch of each in "
                f"every step pass CombinedLoader(...) of flowtrain.data.",
            )
            for kind, several in (
                ("list", [DataLoader(Samples()), DataLoader(Endless())]),
                ("tuple", (DataLoader(Samples()), DataLoader(Samples()))),
                ("dict", {"one": DataLoader(Samples()), "other": DataLoader(Samples())}),
            )
        ),
        ((), f"data is a tuple of 0 loaders. {HOW}"),
        ((1, 2, 3), f"data is a tuple of 3 loaders. {HOW}"),
        (
            TensorDataset(X, Y),
            "The data for TrainingPhase is a TensorDataset, a dataset of single samples. Make batches of it: "
            "DataLoader(dataset, batch_size=32).",
        ),
        (
            (tiny_batches(), Samples()),
            "The data for ValidationPhase is a Samples, a dataset of single samples. Make batches of it: "
            "DataLoader(dataset, batch_size=32).",
        ),
        (
            (tiny_batches(), None),
            f"The data for ValidationPhase is NoneType None, not a loader of batches. {HOW}",
        ),
        ("mnist", f"The data for TrainingPhase is str 'mnist', not a loader of batches. {HOW}"),
        (7, f"The data for TrainingPhase is int 7, not a loader of batches. {HOW}"),
        (
            [],
            "The loader for TrainingPhase (list) gives no batch. Is the dataset empty, or smaller than one batch with "
            "drop_last=True?",
        ),
        (
            (tiny_batches(), DataLoader(Samples(), batch_size=32, drop_last=True)),
            "The loader for ValidationPhase (DataLoader) gives no batch. Is the dataset empty, or smaller than one "
            "batch with drop_last=True?",
        ),
        ({"train": tiny_batches()}, f"data has the key 'train', which is no phase. {HOW}"),
        (
            {Phase: tiny_batches()},
            "data has the key Phase, which is abstract. Use a subclass of it.",
        ),
        (
            {AbstractTrainingPhase: tiny_batches()},
            "data has the key AbstractTrainingPhase, which is abstract. Use a subclass of it.",
        ),
    ],
)
def test_data_that_is_refused_at_once(data: Any, text: str) -> None:
    with pytest.raises(DataError) as raised:
        learner_on(data)
    assert str(raised.value) == text
    with pytest.raises(DataError) as again:
        tiny_learner(default_callbacks=False).fit(1, data=data)
    assert str(again.value) == text


def _named(name: str, module: str) -> type[Phase]:
    return type(name, (ValidationPhase,), {"__module__": module})


def test_two_phases_of_one_name() -> None:
    """Otherwise `fit` skips the second one, and logs, conditions and checkpoints mix the two."""
    batches = tiny_batches()
    for one, other in (("app.a", "app.b"), ("app", "app")):  # the second pair is a class that is defined again
        kinds = _named("TestPhase", one), _named("TestPhase", other)
        with pytest.raises(DataError) as raised:
            tiny_learner(data={TrainingPhase: batches, **dict.fromkeys(kinds, batches)})
        assert str(raised.value) == (
            f"data has two phases with the name TestPhase, {one}.TestPhase and {other}.TestPhase. Logs, checkpoints "
            f"and conditions know a phase by its name. Give one of them another name."
        )
    with pytest.raises(DataError) as raised:
        tiny_learner(data={TrainingPhase: batches, TrainingPhase(): batches})
    assert str(raised.value) == "data has the phase TrainingPhase twice: the type and its instance are the same key."


def test_data_for_a_direct_epoch_is_checked_alike() -> None:
    learner = learner_on(None)
    with pytest.raises(DataError, match=r"^The loader for OODPhase \(list\) gives no batch"):
        learner.epoch(OODPhase, [])
    with pytest.raises(DataError, match="The data for TrainingPhase is a TensorDataset"):
        learner.epoch(TrainingPhase, TensorDataset(X, Y))
    with pytest.raises(DataError, match="data has the key Phase, which is abstract"):
        learner.epoch(Phase, tiny_batches())


def test_a_fit_that_trains_nothing_says_so() -> None:
    """Such a fit is allowed; the warning points at the line that calls `fit`."""
    learner = learner_on({ValidationPhase: tiny_batches(n_batches=2), OODPhase: tiny_batches(n_batches=2)})
    with pytest.warns(UserWarning, match="nothing is trained") as caught:
        learner.fit(1)
    [warning] = caught
    assert str(warning.message) == (
        "fit() has no training phase in its data, only ValidationPhase, OODPhase: nothing is trained. Use validate(), "
        "or add the data to train on: data={TrainingPhase: loader, ...}."
    )
    assert warning.filename == __file__
    assert learner.loop.scopes.numbers == {ValidationPhase(): 1, OODPhase(): 1}
    learner.validate()  # as the message advises, without a warning
    learner.fit(1, data={ValidationPhase: tiny_batches(), TrainingPhase: tiny_batches()})


# --- data that is refused at its first batch


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        (X, "Tensor of shape (6, 1), float32"),
        ((X,), "tuple of 1: Tensor of shape (6, 1), float32"),
        ((X, Y, Y), "tuple of 3: Tensor of shape (6, 1), float32, Tensor of shape (6, 1), float32, Tensor of shape"),
        ({"x": X, "y": Y}, "dict with keys 'x', 'y'"),
        ([], "list of 0"),
        (None, "NoneType None"),
    ],
)
@pytest.mark.parametrize("phase", [TrainingPhase, OODPhase])
def test_a_batch_that_is_no_pair(batch: Any, got: str, phase: type[Phase]) -> None:
    learner = learner_on({phase: [batch]})
    with pytest.raises(DataError) as raised:
        learner.epoch(phase)
    text = str(raised.value)
    assert text.startswith(f"{phase.__name__} needs (inputs, targets) from its loader and got {got}")
    assert f"Let the dataset return pairs, or override {phase.__name__}.split(raw) to return (inputs, tar" in text
    with pytest.raises(DataError, match=r"needs \(inputs, targets\)"):
        learner.step(phase, batch)


def test_a_loader_that_turns_out_empty() -> None:
    learner = learner_on(pair for pair in tiny_batches(n_batches=0))
    with pytest.raises(DataError) as raised:
        learner.fit(1)
    assert str(raised.value) == (
        "The loader for TrainingPhase (generator) gives no batch. It is an iterator, used up after one pass: pass a "
        "list, a DataLoader, or another iterable."
    )


@pytest.mark.parametrize("how", [{"epochs": 2}, {"steps": 3}, {"steps": 3, "validate_every": 3}], ids=str)
def test_a_generator_lasts_one_pass(how: dict[str, Any]) -> None:
    learner = learner_on(pair for pair in tiny_batches(n_batches=2))
    with pytest.raises(DataError, match=r"^The loader for TrainingPhase \(generator\) gives no batch\. It is an it"):
        learner.fit(**how)
    assert learner.loop.scopes.numbers[TrainingPhase()] == (1 if "validate_every" in how else 2)


def test_data_is_put_back_after_a_fit_of_its_own() -> None:
    own = tiny_batches(n_batches=3)
    learner = learner_on(own)
    learner.fit(1, data=tiny_batches(n_batches=1))
    assert learner.data[TrainingPhase] is own
    with pytest.raises(DataError):
        learner.fit(1, data=[X])
    assert learner.data[TrainingPhase] is own
    with pytest.raises(UsageError, match=r"^fit\(\) has no data\. Pass data=\(train_loader, valid_loader\) to Learner"):
        learner_on(None).fit(1)
    with pytest.raises(UsageError, match=r"^There is no data for OODPhase\. Pass it: learner\.epoch\(OODPhase"):
        learner.epoch(OODPhase)


def test_what_an_iterable_dataset_says_of_its_length_is_a_guess() -> None:
    class Stream(IterableDataset[torch.Tensor]):
        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[torch.Tensor]:
            return iter(torch.zeros(3, 1))

    assert length(DataLoader(Stream(), batch_size=1)) is None
    assert length([1, 2]) == 2
    assert length(iter([1])) is None


class Told:
    """Keeps the numbers of the passes that the learner announces to it."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def set_epoch(self, number: int) -> None:
        self.told.append(number)


class ToldSamples(Told, Samples):
    """A dataset that is told the number of the pass."""


class ToldSampler(Told, RandomSampler):
    """A sampler that is told the number of the pass."""

    def __init__(self, source: Samples) -> None:
        Told.__init__(self)
        RandomSampler.__init__(self, source)


class ToldBatches(Told, BatchSampler):
    """A batch sampler that is told the number of the pass."""

    def __init__(self, sampler: ToldSampler) -> None:
        Told.__init__(self)
        BatchSampler.__init__(self, sampler, 2, False)


class Wrapper(Told):
    """A user's loader around one of torch."""

    def __init__(self, dataloader: Any) -> None:
        super().__init__()
        self.dataloader = dataloader

    @property
    def dataset(self) -> Any:
        raise RuntimeError("not prepared")


def test_whatever_has_set_epoch_is_told_once_where_a_loader_keeps_it() -> None:
    samples = ToldSamples()
    sampler, batches = ToldSampler(samples), ToldBatches(ToldSampler(samples))
    loader, batched = DataLoader(samples, 2, sampler=sampler), DataLoader(samples, batch_sampler=batches)
    other = ToldSamples()
    nested: DataLoader[Any] = DataLoader(Subset(ConcatDataset([samples, other]), [0, 1]), num_workers=2)
    wrapper = Wrapper(batched)
    set_epoch(loader, 1)
    set_epoch(batched, 2)
    set_epoch(nested, 3)
    set_epoch(wrapper, 4)
    set_epoch([torch.zeros(1)], 5)
    assert sampler.told == [1]
    assert batches.told == [2, 4]
    assert untyped(batches.sampler).told == [2, 4]
    assert other.told == [3]
    assert wrapper.told == [4]
    assert samples.told == [1, 2, 3, 4]
    assert loader_parts(loader)[:2] == [loader, sampler]
    assert [has_workers(each) for each in (loader, nested, Wrapper(nested), [1])] == [False, True, True, False]


# --- the number of updates that a fit announces is the number that it makes


class Announced(Callback):
    """Keeps the `FitBegin` event."""

    fit: FitBegin | None = None

    @on(FitBegin)
    def keep(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        self.fit = event


class Streamed(torch.utils.data.IterableDataset[Any]):
    """An iterable dataset of pairs."""

    def __iter__(self) -> Any:
        return iter([(torch.ones(1), torch.ones(1))] * 6)


@settings(max_examples=examples(40))
@given(
    lengths=st.tuples(st.integers(1, 5), st.integers(0, 4)),
    accumulate=st.integers(1, 4),
    epochs=st.integers(1, 3),
    by_steps=st.none() | st.tuples(st.integers(1, 9), st.none() | st.integers(1, 4)),
)
def test_what_is_announced_is_what_happens(
    lengths: tuple[int, int], accumulate: int, epochs: int, by_steps: tuple[int, int | None] | None
) -> None:
    announced = Announced()
    data: dict[Any, Any] = {TrainingPhase: tiny_batches(n_batches=lengths[0], batch_size=1)}
    if lengths[1] and by_steps is None:
        data[OtherTraining] = tiny_batches(n_batches=lengths[1], batch_size=1)
    data[ValidationPhase] = tiny_batches(n_batches=2, batch_size=1)
    learner = tiny_learner(announced, data=data, core=TorchCore(device="cpu", accumulate=accumulate))
    if by_steps is None:
        learner.fit(epochs)
    else:
        learner.fit(steps=by_steps[0], validate_every=by_steps[1])
    assert announced.fit is not None
    history = learner.cbstate.history
    made = sum(history[phase].updates for phase in history if isinstance(phase, AbstractTrainingPhase))
    assert announced.fit.updates == made


@pytest.mark.parametrize(
    ("accumulate", "how", "expected"),
    [
        (1, {"epochs": 2}, None),
        (1, {"steps": 7}, 7),
        (2, {"steps": 7}, None),
        (2, {"steps": 7, "validate_every": 3}, 5),
    ],
    ids=str,
)
def test_a_loader_that_does_not_know_its_length(accumulate: int, how: dict[str, int], expected: int | None) -> None:
    data: PhaseMap[Any] = PhaseMap("data")
    data[TrainingPhase] = torch.utils.data.DataLoader(Streamed())
    asked: dict[str, Any] = {"epochs": None, "steps": None, "validate_every": None, **how}
    assert planned_updates(data, accumulate, **asked) == expected


# --- limits


class Forever(IterableDataset[Any]):
    """A stream that never ends."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.ones(1), torch.ones(1)


class Looks(Callback):
    """Keeps the first input of each training batch, the length of the loaders, and the length of the fit."""

    def __init__(self) -> None:
        self.inputs: list[float] = []
        self.lengths: list[dict[str, int]] = []
        self.updates: int | None = None

    def state_access(self) -> Access:
        return {"batch.inputs": Read(), "data": Read()}

    @on(FitBegin, access={})
    def begin(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        self.updates = event.updates

    @on(EpochBegin, access={"data": Read()})
    def look(self, event: EpochBegin, phase: Phase, learner: LearnerView) -> None:
        self.lengths.append({repr(phase): len(loader) for phase, loader in learner.data.items()})

    @on(BatchEnd, TrainingPhase)
    def note(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        self.inputs.append(learner.batch.inputs[0].item())


def numbered(count: int, **options: Any) -> Any:
    values = torch.arange(float(count))[:, None]
    return DataLoader(TensorDataset(values, values), 2, **options)


def test_each_pass_begins_at_the_first_batch() -> None:
    looks = Looks()
    learner = tiny_learner(looks, data=(numbered(10), numbered(10)))
    before = learner.data[TrainingPhase]
    learner.fit(2, limit_batches={TrainingPhase: 3, ValidationPhase: 0.4})
    assert looks.inputs == [0, 2, 4, 0, 2, 4]
    assert looks.lengths == [{"TrainingPhase": 3, "ValidationPhase": 2}] * 4
    assert looks.updates == 6
    assert learner.data[TrainingPhase] is before
    learner.fit(1)
    assert looks.inputs[6:] == [0, 2, 4, 6, 8]


def test_steps_run_through_limited_passes() -> None:
    looks = Looks()
    tiny_learner(looks, data=numbered(10)).fit(steps=7, validate_every=2, limit_batches=3)
    assert looks.inputs == [0, 2, 4, 0, 2, 4, 0]


def test_a_schedule_is_stretched_over_the_limited_fit() -> None:
    learner = tiny_learner(Scheduler({LearningRate: one_cycle(1.0)}), n_batches=100)
    learner.fit(2, limit_batches=0.05)
    rates = [rate for _, rate in learner.cbstate.hyperparams["LearningRate"]]
    expected = one_cycle(1.0, length=10)
    assert rates == pytest.approx([expected(n) for n in range(1, 11)])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_limit_gives_a_stream_a_length(accumulate: int) -> None:
    looks = Looks()
    core = TorchCore(device="cpu", accumulate=accumulate)
    learner = tiny_learner(looks, data=DataLoader(Forever(), 4), core=core)
    learner.fit(2, limit_batches=5)
    assert len(looks.inputs) == 10
    assert looks.updates == learner.cbstate.history[TrainingPhase].updates == {1: 10, 2: 6}[accumulate]


def test_the_loader_behind_a_limit_is_found() -> None:
    loader = numbered(10, generator=torch.Generator().manual_seed(3), shuffle=True)
    limited = LimitedLoader(loader, 2)
    assert unlimited(limited) is loader is unlimited(loader)
    assert (len(limited), length(limited), limited.batch_size) == (2, 2, 2)
    assert {id(part) for part in loader_parts(loader)} <= {id(part) for part in loader_parts(limited)}
    assert copy.copy(limited).loader is loader
    assert repr(limited) == f"LimitedLoader({loader!r}, 2)"
    with pytest.raises(AttributeError, match="'DataLoader' object has no attribute 'nonsense'"):
        limited.nonsense  # noqa: B018  # the attribute of a loader that has none


def test_callbacks_that_look_into_loaders_see_through_a_limit(recwarn: pytest.WarningsRecorder) -> None:
    """`SanityCheck` reads a first batch, and `Metrics` knows the batch size of a loader."""
    check = SanityCheck()
    tiny_learner(check, data=(numbered(10), numbered(10))).fit(1, limit_batches=1)
    assert check.skipped == []
    assert not recwarn.list


def test_resumed_with_a_limit_that_ends_before_the_checkpoint(tmp_path: Path) -> None:
    class Asks(Callback):
        @on(BatchEnd, TrainingPhase)
        def ask(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
            learner.request_checkpoint(tmp_path / "one.ckpt")

    tiny_learner(Asks(), data=numbered(10)).fit(1, limit_batches=4)
    learner = tiny_learner(data=numbered(10))
    with pytest.raises(CheckpointError) as caught:
        learner.fit(1, limit_batches=2, resume=tmp_path / "one.ckpt")
    assert str(caught.value) == (
        "The checkpoint was taken after batch 4 of an epoch of TrainingPhase, and the loader gives only 2. Resume with "
        "the data of the run that wrote it."
    )
    learner.fit(1, resume=tmp_path / "one.ckpt")
    assert learner.cbstate.history[TrainingPhase].steps == 5


def test_rare_validations_are_those_that_are_saved(tmp_path: Path) -> None:
    learner = tiny_learner(Checkpointer(tmp_path))
    learner.fit(5, validate_every=2)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == [f"epoch-000{number}.ckpt" for number in (2, 4, 5)]
    assert [epoch for epoch, _ in learner.cbstate.metrics_epoch[ValidationPhase]["Loss"]] == [2, 4, 5]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (0, "fit(): limit_batches of TrainingPhase is a whole number, at least 1, got 0."),
        (-3, "fit(): limit_batches of TrainingPhase is a whole number, at least 1, got -3."),
        (
            0.0,
            "fit(): limit_batches of TrainingPhase is a whole number of batches, at least 1, or a share of the loader, "
            "above 0.0 and up to 1.0, got 0.0. To leave a phase out, leave it out of data.",
        ),
        *(
            (
                wrong,
                "fit(): limit_batches of TrainingPhase is a whole number of batches, at least 1, or a share of the "
                f"loader, above 0.0 and up to 1.0, got {wrong!r}. To leave a phase out, leave it out of data.",
            )
            for wrong in (1.5, float("nan"), True, "10")
        ),
        (
            {"train": 3},
            "fit(limit_batches={'train': 3}) limits 'train', and the fit has data for TrainingPhase, ValidationPhase. "
            "Write limit_batches={TrainingPhase: 100}.",
        ),
        (
            {ValidationPhase: None},
            "fit(): limit_batches of ValidationPhase is a whole number of batches, at least 1, or a share of the "
            "loader, above 0.0 and up to 1.0, got None. To leave a phase out, leave it out of data.",
        ),
    ],
    ids=str,
)
def test_limits_that_are_refused(limit: Any, message: str) -> None:
    learner = tiny_learner()
    with pytest.raises(UsageError) as caught:
        learner.fit(1, limit_batches=limit)
    assert str(caught.value) == message
    assert learner.model.coeff == 0


def test_a_share_of_a_loader_without_a_length() -> None:
    learner = tiny_learner(data=DataLoader(Forever(), 4))
    with pytest.raises(UsageError) as caught:
        learner.fit(1, limit_batches=0.5)
    assert str(caught.value) == (
        "fit(): limit_batches of TrainingPhase is the share 0.5, and the loader (DataLoader) does not know how many "
        "batches it has. Write a number of batches: limit_batches={TrainingPhase: 100}."
    )


def test_a_phase_without_data_cannot_be_limited() -> None:
    learner = tiny_learner(data=tiny_batches())
    with pytest.raises(UsageError, match="limits ValidationPhase, and the fit has data for TrainingPhase"):
        learner.fit(1, limit_batches={ValidationPhase(): 3})
