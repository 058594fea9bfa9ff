"""Sharded training (FSDP) on several ranks: it equals DDP, ranks leave a batch together, and evaluation is whole."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.nn.functional import cross_entropy

from flowtrain import (
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    CoreError,
    Event,
    Learner,
    LossBegin,
    Phase,
    RankError,
    StepContext,
    TorchCore,
    TrainingPhase,
    UpdateBegin,
    UsageError,
    ValidationPhase,
    find_learning_rate,
    on,
)
from flowtrain.callbacks import (
    EMA,
    SWA,
    Checkpointer,
    Freeze,
    GradNorm,
    LogHistograms,
    LogVisualization,
    ModelSummary,
    SanityCheck,
)
from flowtrain.core.sharding import full_state_dict
from flowtrain.logging import JsonlBackend
from flowtrain.state.shards import whole
from flowtrain.testing import tiny_learner
from tests.ranks.by_hand import classes
from tests.support.ranks import Ranks, needs_sharding, rank, returned

pytestmark = needs_sharding


def network(norm: bool = True) -> nn.Sequential:
    """Return a model in which one layer has fewer rows than there are ranks."""
    torch.manual_seed(0)
    parts = [nn.Linear(12, 7), nn.BatchNorm1d(7) if norm else nn.Identity(), nn.Dropout(0.2), nn.Linear(7, 1)]
    return nn.Sequential(*parts, nn.Linear(1, 4))


def learner(
    parallel: Any = "fsdp", *callbacks: Callback, batches: int = 4, norm: bool = True, **options: Any
) -> Learner:
    """Return a learner of that model, whose layers are units of their own if it is sharded."""
    torch.manual_seed(rank())
    if parallel == "fsdp":
        options = {"shard": nn.Linear, **options}
    return Learner(
        network(norm),
        cross_entropy,
        data=(classes(batches), classes(2 + rank())),
        optimizer=partial(torch.optim.AdamW, lr=0.01),
        callbacks=callbacks,
        core=TorchCore(parallel=parallel, **options),
        default_callbacks="quiet",
    )


def train(parallel: Any, norm: bool = True, **options: Any) -> tuple[dict[str, Any], Tensor, str]:
    """Train, and return the parameters and buffers, predictions and the history."""
    trained = learner(parallel, norm=norm, batches=8, **options)
    history = trained.fit(2)
    predicted = trained.predict([inputs for inputs, _ in classes(3 - rank())])
    return full_state_dict(trained.model), predicted, str(history)


@pytest.mark.parametrize(
    "options", [{}, {"accumulate": 3}, {"precision": "bf16"}, {"clip_grad_value": 0.01}], ids=lambda each: str(each)
)
def test_sharded_training_is_ddp_to_the_bit(options: dict[str, Any], ranks: Ranks) -> None:
    for one, other in zip(ranks.values(train, "ddp", **options), ranks.values(train, "fsdp", **options), strict=True):
        assert one[2] == other[2]
        assert torch.equal(one[1], other[1])
        assert list(one[0]) == list(other[0])
        for name in one[0]:
            assert torch.equal(one[0][name], other[0][name]), name


def test_clipping_is_that_of_ddp_but_for_the_last_bits(ranks: Ranks) -> None:
    options: dict[str, Any] = {"clip_grad_norm": 0.05, "norm": False}
    one, other = ranks.values(train, "ddp", **options)[0], ranks.values(train, "fsdp", **options)[0]
    for name in one[0]:
        torch.testing.assert_close(one[0][name], other[0][name], atol=5e-7, rtol=0)


class Alone(Callback):
    """Raise on rank 1 alone, at an event of a phase, when it comes for the `at`-th time."""

    ranks = "every"

    def __init__(self, event: type[Event], failure: type[BaseException], phase: type[Phase], at: int) -> None:
        self.event, self.failure, self.phase, self.at, self.seen = event, failure, phase, at, 0

    def _raise(self, event: Event, phase: Phase) -> None:
        if type(event) is not self.event or type(phase) is not self.phase or rank() != 1:
            return
        self.seen += 1
        if self.seen == self.at:
            raise self.failure("only here")

    @on(BatchBegin, access={})
    def batch_begin(self, event: BatchBegin, phase: Phase, learner: Any) -> None:
        self._raise(event, phase)

    @on(LossBegin, access={})
    def loss_begin(self, event: LossBegin, phase: Phase, learner: Any) -> None:
        self._raise(event, phase)

    @on(BackwardEnd, TrainingPhase, access={})
    def backward_end(self, event: BackwardEnd, phase: Phase, learner: Any) -> None:
        self._raise(event, phase)

    @on(UpdateBegin, TrainingPhase, access={})
    def update_begin(self, event: UpdateBegin, phase: Phase, learner: Any) -> None:
        self._raise(event, phase)

    @on(BatchEnd, access={})
    def batch_end(self, event: BatchEnd, phase: Phase, learner: Any) -> None:
        self._raise(event, phase)


Case = tuple[type[Event], type[BaseException], type[Phase], int]


def fit_alone(cases: Sequence[Case], **options: Any) -> list[tuple[str, str, str, int, float]]:
    """Fit a learner for each case, and tell how the fit has ended: the error, its text, the history and the weights."""
    found: list[tuple[str, str, str, int, float]] = []
    for case in cases:
        made, ended, text = learner("fsdp", Alone(*case), **options), "returned", ""
        try:
            made.fit(2)
        except Exception as failure:
            ended, text = type(failure).__name__, str(failure)
        total = sum(float(whole(param.detach()).double().sum()) for param in made.model.parameters())
        found.append((ended, text, str(made.history), made.state.updates, total))
        made.close()
    return found


EVENTS = (BatchBegin, LossBegin, BackwardEnd, UpdateBegin, BatchEnd)
IN_EVALUATION = (BatchBegin, LossBegin, BatchEnd)
CANCELS = (CancelBatchException, CancelEpochException, CancelFittingException)


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}], ids=["plain", "accumulate"])
def test_a_cancel_on_one_rank_has_the_same_effect_on_all(options: dict[str, Any], ranks: Ranks) -> None:
    cases = [(event, failure, TrainingPhase, 3) for event in EVENTS for failure in CANCELS]
    zero, one = returned(ranks.run_on(2, 120, fit_alone, cases, **options))
    for case, mine, other in zip(cases, zero, one, strict=True):
        assert mine == other, case
        assert mine[0] == "returned", (case, mine)
        if not options and case[0] is not BatchEnd:
            assert mine[3] < 8, (case, mine)


def test_a_cancel_of_an_evaluation(ranks: Ranks) -> None:
    cases = [(event, failure, ValidationPhase, at) for event in IN_EVALUATION for failure in CANCELS for at in (1, 2)]
    for case, mine, other in zip(cases, *returned(ranks.run_on(2, 120, fit_alone, cases)), strict=True):
        assert mine == other, case
        assert mine[0] == "returned", (case, mine)


def test_an_error_on_one_rank_ends_on_all(ranks: Ranks) -> None:
    cases: list[Case] = [
        (event, ValueError, phase, at)
        for phase, events in ((TrainingPhase, EVENTS), (ValidationPhase, IN_EVALUATION))
        for event in events
        for at in (1, 2)
    ]
    for case, zero, one in zip(cases, *returned(ranks.run_on(2, 120, fit_alone, cases)), strict=True):
        assert (zero[0], one[0]) == ("RemoteError", "ValueError"), (case, zero, one)
        assert "rank 1: ValueError: only here" in zero[1]
        assert zero[3:] == one[3:], case


class Fails(nn.Module):
    """Raise in the middle of the model on rank 1, at the batch of a number."""

    def __init__(self, at: int, failure: type[Exception] = ValueError) -> None:
        super().__init__()
        self.at, self.seen, self.failure = at, 0, failure

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += 1
        if rank() == 1 and self.seen == self.at:
            raise self.failure("inside the model")
        return inputs


def fail_inside(at: int) -> None:
    model = nn.Sequential(nn.Linear(12, 7), Fails(at), nn.Linear(7, 4))
    core = TorchCore(parallel="fsdp", shard=nn.Linear)
    Learner(model, cross_entropy, data=(classes(3), classes(2)), core=core, default_callbacks="quiet").fit(2)


IN_FORWARD = {1: "first", 2: "training", 4: "first evaluation", 5: "evaluation", 7: "second epoch"}


@pytest.mark.parametrize("at", IN_FORWARD, ids=IN_FORWARD.get)
def test_an_error_within_the_model_ends_on_all(at: int, ranks: Ranks) -> None:
    zero, one = ranks.run(fail_inside, at)
    assert (zero.ended, one.ended) == ("RemoteError", "ValueError"), f"{zero}\n{one}"
    assert zero.error is not None
    assert "rank 1: ValueError: inside the model" in zero.error.text


def cancel_inside(at: int) -> tuple[int, float]:
    """Cancel a batch in the middle of the model on rank 1; return the number of updates and the sum of the weights."""
    model = nn.Sequential(nn.Linear(12, 7), Fails(at, CancelBatchException), nn.Linear(7, 4))
    core = TorchCore(parallel="fsdp", shard=nn.Linear)
    made = Learner(model, cross_entropy, data=(classes(3), classes(2)), core=core, default_callbacks="quiet")
    made.fit(2)
    return made.state.updates, sum(float(whole(param.detach()).double().sum()) for param in model.parameters())


@pytest.mark.parametrize("at", IN_FORWARD, ids=IN_FORWARD.get)
def test_a_cancel_within_the_model_has_the_same_effect_on_all(at: int, ranks: Ranks) -> None:
    zero, one = ranks.values(cancel_inside, at)
    assert zero == one
    assert zero[0] == (6 if "evaluation" in IN_FORWARD[at] else 5)


def fail_and_stay() -> str:
    """Catch the error of the first forward pass, and stay alive until the others have ended theirs."""
    try:
        fail_inside(1)
    except Exception as failure:
        torch.distributed.barrier()  # which the other rank reaches only if it was told
        return f"{type(failure).__name__}: {failure}"
    return "returned"


def test_a_process_that_stays_alive_after_its_first_forward_pass_keeps_nobody_waiting(ranks: Ranks) -> None:
    zero, one = ranks.values(fail_and_stay)
    assert zero.startswith("RemoteError: rank 1: ValueError: inside the model")
    assert one == "ValueError: inside the model"


def averaged(parallel: Any, kind: Any, *arguments: Any, **options: Any) -> tuple[str, dict[str, Tensor]]:
    average = kind(*arguments, **options)
    made = learner(parallel, average)
    history = made.fit(3)
    with average.applied():
        return str(history), full_state_dict(made.model)


@pytest.mark.parametrize(("kind", "arguments"), [(EMA, (0.5,)), (SWA, (2,))], ids=["EMA", "SWA"])
def test_averages_of_shards_are_those_of_whole_weights(kind: Any, arguments: Any, ranks: Ranks) -> None:
    options: dict[str, Any] = {"buffers": True} if kind is EMA else {}
    one, other = (ranks.values(averaged, each, kind, *arguments, **options) for each in ("ddp", "fsdp"))
    assert [history for history, _ in one] == [history for history, _ in other]
    assert one[0][1].keys() == other[0][1].keys()
    for name, weight in one[0][1].items():
        assert torch.equal(weight, other[0][1][name]), name
    assert other[1][1] == {}


def norms(parallel: Any) -> dict[str, list[float]]:
    made = learner(parallel, GradNorm())
    made.fit(2)
    return {name: [float(each) for each in series.values] for name, series in traced(made)}


def traced(made: Learner) -> Any:
    return made.cbstate.tracehistory[TrainingPhase].items()


def test_the_norm_of_gradients_is_that_of_all_shards(ranks: Ranks) -> None:
    one, other = ranks.values(norms, "ddp"), ranks.values(norms, "fsdp")
    assert len(one[0]["GradNorm"]) == 8
    assert other[0] == other[1]
    torch.testing.assert_close(other[0], one[0], atol=5e-7, rtol=0)


def histograms(parallel: Any, file: str) -> None:
    with learner(parallel, LogHistograms(JsonlBackend(file), every=2, gradients=True)) as made:
        made.fit(2)


def test_histograms_are_those_of_whole_tensors(ranks: Ranks, tmp_path: Path) -> None:
    rows: list[list[Any]] = []
    for parallel in ("ddp", "fsdp"):
        ranks.values(histograms, parallel, str(tmp_path / f"{parallel}.jsonl"))
        lines = (tmp_path / f"{parallel}.jsonl").read_text("utf-8").splitlines()
        rows.append([{name: each for name, each in json.loads(line).items() if name != "time"} for line in lines])
    assert rows[0] == rows[1]
    assert sum("Gradients/0.weight" in str(row) for row in rows[0]) == 4


def printed() -> tuple[str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as output, learner("fsdp", ModelSummary()) as made:
        made.fit(1)
    with pytest.raises(RankError) as refused:
        learner("fsdp", LogVisualization(str, JsonlBackend("never.jsonl")))
    return output.getvalue(), str(refused.value)


def test_a_summary_counts_whole_parameters_and_a_reader_of_the_batch_is_told_what_to_pass(ranks: Ranks) -> None:
    (main, told), (other, _) = ranks.values(printed)
    assert "(model)" not in other
    rows = [line.split() for line in main.splitlines() if line.startswith((" (model)", " 0", " 3"))]
    sizes = {row[0]: row[2] for row in rows}
    assert sizes == {"(model)": "121", "0": "91", "3": "8"}
    assert "Without shapes: the parameters are sharded, and a forward pass needs all ranks." in main
    assert 'Pass access={...} with the entries that it reads, such as {"batch.outputs": Read()}; for gradients' in told


def frozen(parallel: Any) -> dict[str, Tensor]:
    made = learner(parallel, Freeze({"0.*": 1}), SanityCheck())
    made.fit(2)
    return full_state_dict(made.model)


def test_frozen_parameters_are_trained_once_they_are_free(ranks: Ranks) -> None:
    one, other = ranks.values(frozen, "ddp")[0], ranks.values(frozen, "fsdp")[0]
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name
    assert not torch.equal(one["0.weight"], network().state_dict()["0.weight"])


# --- checkpoints


def resumed(parallel: str, folder: str, epochs: int, resume: str | None) -> tuple[str, dict[str, Tensor]]:
    average = EMA(0.5)
    torch.manual_seed(7)
    with learner(parallel, average, Checkpointer(folder)) as made:
        made.fit(epochs, resume=resume)
        with average.applied():
            averages = full_state_dict(made.model)
        weights = full_state_dict(made.model)
        return str(made.history), {**weights, **{f"average of {name}": each for name, each in averages.items()}}


def test_a_checkpoint_is_whole_and_resumes_to_the_bit_sharded_or_not(ranks: Ranks, tmp_path: Path) -> None:
    whole_run = ranks.values(resumed, "fsdp", str(tmp_path / "whole"), 3, None)[0]
    for first, then in (("fsdp", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")):
        folder = str(tmp_path / f"{first} {then}")
        ranks.values(resumed, first, folder, 2, None)
        history, weights = ranks.values(resumed, then, folder, 3, "auto")[0]
        assert history == whole_run[0], (first, then)
        for name, weight in weights.items():
            assert torch.equal(weight, whole_run[1][name]), (first, then, name)


# --- meshes, offloading, and what else a learner does


def placed(how: str, size: int) -> tuple[dict[str, Tensor], str, Any]:
    """Train with DDP, or sharded in some way; return the weights, the history and an evaluation."""
    options: Any = None
    if how == "mesh":
        torch.distributed.init_process_group("gloo")
        options = {"mesh": init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))}
    elif how == "offload":
        options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    made = learner("ddp" if how == "ddp" else "fsdp", norm=False, fsdp=options)
    history = made.fit(2)
    return full_state_dict(made.model), str(history), made.evaluate(classes(1 + rank()))


@pytest.mark.parametrize(("how", "size"), [("plain", 4), ("mesh", 4), ("offload", 2)])
def test_meshes_offloading_and_four_ranks_train_as_ddp(how: str, size: int, ranks: Ranks) -> None:
    one, other = (returned(ranks.run_on(size, 60, placed, each, size))[0] for each in ("ddp", how))
    assert one[1] == other[1]
    assert one[2].keys() == other[2].keys()
    for name, weight in one[0].items():  # gloo adds the gradients of four ranks in another order
        torch.testing.assert_close(weight, other[0][name], atol=1e-5 if size > 2 else 0, rtol=0)


def other_calls(parallel: Any) -> tuple[Any, ...]:
    """Do what a learner can do beside a fit; return the results."""
    swa = SWA(1)
    made = learner(parallel, swa)
    for raw in classes(2):
        made.step(TrainingPhase(), raw)
    stepped = full_state_dict(made.model)
    made.fit(2)
    rows = made.validate()
    with swa.applied():
        averaged = full_state_dict(made.model)
    return stepped, str(rows), averaged, made.evaluate(classes(3 - rank())), full_state_dict(made.model)


def test_steps_validation_and_applied_averages_are_those_of_ddp(ranks: Ranks) -> None:
    one, other = ranks.values(other_calls, "ddp")[0], ranks.values(other_calls, "fsdp")[0]
    assert one[1] == other[1]
    assert one[3] == other[3]
    for place in (0, 2, 4):
        assert [name for name, each in one[place].items() if not torch.equal(each, other[place][name])] == []


def on_copies() -> list[str]:
    made, found = learner("fsdp"), list[str]()
    for call in (Learner.dry_run, Learner.audit_syncs, find_learning_rate):
        with pytest.raises(UsageError) as raised:
            call(made)
        found.append(str(raised.value))
    made.fit(1)
    return found


def test_what_works_on_copies_is_refused(ranks: Ranks) -> None:
    for texts in ranks.values(on_copies):
        for text in texts:
            assert "works on copies, and a model that is sharded over several processes cannot be copied." in text
            assert "TorchCore(parallel=None)" in text


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"shard": nn.Linear}, 'shard=<class .* is for sharded training. Write parallel="fsdp" with it.'),
        ({"fsdp": {}}, 'fsdp={} is for sharded training. Write parallel="fsdp" with it.'),
        ({"parallel": "fsdp", "shard": "Linear"}, "shard is a class of modules, a list of .* got 'Linear'"),
        ({"parallel": "fsdp", "shard": [int]}, "shard is a class of modules, a list of .* got .<class 'int'>."),
        (
            {"parallel": "fsdp", "fsdp": 3},
            "fsdp is a mapping of arguments for fully_shard, got 3. Write fsdp={'name': value}.",
        ),
        ({"parallel": "fsdp", "fsdp": {"ignored_params": ()}}, "cannot be set: the gradients of these parameters"),
        ({"parallel": "fsdp", "fsdp": {"module": 1}}, "cannot be set: the model is that of the learner. Leave it out."),
        ({"parallel": "fsdp", "precision": "fp16"}, "Use precision='bf16'."),
        ({"parallel": "fsdp", "compile": True}, "compile these parts before: `for block in model.blocks"),
        ({"parallel": "fsdp", "ddp": {}}, r"ddp=\{\} is for parallel='ddp'. Write fsdp={...} with parallel='fsdp'."),
    ],
    ids=lambda each: str(each)[:40],
)
def test_wrong_arguments(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(CoreError, match=text):
        TorchCore(**arguments)


def test_one_process_alone() -> None:
    with pytest.raises(CoreError, match="parallel='fsdp' trains in several processes, and this process was started"):
        Learner(nn.Linear(2, 2), cross_entropy, core=TorchCore(parallel="fsdp"))


def test_the_full_state_in_one_process_is_a_copy() -> None:
    model = nn.Linear(2, 2)
    found = full_state_dict(model)
    assert list(found) == ["weight", "bias"]
    assert torch.equal(found["weight"], model.weight)
    assert found["weight"].data_ptr() != model.weight.data_ptr()
    with pytest.raises(UsageError, match=r"full_state_dict\(Learner\(.*takes a module. Write full_state"):
        full_state_dict(tiny_learner())  # type: ignore[arg-type]  # the mistake of the test


class OwnStep(TrainingPhase):
    """A phase with a step of its own."""

    def step(self, learner: StepContext, raw: Any) -> None:
        """Do nothing."""


class WithParameters(nn.Module):
    """A loss function that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(outputs * self.scale, targets)


