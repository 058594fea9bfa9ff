"""What the bundled steps are made of: the first half of a batch, from its data to its loss.

`flowtrain.callback.phases` has the steps themselves. They are written for speed, since they run for every batch: an
event is fired by calling its runner, where there is one (`StepRunners`), and the core's functions are torch's own where
nothing comes between (`flowtrain.core.core`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from flowtrain.callback.events import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Event,
    LossBegin,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.errors import DataError, LossError, describe
from flowtrain.state.batch import BatchState

__all__ = [
    "CLOSED",
    "CLOSING",
    "OPEN",
    "StepRunners",
    "check_graph",
    "forward",
    "lengths",
    "measure",
    "no_pair",
    "settle",
]

CLOSED, OPEN, CLOSING = 0, 1, 2
"""Where a scope (fit, epoch, batch) is: closing means that its End or Cancelled event is being fired."""

_BATCH_BEGIN, _LOSS_BEGIN = BatchBegin(), LossBegin()


class StepRunners:
    """What to call for each event of a step in one phase; ``None`` where no callback has a handler.

    A runner takes ``(event, phase)``. The executor makes it from the plan of that event and phase.

    Attributes:
        watched: Whether any callback has a handler that comes after the backward pass.
        pairs: Whether the phase takes data as the pair that it is.
    """

    __slots__ = (
        "backward_begin",
        "backward_end",
        "batch_begin",
        "batch_end",
        "loss_begin",
        "pairs",
        "update_begin",
        "update_end",
        "watched",
    )
    events: ClassVar[Mapping[str, type[Event]]] = {
        "batch_begin": BatchBegin,
        "loss_begin": LossBegin,
        "backward_begin": BackwardBegin,
        "backward_end": BackwardEnd,
        "update_begin": UpdateBegin,
        "update_end": UpdateEnd,
        "batch_end": BatchEnd,
    }

    batch_begin: Any
    loss_begin: Any
    backward_begin: Any
    backward_end: Any
    update_begin: Any
    update_end: Any
    batch_end: Any
    watched: bool
    pairs: bool


def settle(batch: BatchState) -> None:
    """Detach the loss of a batch that nobody has watched, where the step has left that out."""
    loss = vars(batch).get("loss")
    if isinstance(loss, torch.Tensor) and loss.requires_grad:
        batch.loss = loss.detach()


def forward(phase: Any, loop: Any, on: StepRunners, raw: Any, training: bool) -> BatchState:
    """Open the batch and run it up to its loss: the data, on the device, the model, and the loss function.

    `BatchBegin` comes before the model, `LossBegin` between it and the loss function. In training the gradients of
    the group before are zeroed after `BatchBegin`. Inputs and outputs are read from the batch again only where handlers
    may have replaced them. The loss is not returned: an error keeps the frames that it went through, with all in them.
    """
    core, scopes, state = loop.core, loop.scopes, loop.state
    if core.places:
        raw = core.place(raw)
        scopes.hand_over()
    if on.pairs and (type(raw) is tuple or type(raw) is list) and len(raw) == 2:  # what most loaders give
        inputs, targets = raw
    else:
        inputs, targets = _split(phase, raw)
    batch = BatchState()
    batch.inputs = inputs
    batch.targets = targets
    if type(inputs) is torch.Tensor is type(targets):
        state.batch = state.batch_twin = batch
    else:
        state.show(batch)
    scopes.backward = False
    scopes.batch = OPEN
    if on.batch_begin is not None:
        on.batch_begin(_BATCH_BEGIN, phase)
        inputs = batch.inputs
    if training:
        core.begin()
    try:
        outputs = batch.outputs = core.model(inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        error.add_note(f"raised by the model in {phase!r}, called with batch.inputs: {describe(batch.inputs)}")
        raise
    if type(outputs) is not torch.Tensor:
        core.show(batch)
    if on.loss_begin is not None:
        on.loss_begin(_LOSS_BEGIN, phase)
        outputs = batch.outputs
    try:
        loss = batch.loss = core.lossfn(outputs, batch.targets)
        scalar = loss.numel() == 1
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        if isinstance(error, AttributeError) and error.name == "numel" and "loss" in vars(batch):
            raise _loss_error(phase, core, batch, f"returned {describe(batch.loss)}, which is no tensor") from None
        raise _loss_error(phase, core, batch, f"raised {type(error).__name__}: {error}") from error
    if not scalar:
        raise _loss_error(phase, core, batch, f"returned {describe(loss)}, which is no single number")
    return batch


def no_pair(phase: object, raw: object) -> DataError:
    """Return what to raise for data that is no pair, where `split` is not overridden."""
    return DataError(
        f"{phase!r} needs (inputs, targets) from its loader and got {describe(raw)}. "
        f"Let the dataset return pairs, or override {phase!r}.split(raw) to return (inputs, targets)."
    )


def _split(phase: Any, raw: object) -> Any:
    pair = phase.split(raw)
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise DataError(f"{phase!r}.split(raw) must return (inputs, targets), got {describe(pair)}.")
    return pair


def _loss_error(phase: object, core: Any, batch: BatchState, what: str) -> LossError:
    return LossError(
        f"The loss function {core.loss_name} {what}\n"
        f"In {phase!r} it was called with batch.outputs: {describe(batch.outputs)} and batch.targets: "
        f"{describe(batch.targets)}. The model and the loss must fit: change the model's last layer, the targets that "
        f"the dataset returns, or wrap the loss in a function of (outputs, targets) that returns a tensor with one "
        f"element."
    )


def check_graph(phase: object, what: str, loss: torch.Tensor, error: RuntimeError) -> None:
    """Say more of an error that a backward pass raised for a loss that it cannot begin at.

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


