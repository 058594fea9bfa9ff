"""Steps: the runners of the bundled steps, their errors for data that does not fit, and the parts for a user's step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from flowtrain import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Access,
    BackwardBegin,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFittingException,
    CoreError,
    DataError,
    Learner,
    LearnerView,
    LossError,
    Phase,
    Read,
    StepContext,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.errors.describing import describe
from flowtrain.testing import tiny_batches, tiny_learner
from flowtrain.training.dispatch import StepRunners
from tests.support.fired import Raise, Watch, short, watched
from tests.support.phases import OwnPhase

TYPES = [Phase, AbstractTrainingPhase, TrainingPhase, AbstractValidationPhase, ValidationPhase]
SUPERVISED: list[type[AbstractTrainingPhase | AbstractValidationPhase]] = [
    AbstractTrainingPhase,
    AbstractValidationPhase,
]


def test_there_is_a_runner_for_each_event_of_a_step() -> None:
    assert {*StepRunners.events, "call_model", "pairs", "watched"} == set(StepRunners.__slots__)
    assert set(StepRunners.events.values()) <= set(AbstractTrainingPhase.events or ())


class SeesLoss(Callback):
    def __init__(self) -> None:
        self.graphs: list[bool] = []

    def state_access(self) -> Access:
        return {"batch.loss": Read()}

    @on(BatchEnd, TrainingPhase)
    def see(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.graphs.append(learner.batch.loss.requires_grad)


@pytest.mark.parametrize("callbacks", [[], [SeesLoss()]], ids=["nobody looks", "somebody looks"])
def test_the_loss_is_detached_when_it_can_be_looked_at(callbacks: list[SeesLoss]) -> None:
    learner = tiny_learner(*callbacks, default_callbacks=False)
    learner.epoch(TrainingPhase)
    assert not learner.batch.loss.requires_grad
    assert not learner.step(TrainingPhase, tiny_batches(n_batches=1)[0]).loss.requires_grad
    assert not any(graph for each in callbacks for graph in each.graphs)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.zeros(2, dtype=torch.int64), "Tensor of shape (2,), int64"),
        (torch.nn.Parameter(torch.zeros(())), "Parameter of shape (), float32"),
        (np.zeros((2, 3), dtype=np.float64), "ndarray of shape (2, 3), float64"),
        ((), "tuple of 0"),
        ([torch.zeros(1), [1]], "list of 2: Tensor of shape (1,), float32, list of 1: int 1"),
        ([1, 2, 3, 4], "list of 4: int 1, int 2, int 3, ..."),
        ({}, "dict with keys "),
        (dict.fromkeys(range(9), 0), "dict with keys 0, 1, 2, 3, 4, 5"),
        ("x" * 100, f"str '{'x' * 59}"),
    ],
)
def test_describe(value: Any, said: str) -> None:
    assert describe(value) == said


# --- the step


def quiet(lossfn: Any, **more: Any) -> Any:
    return tiny_learner(lossfn=lossfn, default_callbacks=False, **more)


def half(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return mse_loss(outputs, targets, reduction="none")


@pytest.mark.parametrize("kind", [TrainingPhase, ValidationPhase])
def test_a_loss_that_is_no_single_number(kind: type[Phase]) -> None:
    with pytest.raises(LossError) as caught:
        quiet(half).step(kind, (torch.ones(2, 1), torch.ones(2, 1)))
    assert str(caught.value) == (
        f"The loss function half returned Tensor of shape (2, 1), float32, which is no single number\n"
        f"In {kind.__name__} it was called with batch.outputs: Tensor of shape (2, 1), float32 and batch.targets: "
        f"Tensor of shape (2, 1), float32. The model and the loss must fit: change the model's last layer, the targets "
        f"that the dataset returns, or wrap the loss in a function of (outputs, targets) that returns a tensor with "
        f"one element."
    )


def test_a_loss_that_does_not_fit_the_model() -> None:
    with pytest.raises(LossError, match=r"The loss function cross_entropy raised RuntimeError: ") as caught:
        quiet(cross_entropy).step(TrainingPhase, (torch.ones(2, 1), torch.ones(2, 1, dtype=torch.int32)))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "batch.targets: Tensor of shape (2, 1), int32" in str(caught.value)


def test_a_model_that_fails_keeps_its_error() -> None:
    learner = quiet(mse_loss, model=torch.nn.Linear(3, 1))
    with pytest.raises(RuntimeError, match="shapes") as caught:
        learner.step(TrainingPhase, (torch.ones(2, 1), torch.ones(2, 1)))
    assert caught.value.__notes__[0] == (
        "raised by the model in TrainingPhase, called with batch.inputs: Tensor of shape (2, 1), float32"
    )


# --- the result of an overridden split


class Pair(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor


class Split(TrainingPhase):
    """A phase whose `split` is the function `Split.made` that the test sets."""

    made: Callable[[Any], Any] = staticmethod(tuple)

    def split(self, raw: Any) -> Any:
        return type(self).made(raw)


X, Y = torch.zeros(8, 4), torch.zeros(8, dtype=torch.int64)


NO_PAIRS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda raw: raw[0], "Tensor of shape (8, 4), float32"),
    (lambda raw: raw[0][:2], "Tensor of shape (2, 4), float32"),  # it could be unpacked into two rows
    (lambda raw: None, "NoneType None"),
    (lambda raw: (raw[0],), "tuple of 1: Tensor of shape (8, 4), float32"),
    (lambda raw: "ab", "str 'ab'"),
    (lambda raw: {"x": raw[0], "y": raw[1]}, "dict with keys 'x', 'y'"),
]


@pytest.mark.parametrize(("made", "got"), NO_PAIRS)
def test_a_split_that_gives_no_pair(monkeypatch: pytest.MonkeyPatch, made: Callable[[Any], Any], got: str) -> None:
    monkeypatch.setattr(Split, "made", staticmethod(made))
    learner = quiet(cross_entropy, model=torch.nn.Linear(4, 2), data={Split: [(X, Y)]})
    with pytest.raises(DataError) as caught:
        learner.fit(1)
    assert str(caught.value) == f"Split.split(raw) must return (inputs, targets), or (raw, None), got {got}."


@pytest.mark.cpu_only("looks for the tensor of the loader itself")
@pytest.mark.parametrize("made", [tuple, list, Pair._make])
def test_a_split_that_gives_a_pair(monkeypatch: pytest.MonkeyPatch, made: Callable[[Any], Any]) -> None:
    monkeypatch.setattr(Split, "made", staticmethod(made))
    batch = quiet(cross_entropy, model=torch.nn.Linear(4, 2)).step(Split, (X, Y))
    assert batch.inputs is X
    assert batch.targets is Y


# --- a loss without a graph


class Cuts(Callback):
    """Puts a loss without a graph into the batch."""

    @on(BackwardBegin, access={"batch.loss": Write()})
    def cut(self, event: BackwardBegin, phase: Phase, learner: LearnerView) -> None:
        learner.batch.loss = learner.batch.loss.detach()


class OwnStep(AbstractTrainingPhase):
    """A user's step, which calls `backward` and the other parts."""

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self):
            learner.backward(self, learner.lossfn(learner.model(raw[0]), raw[1]))


