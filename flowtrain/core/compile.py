"""Compilation: the model, or the model with its loss, through `torch.compile`.

A step calls `Compiled.model` and `Compiled.lossfn` instead of the model and the loss function. Beside `torch.compile`:

- ``learner.model`` stays the module that was passed, and names never begin with ``_orig_mod.`` (`original`).
- ``compile="loss"`` compiles model and loss as one graph, so that the outputs need not be written and read again
  between them. The loss is then made with the outputs; where a handler of `LossBegin` changed the outputs or the
  targets, it is made again from those, without compilation.
- With CUDA graphs (``mode="reduce-overhead"``, ``"max-autotune"``) torch gives every result in the same memory, batch
  after batch. What a batch keeps is a copy.

When torch compiles something once more, ``TORCH_LOGS=recompiles`` has it say what and why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from flowtrain.core.devices import rebuild
from flowtrain.errors import CoreError, is_a

__all__ = ["Compiled", "check_compile", "original"]

_GRAPH_MODES = ("reduce-overhead", "max-autotune")


def check_compile(wanted: Any, accumulate: int) -> None:
    """Check the argument of `TorchCore`.

    Raises:
        CoreError: It is no way to compile, or does not go with accumulation.
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
    """Tell whether a way to compile records CUDA graphs."""
    if not isinstance(wanted, Mapping):
        return False
    options = wanted.get("options") or {}
    return wanted.get("mode") in _GRAPH_MODES or bool(options.get("triton.cudagraphs"))


def original(model: Any) -> Any:
    """Return the module inside of a compiled one, whose names do not begin with ``_orig_mod.``; or the module."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, torch.nn.Module) else model


class Compiled:
    """A model and a loss function, compiled, as a step calls them.

    Args:
        models: The one model, under the empty name.
        lossfn: The loss function.
        wanted: ``True``, ``"loss"``, or arguments for `torch.compile`; ``"loss": True`` among them as ``"loss"``.
        targets: Returns the targets of the current batch.

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
        self._made: list[tuple[Any, ...]] = []
        self.lossfn: Any = lossfn
        self._run: Any = torch.compile(_with_loss(model, lossfn) if joint else model, **options)
        self.model: Any = self._run
        if joint:
            self.model, self.lossfn = self._both, self._loss
        elif self._graphs:
            self.model = self._copied

    def _begin(self) -> None:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # the results of the batch before may be overwritten

    def _keep(self, results: Any) -> Any:
        return rebuild(results, torch.Tensor.clone, lambda item: item) if self._graphs else results

    def _copied(self, inputs: Any) -> Any:
        """Run the model, and copy the outputs."""
        self._begin()
        return self._keep(self._run(inputs))

    def _both(self, inputs: Any) -> Any:
        """Run the model and the loss, and keep the loss for the call that asks for it."""
        self._begin()
        targets = self._targets()
        outputs, loss = self._keep(self._run(inputs, targets))
        self._made = [(outputs, targets, _versions(outputs), _versions(targets), loss)]
        return outputs

    def _loss(self, outputs: Any, targets: Any) -> Any:
        """Return the loss that was made with the outputs, unless something was changed since."""
        if self._made:
            made_of, aims, versions, of_aims, loss = self._made.pop()
            same = made_of is outputs and aims is targets
            if same and versions == _versions(outputs) and of_aims == _versions(targets):
                return loss
        return self._lossfn(outputs, targets)


def _with_loss(model: Any, lossfn: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    def model_and_loss(inputs: Any, targets: Any) -> tuple[Any, Any]:
        """Compute the outputs and the loss, as one graph."""
        outputs = model(inputs)
        return outputs, lossfn(outputs, targets)

    return model_and_loss


def _versions(data: Any) -> list[int]:
    """Return how often each tensor in the data was written in place."""
    found: list[int] = []
    rebuild(data, lambda tensor: found.append(tensor._version), lambda item: item)
    return found
