"""Find the least that a callback must declare, by running it for one batch of every phase on copies.

The model, the optimizer, the other callbacks and the callback itself are copied; the learner does not change, and
neither do the random number generators. Reads are logged by a `RecordingView`; writes are what the fingerprints before
and after each handler differ in, so in-place changes are found too. Resources other than ``resource.rng`` leave no
trace, so those that are declared are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from flowtrain.access import Declaration, Path, Read, Write, canonical, declare, dotted, render, union
from flowtrain.callback import Callback
from flowtrain.errors import FlowtrainError, UsageError, is_a, nearest
from flowtrain.events import Event
from flowtrain.fingerprint import changes, fingerprints
from flowtrain.graph import Node
from flowtrain.handler import Handler
from flowtrain.part import Owner
from flowtrain.phasemap import PhaseMap
from flowtrain.phases import Phase
from flowtrain.plan import Call, Step, owner_of, set_up
from flowtrain.protect import LearnerView
from flowtrain.reach import Reach
from flowtrain.recording import Log, RecordingView
from flowtrain.records import Identity, collecting
from flowtrain.registry import Callbacks
from flowtrain.scratch import LearnerParts, copies, first_batches, same_random_numbers
from flowtrain.state import LearnerState
from flowtrain.strict import declarable

__all__ = ["Recording", "record"]


@dataclass(repr=False)
class Recording:
    """What a callback was seen to touch.

    Attributes:
        callback: The callback's type name.
        handlers: For each handler that ran, what it must declare at least; also ``"setup"``, if there is one.
        idle: The handlers that no event of the dry run reached.
        failure: What a handler raised, which may have kept it from touching more; or ``None``.
        decorators: The decorator of each handler as source, up to the access.
        known: The dotted paths that there were, for hints.
        added: What the callback declares beside what it is given as ``access=``; ``None`` if it takes no such argument.
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
        """What `state_access` must return at least if no handler has an ``access=`` of its own."""
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
            lines += [f"No event of the dry run reached: {', '.join(self.idle)}. They may need more.", ""]
        if self.failure is not None:
            failed = type(self.failure).__name__
            lines += [f"The dry run ended with {failed}: {self.failure}", "The callback may need more.", ""]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Recording of {self.callback}: {render(self.union)}>"


def record(learner: LearnerParts, callback: Callback) -> Recording:
    """Run a callback for one batch of every phase of a learner, on copies, and say what it touches.

    Args:
        learner: Whose model, data and other callbacks to use. A callback of the same type is left out.
        callback: The callback; it need not be one of the learner's, and need not declare anything yet.

    Raises:
        UsageError: The learner has no data, a loader can be gone through only once, or something cannot be copied.
    """
    if not is_a(callback, Callback):
        raise UsageError(f"This takes a callback, got {callback!r}. Write learner.suggest_access(Printer()).")
    with same_random_numbers():
        data = first_batches(learner.state.data)
        try:
            return _dry_run(learner, data, callback, declared=True)
        except _NotBuilt:
            # What it declares now does not fit; it may be what the user wants to find out.
            return _dry_run(learner, data, callback, declared=False)


class _NotBuilt(Exception):
    """The scratch learner could not be built."""


def _dry_run(learner: LearnerParts, data: PhaseMap[Any], callback: Callback, *, declared: bool) -> Recording:
    subject, model, lossfn, optimizer, others = copies(learner, callback)
    probe = _Probe(subject, declared=declared)
    try:
        scratch = type(learner)(
            model,
            lossfn,
            data=data,
            optimizer=optimizer,
            callbacks=(),
            default_callbacks=False,
            core=learner.core.like(),
        )
        built = _Probed([*others, subject], scratch.state, probe)
    except FlowtrainError as error:
        if declared:
            raise _NotBuilt from error
        raise
    scratch.core.need_grad_norm(True)
    scratch.state.callbacks = built
    scratch.loop.dispatch.use(built)
    failure: BaseException | None = None
    try:
        with warnings.catch_warnings(), collecting(Identity("a dry run", "", 0), None):  # no record is written
            warnings.filterwarnings("ignore", r"fit\(\) has no training phase")  # not the user's fit
            scratch.fit(1)
    except Exception as error:  # reported with what was found until then
        failure = error
    names = {name for phase in data for name in phase.provides or ()}
    known = [*(f"batch.{name}" for name in sorted(names)), *(f"cbstate.{name}" for name in scratch.state.cbstate)]
    return probe.recording(failure, tuple(known))


