"""Writes ``docs/callbacks-reference.md``: the bundled callbacks, from their declarations and docstrings.

::

    python docs/reference.py

A test fails while the file is not what this would write. A callback that cannot be made without arguments needs an
entry in `EXAMPLES`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flowtrain.callbacks
import flowtrain.metrics
from flowtrain import Callback, EpochEnd, Event, LearnerView, Phase, TrainingPhase, Write
from flowtrain.callback.access import Read, declare, dotted, union
from flowtrain.graph.checks import PROVIDERS
from flowtrain.logging import JsonlBackend

__all__ = ["EXAMPLES", "PAGE", "main", "page"]

PAGE = Path(__file__).with_name("callbacks-reference.md")

_HEAD = """\
# The bundled callbacks

This page lists all callbacks of `flowtrain.callbacks` with their purpose, declarations and cost. It is generated from
their declarations and docstrings: do not edit it, run `python docs/reference.py`.

The last column shows how a callback is made; *reads*, *writes* and *runs after* are those of this instance. It runs
after the bundled callbacks that write the state that it reads, and after a callback of yours that does. *Deferrable*
callbacks only consume, so an executor may run them beside training. *Ranks* are the processes of one training that run
the handlers: every one, or the main rank only.
"""


def _nothing(learner: LearnerView) -> float:
    """A function of the learner, as some callbacks take one."""
    return 0.0


def _named(name: str) -> Callable[..., Any]:
    made: Callable[..., Any] = getattr(flowtrain.callbacks, name)
    return made


def _backend() -> JsonlBackend:
    return JsonlBackend("runs/log.jsonl")


EXAMPLES: Mapping[str, tuple[str, Callable[[], Any]]] = {
    "Checkpointer": ('Checkpointer("checkpoints")', lambda: _named("Checkpointer")("checkpoints")),
    "CustomCallback": ("CustomCallback(f, EpochEnd)", lambda: _named("CustomCallback")(_nothing, EpochEnd)),
    "DeviceStats": (  # the names that it measures are those of the machine
        "DeviceStats()",
        lambda: _named("DeviceStats")(measure=lambda: dict.fromkeys(("Cpu", "Memory", "MemoryPeak"), 0.0)),
    ),
    "EarlyStopping": ("EarlyStopping(patience=5)", lambda: _named("EarlyStopping")(patience=5)),
    "Freeze": ('Freeze({"backbone.*": 2})', lambda: _named("Freeze")({"backbone.*": 2})),
    "LogHistograms": ("LogHistograms(backend)", lambda: _named("LogHistograms")(_backend())),
    "LogHyperParams": ("LogHyperParams(backend)", lambda: _named("LogHyperParams")(_backend())),
    "LogMetrics": ("LogMetrics(backend)", lambda: _named("LogMetrics")(_backend())),
    "LogTraces": ("LogTraces(backend)", lambda: _named("LogTraces")(_backend())),
    "LogVisualization": ("LogVisualization(f, backend)", lambda: _named("LogVisualization")(_nothing, _backend())),
    "Metrics": ("Metrics(accuracy)", lambda: _named("Metrics")(flowtrain.metrics.accuracy)),
    "Profiler": ('Profiler("runs/profile")', lambda: _named("Profiler")("runs/profile")),
    "SWA": ("SWA(start_epoch=10)", lambda: _named("SWA")(start_epoch=10)),
    "Scheduler": (
        "Scheduler({LearningRate: one_cycle(1e-3)})",
        lambda: _named("Scheduler")({_named("LearningRate"): _named("one_cycle")(1e-3)}),
    ),
    "Timeline": ('Timeline("timeline.json")', lambda: _named("Timeline")("timeline.json")),
    "Traces": ('Traces({"Name": f}, TrainingPhase)', lambda: _named("Traces")({"Name": _nothing}, TrainingPhase)),
}
"""Callbacks that take arguments: as source, and made. The others are made without."""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), "utf-8")


def page() -> str:
    """Return what the page should say."""
    public = [getattr(flowtrain.callbacks, name) for name in flowtrain.callbacks.__all__]
    kinds = sorted((each for each in public if _is_callback(each)), key=lambda kind: kind.__name__)
    rows = [_row(kind) for kind in kinds]
    titles = ["callback", "purpose", "at", "reads", "writes", "runs after", "ranks", "made as"]
    table = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    sections = [line for kind in kinds for line in _section(kind)]
    return "\n".join([_HEAD, *table, *rows, "", *sections]).rstrip() + "\n"


def _is_callback(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Callback)


def _row(kind: type[Callback]) -> str:
    source, callback = _example(kind)
    reads, writes = _access(callback)
    providers = [PROVIDERS[path.split(".")[1]] for path in reads if path.split(".")[0] == "cbstate"]
    providers += [each.__name__ for each in callback.run_after()]
    after = sorted({name for name in providers if name != kind.__name__})
    cells = [
        f"[`{kind.__name__}`](#{kind.__name__.lower()})",
        _summary(kind) + (" *Deferrable.*" if callback.deferrable else ""),
        _code(_events(callback)),
        _code(reads),
        _code(writes) + (" its backends" if callback.backends else ""),
        _code(after),
        _ranks(callback, writes),
        f"`{source}`",
    ]
    return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in cells) + " |"


def _example(kind: type[Callback]) -> tuple[str, Callback]:
    if kind.__name__ in EXAMPLES:
        source, make = EXAMPLES[kind.__name__]
        return source, make()
    try:
        return f"{kind.__name__}()", kind()
    except Exception as error:
        raise LookupError(f"{kind.__name__} takes arguments: enter it in EXAMPLES of {Path(__file__).name}.") from error


def _access(callback: Callback) -> tuple[list[str], list[str]]:
    """Return what a callback reads, and what it writes."""
    shared = callback.state_access()
    handlers = [handler.access for _, handler in callback.handlers()]
    setup = [shared] if type(callback).setup is not Callback.setup else []
    used = [*setup, *(shared if access is None else access for access in handlers)]
    declared = union([declare(access, callback.name) for access in used])
    reads = [dotted(path) for path, kind in declared if isinstance(kind, Read)]
    writes = [dotted(path) for path, kind in declared if isinstance(kind, Write)]
    return reads, writes


def _ranks(callback: Callback, writes: Sequence[str]) -> str:
    """Return the ranks that run the handlers; without a setting the paths that are written decide, see `Callback`."""
    return callback.ranks or ("every" if any(not path.startswith("resource.") for path in writes) else "main")


def _events(callback: Callback) -> list[str]:
    found: dict[str, None] = {}
    for _, handler in callback.handlers():
        kinds: tuple[type[Event] | type[Phase], ...] = (handler.event_type,)
        if handler.phase_type is not Phase:
            kinds = (handler.event_type, handler.phase_type)
        found[", ".join(kind.__name__ for kind in kinds)] = None
    return list(found)


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _summary(kind: type) -> str:
    return _prose((inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " "))


def _prose(text: str) -> str:
    """Turn the marks of docstrings into those of Markdown."""
    return text.replace("``", "`")


def _section(kind: type[Callback]) -> Iterator[str]:
    yield f"## {kind.__name__}"
    yield ""
    yield f"`{kind.__name__}{_signature(kind)}`"
    yield ""
    doc, _, doctest = (inspect.getdoc(kind) or "").partition("\n>>>")
    for paragraph in doc.strip().split("\n\n"):
        title, _, rest = paragraph.partition("\n")
        if title in ("Args:", "Attributes:", "Raises:"):
            yield f"**{title.removesuffix(':')}**"
            yield ""
            yield from _entries(rest)
        else:
            yield _prose(paragraph)
        yield ""
    if doctest:
        yield "~~~pycon"
        yield f">>>{doctest}".replace("<BLANKLINE>", "")
        yield "~~~"
        yield ""


def _signature(kind: type) -> str:
    signature = inspect.signature(kind)
    parameters = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    shown = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return re.sub(r"<(?:class '(?:\w+\.)*(\w+)'|built-in function (\w+))>", r"\1\2", str(shown))


def _entries(block: str) -> Iterator[str]:
    """Yield a list item for each entry of a docstring's section, whose further lines are indented more."""
    for entry in re.split(r"\n(?=    \S)", block):
        name, _, text = " ".join(line.strip() for line in entry.splitlines()).partition(": ")
        yield f"- `{name}`: {_prose(text)}"


if __name__ == "__main__":
    main()