def measure(inputs: Any, targets: Any) -> tuple[int, bool]:
    """Return how many samples a batch has, and whether that is certain.

    The number is the length that something in the inputs and something in the targets agree on: the first dimension of
    arrays, or the number of items in a list. Where only one of the two has arrays, its own must agree. A batch without
    any array or list, such as one text or a number, is one sample.

    >>> measure({"scale": torch.zeros(3), "x": torch.zeros(8, 2)}, torch.zeros(8))
    (8, True)
    >>> measure(torch.zeros(50, 8, 2), torch.zeros(8))  # time comes first
    (8, False)
    """
    ours, theirs = _sizes(inputs), _sizes(targets)
    if ours and theirs:
        common = [size for size in theirs if size in ours]
        return (common or theirs)[0], bool(common)
    found = ours or theirs
    if not found:
        return 1, _is_single(inputs) and _is_single(targets)
    return found[0], len(_sizes(inputs, lists=False) or _sizes(targets, lists=False)) <= 1


def _sizes(value: Any, lists: bool = True) -> list[int]:
    """Return the numbers that may be the size of a batch, the likeliest first: those that all parts have in common.

    Args:
        value: Inputs or targets.
        lists: Whether the length of a list counts where it holds arrays. Either may be the batch: a list of samples, or
            a list of tensors that each have all samples.
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, (tuple, torch.Size)):
        return [int(shape[0])] if shape else []
    if not (isinstance(value, Mapping) or _is_list(value)) or not value:
        return []
    parts = [_sizes(item, lists) for item in (value.values() if isinstance(value, Mapping) else value)]
    parts = [part for part in parts if part]
    common = [size for size in parts[0] if all(size in part for part in parts)] if parts else []
    found = common or list(dict.fromkeys(size for part in parts for size in part))
    if isinstance(value, Mapping) or hasattr(value, "_fields") or (found and not lists):
        return found
    return [*common, len(value)] if common else [len(value), *found]  # parts that differ are samples, not inputs


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_single(value: Any) -> bool:
    """Tell whether a value without a length may be one sample, and not a batch of an unknown kind."""
    if isinstance(value, Mapping) or _is_list(value):
        return all(_is_single(item) for item in (value.values() if isinstance(value, Mapping) else value))
    return value is None or isinstance(value, (str, bytes, int, float, complex)) or getattr(value, "shape", None) == ()


def lengths(value: Any, path: str) -> Iterator[tuple[str, int]]:
    """Yield each array or list in a piece of data, by its path, with its length.

    >>> list(lengths({"x": torch.zeros(8, 2)}, "batch.inputs"))
    [("batch.inputs['x']", 8)]
    """
    shape = getattr(value, "shape", None)
    if isinstance(shape, (tuple, torch.Size)):
        if shape:
            yield path, int(shape[0])
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from lengths(item, f"{path}[{key!r}]")
    elif _is_list(value):
        yield path, len(value)
        for number, item in enumerate(value):
            yield from lengths(item, f"{path}[{number}]")
