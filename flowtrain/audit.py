"""The audit: which callbacks of a learner make the host wait for the device, where, and what to do about it.

The callbacks run for one batch of every phase, on copies of the model, the optimizer and themselves, while
`flowtrain.syncs` watches. It works on the CPU, where all tensors count as if they were on a device. A callback that is
throttled is not seen: what it waits for it waits for rarely.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from flowtrain.access import Write
from flowtrain.callback import Callback
from flowtrain.errors import UsageError
from flowtrain.events import Event
from flowtrain.lag import DEFAULT_LAG
from flowtrain.phases import Phase
from flowtrain.plan import Call, Step
from flowtrain.protect import LearnerView
from flowtrain.registry import Callbacks
from flowtrain.scratch import LearnerParts, first_batches, same_random_numbers
from flowtrain.state import Named
from flowtrain.syncs import Sync, watching

__all__ = ["SyncReport", "audit"]


class SyncReport(tuple[Sync, ...]):
    """What `audit` found: a tuple of `Sync`, each place once for each handler, event and phase."""

    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [str(each) for each in self] or ["Nothing makes the host wait for the device."]
        if self.left_out:
            lines.append(f"Not run: {', '.join(self.left_out)}, which print or write files.")
        return "\n".join(lines)


def audit(learner: LearnerParts) -> SyncReport:
    """Run the callbacks of a learner for one batch of every phase, on copies, and report where the host would wait.

    Callbacks of the library that only print or write files, and those with a logging backend, are not run.

    Args:
        learner: It does not change, and neither do the random number generators.

    Raises:
        UsageError: It has no data, a loader can be gone through only once, or something cannot be copied.
    """
    with same_random_numbers():
        data = first_batches(learner.state.data)
        chosen = [callback for callback in learner.state.callbacks if not _only_writes(learner, callback)]
        left_out = [callback.name for callback in learner.state.callbacks if callback not in chosen]
        model, lossfn, optimizer, callbacks = _copied(learner, chosen)
        core = learner.core.like(lag=learner.state.lag or DEFAULT_LAG)
        scratch = type(learner)(
            model, lossfn, data=data, optimizer=optimizer, callbacks=(), default_callbacks=False, core=core
        )
        seen: dict[Sync, None] = {}
        probe = _Probe(seen)
        built = Callbacks(callbacks, scratch.state, [type(phase) for phase in data], (), probe.around)
        scratch.state.callbacks = built
        scratch.loop.dispatch.use(built)
        with warnings.catch_warnings(), watching(probe.found):
            warnings.filterwarnings("ignore", r"fit\(\) has no training phase")  # not the user's fit
            scratch.fit(1)
    report = SyncReport(seen)
    report.left_out = tuple(left_out)
    return report


class _Probe:
    """Knows which handler runs."""

    def __init__(self, seen: dict[Sync, None]) -> None:
        self._seen = seen
        self._now = ("", "", "")

    def found(self, sync: Sync) -> None:
        """Keep a report, with who caused it."""
        where, event, phase = self._now
        self._seen[replace(sync, where=where, event=event, phase=phase)] = None

    def around(self, step: Step) -> Call:
        """Return the call of a step, during which reports are its own."""

        def call(event: Event, phase: Phase, view: LearnerView) -> None:
            """Call the handler in its own name."""
            before, self._now = self._now, (step.label, type(event).__name__, repr(phase))
            try:
                step.call(event, phase, view)
            finally:
                self._now = before

        return call


def _only_writes(learner: LearnerParts, callback: Callback) -> bool:
    node = next(node for node in learner.state.callbacks.nodes if node.callback is callback)
    if node.backends:
        return True
    if not type(callback).__module__.startswith("flowtrain.callbacks."):
        return False
    writes = [path for path, kind in node.union if isinstance(kind, Write)]
    return bool(writes) and all(path[0] == "resource" for path in writes)


def _copied(learner: LearnerParts, callbacks: Iterable[Callback]) -> tuple[Any, Any, Any, list[Callback]]:
    state = learner.state
    models = dict(state.model) if isinstance(state.model, Named) else state.model
    optimizers = dict(state.optimizer) if isinstance(state.optimizer, Named) else state.optimizer
    try:
        return copy.deepcopy((models, state.lossfn, optimizers, list(callbacks)), {id(state): state})
    except Exception as error:
        raise UsageError(
            f"The audit works on copies, and something cannot be copied: {type(error).__name__}: {error}. Open files "
            f"and connections in setup or at FitBegin, not in __init__."
        ) from error
