"""What tests of callbacks and executors need.

- `tiny_learner` and `record_access`: a learner that is built in a millisecond, and what a callback touches in it.
- `assert_equivalent`: the same learner under several executors, and in random legal orders, comes to the same.
- `ExecutorContract`: a test class that the tests of an executor subclass; `ShuffledExecutor` is one such executor.
- `leaks` and `holders`: what of a batch is still there when it is over, and who holds it.
- `BackendContract`: a test class that the tests of a logging backend subclass.
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
