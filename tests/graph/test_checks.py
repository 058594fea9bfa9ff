"""Declared paths must exist: batch entries from their event on (rule 4), and entries of ``cbstate`` (rule 10)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import flowtrain.callbacks
from flowtrain import (
    Access,
    AccessError,
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Callback,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    FlowtrainError,
    LearnerView,
    LossBegin,
    MissingStateError,
    Phase,
    Read,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    Write,
)
from flowtrain.callback.access import declare, union
from flowtrain.callback.handler import Handler
from flowtrain.callbacks import LogHistograms, LogHyperParams, LogMetrics, LogTraces, LogVisualization, Traces
from flowtrain.errors import LoggingError
from flowtrain.graph.checks import PROVIDERS
from flowtrain.graph.registry import Callbacks
from flowtrain.logging import JsonlBackend, Value
from flowtrain.state.by_phase import CONTAINERS
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import tiny_learner
from tests.support.phases import Silent

R, W = Read(), Write()


class At(Callback):
    """Handles the events that the test gives, each with its own access or with the shared one."""

    def __init__(
        self,
        name: str,
        shared: Access | None = None,
        *events: type[Event],
        phase: type[Phase] = Phase,
        own: dict[type[Event], Access] | None = None,
        makes: str = "",
    ) -> None:
        self.name = name
        self.shared: Access = shared or {}
        self.phase = phase
        self.own = {**dict.fromkeys(events), **(own or {})}
        self.makes = makes

    def state_access(self) -> Access:
        return self.shared

    def handlers(self) -> Iterator[tuple[type, Handler]]:
        for event, access in self.own.items():
            yield type(self), Handler(event, self.phase, access, "At", "handle")

    def setup(self, learner: LearnerView) -> None:
        if self.makes:
            setattr(learner.cbstate, self.makes, 1)

    def handle(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...


def build(*callbacks: Callback, phases: tuple[type[Phase], ...] = (TrainingPhase,)) -> Callbacks:
    return Callbacks(callbacks, LearnerState(), phases)


def refused(
    kind: type[FlowtrainError], *callbacks: Callback, phases: tuple[type[Phase], ...] = (TrainingPhase,)
) -> str:
    with pytest.raises(kind) as caught:
        build(*callbacks, phases=phases)
    assert type(caught.value) is kind
    return str(caught.value)


# --- batch


def test_an_entry_that_the_phase_does_not_provide() -> None:
    """Rule 4: an error when the learner is built, with the nearest name."""
    assert refused(AccessError, At("Printer", {"batch.outptus": R}, BatchEnd)) == (
        "Printer reads batch.outptus at (BatchEnd, TrainingPhase), but TrainingPhase provides inputs, targets, "
        "outputs, loss, grads, grad_norm, and no callback writes batch.outptus. Did you mean 'outputs'? "
        "Read an entry that exists, or add a callback that writes this one."
    )


def test_an_entry_that_another_phase_provides() -> None:
    message = refused(AccessError, At("Printer", {"batch.grads": R}, BatchEnd), phases=(TrainingPhase, ValidationPhase))
    assert message.startswith(
        "Printer reads batch.grads at (BatchEnd, ValidationPhase), but ValidationPhase provides inputs, targets, "
        "outputs, loss, and no callback writes batch.grads."
    )
    build(At("Printer", {"batch.grads": R}, BatchEnd, phase=TrainingPhase), phases=(TrainingPhase, ValidationPhase))


PROVIDED = [
    (TrainingPhase, "inputs", EpochBegin, BatchBegin),
    (TrainingPhase, "targets", EpochBegin, BatchBegin),
    (TrainingPhase, "outputs", BatchBegin, LossBegin),
    (TrainingPhase, "loss", LossBegin, BackwardBegin),
    (TrainingPhase, "grads", BackwardBegin, BackwardEnd),
    (TrainingPhase, "grad_norm", UpdateBegin, UpdateEnd),
    (ValidationPhase, "outputs", BatchBegin, LossBegin),
    (ValidationPhase, "loss", LossBegin, BatchEnd),
]


@pytest.mark.parametrize(("phase", "entry", "early", "there"), PROVIDED)
def test_an_entry_that_is_not_there_yet(phase: type[Phase], entry: str, early: type[Event], there: type[Event]) -> None:
    """Rule 4: each phase says from which event on its entries exist."""
    path = f"batch.{entry}"
    callback = At("Printer", {path: R}, early, phase=phase)
    assert refused(MissingStateError, callback, phases=(phase,)) == (
        f"Printer reads {path} at ({early.__name__}, {phase.__name__}), and it is not there yet: {phase.__name__} has "
        f"it from {there.__name__} on. Handle a later event, or declare "
        f'{{"{path}": Read(optional=True)}} and handle None.'
    )
    build(At("Printer", {path: R}, there, phase=phase), phases=(phase,))
    build(At("Printer", {path: Read(optional=True)}, early, phase=phase), phases=(phase,))


def test_a_shared_declaration_counts_at_the_latest_event() -> None:
    """A shared `state_access` must fit only the latest event of its handlers; each `access=` must fit its own event."""
    build(At("Printer", {"batch.loss": R}, BatchBegin, BatchEnd))
    message = refused(MissingStateError, At("Printer", {"batch.loss": R}, BatchBegin, LossBegin))
    assert "at (BatchBegin, LossBegin, TrainingPhase), and it is not there yet" in message
    own: dict[type[Event], Access] = {BatchBegin: {"batch.loss": R}}
    assert "at (BatchBegin, TrainingPhase)" in refused(MissingStateError, At("Printer", {}, BatchEnd, own=own))


def test_optional_reads_are_exempt() -> None:
    build(At("Printer", {"batch.anything": Read(optional=True), "cbstate.anything": Read(optional=True)}, EpochBegin))


def test_the_whole_batch_may_be_read_everywhere() -> None:
    build(At("Printer", {"batch": R}, EpochBegin))


@pytest.mark.parametrize("write", ["batch.extra", "batch.extra.part", "batch"])
def test_a_callback_may_provide_an_entry(write: str) -> None:
    """Rule 4: a reader is accepted if a callback writes the entry at the same event or an earlier one."""
    reader = At("Printer", {"batch.extra": R}, LossBegin)
    build(reader, At("Maker", {write: W}, LossBegin))
    build(reader, At("Maker", {write: W}, BatchBegin))
    later = At("Maker", {write: W}, BatchEnd)
    message = refused(AccessError, At("Printer", {"batch.extra": R}, LossBegin), later)
    assert message.startswith("Printer reads batch.extra at (LossBegin, TrainingPhase), but TrainingPhase provides ")


def test_a_callback_may_provide_an_entry_earlier_than_the_phase() -> None:
    reader = At("Printer", {"batch.loss": R}, BatchEnd, own={LossBegin: {"batch.loss": R}})
    assert "not there yet" in refused(MissingStateError, reader)
    build(At("Printer", {"batch.loss": R}, LossBegin), At("Maker", {"batch.loss": W}, BatchBegin))


def test_a_writer_in_another_phase_does_not_count() -> None:
    writer = At("Maker", {"batch.extra": W}, BatchBegin, phase=ValidationPhase)
    message = refused(AccessError, At("Printer", {"batch.extra": R}, BatchEnd), writer)
    assert "at (BatchEnd, TrainingPhase)" in message


def test_who_writes_an_entry_may_read_it() -> None:
    """`Write` includes reading, so a callback that writes an entry may read it."""
    build(At("Maker", {"batch.extra": W}, BatchEnd))


def test_events_of_ones_own() -> None:
    """An event of a user may fire at any time, so its handlers may read any entry that the phase ever provides."""

    class Mine(Event): ...

    build(At("Printer", {"batch.grad_norm": R}, Mine))
    build(At("Printer", {"batch.extra": R}, BatchBegin), At("Maker", {"batch.extra": W}, Mine))
    assert "no callback writes batch.extra" in refused(AccessError, At("Printer", {"batch.extra": R}, Mine))


class Provides(Phase):
    """A phase with a step of its own, which says which entries it provides."""

    events = (EpochBegin, BatchBegin, BatchEnd, EpochEnd)
    provides = {"real": BatchBegin, "fake": BatchEnd}  # noqa: RUF012  # a constant of the class, typed in Phase

    def step(self, learner: Any, raw: Any) -> None: ...


def test_a_phase_that_does_not_say_is_not_checked() -> None:
    """Rule 4: for a phase without `provides`, a missing entry is found only when a handler reads it."""
    build(At("Printer", {"batch.anything": R}, BatchBegin, phase=Silent), phases=(Silent,))


def test_a_phase_of_ones_own_that_says_is_checked() -> None:
    build(At("Printer", {"batch.fake": R}, BatchEnd, phase=Provides))
    assert "Provides has it from BatchEnd on" in refused(
        MissingStateError, At("Printer", {"batch.fake": R}, BatchBegin, phase=Provides)
    )
    assert "but Provides provides real, fake, and" in refused(
        AccessError, At("Printer", {"batch.loss": R}, BatchEnd, phase=Provides)
    )


def test_phases_are_checked_that_have_data_or_are_named() -> None:
    """Rule 4: phases with data are checked, and phases that an `on` names."""
    build(At("Printer", {"batch.grads": R}, BatchEnd), phases=(TrainingPhase,))
    named = At("Other", {}, BatchEnd, phase=ValidationPhase)
    assert "(BatchEnd, ValidationPhase)" in refused(AccessError, At("Printer", {"batch.grads": R}, BatchEnd), named)


def test_the_fit_has_no_batch_to_check() -> None:
    build(At("Printer", {"batch.loss": Read(optional=True)}, FitBegin, FitEnd))


# --- cbstate


def test_an_entry_that_nobody_writes() -> None:
    """Rule 10: the error names the callback and the entry, and says what to write."""
    assert refused(MissingStateError, At("Printer", {"cbstate.best": R}, BatchEnd)) == (
        "Printer reads cbstate.best, and no callback declares to write it. Add the callback that makes it, or declare "
        '{"cbstate.best": Read(optional=True)}.'
    )


@pytest.mark.parametrize(
    ("path", "provider"),
    [
        ("cbstate.history", "Recorder"),
        ("cbstate.metrics_epoch", "Metrics"),
        ("cbstate.metrics_epoch.Loss", "Metrics"),
        ("cbstate.smooth_loss", "SmoothLoss"),
    ],
)
def test_the_bundled_callback_that_provides_it(path: str, provider: str) -> None:
    """Rule 10: the error names the bundled callback that writes the entry."""
    entry = ".".join(path.split(".")[:2])
    assert refused(MissingStateError, At("Printer", {path: R}, BatchEnd)) == (
        f"Printer reads {path}, and no callback declares to write it. "
        f"Add flowtrain.callbacks.{provider}, which provides {entry}."
    )


def test_the_nearest_name() -> None:
    maker = At("Maker", {"cbstate.best_loss": W}, BatchEnd, makes="best_loss")
    assert refused(MissingStateError, At("Printer", {"cbstate.bestloss": R}, BatchEnd), maker) == (
        "Printer reads cbstate.bestloss, and no callback declares to write it. Did you mean 'best_loss'? "
        'Add the callback that makes it, or declare {"cbstate.bestloss": Read(optional=True)}.'
    )


def test_the_nearest_name_inside_an_entry() -> None:
    maker = At("Maker", {"cbstate.metrics_step.Accuracy": W, "cbstate.metrics_step.Loss": W}, BatchEnd)
    message = refused(MissingStateError, At("Printer", {"cbstate.metrics_step.Acuracy": R}, BatchEnd), maker)
    assert message == (
        "Printer reads cbstate.metrics_step.Acuracy, and no callback declares to write it. In cbstate.metrics_step "
        "there is Accuracy, Loss. Did you mean 'Accuracy'? "
        'Add the callback that makes it, or declare {"cbstate.metrics_step.Acuracy": Read(optional=True)}.'
    )


@pytest.mark.parametrize(
    ("read", "write"),
    [
        ("cbstate.metrics_step", "cbstate.metrics_step.Loss"),
        ("cbstate.metrics_step.Loss", "cbstate.metrics_step"),
        ("cbstate.metrics_step.Loss", "cbstate.metrics_step.Loss"),
    ],
)
def test_a_writer_of_a_part_or_of_the_whole_counts(read: str, write: str) -> None:
    build(At("Printer", {read: R}, BatchEnd), At("Maker", {write: W}, BatchEnd))


def test_a_writer_at_any_event_counts() -> None:
    """An entry of ``cbstate`` remains between events, so its writer may run at another event or be the reader."""
    maker = At("Maker", {"cbstate.best": W}, EpochEnd, makes="best")
    build(At("Printer", {"cbstate.best": R}, BatchBegin), maker)
    own: dict[type[Event], Access] = {BatchBegin: {"cbstate.best": R}, EpochEnd: {"cbstate.best": W}}
    build(At("Both", {}, own=own, makes="best"))


def test_what_is_there_already_needs_no_writer() -> None:
    state = LearnerState()
    state.cbstate.best = 3
    Callbacks([At("Printer", {"cbstate.best": R}, BatchEnd)], state)


def test_an_entry_of_a_namespace_must_be_there_itself() -> None:
    """If ``cbstate.stats`` exists, ``cbstate.stats.mean`` may still be missing."""

    class Makes(At):
        def setup(self, learner: LearnerView) -> None:
            learner.cbstate.stats.mean = 0.0

    state = LearnerState()
    before = Callbacks([Makes("Maker", {"cbstate.stats.mean": W}, BatchEnd)], state)
    Callbacks([*before, At("Printer", {"cbstate.stats.mean": R}, BatchEnd)], state, (), before)
    with pytest.raises(MissingStateError) as caught:
        Callbacks([*before, At("Printer", {"cbstate.stats.maen": R}, BatchEnd)], state, (), before)
    assert str(caught.value).startswith(
        "Printer reads cbstate.stats.maen, and no callback declares to write it. Did you mean 'mean'?"
    )


# --- after setup


def test_a_declared_writer_that_made_nothing() -> None:
    """Rule 10: after `setup` an entry that is read must exist; otherwise the error names its writers and a remedy."""
    message = refused(
        MissingStateError,
        At("Printer", {"cbstate.best": R}, BatchEnd),
        At("Idle", {"cbstate.best": W}, BatchBegin),
        At("Lazy", {"cbstate.best": W}, EpochEnd),
    )
    assert message == (
        "Printer reads cbstate.best, which Idle, Lazy declares to write but has not made. Make it in At.setup:\n\n"
        "    def setup(self, learner: LearnerView) -> None:\n"
        "        learner.cbstate.best = ...\n"
    )


def test_a_namespace_is_made_but_not_what_is_in_it() -> None:
    message = refused(
        MissingStateError,
        At("Printer", {"cbstate.stats.mean": R}, BatchEnd),
        At("Idle", {"cbstate.stats.mean": W}, EpochEnd),
    )
    assert message.startswith("Printer reads cbstate.stats.mean, which Idle declares to write but has not made.")
    assert message.endswith("        learner.cbstate.stats.mean = ...\n")


@pytest.mark.parametrize("read", ["cbstate.history", "cbstate.metrics_step.Loss", "cbstate.hyperparams.LearningRate"])
def test_series_and_counters_are_made_by_the_learner(read: str) -> None:
    build(At("Printer", {read: R}, BatchEnd), At("Maker", {read: W}, EpochEnd))


def test_an_entry_of_a_removed_writer_is_not_what_was_meant() -> None:
    """The error does not suggest the missing entry itself as the nearest name."""
    state = LearnerState()
    before = Callbacks([At("Writer", {"cbstate.best": W}, BatchEnd, makes="best")], state)
    with pytest.raises(MissingStateError) as caught:
        Callbacks([At("R", {"cbstate.best": R}, BatchEnd)], state, before=before)
    assert str(caught.value).startswith(
        "R reads cbstate.best, and no callback declares to write it. Add the callback that makes it, or declare"
    )


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("cbstate.metrics_epoch.Accuracy", "Give Metrics a metric of that name: Metrics(Metric(f, name='Accuracy'))."),
        ("cbstate.metrics_epoch.ValidPhase.Loss", "A path leaves out the phase: declare 'cbstate.metrics_epoch.Loss'."),
    ],
)
def test_what_metrics_could_provide(path: str, remedy: str) -> None:
    maker = At("Maker", {"cbstate.metrics_epoch.Loss": W}, BatchEnd)
    assert refused(MissingStateError, At("Printer", {path: R}, BatchEnd), maker).endswith(
        f"write it. In cbstate.metrics_epoch there is Loss. {remedy}"
    )


@pytest.mark.parametrize(
    ("path", "access", "said"),
    [
        ("params.0.wieght", R, "params.0 has no 'wieght'. Did you mean 'weight'? Declare 'params.0' as a whole"),
        ("params.0.weight.data", W, "params.0.weight has no 'data'. Declare"),
        ("model.1", R, "model has no '1'. "),
        ("lossfn.redution", R, "lossfn has no 'redution'. Did you mean 'reduction'?"),
        ("optimizer.hyperparms", W, "optimizer has no 'hyperparms'. Did you mean 'hyperparams'?"),
        ("optimizer.hyperparams.lr", W, "optimizer.hyperparams has no 'lr'. "),
        ("data.TrainingPhase", R, "data has no 'TrainingPhase'. Declare 'data' as a whole"),
    ],
)
def test_a_part_that_is_not_there(path: str, access: Read | Write, said: str) -> None:
    """Any misspelt path is an error when the learner is built, with the nearest name."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    with pytest.raises(AccessError) as caught:
        tiny_learner(At("Probe", {path: access}, BatchEnd), model=model, lossfn=torch.nn.MSELoss())
    assert str(caught.value).startswith(f"Probe declares {path!r}, but {said}")


