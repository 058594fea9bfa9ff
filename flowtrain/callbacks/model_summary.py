"""ModelSummary: a table of the layers of a model, with the shapes of their outputs and their parameters.

`summarize` makes the table without a learner::

    print(summarize(model, inputs))
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import FitBegin
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.callbacks.terminal import generator_kept, say
from flowtrain.data.nested import Attribute, items
from flowtrain.diagnostics.scratch_learner import CannotLook, first_batch, on_device_of, same_rng, shared_copy
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, switch, whole_number
from flowtrain.state.shards import is_sharded

__all__ = [
    "Layer",
    "ModelSummary",
    "Summary",
    "summarize",
]


class ModelSummary(Callback):
    """Print a table of the model's layers when the first fit begins: the shapes of their outputs and their parameters.

    `flowtrain.callbacks.summarize` makes the table, and works without a learner. To find the shapes, a copy of the
    model that shares its parameters runs once, on `inputs` or on the first training batch. Shapes are left out if
    taking that batch would change the data of training (an iterator, an ``IterableDataset``), if a learner has several
    models, and if the model is sharded.

    Reads ``model`` and ``data``, so it runs after callbacks that write these at `FitBegin`. Writes no state. Its
    resources are ``resource.terminal`` and ``resource.rng``: samplers may draw random numbers, and the generators are
    restored afterwards. Costs one forward pass, once.

    Args:
        inputs: The inputs to call the model with; those of the first training batch by default.
        depth: The depth of the table: 1 for the modules of the model, 2 for the modules in these too.

    Raises:
        UsageError: `depth` is no whole number or negative.

    >>> from flowtrain.testing import tiny_learner
    >>> history = tiny_learner(ModelSummary()).fit(1)
     Layer     Type        Output shape   Parameters   Trainable
    ─────────────────────────────────────────────────────────────
     (model)   TinyModel   (8, 1)                  1           1
    <BLANKLINE>
    Parameters: 1, of them frozen: 0. With buffers: 0.00 MiB.
    """

    audited = False
    ranks = "every"  # a sharded model is read by all ranks; the main rank prints

    def __init__(self, inputs: Any = None, depth: int = 2) -> None:
        self.inputs = inputs
        self.depth = whole_number("ModelSummary(): depth", depth, least=0)
        self._shown = False

    def state_access(self) -> Access:
        """Declare reads of the model and the data, the terminal, and the generators of random numbers."""
        terminal: Access = {"resource.terminal": Write()}
        return {"data": Read(), "model": Read(), "resource.rng": Write(), **terminal}

    @on(FitBegin)
    def show(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Print the table, or a table for each of several models, once in the life of the callback."""
        if self._shown or learner.rank:
            return
        self._shown = True
        model, data = learner.model, learner.data
        if isinstance(model, torch.nn.Module):
            call, inputs = self._inputs(data)
            say(str(_summarize(model, inputs, self.depth, call)))
            return
        for name in model:
            say(f"{name}\n{summarize(model[name], depth=self.depth)}")

    def _inputs(self, data: Any) -> tuple[Callable[..., Any], Any]:
        """Return the way in which the training phase calls the model, and the inputs, ``None`` without any."""
        for phase, loader in data.items():
            # A phase with a step of its own may call the model with anything, so its data say nothing of the inputs.
            if not isinstance(phase, AbstractTrainingPhase) or phase.provides is None:
                continue
            if self.inputs is not None:
                return phase.call_model, self.inputs
            with same_rng():
                try:
                    return phase.call_model, next((phase.split(raw)[0] for raw in first_batch(loader)), None)
                except Exception:  # training itself will raise the error of the data
                    break
        return _call, self.inputs


def _call(model: torch.nn.Module, inputs: Any) -> Any:
    """Call a model with one argument, as the bundled phases do."""
    return model(inputs)


