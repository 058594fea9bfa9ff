"""Strict mode: check after every handler that it has changed only state that it declares to write.

A view can refuse an assignment, but not an in-place operation on a tensor that was read, nor a write through another
object. `Learner(strict=True)` finds these, and random numbers drawn without ``resource.rng``: it takes a fingerprint of
every piece of state before and after each handler, and compares them by path. The dry run that suggests declarations
(`flowtrain.diagnostics.suggest_access`) does the same.

The fingerprint of a tensor is its identity, its version counter
(https://docs.pytorch.org/docs/stable/notes/autograd.html, "In-place correctness checks") and a checksum of its content,
because writes through ``.data`` or a shared numpy array do not change the counter. Each fingerprint costs a pass over
all of the state, so strict mode is for tests and for the first run of a new callback.
"""

from __future__ import annotations

import random
import sys
import zlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch

from flowtrain.callback.access import Declaration, Path, Write, canonical, dotted, overlap, render, union
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import LearnerView
from flowtrain.data.batch_size import shape_of
from flowtrain.data.nested import attributes, parts
from flowtrain.data.tensor_bytes import tensor_bytes
from flowtrain.errors import UndeclaredWriteError
from flowtrain.graph.plan import Call, PlannedHandler
from flowtrain.graph.reach import Reach
from flowtrain.state.accelerator import random_states
from flowtrain.state.container import Container
from flowtrain.state.learner_state import LearnerState, by_name

__all__ = [
    "changes",
    "declarable",
    "fingerprint",
    "fingerprints",
    "rng_state",
    "undeclared",
    "watch",
]

_RNG: Path = ("resource", "rng")


def watch(state: LearnerState) -> Callable[[PlannedHandler], Call]:
    """Return a function that wraps the call of a handler, so that the call raises for undeclared writes.

    Args:
        state: The state to watch.
    """

    def wrap(planned: PlannedHandler) -> Call:
        """Return the call of a handler between two fingerprints."""
        declaration, reach = planned.node.access[planned.handler], Reach(state)

        def call(event: Event, phase: Phase, view: LearnerView) -> None:
            """Call the handler, and raise if it has changed state without declaring a write."""
            before = fingerprints(state)
            planned.call(event, phase, view)
            found = undeclared(changes(before, fingerprints(state)), declaration, reach)
            if found:
                raise _error(planned, event, phase, found, planned.node.stated(declaration))

        return call

    return wrap


def undeclared(changed: Sequence[Path], declaration: Declaration, reach: Reach | None = None) -> list[Path]:
    """Return the changed paths that no declared `Write` reaches."""
    reach = reach or Reach()
    written = [path for path, kind in declaration if isinstance(kind, Write)]
    return [place for place in changed if not any(reach.explains(path, place) for path in written)]


def declarable(path: Path) -> Path:
    """Return the path to declare for a changed path: a whole model or loss function, or one entry of other state."""
    depth = {"model": 1, "lossfn": 1, "batch": 2, "resource": 2}.get(path[0], 3)
    return path[:depth]


def _error(
    planned: PlannedHandler, event: Event, phase: Phase, found: Sequence[Path], declaration: Declaration
) -> UndeclaredWriteError:
    paths = tuple(dotted(path) for path in found)
    shown = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
    return UndeclaredWriteError(
        planned.label,
        paths,
        f"{planned.label} at ({type(event).__name__}, {phase!r}) changed {shown} and does not declare to write it. "
        f"It declares {render(declaration)}. {_advice(planned, found, declaration)}",
    )


def _advice(planned: PlannedHandler, found: Sequence[Path], declaration: Declaration) -> str:
    """Return the remedy of the message, which depends on what the callback can declare."""
    kind, deferrable = type(planned.callback), planned.callback.deferrable
    others, said = [path for path in found if path != _RNG], ""
    lead = f"Work on a copy (tensor.clone()), or {'set deferrable = False and ' if deferrable else ''}declare"
    if _RNG in found and deferrable:
        said = "It says stochastic = False and drew random numbers: remove that, and it draws from its own generators."
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
    """Return the paths to declare for changes. Parameters that are read as ``params`` are declared under that path."""
    aliases = [path for path, _ in declaration if path != canonical(path)]
    return {next((alias for alias in aliases if overlap(canonical(alias), path)), declarable(path)) for path in found}


_DEPTH = 3
"""How deep the attributes of objects of unknown types are followed: these may lead to anything."""