def cut(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(outputs.detach(), targets)


@pytest.mark.parametrize(
    ("kind", "what", "more"),
    [
        (TrainingPhase, "batch.loss", {}),
        (TrainingPhase, "batch.loss", {"core": TorchCore(device="cpu", accumulate=2)}),
        (TrainingPhase, "batch.loss", {"lossfn": cross_entropy, "callbacks": [Cuts()]}),
        (OwnStep, "the loss", {}),
    ],
    ids=["plain", "accumulate", "handler", "own step"],
)
def test_a_loss_without_a_graph(kind: type[Phase], what: str, more: dict[str, Any]) -> None:
    options = {"lossfn": cut, "model": torch.nn.Linear(4, 2), "data": {kind: [(X, Y)]}, **more}
    with pytest.raises(LossError) as caught:
        quiet(**options).fit(1)
    assert str(caught.value) == (
        f"{kind.__name__} cannot run a backward pass: {what} is Tensor of shape (), float32, without a graph, so no "
        f"parameter can get a gradient from it. Something between the parameters and the loss cuts the graph: look for "
        f"detach(), item(), torch.tensor(...), torch.no_grad() and torch.inference_mode() in the model, the loss "
        f"function and around the call, and for frozen parameters (requires_grad_(False))."
    )
    assert "does not require grad" in str(caught.value.__cause__)


def twice(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    loss = cross_entropy(outputs, targets)
    loss.backward()
    return loss


@pytest.mark.parametrize("kind", [TrainingPhase, OwnStep])
def test_another_error_of_the_backward_pass_is_torchs_own(kind: type[Phase]) -> None:
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        quiet(twice, model=torch.nn.Linear(4, 2), data={kind: [(X, Y)]}).fit(1)


# --- run_batch


def test_a_step_may_catch_what_a_batch_raises() -> None:
    """Rule 16 holds for a step that continues after an exception: the batch that raised was closed."""

    class Halves(AbstractTrainingPhase):
        """Tries the whole batch; if it does not fit into memory, trains on its halves."""

        def step(self, learner: StepContext, raw: Any) -> None:
            try:
                self.train(learner, raw)
            except MemoryError:
                for half in zip(*(tensor.chunk(2) for tensor in raw), strict=True):
                    self.train(learner, half)

        def train(self, learner: StepContext, pair: Any) -> None:
            with learner.run_batch(self, inputs=pair[0], targets=pair[1]) as batch:
                if len(batch.inputs) > 4:
                    raise MemoryError
                loss = learner.lossfn(learner.model(batch.inputs), batch.targets)
                learner.backward(self, loss)
                learner.update(self)

    watch, learner = watched(data={Halves: tiny_batches(n_batches=1)})
    learner.fit(1)
    assert short(watch.names) == "F( E( B( Bx B( B) B( B) E) F)"


def test_a_failing_batch_begin_can_be_caught_too() -> None:
    class Careless(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            try:
                with learner.run_batch(self, inputs=raw):
                    raise AssertionError("the body is not entered")
            except ValueError:
                with learner.run_batch(self, inputs=raw):
                    pass

    watch, learner = watched(Raise(BatchBegin, ValueError("no")), data={Careless: [1]})
    learner.fit(1)
    assert short(watch.names) == "F( E( B( Bx B( B) E) F)"


def test_a_batch_inside_a_batch_is_refused() -> None:
    class Nested(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self), learner.run_batch(self):
                pass

    watch, learner = watched(data={Nested: [1]})
    with pytest.raises(UsageError, match=r"run_batch\(Nested\) was called inside an open batch. Leave that one first"):
        learner.fit(1)
    assert short(watch.names) == "F( E( B( Bx Ex F)"


# --- backward and update


@pytest.mark.parametrize("what", ["backward", "update"])
def test_backward_and_update_need_a_batch(what: str) -> None:
    class Outside(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            loss = learner.model(raw).sum()
            learner.backward(self, loss) if what == "backward" else learner.update(self)

    _, learner = watched(data={Outside: [torch.ones(1)]})
    with pytest.raises(UsageError, match=rf"{what}\(\) needs an open batch. Call it inside `with learner.run_batch"):
        learner.fit(1)


def test_backward_takes_one_number() -> None:
    class Wrong(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self):
                learner.backward(self, learner.model(raw))

    _, learner = watched(data={Wrong: [torch.ones(2)]})
    with pytest.raises(CoreError, match=r"backward\(Wrong, loss\) takes a tensor with one element, got tensor\("):
        learner.fit(1)


def test_update_of_an_optimizer_that_is_not_there() -> None:
    class Wrong(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self):
                learner.update(self, "gen")

    _, learner = watched(data={Wrong: [1]})
    with pytest.raises(CoreError, match=r"no such optimizer; the learner has one without a name: leave name= out\."):
        learner.fit(1)


def test_gradients_of_steps_without_update_add_up() -> None:
    """A phase may decide itself when to update; its gradients add up until then."""

    class EverySecond(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
                learner.backward(self, learner.lossfn(learner.model(batch.inputs), batch.targets))
                learner.cbstate.seen = getattr(learner.cbstate, "seen", 0) + 1
                if learner.cbstate.seen % 2 == 0:
                    learner.update(self)

    data = tiny_batches(n_batches=2)
    _, learner = watched(data={EverySecond: data})
    learner.fit(1)
    coeff = torch.zeros((), requires_grad=True)
    for x, y in data:
        torch.nn.functional.mse_loss(coeff * x, y).backward()
    assert coeff.grad is not None
    assert torch.equal(learner.model.coeff.detach(), -0.1 * coeff.grad)


def test_a_backward_pass_for_an_optimizer_that_is_not_there() -> None:
    class Wrong(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, x=raw) as batch:
                learner.backward(self, learner.model(batch.x).sum(), "gen")

    learner = Learner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, default_callbacks=False)
    with pytest.raises(CoreError, match=r"backward\(name='gen'\): there is no such optimizer"):
        learner.step(Wrong, torch.ones(2, 1))


# --- the learner that a step gets


def test_a_step_gets_what_its_context_documents() -> None:
    seen: dict[str, Any] = {}

    class Looks(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, x=raw):
                names = [name for name, value in vars(StepContext).items() if isinstance(value, property)]
                seen.update({name: getattr(learner, name) for name in names})

    _, learner = watched(data={Looks: [torch.ones(2)]})
    learner.fit(1)
    assert {*seen} == {"model", "lossfn", "optimizer", "params", "data", "batch", "cbstate"}
    for name, value in seen.items():
        assert value is getattr(learner, name) or value == getattr(learner, name), name


def test_a_step_that_asks_for_something_else_is_told_what_there_is() -> None:
    class Asks(AbstractTrainingPhase):
        def step(self, learner: Any, raw: Any) -> None:
            learner.get_callback(Watch)

    _, learner = watched(data={Asks: [1]})
    with pytest.raises(AttributeError) as caught:
        learner.fit(1)
    assert str(caught.value) == (
        "A step's learner has no 'get_callback'. It has model, lossfn, optimizer, params, data, batch, cbstate, and "
        "the methods run_batch, forward, backward, update and fire. Other objects that a step needs go into cbstate, "
        "by a callback's setup."
    )


def test_a_user_s_step_that_calls_the_bundled_one_trains_in_the_same_way() -> None:
    """The fast runner and the step that a user's step calls with ``super()`` train in the same way."""

    class Calls(TrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            super().step(learner, raw)

    def trained(phase: type[Phase]) -> tuple[list[str], torch.Tensor]:
        watch, learner = watched(data={phase: tiny_batches(n_batches=3)})
        learner.fit(2)
        return watch.names, learner.model.coeff.detach()

    (inherited, one), (called, other) = trained(TrainingPhase), trained(Calls)
    assert inherited == called
    assert torch.equal(one, other)


def test_a_model_that_raises_says_with_which_input() -> None:
    watch, learner = watched(data=[(torch.zeros(2, 3), torch.zeros(2, 3))], model=torch.nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match="mat1 and mat2") as raised:
        learner.fit(1)
    note = "raised by the model in TrainingPhase, called with batch.inputs: Tensor of shape (2, 3), float32"
    assert raised.value.__notes__ == [note, "in TrainingPhase, epoch 1, batch 1"]
    assert short(watch.names) == "F( E( B( Bx Ex F)"


@pytest.mark.cpu_only("the simulated device finds a wrong type only when it computes")
def test_a_step_that_swallows_an_exception_has_its_batch_cancelled() -> None:
    class Robust(TrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            try:
                super().step(learner, raw)
            except (RuntimeError, LossError):
                return

    bad = (torch.zeros(8, 1), torch.zeros(8, 1, dtype=torch.complex64))
    good = tiny_batches(n_batches=2)
    watch, learner = watched(Raise(BatchEnd, RuntimeError("late"), 2), data={Robust: [good[0], bad, good[1]]})
    learner.fit(1)
    assert short(watch.names) == "F( E( B( B) B( Bx B( B) E) F)"
    watch.log.clear()
    learner.step(Robust, bad)
    assert short(watch.names) == "B( Bx"


# --- what is kept of a batch, and what is said of its failure


class _Refuse(Callback):
    """Raises during a batch that has a graph, and keeps a weak reference to its loss."""

    def __init__(self, failure: Exception) -> None:
        self.failure = type(failure)
        self.seen: list[weakref.ref[Tensor]] = []

    @on(BackwardBegin, access={"batch.loss": Read()})
    def refuse(self, event: BackwardBegin, phase: Phase, learner: LearnerView) -> None:
        self.seen.append(weakref.ref(learner.batch.loss))
        raise self.failure("no")


class _RefuseToo(_Refuse):
    """A second callback that fails at the same event."""


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("failure", [CancelBatchException(), CancelEpochException(), CancelFittingException()])
def test_a_cancelled_batch_and_its_graph_are_not_kept(failure: Exception, own: bool) -> None:
    """The next batch frees them without the garbage collector, because no exception refers to itself in a cycle."""
    one, other = _Refuse(failure), _RefuseToo(failure)
    data = {OwnPhase if own else TrainingPhase: tiny_batches(n_batches=3)}
    learner = tiny_learner(one, other, data=data)
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            learner.fit(1)
        with suppress(CancelFittingException):
            learner.step(TrainingPhase, tiny_batches(n_batches=1)[0])  # this replaces the last batch
        losses = [*one.seen[:-1], *other.seen[:-1]]
        assert len(losses) >= 6
        assert [loss for loss in losses if loss() is not None] == []
    finally:
        gc.enable()


class _Unwatched(Callback):
    """Reads the loss of a cancelled batch, and nothing else."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def state_access(self) -> Access:
        return {"batch.loss": Read()}

    @on(BatchCancelled)
    def look(self, event: BatchCancelled, phase: Phase, learner: LearnerView) -> None:
        self.seen.append(learner.batch.loss.requires_grad)


def test_a_loss_has_no_graph_once_it_can_be_looked_at() -> None:
    """A step detaches the loss only if a callback can read it, as in a cancelled batch or in a user's step."""
    callback = _Unwatched()

    class Refuses(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise CancelBatchException("not this one")

    tiny_learner(
        callback, optimizer=partial(Refuses, lr=0.1), default_callbacks=False, data=tiny_batches(n_batches=2)
    ).fit(1)
    assert callback.seen == [False, False]
    seen: list[bool] = []

    class Inherits(TrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            super().step(learner, raw)
            seen.append(learner.batch.loss.requires_grad)

    tiny_learner(default_callbacks=False, data={Inherits: tiny_batches(n_batches=2)}).fit(1)
    assert seen == [False, False]


def test_the_batch_of_an_error_is_not_kept() -> None:
    """After an error, such as one for lack of memory, a learner that trains again keeps nothing of the failed batch."""
    callback = _Refuse(ValueError())
    learner = tiny_learner(callback)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with suppress(ValueError):
                learner.fit(1)
        assert [loss() is None for loss in callback.seen] == [True, True]  # `stopped` keeps a detached loss
    finally:
        gc.enable()