def test_parts_that_are_there_or_may_come() -> None:
    paths: Access = {"params.0.weight": W, "model.0": R, "model.new": W, "optimizer.state": R, "lossfn.reduction": R}
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    later: Access = {"model.later": Read(optional=True), "params.1": Read(optional=True)}
    tiny_learner(At("Probe", {**paths, **later}, BatchEnd), model=model, lossfn=torch.nn.MSELoss()).fit(1)


# --- the table of the bundled callbacks that provide an entry of ``cbstate``; it has only names, so it is checked here


def bundled(name: str) -> Callback:
    """Return a bundled callback by its name."""
    if name == "Traces":
        return flowtrain.callbacks.Traces({"One": lambda learner: 1.0}, TrainingPhase)
    if name == "Scheduler":
        return flowtrain.callbacks.Scheduler({flowtrain.callbacks.LearningRate: 0.1})
    made: Callback = getattr(flowtrain.callbacks, name)()
    return made


def written(callback: Callback) -> set[str]:
    """Return the entries of ``cbstate`` that a callback, or one of its handlers, declares to write."""
    every = [callback.state_access(), *(handler.access or {} for _, handler in callback.handlers())]
    found = union([declare(access, callback.name) for access in every])
    return {path[1] for path, kind in found if path[0] == "cbstate" and isinstance(kind, Write)}


