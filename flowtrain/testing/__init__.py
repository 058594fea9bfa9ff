"""What tests of callbacks and executors need.

- `tiny_learner` and `record_access`: a learner that is built in a millisecond, and what a callback touches in it.
- `assert_equivalent`: the same learner under several executors, and in random legal orders, comes to the same.
- `ExecutorContract`: a test class that an executor's own tests subclass.
"""

from flowtrain.testing.tiny import TinyModel, record_access, tiny_batches, tiny_learner

__all__ = ["TinyModel", "record_access", "tiny_batches", "tiny_learner"]
