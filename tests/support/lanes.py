"""The job of a lane, and a backend that keeps its records in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from flowtrain import Access, Callback, Read
from flowtrain.callback.access import declare
from flowtrain.graph.held_backends import backends_of
from flowtrain.logging.backend import Group, LoggerBackend, Run
from flowtrain.state.partial_view import Owner
from flowtrain_dask.lanes.threads import Workable
from flowtrain_dask.lanes.work import Job, LaneHandler


class Memory(LoggerBackend):
    """A backend that keeps its records in the memory of the process that writes them."""

    def __init__(self) -> None:
        self.records: list[str] = []

    @property
    def sink(self) -> str:
        return f"memory {id(self)}"

    def open(self, run: Run) -> None: ...

    def encode(self, loggable: Any, name: str, step: int, group: Group) -> bytes:
        return f"{name} {step} {loggable.value}".encode()

    def write(self, record: bytes) -> None:
        self.records.append(record.decode())

    def flush(self) -> int:
        return len(self.records)

    def restore(self, position: Any) -> None:
        del self.records[position:]

    def close(self) -> None: ...


def job_of(*callbacks: Callback, access: Access | None = None, **changes: Any) -> Job:
    """Return the job of a lane with these callbacks, each of whose handlers reads the inputs.

    Args:
        callbacks: The callbacks. Their handlers have numbers in the order in which `Callback.handlers` gives them.
        access: What the handlers may touch, if that is something else.
        changes: Other values of the job.
    """
    declaration = declare({"batch.inputs": Read()} if access is None else access, "test")
    handlers = tuple(
        LaneHandler(
            index, each.name, handler, declaration, Owner(each.name, type(each).__name__, "state_access", declaration)
        )
        for index, each in enumerate(callbacks)
        for _, handler in each.handlers()
    )
    names, backends = tuple(each.name for each in callbacks), tuple(map(backends_of, callbacks))
    return Job("+".join(names), "run", names, backends, handlers, **changes)


class MakeWorkable(Protocol):
    """Makes a lane that no thread works on, and a function that gives it work: a call of `act`."""

    def __call__(self, act: Callable[[], object]) -> tuple[Workable, Callable[[], None]]: ...


class WorkableContract:
    """Tests that everything passes that `LaneThreads` works on. A subclass has a fixture ``make``, a `MakeWorkable`."""

    def test_it_is_due_when_it_has_work_and_until_that_is_done(self, make: MakeWorkable) -> None:
        done: list[int] = []
        lane, give = make(lambda: done.append(1))
        assert lane.name
        assert not lane.is_remote
        assert lane.due() is None
        give()
        assert lane.due() is not None
        assert lane.begin()
        lane.work()
        assert done == [1]
        assert lane.due() is None

    def test_one_thread_at_a_time_works_on_it(self, make: MakeWorkable) -> None:
        second: list[bool] = []
        lane, give = make(lambda: second.append(lane.begin()))
        give()
        assert lane.begin()
        assert not lane.begin()
        lane.work()
        assert second == [False], "the first one is still at work"
        assert lane.begin(), "the first one has ended"

    def test_a_failure_is_not_raised_in_the_thread(self, make: MakeWorkable) -> None:
        def fail() -> None:
            raise ValueError("no")

        lane, give = make(fail)
        give()
        assert lane.begin()
        lane.work()
        assert lane.begin()
