"""`replay`: run a callback again on the events of a recording, without a learner, a loader or a device.

Each event of the file becomes the state of a learner (`EventView`), of which the handler gets the same kind of view as
in training. So it reads the same paths, and is refused the same ones.
"""

from __future__ import annotations

import os
import sys
import uuid
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import nn

from flowtrain.callback.access import Declaration, Path, Read, declare, dotted, granted
from flowtrain.callback.callback import Callback, draws_own, recording_of
from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler, check_handlers, find_handler
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.diagnostics.recording.decoding import Decoder, find_class
from flowtrain.diagnostics.recording.file import FrameReader
from flowtrain.diagnostics.recording.recorder import check_no_late_writes
from flowtrain.diagnostics.recording.shown import EventView, RecordedEvent
from flowtrain.errors import LoggingError, UsageError
from flowtrain.errors.arguments import is_a, is_type, whole_number
from flowtrain.graph.held_backends import backends_of
from flowtrain.logging.backend import LoggerBackend, Run
from flowtrain.logging.records import holding
from flowtrain.state.partial_view import Owner
from flowtrain.state.random_numbers import own_numbers

__all__ = ["Replayed", "documents", "reading_contents", "replay"]


@dataclass
class Replayed:
    """The result of a replay.

    Attributes:
        path: The recording.
        events: How many events the callback has handled.
        recorded: How many events the recording has, as far as it was read.
        cut: Where and why the recording ends early; empty if it is whole.
    """

    path: str
    events: int = 0
    recorded: int = 0
    cut: str = ""


@dataclass
class _Begun:
    """The beginning of a recording, or of the part of it after a run was resumed.

    Attributes:
        callback: The class of the callback that was recorded, as ``"module:Class"``.
        every: Which events of each handler and phase were kept.
        handlers: For each handler of that callback its event type, its phase type and the paths that it declares.
    """

    callback: str
    every: int
    handlers: dict[str, tuple[str, str, Declaration]] = field(default_factory=dict)


def replay(
    path: str | PathLike[str],
    callback: Callback,
    *,
    event: type[Event] | str | None = None,
    first: int = 1,
    last: int | None = None,
    model: nn.Module | None = None,
) -> Replayed:
    """Run a callback on the events of a recording, which `flowtrain.record` has made.

    The handlers get the state that was recorded, and log to the backends that the callback holds. The callback that was
    recorded logs the same records as in training, but for the time that a backend adds. Another callback may be
    replayed too, if the recording has all paths that its handlers declare at these events. Its conditions
    (`flowtrain.callbacks.throttle`, ``every=``) are not asked: it handles each event of the file, since those were
    chosen in training. A callback of the class that was recorded gets the state (``state_dict``) that it had before the
    first of the events, and again before an event that does not follow the one before it.

    Args:
        path: The recording.
        callback: The callback. It must be in no learner.
        event: The type of the events to replay, subclasses included, or its name; all by default.
        first: The number of the first event to replay, as `flowtrain.record` has counted those that the callback
            handled.
        last: The number of the last event to replay.
        model: A module that is built as the recorded one was, if handlers call the model. It is given the recorded
            state before each event, and stays changed.

    Returns:
        How many events were replayed, and where a recording that is cut off ends. There is a warning of that too.

    Raises:
        UsageError: The callback declares a path that was not recorded, handles none of the recorded events, or is
            recorded itself; or an argument is wrong.
        LoggingError: The file is no recording, or has impossible contents, or a class in it is not loaded.
        Exception: A handler failed.
    """
    _check_arguments(callback, event, model)
    numbers = _numbers(first, last)
    handlers = tuple(callback.handlers())
    check_handlers(handlers)
    result = Replayed(os.fspath(path))
    player = _Player(callback, handlers, model)
    with ExitStack() as stack:
        for document, content in documents(result):
            if document["kind"] == "begin":
                player.begin(document, result.path)
                continue
            given = player.read(document, content, result.path)
            if given.number not in numbers or (event is not None and not _is_of(given.event, event)):
                continue
            if not result.events:
                stack.enter_context(_open_backends(callback))
            result.events += player.play(given)
    if not result.recorded and not result.cut:
        result.cut = f"{result.path} has no event: the callback handled none that was kept."
    if result.cut:
        warnings.warn(result.cut, UserWarning, stacklevel=2)
    return result


