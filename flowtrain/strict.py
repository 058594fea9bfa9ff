"""Strict mode: prove for every handler that it changed only what it declares to write.

`Learner(strict=True)` compares fingerprints of the whole state around each handler. It finds what no view can refuse:
in-place operations on tensors, writes through an object that was read, and random numbers drawn without
``resource.rng``. It is slow, and meant for tests and for a first run of a new callback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowtrain.access import Declaration, Path, Write, canonical, dotted, meet, render, union
from flowtrain.errors import UndeclaredWriteError
from flowtrain.events import Event
from flowtrain.fingerprint import changes, fingerprints
from flowtrain.phases import Phase
from flowtrain.plan import Call, Step
from flowtrain.protect import LearnerView
from flowtrain.reach import Reach
from flowtrain.state import LearnerState

__all__ = ["declarable", "undeclared", "watch"]


def watch(state: LearnerState) -> Callable[[Step], Call]:
    """Return what wraps the call of a step, so that it raises for undeclared writes.

    Args:
        state: The state to watch.
    """

    def wrap(step: Step) -> Call:
        """Return the call of a step, between two fingerprints."""
        declaration, reach = step.node.access[step.handler], Reach(state)

        def call(event: Event, phase: Phase, view: LearnerView) -> None:
            """Call the handler, and raise for what it changed without saying so."""
            before = fingerprints(state)
            step.call(event, phase, view)
            found = undeclared(changes(before, fingerprints(state)), declaration, reach)
            if found:
                raise _error(step, event, phase, found, step.node.stated(declaration))

        return call

    return wrap


def undeclared(changed: Sequence[Path], declaration: Declaration, reach: Reach | None = None) -> list[Path]:
    """Return the places that changed and that no declared `Write` reaches."""
    reach = reach or Reach()
    written = [path for path, kind in declaration if isinstance(kind, Write)]
    return [place for place in changed if not any(reach.explains(path, place) for path in written)]


def declarable(path: Path) -> Path:
    """Return what to declare for a path that changed: whole models, entries of the rest."""
    depth = {"model": 1, "lossfn": 1, "batch": 2, "resource": 2}.get(path[0], 3)
    return path[:depth]


def _error(
    step: Step, event: Event, phase: Phase, found: Sequence[Path], declaration: Declaration
) -> UndeclaredWriteError:
    paths = tuple(dotted(path) for path in found)
    wanted = union([declaration, tuple((path, Write()) for path in sorted(_to_declare(found, declaration)))])
    shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
    advice = "Work on a copy (tensor.clone()), or declare"
    if ("resource", "rng") in found:
        advice = "It drew random numbers: declare"
    return UndeclaredWriteError(
        step.label,
        paths,
        f"{step.label} at ({type(event).__name__}, {phase!r}) changed {shown} and does not declare to write it. "
        f"It declares {render(declaration)}. {advice}:\n\n    {render(wanted)}\n",
    )


def _to_declare(found: Sequence[Path], declaration: Declaration) -> set[Path]:
    """Return the paths to declare for changes; parameters that are read as ``params`` are written as that too."""
    aliases = [path for path, _ in declaration if path != canonical(path)]
    return {
        next((alias for alias in aliases if meet(canonical(alias), path)), declarable(path))
        for path in found
    }
