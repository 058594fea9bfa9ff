"""DaskExecutor passes the contract of executors, in each way that it may run an event."""

from __future__ import annotations

from flowtrain.graph.executor import Executor
from flowtrain.testing import ExecutorContract
from flowtrain_dask import DaskExecutor


class TestAlways(ExecutorContract):
    """Wherever two handlers are independent they run at the same time: here every promise counts."""

    def make_executor(self) -> Executor:
        return DaskExecutor(workers=4, parallel="always")


class TestAlwaysOnTwoWorkers(ExecutorContract):
    """Several handlers on each strand."""

    def make_executor(self) -> Executor:
        return DaskExecutor(workers=2, parallel="always")


class TestAuto(ExecutorContract):
    """The first events are measured, the next ones raced, and the runner changes in between."""

    rounds = 8

    def make_executor(self) -> Executor:
        return DaskExecutor(workers=4)


class TestNever(ExecutorContract):
    """Nothing runs at the same time."""

    def make_executor(self) -> Executor:
        return DaskExecutor(workers=4, parallel="never")
