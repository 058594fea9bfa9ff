"""Rules 31, 32, 34 and 35: shared and local state, the ranks of callbacks, and what several ranks refuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path as Folder
from typing import Any

import pytest

import flowtrain.callbacks
from flowtrain import (
    Access,
    BackwardEnd,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    Callback,
    CallbackError,
    EpochBegin,
    EpochEnd,
    Event,
    LearnerView,
    LossBegin,
    Phase,
    Read,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    ValidationPhase,
    Write,
)
from flowtrain.callback.handler import Handler
from flowtrain.callbacks import (
    Recorder,
    throttle,
)
from flowtrain.errors import RankError
from flowtrain.graph.registry import Callbacks
from flowtrain.graph.shared_state import Peers, SharedState, ranks_of
from flowtrain.state.by_phase import CONTAINERS
from flowtrain.state.learner_state import LearnerState
from flowtrain.testing import tiny_learner
from tests.support.bundled import CASES, KINDS, Case
from tests.support.meeting import made_state, no_exchange
from tests.support.untyped import untyped

R, W, SENT = Read(), Write(), Write(broadcast=True)


class At(Callback):
    """Handles events, each with its own declaration."""

    phase: type[Phase] = TrainingPhase

    def __init__(self, name: str, own: dict[type[Event], Access], ranks: Any = None) -> None:
        self.name = name
        self.own = own
        self.ranks = ranks

    def handlers(self) -> Iterator[tuple[type, Handler]]:
        for event, access in self.own.items():
            yield type(self), Handler(event, self.phase, access, "At", "handle")

    def setup(self, learner: LearnerView) -> None:
        for access in self.own.values():
            for path, kind in access.items():
                root, _, name = path.partition(".")
                if isinstance(kind, Write) and root == "cbstate" and "." not in name and name not in CONTAINERS:
                    setattr(learner.cbstate, name, 0)

    def handle(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...


def at(name: str, access: Access, event: type[Event] = BatchEnd, ranks: Any = None) -> At:
    return At(name, {event: access}, ranks)


def build(*callbacks: Callback, rank: int = 0, sharded: bool = False) -> Callbacks:
    peers = Peers(rank, 2, no_exchange, sharded)
    return Callbacks(callbacks, made_state(), (TrainingPhase, ValidationPhase), peers=peers)


def refused(*callbacks: Callback, sharded: bool = False) -> str:
    with pytest.raises(RankError) as error:
        build(*callbacks, sharded=sharded)
    Callbacks(callbacks, made_state(), (TrainingPhase, ValidationPhase))  # one process takes them all
    return str(error.value)


def shared_state(*callbacks: Callback) -> SharedState:
    found = build(*callbacks).shared
    assert found is not None
    return found


# --- shared and local state (rule 31)


@pytest.mark.parametrize(
    ("path", "event", "why"),
    [
        ("batch.loss", BatchEnd, "each rank has a batch of its own"),
        ("batch.inputs.x", BatchEnd, "each rank has a batch of its own"),
        ("batch", UpdateBegin, "each rank has a batch of its own"),
        ("batch.grads", BackwardEnd, "each rank has a batch of its own"),
        ("batch.grads.0.weight", UpdateBegin, ""),
        ("batch.grad_norm", BatchEnd, ""),
        ("data", EpochBegin, "each rank loads other data"),
        ("resource.rng", BatchEnd, "each rank draws other random numbers"),
        ("resource.terminal", BatchEnd, ""),
        ("callbacks", BatchEnd, "the attributes of callbacks are those of one rank"),
        ("cbstate.metrics_step.Loss", BatchEnd, "each rank has metrics of its own batches"),
        ("cbstate.smooth_loss", BatchEnd, "each rank has a batch of its own"),
        ("cbstate.tracehistory.Time", BatchEnd, "each rank traces its own batches"),
        ("cbstate.metrics_epoch.Loss", EpochEnd, ""),
        ("cbstate.history", BatchEnd, ""),
        ("cbstate.hyperparams", BatchEnd, ""),
        ("model.encoder", BatchEnd, ""),
        ("params", BatchEnd, ""),
        ("lossfn", BatchEnd, ""),
        ("optimizer.hyperparams", BatchEnd, ""),
    ],
)
def test_the_table(path: str, event: type[Event], why: str) -> None:
    assert shared_state().why_local(tuple(path.split(".")), event) == why


def test_an_entry_is_what_the_declarations_of_its_writers_make_it() -> None:
    found = shared_state(
        at("Loss", {"batch.loss": R, "cbstate.loss": W}),
        at("Mean", {"batch.loss": Read(reduce="mean"), "cbstate.mean": W}),
        at("All", {"batch.loss": Read(gather=True), "cbstate.all": W}),
        at("Sent", {"batch.loss": R, "cbstate.sent": SENT}),
        at("Best", {"cbstate.history": R, "cbstate.mean": R, "cbstate.best": W}),
        at("Draw", {"resource.rng": W, "cbstate.drawn": W}),
        at("Later", {"cbstate.loss": R, "cbstate.later": W}),
        at("Again", {"cbstate.later": R, "cbstate.again": W}),
        at("One", {"cbstate.again": Read(reduce="max"), "cbstate.one": W}),
        Recorder(),
    )
    assert found.local == {
        "loss": "Loss writes it and reads batch.loss",
        "drawn": "Draw writes it and reads resource.rng",
        "later": "Later writes it and reads cbstate.loss",
        "again": "Again writes it and reads cbstate.later",
    }
    assert found.why_local(("cbstate",)) == found.local["again"]


def test_a_clock_makes_an_entry_local() -> None:
    """Rule 35: without an exchange the handler may run at other events on each rank."""
    counts = throttle(at("Counts", {"cbstate.history": R, "cbstate.seen": W}), BatchEnd, seconds=1)
    assert shared_state(counts, Recorder()).local == {
        "seen": "Counts writes it and reads the clock of throttle(seconds=...)"
    }


def test_a_callback_that_merges_the_measurements_of_all_ranks() -> None:
    """What it writes at the end of an epoch is made of the measurements of all ranks; what it writes before is not."""

    class Merges(At):
        def rank_state(self) -> Any:
            return 1

        def merge_ranks(self, states: Sequence[Any]) -> None: ...

    before: dict[type[Event], Access] = {BatchEnd: {"batch.loss": R, "cbstate.now": W}}
    callback = Merges("Merges", {**before, EpochEnd: {"cbstate.metrics_epoch.Mine": W, "cbstate.last": W}})
    assert shared_state(callback).local == {"now": "Merges writes it and reads batch.loss"}
    other = At("Other", dict(callback.own))
    assert "Other reads batch.loss" in refused(other)


# --- the ranks of a callback (rule 32)


@pytest.mark.parametrize(
    ("access", "said", "place", "why"),
    [
        ({"batch.loss": R}, None, "main", "it writes no state"),
        ({"batch.loss": R, "resource.terminal": W}, None, "main", "it writes no state"),
        ({"cbstate.x": W}, None, "every", "it writes cbstate.x"),
        ({"cbstate.x": W, "params": W, "model": W}, None, "every", "it writes cbstate.x and 2 more"),
        ({"batch.loss": R}, "every", "every", "it says ranks = 'every'"),
        ({"cbstate.x": SENT}, "main", "main", "it says ranks = 'main'"),
    ],
)
def test_the_ranks_of_a_callback(access: Access, said: Any, place: str, why: str) -> None:
    [node] = build(at("Mine", access, ranks=said)).nodes
    assert ranks_of(node) == (place, why)


def test_other_ranks_are_an_error_in_one_process_too() -> None:
    with pytest.raises(CallbackError) as error:
        tiny_learner(at("Mine", {}, ranks=untyped("all")))
    assert str(error.value) == (
        "Mine.ranks is 'all'. It is 'every' or 'main', the ranks that run the handlers, or None: then a callback that "
        "writes no state runs on the main rank only."
    )


def test_a_rank_runs_its_callbacks() -> None:
    callbacks = (at("Log", {"batch.loss": R}), Recorder(), at("Each", {"batch.loss": R}, ranks="every"))
    assert [node.name for node in build(*callbacks).running] == ["Log", "Recorder", "Each"]
    assert [node.name for node in build(*callbacks, rank=1).running] == ["Recorder", "Each"]


def test_explain_says_where_callbacks_run_and_where_values_are_exchanged() -> None:
    callbacks = (
        at("Log", {"batch.loss": Read(reduce="mean"), "cbstate.x": R}),
        at("Worst", {"batch.loss": Read(gather=True), "cbstate.worst": SENT}),
        at("Mine", {"batch.loss": R, "cbstate.x": W}),
    )
    assert build(*callbacks, rank=1).explain() == (
        "2 ranks, of which this is 1\n"
        "     Log    on the main rank: it writes no state\n"
        "     Worst  on every rank: it writes cbstate.worst\n"
        "     Mine   on every rank: it writes cbstate.x\n"
        "     cbstate.x differs between ranks: Mine writes it and reads batch.loss\n"
        "\n"
        "BatchEnd, TrainingPhase\n"
        "  1. Worst.handle\n"
        "     exchange before: every rank gets a list of the values of batch.loss of all ranks\n"
        "     exchange after: every rank gets cbstate.worst of the main rank\n"
        "  2. Mine.handle\n"
        "  3. Log.handle    after Mine: Mine writes cbstate.x, Log reads it\n"
        "     exchange before: the main rank gets the mean of batch.loss of all ranks"
    )
    assert "rank" not in Callbacks(callbacks, LearnerState(), (TrainingPhase,)).explain()


# --- what several ranks refuse (rule 34)


def test_a_writer_on_the_main_rank_only() -> None:
    assert refused(at("Best", {"cbstate.history": R, "cbstate.best": W}, ranks="main"), Recorder()) == (
        "Best runs on the main rank only, since it says ranks = 'main', and writes cbstate.best, which must be the "
        "same on every rank: the other ranks would keep the value before. Declare "
        '{"cbstate.best": Write(broadcast=True)}, or set ranks = "every", so that each rank writes it.'
    )
    build(at("Best", {"cbstate.history": R, "cbstate.best": SENT}, ranks="main"), Recorder())
    assert "Write hyperparameters only, and declare" in refused(at("Rate", {"optimizer": W}, ranks="main"))
    assert 'declare {"cbstate.sent": Write(broadcast=True)}' in refused(
        at("Epochs", {"cbstate.metrics_epoch.Mine": W}, ranks="main")
    )


def test_a_callback_that_may_request_checkpoints_runs_on_every_rank() -> None:
    class Asks(Callback):
        may_checkpoint = True

    class AsksAlone(Asks):
        ranks = "main"

    assert "Asks  on every rank: it may request checkpoints" in build(Asks()).explain()
    assert refused(AsksAlone()) == (
        "AsksAlone runs on the main rank only, since it says ranks = 'main', and may_checkpoint = True: a checkpoint "
        "needs all ranks, since each gives its random numbers and its position. Leave ranks out, or set ranks = "
        '"every".'
    )


def test_a_reader_on_every_rank_of_an_entry_that_only_the_main_rank_has() -> None:
    writer = at("Main", {"batch.loss": R, "cbstate.x": W}, ranks="main")
    assert refused(writer, at("Each", {"cbstate.x": R, "batch.inputs": W})) == (
        "Each reads cbstate.x on every rank, and Main, which writes it, runs on the main rank only, since it says "
        'ranks = \'main\'. Declare {"cbstate.x": Write(broadcast=True)} in Main, or set ranks = "every" there.'
    )
    build(writer, at("Log", {"cbstate.x": R}))
    build(writer, at("Each", {"cbstate.x": Read(optional=True), "batch.inputs": W}))


def test_shared_state_that_is_made_of_local_state() -> None:
    assert refused(at("Rate", {"batch.loss": R, "optimizer.hyperparams": W})) == (
        "Rate reads batch.loss, which differs between ranks (each rank has a batch of its own), and writes "
        "optimizer.hyperparams, which must be the same on every rank: each rank would write another value. Read one "
        'value for all ranks: {"batch.loss": Read(reduce="mean")}. Or, if it is no number: declare '
        '{"optimizer.hyperparams": Write(broadcast=True)}: every rank then gets the value of the main rank.'
    )
    for fine in (
        {"batch.loss": Read(reduce="mean"), "optimizer.hyperparams": W},
        {"batch.loss": R, "optimizer.hyperparams": SENT},
    ):
        build(at("Rate", untyped(fine)))


@pytest.mark.parametrize(
    ("reads", "writes", "remedy"),
    [
        (
            "cbstate.smooth_loss",
            "params",
            "Read a value of all ranks instead: those of an epoch are in cbstate.metrics_epoch, and that of a batch is "
            '{"batch.loss": Read(reduce="mean")}.',
        ),
        (
            "data",
            "model",
            'Declare {"model": Write(broadcast=True)}: every rank then gets the value of the main rank.',
        ),
        (
            "data",
            "lossfn",
            'Write the value to an entry of its own, and declare {"cbstate.sent": Write(broadcast=True)}: every rank '
            "then gets the value of the main rank.",
        ),
        (
            "batch",
            "params",
            'Declare the entry that it needs, as one value for all ranks: {"batch.loss": Read(reduce="mean")}.',
        ),
        (
            "batch.outputs.x",
            "cbstate.history",
            'Read one value for all ranks: {"batch.outputs": Read(reduce="mean")}. Or, if it is no number: write the '
            'value to an entry of its own, and declare {"cbstate.sent": Write(broadcast=True)}: every rank then gets '
            "the value of the main rank.",
        ),
    ],
)
def test_the_remedy_fits_the_paths(reads: str, writes: str, remedy: str) -> None:
    callbacks = [at("Mine", {reads: R, writes: W})]
    if reads.startswith("cbstate"):
        callbacks.append(at("Other", {reads: W}))
    assert refused(*callbacks).endswith(f"each rank would write another value. {remedy}")


def test_a_local_value_that_goes_through_an_attribute_is_refused_too() -> None:
    """One handler keeps the loss, another one uses it."""
    told = refused(At("Rate", {BatchEnd: {"batch.loss": R}, UpdateBegin: {"optimizer.hyperparams": W}}))
    assert told.startswith("Rate reads batch.loss, which differs between ranks")


def test_gradients_are_changed_when_they_are_those_of_all_ranks() -> None:
    build(at("Clip", {"batch.grads": W}, UpdateBegin))
    remedy = (
        "Change gradients at UpdateBegin, where they are those of all ranks, by declaring "
        '{"batch.grads": Write()}; to change other entries of the batch declare these alone.'
    )
    assert refused(at("Clip", {"batch.grads": W}, BackwardEnd)).endswith(remedy)
    assert refused(at("Mix", {"batch": W}, UpdateBegin)).endswith(remedy)
    build(at("Mix", {"batch": W}))  # at the end of a batch, where gradients are used no more
    build(at("Mix", {"batch.inputs": W}, UpdateBegin))


def test_an_author_may_say_that_all_ranks_write_the_same() -> None:
    class Sure(At):
        agrees = True

    build(Sure("Rate", {EpochBegin: {"data": R, "optimizer.hyperparams": W}}))


def test_a_clock_cannot_decide_about_an_exchange() -> None:
    callback = throttle(at("Log", {"batch.loss": Read(reduce="mean")}), BatchEnd, seconds=5)
    assert refused(callback) == (
        "throttle(Log, BatchEnd, seconds=5) depends on a clock, and Log exchanges batch.loss with all ranks: "
        'Read(reduce="mean"). Where the clocks of two ranks disagree, one would wait for the other for ever. Count '
        "events instead: throttle(At(...), BatchEnd, every=10)."
    )
    build(throttle(at("Log", {"batch.loss": Read(reduce="mean")}), BatchEnd, every=5))
    own: dict[type[Event], Access] = {BatchEnd: {"batch.loss": Read(reduce="mean")}, EpochEnd: {}}
    build(throttle(At("Log", own), EpochEnd, seconds=5))  # another event than that of the exchange
    build(throttle(at("Log", {"batch.loss": R}), BatchEnd, seconds=5))  # on the main rank only, without an exchange


def test_a_clock_cannot_decide_about_shared_state() -> None:
    told = refused(throttle(at("Rate", {"optimizer.hyperparams": W}), BatchEnd, seconds=5))
    assert told.endswith("each rank would write another value. Count events instead: throttle(..., every=10).")


class Mine(Event):
    """An event of the user."""


class Own(TrainingPhase):
    """A phase with a step of its own."""

    def step(self, learner: Any, raw: Any) -> None: ...


_AGREED = (
    "One rank alone may leave the batch before all have agreed on it with the gradients. Exchange it at one of: "
    "BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd."
)


@pytest.mark.parametrize(
    ("event", "phase", "why"),
    [
        (BatchBegin, TrainingPhase, _AGREED),
        (LossBegin, TrainingPhase, _AGREED),
        (
            BatchEnd,
            ValidationPhase,
            "The ranks may have different numbers of batches in an evaluation. Write @on(BatchEnd, TrainingPhase).",
        ),
        (
            BatchEnd,
            Own,
            "The step of Own is your own, so it is not known which events of a batch are left out on a rank that "
            "leaves the batch. Exchange it at EpochEnd.",
        ),
        (
            Mine,
            TrainingPhase,
            "One rank alone may fire this event, and would wait for the others for ever. Exchange it at EpochEnd.",
        ),
        (
            BatchCancelled,
            TrainingPhase,
            "One rank alone may fire this event, and would wait for the others for ever. Exchange it at EpochEnd.",
        ),
    ],
)
def test_values_are_exchanged_at_events_that_every_rank_fires(event: type[Event], phase: Any, why: str) -> None:
    callback = at("Look", {"cbstate.x": Read(reduce="max")}, event)
    callback.phase = phase
    assert refused(at("Write", {"cbstate.x": W}), callback) == (
        f'Look exchanges cbstate.x with all ranks at ({event.__name__}, {phase.__name__}): Read(reduce="max"). {why}'
    )
    for fine in (EpochBegin, EpochEnd):
        callback = at("Look", {"cbstate.x": Read(reduce="max")}, fine)
        callback.phase = phase
        build(at("Write", {"cbstate.x": W}), callback)


def test_batches_that_accumulate_gradients_exchange_values_at_updates_only() -> None:
    peers = Peers(0, 2, no_exchange, in_batch=(UpdateBegin, UpdateEnd))
    for event, fine in ((UpdateEnd, True), (BatchEnd, False)):
        callbacks = [at("Look", {"batch.loss": Read(reduce="max")}, event)]
        if fine:
            Callbacks(callbacks, made_state(), (TrainingPhase,), peers=peers)
            continue
        with pytest.raises(RankError, match=r"Exchange it at one of: UpdateBegin, UpdateEnd\.$"):
            Callbacks(callbacks, made_state(), (TrainingPhase,), peers=peers)
    with pytest.raises(RankError, match=r"With several models, ranks exchange nothing within a batch\."):
        Callbacks(callbacks, made_state(), (TrainingPhase,), peers=Peers(0, 2, no_exchange, in_batch=()))


def test_sharded_parameters_need_all_ranks() -> None:
    assert refused(at("Norms", {"params": R}), sharded=True) == (
        "Norms runs on the main rank only, since it writes no state, and reads params, which is sharded: each rank "
        'holds a part, and all ranks must help to put it together. Declare {"params": Read(gather=True)}, or set '
        'ranks = "every", so that each rank reads its part.'
    )
    assert '{"batch.grads": Read(gather=True)}' in refused(at("Norms", {"batch": R}), sharded=True)
    assert '{"params": Read(gather=True)}' in refused(at("Norms", {"optimizer.state": R}), sharded=True)
    assert refused(at("Put", {"params": SENT}), sharded=True).endswith(
        "and the parameters are sharded: the main rank does not hold those of the others. Declare "
        '{"params": Write()} with ranks = "every", and let each rank change its part.'
    )
    build(at("Norms", {"params": Read(gather=True), "batch.loss": R}), sharded=True)
    build(at("Norms", {"params": R, "optimizer": R}, ranks="every"), sharded=True)
    build(at("Rate", {"optimizer.hyperparams": R}), sharded=True)


# --- the bundled callbacks


def test_the_default_callbacks_train_on_several_ranks() -> None:
    with tiny_learner(default_callbacks=True) as learner:
        built = build(*learner.callbacks)
        assert {node.name: ranks_of(node).ranks for node in built.nodes} == {
            "MetricsPrinter": "main",
            "Metrics": "every",
            "ProgressBar": "main",
            "Recorder": "every",
            "StopOnNaNLoss": "every",
        }


@pytest.mark.parametrize("name", [kind.__name__ for kind in KINDS])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_bundled_callback_trains_on_several_ranks(name: str, sharded: bool, tmp_path: Folder) -> None:
    case = CASES.get(name) or Case(lambda _: (getattr(flowtrain.callbacks, name)(),))
    options = {key: value for key, value in case.options.items() if key in ("model", "optimizer", "lossfn")}
    with tiny_learner(*case.make(tmp_path), **options) as learner:
        callbacks = list(learner.callbacks)
        state = learner.state
        peers = Peers(0, 2, no_exchange, sharded)
        Callbacks(callbacks, state, map(type, state.data), callbacks, peers=peers)