def fingerprints(state: LearnerState) -> dict[Path, object]:
    """Return a fingerprint for each path of the state that holds something, in canonical paths."""
    found: dict[Path, object] = {("resource", "rng"): rng_state()}
    for name, model in by_name(state.model).items():
        found.update(_module(("model", name) if name else ("model",), model))
    if isinstance(state.lossfn, torch.nn.Module):
        found.update(_module(("lossfn",), state.lossfn))
    # Optimizers are compared by hyperparameters and state: their parameters are those of the models, already seen.
    for name, optimizer in by_name(state.optimizer).items():
        root: Path = ("optimizer", name) if name else ("optimizer",)
        if optimizer is not None:
            found[*root, "hyperparams"] = tuple(
                (key, fingerprint(value))
                for group in optimizer.param_groups
                for key, value in group.items()
                if key != "params"
            )
            found[*root, "state"] = tuple(fingerprint(entry) for entry in optimizer.state.values())
    # The gradients lie in the parameters themselves, so they exist also where no batch is open.
    found["batch", "grads"] = tuple((name, fingerprint(param.grad)) for name, param in state.params.items())
    for name, value in vars(state.batch).items():
        if name != "grads":
            found["batch", name] = fingerprint(value)
    for name in state.cbstate:
        found.update(_entry(("cbstate", name), state.cbstate.__dict__[name]))
    return found


def changes(before: Mapping[Path, object], after: Mapping[Path, object]) -> list[Path]:
    """Return the paths whose fingerprints differ, sorted."""
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def fingerprint(value: Any) -> object:
    """Return an object that equals a later fingerprint of the value if neither the value nor its parts have changed."""
    return _fingerprint(value, {})


def _fingerprint(value: Any, seen: dict[int, tuple[int, Any]]) -> object:
    """Return the fingerprint of a value.

    Args:
        value: The value.
        seen: The objects that were met before, by id: a number that stands for each, and the object, to keep its id.
    """
    found: list[object] = []
    waiting: list[tuple[Any, int]] = [(value, _DEPTH)]
    while waiting:
        value, depth = waiting.pop()
        leaf = _leaf(value)
        # A number stands for an object that was met before, so that a circle ends and sharing is compared too.
        if leaf is not None or id(value) in seen:
            found.append(seen[id(value)][0] if leaf is None else leaf)
            continue
        seen[id(value)] = (len(seen), value)
        if isinstance(value, Container):
            found.append((id(value), *value.__leaves__(lambda item: _fingerprint(item, seen))))
            continue
        inner = parts(value)
        # An object of an unknown type is followed by its attributes, a few levels deep.
        if inner is None and depth:
            inner, depth = list(attributes(value).items()), depth - 1
        found.append((id(value), _content(value), *(repr(where) for where, _ in inner or ())))
        waiting += [(item, depth) for _, item in inner or ()]
    return tuple(found)


def _leaf(value: Any) -> object:
    """Return the fingerprint of a value that is looked at as a whole; ``None`` for others."""
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)):
        return (type(value), repr(value))  # repr, since NaN does not equal itself
    return tuple(_module((), value).items()) if isinstance(value, torch.nn.Module) else None


def _content(value: Any) -> object:
    """Return a checksum of the bytes that an object holds beside its parts."""
    if hasattr(value, "__array_interface__") and hasattr(value, "tobytes"):
        return (getattr(value, "shape", None), zlib.crc32(value.tobytes()))
    return zlib.crc32(value) if isinstance(value, (bytearray, array)) else None


def rng_state() -> object:
    """Return a fingerprint of the random number generators: torch's, Python's, and numpy's where it is imported."""
    states: list[object] = [zlib.crc32(tensor_bytes(torch.get_rng_state())), hash(random.getstate())]
    states += [zlib.crc32(tensor_bytes(each)) for each in random_states()]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        states.append((kind, zlib.crc32(keys.tobytes()), *rest))
    return tuple(states)


def _tensor(value: torch.Tensor) -> object:
    version = -1 if value.is_inference() else value._version  # an inference tensor has no version counter
    content: object = None
    if value.layout is torch.strided and not value.is_nested and value.device.type != "meta" and not value.is_quantized:
        content = zlib.crc32(tensor_bytes(value))
    return (id(value), version, shape_of(value), str(value.dtype), content)


def _module(root: Path, module: torch.nn.Module) -> dict[Path, object]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    found: dict[Path, object] = {(*root, *name.split(".")): _tensor(value) for name, value in named}
    for name, param in module.named_parameters(remove_duplicate=False):
        path = (*root, *name.split("."))
        found[path] = (found[path], param.requires_grad)  # freezing it is a write too
    for name, inner in module.named_modules():
        plain = [(key, value) for key, value in vars(inner).items() if isinstance(value, (bool, int, float, str))]
        for key, value in plain:  # such as `training`, which eval() and train() set
            found[(*root, *filter(None, name.split(".")), key)] = repr(value)
    return found


def _entry(path: Path, value: Any) -> dict[Path, object]:
    """Return the fingerprints of one entry of ``cbstate``: those of what a container holds by path, none if empty."""
    if not isinstance(value, Container):
        return {path: fingerprint(value)}
    found: dict[Path, tuple[object, ...]] = {}
    for below, leaf in value.__leaves__(fingerprint):
        full = (*path, *below)
        found[full] = (*found.get(full, ()), leaf)
    return dict(found)
