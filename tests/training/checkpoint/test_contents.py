"""The contents of a checkpoint, the programs that can read it, and the errors for one that does not fit the learner."""

from __future__ import annotations

import enum
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CheckpointError,
    EpochEnd,
    FitBegin,
    Learner,
    LearnerView,
    Phase,
    TorchCore,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import (
    EMA,
    Checkpointer,
    EarlyStopping,
    GradNorm,
    LearningRate,
    LogHyperParams,
    LogMetrics,
    LogTraces,
    Metrics,
    Scheduler,
    SmoothLoss,
    StopOnNaNLoss,
    one_cycle,
    throttle,
)
from flowtrain.logging import JsonlBackend
from flowtrain.metrics import accuracy
from flowtrain.state.encoding import Packer
from flowtrain.testing import tiny_learner
from flowtrain.training.checkpoint.contents import gather
from tests.support.logs import log_records


def net(width: int = 3, bias: bool = True, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(1, width, bias=bias), torch.nn.Linear(width, 1)).to(dtype)


def learner_of(*callbacks: Callback, **options: Any) -> Learner:
    return tiny_learner(*callbacks, **dict[str, Any]({"n_batches": 2, "model": net(), **options}))


def one_group_each(params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [each]} for each in params])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with the checkpoint of one epoch."""
    learner_of(SmoothLoss(), Checkpointer(tmp_path / "run")).fit(1)
    return tmp_path / "run"


def state_of(learner: Learner) -> str:
    """Return all state of a learner that loading a checkpoint could change."""
    contents = gather(learner.state, learner.core, learner.loop.checkpoints.changes, Packer([]))
    return repr([contents, torch.get_rng_state().sum(), learner.loop.scopes.numbers, learner.loop.sinks.run])


# --- a checkpoint that does not fit changes nothing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": net(4)}, r"another model: its 0\.weight has shape \(3, 1\), the learner's \(4, 1\); its 0\.bias"),
        ({"model": net(bias=False)}, r"another model: it has 0\.bias, and the learner's has not\. Build the learner"),
        (
            {"model": torch.nn.Sequential(*net().children(), torch.nn.Linear(1, 1))},
            r"another model: it has no 2\.weight; it has no 2\.bias\. Build the learner with the model",
        ),
        ({"model": net(dtype=torch.float64)}, r"its 0\.weight is torch\.float32, the learner's torch\.float64; "),
        (
            {"model": {"gen": net(), "critic": net()}, "data": None},
            r"another model: it has as model one without a name, the learner has 'gen', 'critic'\.",
        ),
        ({"lossfn": torch.nn.CrossEntropyLoss(torch.ones(3))}, r"another model: it has no weight\."),
        ({"optimizer": torch.optim.Adam}, r"another optimizer: it was a SGD, the learner has a Adam\. Build the lear"),
        (
            {"optimizer": one_group_each},
            r"it had groups of \[4\] parameters, the learner's has groups of \[1, 1, 1, 1\]\.",
        ),
        (
            {"model": (one := net()), "optimizer": {"one": torch.optim.SGD(one.parameters(), lr=0.1)}},
            r"another optimizer: it has as optimizer one without a name, the learner has 'one'\.",
        ),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_one_of_another_model_or_optimizer(options: dict[str, Any], message: str, resume: bool, folder: Path) -> None:
    learner = learner_of(SmoothLoss(), **options)
    before = state_of(learner)
    takes_part = resume and options.get("data", ()) is not None
    take = partial(learner.fit, 2, resume=folder) if takes_part else partial(learner.load, folder)
    with pytest.raises(CheckpointError, match=message):
        take()
    assert state_of(learner) == before


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "other", "newer", "folder", "pointer"])
def test_a_file_that_is_no_checkpoint(damage: str, folder: Path) -> None:
    file = folder / "epoch-0001.ckpt"
    contents = torch.load(file, weights_only=True)
    message = f"{file} cannot be read as a checkpoint: .* truncated, damaged, or something else"
    path = file
    if damage in ("missing", "pointer"):
        file.unlink()
        path = file if damage == "missing" else folder
        message = f"There is no checkpoint {file}: no such file"
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "text":
        file.write_text("no checkpoint")
    elif damage == "other":
        torch.save({"weight": torch.zeros(1)}, file)
        message = f"{file} is no checkpoint of flowtrain: it holds dict. For weights alone call learner"
    elif damage == "newer":
        torch.save({**contents, "version": 7, "flowtrain": "9.0"}, file)
        message = f"{file} has version 7 of the format, written by flowtrain 9.0; this one reads 1 to 3. Use the flo"
    else:
        path = folder / "inside"
        path.mkdir()
        (path / "notes.txt").touch()
        message = r"inside has no checkpoint that is complete: .*it holds: notes\.txt\)\. Pass the folder of a Checkp"
    learner = learner_of(SmoothLoss())
    before = state_of(learner)
    with pytest.raises(CheckpointError, match=message):
        learner.fit(2, resume=path)
    assert state_of(learner) == before


class Refuses(Callback):
    """A callback that refuses the state of a checkpoint."""

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses

    def state_dict(self) -> dict[str, Any]:
        return {"limit": 3}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.refuses:
            self.refuses = False  # it accepts its own state, which is restored after the failure
            raise KeyError("limits")


def test_a_callback_that_refuses_its_state_leaves_everything_as_it_was(folder: Path) -> None:
    learner_of(SmoothLoss(), Refuses(False), Checkpointer(folder / "refused")).fit(1)
    learner = learner_of(SmoothLoss(), Refuses(True))
    learner.fit(1)
    before = state_of(learner)
    with pytest.raises(
        CheckpointError, match=r"^Refuses refuses its state .*: KeyError: 'limits'\. Make it with the arg"
    ):
        learner.load(folder / "refused")
    assert state_of(learner) == before


@pytest.mark.parametrize("where", ["numbers", "passes"])
def test_a_phase_that_is_not_defined_is_refused_before_anything_changes(where: str, tmp_path: Path) -> None:
    learner_of(SmoothLoss(), Checkpointer(tmp_path), LogMetrics(JsonlBackend(tmp_path / "log.jsonl"))).fit(2)
    contents = torch.load(tmp_path / "epoch-0001.ckpt", weights_only=True)
    contents[where]["NowherePhase"] = 1
    torch.save(contents, tmp_path / "other.ckpt")
    log = (tmp_path / "log.jsonl").read_bytes()
    learner = learner_of(SmoothLoss(), LogMetrics(JsonlBackend(tmp_path / "log.jsonl")))
    before = state_of(learner)
    for take in (learner.load, lambda path: learner.fit(3, resume=path)):
        with pytest.raises(CheckpointError, match=r"state of the phase NowherePhase, and no phase of that name is def"):
            take(tmp_path / "other.ckpt")
        assert state_of(learner) == before
        assert (tmp_path / "log.jsonl").read_bytes() == log


def test_a_warning_that_is_an_error_changes_nothing(folder: Path) -> None:
    learner = learner_of()
    before = state_of(learner)
    with pytest.raises(UserWarning, match="has the state of SmoothLoss, Checkpointer, and the learner has no"):
        learner.fit(2, resume=folder)  # the tests make errors of all warnings
    assert state_of(learner) == before


class Stays(Callback):
    """A callback that cannot take note of the folder."""

    def moved(self, before: str, here: str) -> None:
        raise OSError(f"{here} is gone")


def test_a_callback_that_fails_after_its_state_was_loaded_leaves_everything_as_it_was(folder: Path) -> None:
    folder = folder / "again"
    learner_of(SmoothLoss(), Stays(), Checkpointer(folder)).fit(1)
    learner = learner_of(SmoothLoss(), Stays(), Checkpointer(folder / "other"))
    learner.fit(1)
    before = state_of(learner)
    for take in (learner.load, lambda path: learner.fit(2, resume=path)):
        with pytest.raises(OSError, match=f"{folder} is gone"):
            take(folder)
        assert state_of(learner) == before


def test_callbacks_by_name(folder: Path) -> None:
    class Other(Callback):
        name = "SmoothLoss"

    with pytest.raises(CheckpointError, match=r"state of a SmoothLoss under the name 'SmoothLoss', and here that"):
        learner_of(Other()).load(folder)
    with pytest.warns(UserWarning, match="has the state of SmoothLoss, Checkpointer, and the learner has no"):
        learner_of().fit(1, resume=folder)
    learner_of().load(folder)  # a user who only looks at a model needs none of the callbacks that trained it


# --- the contents of a checkpoint


class Kind(enum.IntEnum):
    """An IntEnum, which looks like a number but cannot be saved as one."""

    ONE = 1


class Holds(Callback):
    """A callback whose state is the value that the test gives it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"best": {"values": [1, self.value]}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.value = state["best"]["values"][1]


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, 1 + 2j, "text", b"bytes", (1, (2,)), [1, [2]], {"a": 1, 2: {"b": None}}, {1, 2}, torch.half],
)
def test_plain_values_come_back_as_they_were(value: Any, tmp_path: Path) -> None:
    learner_of(Holds(value), Checkpointer(tmp_path)).fit(1)
    callback = Holds("other")
    learner_of(callback).load(tmp_path)
    assert callback.value == value
    assert type(callback.value) is type(value)


