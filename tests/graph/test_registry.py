"""The callbacks of a learner: lookup, setup, and changes that happen completely or not at all (rules 7, 10 and 11)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from flowtrain import (
    Access,
    AccessError,
    BatchBegin,
    BatchEnd,
    Callback,
    CallbackError,
    CycleError,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    FlowtrainError,
    Learner,
    LearnerView,
    MissingStateError,
    Phase,
    ProtectedException,
    Read,
    TrainingPhase,
    ValidationPhase,
    Write,
    WriteConflictError,
    callback_graph,
    on,
)
from flowtrain.callback.handler import Handler
from flowtrain.callbacks import Recorder
from flowtrain.errors import HandlerError
from flowtrain.graph.nodes import unique_names
from flowtrain.graph.registry import Callbacks
from flowtrain.state.by_phase import CountsMap
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.series import SeriesMap
from flowtrain.testing import tiny_learner
from tests.support.fired import OODPhase
from tests.support.untyped import untyped

R, W = Read(), Write()


class At(Callback):
    """Handles BatchEnd, with the declaration and the `setup` that the test gives."""

    def __init__(self, access: Access | None = None, log: list[str] | None = None, name: str = "") -> None:
        self.access: Access = access or {}
        self.log = [] if log is None else log
        self.name = name

    def state_access(self) -> Access:
        return self.access

    def setup(self, learner: LearnerView) -> None:
        self.log.append(self.name or type(self).__name__)
        for path, kind in self.access.items():
            parts = path.split(".")
            if isinstance(kind, Write) and len(parts) == 2 and parts[0] == "cbstate":
                setattr(learner.cbstate, parts[1], [0])

    @on(BatchEnd)
    def handle(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...


class Other(At): ...


def tiny(*callbacks: Callback, **kwargs: Any) -> Learner:
    data = [(torch.ones(2, 1), torch.ones(2, 1))]
    kwargs = {"data": (data, data), "default_callbacks": False, **kwargs}
    return Learner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, callbacks=callbacks, **kwargs)


def names(callbacks: Sequence[Callback]) -> list[str]:
    return [callback.name for callback in callbacks]


# --- finding


def test_callbacks_are_a_sequence() -> None:
    one, other = At(), Other()
    callbacks = tiny(one, other).callbacks
    assert (list(callbacks), len(callbacks), callbacks[1], callbacks[:1]) == ([one, other], 2, other, [one])
    assert one in callbacks
    assert repr(callbacks) == "<Callbacks: At, Other>"


def test_callbacks_are_found_by_type_or_name() -> None:
    one, other = Other(), At(name="mine")
    learner = tiny(one, other)
    assert learner.get_callback(At) is one  # a base type finds instances of its subclasses; the first one is returned
    assert learner.get_callback("mine") is other
    assert learner.get_callback("At") is learner.get_callback(untyped(int)) is None
    with pytest.raises(CallbackError) as caught:
        learner.remove_callback("mime")
    assert str(caught.value) == "There is no callback mime. Did you mean 'mine'? The learner has: Other, mine."
    with pytest.raises(CallbackError) as caught:
        learner.callbacks.find(untyped(3))
    assert learner.callbacks.find(other) is other
    assert str(caught.value) == (
        'A callback is found by its type or name, got 3. Pass a class, such as Recorder, or a name, such as "Recorder".'
    )


# --- setup


def test_setup_runs_once_and_for_new_callbacks_only() -> None:
    """Rule 7: `setup` runs when the learner is built, and later only for callbacks that are new."""
    log: list[str] = []
    one, two, three = (At(log=log, name=name) for name in ("one", "two", "three"))
    learner = tiny(one, two)
    assert log == ["one", "two"]
    learner.add_callback(three)
    learner.remove_callback("one")
    learner.set_callbacks([three, two])
    learner.fit(2)
    assert log == ["one", "two", "three"]
    learner.add_callback(one)  # it was removed before, so it is new again
    assert log == ["one", "two", "three", "one"]


def test_a_replaced_callback_gives_its_place_and_the_new_one_is_set_up() -> None:
    log: list[str] = []
    old, other = At(log=log), Other(log=log)
    learner = tiny(old, other)
    new = At(log=log)
    assert learner.replace_callback(new) is old
    assert list(learner.callbacks) == [new, other]
    assert names(learner.callbacks) == ["At", "Other"]
    assert log == ["At", "Other", "At"]


def test_setup_goes_from_writers_to_readers() -> None:
    """Rule 7."""
    log: list[str] = []
    reader = At({"cbstate.x": R}, log, "reader")
    tiny(reader, At({"cbstate.x": W, "cbstate.y": R}, log, "both"), At({"cbstate.y": W}, log, "writer"))
    assert log == ["writer", "both", "reader"]


def test_a_reader_finds_in_setup_what_its_writer_made() -> None:
    class Looks(At):
        def setup(self, learner: LearnerView) -> None:
            self.log.append(str(list(learner.cbstate.x)))

    log: list[str] = []
    tiny(Looks({"cbstate.x": R}, log), At({"cbstate.x": W}))
    assert log == ["[0]"]


def test_what_setup_raises_names_the_callback() -> None:
    class Reader(Callback):
        def state_access(self) -> Access:
            return {"cbstate.best": Write()}

        def setup(self, learner: LearnerView) -> None:
            learner.cbstate.best += 1  # no callback makes this entry

    class Broken(Callback):
        def setup(self, learner: LearnerView) -> None:
            raise OSError("disk")

    with pytest.raises(MissingStateError) as missing:
        tiny_learner(Reader())
    assert missing.value.__notes__ == ["raised in Reader.setup"]
    with pytest.raises(OSError, match="disk") as broken:
        tiny_learner(Broken())
    assert broken.value.__notes__ == ["raised in Broken.setup"]


def test_setup_gets_the_union_of_all_access() -> None:
    """Rule 3: the view of `setup` has the union of `state_access()` and the handlers' declarations, and no more."""

    class Union(At):
        @on(EpochEnd, access={"cbstate.own": W})
        def end(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

        def setup(self, learner: LearnerView) -> None:
            learner.cbstate.shared = learner.cbstate.own = 1
            with pytest.raises(ProtectedException, match=r"^Write access to Learner\.cbstate\.third disallowed\."):
                learner.cbstate.third = 1

    learner = tiny(Union({"cbstate.shared": W}))
    assert vars(learner.cbstate) == {"shared": 1, "own": 1}


def test_containers_are_made_by_the_learner() -> None:
    """Series and namespaces that are declared for writing exist before any `setup` runs."""
    state = LearnerState()
    Callbacks([Deep()], state)
    assert type(state.cbstate.history) is CountsMap
    assert type(state.cbstate.hyperparams) is SeriesMap
    assert list(state.cbstate.hyperparams) == ["LearningRate"]
    assert repr(state.cbstate.stats) == "State(cbstate.stats: empty)"
    assert set(state.cbstate) == {"history", "hyperparams", "stats"}


class Deep(Callback):
    """Declares to write at several depths, and makes no entry itself."""

    def state_access(self) -> Access:
        return {
            "cbstate.history": W,
            "cbstate.hyperparams.LearningRate": W,
            "cbstate.stats.mean": W,
            "cbstate.plain": W,
        }


# --- a refused change


class Conflicts(At):
    """Writes the same entry as `Keeps`."""

    def __init__(self) -> None:
        super().__init__({"cbstate.kept": W})


class Misses(At):
    def __init__(self) -> None:
        super().__init__({"cbstate.nowhere": R})


class Unknown(At):
    def __init__(self) -> None:
        super().__init__({"batch.nothing": R})


class Circular(At):
    """Must run before the writer of an entry that it reads."""

    def __init__(self) -> None:
        super().__init__({"cbstate.kept": R, "cbstate.other": W})

    def run_after(self) -> tuple[type[Callback], ...]:
        return (Circular2,)


class Circular2(At):
    def run_after(self) -> tuple[type[Callback], ...]:
        return (Circular,)


class Breaks(At):
    """Changes all state that it may change, then raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__({"cbstate": W, "cbstate.stats.mean": W})
        self.error = error

    def run_after(self) -> tuple[type[Callback], ...]:
        return (Keeps,)

    def setup(self, learner: LearnerView) -> None:
        state = learner.cbstate
        state.kept.append(4)
        state.nested["a"]["b"].add(5)
        state.nested["new"] = 1
        state.stats.mean = 7
        state.stats.parts.append(3)
        state.stats.more = 8
        state.hyperparams.push("LearningRate", 0.5, 2)
        state.hyperparams.push("Momentum", 0.9, 1)
        state.history[ValidationPhase()] = state.history[TrainingPhase]
        state.fresh = "made"
        state.plain = 2
        del state.gone
        raise self.error


class Promises(At):
    """Declares to write an entry that others read, and does not make it."""

    def state_access(self) -> Access:
        return {"cbstate.promised": W}

    def setup(self, learner: LearnerView) -> None:
        """Do nothing."""


class Believes(At):
    def __init__(self) -> None:
        super().__init__({"cbstate.promised": R})


class Keeps(At):
    """The learner's callback before the change, which keeps state of every kind."""

    def state_access(self) -> Access:
        entries = ("kept", "nested", "plain", "gone", "history", "hyperparams")
        return {**{f"cbstate.{name}": W for name in entries}, "cbstate.stats.mean": W, "cbstate.stats.parts": W}

    def setup(self, learner: LearnerView) -> None:
        state = learner.cbstate
        state.kept = [1, 2, 3]
        state.nested = {"a": {"b": {1, 2}}}
        state.plain = 1
        state.gone = None
        state.stats.mean = 0.5
        state.stats.parts = [1, 2]
        state.hyperparams.push("LearningRate", 0.1, 1)
        state.history[TrainingPhase]


def snapshot(learner: Learner) -> tuple[Any, ...]:
    """Return everything that a refused change must leave unchanged, by value and by identity."""
    state = learner.cbstate
    plain = {name: copy.deepcopy(value) for name, value in vars(state).items() if name not in ("stats", "hyperparams")}
    return (
        plain,
        {name: id(value) for name, value in vars(state).items()},
        copy.deepcopy(vars(state.stats)),
        {name: list(series) for name, series in state.hyperparams.items()},
        list(vars(state.__twins__)),
        (state.__twins__.plain, list(state.__twins__.kept), state.__twins__.stats.mean),
        learner.callbacks,
        [(callback, callback.name) for callback in learner.callbacks],
        {kind: learner.callbacks.plan(kind, TrainingPhase) for kind in (EpochBegin, BatchEnd)},
        learner.callbacks.explain(),
    )


CHANGES: list[tuple[list[Callable[[], Callback]], type[BaseException]]] = [
    ([Conflicts], WriteConflictError),
    ([Misses], MissingStateError),
    ([Unknown], AccessError),
    ([Circular, Circular2], CycleError),
    ([lambda: Breaks(ValueError("midway"))], ValueError),
    ([lambda: Breaks(KeyboardInterrupt())], KeyboardInterrupt),
    ([Promises, Believes], MissingStateError),
    ([lambda: At(name="keeper")], CallbackError),
]


@pytest.mark.parametrize(("makers", "kind"), CHANGES)
def test_a_refused_change_changes_nothing(makers: list[Callable[[], Callback]], kind: type[BaseException]) -> None:
    """Rule 11: callbacks, names, plans and ``cbstate`` stay as before, even if `setup` raises midway."""
    log: list[str] = []
    learner = tiny(Keeps(name="keeper"), Other(log=log))
    before = snapshot(learner)
    added = [make() for make in makers]
    given = names(added)
    with pytest.raises(kind):
        learner.set_callbacks([*added, *learner.callbacks])
    assert snapshot(learner) == before
    assert names(added) == given  # the refused callbacks got no names
    assert log == ["Other"]
    learner.fit(1)
    # The learner trains as if the change had not been requested.
    learner.add_callback(At(log=log))
    assert log == ["Other", "At"]


@pytest.mark.parametrize("change", ["add", "replace", "remove", "set"])
def test_every_way_to_change_can_be_refused(change: str) -> None:
    writer, reader = Other({"cbstate.x": W}), At({"cbstate.x": R})
    learner = tiny(writer, reader)
    ways: dict[str, tuple[Callable[[], object], type[FlowtrainError]]] = {
        "add": (lambda: learner.add_callback(Other({"cbstate.x": W}, name="second")), WriteConflictError),
        "replace": (lambda: learner.replace_callback(At({"cbstate.y": R})), MissingStateError),
        "remove": (lambda: learner.remove_callback("nobody"), CallbackError),
        "set": (lambda: learner.set_callbacks([reader, Misses()]), MissingStateError),
    }
    call, kind = ways[change]
    before = learner.callbacks
    with pytest.raises(kind):
        call()
    assert learner.callbacks is before
    assert list(before) == [writer, reader]


def test_a_learner_that_is_refused_when_built_says_why() -> None:
    with pytest.raises(MissingStateError, match=r"^Misses reads cbstate\.nowhere, and no callback declares to write"):
        tiny(Misses())


# --- types first seen later


class Mine(Event): ...


class Anywhere(Callback):
    """Handles every event, with a declaration of the test for a phase that the learner does not know yet."""

    def __init__(self, log: list[str], **access: Access) -> None:
        self.log = log
        self.own = access

    def handlers(self) -> Iterator[tuple[type, Handler]]:
        kinds: dict[str, type[Event]] = {"begin": BatchBegin, "end": BatchEnd, "epoch": EpochBegin}
        for name, access in self.own.items():
            yield type(self), Handler(kinds[name], Phase, access, type(self).__name__, "handle")

    def handle(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        self.log.append(f"{self.name} {type(event).__name__}")


def test_a_phase_seen_later_is_checked_before_its_first_event() -> None:
    """Rule 11: no handler has run yet, even if only a later event of the phase has the conflict."""

    class One(Anywhere): ...

    class Two(Anywhere): ...

    log: list[str] = []
    callbacks = [One(log, epoch={}, end={"batch.extra": W}), Two(log, epoch={}, end={"batch.extra": W})]
    learner = tiny(*callbacks, data=None)
    data = [(torch.ones(2, 1), torch.ones(2, 1))]
    with pytest.raises(WriteConflictError, match=r"^One and Two both write at \(BatchEnd, OODPhase\)"):
        learner.epoch(OODPhase, data)
    assert log == []


def test_entries_of_a_phase_seen_later_may_come_from_its_other_events() -> None:
    log: list[str] = []
    maker = Anywhere(log, begin={"batch.extra": W})
    reader = Anywhere(log, end={"batch.extra": Read()})
    maker.name, reader.name = "maker", "reader"
    callbacks = Callbacks([reader, maker], LearnerState())
    assert [planned.label for planned in callbacks.plan(BatchEnd, OODPhase).handlers] == ["reader.handle"]
    with pytest.raises(AccessError, match=r"reads batch\.extra at \(BatchEnd, OODPhase\), but OODPhase provides"):
        Callbacks([reader], LearnerState()).plan(EpochBegin, OODPhase)


def test_an_event_seen_later_is_checked_before_it_fires() -> None:
    """Rule 11: two callbacks that handle different events meet at an event that derives from both."""

    class Theirs(Event): ...

    class Late(Mine, Theirs): ...

    class One(Callback):
        @on(Mine, access={"cbstate.x": W})
        def handle(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    class Two(Callback):
        @on(Theirs, access={"cbstate.x": W})
        def handle(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    learner = tiny(One(), Two())
    for _ in range(2):  # a refused event is checked again
        with pytest.raises(WriteConflictError, match=r"^One and Two both write at \(Late, TrainingPhase\)"):
            learner.fire(Late(), TrainingPhase())
    learner.fire(Mine(), TrainingPhase())


# --- explain and graph


def test_explain() -> None:
    learner = tiny(At({"cbstate.x": R}), Other({"cbstate.x": W}))
    assert learner.callbacks.explain() == (
        "BatchEnd, TrainingPhase\n"
        "  1. Other.handle\n"
        "  2. At.handle     after Other: Other writes cbstate.x, At reads it\n"
        "\n"
        "BatchEnd, ValidationPhase\n"
        "  1. Other.handle\n"
        "  2. At.handle     after Other: Other writes cbstate.x, At reads it"
    )


def test_explain_goes_through_a_fit_in_order() -> None:
    class All(Callback):
        @on(Event)
        def handle(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

        @on(Mine)
        def mine(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    callbacks = Callbacks([All()], LearnerState(), [ValidationPhase])
    titles = [block.splitlines()[0] for block in callbacks.explain().split("\n\n")]
    events = ["EpochBegin", "BatchBegin", "LossBegin", "BatchEnd", "BatchCancelled", "EpochEnd", "EpochCancelled"]
    assert titles == ["FitBegin, Phase", *(f"{event}, ValidationPhase" for event in [*events, "Mine"]), "FitEnd, Phase"]


def test_explain_has_what_the_executor_says_of_a_plan() -> None:
    callbacks = Callbacks([At()], LearnerState(), [TrainingPhase])
    callbacks.annotate(lambda plan: f"{len(plan)} on one thread")
    assert callbacks.explain() == "BatchEnd, TrainingPhase  [1 on one thread]\n  1. At.handle"


def test_nothing_to_explain() -> None:
    assert tiny().callbacks.explain() == "No callback has a handler for a known event."


def test_the_graph_of_a_learner() -> None:
    learner = tiny(At({"cbstate.x": R}), Other({"cbstate.x": W}))
    assert list(learner.callbacks.graph.edges(data=True)) == [
        (
            "Other",
            "At",
            {
                "reason": "Other writes cbstate.x, At reads it",
                "events": ((BatchEnd, TrainingPhase), (BatchEnd, ValidationPhase)),
            },
        )
    ]


def test_the_graph_without_a_learner() -> None:
    """The graph is checked as in a learner; since no `setup` runs, entries need not exist."""
    log: list[str] = []
    graph = callback_graph([At({"cbstate.x": R}, log), Other({"cbstate.x": W}, log)])
    assert list(graph.edges) == [("Other", "At")]
    assert log == []
    with pytest.raises(WriteConflictError):
        callback_graph([At({"cbstate.x": W}), Other({"cbstate.x": W})])
    with pytest.raises(MissingStateError):
        callback_graph([Misses()])
    with pytest.raises(AccessError):
        callback_graph([Unknown()])


def test_state_access_is_asked_once() -> None:
    asked: list[str] = []

    class Asked(At):
        def state_access(self) -> Access:
            asked.append("state_access")
            return {"batch.loss": Read(optional=True)}

        @on(FitBegin)
        def begin(self, event: Event, phase: Phase, learner: LearnerView) -> None: ...

    tiny(Asked()).fit(1)
    assert asked == ["state_access"]


def test_a_removed_writer_leaves_no_stale_entries_to_read() -> None:
    """Rule 10 holds for changes too: an entry whose writer was removed cannot be read any more."""
    learner = tiny_learner()
    with pytest.raises(MissingStateError, match=r"Metrics reads cbstate\.history, and no callback declares"):
        learner.remove_callback(Recorder)
    assert learner.get_callback(Recorder) is not None


def test_an_event_fired_in_setup_is_refused() -> None:
    class Early(Callback):
        def setup(self, learner: LearnerView) -> None:
            learner.fire(EpochEnd())

    learner = tiny_learner()
    with pytest.raises(CallbackError, match=r"Early\.setup fires EpochEnd\(\), and nothing runs yet"):
        learner.add_callback(Early())
    assert learner.state.fired == []


def test_a_setup_that_fires_and_then_fails_leaves_no_event_behind() -> None:
    """Rule 11: otherwise the event of the refused `setup` would run after the next event that is fired."""

    class Early(Callback):
        def setup(self, learner: LearnerView) -> None:
            learner.fire(EpochEnd())
            raise ValueError("no")

    learner = tiny_learner()
    with pytest.raises(ValueError, match="no"):
        learner.add_callback(Early())
    assert learner.state.fired == []


def test_an_override_that_is_no_handler_any_more_is_refused() -> None:
    class Silent(Recorder):
        count_batch = None  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]  # on purpose

    class Fewer(Recorder):
        def count_batch(self) -> None:  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]  # on purpose
            pass

    with pytest.raises(HandlerError, match=r"Recorder\.count_batch on \(BatchEnd, Phase\) is None in Silent"):
        tiny_learner(Silent())
    with pytest.raises(HandlerError, match=r"Fewer\.count_batch\(\) .*cannot be a handler"):
        tiny_learner(Fewer())


def test_stale_entries_stay_unreadable_after_further_changes() -> None:
    """Rule 10."""

    class Makes(Callback):
        def state_access(self) -> Access:
            return {"cbstate.best": Write()}

        def setup(self, learner: LearnerView) -> None:
            learner.cbstate.best = 0.0

    class Reads(Callback):
        def state_access(self) -> Access:
            return {"cbstate.best": Read()}

    learner = tiny_learner(Makes())
    learner.remove_callback(Makes)
    with pytest.raises(MissingStateError, match=r"Reads reads cbstate\.best, and no callback declares to write it"):
        learner.add_callback(Reads())


def test_a_callback_knows_its_name_in_setup_and_a_refused_one_has_none() -> None:
    names: list[str] = []

    class Named(Callback):
        def setup(self, learner: LearnerView) -> None:
            names.append(self.name)
            if len(names) == 2:
                raise ValueError("no")

    learner = tiny_learner(Named())
    second = Named()
    with pytest.raises(ValueError, match="no"):
        learner.add_callback(second)
    assert names == ["Named", "Named#2"]
    assert second.name == ""


# --- names are unique in a learner, and kept while the list changes


class Named(Callback):
    """Gets a name from the test, or none."""

    def __init__(self, name: str = "") -> None:
        self.name = name


class OtherNamed(Named): ...


def named(*callbacks: Callback) -> list[str]:
    return [name for _, name in unique_names(list(callbacks))]


def test_names_are_unique() -> None:
    assert named(Named(), OtherNamed(), Named(), Named()) == ["Named", "OtherNamed", "Named#2", "Named#3"]


def test_a_name_of_ones_own_is_kept_and_never_given_away() -> None:
    assert named(Named(), Named(name="Named#2"), Named(), Named(name="mine")) == ["Named", "Named#2", "Named#3", "mine"]
    assert named(OtherNamed(), Named(name="OtherNamed")) == ["OtherNamed#2", "OtherNamed"]


def test_names_stay_when_the_list_changes() -> None:
    learner = tiny_learner(Named(), Named(), Named(), default_callbacks=False)
    learner.remove_callback("Named#2")
    assert [callback.name for callback in learner.callbacks] == ["Named", "Named#3"]
    learner.add_callback(Named())
    assert [callback.name for callback in learner.callbacks] == ["Named", "Named#3", "Named#2"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: [Named(name="mine"), OtherNamed(name="mine")],
            "Two callbacks have the name 'mine'. A name is unique in a learner: change one.",
        ),
        (lambda: [Named], "Named is a class. Pass an instance: Named()."),
        (
            lambda: [print],
            "<built-in function print> is no callback. Subclass flowtrain.Callback, or wrap a function: "
            "CustomCallback(f, EpochEnd, TrainingPhase).",
        ),
        (lambda: [Named()] * 2, "<Named> is in the list twice, at 0 and 1. Make two instances if you want two."),
    ],
)
def test_what_is_no_list_of_callbacks(make: Callable[[], list[Any]], message: str) -> None:
    with pytest.raises(CallbackError) as caught:
        unique_names(make())
    assert str(caught.value) == message


def test_a_name_stays_with_its_callback_wherever_it_stands() -> None:
    """The name is the key of the callback's state."""
    first = Recorder()
    first.name = "Recorder"
    second = Recorder()
    assert unique_names([second, first]) == [(second, "Recorder#2"), (first, "Recorder")]
