"""All bundled callbacks: each declares exactly the paths that it touches, as its docstring says, and does not race."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from flowtrain import (
    BackwardEnd,
    BatchBegin,
    Callback,
    CancelFittingException,
    EpochEnd,
    LearnerView,
    LossBegin,
    Phase,
    Read,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callback.access import Path as StatePath
from flowtrain.callback.access import declare, union
from flowtrain.callbacks import (
    SWA,
    LogVisualization,
    Traces,
)
from flowtrain.graph.executor import Executor
from flowtrain.learner import Learner
from flowtrain.testing import assert_equivalent, record_access, tiny_learner
from tests.support.bundled import CASES, KINDS, backend, case_of, loss_of, shown


class Ends(Callback):
    """Ends training in the middle of a validation batch, or of a training batch.

    The dry run skips callbacks that write nothing, so this one declares a write.
    """

    def __init__(self, phase: type[Phase]) -> None:
        self.phase = phase

    @on(LossBegin, access={"cbstate.purpose": Write()})
    def end(self, event: LossBegin, phase: Phase, learner: LearnerView) -> None:
        if isinstance(phase, self.phase):
            raise CancelFittingException("on purpose")


def seen(kind: type[Callback], folder: Path) -> dict[str, dict[StatePath, Read | Write]]:
    """Return the paths that each handler touched, in a fit that ends normally and in two that are ended early."""
    case = case_of(kind)
    found: dict[str, dict[StatePath, Read | Write]] = {}
    for ends in ((), (Ends(TrainingPhase),), (Ends(ValidationPhase),)):
        subject, *others = case.make(folder)
        recording = record_access(subject, *others, *ends, **case.options)
        for name, declaration in recording.handlers.items():
            for path, kind_of in declaration:
                known = found.setdefault(name, {})
                known[path] = Write() if Write() in (kind_of, known.get(path)) else kind_of
            found.setdefault(name, {})
    return found


def plain(declaration: Mapping[StatePath, Read | Write]) -> dict[StatePath, Read | Write]:
    """Leave out whether a read is optional: a run in which the entry exists cannot show that."""
    return {path: Write() if isinstance(kind, Write) else Read() for path, kind in declaration.items()}


def test_every_case_is_one_of_a_bundled_callback() -> None:
    assert set(CASES) <= {kind.__name__ for kind in KINDS}
    assert len(KINDS) >= 23


@pytest.mark.filterwarnings("ignore:The loss is NaN")
@pytest.mark.parametrize("kind", KINDS)
def test_what_each_handler_declares_is_what_it_touches(kind: type[Callback], tmp_path: Path) -> None:
    """Rule 3: views refuse undeclared paths, and a declared path that no handler touches orders callbacks in vain."""
    subject, *_ = case_of(kind).make(tmp_path)
    found, shared = seen(kind, tmp_path), subject.state_access()
    unseen = case_of(kind).unseen
    accesses = [shared]
    for _, handler in subject.handlers():
        name = handler.attribute
        accesses.append(shared if handler.access is None else handler.access)
        declared = plain(dict(declare(accesses[-1], kind.__name__)))
        touched = plain(found.get(name, {}))
        if name in unseen:
            assert touched != declared, f"{name} is seen by the dry run: remove it from `unseen` in CASES"
            assert all(any(path[:length] in declared for length in range(len(path) + 1)) for path in touched), name
        else:
            assert declared == touched, name
    everything = plain(dict(union(declare(access, kind.__name__) for access in accesses)))
    for path, access in plain(found.get("setup", {})).items():
        assert any(everything.get(path[:length]) in (access, Write()) for length in range(len(path) + 1)), path


class Clip(Callback):
    """Writes gradients, and at the earlier events the inputs."""

    @on(BatchBegin, TrainingPhase, access={"batch.inputs": Write()})
    def augment(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.batch.inputs = learner.batch.inputs + 0.0

    @on(BackwardEnd, TrainingPhase, access={"batch.grads": Write()})
    def clip(self, event: BackwardEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        learner.batch.grads["coeff"].clamp_(-1, 1)


@pytest.mark.parametrize("turn", [1, -1])
def test_all_of_them_go_together_whatever_the_order_of_the_list(turn: int, tmp_path: Path) -> None:
    """Rule 5: they have no conflict and no cycle, even if every declaration that can name all of ``batch`` does so."""
    callbacks: dict[str, Callback] = {"Clip": Clip()}
    for kind in KINDS:
        if kind is SWA:  # which `EMA` refuses, as one model has one average
            continue
        for callback in case_of(kind).make(tmp_path / kind.__name__):
            callbacks.setdefault(type(callback).__name__, callback)
    more = (
        LogVisualization(shown, backend(tmp_path / "step"), every=1),
        LogVisualization(shown, backend(tmp_path / "epoch"), every=1, event_type=EpochEnd, name="AtTheEnd"),
        Traces({"Loss": loss_of}, TrainingPhase),
    )
    learner = tiny_learner(*[*callbacks.values(), *more][::turn], n_batches=3)
    learner.fit(1)
    assert learner.cbstate.history[TrainingPhase].steps == 3
    assert learner.stopped is None


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_is_the_serial_one(kind: type[Callback], tmp_path: Path) -> None:
    """Rule 13, for all bundled callbacks together."""
    case = case_of(kind)
    runs = iter(range(100))

    def make(executor: Executor) -> Learner:
        return tiny_learner(*case.make(tmp_path / str(next(runs))), n_batches=3, executor=executor)

    ignored = [f"callbacks.{kind.__name__}.{name}" for name in case.placed]
    assert_equivalent(make, executors=["dask"], interleavings=2, ignore=ignored)


@pytest.mark.parametrize("kind", KINDS)
def test_the_docstring_says_what_it_reads_and_writes_and_runs_after_and_costs_and_has_an_example(
    kind: type[Callback],
) -> None:
    text = inspect.getdoc(kind) or ""
    for wanted in (r"\breads?\b", r"\bwrites?\b", r"\bruns? after\b", r"\bcosts?\b", r">>> "):
        assert re.search(wanted, " ".join(text.split()), re.IGNORECASE), f"{kind.__name__} does not say {wanted}"
