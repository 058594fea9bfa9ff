"""``flowtrain replay PATH [MODULE:CALLBACK]``: say what a recording has, or replay a callback on it.

The exit status is 0 if it was read to its end, and 1 if it was not or the replay was refused.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections import Counter
from typing import Any

from flowtrain.callback.callback import Callback
from flowtrain.diagnostics.recording.replay import Replayed, documents, reading_contents, replay
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.errors.arguments import is_a

__all__ = ["add_replay", "describe_recording"]


def add_replay(commands: Any) -> None:
    """Add the command to the program ``flowtrain``.

    Args:
        commands: The result of `argparse.ArgumentParser.add_subparsers`.
    """
    parser = commands.add_parser(
        "replay",
        help="run a callback again on the events of a recording",
        description="Run a callback on the events that flowtrain.record has kept, or say which these are.",
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="the recording")
    parser.add_argument(
        "callback",
        metavar="MODULE:CALLBACK",
        nargs="?",
        help="a callback, or a class or function that is called without arguments and returns one; without it the "
        "program says what the recording has",
    )
    parser.add_argument("--event", metavar="TYPE", help="replay only events of this type, such as BatchEnd")
    parser.add_argument("--from", dest="first", metavar="N", type=int, default=1, help="the first event to replay")
    parser.add_argument("--to", dest="last", metavar="N", type=int, help="the last event to replay")
    parser.add_argument("--model", metavar="MODULE:MODEL", help="the module, if the callback calls it; as for CALLBACK")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> int:
    try:
        if given.callback is None:
            print("\n".join(lines := describe_recording(given.path)))
            return int(lines[-1].startswith(f"  {given.path} is "))
        sys.path.insert(0, os.getcwd())  # as `python -m` does, so that MODULE may be a file of this folder
        callback, model = _made(given.callback, Callback), _made(given.model)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*(cut off|damaged| has its most bytes|has no event)")
            done = replay(given.path, callback, event=given.event, first=given.first, last=given.last, model=model)
    except FlowtrainError as error:
        notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
        print(f"flowtrain replay: {error}{notes}", file=sys.stderr)
        return 1
    print(f"{given.path}: {done.events} of {done.recorded} events were replayed")
    if done.cut:
        print(f"flowtrain replay: {done.cut}", file=sys.stderr)
    return int(bool(done.cut))


def describe_recording(path: str | os.PathLike[str]) -> list[str]:
    """Return lines that say what a recording has: the callback, its declarations, and its events.

    Raises:
        LoggingError: The file is no recording.
    """
    result = Replayed(os.fspath(path))
    counts: Counter[tuple[str, str]] = Counter()
    numbers: dict[tuple[str, str], list[int]] = {}
    lines: list[str] = []
    for document, _ in documents(result):
        with reading_contents(result.path):
            if document["kind"] == "begin":
                kept = "" if document["every"] == 1 else f", every {document['every']} events"
                found = [f"{result.path}: {document['callback']}{kept}"]
                for name, each in document["handlers"].items():
                    found.append(f"  {name} reads {', '.join(map('.'.join, each['reads'])) or 'nothing'}")
                lines += [] if lines[: len(found)] == found else found
                continue
            key = document["handler"], document["phase"]
            counts[key] += 1
            numbers.setdefault(key, []).append(document["number"])
    for (handler, phase), count in counts.items():
        own = numbers[handler, phase]
        lines.append(f"  {count} events of {handler} in {phase}: numbers {min(own)} to {max(own)}")
    return [*lines, *([f"  {result.cut}"] if result.cut else [])]


def _made(name: str | None, kind: type | None = None) -> Any:
    """Return the object that an argument names.

    Args:
        name: The module and the name in it, with a colon between them; ``None`` gives ``None``.
        kind: The type that the object must have. An object of another type is called, to return one.

    Raises:
        UsageError: There is no such object.
    """
    if name is None:
        return None
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise UsageError(f"{name!r} names no object in a module. Write plots:MyPlot, for MyPlot in plots.py.")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and imports another one that is not
        raise UsageError(f"There is no module {error.name!r}. {name!r} is looked up from {os.getcwd()}.") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"There is no {part!r} in {module}: {name!r} names nothing.")
        found = getattr(found, part)
    if kind is None and not isinstance(found, type) and not callable(getattr(found, "state_dict", None)):
        return found()
    if isinstance(found, type) or (kind is not None and not is_a(found, kind)):
        found = found()
    if kind is not None and not is_a(found, kind):
        raise UsageError(f"{name} is {found!r:.80}, which is no {kind.__name__}.")
    return found