def _check_arguments(callback: object, event: object, model: object) -> None:
    """Raise a `UsageError` if an argument of `replay` has another type than it must have."""
    if not is_a(callback, Callback) or not isinstance(callback, Callback):
        raise UsageError(
            f"replay(path, {callback!r}) takes a callback second. Write replay(path, LogMetrics(JsonlBackend(path)))."
        )
    kind = type(callback).__name__
    if recording_of(callback) is not None:
        raise UsageError(f"replay(path, {kind}()): the callback is recorded itself. Make one without record().")
    if not callback.deferrable:
        raise UsageError(
            f"replay(path, {kind}()): {kind} is not deferrable, so it may write what it is given, which nobody would "
            f"see. Replay a callback with deferrable = True, which only reads."
        )
    check_no_late_writes(f"replay(path, {kind}())", callback)
    if event is not None and not is_type(event, Event) and not is_a(event, str):
        raise UsageError(f"replay(event={event!r}): event is an event type or its name, such as BatchEnd.")
    if model is not None and not is_a(model, nn.Module):
        raise UsageError(f"replay(model={model!r:.60}): model is a torch.nn.Module, built as the recorded one was.")


def _numbers(first: int, last: int | None) -> range:
    """Return the numbers of the events to replay."""
    first = whole_number("replay(): first", first)
    return range(first, sys.maxsize if last is None else whole_number("replay(): last", last) + 1)


def _is_of(event: Event, wanted: type[Event] | str) -> bool:
    if isinstance(wanted, str):
        return wanted in [kind.__name__ for kind in type(event).__mro__]
    return isinstance(event, wanted)


def documents(result: Replayed) -> Iterator[tuple[dict[str, Any], memoryview]]:
    """Yield the documents of a recording with their content; note in the result how far it was read.

    Raises:
        LoggingError: The file is no recording, or does not begin like one.
    """
    reader = FrameReader(result.path)
    begun = False
    try:
        for document, content in reader:
            kind = document.get("kind")
            if kind == "end":
                result.cut = (
                    f"{result.path} ends before event {document.get('number')}: it has its most bytes, "
                    f"record(max_bytes={document.get('max_bytes')})."
                )
                continue
            begun = begun or kind == "begin"
            if not begun or kind not in ("begin", "event"):
                raise LoggingError(f"{result.path} has a frame {kind!r:.40} where none belongs: it is no recording.")
            result.recorded += kind == "event"
            yield document, content
    finally:
        reader.close()
    result.cut = reader.cut or result.cut


class _Player:
    """Runs a callback on events.

    Args:
        callback: The callback.
        handlers: Its handlers.
        model: The module for the state of a recorded one.
    """

    def __init__(self, callback: Callback, handlers: Sequence[tuple[type, Handler]], model: nn.Module | None) -> None:
        self._callback = callback
        self._handlers = handlers
        self._model = model
        self._kind = type(callback).__name__
        own = declare(callback.state_access(), f"{self._kind}.state_access()")
        self._access: dict[Handler, Declaration] = {
            each: own if each.access is None else declare(each.access, f"{self._kind}.{each.attribute}")
            for _, each in handlers
        }
        self._shown: dict[Handler, EventView] = {}
        self._decoder = Decoder(model=model)
        self._begun: _Begun | None = None
        self._state: Mapping[str, Any] | None = None
        self._last: int | None = None
        self._set_up = False

    def begin(self, document: dict[str, Any], path: str) -> None:
        """Begin a recording, or the part of it after a run was resumed.

        Raises:
            UsageError: The callback declares what was not recorded, or handles none of the recorded events.
        """
        with reading_contents(path):
            handlers: dict[str, tuple[str, str, Declaration]] = {
                name: (each["event"], each["phase"], tuple((tuple(read), Read()) for read in each["reads"]))
                for name, each in document["handlers"].items()
            }
            self._begun = _Begun(document["callback"], document["every"], handlers)
        # The series and the state of the callback are written as a whole again after this.
        self._decoder, self._state = Decoder(model=self._model), None
        self._check(self._begun, path)

    def _check(self, begun: _Begun, path: str) -> None:
        missing: dict[str, None] = {}
        fits = False
        for _, handler in self._handlers:
            for event, phase, reads in begun.handlers.values():
                if not (_meet(handler.event_type, event) and _meet(handler.phase_type, phase)):
                    continue
                fits = True
                missing |= {
                    dotted(each): None
                    for each, _ in self._access[handler]
                    if each[0] != "resource" and not _covered(reads, each)
                }
        if missing:
            recorded = sorted({dotted(each) for _, _, reads in begun.handlers.values() for each, _ in reads})
            raise UsageError(
                f"{self._kind} declares {', '.join(missing)}, which {path} does not have: the callback that was "
                f"recorded, {begun.callback.rpartition(':')[2]}, declares {', '.join(recorded) or 'nothing'}. Replay a "
                f"callback that reads only these, or record one that declares all of them."
            )
        if not fits:
            there = dict.fromkeys(f"{each.rpartition(':')[2]}" for each, _, _ in begun.handlers.values())
            raise UsageError(
                f"{self._kind} handles {', '.join(each.event_type.__name__ for _, each in self._handlers) or 'nothing'}"
                f", and {path} has events of the handlers for {', '.join(there) or 'nothing'}, in the phases of "
                f"{begun.callback.rpartition(':')[2]}. Replay a callback that handles these."
            )

    def read(self, document: dict[str, Any], content: memoryview, path: str) -> RecordedEvent:
        """Return an event.

        Raises:
            LoggingError: The document is none of an event.
        """
        with reading_contents(path):
            decoder = self._decoder
            decoder.begin(content)
            payload = {_path(each): decoder.decode(value) for each, value in document["reads"]}
            exchanged = {_path(each): decoder.decode(value) for each, value in document.get("exchanged", ())}
            event, phase = decoder.decode(document["event"]), decoder.phase(document["phase"])
            number = document["number"]
            if not isinstance(event, Event) or type(number) is not int:
                raise ValueError("it is no event")
            if "state" in document:
                state, place, size = document["state"]
                inner = Decoder()
                inner.begin(content[place : place + size])
                self._state = inner.decode(state)
        return RecordedEvent(number, event, phase, document, payload, exchanged, self._state)

    def play(self, given: RecordedEvent) -> bool:
        """Run the handler for an event; return whether the callback has one."""
        handler = find_handler(self._handlers, type(given.event), type(given.phase))
        if handler is None:
            return False
        view = self._view(handler, given)
        follows = self._last is not None and given.number == self._last + 1
        begun = self._begun
        if not self._set_up:
            self._set_up = True
            self._callback.setup(view)
        same = begun is not None and begun.callback.rpartition(":")[2] == type(self._callback).__qualname__
        if same and not follows and given.state is not None:
            self._callback.load_state_dict(given.state)
        self._last = given.number
        seed = given.document.get("seed")
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_settings_of(given.document))
            stack.enter_context(holding(backends_of(self._callback)))
            if draws_own(self._callback):
                stack.enter_context(own_numbers(seed if type(seed) is int else given.number))
            try:
                handler.bind(self._callback)(given.event, given.phase, view)
            except Exception as error:
                error.add_note(
                    f"raised in {self._kind}.{handler.attribute} at ({type(given.event).__name__}, {given.phase!r}), "
                    f"event {given.number} of a recording"
                )
                raise
        return True

    def _view(self, handler: Handler, given: RecordedEvent) -> LearnerView:
        if handler not in self._shown:
            owner = Owner(
                self._callback.name or self._kind, self._kind, handler.attribute, self._access[handler],
                consumes=True, copied=True,
            )  # fmt: skip
            self._shown[handler] = EventView(owner)
        return self._shown[handler].show(given)


