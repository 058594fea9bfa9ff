"""The audit: which callbacks of a learner make the host wait for the device, where, and what to do about it.

The callbacks run for one batch of every phase, on copies of the model, the optimizer and themselves, while
`flowtrain.diagnostics.sync_audit` watches. It works on the CPU, where all tensors count as if they were on a device. A
callback that is throttled is not seen: what it waits for it waits for rarely.

Find what makes the host wait for the device: every read of a value.

`watching` reports each operation that needs the value of a tensor on the host: ``.item()``, ``float()``, ``.tolist()``,
``if tensor:``, ``.cpu()``, a boolean mask. All tensors count as if they were on a device, so that it works without one:
``.to("cpu")`` counts, ``.to(other.device)`` does not. What the library reads late does not count
(`flowtrain.state.device_values`), nor what optimizers of torch read, whose counters are on the CPU.
"""

from __future__ import annotations

import copy
import inspect
import linecache
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowtrain.callback.callback import Callback
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.diagnostics.scratch_learner import LearnerParts, first_batches, same_random_numbers
from flowtrain.errors import UsageError
from flowtrain.graph.plan import Call, Step
from flowtrain.graph.registry import Callbacks
from flowtrain.state.device_values import DEFAULT_LAG, reading
from flowtrain.state.learner_state import Named

__all__ = [
    "Sync",
    "SyncReport",
    "audit",
    "watching",
]

_NUMBERS = {
    "item": ".item()", "tolist": ".tolist()", "__float__": "float(tensor)", "__int__": "int(tensor)",
    "__bool__": "bool(tensor)", "__index__": "a tensor as an index", "__complex__": "complex(tensor)",
    "__repr__": "repr(tensor)", "__format__": "a tensor in a text", "__contains__": "value in tensor",
}  # fmt: skip
_COPIES = {"cpu": ".cpu()", "numpy": ".numpy()", "__array__": "an array of a tensor"}
_SHAPES = {"nonzero", "masked_select", "unique", "unique_consecutive", "argwhere", "__getitem__", "index"}

_ADVICE = {
    "number": "Record the tensor itself (Traces, or push it into a series), read it at EpochEnd, or run the callback "
    "rarely: throttle(callback, BatchEnd, every=100).",
    "copy": "Run the callback rarely (throttle(callback, BatchEnd, every=100)), or declare deferrable = True and let "
    "an executor copy what it reads without waiting.",
    "shape": "The size of the result depends on values. Keep the size: multiply by the mask, or use torch.where.",
    "choice": "Choose on the device: torch.where(condition, one, other).",
}


@dataclass(frozen=True)
class Sync:
    """One place that makes the host wait for the device.

    Attributes:
        operation: What is waited for, such as ``.item()``.
        file: Where, the innermost line outside of torch.
        line: Its number.
        code: The line itself.
        advice: What to do about it.
        where: The callback and its handler, ``Printer.show``; empty for the model, the loss and the loader.
        event: At which event; empty outside of handlers.
        phase: In which phase.
    """

    operation: str
    file: str
    line: int
    code: str
    advice: str
    where: str = ""
    event: str = ""
    phase: str = ""

    def __str__(self) -> str:
        who = f"{self.where} at {self.event}, {self.phase}," if self.where else "The model, the loss or the loader"
        return f"{who} waits for {self.operation}:\n    {self.file}:{self.line}: {self.code}\n    {self.advice}"


@contextmanager
def watching(found: Callable[[Sync], None]) -> Generator[None]:
    """Call a function for every operation that would wait for the device, before it is done.

    Args:
        found: What it raises is raised at that operation.
    """
    watch = _Watch(found)
    with _Dispatched(watch), _Called(watch):
        yield


class _Watch:
    """Makes the reports of both modes, one for each operation."""

    def __init__(self, found: Callable[[Sync], None]) -> None:
        self._found = found
        self.inside = False  # an operation that was reported, and what it is made of

    def see(self, operation: str, kind: str) -> None:
        """Report an operation, unless it is the library's own."""
        place = None if reading() or self.inside else _place()
        if place is not None:
            file, line = place
            code = linecache.getline(file, line).strip()
            if kind == "number" and (operation == "bool(tensor)" or code.startswith(("if ", "while ", "elif "))):
                kind = "choice"
            self._found(Sync(operation, file, line, code, _ADVICE[kind]))


class _Called(TorchFunctionMode):
    """Sees calls from Python."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the function's name, then call it."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        kind = "number" if name in _NUMBERS else "copy" if name in _COPIES else ""
        operation = _NUMBERS.get(name) or _COPIES.get(name, "")
        if name == "to" and "cpu" in (*args[1:2], kwargs.get("device")):
            kind, operation = "copy", ".to('cpu')"
        if not kind:
            return func(*args, **kwargs)
        self._watch.see(operation, kind)
        before, self._watch.inside = self._watch.inside, True
        try:
            return func(*args, **kwargs)
        finally:
            self._watch.inside = before


class _Dispatched(TorchDispatchMode):
    """Sees what calls come to: values and sizes that depend on the data."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operator's tags, then run it."""
        name = func.overloadpacket.__name__
        if torch.Tag.data_dependent_output in func.tags:
            self._watch.see(_NUMBERS["item"] if name == "_local_scalar_dense" else f"{name}()", "number")
        elif torch.Tag.dynamic_output_shape in func.tags and (name != "index" or _has_mask(args)):
            self._watch.see("a boolean mask" if name == "index" else f"{name}()", "shape")
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])


def _place() -> tuple[str, int] | None:
    """Return the innermost line outside of torch; ``None`` for what an optimizer of torch reads."""
    frame = inspect.currentframe()
    inside, own = str(Path(torch.__file__).parent), (__file__, linecache.__file__)
    optimizers = str(Path(torch.__file__).parent / "optim")
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(optimizers):
            return None
        if not file.startswith(inside) and file not in own:
            return file, frame.f_lineno
        frame = frame.f_back
    return "?", 0


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

    Callbacks that are not to be audited, such as those that print, and those with a logging backend are not run.

    Args:
        learner: It does not change, and neither do the random number generators.

    Raises:
        UsageError: It has no data, a loader can be gone through only once, or something cannot be copied.
    """
    with same_random_numbers():
        data = first_batches(learner.state.data)
        nodes = learner.state.callbacks.nodes
        chosen = [node.callback for node in nodes if node.callback.audited and not node.backends]
        left_out = [node.name for node in nodes if node.callback not in chosen]
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
