"""CustomCallback: a function at an event."""

from __future__ import annotations

from typing import Any

import pytest

from flowtrain import (
    AccessError,
    BatchEnd,
    EpochEnd,
    Event,
    FitEnd,
    HandlerError,
    LearnerView,
    Phase,
    ProtectedException,
    Read,
    TrainingPhase,
    ValidationPhase,
)
from flowtrain.callbacks import CustomCallback
from flowtrain.testing import tiny_learner


def nothing(learner: LearnerView) -> None: ...


def test_it_calls_the_function_at_its_event_and_phase_only() -> None:
    seen: list[tuple[str, float]] = []

    def note(learner: LearnerView) -> None:
        seen.append(("train", learner.batch.loss.item()))

    access = {"batch.loss": Read()}
    fit_ends: list[int] = []
    learner = tiny_learner(
        CustomCallback(note, EpochEnd, TrainingPhase, access),
        CustomCallback(lambda learner: fit_ends.append(1), FitEnd),
        n_batches=2,
    )
    learner.fit(2)
    losses = [value for _, value in learner.cbstate.metrics_step[TrainingPhase]["Loss"]]
    assert seen == [("train", losses[1]), ("train", losses[3])]
    assert fit_ends == [1]


def test_without_a_phase_it_is_called_in_every_phase() -> None:
    phases: list[int] = []
    learner = tiny_learner(CustomCallback(lambda learner: phases.append(1), BatchEnd), n_batches=3)
    learner.fit(1)
    assert len(phases) == 6


def test_names() -> None:
    named = CustomCallback(nothing, BatchEnd)
    named.name = "Mine"
    learner = tiny_learner(CustomCallback(nothing, BatchEnd), named, CustomCallback(nothing, EpochEnd))
    assert [callback.name for callback in learner.callbacks][:3] == ["CustomCallback", "Mine", "CustomCallback#2"]
    assert learner.get_callback("Mine") is named


def test_what_is_not_declared_is_refused_in_its_name() -> None:
    """Rule 3: the error names the function."""
    learner = tiny_learner(CustomCallback(lambda learner: learner.batch.loss, EpochEnd, TrainingPhase))
    with pytest.raises(ProtectedException, match=r"^Read access to Learner\.batch\.loss disallowed\.") as caught:
        learner.fit(1)
    assert str(caught.value).endswith(
        "CustomCallback was given access to nothing. Pass it what its function touches:\n\n"
        '    CustomCallback(..., access={"batch.loss": Read()})\n'
    )
    assert any("raised in CustomCallback.call at (EpochEnd, TrainingPhase)" in note for note in caught.value.__notes__)


def test_a_wrong_declaration_is_one_of_the_argument() -> None:
    said = r"^CustomCallback\(access=\.\.\.\) declares 'bach', but a learner has no 'bach'\. Did you mean 'batch'\?"
    with pytest.raises(AccessError, match=said):
        tiny_learner(CustomCallback(nothing, BatchEnd, access={"bach": Read()}))


def lazy(learner: LearnerView) -> Any:
    yield learner


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("print", EpochEnd), r"CustomCallback\('print', ...\) takes a function of the learner first\."),
        (
            (lazy, EpochEnd),
            r"of the learner first, and this one has async or yield in it, .* Write def f\(learner",
        ),
        ((nothing, TrainingPhase), r"got <class '.*TrainingPhase'> where a subclass of Event belongs\. Write Custom"),
        ((nothing, EpochEnd()), r"got EpochEnd\(\) where a subclass of Event belongs"),
        ((nothing, EpochEnd, BatchEnd), r"got <class '.*BatchEnd'> where a subclass of Phase belongs"),
        ((nothing, EpochEnd, ValidationPhase()), r"got ValidationPhase where a subclass of Phase belongs"),
    ],
)
def test_mistakes(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(HandlerError, match=message):
        CustomCallback(*arguments)


def test_a_pair_that_never_fires_is_refused() -> None:
    with pytest.raises(HandlerError, match=r"can never run: FitEnd is fired with Phase\(\)"):
        tiny_learner(CustomCallback(nothing, FitEnd, TrainingPhase))


def test_events_of_ones_own() -> None:
    class Done(Event): ...

    seen: list[int] = []
    learner = tiny_learner(CustomCallback(lambda learner: seen.append(1), Done))
    learner.fire(Done(), Phase())
    learner.fire(Done(), TrainingPhase())
    assert seen == [1, 1]
