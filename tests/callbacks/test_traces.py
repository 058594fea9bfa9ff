"""Traces: records values that functions compute from the learner."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flowtrain import (
    AbstractValidationPhase,
    EpochEnd,
    HandlerError,
    LearnerView,
    ProtectedException,
    Read,
    TrainingPhase,
    ValidationPhase,
    Write,
    WriteConflictError,
)
from flowtrain.callbacks import Traces
from flowtrain.testing import tiny_batches, tiny_learner
from tests.support.fired import OODPhase


def squared(learner: LearnerView) -> torch.Tensor:
    loss: torch.Tensor = learner.batch.loss
    return loss**2


def test_values_are_recorded_at_the_step_they_belong_to() -> None:
    learner = tiny_learner(Traces({"Squared": squared, "One": lambda learner: 1}, TrainingPhase), n_batches=3)
    learner.fit(2)
    losses = list(learner.cbstate.metrics_step[TrainingPhase]["Loss"])
    trace = learner.cbstate.tracehistory[TrainingPhase]
    assert list(trace["Squared"]) == [(step, pytest.approx(loss**2)) for step, loss in losses]
    assert list(trace["One"]) == [(step, 1) for step in range(1, 7)]
    assert ValidationPhase not in learner.cbstate.tracehistory


def test_another_event_and_a_wider_phase() -> None:
    batches = tiny_batches(n_batches=2)
    traces = Traces({"Squared": squared}, AbstractValidationPhase, EpochEnd)
    data = {TrainingPhase: batches, ValidationPhase: batches, OODPhase: batches[:1]}
    learner = tiny_learner(traces, data=data)
    learner.fit(2)
    history = learner.cbstate.tracehistory
    assert [step for step, _ in history[ValidationPhase]["Squared"]] == [2, 4]
    assert [step for step, _ in history[OODPhase]["Squared"]] == [1, 2]
    assert TrainingPhase not in history


def test_two_with_different_names_live_side_by_side() -> None:
    """Rule 7: they write different paths."""
    one = Traces({"One": squared}, TrainingPhase)
    two = Traces({"Two": squared, "Three": squared}, TrainingPhase)
    learner = tiny_learner(one, two, n_batches=2)
    learner.fit(1)
    history = learner.cbstate.tracehistory[TrainingPhase]
    assert sorted(history) == ["One", "Three", "Two"]
    assert list(history["One"]) == list(history["Two"]) == list(history["Three"])


def test_two_with_one_name_conflict_where_they_meet_and_only_there() -> None:
    """Rule 7: by event and phase."""
    with pytest.raises(WriteConflictError) as caught:
        tiny_learner(Traces({"Norm": squared}, TrainingPhase), Traces({"A": squared, "Norm": squared}, TrainingPhase))
    assert caught.value.callbacks == ("Traces", "Traces#2")
    assert caught.value.paths == ("cbstate.tracehistory.Norm", "cbstate.tracehistory.Norm")
    assert caught.value.event == "BatchEnd, TrainingPhase"
    learner = tiny_learner(Traces({"Norm": squared}, TrainingPhase), Traces({"Norm": squared}, ValidationPhase))
    learner.fit(1)
    assert len(learner.cbstate.tracehistory[ValidationPhase]["Norm"]) == 16


def test_none_records_nothing_and_other_types_are_refused() -> None:
    learner = tiny_learner(Traces({"Odd": lambda learner: 1 if learner.batch.loss > 1e9 else None}), n_batches=2)
    learner.fit(1)
    assert not learner.cbstate.tracehistory[TrainingPhase].get("Odd")
    with pytest.raises(HandlerError) as caught:
        tiny_learner(Traces({"A": lambda learner: "x"}), n_batches=2).fit(1)
    assert str(caught.value).startswith(
        "The trace 'A' returned str 'x': return a number or a tensor, or None to record nothing."
    )


@pytest.mark.parametrize(("value", "wanted"), [(np.bool_(1), True), (np.float32(0.5), 0.5), (np.array(2), 2)])
def test_numbers_of_numpy_are_numbers(value: Any, wanted: Any) -> None:
    learner = tiny_learner(Traces({"A": lambda learner: value}, TrainingPhase), n_batches=1)
    learner.fit(1)
    found = learner.cbstate.tracehistory[TrainingPhase]["A"].values
    assert (found, type(found[0])) == ([wanted], type(wanted))


def test_the_default_access_is_the_batch_and_nothing_else() -> None:
    assert Traces({"Squared": squared}, TrainingPhase).state_access() == {
        "batch": Read(),
        "cbstate.history": Read(),
        "cbstate.tracehistory.Squared": Write(),
    }
    learner = tiny_learner(Traces({"Coeff": lambda learner: learner.model.coeff}, TrainingPhase))
    with pytest.raises(ProtectedException, match=r"Read access to Learner\.model"):
        learner.fit(1)


def test_a_parameter_is_recorded_as_the_number_it_was() -> None:
    def coeff(learner: LearnerView) -> Any:
        return learner.model.coeff

    def twice(learner: LearnerView) -> Any:
        return learner.model.coeff.expand(2)

    traces = Traces({"Coeff": coeff, "Twice": twice}, TrainingPhase, access={"model": Read()})
    learner = tiny_learner(traces, n_batches=3)
    learner.fit(1)
    history = learner.cbstate.tracehistory[TrainingPhase]
    values = [value for _, value in history["Coeff"]]
    assert values == sorted(set(values))  # it approaches 3 from 0; a reference would show the last value at every step
    assert len(values) == 3
    assert values[-1] == learner.model.coeff.item()
    assert [value.tolist() for _, value in history["Twice"]] == [[value, value] for value in values]
    assert not any(value.requires_grad for _, value in history["Twice"])


def test_a_function_that_touches_more_is_to_be_given_more() -> None:
    """Rule 3: the error says which argument to pass, since a user cannot edit `state_access` of the bundled type."""
    traces = Traces({"Rate": lambda learner: learner.optimizer.param_groups[0]["lr"]}, TrainingPhase, access={})
    with pytest.raises(ProtectedException) as caught:
        tiny_learner(traces).fit(1)
    assert str(caught.value).endswith(
        'Write learner.optimizer.hyperparams[0]["lr"] instead. Pass it what its function touches:\n\n'
        '    Traces(..., access={"optimizer.hyperparams": Read()})\n'
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, TrainingPhase), r"Traces\(\{\}, \.\.\.\) takes functions by name: Traces\(\{'Norm': f\}, Tr"),
        ((squared, TrainingPhase), r"takes functions by name"),
        (({"Norm": 3}, TrainingPhase), r"Traces\(\{'Norm': 3\}, \.\.\.\) takes functions by name"),
        (({"a.b": squared}, TrainingPhase), r"The trace 'a\.b' needs a name without dots"),
        (({3: squared}, TrainingPhase), r"The trace 3 needs a name without dots"),
        (({"": squared}, TrainingPhase), r"The trace '' needs a name"),
        (({"Norm": squared}, EpochEnd), r"Traces got <class '.*EpochEnd'> where a subclass of Phase belongs\. Write"),
        (({"Norm": squared}, TrainingPhase, ValidationPhase), r"where a subclass of Event belongs"),
    ],
)
def test_mistakes(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(HandlerError, match=message):
        Traces(*arguments)
