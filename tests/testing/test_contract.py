"""The contract."""
from flowtrain import SerialExecutor
from flowtrain.execution import Executor
from flowtrain.testing import ExecutorContract, ShuffledExecutor


class TestSerialExecutor(ExecutorContract):
    def make_executor(self) -> Executor:
        return SerialExecutor()


class TestShuffledExecutor(ExecutorContract):
    def make_executor(self) -> Executor:
        return ShuffledExecutor(1)
