"""Callbacks of a learner are found, added, replaced and removed, each time completely or not at all."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from torchmetrics import MeanSquaredError

from flowtrain import (
    Access,
    AccessError,
    BatchEnd,
    Callback,
    CallbackError,
    CoreError,
    Event,
    FlowtrainError,
    Learner,
    LearnerView,
    Phase,
    Read,
    SerialExecutor,
    TorchCore,
    TrainingPhase,
    UsageError,
    Write,
    WriteConflictError,
    on,
)
from flowtrain.callback.conditions import Every
from flowtrain.callbacks import (
    EMA,
    EarlyStopping,
    LearningRate,
    Metrics,
    MetricsPrinter,
    ProgressBar,
    Recorder,
    Scheduler,
    StopOnNaNLoss,
    one_cycle,
)
from flowtrain.callbacks.stopping import GL, Patience
from flowtrain.testing import TinyModel, record_access, tiny_batches, tiny_learner
from tests.support.fired import OODPhase
from tests.support.untyped import untyped


class First(Callback):
    """A callback that counts how often it is set up."""

    setups = 0

    def state_access(self) -> Access:
        return {"cbstate.first": Write()}

    def setup(self, learner: LearnerView) -> None:
        self.setups += 1
        learner.cbstate.first = self.setups

    @on(BatchEnd)
    def act(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        learner.cbstate.first = 0


class Rival(First):
    """Writes the same entry as `First`."""


def names(learner: Learner) -> list[str]:
    return [callback.name for callback in learner.callbacks]


@pytest.mark.parametrize(
    ("wanted", "kinds"),
    [
        (True, [Recorder, Metrics, StopOnNaNLoss, ProgressBar, MetricsPrinter]),
        ("quiet", [Recorder, Metrics, StopOnNaNLoss]),
        (False, []),
    ],
)
def test_default_callbacks(wanted: Any, kinds: list[type[Callback]]) -> None:
    first = First()
    learner = tiny_learner(first, default_callbacks=wanted)
    assert [type(callback) for callback in learner.callbacks] == [First, *kinds], (
        "default callbacks come after the user's"
    )


def test_a_default_callback_is_left_out_where_the_user_passes_one() -> None:
    class MyRecorder(Recorder):
        """A user's replacement for Recorder."""

    metrics, recorder = Metrics(), MyRecorder()
    learner = tiny_learner(metrics, recorder)
    assert list(learner.callbacks) == [metrics, recorder, learner.get_callback(StopOnNaNLoss)]


@pytest.mark.parametrize("wanted", ["silent", 2, None])
def test_default_callbacks_are_true_false_or_quiet(wanted: Any) -> None:
    with pytest.raises(UsageError, match=rf'^default_callbacks={wanted!r} is not True, False or "quiet"\.'):
        tiny_learner(default_callbacks=wanted)


def test_get_callback() -> None:
    first, other = First(), First()
    other.name = "Mine"
    learner = tiny_learner(first, Recorder(), default_callbacks=False)
    assert learner.get_callback(First) is learner.get_callback("First") is learner.get_callback(Callback) is first
    assert learner.get_callback(Rival) is None
    assert learner.get_callback("Rival") is None
    assert learner.get_callback(first) is first
    assert learner.get_callback(other) is None
    with pytest.raises(CallbackError, match="A callback is found by its type or name, got 3"):
        learner.get_callback(untyped(3))


def test_add_set_replace_and_remove() -> None:
    first, recorder = First(), Recorder()
    learner = tiny_learner(recorder, default_callbacks=False)
    learner.add_callback(first)
    assert names(learner) == ["Recorder", "First"]
    assert (first.setups, learner.cbstate.first) == (1, 1)
    learner.fit(1)
    assert learner.cbstate.first == 0

    new = First()
    assert learner.replace_callback(new) is first
    assert list(learner.callbacks) == [recorder, new]
    assert learner.remove_callback("First") is new
    assert learner.remove_callback(Recorder) is recorder
    assert names(learner) == []
    learner.set_callbacks([first, Recorder()])
    assert names(learner) == ["First", "Recorder"]
    learner.set_callbacks(reversed(learner.callbacks))
    assert names(learner) == ["Recorder", "First"]
    assert first.setups == 2, "set up when it came, and when it came back; not when it only moved"
    learner.fit(1)
    assert learner.cbstate.history[TrainingPhase].epochs == 2, "cbstate outlives the callbacks"