def refused() -> list[str]:
    """Return the texts of all refusals that need several processes."""
    found: list[str] = []

    def attempt(core: dict[str, Any], model: Any = None, phase: Phase | None = None, **options: Any) -> None:
        model = model or nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
        arguments: dict[str, Any] = {"lossfn": nn.functional.cross_entropy, "default_callbacks": False, **options}
        try:
            made = Learner(model, core=TorchCore(parallel="fsdp", **core), **arguments)
            made.fit(1, data={phase or TrainingPhase(): classes(2)})
        except CoreError as error:
            found.append(str(error))
        else:
            found.append("accepted")

    model = nn.Linear(12, 4)
    attempt({"shard": nn.Conv2d})
    attempt({"shard": lambda name, module: name == "2"})
    attempt({"fsdp": {"reshard": True}})
    attempt({}, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    attempt({}, {"gen": nn.Linear(12, 4), "disc": nn.Linear(12, 4)}, optimizer=partial(torch.optim.SGD, lr=0.1))
    attempt({}, lossfn=WithParameters())
    attempt({}, phase=OwnStep())
    attempt({}, model)
    attempt({"shard": nn.Linear}, model)
    attempt({"fsdp": {"mesh": init_device_mesh("cpu", (1,))}})
    attempt({"fsdp": {"mesh": init_device_mesh("cpu", (2, 1))}})
    attempt({"fsdp": {"offload_policy": CPUOffloadPolicy()}})
    attempt({"fsdp": {"reshard_after_forward": "often"}})
    return found


def test_what_cannot_be_sharded(ranks: Ranks) -> None:
    zero, one = returned(ranks.run_on(2, 60, refused))
    assert zero == one
    nothing, function, unknown, optimizer, several, loss, step, model, twice, part, unnamed, pinned, often = zero
    assert "fits no submodule of Sequential, whose submodules are of Linear, ReLU. Write one of these" in nothing
    assert function == "accepted"
    assert "'reshard': ...} is no argument of fully_shard." in unknown
    assert "reshard_after_forward" in unknown
    assert "optimizer is a SGD that was made before the model is sharded" in optimizer
    assert "Pass a function, which is called with the new ones: optimizer=partial(torch.optim.SGD, lr=...)" in optimizer
    assert "parallel='fsdp' trains one model, and the learner has gen, disc. Write parallel='ddp'" in several
    assert "The loss function WithParameters has parameters, which parallel='fsdp' does not shard" in loss
    assert "OwnStep has a step of its own" in step
    assert "TorchCore(parallel='ddp')" in step
    assert model == "accepted"
    assert "The model is sharded already, and shard= or fsdp= was given too." in twice
    assert "is a mesh of 1 ranks, and 2 train. All of them train one model: write init_device_mesh('cpu', (2,))" in part
    assert "is a mesh of shape (2, 1) without names" in unnamed
    assert "Write init_device_mesh('cpu', (2, 1), mesh_dim_names=('replicate', 'shard'))." in unnamed
    assert "Write CPUOffloadPolicy(pin_memory=False), or leave it out" in pinned
    assert "fully_shard cannot shard Sequential with fsdp={'reshard_after_forward': 'often'}: " in often
