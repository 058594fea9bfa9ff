"""Checks of callbacks: they have handlers, and the state that a handler declares exists when the handler runs.

A batch entry must be provided by the phase or written by a callback, at the same event or an earlier one. An entry of
``cbstate`` must be written by a callback. A part of the model, the optimizer or the data must be there. All of this is
checked when the learner is built or its callbacks change, so that a mistake does not show after hours of training.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from flowtrain.callback.access import Declaration, Path, Read, Write, collective, dotted, overlap
from flowtrain.callback.callback import Callback, registered
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.errors import AccessError, HandlerError, LoggingError, MissingStateError
from flowtrain.errors.describing import nearest
from flowtrain.graph.nodes import Node
from flowtrain.graph.reach import COMPUTED, attribute
from flowtrain.graph.shared_state import ranks_of
from flowtrain.state.by_phase import CONTAINERS
from flowtrain.state.learner_state import LearnerState, Named
from flowtrain.state.namespace import State

__all__ = [
    "PROVIDERS",
    "check_batch",
    "check_cbstate",
    "check_exchanged",
    "check_made",
    "check_marks",
    "check_parts",
    "check_series",
    "entries_written",
]


def _reads(declaration: Declaration, root: str) -> Iterable[Path]:
    """Return the paths below `root` that a declaration reads, except the optional ones."""
    return [
        path
        for path, kind in declaration
        if isinstance(kind, Read) and not kind.optional and path[0] == root and len(path) > 1
    ]


def _writes(nodes: Iterable[Node], root: str) -> list[tuple[Node, Path]]:
    """Return the paths at or below `root` that callbacks declare to write, each with its callback."""
    return [(node, path) for node in nodes for path, kind in node.union if isinstance(kind, Write) and path[0] == root]


def check_batch(phase_type: type[Phase], meeting: Mapping[type[Event], Sequence[tuple[Node, Handler]]]) -> None:
    """Check that the batch entries that handlers read exist when the handlers run.

    An entry exists from the event on at which the phase provides it or a callback writes it. One declaration may serve
    handlers of several events: it is accepted if the entry exists at the last of them.

    Args:
        phase_type: The phase; it is not checked if it has no `Phase.provides`.
        meeting: For each event, the handlers that run at it.

    Raises:
        AccessError: An entry that the phase never provides and no callback writes.
        MissingStateError: An entry that exists only after the handler has run.
    """
    provides, fires = phase_type.provides, phase_type.events
    if provides is None or fires is None:
        return
    rank = {event: place for place, event in enumerate(fires)}
    # The rank of the first event at which each entry exists; the empty name stands for a write of the whole batch.
    available: dict[str, int] = {name: rank[event] for name, event in provides.items()}
    # A user's event has no rank, as it may be fired at any time: a write at it counts as early, and a read as late.
    first_writer: dict[str, int] = {}
    for event, participants in meeting.items():
        for node, handler in participants:
            for path, kind in node.access[handler]:
                if path[0] == "batch" and isinstance(kind, Write):
                    for name in path[1:2] or ("",):
                        first_writer[name] = min(first_writer.get(name, len(rank)), rank.get(event, 0))
    for name, place in first_writer.items():
        available[name] = min(available.get(name, len(rank)), place)
    # Handlers without an access= share the declaration of `state_access`, which serves all of their events.
    served: dict[tuple[Node, Handler | None], tuple[Declaration, list[type[Event]]]] = {}
    for event, participants in meeting.items():
        for node, handler in participants:
            key = (node, None if handler.access is None else handler)
            served.setdefault(key, (node.access[handler], []))[1].append(event)
    for (node, _), (declaration, events) in served.items():
        latest = max(rank.get(event, len(rank)) for event in events)
        for path in _reads(declaration, "batch"):
            place = min(available.get(path[1], len(rank) + 1), available.get("", len(rank) + 1))
            if place <= latest:
                continue
            names = ", ".join(event.__name__ for event in events)
            if path[1] in provides:
                raise MissingStateError(
                    dotted(path),
                    f"{node.name} reads {dotted(path)} at ({names}, {phase_type.__name__}), and it is not there yet: "
                    f"{phase_type.__name__} has it from {provides[path[1]].__name__} on. Handle a later event, or "
                    f'declare {{"{dotted(path)}": Read(optional=True)}} and handle None.',
                )
            raise AccessError(
                f"{node.name} reads {dotted(path)} at ({names}, {phase_type.__name__}), but {phase_type.__name__} "
                f"provides {', '.join(provides)}, and no callback writes {dotted(path)}."
                f"{nearest(path[1], available)} Read an entry that exists, or add a callback that writes this one."
            )


def _exists(path: Path, cbstate: State) -> bool:
    """Tell whether an entry of ``cbstate`` exists.

    An entry of a namespace must exist too. A container is enough for its items, which handlers may add later.
    """
    inside = cbstate.__dict__.get(path[1])
    return path[1] in cbstate and (len(path) < 3 or not isinstance(inside, State) or path[2] in inside)


def entries_written(nodes: Iterable[Node]) -> frozenset[str]:
    """Return the entries of ``cbstate`` that callbacks declare to write, wholly or in part."""
    return frozenset(path[1] for _, path in _writes(nodes, "cbstate") if len(path) > 1)


def check_cbstate(nodes: Sequence[Node], cbstate: State, earlier: Collection[str] = ()) -> None:
    """Check that every entry of ``cbstate`` that a callback reads is written by a callback, or was made by the user.

    Args:
        nodes: The callbacks.
        cbstate: The present state.
        earlier: The entries that callbacks of this learner have ever written. Such an entry may still exist when its
            writer was removed, but it is not updated any more, so it does not count as made by the user.

    Raises:
        MissingStateError: No callback writes an entry.
    """
    stale = {*earlier, *CONTAINERS}
    names = sorted({*entries_written(nodes), *cbstate})
    # The reader itself counts as a writer too: it may write an entry at one event and read it at another.
    written = {path for _, path in _writes(nodes, "cbstate")}
    for node in nodes:
        for path in _reads(node.union, "cbstate"):
            if any(overlap(path, other) for other in written) or (path[1] not in stale and _exists(path, cbstate)):
                continue
            entry = path[1]
            siblings = sorted({other[2] for other in written if len(other) > 2 and other[1] == entry})
            others = [name for name in names if name != entry]
            inside = len(path) > 2 and bool(siblings)
            hint = nearest("".join(path[2:3]), siblings) if inside else nearest(entry, others)
            provider = PROVIDERS.get(entry)
            known = f" In cbstate.{entry} there is {', '.join(siblings)}." if inside and provider else ""
            remedy = f'Add the callback that makes it, or declare {{"{dotted(path)}": Read(optional=True)}}.'
            if provider and entry not in {other[1] for other in written if len(other) > 1}:
                remedy = f"Add flowtrain.callbacks.{provider}, which provides cbstate.{entry}."
            elif len(path) > 2 and path[2].endswith("Phase"):
                remedy = f"A path leaves out the phase: declare {dotted((*path[:2], *path[3:]))!r}."
            elif entry == "metrics_step" and any(overlap(("cbstate", "metrics_epoch", *path[2:]), w) for w in written):
                # The metric exists, and `Metrics` computes it for epochs only.
                known, hint = f" {dotted(path[2:])} is computed at the end of an epoch.", ""
                remedy = "For a value of each batch as well give Metrics a Metric(f, on_step=True)."
            elif node.callback.missing:
                remedy = node.callback.missing
            elif len(path) > 2 and provider == "Metrics" and not hint:
                remedy = f"Give Metrics a metric of that name: Metrics(Metric(f, name={path[2]!r}))."
            raise MissingStateError(
                dotted(path),
                f"{node.name} reads {dotted(path)}, and no callback declares to write it.{known}{hint} {remedy}",
            )


def check_exchanged(nodes: Iterable[Node]) -> None:
    """Check that no series of the bundled callbacks is exchanged between ranks: it grows, and is never replaced.

    This holds in one process too, so that a callback that works there works on several ranks.

    Raises:
        AccessError: A callback declares ``reduce=``, ``gather=`` or ``broadcast=`` for such an entry of ``cbstate``.
        CallbackError: `Callback.ranks` has a wrong value.
    """
    for node in nodes:
        ranks_of(node)
        for declaration in node.access.values():
            for path, kind in declaration:
                if path[0] != "cbstate" or not collective(kind) or path[1] not in CONTAINERS:
                    continue
                remedy = "Write the value to an entry of your own, and send that."
                if isinstance(kind, Read):
                    remedy = f'Read the value of the batch: {{"batch.loss": {kind!r}}}.'
                    remedy += " Values of an epoch, in cbstate.metrics_epoch, are those of all ranks without it."
                raise AccessError(
                    f"{node.name} declares {dotted(path)!r}: {kind!r}. It holds the values of each phase, and ranks "
                    f"exchange one value. {remedy}"
                )


def check_parts(nodes: Iterable[Node], state: LearnerState) -> None:
    """Check that declared parts of the model, its parameters, the loss function, the optimizer and the data exist.

    Args:
        nodes: The callbacks.
        state: The state of the learner; without a model nothing is checked.

    Raises:
        AccessError: A declared part does not exist.
    """
    if state.model is None:
        return
    params: dict[str, Any] = {}
    for parameter in state.params:
        level = params
        for name in parameter.split("."):
            level = level.setdefault(name, {})
    # The items of `data` are phases, which a path leaves out, so no path below `data` exists.
    written: dict[str, Any] = {"params": params, "optimizer": state.optimizers, "data": {}}
    # A handler may write a new attribute of a model or loss function, so their parts must exist for reading only.
    read = {**written, "model": state.model, "lossfn": state.lossfn}
    for node in nodes:
        for path, kind in node.union:
            inside: Any = (written if isinstance(kind, Write) else read).get(path[0])
            expected = inside is not None and not (isinstance(kind, Read) and kind.optional)
            get = attribute if path[0] in ("model", "lossfn") else getattr
            for depth, name in enumerate(path[1:] if expected else (), 1):
                try:
                    part = inside[name] if isinstance(inside, Mapping) else get(inside, name)
                except (KeyError, AttributeError):
                    above = dotted(path[:depth])
                    known = map(str, inside if isinstance(inside, Mapping) else dir(inside))
                    raise AccessError(
                        f"{node.name} declares {dotted(path)!r}, but {above} has no {name!r}."
                        f"{nearest(name, known)} {_remedy(path, above, state)}"
                    ) from None
                if part is COMPUTED:
                    break  # a property: its code would have to run to see what is below it
                inside = part


def _remedy(path: Path, above: str, state: LearnerState) -> str:
    """Say what to declare instead of a path with a part that does not exist.

    Args:
        path: The declared path.
        above: The longest path above it that exists, dotted.
        state: The state of the learner.
    """
    remedy = f"Declare {above!r} as a whole, or Read(optional=True) if it comes later."
    if above != "optimizer":
        return remedy
    if isinstance(state.optimizer, Named):
        first, names = next(iter(state.optimizer)), ", ".join(map(repr, state.optimizer))
        example = dotted(("optimizer", first, *path[1:][-1:]))
        return (
            f"The optimizers are {names}; name one, as in {example!r}: LearningRate({first!r}) in a Scheduler, "
            f"LearningRateMonitor({first!r}), and so on."
        )
    if len(path) > 2:
        return f"There is one optimizer, without a name: leave {path[1]!r} out, as in {dotted((path[0], *path[2:]))!r}."
    return remedy


def check_made(nodes: Sequence[Node], cbstate: State) -> None:
    """Check that every entry of ``cbstate`` that a callback reads exists after `setup`.

    Raises:
        MissingStateError: The callback that declares to write an entry did not make it.
    """
    for node in nodes:
        for path in _reads(node.union, "cbstate"):
            if _exists(path, cbstate):
                continue
            entry = path[:3] if path[1] in cbstate else path[:2]
            writers = [writer for writer, written in _writes(nodes, "cbstate") if overlap(path, written)]
            names = ", ".join(dict.fromkeys(writer.name for writer in writers))
            kind = type(writers[0].callback).__name__
            raise MissingStateError(
                dotted(path),
                f"{node.name} reads {dotted(path)}, which {names} declares to write but has not made. Make it in "
                f"{kind}.setup:\n\n    def setup(self, learner: LearnerView) -> None:\n"
                f"        learner.{dotted(entry)} = ...\n",
            )


def check_series(nodes: Sequence[Node]) -> None:
    """Check that no two callbacks write one series to one backend, or to ``cbstate``.

    Raises:
        LoggingError: Two callbacks write one series, so their values would be mixed.
    """
    # `Callback.series` may name a whole container of cbstate: it stands for all entries that callbacks write there.
    entries: dict[str, set[str]] = {}
    for _, path in _writes(nodes, "cbstate"):
        if len(path) > 2:
            entries.setdefault(dotted(path[:2]), set()).add(".".join(path[2:]))
    writers: dict[tuple[object, str, str], list[tuple[Node, type[Phase]]]] = {}
    for node in nodes:
        for group, phase, name in node.callback.series():
            for series in sorted({name, *entries.get(name, ())}):
                for backend in node.backends or (None,):
                    earlier = writers.setdefault((backend and id(backend), group, series), [])
                    for other, other_phase in earlier:
                        if other is not node and (issubclass(phase, other_phase) or issubclass(other_phase, phase)):
                            raise _same_series(other, node, group, series, backend, named_here=name == series)
                    earlier.append((node, phase))


def _same_series(one: Node, other: Node, group: str, name: str, backend: object, *, named_here: bool) -> LoggingError:
    """Return the error for two callbacks that write one series.

    Args:
        one: The first callback.
        other: The second callback.
        group: The first part of the group of the series.
        name: The name of the series.
        backend: The backend that both write to; ``None`` for ``cbstate``.
        named_here: Whether the second callback names the series itself, and not a container of ``cbstate``.
    """
    where = group if backend is None else f"{backend!r}, group {group}"
    called = f"the entries of {name}" if name.startswith("cbstate.") else repr(name)
    remedy = "Remove one, or give each a backend of its own"
    if type(one.callback) is not type(other.callback) or named_here:
        remedy = one.callback.renaming or other.callback.renaming or remedy
    return LoggingError(
        f"{one.name} and {other.name} both write {called} to {where}: their values would be mixed in one series. "
        f"{remedy}."
    )


PROVIDERS = {
    "history": "Recorder",
    "hyperparams": "Scheduler",
    "metrics_epoch": "Metrics",
    "metrics_step": "Metrics",
    "smooth_loss": "SmoothLoss",
    "tracehistory": "Traces",
}
"""The bundled callback that provides each entry of ``cbstate``, by name only: messages tell the user to add it."""


_HOOKS = {
    "FitBegin": "on_fit_start on_fit_begin on_train_start on_train_begin before_fit fit_start",
    "FitEnd": "on_fit_end on_train_end after_fit fit_end",
    "EpochBegin, TrainingPhase": "on_train_epoch_start on_epoch_begin on_epoch_start before_epoch before_train "
    "epoch_start",
    "EpochEnd, TrainingPhase": "on_train_epoch_end on_epoch_end after_epoch after_train epoch_end",
    "BatchBegin, TrainingPhase": "on_train_batch_start on_train_batch_begin on_batch_begin on_batch_start "
    "on_step_begin before_batch batch_start",
    "LossBegin, TrainingPhase": "after_pred before_loss",
    "BackwardBegin, TrainingPhase": "on_before_backward before_backward after_loss",
    "BackwardEnd, TrainingPhase": "on_after_backward after_backward on_substep_end",
    "UpdateBegin, TrainingPhase": "on_before_optimizer_step on_pre_optimizer_step before_step",
    "UpdateEnd, TrainingPhase": "on_optimizer_step after_step",
    "BatchEnd, TrainingPhase": "on_train_batch_end on_batch_end on_step_end after_batch batch_end",
    "EpochBegin, ValidationPhase": "on_validation_epoch_start on_validation_start on_test_begin before_validate "
    "eval_start",
    "BatchEnd, ValidationPhase": "on_validation_batch_end on_test_batch_end on_prediction_step eval_batch_end",
    "EpochEnd, ValidationPhase": "on_validation_epoch_end on_validation_end on_test_end on_evaluate after_validate "
    "eval_end",
    "EpochCancelled": "on_exception",
}
"""The hooks of other libraries, by the arguments of `on` that stand for the same moment."""


def check_marks(callback: Callback) -> None:
    """Check that a callback without a handler has no method that its author meant as a handler.

    Raises:
        HandlerError: A method has the name of a hook of another library, or the parameters of a handler. Nothing would
            ever call it.
    """
    if type(callback).handlers is not Callback.handlers or any(registered(type(callback))):
        return  # the callback chooses its handlers itself, or this instance has not enabled them
    hooks = {name: types for types, names in _HOOKS.items() for name in names.split()}
    for kind in type(callback).__mro__[: type(callback).__mro__.index(Callback)]:
        for name, value in vars(kind).items():
            if not inspect.isfunction(value) or hasattr(Callback, name):
                continue
            handles = [*inspect.signature(value).parameters][1:] == ["event", "phase", "learner"]
            if name in hooks or name.startswith("on_") or handles:
                types = hooks.get(name, "EpochEnd, TrainingPhase")
                raise HandlerError(
                    f"{type(callback).__name__} has no handler, so it would do nothing: no method of it is marked with "
                    f"on(), and a method is a handler by its mark, not by its name. For {name} write:\n\n"
                    f"    @on({types})\n    def {name}(self, event, phase, learner) -> None: ...\n"
                )
