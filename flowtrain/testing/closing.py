"""Rules 16 and 17 as tests: what is closed after a failure, and `FitEnd`."""

from __future__ import annotations

from contextlib import suppress

from flowtrain.callback.events import BatchBegin, BatchEnd, EpochBegin, EpochEnd, Event, FitBegin, FitEnd
from flowtrain.callback.view import LearnerView
from flowtrain.errors import CancelBatchException, CancelEpochException, CancelFittingException
from flowtrain.graph.executor import Executor, SerialExecutor
from flowtrain.testing.probes import (
    EVERYWHERE,
    ContractBase,
    Make,
    Probe,
    catching,
    raises_at,
    with_others,
)

__all__ = ["ClosingPromises"]


class ClosingPromises(ContractBase):
    """What an executor promises about the ends of batches, epochs and fits."""

    def test_rule_16_every_begin_has_one_end(self) -> None:
        """Rule 16: whoever raises what, at whichever event, the events that follow are those of the serial run."""
        kinds = (CancelBatchException, CancelEpochException, CancelFittingException, ValueError)
        for event_type in (FitBegin, EpochBegin, BatchBegin, BatchEnd, EpochEnd):
            for kind in kinds:
                seen = self._events_of_a_fit(kind, event_type, self.make_executor())
                serial = self._events_of_a_fit(kind, event_type, SerialExecutor())
                what = f"after {kind.__name__} at {event_type.__name__}"
                assert seen == serial, f"{what} came {seen}; serially {serial}"
                for scope in ("Fit", "Epoch", "Batch"):
                    begun = seen.count(f"{scope}Begin")
                    ended = seen.count(f"{scope}End") + seen.count(f"{scope}Cancelled")
                    assert begun == ended, f"{what} {begun} {scope}Begin have {ended} ends: {seen}"

    def test_rule_17_fit_end_runs_for_every_callback(self) -> None:
        """Rule 17: also for those that depend on one that failed there; then the worst failure is raised."""
        for early in (None, ValueError("early")):
            trace = self.trace()
            ends: list[str] = []

            def does(probe: Probe, event: Event, learner: LearnerView, ends: list[str] = ends) -> None:
                """Note the end of the fit, and fail there."""
                if isinstance(event, FitEnd):
                    ends.append(probe.name)
                    raise ValueError(f"end {probe.name}")

            fails = EVERYWHERE[3](trace, None if early is None else raises_at(BatchEnd, _giving(early)))
            probes = [EVERYWHERE[0](trace, does), EVERYWHERE[1](trace, does, after=[EVERYWHERE[0]])]
            with self.learner(*probes, EVERYWHERE[2](trace, does), fails) as learner, catching(ValueError) as found:
                learner.fit(1)
            assert sorted(ends) == ["EveryA", "EveryB", "EveryC"], f"FitEnd ran for {sorted(ends)}"
            wanted = [*([] if early is None else ["early"]), "end EveryA", "end EveryB", "end EveryC"]
            said = [str(error) for error in with_others(found[0])]
            assert said == wanted, f"raised and attached are {said}; they must be {wanted}"

    def _events_of_a_fit(self, kind: type[Exception], at: type[Event], executor: Executor) -> list[str]:
        """Fit with one callback that raises at an event among others that do not; return the events that came."""
        trace, events = self.trace(), list[str]()

        def note(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Keep the name of the event."""
            events.append(type(event).__name__)

        raising = EVERYWHERE[1](trace, raises_at(at, lambda: kind("here")))
        probes = [EVERYWHERE[0](trace, note), raising, EVERYWHERE[2](trace)]
        with self.learner(*probes, executor=executor) as learner, suppress(ValueError):  # one of those that are tried
            learner.fit(1)
        return events


def _giving(error: BaseException) -> Make:
    return lambda: error
