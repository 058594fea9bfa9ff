"""What one rank does alone: all ranks end together and say why, or train on with equal weights and counts.

Cancels and errors that are raised before the update count in their batch on all ranks; those that are raised later
count in the next one.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Callback,
    CancelBatchException,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    Learner,
    LearnerView,
    LossBegin,
    Phase,
    TorchCore,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    on,
)
from tests.ranks.alone import (
    BATCHES,
    SGD,
    Alone,
    End,
    FailingLoader,
    FailingLoss,
    FailingModel,
    FailingOptimizer,
    SizedFailingLoader,
    Unsized,
    by_hand,
    fit,
    model,
)
from tests.ranks.by_hand import classes, differing, train, trained
from tests.support.ranks import Outcome, Ranks, needs_sharding, rank, returned

TIME = 10.0
"""Seconds in which all ranks must have ended."""

EARLY: list[type[Event]] = [BatchBegin, LossBegin, BackwardBegin, BackwardEnd, UpdateBegin]
LATE: list[type[Event]] = [UpdateEnd, BatchEnd]
AROUND: list[type[Event]] = [FitBegin, EpochBegin, EpochEnd, FitEnd]
VALIDATING: list[type[Event]] = [EpochBegin, BatchBegin, LossBegin, BatchEnd, EpochEnd]
CANCELS = ["batch", "epoch", "fit"]


class Asks(nn.Module):
    """The usual model; on rank 1 it raises the error of a server that it asks, in its n-th call."""

    def __init__(self, training: bool, nth: int) -> None:
        super().__init__()
        self.inner, self.kind, self.left = model(), training, nth

    def forward(self, inputs: Tensor) -> Any:
        if self.training is self.kind and rank() == 1:
            self.left -= 1
            if not self.left:
                raise RuntimeError("Connection reset by peer")
        return self.inner(inputs)


Result = tuple[End, dict[str, Any]]
"""The end of a rank, and the weights of a training by hand with which its own are compared."""


def run(ranks: Ranks, function: Callable[..., Result], *arguments: Any) -> tuple[Result, Result]:
    """Return the results of both ranks, which must have come in time."""
    zero, one = returned(ranks.run_on(2, TIME, function, *arguments))
    return zero, one


Case = tuple[type[Event], type[Phase], int]
"""The n-th firing of an event in a phase."""

CASES: list[Case] = [
    *((event, TrainingPhase, 2) for event in (*EARLY, *LATE)),
    (BatchEnd, TrainingPhase, BATCHES),
    *((event, Phase, 1) for event in AROUND),
    *((event, ValidationPhase, 1) for event in VALIDATING),
]


def act(action: str, *cases: Case) -> list[Result]:
    """Act on rank 1 alone in each case, in a fit of its own, whatever the fits before have ended with.

    Returns:
        The ends, and the weights by hand as if all ranks had acted before the update.
    """
    dist.init_process_group("gloo")
    batches = classes(BATCHES)
    epochs = {"batch": [batches[:1] + batches[2:], batches], "epoch": [batches[:1], batches]}
    return [(fit(Alone(*case[:2], action, case[2])), by_hand(*epochs.get(action, [batches[:1]]))) for case in cases]


Acted = Callable[[str, type[Event], type[Phase], int], tuple[Result, Result]]


@pytest.fixture(scope="module")
def acted(ranks: Ranks) -> Acted:
    """Return a function that acts on rank 1 alone and returns the results of both ranks.

    To start ranks takes longer than a fit, so all cases of a cancel come one after the other on the same ranks. After
    an error or a signal, ranks start anew.
    """
    known: dict[str, dict[Case, tuple[Result, Result]]] = {}

    def find(action: str, event: type[Event], phase: type[Phase], nth: int) -> tuple[Result, Result]:
        if action in CANCELS and action not in known:
            both = returned(ranks.run_on(2, 2 * TIME, act, action, *CASES))
            known[action] = dict(zip(CASES, zip(*both, strict=True), strict=True))
        if action in known:
            return known[action][event, phase, nth]
        [zero], [one] = returned(ranks.run_on(2, TIME, act, action, (event, phase, nth)))
        return zero, one

    return find


def check_error(zero: End, one: End) -> None:
    """Check that rank 1 has its own error, and rank 0 one that says so."""
    assert one.error is not None
    assert zero.error is not None
    assert (one.error.kind, one.error.text) == ("ValueError", "only here")
    assert zero.error.kind == "RemoteError"
    assert "rank 1: ValueError: only here" in zero.error.text
    assert zero.events.endswith("F)")
    assert one.events.endswith("F)")


def check_stopped(zero: End, one: End) -> None:
    """Check that both fits were ended by the cancel of rank 1."""
    assert one.stopped == "only here"
    assert zero.stopped is not None
    assert "only here" in zero.stopped


@pytest.mark.parametrize("event", EARLY)
@pytest.mark.parametrize("action", [*CANCELS, "error"])
def test_before_the_update_it_counts_in_this_batch(event: type[Event], action: str, acted: Acted) -> None:
    (zero, expected), (one, _) = acted(action, event, TrainingPhase, 2)
    assert zero.unlike(one) == []
    assert zero.events == one.events
    assert differing(zero.weights, expected) == []
    if action == "error":
        check_error(zero, one)
    elif action == "fit":
        check_stopped(zero, one)
    else:
        assert (zero.error, one.error, zero.stopped, one.stopped) == (None, None, None, None)


@pytest.mark.parametrize("event", LATE)
@pytest.mark.parametrize("action", [*CANCELS, "error"])
def test_after_it_all_ranks_still_end_alike(event: type[Event], action: str, acted: Acted) -> None:
    (zero, _), (one, _) = acted(action, event, TrainingPhase, 2)
    if action == "error":
        check_error(zero, one)
        return
    assert zero.unlike(one) == []
    if action == "fit":
        check_stopped(zero, one)
    else:
        assert (zero.error, one.error, zero.stopped, one.stopped) == (None, None, None, None)
        assert zero.counts[0] == one.counts[0] == 2


@pytest.mark.parametrize("action", CANCELS)
def test_after_the_update_of_the_last_batch_a_cancel_ends_no_more_than_in_one_process(
    action: str, acted: Acted
) -> None:
    (zero, _), (one, _) = acted(action, BatchEnd, TrainingPhase, BATCHES)
    assert zero.unlike(one) == []
    assert zero.events == one.events
    assert (zero.error, one.error) == (None, None)
    if action == "fit":
        check_stopped(zero, one)
    else:
        assert (zero.stopped, one.stopped) == (None, None)
        assert zero.counts[:2] == (2, 2 * BATCHES)


class CancellingLoss:
    """Cross entropy; cancels the batch in its n-th call on rank 1."""

    def __init__(self, nth: int) -> None:
        self.left = nth

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.left -= rank()
        if not self.left:
            raise CancelBatchException("only here")
        return cross_entropy(outputs, targets)


def cancel_in_open_group(batches: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Cancel the last of some batches, of which two make an update, in a loader without a length."""
    dist.init_process_group("gloo")
    data, made = classes(batches), model()
    with Learner(
        made, CancellingLoss(batches), data=Unsized(data), optimizer=SGD, core=TorchCore(device="cpu", accumulate=2),
        default_callbacks=False,
    ) as learner:  # fmt: skip
        learner.fit(1)
    expected = model()
    return trained(made, learner.optimizer), trained(expected, train(expected, SGD, [data[: batches // 2 * 2]], 2))


def test_a_batch_that_is_cancelled_in_the_open_group_at_the_end_of_an_epoch_leaves_no_update(ranks: Ranks) -> None:
    """The ranks learn of it at the end of the batches, as there is no message in a batch that only accumulates."""
    for weights, expected in ranks.values(cancel_in_open_group, 3):
        assert differing(weights, expected) == []


@pytest.mark.parametrize("event", AROUND)
@pytest.mark.parametrize("action", [*CANCELS, "error"])
def test_at_the_ends_of_epoch_and_fit(event: type[Event], action: str, acted: Acted) -> None:
    (zero, _), (one, _) = acted(action, event, Phase, 1)
    assert zero.unlike(one) == []
    if action == "error":
        check_error(zero, one)
    elif action == "fit" and event is not FitEnd:
        check_stopped(zero, one)
    else:
        assert (zero.error, one.error, zero.stopped, one.stopped) == (None, None, None, None)


@pytest.mark.parametrize("event", VALIDATING)
@pytest.mark.parametrize("action", [*CANCELS, "error"])
def test_in_validation(event: type[Event], action: str, acted: Acted) -> None:
    (zero, _), (one, _) = acted(action, event, ValidationPhase, 1)
    assert zero.unlike(one) == []
    if action == "error":
        check_error(zero, one)
    elif action == "fit":
        check_stopped(zero, one)
    else:
        assert (zero.error, one.error, zero.stopped, one.stopped) == (None, None, None, None)


def fail_in(place: str, nth: int) -> Result:
    dist.init_process_group("gloo")
    batches, data = classes(BATCHES), dict[str, Any]()
    if "loader" in place:
        kind = SizedFailingLoader if place == "loader with a length" else FailingLoader
        data["data"] = (kind(batches), classes(2))
    elif place == "loss":
        data["lossfn"] = FailingLoss(nth)
    elif place == "optimizer":
        data["optimizer"] = lambda params: FailingOptimizer(params, lr=0.1)
    elif place == "model":
        data["model"] = FailingModel(nth)
    return fit(**data), by_hand(batches[: 2 if "loader" in place else nth - 1])


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("place", ["model", "loss"])
def test_an_error_of_model_or_loss_ends_all(place: str, nth: int, ranks: Ranks) -> None:
    (zero, expected), (one, _) = run(ranks, fail_in, place, nth)
    assert zero.unlike(one) == []
    if place == "loss":
        assert one.error is not None
        assert one.error.cause is not None
        assert (one.error.kind, one.error.cause.text) == ("LossError", "only here")
        assert zero.error is not None
        assert zero.error.kind == "RemoteError"
        assert "rank 1: LossError: " in zero.error.text
        assert differing(zero.weights, expected) == []
    else:
        check_error(zero, one)


@pytest.mark.parametrize("place", ["loader with a length", "loader without a length"])
def test_an_error_of_a_loader_ends_all(place: str, ranks: Ranks) -> None:
    (zero, expected), (one, _) = run(ranks, fail_in, place, 2)
    assert zero.unlike(one) == []
    check_error(zero, one)
    assert differing(zero.weights, expected) == []


def ask_a_server(parallel: Literal["ddp", "fsdp"], training: bool, nth: int) -> None:
    fit(model=Asks(training, nth), core=TorchCore(device="cpu", parallel=parallel), raises=True)


@pytest.mark.parametrize(("training", "nth"), [(True, 1), (True, 2), (False, 1)])
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=needs_sharding)])
def test_an_error_with_the_words_of_a_lost_connection_is_that_of_the_model(
    parallel: Literal["ddp", "fsdp"], training: bool, nth: int, ranks: Ranks
) -> None:
    zero, one = ranks.run_on(2, TIME, ask_a_server, parallel, training, nth)
    assert (zero.ended, one.ended) == ("RemoteError", "RuntimeError")
    assert zero.error is not None
    assert "rank 1: RuntimeError: Connection reset by peer" in zero.error.text


def test_an_error_of_an_optimizer_ends_all(ranks: Ranks) -> None:
    (zero, _), (one, _) = run(ranks, fail_in, "optimizer", 2)
    check_error(zero, one)


def lose(value: float) -> Result:
    dist.init_process_group("gloo")
    batches = classes(BATCHES)
    expected = by_hand(batches[:1])
    if rank() == 1:
        batches[1] = (torch.full_like(batches[1][0], value), batches[1][1])
    return fit(data=(batches, classes(2))), expected


def test_a_nan_on_one_rank_stops_all_before_the_update(ranks: Ranks) -> None:
    (zero, expected), (one, _) = run(ranks, lose, float("nan"))
    assert zero.unlike(one) == []
    assert differing(zero.weights, expected) == []
    assert one.stopped is not None
    assert zero.stopped is not None
    assert one.stopped.startswith("The loss is NaN in batch 2 of epoch 1")
    assert "The loss is NaN in batch 2 of epoch 1" in zero.stopped


@pytest.mark.parametrize("event", [BatchBegin, BatchEnd])
@pytest.mark.parametrize("action", ["SIGTERM", "SIGINT", "SIGTERM to all", "SIGINT to all"])
def test_a_signal_interrupts_all(event: type[Event], action: str, acted: Acted) -> None:
    (zero, _), (one, _) = acted(action, event, TrainingPhase, 2)
    assert zero.unlike(one) == []
    for end in (zero, one):
        assert end.error is not None
        assert end.error.kind == "KeyboardInterrupt"
        assert action.split()[0] in end.error.text
        assert end.events.endswith("F)")


class SignalsGroup(Callback):
    """Sends a signal to ranks and to the workers of their loaders, as a terminal and a scheduler do, in batch 2."""

    ranks = "every"

    def __init__(self, number: signal.Signals, on_ranks: tuple[int, ...]) -> None:
        self.number, self.on_ranks, self.left = number, on_ranks, 2

    @on(BatchBegin, TrainingPhase)
    def send(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        self.left -= 1
        if not self.left and rank() in self.on_ranks:
            group = [str(child.pid) for child in multiprocessing.active_children()] + [str(os.getpid())]
            # Another process sends it: a worker takes a signal of its parent for the end of the data.
            subprocess.run(["kill", f"-{self.number.value}", *group], check=True, start_new_session=True)


def signal_group(number: signal.Signals, on_ranks: tuple[int, ...]) -> Result:
    dist.init_process_group("gloo")
    both = [[torch.cat(each) for each in zip(*classes(BATCHES, of_rank), strict=True)] for of_rank in range(2)]
    tensors = [torch.stack(each, 1).flatten(0, 1) for each in zip(*both, strict=True)]  # divided sample by sample
    data = DataLoader(TensorDataset(*tensors), 6, num_workers=1, multiprocessing_context="fork")
    return fit(SignalsGroup(number, on_ranks), data=(data, classes(2))), by_hand(classes(BATCHES)[:2])


@pytest.mark.slow
@pytest.mark.parametrize("on_ranks", [(0, 1), (1,)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_workers_of_loaders_too_interrupts_all(
    number: signal.Signals, on_ranks: tuple[int, ...], ranks: Ranks
) -> None:
    (zero, expected), (one, _) = run(ranks, signal_group, number, on_ranks)
    assert zero.unlike(one) == []
    assert differing(zero.weights, expected) == []
    for end in (zero, one):
        assert end.error is not None
        assert end.error.kind == "KeyboardInterrupt"
        assert number.name in end.error.text
        assert end.events.endswith("F)")


def uneven(kind: str, own: int, other: int, accumulate: int) -> Result:
    """Train with `own` batches on rank 1 and `other` batches on rank 0."""
    dist.init_process_group("gloo")
    batches = classes(own if rank() == 1 else other)
    data: Any = Unsized(batches) if kind == "without a length" else batches
    end = fit(data=(data, classes(1 + rank())), core=TorchCore(device="cpu", accumulate=accumulate))
    return end, by_hand(*[batches[: min(own, other)]] * 2)


@pytest.mark.parametrize("kind", ["with a length", "without a length"])
@pytest.mark.parametrize(("own", "other"), [(3, 5), (5, 3)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_epoch_is_as_long_as_the_shortest(kind: str, own: int, other: int, accumulate: int, ranks: Ranks) -> None:
    (zero, expected), (one, _) = run(ranks, uneven, kind, own, other, accumulate)
    assert (zero.error, one.error, zero.stopped, one.stopped) == (None, None, None, None)
    assert zero.unlike(one) == []
    assert zero.counts[:2] == (2, 6)
    if accumulate == 1:
        assert differing(zero.weights, expected) == []


def leave(event: type[Event], action: str, timeout: float) -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
    fit(Alone(event, TrainingPhase, action, 2), raises=True)


def launch(ranks: Ranks, event: type[Event], action: str, timeout: float = 60) -> tuple[Outcome[None], Outcome[None]]:
    zero, one = ranks.run_on(2, TIME, leave, event, action, timeout)
    assert "timed out" not in (zero.ended, one.ended), f"{zero}\n{one}"
    return zero, one


@pytest.mark.parametrize("event", [BatchBegin, BatchEnd, EpochEnd])
def test_a_rank_that_is_killed_ends_all(event: type[Event], ranks: Ranks) -> None:
    zero, one = launch(ranks, event, "SIGKILL")
    assert (zero.code, one.code) == (1, -signal.SIGKILL)


def test_a_rank_that_stands_still_ends_all_after_the_time_out(ranks: Ranks) -> None:
    zero, one = launch(ranks, BatchBegin, "SIGSTOP", timeout=2)
    assert (zero.code, one.code) == (1, -signal.SIGKILL)
    assert zero.error is not None


@pytest.mark.parametrize(("action", "code"), [("error", 1), ("SIGTERM", -signal.SIGINT), ("fit", 0), ("batch", 0)])
def test_the_exit_codes_are_those_of_one_process(action: str, code: int, ranks: Ranks) -> None:
    zero, one = launch(ranks, BatchBegin, action)
    assert (zero.code, one.code) == (code, code)


def disagree() -> Result:
    dist.init_process_group("gloo")
    batches = classes(BATCHES)
    cancels = [Alone(BatchBegin, TrainingPhase, action, 2, number) for number, action in enumerate(["batch", "fit"])]
    return fit(*cancels), by_hand(batches[:1])


def test_of_two_ranks_the_worse_one_decides(ranks: Ranks) -> None:
    (zero, expected), (one, _) = run(ranks, disagree)
    assert zero.unlike(one) == []
    assert differing(zero.weights, expected) == []
    check_stopped(zero, one)
