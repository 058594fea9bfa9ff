"""Tools for tests of callbacks, executors and logging backends.

- `tiny_learner` returns a learner that is built in a millisecond; `record_access` finds the access of a callback in it.
- `assert_equivalent` asserts that a learner has the same result under several executors, and in random legal orders.
- `ExecutorContract` is a test class that the tests of an executor subclass; `ShuffledExecutor` is such an executor.
- `leaks` finds objects of a batch that are still in memory after the batch, and `holders` finds their references.
- `BackendContract` is a test class that the tests of a logging backend subclass.
"""

from flowtrain.testing.backends import BackendContract
from flowtrain.testing.contract import ExecutorContract
from flowtrain.testing.equivalence import ShuffledExecutor, assert_equivalent
from flowtrain.testing.holders import holders, leaks
from flowtrain.testing.tiny import TinyModel, TinySite, record_access, tiny_batches, tiny_learner

__all__ = [
    "BackendContract",
    "ExecutorContract",
    "ShuffledExecutor",
    "TinyModel",
    "TinySite",
    "assert_equivalent",
    "holders",
    "leaks",
    "record_access",
    "tiny_batches",
    "tiny_learner",
]
