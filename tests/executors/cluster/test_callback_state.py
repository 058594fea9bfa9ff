"""Callbacks as bytes: what travels, what stays, and what comes home (rules 25 and 26)."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import BatchEnd, Callback, LearnerView, Phase, TrainingPhase, on
from flowtrain.callbacks import throttle
from flowtrain.errors import ExecutorError
from flowtrain.logging import JsonlBackend, LoggerBackend
from flowtrain_dask.cluster.callback_state import (
    build,
    check_can_be_sent,
    dump_job,
    dump_state,
    load_state,
    shared_objects,
)
from tests.support.lanes import Memory, job_of
from tests.support.untyped import untyped


class Carrier(Callback):
    """Keeps what it is given."""

    def __init__(self, name: str, *backends: LoggerBackend) -> None:
        self.name = name
        self.backends = backends
        self.found: Any = []

    @on(BatchEnd, TrainingPhase)
    def note(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Count."""
        self.found.append(len(self.found))


class Opening(Carrier):
    """Leaves out what it makes when it is first needed."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "lock"}


class Setting(Carrier):
    """Has a function for its state."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, restored=True)


def kept_of(*callbacks: Callback) -> list[object]:
    """Return what stays here when these callbacks travel."""
    return shared_objects(job_of(*callbacks), callbacks)


def moved(*callbacks: Callback) -> tuple[list[Callback], list[object]]:
    """Return callbacks as they are in another process, and what stays of them there."""
    _, there, kept = build(dump_job(job_of(*callbacks), callbacks))
    load_state(there, kept, dump_state(callbacks, kept_of(*callbacks)))
    return there, kept