def test_tensors_are_copied_and_shared_ones_stay_shared(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    callback = Holds((shared, shared[2:4], shared.view(2, 3), np.float64(0.5)))
    learner_of(callback, Checkpointer(tmp_path)).fit(1)
    shared.zero_()
    other = Holds(None)
    learner_of(other).load(tmp_path)
    whole, part, view, number = other.value
    assert (whole.tolist(), part.tolist()) == ([0, 1, 2, 3, 4, 5], [2, 3])
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert type(number) is float


class Makes(Callback):
    """A callback that makes a tensor, filled with its number, each time it is asked for its state."""

    def __init__(self, number: float) -> None:
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": torch.full((1000,), self.number)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.number = state["numbers"].mean().item()


def test_tensors_that_live_only_while_they_are_saved_keep_their_values(tmp_path: Path) -> None:
    """Each of these tensors was freed at once, and the next one, at its address, was taken for the same tensor."""
    learner_of(*[Makes(float(number)) for number in range(8)], Checkpointer(tmp_path)).fit(1)
    callbacks = [Makes(-1.0) for _ in range(8)]
    learner_of(*callbacks).load(tmp_path)
    assert [callback.number for callback in callbacks] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_views_that_show_other_values_of_the_same_memory_are_saved_with_these_values(tmp_path: Path) -> None:
    """A conjugate view and a negative view differ from the tensor in one bit, and their elements have other values."""
    z = torch.tensor([1 + 2j, 3 - 4j])
    learner_of(Holds((z, z.conj(), z.imag, z.conj().imag)), Checkpointer(tmp_path)).fit(1)
    other = Holds(None)
    learner_of(other).load(tmp_path)
    assert [each.tolist() for each in other.value] == [[1 + 2j, 3 - 4j], [1 - 2j, 3 + 4j], [2, -4], [-2, 4]]


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: Kind.ONE, r"<Kind\.ONE: 1> \(Kind\)"),
        (lambda: np.zeros(2), r"array\(\[0\., 0\.\]\) \(ndarray\)"),
        (lambda: Path("a"), r"Path\('a'\) \(PosixPath\)"),
        (lambda: print, r"<built-in function print> \(builtin_function_or_method\)"),
    ],
)
def test_anything_else_names_the_callback_and_the_key(make: Callable[[], Any], shown: str, tmp_path: Path) -> None:
    """Rule 28: a value that cannot be saved is an error, which names the callback and the key."""
    message = rf"^Holds\.state_dict\(\) cannot be in a checkpoint: \['best'\]\['values'\]\[1\] is .*{shown}\. A "
    with pytest.raises(CheckpointError, match=message):
        learner_of(Holds(make()), Checkpointer(tmp_path)).fit(1)
    with pytest.raises(CheckpointError, match=r"the key <Kind\.ONE: 1> of \['best'\]\['values'\]\[1\] is "):
        learner_of(Holds({Kind.ONE: 1}), Checkpointer(tmp_path)).fit(1)