@pytest.mark.parametrize(("entry", "name"), sorted(PROVIDERS.items()))
def test_the_provider_is_bundled_and_writes_the_entry(entry: str, name: str) -> None:
    """Rule 10: the callback that the error names really makes the entry."""
    assert name in flowtrain.callbacks.__all__
    assert entry in written(bundled(name))


@pytest.mark.parametrize("entry", sorted(PROVIDERS))
def test_the_entry_is_one_that_the_learner_makes(entry: str) -> None:
    assert entry in CONTAINERS


def test_no_bundled_entry_is_without_provider() -> None:
    """The table of providers has every entry that a default callback writes."""
    made = {entry for name in ("Recorder", "Metrics", "SmoothLoss") for entry in written(bundled(name))}
    assert made <= PROVIDERS.keys()


# --- one series has one writer


def zero(learner: Any) -> Value:
    return Value(0)


def trace(name: str, event: Any = BatchEnd) -> Traces:
    return Traces({name: lambda learner: 0.0}, TrainingPhase, event, access={})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda one: [LogVisualization(zero, one), LogVisualization(zero, one, event_type=BatchBegin)],
            r"LogVisualization and LogVisualization#2 both write 'Zero' to JsonlBackend\(.*\), group Step: their "
            r"values would be mixed in one series\. Give one another name, as in LogVisualization\(f, backend, name='O",
        ),
        (lambda one: [LogMetrics(one), LogVisualization(zero, one, name="Loss")], r"LogMetrics and .* 'Loss'.* name="),
        (lambda one: [LogMetrics(one), LogMetrics(one)], r"write 'Loss' to .* Remove one, or give each a backend of"),
        (lambda one: [LogHistograms(one), LogHistograms(one, gradients=True)], r"both write 'Weights' to .*, group "),
        (lambda one: [LogHyperParams(one), LogHyperParams(one)], r"both write the entries of cbstate\.hyperparams to"),
        (lambda one: [trace("A"), LogTraces(one), LogTraces(one)], r"LogTraces and LogTraces#2 both write 'A' to"),
        (
            lambda one: [trace("Loss"), LogTraces(one), LogMetrics(one)],
            r"LogTraces and LogMetrics both write 'Loss' to .* Give the trace another name\.",
        ),
        (
            lambda one: [trace("A"), trace("A", BatchBegin)],
            r"Traces and Traces#2 both write 'A' to cbstate\.tracehistory: their .* Give the trace another name\.",
        ),
    ],
)
def test_one_series_has_one_writer(
    make: Callable[[JsonlBackend], list[Callback]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(LoggingError, match=message):
        tiny_learner(*make(JsonlBackend(tmp_path / "log")))


def test_what_is_not_the_same_series_is_fine(tmp_path: Path) -> None:
    """Series in other backends, phases or groups, or with other names, are different series."""
    one, other = JsonlBackend(tmp_path / "one"), JsonlBackend(tmp_path / "other")
    callbacks = [
        LogMetrics(one), LogMetrics(other), trace("A"), trace("B"), LogTraces(one),
        LogVisualization(zero, one, every=1, phase_type=TrainingPhase),
        LogVisualization(zero, one, every=1, phase_type=ValidationPhase),
        LogVisualization(zero, one, every=1, event_type=EpochEnd),
        LogVisualization(zero, one, every=1, name="Another"),
        LogVisualization(zero, other, every=1),
    ]  # fmt: skip
    with tiny_learner(*callbacks, n_batches=1) as learner:
        learner.fit(1)
    assert (tmp_path / "one").read_text("utf-8").count('"Zero"') == 4


# --- exchanges between ranks


def test_a_series_is_not_exchanged_between_ranks() -> None:
    smooth = At("Smooth", {"cbstate.smooth_loss": W}, BatchEnd)
    mean = At("Mean", {"cbstate.smooth_loss": Read(reduce="mean")}, BatchEnd)
    assert refused(AccessError, smooth, mean) == (
        "Mean declares 'cbstate.smooth_loss': Read(reduce=\"mean\"). It holds the values of each phase, and ranks "
        'exchange one value. Read the value of the batch: {"batch.loss": Read(reduce="mean")}. Values of an epoch, in '
        "cbstate.metrics_epoch, are those of all ranks without it."
    )
    assert refused(AccessError, At("Counts", {"cbstate.history": Write(broadcast=True)}, BatchEnd)) == (
        "Counts declares 'cbstate.history': Write(broadcast=True). It holds the values of each phase, and ranks "
        "exchange one value. Write the value to an entry of your own, and send that."
    )
    build(At("Mine", {"cbstate.mine": Write(broadcast=True)}, BatchEnd, makes="mine"))
