# pyright: reportPrivateUsage=false
# A recording is a private attribute of the callback, and takes the state from its private view.
"""`record`: keep in a file, beside training, the state that the handlers of a callback are given.

`record` gives a callback an `EventRecording`, which stands before each of its handlers: it takes the declared state
from the handler's own view and then calls the handler. So the callback keeps its type, name, order and lane, and the
recording runs where the handler runs, on a snapshot if the handler is deferred. A frame of the recording is a record of
the callback, like those that its handler logs: the process that trains writes it, once, and a checkpoint has the
position.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from hashlib import blake2b
from os import PathLike
from typing import Any, TypeVar

import torch

from flowtrain.callback.access import Declaration, Path, Write, declare, dotted, lags_of
from flowtrain.callback.callback import Callback, draws_own, recording_of
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.diagnostics.recording.encoding import Encoder, Marks, class_path
from flowtrain.diagnostics.recording.file import Frame, RecordingBackend, pack_frame
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, whole_number
from flowtrain.logging.records import log
from flowtrain.state.partial_view import tree

__all__ = ["EventRecording", "check_no_late_writes", "record"]

CB = TypeVar("CB", bound=Callback)

_logger = logging.getLogger("flowtrain")
_GROUP = ("Recording",)


def record(
    callback: CB, *, to: str | PathLike[str], every: int = 1, max_bytes: int = 1 << 30, append: bool = False
) -> CB:
    """Keep what a callback is given at its events in a file, for `flowtrain.replay`; return the same callback.

    The callback runs as ever, and beside it the file gets, for each event that it handles: the event and the phase, the
    state that the handler declares to read, the callback's ``state_dict`` before the event, and the seed of the random
    numbers that its handler draws. The file has data only, and no code. Training has the same result with and without
    a recording. Record a callback before a learner gets it.

    Args:
        callback: A deferrable callback, since such a one only reads. It need not be deferred.
        to: The file, such as ``"runs/a/plots.recording"``. With ``{rank}`` in the path each rank on which the callback
            runs writes a file of its own. Each callback has a file of its own.
        every: Keep only the n-th, 2n-th, ... event of each handler and phase that the callback handles. The callback
            still handles all of them.
        max_bytes: The size of the file at which recording ends. The file says so then, and the callback runs on.
        append: Whether the file may have recordings of other runs. Otherwise training begins with a warning of them.

    Raises:
        UsageError: `callback` is no deferrable callback, is recorded already, writes with a lag, or declares a path
            that cannot be recorded; or `every` or `max_bytes` is no whole number above zero.
        LoggingError: `to` is no path.

    >>> from flowtrain.callbacks import LogMetrics
    >>> from flowtrain.logging import JsonlBackend
    >>> record(LogMetrics(JsonlBackend("runs/a/log.jsonl")), to="runs/a/metrics.recording", every=10)
    <LogMetrics>
    """
    if not is_a(callback, Callback):
        raise UsageError(
            f"record({callback!r}) takes a callback. Write record(LogMetrics(backend), to='metrics.recording')."
        )
    kind = type(callback).__name__
    if not callback.deferrable:
        raise UsageError(
            f"record({kind}()) takes a deferrable callback: one that only reads, so that a replay can give it the same "
            f"state again. If {kind} declares no Write(), set deferrable = True in the class. To record what it reads, "
            f"record a deferrable callback that declares to read the same paths."
        )
    if (recording := recording_of(callback)) is not None:
        raise UsageError(f"record({kind}()): the callback is recorded already, to {recording.backend.path}.")
    every = whole_number("record(): every", every)
    max_bytes = whole_number("record(): max_bytes", max_bytes)
    check_no_late_writes(f"record({kind}())", callback)
    for _, declaration in _declarations(callback):
        _check_paths(kind, declaration)
    callback._recording = EventRecording(RecordingBackend(to, append=append), every, max_bytes)
    return callback


def _declarations(callback: Callback) -> Iterator[tuple[Handler, Declaration]]:
    """Yield each handler of a callback with what it declares."""
    for _, handler in callback.handlers():
        access = callback.state_access() if handler.access is None else handler.access
        yield handler, declare(access, f"{type(callback).__name__}.{handler.attribute}")


def check_no_late_writes(call: str, callback: Callback) -> None:
    """Check that a callback makes no writes with a lag.

    Args:
        call: The call that the user has made, for the error.
        callback: The callback.

    Raises:
        UsageError: It makes some.
    """
    late = {dotted(path) for _, declaration in _declarations(callback) for path in lags_of(declaration)}
    if late:
        raise UsageError(
            f"{call}: {type(callback).__name__} writes {', '.join(sorted(late))} with a lag, and in a replay there is "
            f"no training in which such a write could arrive. Use a deferrable callback that only reads the same paths."
        )


def _check_paths(kind: str, declaration: Declaration) -> None:
    """Check that all declared paths can be recorded.

    Raises:
        UsageError: One cannot.
    """
    for path, access in declaration:
        root = path[0]
        if root == "resource" or (isinstance(access, Write) and root != "optimizer"):
            continue  # a `Write` on state is refused when a learner is built, as for every deferrable callback
        if root == "optimizer" and path[-1] != "hyperparams":
            what, remedy = "the state of the optimizer", 'declare {"optimizer.hyperparams": Read()}'
        elif root == "lossfn":
            what, remedy = "the loss function, which is code", "make it in the callback"
        elif root in ("data", "callbacks"):
            what, remedy = f"{root}, which are objects and no data", "let it read cbstate or batch"
        else:
            continue
        raise UsageError(
            f"record({kind}()): {kind} declares {dotted(path)!r}, and a recording does not hold {what}. Instead, "
            f"{remedy}, or leave this callback unrecorded."
        )


class EventRecording:
    """Keeps the state that a callback is given; it is an attribute of the callback, and goes where that goes.

    Args:
        backend: Writes the frames.
        every: Keep the n-th, 2n-th, ... event of each handler and phase.
        max_bytes: The bytes at which recording ends.

    Attributes:
        backend: Writes the frames. The learner finds it here, as each backend that a callback holds.
    """

    def __init__(self, backend: RecordingBackend, every: int, max_bytes: int) -> None:
        self.backend = backend
        self._every = every
        self._max_bytes = max_bytes
        self._number = 0  # the events that the callback has handled
        self._counts: dict[str, int] = {}  # the same by handler and phase
        self._written = 0
        self._full = False
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Let the next frame be one that tells a reader all it must know: the reader forgets the frames before it."""
        self._begun = False
        self._marks = Marks()
        self._state = b""  # a digest of the callback's state that was written last

    def around(self, callback: Callback, handler: Handler, call: Callable[..., None]) -> Callable[..., None]:
        """Return a function that records an event, and then calls the handler.

        Args:
            callback: The callback.
            handler: The handler.
            call: Calls it.
        """
        return partial(_recorded, callback, handler, call)

    def take(self, callback: Callback, handler: Handler, event: Event, phase: Phase, view: Any) -> None:
        """Record an event, if it is one of those that are kept.

        Raises:
            UsageError: A declared value cannot be recorded.
            LoggingError: The file cannot be written.
        """
        self._number += 1
        key = f"{_key(handler)} {phase!r}"
        count = self._counts[key] = self._counts.get(key, 0) + 1
        if self._full or count % self._every:
            return
        if not self._begun:
            self._begun = True
            self._write(_beginning(callback, self._every), b"")
        encoder = Encoder(self._marks)
        document: dict[str, Any] = {
            "kind": "event",
            "number": self._number,
            "handler": _key(handler),
            "event": encoder.encode(event, "event"),
            "phase": repr(phase),
            "dtype": str(torch.get_default_dtype())[6:],
            "threads": torch.get_num_threads(),
            "rank": [view.rank, view.world_size],
            "seed": torch.initial_seed() if draws_own(callback) else None,
            "reads": [[[*path], encoder.encode(value, where, inside)] for path, where, value, inside in _given(view)],
        }
        exchanged = view._owner.exchanged
        if exchanged:
            document["exchanged"] = [[[*path], encoder.encode(each, dotted(path))] for path, each in exchanged.items()]
        if type(callback).state_dict is not Callback.state_dict:
            self._add_state(document, encoder, callback)
        self._write(document, bytes(encoder.content))

    def _add_state(self, document: dict[str, Any], encoder: Encoder, callback: Callback) -> None:
        """Add the state of the callback to a document, unless it is the one that was written last."""
        own = Encoder()
        state = own.encode(dict(callback.state_dict()), f"{type(callback).__name__}.state_dict()")
        digest = blake2b(repr(state).encode() + own.content, digest_size=16).digest()
        if digest != self._state:
            self._state = digest
            document["state"] = [state, len(encoder.content), len(own.content)]
            encoder.content += own.content

    def _write(self, document: dict[str, Any], content: bytes) -> None:
        frame = pack_frame(document, content)
        if self._written + len(frame) > self._max_bytes:
            self._full = True
            frame = pack_frame({"kind": "end", "number": self._number, "max_bytes": self._max_bytes}, b"")
            _logger.warning(
                "flowtrain: the recording %s has its most bytes, max_bytes=%d, and ends before event %d",
                self.backend.path, self._max_bytes, self._number,
            )  # fmt: skip
        self._written += len(frame)
        log(self.backend, Frame(frame), "event", self._number, _GROUP)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, which a checkpoint holds beside the state of the callback."""
        return {
            "number": self._number, "counts": dict(self._counts), "written": self._written, "full": self._full,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue to count from the counts that `state_dict` returned."""
        self._number, self._counts = state["number"], dict(state["counts"])
        self._written, self._full = state["written"], state["full"]
        self._begin_anew()