class Shares(Callback):
    """Puts entries of its own into ``cbstate``."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_access(self) -> Access:
        return {"cbstate.mine": Write(), "cbstate.deep.inner": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.mine = None
        learner.cbstate.deep.inner = 0

    @on(EpochEnd, TrainingPhase)
    def put(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        learner.cbstate.mine = self.value
        learner.cbstate.deep.inner += 1


def test_entries_of_the_users(tmp_path: Path) -> None:
    learner_of(Shares({"seen": [1, 2]}), Checkpointer(tmp_path)).fit(2)
    loaded = learner_of(Shares(None))
    loaded.load(tmp_path)
    assert loaded.cbstate.mine == {"seen": [1, 2]}
    assert loaded.cbstate.deep.inner == 2
    with pytest.raises(CheckpointError, match=r"^cbstate\.mine cannot be in a checkpoint: itself is <object"):
        learner_of(Shares(object()), Checkpointer(tmp_path / "other")).fit(1)


def test_what_was_recorded_since_is_gone_after_load(folder: Path) -> None:
    learner = learner_of(SmoothLoss())
    learner.fit(3)
    twin = learner.cbstate.metrics_step[TrainingPhase]["Loss"]
    learner.load(folder)
    assert len(twin) == 2  # cleared in place, so holders of the series see it too
    assert learner.cbstate.history[TrainingPhase].epochs == 1
    learner.fit(1)
    assert len(twin) == 4
    assert [step for step, _ in twin] == [1, 2, 3, 4]
    assert len(learner.cbstate.smooth_loss[TrainingPhase]) == 4


@pytest.mark.usefixtures("forget_compilations")
@pytest.mark.cpu_only("torch.compile cannot trace a device that is written in Python")
def test_torch_alone_reads_it_and_nothing_of_compilation_is_in_the_names(tmp_path: Path) -> None:
    """Rule 28: ``torch.load(weights_only=True)`` reads the file, and compilation changes no name in it."""
    compiled: Any = torch.compile(net(), backend="eager")
    part: Any = torch.compile(net(), backend="eager")
    inner = torch.nn.Sequential(part)
    for each, name in ((compiled, "0.weight"), (inner, "0.0.weight")):
        folder = tmp_path / name
        learner_of(Checkpointer(folder), model=each).fit(1)
        contents = torch.load(folder / "epoch-0001.ckpt", weights_only=True)
        assert "_orig_mod" not in repr(contents)
        assert name in contents["model"][""]
    plain = learner_of(model=torch.nn.Sequential(net()))
    plain.load(folder)
    assert torch.equal(plain.model[0][0].weight, inner.state_dict()["0._orig_mod.0.weight"])
    assert contents["optimizer"][""]["type"] == "SGD"
    assert contents["finite"] is True
    assert set(contents) == {
        "format", "version", "flowtrain", "torch", "model", "loss module", "structure", "optimizer", "core", "group",
        "cbstate", "callbacks", "random", "loaders", "position", "numbers", "passes", "run", "lanes", "finite",
        "updates", "arrivals",
    }  # fmt: skip


def test_a_run_goes_on_under_its_identifier(folder: Path) -> None:
    learner = learner_of(SmoothLoss(), Checkpointer(folder))
    learner.fit(2, resume=folder)
    run = torch.load(folder / "epoch-0001.ckpt", weights_only=True)["run"]["id"]
    assert learner.loop.sinks.run.id == run
    assert learner.loop.sinks.run.resumed


def test_a_folder_can_be_moved(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    learner = learner_of(SmoothLoss())
    learner.load(tmp_path / "elsewhere")
    learner.load(str(tmp_path / "elsewhere" / "best"))
    assert learner.cbstate.history[ValidationPhase].epochs == 1


def test_conditions_go_on_counting(tmp_path: Path) -> None:
    class Counts(Callback):
        seen = 0

        @on(EpochEnd, TrainingPhase)
        def count(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
            self.seen += 1

    throttled = partial(throttle, event_type=EpochEnd, every=2)
    learner_of(throttled(Counts()), Checkpointer(tmp_path)).fit(3)
    counts = throttled(Counts())
    resumed = learner_of(counts, Checkpointer(tmp_path))
    resumed.fit(4, resume=tmp_path)
    assert counts.seen == 1  # at the fourth event


@pytest.mark.parametrize(("there", "here"), [(None, True), (True, None)])
def test_an_optimizer_computes_as_the_program_says(there: bool | None, here: bool | None, tmp_path: Path) -> None:
    """On an accelerator optimizers are fused, and the guard against NaN needs that; on the CPU they are not."""

    def made(fused: bool | None, *callbacks: Callback) -> Learner:
        torch.manual_seed(0)
        optimizer = partial(torch.optim.Adam, lr=0.1, fused=fused)
        return learner_of(StopOnNaNLoss(), *callbacks, model=net(), optimizer=optimizer, core=TorchCore("cpu", lag=2))

    made(there, Checkpointer(tmp_path)).fit(1)
    resumed, whole = made(here, Checkpointer(tmp_path)), made(here)
    resumed.fit(2, resume=tmp_path)
    whole.fit(2)
    group = resumed.core.optimizer.param_groups[0]
    assert (group["fused"], group["foreach"], group["lr"]) == (here, None, 0.1)
    for param, expected in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(param, expected)


# --- checkpoints in the first version of the format


# The log of a fit of four epochs and the checkpoint after its second epoch, as version 0.1.0 wrote them before the
# modules moved into packages.
FIRST = Path(__file__).parent / "data" / "first"
# The sums of the weights after the fourth epoch, which the fit printed when it wrote the data.
WEIGHTS = {"0.weight": -1.39670264, "1.running_var": 2.61033368, "4.weight": 0.28827900, "4.bias": -0.05520640}


def make_learner(folder: Path, executor: str) -> Learner:
    torch.manual_seed(0)
    x = torch.randn(48, 4)
    y = (x[:, 0] > 0).long()
    pairs = torch.utils.data.TensorDataset(x, y)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(8, 2)
    )
    lines = JsonlBackend(folder / "log.jsonl")
    return Learner(
        model,
        F.cross_entropy,
        data=(
            torch.utils.data.DataLoader(pairs, batch_size=8, shuffle=True),
            torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:16], y[:16]), batch_size=8),
        ),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        callbacks=[
            Metrics(accuracy),
            Scheduler({LearningRate: one_cycle(1e-2)}),
            EMA(0.9),
            GradNorm(),
            EarlyStopping(10),
            LogMetrics(lines),
            LogHyperParams(lines),
            LogTraces(lines),
            Checkpointer(folder / "checkpoints"),
        ],
        core=TorchCore(accumulate=2, clip_grad_norm=1.0),
        default_callbacks="quiet",
        executor=executor,
    )


def rows(path: Path) -> dict[tuple[Any, ...], float]:
    """Return the logged values by group, name and step; more lines than values show that a value was logged twice."""
    lines = log_records(path)
    values = {(line["group"], line["name"], line["step"]): line["value"] for line in lines}
    assert len(values) == len(lines)
    return values


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_the_first_format_is_resumed(tmp_path: Path, executor: str) -> None:
    """The resumed fit gives the log and the final weights of the first one."""
    shutil.copytree(FIRST, tmp_path / "run")
    with make_learner(tmp_path / "run", executor) as learner:
        learner.fit(4, resume=tmp_path / "run" / "checkpoints" / "epoch-0002.ckpt")
        weights = {name: value.sum().item() for name, value in learner.model.state_dict().items()}
    logged, expected = rows(tmp_path / "run" / "log.jsonl"), rows(FIRST / "log.jsonl")
    assert logged.keys() == expected.keys()
    if torch.__version__.startswith("2.13."):  # which wrote the data; dropout of torch 2.6 draws other numbers
        assert {name: weights[name] for name in WEIGHTS} == pytest.approx(WEIGHTS, rel=1e-4)
        assert logged == pytest.approx(expected, rel=1e-4)


# --- an object that a handler makes


class Counter:
    """An object with a state."""

    def __init__(self) -> None:
        self.number = 0

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]


class MakesLate(Callback):
    """Makes its entry when a fit begins, if it is not there yet, and counts batches with it."""

    def state_access(self) -> Access:
        return {"cbstate.counter": Write()}

    @on(FitBegin)
    def make(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        if "counter" not in learner.cbstate:
            learner.cbstate.counter = Counter()

    @on(BatchEnd, TrainingPhase)
    def count(self, event: BatchEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.cbstate.counter.number += 1


def test_an_object_that_a_handler_makes_gets_its_state_when_it_is_made(tmp_path: Path) -> None:
    tiny_learner(MakesLate(), Checkpointer(tmp_path), n_batches=2).fit(1)
    resumed = tiny_learner(MakesLate(), Checkpointer(tmp_path), n_batches=2)
    resumed.fit(3, resume=tmp_path)
    assert resumed.cbstate.counter.number == 6
    # A learner without the callback keeps the state for those that have it.
    without = tiny_learner(Checkpointer(tmp_path), n_batches=2)
    without.fit(4, resume=tmp_path)
    assert "counter" not in without.cbstate
    again = tiny_learner(MakesLate(), Checkpointer(tmp_path), n_batches=2)
    again.fit(5, resume=tmp_path)
    assert again.cbstate.counter.number == 8


def test_a_state_that_waits_goes_to_no_other_value(tmp_path: Path) -> None:
    tiny_learner(MakesLate(), Checkpointer(tmp_path), n_batches=2).fit(1)
    learner = tiny_learner(n_batches=2)
    learner.load(tmp_path)
    learner.cbstate.counter = None  # a place for the object, which gets the state
    learner.cbstate.counter = Counter()
    assert learner.cbstate.counter.number == 2
    learner.load(tmp_path)
    assert learner.cbstate.counter.number == 2
    other = tiny_learner(n_batches=2)
    other.load(tmp_path)
    other.cbstate.counter = 5  # another value, with which the state is forgotten
    other.cbstate.counter = Counter()
    assert other.cbstate.counter.number == 0


def test_entries_of_two_kinds_are_named(tmp_path: Path) -> None:
    class Plain(Callback):
        def state_access(self) -> Access:
            return {"cbstate.counter": Write()}

        def setup(self, learner: LearnerView) -> None:
            learner.cbstate.counter = 3

    class Object(Plain):
        def setup(self, learner: LearnerView) -> None:
            learner.cbstate.counter = Counter()

    tiny_learner(Plain(), Checkpointer(tmp_path), n_batches=2).fit(1)
    learner = tiny_learner(Object(), n_batches=2)
    with pytest.raises(CheckpointError) as raised:
        learner.load(tmp_path)
    assert str(raised.value).endswith(
        "cbstate.counter is a Counter in this learner, and in the checkpoint of the kind 'value'. Load the "
            "checkpoint with the callbacks that it was written with, or give the entry another name."
    )
    assert learner.cbstate.counter.number == 0
