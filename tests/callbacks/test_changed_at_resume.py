"""A fit resumes with another set of callbacks: each bundled one is dropped, added, or has another name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from flowtrain import Callback, EpochEnd, Learner, TrainingPhase
from flowtrain.callbacks import LogHyperParams
from flowtrain.logging import JsonlBackend
from flowtrain.state.series import SeriesMap
from flowtrain.testing import tiny_learner
from tests.support.bundled import KINDS, case_of, cycle, twice
from tests.support.resumed import Ask

# In the default set: `tiny_learner` has them in any case, and a second one is refused.
DEFAULTS = {"Metrics", "Recorder"}


def learner_of(kind: type[Callback], *callbacks: Callback) -> Learner:
    options = {name: value for name, value in case_of(kind).options.items() if name != "lossfn"}
    return tiny_learner(*callbacks, n_batches=2, **options)


def made(folder: Path, kind: type[Callback]) -> tuple[Callback, ...]:
    return case_of(kind).make(folder)


def ask(folder: Path) -> Ask:
    return Ask(folder / "a.ckpt", EpochEnd, TrainingPhase, 1)


def resumed(make: Callable[[], Learner], path: Path) -> tuple[list[str], int]:
    """Resume, and return the texts of the warnings, and how many epochs the learner has then."""
    with warnings.catch_warnings(record=True) as caught, make() as learner:
        warnings.simplefilter("always")
        learner.fit(2, resume=path)
        return [str(each.message) for each in caught], learner.cbstate.history[TrainingPhase].epochs


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("how", ["dropped", "added", "renamed"])
def test_a_changed_set_of_callbacks(kind: type[Callback], how: str, tmp_path: Path) -> None:
    """The fit continues. If the checkpoint has state of the callback that is not used, a warning names it."""
    if kind.__name__ in DEFAULTS and how != "renamed":
        pytest.skip("tiny_learner always has it")
    before, after = tmp_path / "before", tmp_path / "after"
    there = () if how == "added" else made(before, kind)
    with learner_of(kind, ask(tmp_path), *there) as learner:
        learner.fit(1)
        held = [each for each in learner.callbacks if any(each is other for other in there)]
        has_state = [each.name for each in held if each.state_dict()]
    here = () if how == "dropped" else made(after, kind)
    if how == "renamed":
        for each in here:
            each.name = f"Other{type(each).__name__}"
    said, epochs = resumed(lambda: learner_of(kind, ask(after), *here), tmp_path / "a.ckpt")
    assert epochs == 2
    lost = has_state if how in ("dropped", "renamed") else []
    named = [text for text in said if "has the state of" in text]
    assert len(named) == bool(lost)
    for name in lost:
        assert name in named[0]


def test_a_reader_without_the_callback_that_wrote_its_state(tmp_path: Path) -> None:
    """The state of the checkpoint comes back in the containers that the missing callbacks had made."""

    def readers(folder: Path) -> tuple[Callback, ...]:
        log = JsonlBackend(folder / "log.jsonl", append=True)
        return (LogHyperParams(log),)

    with tiny_learner(*readers(tmp_path), cycle(), twice(), ask(tmp_path), n_batches=2) as learner:
        learner.fit(1)
    with tiny_learner(*readers(tmp_path), n_batches=2) as learner:
        with pytest.warns(UserWarning, match="has the state of Scheduler, and the learner has no callback of that"):
            learner.fit(2, resume=tmp_path / "a.ckpt")
        assert isinstance(learner.cbstate.hyperparams, SeriesMap)
        assert len(learner.cbstate.hyperparams["LearningRate"]) == 2
        assert len(learner.cbstate.tracehistory[TrainingPhase]["Twice"]) == 2
        assert learner.cbstate.history[TrainingPhase].epochs == 2
