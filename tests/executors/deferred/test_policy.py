"""Rules 19 and 23: which callbacks are deferred, and which share a lane."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    CallbackError,
    LearnerView,
    Phase,
    Read,
    TrainingPhase,
    Write,
    callback_graph,
    on,
)
from flowtrain.graph.nodes import Node
from flowtrain.graph.registry import Callbacks
from flowtrain.state.learner_state import LearnerState
from flowtrain_dask.deferred.policy import decide, stays_here


class Sees(Callback):
    """A callback that can be deferred, or not, with what joins it to others."""

    def __init__(
        self,
        name: str,
        *,
        deferrable: bool = True,
        after: Sequence[type[Callback]] = (),
        access: Access | None = None,
    ) -> None:
        self.name = name
        self.deferrable = deferrable
        self.after = tuple(after)
        self.access: Access = {"batch.loss": Read()} if access is None else access

    def state_access(self) -> Access:
        return self.access

    def run_after(self) -> tuple[type[Callback], ...]:
        return self.after

    @on(BatchEnd, TrainingPhase)
    def see(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None: ...


class Other(Sees):
    pass


class Third(Sees):
    pass


def nodes(*callbacks: Callback) -> tuple[Node, ...]:
    return Callbacks(callbacks, LearnerState(), (TrainingPhase,)).nodes


def lanes(*callbacks: Callback) -> list[list[str]]:
    return [[node.name for node in lane] for lane in decide(nodes(*callbacks)).lanes]


def test_each_deferrable_callback_has_a_lane_of_its_own() -> None:
    assert lanes(Sees("a"), Sees("b", deferrable=False), Sees("c")) == [["a"], ["c"]]


def test_callbacks_joined_by_run_after_or_a_resource_share_a_lane_in_list_order() -> None:
    """Rule 23."""
    file: Access = {"resource.file": Write()}
    assert lanes(Sees("a", access=file), Other("b"), Third("c", access=file, after=[Other]), Sees("d")) == [
        ["a", "b", "c"],
        ["d"],
    ]


def test_what_something_in_place_needs_stays_in_place_and_what_needs_it_too() -> None:
    """Rule 19: until nothing changes."""
    shared: Access = {"resource.file": Write()}
    found = decide(
        nodes(
            Sees("first", access=shared),
            Other("second", access={**shared, "resource.other": Write()}),
            Third("last", deferrable=False, access={"resource.other": Write()}),
            Sees("free"),
        )
    )
    assert [[node.name for node in lane] for lane in found.lanes] == [["free"]]
    assert found.kept == {
        "second": "last runs in place and shares resource.other",
        "first": "second runs in place and shares resource.file",
    }


def test_a_callback_that_runs_after_a_deferrable_one_keeps_it() -> None:
    found = decide(nodes(Sees("a"), Other("b", deferrable=False, after=[Sees])))
    assert found.lanes == ()
    assert found.kept == {"a": "b runs in place, after it"}


def test_a_deferred_callback_may_run_after_one_in_place() -> None:
    assert lanes(Sees("a", deferrable=False), Other("b", after=[Sees])) == [["b"]]


@pytest.mark.parametrize(
    ("access", "named"),
    [
        ({"cbstate.best": Write()}, "declares Write\\(\\) on 'cbstate.best'.*what it writes would come too late"),
        ({"resource.rng": Write()}, "declares Write\\(\\) on .resource.rng..*has random numbers of its own.*leave"),
    ],
)
def test_a_deferrable_callback_that_writes_is_refused(access: Access, named: str) -> None:
    """Rule 19: also under the serial executor, so that the choice of executor decides nothing."""
    with pytest.raises(CallbackError, match=f"(?s)a is deferrable and {named}.*deferrable = False"):
        callback_graph([Sees("a", access=access)])


def test_who_reads_a_whole_series_stays_in_this_process() -> None:
    """Rule 22."""
    [one, other] = nodes(
        Sees("a", access={"cbstate.metrics_step": Read(optional=True, full=True)}),
        Other("b", access={"cbstate.metrics_step": Read(optional=True)}),
    )
    assert stays_here(one) == "it declares Read(full=True) on 'cbstate.metrics_step'"
    assert stays_here(other) == ""