def _path(given: Any) -> Path:
    """Return a path of a file.

    Raises:
        ValueError: It is none.
    """
    if type(given) is not list or not given or not all(type(part) is str for part in given):
        raise ValueError(f"a path {given!r:.40}")
    if given[0] not in ("batch", "cbstate", "params", "model", "optimizer") or given[-1].startswith("__"):
        raise ValueError(f"a path {given!r:.40}")
    return tuple(given)


def _meet(kind: type, recorded: str) -> bool:
    """Tell whether an event or a phase may be of both types."""
    try:
        other = find_class(recorded)
    except LoggingError:  # a type that is not loaded here: its events cannot be of a type that is
        return kind in (Event, Phase)
    return issubclass(kind, other) or issubclass(other, kind)


def _covered(reads: Declaration, path: Path) -> bool:
    """Tell whether a recording with these declared paths has the state at a path."""
    return granted(reads, path) is not None or (path[0] == "params" and granted(reads, ("model",)) is not None)


@contextmanager
def reading_contents(path: str) -> Generator[None]:
    """Return a context in which contents of a file are read, which may be anything."""
    try:
        yield
    except (LoggingError, UsageError):
        raise
    except Exception as error:
        raise LoggingError(
            f"{path} has impossible contents ({type(error).__name__}: {error!s:.200}). It was not made by "
            f"flowtrain.record, or by a version that has a fault."
        ) from error


@contextmanager
def _settings_of(document: Mapping[str, Any]) -> Generator[None]:
    """Return a context with the default dtype and the number of threads of an event, on which the last bits depend."""
    before = torch.get_default_dtype(), torch.get_num_threads()
    dtype, threads = getattr(torch, str(document.get("dtype")), before[0]), document.get("threads", before[1])
    try:
        if dtype is not before[0]:
            torch.set_default_dtype(dtype)
        if threads != before[1]:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(before[1])


@contextmanager
def _open_backends(callback: Callback) -> Generator[None]:
    """Return a context in which the backends of a callback are open."""
    run = Run(uuid.uuid4().hex[:12])
    opened: list[LoggerBackend] = []
    failed = True
    try:
        for backend in backends_of(callback):
            backend.open(run)
            opened.append(backend)
        yield
        for backend in opened:
            backend.flush()
        failed = False
    finally:
        with ExitStack() as stack:
            for backend in opened:
                stack.callback(backend.close)
                stack.callback(partial(backend.ended, "failed" if failed else "finished"))
