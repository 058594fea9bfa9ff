"""Find the least access that a callback must declare, by running a copy of it for one batch of every phase.

The model, the optimizer, the other callbacks and the callback itself are copied; the learner does not change, and
neither do the random number generators. A handler gets a `RecordingView` instead of a protected view: it allows every
access, and logs each path that is read or assigned. In-place changes are found by fingerprints before and after each
handler (`flowtrain.diagnostics.strict`). Resources other than ``resource.rng`` cannot be observed, so the declared ones
are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flowtrain.callback.access import Declaration, Path, Read, Write, canonical, declare, dotted, merged, render, union
from flowtrain.callback.callback import Callback
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.diagnostics.recording_view import Log, RecordingView
from flowtrain.diagnostics.scratch_learner import LearnerParts, copies, first_batches, same_rng, scratch_learner
from flowtrain.diagnostics.strict import changes, declarable, fingerprints
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.errors.describing import nearest
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Call, PlannedHandler, owner_of, set_up
from flowtrain.graph.reach import Reach
from flowtrain.graph.registry import Callbacks
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.learner_state import LearnerState
from flowtrain.state.partial_view import Owner

__all__ = [
    "Recording",
    "record",
]


@dataclass(repr=False)
class Recording:
    """The access of a callback in a trial run, of one batch of every phase.

    Attributes:
        callback: The name of the callback's type.
        handlers: The least declaration of each handler that ran, by the name of the method; also of ``"setup"``.
        idle: The handlers that no event of the trial run reached.
        failure: The exception of a handler, after which it may have accessed more state; or ``None``.
        decorators: The decorator of each handler as source, up to the access.
        known: The dotted paths that existed, for hints.
        added: The access that the callback declares in addition to its argument ``access=``; ``None`` if it has no
            such argument.
    """

    callback: str
    handlers: dict[str, Declaration]
    idle: tuple[str, ...] = ()
    failure: BaseException | None = None
    decorators: dict[str, str] = field(default_factory=dict)
    known: tuple[str, ...] = ()
    added: Mapping[Path, Read | Write] | None = None

    @property
    def union(self) -> Declaration:
        """The least access that `state_access` must return if no handler has its own ``access=``."""
        return _minimal(dict(union(self.handlers.values())))

    def __str__(self) -> str:
        lines = [f"{self.callback} needs, for all handlers together:", "", "    def state_access(self) -> Access:"]
        lines += [f"        return {render(self.union)}", ""]
        if self.added is not None:
            wanted = tuple((path, kind) for path, kind in self.union if path not in self.added)
            lines = [f"{self.callback} needs:", "", f"    {self.callback}(..., access={render(wanted)})", ""]
        elif len(self.decorators) > 1:
            lines += ["or, for each handler alone (setup then gets all of it):", ""]
            for name, declaration in self.handlers.items():
                if name in self.decorators:
                    lines += [f"    {self.decorators[name]}access={render(declaration)})", f"    def {name}(...)", ""]
        for path, kind in self.union:
            if path[0] == "optimizer" and path[-1] not in ("hyperparams", "state") and isinstance(kind, Write):
                narrow = dotted((*path, "hyperparams"))
                hint = f"{dotted(path)} reaches the parameters too: for learning rates use and declare {narrow}."
                lines += [hint, ""]
            if isinstance(kind, Read) and kind.optional:
                hint = nearest(dotted(path), self.known)
                lines += [f"There was no {dotted(path)} when it was read, so it is optional here.{hint}", ""]
        if self.idle:
            lines += [f"No event of the trial run reached: {', '.join(self.idle)}. They may need more.", ""]
        if self.failure is not None:
            failed = type(self.failure).__name__
            lines += [f"The trial run ended with {failed}: {self.failure}", "The callback may need more.", ""]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Recording of {self.callback}: {render(self.union)}>"


def record(learner: LearnerParts, callback: Callback, who: str = "learner.suggest_access()") -> Recording:
    """Run a copy of a callback for one batch of every phase of a learner, and return the access that it needs.

    Args:
        learner: The learner whose model, data and other callbacks are used. A callback of the same type is left out.
        callback: The callback. The learner need not have it, and it need not declare any access yet.
        who: The call of the user, as the subject of the message.

    Raises:
        UsageError: The learner has no data, a loader can be iterated only once, or an object cannot be copied.
    """
    if not is_a(callback, Callback):
        raise UsageError(f"{who} takes a callback, got {callback!r}. Write {who[:-1]}Printer()).")
    with same_rng():
        data = first_batches(learner.state.data, who)
        try:
            return _trial_run(learner, data, callback, who, declared=True)
        except _NotBuilt:
            # The callback declares an access that the learner refuses, so run it without its declarations.
            return _trial_run(learner, data, callback, who, declared=False)


class _NotBuilt(Exception):
    """The scratch learner could not be built."""


def _trial_run(
    learner: LearnerParts, data: PhaseMap[Any], callback: Callback, who: str, *, declared: bool
) -> Recording:
    """Run copies of the callback and of the learner; `declared` tells whether the callback's declarations are used.

    Raises:
        _NotBuilt: The scratch learner refuses the callbacks with their declarations.
    """
    subject, model, lossfn, optimizer, others = copies(learner, callback, who)
    probe = _Probe(subject, declared=declared)

    def build(state: LearnerState) -> Callbacks:
        """Return the callbacks, of which the subject is observed."""
        try:
            return _Probed([*others, subject], state, probe)
        except FlowtrainError as error:
            if declared:
                raise _NotBuilt from error
            raise

    failure: BaseException | None = None
    with scratch_learner(learner, (model, lossfn, optimizer), data, build) as scratch:
        try:
            scratch.fit(1)
        except Exception as error:  # part of the result, with the access up to it
            failure = error
        names = {name for phase in data for name in phase.provides or ()}
        known = [*(f"batch.{name}" for name in sorted(names)), *(f"cbstate.{name}" for name in scratch.state.cbstate)]
    return probe.recording(failure, tuple(known))


class _Probe:
    """Logs the access of one callback, by handler.

    Args:
        subject: The copy of the callback that runs.
        declared: Whether the declarations of the callback are used.
    """

    def __init__(self, subject: Callback, *, declared: bool) -> None:
        self.subject = subject
        self.declared = declared
        self.logs: dict[str, Log] = {}
        self.handlers: dict[str, Handler] = {}
        self.resources: dict[str, Log] = {}

    def watch(self, state: LearnerState) -> Callable[[PlannedHandler], Call]:
        """Return a function that wraps the call of a handler, so that handlers of the subject get a recording view."""

        def wrap(planned: PlannedHandler) -> Call:
            """Return the call of a handler; of another callback it is not changed."""
            if planned.callback is not self.subject:
                return planned.call
            name, owner = planned.handler.attribute, owner_of(planned.node, planned.handler)

            def call(event: Event, phase: Phase, view: LearnerView) -> None:
                """Call the handler with a recording view instead of its own view."""
                with self.recorded(name, state, owner) as recording:
                    planned.call(event, phase, recording)

            return call

        return wrap

    @contextmanager
    def recorded(self, name: str, state: LearnerState, owner: Owner) -> Generator[RecordingView]:
        """Give a recording view for one call, and log the changes of the state after the call."""
        log = self.logs.setdefault(name, {})
        before = fingerprints(state)
        try:
            yield RecordingView(state, owner, log)
        finally:
            for path in changes(before, fingerprints(state)):
                # A deferrable callback draws its own random numbers, which need no declaration.
                if path != ("resource", "rng") or not self.subject.deferrable:
                    _log_write(log, path, Reach(state))

    def recording(self, failure: BaseException | None, known: tuple[str, ...]) -> Recording:
        """Return the result of the trial run.

        Args:
            failure: The exception that has ended the trial run, or ``None``.
            known: The dotted paths that existed.
        """
        shared = self.subject.state_access()
        declared = {
            handler.attribute: dict(declare(shared if handler.access is None else handler.access, handler.attribute))
            for _, handler in self.subject.handlers()
        }
        handlers = {
            name: merged(_minimal({**_resources(own), **log}), own)
            for name, log in self.logs.items()
            for own in [declared.get(name, {})]
        }
        decorators = {handler.attribute: handler.decorator() for _, handler in self.subject.handlers()}
        return Recording(
            type(self.subject).__name__,
            handlers,
            tuple(name for name in decorators if name not in self.logs),
            failure,
            decorators,
            known,
            _added(self.subject),
        )


def _added(subject: Callback) -> Mapping[Path, Read | Write] | None:
    """Return the access that a callback declares in addition to its argument ``access=``, if it has one."""
    if subject.access_argument is None:
        return None
    given = dict(declare(subject.access_argument, "access="))
    return {path: kind for path, kind in declare(subject.state_access(), "state_access()") if path not in given}


class _Probed(Callbacks):
    """The callbacks of a scratch learner, one of which is the subject of a probe."""

    def __init__(self, callbacks: Sequence[Callback], state: LearnerState, probe: _Probe) -> None:
        self._probe = probe
        super().__init__(callbacks, state, [type(phase) for phase in state.data], (), probe.watch(state))

    def _make_node(self, callback: Callback, name: str, position: int) -> Node:
        node = super()._make_node(callback, name, position)
        if callback is not self._probe.subject or self._probe.declared:
            return node
        return Node(callback, name, position, node.handlers, dict.fromkeys(node.access, ()), ())

    def _call_setup(self, node: Node) -> None:
        if node.callback is not self._probe.subject:
            super()._call_setup(node)
            return
        with self._probe.recorded("setup", self._state, owner_of(node, None)) as view:
            set_up(node, view, self._state)


def _resources(declared: Mapping[Path, Read | Write]) -> Log:
    return {path: kind for path, kind in declared.items() if path[0] == "resource" and path != ("resource", "rng")}


def _log_write(log: Log, changed: Path, reach: Reach) -> None:
    """Log a change as a write of a path that the handler has read and that reaches the changed state.

    A path that names the changed state goes before a path that only reaches it: a handler that has read ``batch.grads``
    and ``params`` and changes a gradient writes ``batch.grads``. Without such a path it is a write of `declarable`.
    """
    named = [path for path in log if changed[: len(path)] == canonical(path)]
    reached = [path for path in log if reach.explains(path, changed)]
    log[next(iter([*named, *reached]), declarable(changed))] = Write()


def _minimal(log: Mapping[Path, Read | Write]) -> Declaration:
    """Return a log as a declaration, without the paths that a shorter path covers."""
    kept: dict[Path, Read | Write] = {}
    for path, kind in sorted(log.items(), key=lambda item: len(item[0])):
        above = [kept[path[:length]] for length in range(1, len(path)) if path[:length] in kept]
        if any(isinstance(other, Write) or isinstance(kind, Read) for other in above):
            continue
        kept[path] = kind
    return tuple(sorted(kept.items(), key=lambda item: item[0]))
