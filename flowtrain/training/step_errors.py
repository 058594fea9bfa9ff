"""Errors of a step that say what the user can change: the graph, the inputs, the loss function, the memory.

A step that fails shows an error of torch, which knows neither the phase nor the data of the batch. The functions here
add them, or raise another error that names them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flowtrain.callback.phases import Phase, has_bundled_step
from flowtrain.core.torch_core import TorchCore
from flowtrain.errors import LossError
from flowtrain.errors.describing import describe
from flowtrain.state.batch import BatchState

__all__ = ["check_graph", "loss_error", "note_inputs", "see_memory_error"]

_NO_MEMORY = "the device ran out of memory"


def see_memory_error(failure: BaseException, phase: Phase, core: TorchCore, batch: BatchState | None) -> None:
    """Make the learner usable after an error of memory, and add a note to it, once.

    The note says which part of the step it came from, and what helps. Any other failure is left alone.

    Args:
        failure: The failure.
        phase: The phase that was running.
        core: The core of the learner.
        batch: The open batch; ``None`` if no batch is open.
    """
    notes = getattr(failure, "__notes__", ())
    if not isinstance(failure, torch.OutOfMemoryError) or any(note.startswith(_NO_MEMORY) for note in notes):
        return
    core.groups.drop_unused_states()
    entries = {} if batch is None else vars(batch)
    if any(note.startswith("raised in ") for note in notes):  # the note of rule 15, which names the handler
        part = "a handler of a callback"
    elif batch is None:
        part = "the loader, or on a batch's way to the device"
    else:
        part = _part_of_step(phase, entries)
    failure.add_note(_memory_note(part, entries, core.accumulate))


def _part_of_step(phase: Phase, batch: Mapping[str, object]) -> str:
    """Return the part of a step that has failed, by the entries that a bundled step has written before."""
    if not has_bundled_step(type(phase)):
        return f"the step of {phase!r}"
    order = {"outputs": "the forward pass", "loss": "the loss", "grads": "the backward pass"}
    return next((part for name, part in order.items() if batch.get(name) is None), "the update")


def note_inputs(error: Exception, phase: Phase, inputs: object, *, whole: bool) -> None:
    """Note on an error of the model how it was called: with the inputs as the `whole` argument, or by the phase."""
    error.add_note(f"raised by the model in {phase!r}, called with batch.inputs: {describe(inputs)}")
    if whole and isinstance(error, TypeError) and isinstance(inputs, (tuple, list, Mapping)):
        error.add_note(f"To pass its items as arguments, set unpack = True in a subclass of {phase!r}.")


def _memory_note(part: str, batch: Mapping[str, object], accumulate: int) -> str:
    """Return a note for an error of memory: the part of the step that it came from, and what helps."""
    size = f", with inputs of {describe(batch['inputs'])}" if "inputs" in batch else ""
    return (
        f"{_NO_MEMORY} in {part}{size}. These need less: smaller batches with "
        f"TorchCore(accumulate={2 * accumulate}), which trains on as many samples in an update; precision='bf16'; "
        f"callbacks that keep nothing of a batch (flowtrain.testing.leaks finds the others). The learner can be used "
        f"again; the error holds the memory of this batch, so leave its `except` block first."
    )


def loss_error(phase: object, core: TorchCore, batch: BatchState, what: str) -> LossError:
    """Return the error for a loss function that fails on a batch, or returns something else than one number."""
    return LossError(
        f"The loss function {core.loss_name} {what}\n"
        f"In {phase!r} it was called with batch.outputs: {describe(batch.outputs)} and batch.targets: "
        f"{describe(batch.targets)}. The model and the loss must fit: change the model's last layer, the targets that "
        f"the dataset returns, or wrap the loss in a function of (outputs, targets) that returns a tensor with one "
        f"element."
    )


def check_graph(phase: object, what: str, loss: torch.Tensor, error: RuntimeError) -> None:
    """Explain the error of a backward pass if its cause is a loss without an autograd graph.

    Raises:
        LossError: The loss has no graph.
    """
    if not loss.requires_grad:
        raise LossError(
            f"{phase!r} cannot run a backward pass: {what} is {describe(loss)}, without a graph, so no parameter can "
            f"get a gradient from it. Something between the parameters and the loss cuts the graph: look for "
            f"detach(), item(), torch.tensor(...), torch.no_grad() and torch.inference_mode() in the model, the loss "
            f"function and around the call, and for frozen parameters (requires_grad_(False))."
        ) from error