def _call_unpacked(model: torch.nn.Module, inputs: Any) -> Any:
    """Call a model with several arguments, as a phase with ``unpack = True`` does."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)


if TYPE_CHECKING:
    from rich.console import Group


@dataclass(frozen=True)
class Layer:
    """One module of a model.

    Attributes:
        name: The name in ``model.named_modules()``; empty for the model itself.
        kind: The name of the module's type.
        parameters: The number of elements of all parameters in the module, each parameter counted once.
        trainable: The number of these elements that require gradients.
        shape: The shape of the output of its first call, as text; empty if the module was not called.
    """

    name: str
    kind: str
    parameters: int
    trainable: int
    shape: str = ""


@dataclass(frozen=True)
class Summary:
    """The layers of a model. `str` and rich's console print it as a table.

    Attributes:
        layers: The model itself, and then its modules in the order of ``model.named_modules()``.
        size: The size of all parameters and buffers, in bytes.
        note: A sentence about shapes that are missing, or an empty string.
    """

    layers: tuple[Layer, ...]
    size: int
    note: str = ""

    @property
    def parameters(self) -> int:
        """The number of elements of all parameters."""
        return self.layers[0].parameters

    @property
    def trainable(self) -> int:
        """The number of elements of the parameters that require gradients."""
        return self.layers[0].trainable

    def __rich__(self) -> Group:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text  # a plain str would be read as markup

        shapes = any(layer.shape for layer in self.layers)
        table = Table(box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column("Layer")
        table.add_column("Type")
        if shapes:
            table.add_column("Output shape")
        table.add_column("Parameters", justify="right")
        table.add_column("Trainable", justify="right")
        for layer in self.layers:
            name = "  " * layer.name.count(".") + layer.name if layer.name else "(model)"
            cells = [name, layer.kind, *([layer.shape] if shapes else [])]
            table.add_row(*map(Text, cells), f"{layer.parameters:,}", f"{layer.trainable:,}")
        return Group(table, Text(self._totals()))

    def _totals(self) -> str:
        frozen = self.parameters - self.trainable
        size = f"{self.size / 2**20:,.2f} MiB"
        text = f"Parameters: {self.parameters:,}, of them frozen: {frozen:,}. With buffers: {size}."
        return f"\n{text}\n{self.note}" if self.note else f"\n{text}"

    def __str__(self) -> str:
        with generator_kept():
            from rich.console import Console

            output = io.StringIO()
            # Nothing of the terminal or the environment takes part, so a summary is the same text everywhere.
            Console(file=output, width=120, color_system=None, force_terminal=False, _environ={}).print(self)
        return "\n".join(line.rstrip() for line in output.getvalue().splitlines()).strip("\n")


def summarize(model: torch.nn.Module, inputs: Any = None, depth: int = 2, *, unpack: bool = False) -> Summary:
    """Return the layers of a model. Neither the model nor the generators of random numbers change.

    With inputs, a copy of the model that shares its parameters runs once, in eval mode and without gradients.

    Args:
        model: A module.
        inputs: The inputs to call the model with, for the shapes of outputs; they are moved to the device of the model.
        depth: The depth of the table: 1 for the modules of the model, 2 for the modules in these too.
        unpack: Whether the model has several inputs, so that the items of a tuple, a list or a mapping are its
            arguments, as in a phase with ``unpack = True``.

    Raises:
        UsageError: `model` is no module, `depth` is no whole number or negative, or `unpack` is not ``True`` or
            ``False``.

    >>> print(summarize(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU()), torch.zeros(8, 3)))
     Layer     Type         Output shape   Parameters   Trainable
    ──────────────────────────────────────────────────────────────
     (model)   Sequential   (8, 2)                  8           8
     0         Linear       (8, 2)                  8           8
     1         ReLU         (8, 2)                  0           0
    <BLANKLINE>
    Parameters: 8, of them frozen: 0. With buffers: 0.00 MiB.
    """
    if not is_a(model, torch.nn.Module):
        raise UsageError(f"summarize({model!r}) takes a module. Write summarize(learner.model).")
    call = _call_unpacked if switch("summarize", "unpack", unpack) else _call
    return _summarize(model, inputs, whole_number("summarize(): depth", depth, least=0), call)


def _summarize(model: torch.nn.Module, inputs: Any, depth: int, call: Callable[..., Any]) -> Summary:
    """Return the layers of a model that a function of the model and the inputs calls."""
    shapes: dict[str, str] = {}
    note = ""
    if inputs is not None:
        model, shapes, note = _run(model, inputs, call)
    layers = [
        _layer(name, module, shapes.get(name, ""))
        for name, module in model.named_modules()
        if not name or name.count(".") < depth
    ]
    held = [tensor for tensor in (*model.parameters(), *model.buffers()) if not is_lazy(tensor)]
    return Summary(tuple(layers), sum(tensor.numel() * tensor.element_size() for tensor in held), note)


def _run(model: torch.nn.Module, inputs: Any, call: Callable[..., Any]) -> tuple[torch.nn.Module, dict[str, str], str]:
    """Run a copy of a model; return the copy, the shapes of outputs by the name of the module, and a note on errors."""
    shapes: dict[str, str] = {}
    if any(is_sharded(param) for param in model.parameters()):
        return model, shapes, "Without shapes: the parameters are sharded, and a forward pass needs all ranks."
    try:
        copied = shared_copy(model).eval()
    except CannotLook as reason:
        return model, shapes, f"Without shapes: {reason}"

    def note_shape(name: str) -> Any:
        """Return a forward hook for the module of this name."""

        def hook(module: torch.nn.Module, args: Any, outputs: Any) -> None:
            """Keep the shape of the first output."""
            shapes.setdefault(name, _shape(outputs))  # a module may be called several times

        return hook

    for name, module in copied.named_modules():
        module.register_forward_hook(note_shape(name))
    with same_rng(), torch.no_grad():
        try:
            call(copied, on_device_of(inputs, [copied]))
        except Exception as error:  # a model may take further arguments; its layers are still worth a table
            return copied, shapes, f"Some shapes are missing: the model raised {type(error).__name__}: {error}"
    return copied, shapes, ""


def _layer(name: str, module: torch.nn.Module, shape: str) -> Layer:
    made = [param for param in module.parameters() if not is_lazy(param)]
    trainable = sum(param.numel() for param in made if param.requires_grad)
    return Layer(name, type(module).__name__, sum(param.numel() for param in made), trainable, shape)


def _shape(value: Any, above: tuple[int, ...] = ()) -> str:
    if isinstance(value, torch.Tensor):
        return str(tuple(value.shape))
    inner = items(value)
    if inner is None or id(value) in above:
        return type(value).__name__
    named = isinstance(value, Mapping) or isinstance(inner[0][0] if inner else None, Attribute)
    shapes = [(where, _shape(item, (*above, id(value)))) for where, item in inner]
    return ", ".join(f"{where}: {shape}" if named else shape for where, shape in shapes)
