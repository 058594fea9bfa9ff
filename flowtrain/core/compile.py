"""Compilation: the model, or the model with the loss function, runs through `torch.compile`.

A step calls `Compiled.model` and `Compiled.lossfn` instead of the model and the loss function. They differ from plain
`torch.compile` in three points:

- ``learner.model`` stays the module that the user passed, and no name begins with ``_orig_mod.`` (`original`).
- ``compile="loss"`` compiles model and loss function as one graph, so that the outputs are not written to memory and
  read again between them. The loss is computed together with the outputs. If a handler of `LossBegin` changes the
  outputs or the targets, the loss is computed again from the changed ones, without compilation.
- With CUDA graphs (``mode="reduce-overhead"``, ``"max-autotune"``) torch returns every result in the same memory, batch
  after batch. So the batch gets a copy of each result.

With ``TORCH_LOGS=recompiles`` torch prints what it compiles again, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from flowtrain.data.nested import INSIDE, leaves, mapped
from flowtrain.errors import CoreError
from flowtrain.errors.arguments import is_a

__all__ = ["Compiled", "check_compile", "has_graphs", "original"]

_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""The modes of `torch.compile` that record CUDA graphs."""


def check_compile(wanted: Any, accumulate: int) -> None:
    """Check the argument ``compile`` of `TorchCore`.

    Args:
        wanted: The argument.
        accumulate: The number of batches in an accumulation group.

    Raises:
        CoreError: The argument has the wrong type, or asks for CUDA graphs together with accumulation.
    """
    if not is_a(wanted, (bool, Mapping)) and wanted != "loss":
        raise CoreError(
            f'compile is True, False, "loss" or a mapping of arguments for torch.compile; got {wanted!r}. To compile '
            f'model and loss as one with arguments write compile={{"loss": True, "mode": ...}}.'
        )
    if accumulate > 1 and has_graphs(wanted):
        raise CoreError(
            f"compile={wanted!r} records CUDA graphs, which give the gradients of every batch in the same memory, and "
            f"accumulate={accumulate} adds them up. Use compile=True, or a mode without CUDA graphs such as "
            f"'max-autotune-no-cudagraphs'."
        )


def has_graphs(wanted: Any) -> bool:
    """Tell whether an argument ``compile`` asks for CUDA graphs."""
    if not isinstance(wanted, Mapping):
        return False
    options = wanted.get("options") or {}
    return wanted.get("mode") in _GRAPH_MODES or bool(options.get("triton.cudagraphs"))


def original(model: Any) -> Any:
    """Return the module inside a compiled one, whose parameters have the user's names; any other model as it is."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, torch.nn.Module) else model


class Compiled:
    """A compiled model and its loss function, as a step calls them.

    Args:
        models: The models by name; there must be one, under the empty name.
        lossfn: The loss function.
        wanted: ``True``, ``"loss"``, or a mapping of arguments for `torch.compile`, in which ``"loss": True`` means the
            same as ``"loss"``.
        targets: A function that returns the targets of the current batch.

    Attributes:
        model: A function of the model's arguments that returns the outputs.
        lossfn: A function of the outputs and the targets that returns the loss.

    Raises:
        CoreError: There are several models.
    """

    def __init__(self, models: Mapping[str, Any], lossfn: Any, wanted: Any, targets: Callable[[], Any]) -> None:
        if "" not in models:
            raise CoreError(
                f"compile={wanted!r} compiles the model that a phase of the library runs, and there are several: "
                f"{', '.join(models)}. Pass them compiled: torch.compile(model)."
            )
        model = models[""]
        options = dict(wanted) if isinstance(wanted, Mapping) else {}
        joint = bool(options.pop("loss", wanted == "loss"))
        self._graphs = has_graphs(wanted)
        self._lossfn = lossfn
        self._targets = targets
        # At most one entry: the outputs, the targets, the versions of both, and the loss computed from them. A list, as
        # it is emptied when the loss is taken, so that nothing here holds the graph of a past batch.
        self._computed: list[tuple[Any, ...]] = []
        self.lossfn: Any = lossfn
        self._run: Any = torch.compile(_with_loss(model, lossfn) if joint else model, **options)
        self.model: Any = self._run
        if joint:
            self.model, self.lossfn = self._both, self._loss
        elif self._graphs:
            self.model = self._copied

    def _begin(self) -> None:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # torch may overwrite the results of the batch before

    def _keep(self, results: Any) -> Any:
        return mapped(results, _clone) if self._graphs else results

    def _copied(self, *inputs: Any, **named: Any) -> Any:
        """Run the model, and return a copy of the outputs."""
        self._begin()
        return self._keep(self._run(*inputs, **named))

    def _both(self, *inputs: Any, **named: Any) -> Any:
        """Run model and loss function, return the outputs, and keep the loss for the call of `_loss` that follows."""
        self._begin()
        targets = self._targets()
        outputs, loss = self._keep(self._run(targets, inputs, named))
        self._computed = [(outputs, targets, _versions(outputs), _versions(targets), loss)]
        return outputs

    def _loss(self, outputs: Any, targets: Any) -> Any:
        """Return the loss that was computed with the outputs; compute it again if outputs or targets have changed."""
        if self._computed:
            its_outputs, its_targets, output_versions, target_versions, loss = self._computed.pop()
            same = its_outputs is outputs and its_targets is targets
            if same and output_versions == _versions(outputs) and target_versions == _versions(targets):
                return loss
        return self._lossfn(outputs, targets)


def _with_loss(model: Any, lossfn: Any) -> Callable[..., tuple[Any, Any]]:
    """Return a function that computes outputs and loss, for `torch.compile` to compile as one graph."""

    def model_and_loss(targets: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Any, Any]:
        """Compute the outputs and the loss."""
        outputs = model(*inputs, **named)
        return outputs, lossfn(outputs, targets)

    return model_and_loss


def _versions(data: Any) -> list[int]:
    """Return how often each tensor in the data was written in place, as torch counts it."""
    tensors = (leaf for _, leaf in leaves(data) if isinstance(leaf, torch.Tensor))
    return [-1 if leaf.is_inference() else leaf._version for leaf in tensors]  # an inference tensor has no counter


def _clone(item: Any, part: Callable[[Any], Any]) -> Any:
    return item.clone() if isinstance(item, torch.Tensor) else INSIDE
