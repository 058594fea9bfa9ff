"""Tools for tests of callbacks, executors and logging backends.

- `tiny` has `tiny_learner`, a learner that is built in a millisecond, and `record_access`, which finds the access of a
  callback in such a learner.
- `equivalence` has `assert_equivalent`, which asserts that a learner has the same result under several executors, and
  in random legal orders; `values` compares the results.
- `contract` has `ExecutorContract`, a test class that the tests of an executor subclass, and `probes` the callbacks
  with which it watches an executor. `ShuffledExecutor` is such an executor.
- `holders` has `leaks`, which finds objects of a batch that are still in memory after the batch, with their references.
- `backends` has `BackendContract`, a test class that the tests of a logging backend subclass.
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