def test_what_two_callbacks_of_a_lane_share_they_share_there_and_at_home_again(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log.jsonl")
    one, two = Carrier("one", backend), Carrier("two", backend)
    one.found = two.found = [0]
    there, kept = moved(one, two)
    far_one, far_two = there
    assert isinstance(far_one, Carrier)
    assert isinstance(far_two, Carrier)
    assert far_one.found is far_two.found
    assert far_one.backends[0] is far_two.backends[0] is not backend
    far_one.found.append(1)
    load_state([one, two], kept_of(one, two), dump_state(there, kept))
    assert one.found == [0, 1]
    assert one.found is two.found
    assert one.backends == (backend,)  # rule 26: backends stay the driver's objects
    assert one.backends[0] is backend


def test_an_attribute_may_lead_to_the_callback_itself_and_to_its_neighbour(tmp_path: Path) -> None:
    one, two = Carrier("one"), Carrier("two")
    one.found = {"me": one, "other": two, "method": two.note}
    there, kept = moved(one, two)
    assert isinstance(there[0], Carrier)
    assert there[0].found["me"] is there[0]
    assert there[0].found["method"].__self__ is there[1]
    load_state([one, two], kept_of(one, two), dump_state(there, kept))
    assert one.found["me"] is one
    assert one.found["method"].__self__ is two


def test_rule_26_tensors_keep_their_attributes_and_the_memory_that_they_share() -> None:
    """Rule 26: a handler in another process sees and leaves the same as one here."""
    one, scale, z = Carrier("one"), torch.ones(2), torch.tensor([1 + 2j])
    vars(scale)["unit"] = "m"
    one.found = [scale, scale[1:], z, z.conj()]
    there, kept = moved(one)
    assert isinstance(there[0], Carrier)
    scale, _, z, _ = there[0].found
    assert vars(scale) == {"unit": "m"}
    vars(scale)["unit"] = "km"
    scale.fill_(5)
    z.mul_(2)
    load_state([one], kept_of(one), dump_state(there, kept))
    assert vars(one.found[0]) == {"unit": "km"}
    assert [each.tolist() for each in one.found] == [[5.0, 5.0], [5.0], [2 + 4j], [2 - 4j]]


def test_conditions_stay_where_they_are_asked() -> None:
    """Rule 20: the driver asks, so what a worker has of them never comes back."""
    one = Carrier("one")
    throttle(one, BatchEnd, every=2)
    [condition] = one.conditions
    there, kept = moved(one)
    assert there[0].conditions[0] is not condition
    condition.ready(TrainingPhase())
    load_state([one], kept_of(one), dump_state(there, kept))
    assert list(one.conditions) == [condition]
    assert condition.ready(TrainingPhase())  # the second


def test_state_that_comes_home_replaces_attributes_and_removes_those_that_are_gone() -> None:
    one = Carrier("one")
    untyped(one).later = 1  # an attribute that a handler deletes
    there, kept = moved(one)
    del vars(there[0])["later"]
    load_state([one], kept_of(one), dump_state(there, kept))
    assert set(vars(one)) == set(vars(there[0]))


def test_a_callback_has_its_backends_at_every_moment(tmp_path: Path) -> None:
    """State comes home on the lane's thread, and the training thread may look for the backends just then."""
    one = Carrier("one", JsonlBackend(tmp_path / "log.jsonl"))
    kept, state = kept_of(one), dump_state([one], kept_of(one))
    missing: list[BaseException] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            try:
                assert one.backends[0]
                assert one.name == "one"
            except BaseException as error:
                missing.append(error)
                return

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(3000):
        load_state([one], kept, state)
    ended.set()
    thread.join()
    assert missing == []


def test_what_getstate_leaves_out_is_left_out_there() -> None:
    one = Opening("one")
    untyped(one).lock = threading.Lock()  # see the class
    check_can_be_sent(job_of(one), [one])
    assert "lock" not in vars(moved(one)[0][0])


def test_setstate_is_called() -> None:
    assert vars(moved(Setting("one"))[0][0])["restored"] is True


def test_what_does_not_pickle_is_named_with_what_to_write() -> None:
    one = Carrier("one")
    one.found = threading.Lock()
    with pytest.raises(ExecutorError) as caught:
        check_can_be_sent(job_of(one), [one])
    assert str(caught.value) == (
        "one cannot be sent to another process: its attribute 'found', a lock, does not pickle (TypeError: cannot "
        "pickle '_thread.lock' object). Make it in a handler when it is first needed and leave it out in Carrier."
        "__getstate__, set one.deferrable = False, or use DaskExecutor(), whose lanes are threads."
    )


def refusal_of(callback: Callback) -> str:
    """Return how the check refuses a callback, from the part that does not pickle on, without the common remedies."""
    with pytest.raises(ExecutorError) as caught:
        check_can_be_sent(job_of(callback), [callback])
    text = str(caught.value).removeprefix(f"{callback.name} cannot be sent to another process: ")
    return text.removesuffix(
        f", set {callback.name}.deferrable = False, or use DaskExecutor(), whose lanes are threads."
    )


def test_an_attribute_that_getstate_leaves_out_is_not_blamed() -> None:
    one = Opening("one")
    untyped(one).lock = threading.Lock()
    one.found = threading.Lock()
    assert refusal_of(one).startswith("its attribute 'found', a lock, does not pickle")


def test_code_of_the_main_script_is_blamed_with_what_it_names() -> None:
    """Such code is sent with all that it names. A class of a module is sent by its name, wherever its locks are."""
    lock = threading.Lock()

    class WithAttribute(Carrier):
        guard = lock

    remedy = "Define {} in a module that the workers can import, which is sent by its name alone"
    assert refusal_of(WithAttribute("one")) == (
        "its class attribute 'guard', a lock, does not pickle (TypeError: cannot pickle '_thread.lock' object). "
        + remedy.format("WithAttribute")
    )
    script: dict[str, Any] = {"__name__": "__main__", "Carrier": Carrier, "lock": lock}
    exec("class WithGlobal(Carrier):\n    def use(self):\n        return lock", script)
    assert refusal_of(script["WithGlobal"]("one")) == (
        "the global 'lock' in the code of WithGlobal.use, a lock, does not pickle (TypeError: cannot pickle "
        "'_thread.lock' object). " + remedy.format("WithGlobal")
    )


def test_a_backend_and_a_getstate_that_fails_are_blamed() -> None:
    class Locked(Memory):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

        def __getstate__(self) -> Any:
            return vars(self)

    assert refusal_of(Carrier("one", Locked())) == (
        "its backend Locked does not pickle (TypeError: cannot pickle '_thread.lock' object). Leave out in "
        "Locked.__getstate__ whatever its open() makes"
    )

    class Failing(Carrier):
        def __getstate__(self) -> Any:
            raise ValueError("no state")

    assert refusal_of(Failing("one")) == (
        "its __getstate__ fails (ValueError: no state). Return a dict of attributes in Failing.__getstate__"
    )
