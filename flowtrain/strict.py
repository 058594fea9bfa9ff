"""Strict mode: prove for every handler that it changed only what it declares to write.

`Learner(strict=True)` compares fingerprints of the whole state around each handler. It finds what no view can refuse:
in-place operations on tensors, writes through an object that was read, and random numbers drawn without
``resource.rng``. It is slow, and meant for tests and for a first run of a new callback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature

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

_RNG: Path = ("resource", "rng")


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
    shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
    return UndeclaredWriteError(
        step.label,
        paths,
        f"{step.label} at ({type(event).__name__}, {phase!r}) changed {shown} and does not declare to write it. "
        f"It declares {render(declaration)}. {_advice(step, found, declaration)}",
    )


def _advice(step: Step, found: Sequence[Path], declaration: Declaration) -> str:
    """Say what to write instead: what can be declared depends on the callback."""
    kind, deferrable = type(step.callback), step.callback.deferrable
    others, said = [path for path in found if path != _RNG], ""
    lead = f"Work on a copy (tensor.clone()), or {'set deferrable = False and ' if deferrable else ''}declare"
    if _RNG in found and deferrable:
        said = "It says stochastic = False and drew random numbers: leave that out, and it has numbers of its own."
    elif _RNG in found and kind.__module__.startswith("flowtrain.") and "access" not in signature(kind).parameters:
        said = (
            "A function that it was given drew random numbers of training: let it draw from a generator of its own, "
            "such as torch.Generator() or random.Random(0)."
        )
    elif _RNG in found:
        others, lead = list(found), "It drew random numbers: declare"
    if not others:
        return said
    wanted = union([declaration, tuple((path, Write()) for path in sorted(_to_declare(others, declaration)))])
    return f"{said} {lead}:\n\n    {render(wanted)}\n".lstrip()


def _to_declare(found: Sequence[Path], declaration: Declaration) -> set[Path]:
    """Return the paths to declare for changes; parameters that are read as ``params`` are written as that too."""
    aliases = [path for path, _ in declaration if path != canonical(path)]
    return {
        next((alias for alias in aliases if meet(canonical(alias), path)), declarable(path))
        for path in found
    }
