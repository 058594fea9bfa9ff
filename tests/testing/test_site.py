"""The stand-in for the loop: an executor works for it, and it notes what it is told and raises nothing."""

from __future__ import annotations

from flowtrain import SerialExecutor, TrainingPhase
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.graph.executor import Site
from flowtrain.graph.plan import Plan
from flowtrain.testing import TinySite, tiny_learner
from flowtrain.testing.probes import KINDS, Ping, Trace, raises


def failing_plan() -> tuple[Trace, Plan]:
    """Return the plan of one handler that runs and one that raises."""
    trace = Trace(0.0)
    probes = (KINDS[0](trace), KINDS[1](trace, raises(ValueError("broken"))))
    with tiny_learner(*probes, default_callbacks=False) as learner:
        return trace, learner.callbacks.plan(Ping, TrainingPhase)


def test_a_new_site_has_no_callbacks_and_was_told_nothing() -> None:
    site = TinySite()
    as_an_executor_sees_it: Site = site
    assert not site.nodes
    assert not site.stopping
    assert site.run.id == "tiny"
    told = (site.fired, site.urgent, site.failures, site.drained, site.swapped)
    assert not any(told)
    assert as_an_executor_sees_it.runner(Ping, TrainingPhase) is None
    assert TinySite().fired is not site.fired


def test_failures_of_an_executor_are_noted_by_name_and_not_raised() -> None:
    trace, plan = failing_plan()
    site, executor = TinySite(), SerialExecutor()
    executor.bind(site)
    executor.compile(plan)(Ping(), TrainingPhase())
    assert trace.started == ["ProbeA", "ProbeB"]
    assert [(name, repr(failure)) for name, failure in site.failures] == [("ProbeB", "ValueError('broken')")]
    executor.compile(plan)(Ping(), TrainingPhase())
    assert [name for name, _ in site.failures] == ["ProbeB", "ProbeB"]


def test_each_drain_is_noted_and_empties_what_was_fired_in_place() -> None:
    _, plan = failing_plan()
    site, executor = TinySite(), SerialExecutor()
    executor.bind(site)
    run, fired, ping = executor.compile(plan), site.fired, Ping()
    fired.append(("ProbeA", ping))
    run(Ping(), TrainingPhase())
    run(Ping(), TrainingPhase())  # with nothing fired it does not drain
    assert site.drained == [[("ProbeA", ping)]]
    assert site.fired is fired
    assert not fired


def test_the_runners_of_a_closed_executor_are_noted() -> None:
    _, plan = failing_plan()
    site, executor = TinySite(), SerialExecutor()
    executor.bind(site)
    executor.compile(plan)
    executor.close()
    assert len(site.swapped) == 1

    def runner(event: Event, phase: Phase) -> None: ...

    site.swap(plan, runner)
    assert site.swapped[1:] == [runner]
