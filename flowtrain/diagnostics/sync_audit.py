"""The audit of synchronisations: operations that make the host wait for the device, with their lines and remedies.

`audit` runs copies of the callbacks for one batch of every phase, on copies of model and optimizer. Their conditions
are removed, so that it reports a throttled callback too, which one batch alone would not reach.

`watching` reports each operation that needs the value of a tensor on the host: ``.item()``, ``float()``, ``.tolist()``,
``if tensor:``, ``.cpu()``, a boolean mask. All tensors count as if they were on a device, so the audit works without
one: ``.to("cpu")`` is reported, ``.to(other.device)`` is not. Values that flowtrain reads late are not reported
(`flowtrain.state.device_values`), nor values that torch's optimizers read, because their counters are on the CPU.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.diagnostics.scratch_learner import LearnerParts, copied, first_batches, same_rng, scratch_learner
from flowtrain.graph.plan import Call, PlannedHandler
from flowtrain.graph.registry import Callbacks
from flowtrain.state.device_values import DEFAULT_LAG, reading
from flowtrain.state.learner_state import LearnerState

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
    """One line of code that makes the host wait for the device.

    Attributes:
        operation: The operation, such as ``.item()``.
        file: The file of the innermost line outside of torch.
        line: The number of that line.
        code: The text of that line.
        advice: How to avoid the wait.
        where: The callback and its handler, ``Printer.show``; empty for the model, the loss and the loader.
        event: The event of the handler; empty outside of handlers.
        phase: The phase of the event; empty outside of handlers.
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
    """Give a context that calls a function before every operation that would wait for the device.

    Args:
        found: The function. If it raises, the operation raises.
    """
    watch = _Watch(found)
    with _Dispatched(watch), _Called(watch):
        yield


class _Watch:
    """Makes the reports of `_Called` and `_Dispatched`, one for each operation.

    Args:
        found: The function to call with each report.

    Attributes:
        inside: Whether a reported operation runs, whose inner operations are not reported again.
    """

    def __init__(self, found: Callable[[Sync], None]) -> None:
        self._found = found
        self.inside = False

    def see(self, operation: str, kind: str) -> None:
        """Report an operation, unless flowtrain or an optimizer of torch reads the value."""
        # `reading` is true while flowtrain reads values late on purpose: no line of the user can avoid that wait.
        place = None if reading() or self.inside else _place()
        if place is not None:
            file, line = place
            code = linecache.getline(file, line).strip()
            # A number in a condition needs other advice than one that is shown or logged.
            if kind == "number" and (operation == "bool(tensor)" or code.startswith(("if ", "while ", "elif "))):
                kind = "choice"
            self._found(Sync(operation, file, line, code, _ADVICE[kind]))


class _Called(TorchFunctionMode):
    """Sees the functions of torch that Python code calls."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Report the function if its name is one of a synchronisation, then call it."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        kind = "number" if name in _NUMBERS else "copy" if name in _COPIES else ""
        operation = _NUMBERS.get(name) or _COPIES.get(name, "")
        # `to` moves data in all directions, and only the way to the host waits.
        if name == "to" and "cpu" in (*args[1:2], kwargs.get("device")):
            kind, operation = "copy", ".to('cpu')"
        if not kind:
            return func(*args, **kwargs)
        self._watch.see(operation, kind)
        # `.item()` runs an operator that `_Dispatched` would report a second time.
        before, self._watch.inside = self._watch.inside, True
        try:
            return func(*args, **kwargs)
        finally:
            self._watch.inside = before


class _Dispatched(TorchDispatchMode):
    """Sees the operators that the calls execute, whose tags tell if a value or a size depends on the data."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Report the operator if its tags are those of a synchronisation, then run it."""
        name = func.overloadpacket.__name__
        if torch.Tag.data_dependent_output in func.tags:
            self._watch.see(_NUMBERS["item"] if name == "_local_scalar_dense" else f"{name}()", "number")
        # An index by whole numbers has a size that is known beforehand; one by a mask has not.
        elif torch.Tag.dynamic_output_shape in func.tags and (name != "index" or _has_mask(args)):
            self._watch.see("a boolean mask" if name == "index" else f"{name}()", "shape")
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])


def _place() -> tuple[str, int] | None:
    """Return the innermost line outside of torch; ``None`` if an optimizer of torch reads the value."""
    frame = inspect.currentframe()
    inside, own = str(Path(torch.__file__).parent), (__file__, linecache.__file__)
    optimizers = str(Path(torch.__file__).parent / "optim")
    while frame is not None:
        file = frame.f_code.co_filename
        # An optimizer that is not fused reads its step number, and no callback causes that.
        if file.startswith(optimizers):
            return None
        if not file.startswith(inside) and file not in own:
            return file, frame.f_lineno
        frame = frame.f_back
    return "?", 0


class SyncReport(tuple[Sync, ...]):
    """The result of `audit`: a tuple of `Sync`, each line once for each handler, event and phase.

    Attributes:
        left_out: The names of the callbacks that the audit did not run.
    """

    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [str(each) for each in self] or ["Nothing makes the host wait for the device."]
        if self.left_out:
            lines.append(f"Not run: {', '.join(self.left_out)}, which print, write files, or wait on purpose.")
        return "\n".join(lines)


def audit(learner: LearnerParts) -> SyncReport:
    """Run copies of a learner's callbacks for one batch of every phase, and report the lines where the host would wait.

    Callbacks with a logging backend, and those with ``audited = False``, such as callbacks that print, do not run.

    Args:
        learner: The learner. It does not change, and neither do the random number generators.

    Raises:
        UsageError: The learner has no data, a loader can be iterated only once, or an object cannot be copied.
    """
    with same_rng():
        data = first_batches(learner.state.data, "learner.audit_syncs()")
        nodes = learner.state.callbacks.nodes
        chosen = [node for node in nodes if node.callback.audited and not node.backends]
        parts = copied(learner, [node.callback for node in chosen], "learner.audit_syncs()")
        model, lossfn, optimizer, callbacks = parts
        for callback in callbacks:
            callback.conditions = ()
        probe = _Probe()

        def build(state: LearnerState) -> Callbacks:
            """Return the callbacks; a report of a wait within a handler names it."""
            return Callbacks(callbacks, state, [type(phase) for phase in data], (), probe.around)

        core = learner.core.like(lag=learner.state.lag or DEFAULT_LAG)
        with (
            scratch_learner(learner, (model, lossfn, optimizer), data, build, core) as scratch,
            watching(probe.found),
        ):
            scratch.fit(1)
    report = SyncReport(probe.seen)
    report.left_out = tuple(node.name for node in nodes if node not in chosen)
    return report


class _Probe:
    """Adds the handler that runs to each report.

    Attributes:
        seen: The reports so far, each once, in their order.
    """

    def __init__(self) -> None:
        self.seen: dict[Sync, None] = {}
        self._now = ("", "", "")

    def found(self, sync: Sync) -> None:
        """Keep a report, with the handler, event and phase that caused it."""
        where, event, phase = self._now
        self.seen[replace(sync, where=where, event=event, phase=phase)] = None

    def around(self, planned: PlannedHandler) -> Call:
        """Return the call of a handler, whose reports get its name."""

        def call(event: Event, phase: Phase, view: LearnerView) -> None:
            """Call the handler."""
            before, self._now = self._now, (planned.label, type(event).__name__, repr(phase))
            try:
                planned.call(event, phase, view)
            finally:
                self._now = before

        return call
