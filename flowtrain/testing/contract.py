"""The contract of executors as a test class: subclass it, say how to make one, and run pytest.

::

    class TestMyExecutor(ExecutorContract):
        def make_executor(self) -> Executor:
            return MyExecutor(workers=2)

Every test names the rule of ``docs/rules.md`` that it holds, and its docstring says what is promised. An executor that
may choose how to run an event is made so that it chooses what is to be tested, or is tested once for each choice.
The class itself needs no pytest.
"""

from __future__ import annotations

import threading

from flowtrain.callback.phases import TrainingPhase
from flowtrain.errors import ExecutorError
from flowtrain.graph.executor import find_executor
from flowtrain.testing.closing import ClosingPromises
from flowtrain.testing.failing import FailurePromises
from flowtrain.testing.ordering import OrderPromises
from flowtrain.testing.probes import KINDS, Ping, catching
from flowtrain.testing.queueing import QueueingPromises
from flowtrain.testing.surroundings import TorchPromises

__all__ = ["ExecutorContract"]


class ExecutorContract(OrderPromises, TorchPromises, FailurePromises, ClosingPromises, QueueingPromises):
    """What every executor promises, rule by rule. A subclass defines `make_executor`.

    Attributes:
        patience: Seconds that a handler waits for what must not happen.
        rounds: How many times each test fires its event.
    """

    def test_it_is_an_executor(self) -> None:
        """It has a name, can be passed to a learner, and a new one is made each time."""
        executor = self.make_executor()
        assert find_executor(executor) is executor
        assert isinstance(executor.name, str), f"name is {executor.name!r}, and no text"
        assert executor.name, "name is empty; reports show it"
        assert self.make_executor() is not executor, "make_executor() returned the same executor again"
        executor.close()

    def test_bind_takes_one_learner(self) -> None:
        """An executor belongs to one learner: a second one is refused, and the first is not harmed."""
        trace, executor = self.trace(), self.make_executor()
        with self.learner(KINDS[0](trace), KINDS[1](trace), executor=executor) as learner:
            with catching(ExecutorError), self.learner(executor=executor):
                pass
            executor.bind(learner.loop.dispatch)  # the same again
            learner.fire(Ping(), TrainingPhase())
            assert sorted(trace.started) == ["ProbeA", "ProbeB"], f"the first learner's event ran {trace.started}"

    def test_compile_needs_a_learner(self) -> None:
        """Before `bind` there is nowhere to report failures to."""
        with self.learner(KINDS[0](self.trace())) as learner:
            plan = learner.callbacks.plan(Ping, TrainingPhase)
            unbound = self.make_executor()
            with catching(ExecutorError):
                unbound.compile(plan)
            unbound.close()

    def test_explain_is_one_line(self) -> None:
        """`explain` says how a plan is run in a line, before it has run and after."""
        trace = self.trace()
        with self.learner(*(kind(trace) for kind in KINDS[:3])) as learner:
            for _ in range(self.rounds):
                said = learner.executor.explain(learner.callbacks.plan(Ping, TrainingPhase))
                assert isinstance(said, str), f"explain() returned {said!r}"
                assert "\n" not in said, f"explain() is more than a line: {said!r}"
                learner.fire(Ping(), TrainingPhase())

    def test_a_change_of_callbacks_counts_from_the_next_event_on(self) -> None:
        """Plans are compiled anew when callbacks change."""
        trace = self.trace()
        with self.learner(*(kind(trace) for kind in KINDS[:3])) as learner:
            for _ in range(self.rounds):
                learner.fire(Ping(), TrainingPhase())
            learner.remove_callback("ProbeB")
            learner.add_callback(KINDS[3](trace))
            for _ in self.fire_in_rounds(learner, trace):
                assert sorted(trace.started) == ["ProbeA", "ProbeC", "ProbeD"], f"ran {trace.started}"

    def test_flush_and_close_may_be_repeated(self) -> None:
        """`flush` returns when nothing is pending, and `close` again and again, with or without a learner."""
        unused, executor = self.make_executor(), self.make_executor()
        unused.close()
        unused.close()
        with self.learner(*(kind(self.trace()) for kind in KINDS[:3]), executor=executor) as learner:
            learner.fire(Ping(), TrainingPhase())
            executor.flush()
            executor.flush()
        executor.close()
        executor.close()

    def test_a_closed_executor_runs_nothing(self) -> None:
        """After `close` an event is an error, no handler runs, and no learner can have the executor."""
        trace, executor = self.trace(), self.make_executor()
        with self.learner(*(kind(trace) for kind in KINDS[:3]), executor=executor) as learner:
            learner.fire(Ping(), TrainingPhase())
        trace.clear()
        with catching(ExecutorError):
            learner.fire(Ping(), TrainingPhase())
        with catching(ExecutorError):
            learner.fit(1)
        assert not trace.started, f"{trace.started} ran after close()"
        with catching(ExecutorError), self.learner(executor=executor):
            pass

    def test_close_ends_the_threads(self) -> None:
        """Threads that the executor started have ended when `close` returns, also after a failure."""
        before, trace = set(threading.enumerate()), self.trace()

        def fail(*_: object) -> None:
            """Fail when the others run too."""
            trace.wait_for_start("ProbeB", "ProbeC")
            raise ValueError("broken")

        with self.learner(KINDS[0](trace, fail), *(kind(trace) for kind in KINDS[1:4])) as learner:
            for _ in range(self.rounds):
                with catching(ValueError):
                    learner.fire(Ping(), TrainingPhase())
        left = [thread.name for thread in threading.enumerate() if thread not in before]
        assert not left, f"these threads run after close(): {left}"