class _Probe:
    """Collects what one callback touches, by handler."""

    def __init__(self, subject: Callback, *, declared: bool) -> None:
        self.subject = subject
        self.declared = declared
        self.logs: dict[str, Log] = {}
        self.handlers: dict[str, Handler] = {}
        self.resources: dict[str, Log] = {}

    def watch(self, state: LearnerState) -> Callable[[Step], Call]:
        """Return what wraps a step's call: the subject's handlers get a recording view."""

        def wrap(step: Step) -> Call:
            """Return the call of a step, for the subject one with a recording view."""
            if step.callback is not self.subject:
                return step.call
            name, owner = step.handler.attribute, owner_of(step.node, step.handler)

            def call(event: Event, phase: Phase, view: LearnerView) -> None:
                """Call the handler with a view that records, in place of its own."""
                with self.recorded(name, state, owner) as recording:
                    step.call(event, phase, recording)

            return call

        return wrap

    @contextmanager
    def recorded(self, name: str, state: LearnerState, owner: Owner) -> Generator[RecordingView]:
        """Give the view for one call, and log what it reads and what has changed after it."""
        log = self.logs.setdefault(name, {})
        before = fingerprints(state)
        try:
            yield RecordingView(state, owner, log)
        finally:
            for path in changes(before, fingerprints(state)):
                if path != ("resource", "rng") or not self.subject.deferrable:  # which says it with `stochastic`
                    _log_write(log, path, Reach(state))

    def recording(self, failure: BaseException | None, known: tuple[str, ...]) -> Recording:
        """Return what was found."""
        shared = self.subject.state_access()
        declared = {
            handler.attribute: dict(_resources(shared if handler.access is None else handler.access, handler.attribute))
            for _, handler in self.subject.handlers()
        }
        handlers = {name: _minimal({**declared.get(name, {}), **log}) for name, log in self.logs.items()}
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
    if subject.access_argument is None:
        return None
    given = dict(declare(subject.access_argument, "access="))
    return {path: kind for path, kind in declare(subject.state_access(), "state_access()") if path not in given}


class _Probed(Callbacks):
    """Callbacks of a scratch learner, one of which is being probed."""

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


def _resources(access: Any, owner: str) -> Iterator[tuple[Path, Read | Write]]:
    for path, kind in declare(access, owner):
        if path[0] == "resource" and path != ("resource", "rng"):
            yield path, kind


def _log_write(log: Log, changed: Path, reach: Reach) -> None:
    """Log a change of a region: as a write of the path by which the handler got there, if it read one.

    A path that names the region goes before one that reaches it too: gradients are written as ``batch.grads`` by a
    handler that has also read ``params``.
    """
    named = [path for path in log if changed[: len(path)] == canonical(path)]
    reached = [path for path in log if reach.explains(path, changed)]
    log[next(iter([*named, *reached]), declarable(changed))] = Write()


def _minimal(log: Mapping[Path, Read | Write]) -> Declaration:
    """Leave out what a shorter path covers."""
    kept: dict[Path, Read | Write] = {}
    for path, kind in sorted(log.items(), key=lambda item: len(item[0])):
        above = [kept[path[:length]] for length in range(1, len(path)) if path[:length] in kept]
        if any(isinstance(other, Write) or isinstance(kind, Read) for other in above):
            continue
        kept[path] = kind
    return tuple(sorted(kept.items(), key=lambda item: item[0]))