def _recorded(
    callback: Callback, handler: Handler, call: Callable[..., None], event: Event, phase: Phase, view: LearnerView
) -> None:
    """Record an event, and call the handler."""
    recording = recording_of(callback)  # now: in another process the attributes are replaced for each batch of events
    if recording is not None:
        recording.take(callback, handler, event, phase, view)
    call(event, phase, view)


def _key(handler: Handler) -> str:
    """Return the name of a handler within its callback, which is the same in every process."""
    return f"{handler.attribute} ({handler.event_type.__name__}, {handler.phase_type.__name__})"


def _beginning(callback: Callback, every: int) -> dict[str, Any]:
    """Return the document that a recording begins with, and that comes again where a run is resumed."""
    handlers = {}
    for handler, declaration in _declarations(callback):
        handlers[_key(handler)] = {
            "event": class_path(handler.event_type),
            "phase": class_path(handler.phase_type),
            "reads": [[*path] for path, _ in declaration if path[0] != "resource"],
        }
    return {"kind": "begin", "callback": class_path(type(callback)), "every": every, "handlers": handlers}


def _given(view: Any) -> Iterator[tuple[Path, str, Any, Any]]:
    """Yield the path, the name, the value and the declared part of each entry that a view shows and that exists."""
    state, exchanged = view._state, view._owner.exchanged or {}
    for root, inside in tree(view._owner.declaration).items():
        entries = inside if isinstance(inside, dict) and "" not in inside else None
        if root in ("batch", "cbstate"):
            held = vars(getattr(state, root))
            for name in held if entries is None else entries:
                if name in held and (root, name) not in exchanged:
                    yield (root, name), f"{root}.{name}", held[name], None if entries is None else entries[name]
        elif root == "optimizer":
            yield from _hyperparams(state.optimizers, entries or {}, ("optimizer",))
        elif root in ("params", "model") and (root,) not in exchanged:
            yield (root,), root, getattr(state, root), entries


def _hyperparams(optimizers: Any, inside: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, str, Any, Any]]:
    for name, below in inside.items():
        here = (*path, name)
        if name == "hyperparams":
            yield here, dotted(here), [dict(group) for group in optimizers.hyperparams], None
        elif isinstance(below, dict):
            yield from _hyperparams(optimizers[name], below, here)