REFUSED: dict[str, tuple[Callable[[Learner], object], type[FlowtrainError], str]] = {
    "conflict": (lambda learner: learner.add_callback(Rival()), WriteConflictError, "First and Rival"),
    "a class": (
        lambda learner: learner.add_callback(untyped(First)), CallbackError, "First is a class. Pass an instance",
    ),
    "no callback": (
        lambda learner: learner.add_callback(untyped(print)), CallbackError, "<built-in function print> is no call",
    ),
    "twice": (
        lambda learner: learner.add_callback(learner.callbacks[0]), CallbackError, "<First> is in the list twice",
    ),
    "set": (lambda learner: learner.set_callbacks([Rival(), First()]), WriteConflictError, "Rival and First"),
    "no list": (
        lambda learner: learner.set_callbacks(untyped(First())), CallbackError, "<First> is not a list. Write callb",
    ),
    "replace": (
        lambda learner: learner.replace_callback(Rival()), CallbackError,
        r"replace_callback(<Rival>) needs exactly one Rival to replace; there are 0. Use set_callbacks(...) or",
    ),
    "remove": (
        lambda learner: learner.remove_callback("Frist"), CallbackError,
        "There is no callback Frist. Did you mean 'First'? The learner has: First, Recorder.",
    ),
    "remove type": (
        lambda learner: learner.remove_callback(Metrics), CallbackError,
        "There is no callback Metrics. The learner has: First, Recorder.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_a_refused_change_leaves_everything_as_it_was(
    change: Callable[[Learner], object], error: type[FlowtrainError], text: str
) -> None:
    """Rule 11: no part of a refused change remains."""
    first = First()
    learner = tiny_learner(first, Recorder(), default_callbacks=False)
    learner.fit(1)
    before, explained, state = list(learner.callbacks), learner.callbacks.explain(), dict(vars(learner.cbstate))
    with pytest.raises(error) as raised:
        change(learner)
    assert text in str(raised.value)
    assert list(learner.callbacks) == before
    assert learner.callbacks.explain() == explained
    assert vars(learner.cbstate) == state
    assert first.setups == 1
    learner.fit(1)
    assert learner.cbstate.history[TrainingPhase].epochs == 2


def test_a_setup_that_fails_takes_the_change_back() -> None:
    """Rule 11: if `setup` raises, the whole change is undone."""

    class Broken(Callback):
        def state_access(self) -> Access:
            return {"cbstate.made": Write()}

        def setup(self, learner: LearnerView) -> None:
            learner.cbstate.made = 1
            raise OSError("no folder")

    learner = tiny_learner(default_callbacks=False)
    with pytest.raises(OSError, match="no folder"):
        learner.add_callback(Broken())
    assert len(learner.callbacks) == len(learner.cbstate) == 0


def test_core_and_executor_are_free_again_when_a_learner_is_refused() -> None:
    """Rule 11: after a refused construction the same core and executor can be used for another learner."""
    core, executor = TorchCore(device="cpu"), SerialExecutor()
    with pytest.raises(WriteConflictError):
        tiny_learner(First(), Rival(), core=core, executor=executor)
    with pytest.raises(CoreError, match="runs one model"):
        tiny_learner(model={"a": TinyModel()}, core=core, executor=executor)
    learner = tiny_learner(First(), core=core, executor=executor)
    learner.fit(1)
    assert learner.core is core
    assert learner.executor is executor


def test_a_phase_met_later_is_checked_before_its_first_event() -> None:
    """Rule 11: the callbacks are checked for a new phase before its first event."""
    fired: list[str] = []

    class Watch(Callback):
        @on(Event)
        def note(self, event: Event, phase: Phase, learner: LearnerView) -> None:
            fired.append(type(event).__name__)

    class Reader(Callback):
        def state_access(self) -> Access:
            return {"batch.grads": Read()}

        @on(BatchEnd)
        def read(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            _ = learner.batch.grads

    learner = tiny_learner(Watch(), Reader(), data=tiny_batches(), default_callbacks=False)
    refused = r"Reader reads batch\.grads at \(BatchEnd, OODPhase\), but OODPhase provides"
    for begin in (
        lambda: learner.epoch(OODPhase, tiny_batches()),
        lambda: learner.fit(1, data={TrainingPhase: tiny_batches(), OODPhase: tiny_batches()}),
        lambda: learner.step(OODPhase, tiny_batches()[0]),
    ):
        with pytest.raises(AccessError, match=refused):
            begin()
        assert fired == []
    learner.fit(1)


# --- a callback has one learner


def test_a_callback_of_another_learner_is_refused_before_anything_is_set_up() -> None:
    first = First()
    learner = tiny_learner(first)
    with pytest.raises(CallbackError) as caught:
        tiny_learner(Metrics(), first)
    assert str(caught.value) == (
        f"First belongs to another learner, {learner!r}, and would bring along the state it has gathered there. Make a "
        "new First(...) for each learner, such as one for each fold of a cross-validation. To move it with that state, "
        "write other.remove_callback('First') first."
    )
    assert first.setups == 1
    other = tiny_learner()
    for change in (other.add_callback, lambda callback: other.set_callbacks([callback])):
        with pytest.raises(CallbackError, match="First belongs to another learner"):
            change(first)
    assert first not in list(other.callbacks)
    assert learner.get_callback(First) is first


@pytest.mark.parametrize("ended", ["closed", "gone"])
def test_the_folds_of_a_cross_validation_do_not_share_callbacks(ended: str) -> None:
    """If folds shared a callback, its averages, patience and counts would continue from one fold to the next."""
    callbacks = [EMA(), EarlyStopping(1), Scheduler({LearningRate: one_cycle(0.1)})]
    learner = tiny_learner(*callbacks)
    learner.fit(1)
    learner.close()
    if ended == "gone":
        del learner
        gc.collect()
    for callback in callbacks:
        with pytest.raises(CallbackError, match=rf"{callback.name} belongs to another learner, .*cross-validation\.$"):
            tiny_learner(callback)


def test_what_keeps_state_inside_of_a_callback_has_one_learner_too() -> None:
    patience, every = Patience(2), Every(BatchEnd, 2)
    first, second = First(), First()
    first.conditions = second.conditions = (every,)
    kept = [tiny_learner(EarlyStopping(patience)), tiny_learner(first)]
    with pytest.raises(CallbackError, match=r"Patience\(2\) of EarlyStopping belongs to .* a new Patience\(\.\.\.\)"):
        tiny_learner(EarlyStopping(GL(5) | patience))
    with pytest.raises(CallbackError, match=r"<.*Every object .*> of First belongs to .* Make a new Every\(\.\.\.\)"):
        tiny_learner(second)
    kept[1].remove_callback(First)
    third = Rival()
    third.conditions = (every,)
    with pytest.raises(CallbackError, match=r"First and Rival have the same <.*Every.*>, which would count the events"):
        tiny_learner(second, third)
    assert tiny_learner(second).get_callback(First) is second


def test_a_callback_is_free_when_it_is_taken_out_or_its_learner_was_refused() -> None:
    first, learner = First(), tiny_learner()
    for take_out in (
        lambda: learner.remove_callback(First),
        lambda: learner.replace_callback(First()),
        lambda: learner.set_callbacks([]),
    ):
        learner.add_callback(first)
        take_out()
        learner.set_callbacks([])
        tiny_learner(first).set_callbacks([])
    with pytest.raises(WriteConflictError):
        tiny_learner(first, Rival())
    executor = SerialExecutor()
    kept = tiny_learner(executor=executor)
    with pytest.raises(FlowtrainError, match="belongs to another learner"):
        tiny_learner(first, executor=executor)
    assert tiny_learner(first).get_callback(First) is first
    assert kept.executor is executor


def test_a_refused_change_leaves_everything_owned_as_it_was() -> None:
    first = First()
    learner = tiny_learner(first)
    rival = Rival()
    with pytest.raises(WriteConflictError):
        learner.add_callback(rival)
    tiny_learner(rival)
    with pytest.raises(CallbackError, match="First belongs to another learner"):
        tiny_learner(first)
    learner.set_callbacks([first])  # the learner's own callback


def test_copies_belong_to_nobody() -> None:
    first = First()
    learner = tiny_learner(first)
    learner.suggest_access(first)
    learner.audit_syncs()
    record_access(Recorder(), other := First())
    assert tiny_learner(copy.deepcopy(first)) is not None
    assert tiny_learner(pickle.loads(pickle.dumps(first))) is not None
    assert tiny_learner(other) is not None


def test_immutable_schedules_and_cloned_metrics_may_be_shared() -> None:
    """They keep no state: a schedule is a function of the update, a torchmetrics object is cloned for each phase."""
    schedule, metric = one_cycle(0.5), MeanSquaredError()
    learners = [tiny_learner(Scheduler({LearningRate: schedule}), Metrics(metric)) for _ in range(2)]
    losses = []
    for learner in learners:
        learner.fit(1)
        losses.append(list(learner.cbstate.metrics_epoch[TrainingPhase]["MeanSquaredError"]))
    assert losses[0] == losses[1]
