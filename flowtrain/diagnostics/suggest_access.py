"""Find the least access that a callback must declare, by running a copy of it for one batch of every phase.

The model, the optimizer, the other callbacks and the callback itself are copied; the learner does not change, and
neither do the random number generators. A handler gets a `RecordingView` instead of a protected view: it allows every
access, and logs each path that is read or assigned. In-place changes are found by fingerprints before and after each
handler (`flowtrain.diagnostics.strict`). Resources other than ``resource.rng`` cannot be observed, so the declared ones
are kept.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from flowtrain.callback.access import Declaration, Path, Read, Write, canonical, declare, dotted, merged, render, union
from flowtrain.callback.callback import Callback
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.diagnostics.scratch_learner import LearnerParts, copies, first_batches, same_rng
from flowtrain.diagnostics.strict import changes, declarable, fingerprints
from flowtrain.errors import FlowtrainError, UsageError, is_a, nearest
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Call, PlannedHandler, owner_of, set_up
from flowtrain.graph.reach import Reach
from flowtrain.graph.registry import Callbacks
from flowtrain.logging.backend import Identity, collecting
from flowtrain.state.by_phase import CONTAINERS, PhaseMap, kind_of_series
from flowtrain.state.detached import detached
from flowtrain.state.learner_state import LearnerState, Named, State
from flowtrain.state.partial_view import Owner
from flowtrain.state.series import SeriesMap
from flowtrain.state.views import GuardedView

__all__ = [
    "Log",
    "Recording",
    "RecordingView",
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
    scratch.core.need_grad_norm(True)  # otherwise a callback that does not declare the norm yet could not read it
    scratch.state.callbacks = built
    scratch.loop.dispatch.use(built)
    failure: BaseException | None = None
    try:
        with warnings.catch_warnings(), collecting(Identity("a dry run", "", 0), None):  # no record is written
            warnings.filterwarnings("ignore", r"fit\(\) has no training phase")  # a warning for fits of users
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


Log: TypeAlias = dict[Path, Read | Write]
"""The paths that a handler has read or written."""

_PLAIN_ROOTS = ("callbacks", "data", "lossfn", "model")
"""The attributes of a view that are declared as a whole."""


class RecordingView(GuardedView):
    """A view of the live state that logs what a handler reads and assigns.

    Args:
        state: The state to show.
        owner: The callback and handler that the view is for.
        log: The log that the view adds to.
    """

    __slots__ = ("_log", "_shown")

    _log: Log
    _shown: Callable[[Any], Any]

    def __init__(self, state: LearnerState, owner: Owner, log: Log) -> None:
        object.__setattr__(self, "_state", state)
        object.__setattr__(self, "_owner", owner)
        object.__setattr__(self, "_log", log)
        object.__setattr__(self, "_shown", detached if owner.consumes else _itself)

    def __getattr__(self, name: str) -> Any:
        state, log, shown = self._state, self._log, self._shown
        if name in ("batch", "cbstate"):
            return _RecordedNamespace(getattr(state, name), (name,), log, shown, self._owner.gathered)
        if name == "optimizer":
            return _RecordedNamespace(state.optimizers, (name,), log)
        if name == "params" or (name == "model" and isinstance(state.model, Named)):
            return _RecordedMapping(getattr(state, name), (name,), log, shown if name == "params" else _itself)
        if name in _PLAIN_ROOTS:
            _read(log, (name,))
            return getattr(state, name)
        return GuardedView.__getattr__(self, name)  # type: ignore[attr-defined]  # hidden from checkers there


class _RecordedNamespace:
    """``batch``, ``cbstate`` or ``optimizer`` of a recording view, or a namespace within ``cbstate``.

    Args:
        target: The object to show.
        path: The path of the object.
        log: The log of the view.
        shown: Makes the value that a handler sees, such as a detached tensor; by default the value itself.
        lists: The paths at which the handler sees a list of the values of all ranks.
    """

    def __init__(
        self, target: Any, path: Path, log: Log, shown: Callable[[Any], Any] | None = None, lists: Sequence[Path] = ()
    ) -> None:
        self.__dict__.update(_target=target, _path=path, _log=log, _shown=shown or _itself, _lists=lists)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        target, path = self._target, (*self._path, name)
        if path[0] == "cbstate" and len(path) == 2 and name in CONTAINERS and name not in target:
            # A learner makes the containers that are declared; this one is not declared yet, so make it here.
            setattr(target, name, CONTAINERS[name](f"cbstate.{name}"))
        if path[0] == "optimizer" and name not in ("hyperparams", "state") and not isinstance(target, Named):
            _read(self._log, self._path)  # a method or attribute of the optimizer itself, so all of it is read
            return getattr(target, name)
        value = getattr(target, name, None)
        if isinstance(value, State) or (path[0] == "optimizer" and isinstance(target, Named)):
            return _RecordedNamespace(value, path, self._log, self._shown)
        if path[0] == "cbstate" and kind_of_series(value) is SeriesMap:
            return _RecordedMapping(value, path, self._log)
        _read(self._log, path, optional=value is None)
        return [self._shown(value)] if path in self._lists else self._shown(value)

    def __setattr__(self, name: str, value: Any) -> None:
        self._log[*self._path, name] = Write()
        setattr(self._target, name, value)

    def __delattr__(self, name: str) -> None:
        self._log[*self._path, name] = Write()
        delattr(self._target, name)

    def __contains__(self, name: object) -> bool:
        _read(self._log, (*self._path, str(name)), optional=True)
        return name in (self._target if isinstance(self._target, State) else vars(self._target))


class _RecordedMapping(Mapping[Any, Any]):
    """A mapping from names to values, or from phases to such mappings, of a recording view.

    Access to one name is logged with the name in the path, iteration with the path of the whole mapping. A phase is no
    part of a path.

    Args:
        target: The mapping.
        path: The path of the mapping.
        log: The log of the view.
        shown: Makes the value that a handler sees; by default the value itself.
    """

    def __init__(self, target: Any, path: Path, log: Log, shown: Callable[[Any], Any] | None = None) -> None:
        self._target = target
        self._path = path
        self._log = log
        self._shown = shown or _itself

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, (Phase, type)):
            return _RecordedMapping(self._target[key], self._path, self._log)
        found = self._target.get(key)
        _read(self._log, (*self._path, *str(key).split(".")), optional=found is None)
        return self._shown(found)

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value of a key, or `default`."""
        found = self[key]
        return default if found is None else found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def push(self, name: str, value: Any, step: int) -> None:
        """Append a value to a series."""
        self._log[*self._path, *name.split(".")] = Write()
        self._target.push(name, value, step)

    def __iter__(self) -> Iterator[Any]:
        _read(self._log, self._path)
        return iter(self._target)

    def __len__(self) -> int:
        _read(self._log, self._path)
        return len(self._target)


def _itself(value: Any) -> Any:
    return value


def _read(log: Log, path: Path, *, optional: bool = False) -> None:
    """Log a read, which is optional only if the value was missing at every read. A logged write stays."""
    known = log.get(path)
    if known is None or (isinstance(known, Read) and known.optional):
        log[path] = Read(optional=optional)
