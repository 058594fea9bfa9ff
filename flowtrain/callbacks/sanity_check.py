"""SanityCheck: find all problems of data, model, loss and optimizer before the first batch.

Each ``check_`` function yields the problems that it finds, and raises none of them, so that one run finds all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import FitBegin
from flowtrain.callback.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.data.nested import leaves
from flowtrain.diagnostics.scratch_learner import CannotLook, first_batch, on_device_of, same_rng, shared_copy
from flowtrain.errors import DataError, SanityCheckError
from flowtrain.errors.describing import describe

__all__ = [
    "Problem",
    "SanityCheck",
    "check_batch",
    "check_loss",
    "check_optimizers",
    "check_outputs",
    "check_targets",
]


class SanityCheck(Callback):
    """Check data, model, loss and optimizer when a fit begins, and raise one error with all problems.

    For each phase that runs a bundled step, the callback checks the first batch of the loader:

    - data: there is a batch, it is a pair, its numbers are finite, and there are as many targets as inputs;
    - model: it runs, and its outputs are finite;
    - targets: they have the dtype and range that torch's `cross_entropy`, `nll_loss` and binary cross entropies need;
    - loss: it is a single finite number, in training it has a graph whose backward pass runs, and it does not broadcast
      outputs and targets of different shapes, such as ``(16, 1)`` and ``(16,)``, to a common shape;

    and if a phase trains, the optimizer: it holds every trainable parameter, and its learning rates are positive.

    The batch runs through a copy of the model that shares its parameters, without autocast. A batch is taken only from
    loaders that this does not change: lists, tuples, and a ``DataLoader`` of a dataset with indices, in this process
    and with copies of its samplers. The generators of random numbers are restored. So a run with this callback is bit
    for bit the run without it, unless the dataset itself counts how often it was indexed.

    Reads ``data``, ``model``, ``lossfn`` and ``optimizer`` at `FitBegin`, so it runs after callbacks that write these
    there. Writes no state; its resource is ``resource.rng``. Costs a batch, a forward pass and copies of the buffers
    for each phase, once for each fit.

    Attributes:
        skipped: The checks that were left out in the last fit, each with the reason.

    Raises:
        SanityCheckError: At `FitBegin`: there are problems. Training has not begun.

    >>> from flowtrain.testing import tiny_learner
    >>> history = tiny_learner(SanityCheck()).fit(1)
    """

    audited = False
    ranks = "every"  # each rank has data of its own, and a sharded model runs on all ranks together

    def __init__(self) -> None:
        self.skipped: list[str] = []

    def state_access(self) -> Access:
        """Declare reads of data, model, loss function and optimizer, and the generators of random numbers."""
        return {"data": Read(), "lossfn": Read(), "model": Read(), "optimizer": Read(), "resource.rng": Write()}

    @on(FitBegin)
    def check(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Run all checks, then raise if there are problems."""
        self.skipped = []
        model, lossfn, data = learner.model, learner.lossfn, learner.data
        found: list[Problem] = []
        # The trial runs draw random numbers, which must not change those of training.
        with same_rng():
            for each, loader in data.items():
                found += self._phase(each, loader, model, lossfn)
        if any(isinstance(each, AbstractTrainingPhase) for each in data):
            optimizer = learner.optimizer
            optimizers = {"": optimizer} if hasattr(optimizer, "param_groups") else dict(optimizer.items())
            found += check_optimizers(optimizers, _trainable(model, lossfn))
        if found:
            raise SanityCheckError(tuple((each.where, each.what, each.remedy) for each in found), self._report(found))

    def _phase(self, phase: Any, loader: Any, model: Any, lossfn: Any) -> Iterator[Problem]:
        """Check the first batch of a phase, and run its step with it."""
        where = f"data of {phase!r}"
        try:
            batches = first_batch(loader)
        except CannotLook as reason:
            self.skipped.append(f"{where}: {reason}")
            return
        except Exception as error:
            yield Problem(where, f"it raised {type(error).__name__}: {error}", "Look at the dataset, and collate_fn.")
            return
        if not batches:
            yield Problem(where, "it gives no batch.", "Is the dataset empty, or smaller than a batch with drop_last?")
            return
        # A phase that overrides `step` has no `provides`, so nothing is known of how it calls model and loss.
        ours = isinstance(phase, (AbstractTrainingPhase, AbstractValidationPhase)) and phase.provides is not None
        if not ours or not isinstance(model, torch.nn.Module):
            self.skipped.append(f"model and loss in {phase!r}: it has a step of its own")
            return
        try:
            inputs, targets = phase.split(batches[0])
        except (DataError, TypeError, ValueError) as error:
            yield Problem(where, str(error), f"Give pairs, or override {phase!r}.split(raw).")
            return
        wrong = list(check_batch(where, inputs, targets))
        yield from wrong
        yield from self._step(phase, inputs, targets, model, lossfn, whole=not wrong)

    def _step(
        self, phase: Any, inputs: Any, targets: Any, model: Any, lossfn: Any, *, whole: bool
    ) -> Iterator[Problem]:
        """Run model and loss on a batch. If the batch is not `whole`, outputs and loss are not checked."""
        training = isinstance(phase, AbstractTrainingPhase)
        try:
            trial, loss_trial = shared_copy(model), shared_copy(lossfn)
        except CannotLook as reason:
            self.skipped.append(f"model and loss in {phase!r}: {reason}")
            return
        inputs, targets = on_device_of((inputs, targets), [model])
        # The trial runs in the mode of the phase, because dropout and batch normalisation compute differently in it.
        with phase.mode([each for each in (trial, loss_trial) if isinstance(each, torch.nn.Module)]):
            try:
                outputs = phase.call_model(trial, inputs)
            except Exception as error:
                what = f"it raised {type(error).__name__}: {error}\n   It was called with inputs: {describe(inputs)}."
                yield Problem(f"model in {phase!r}", what, "Fit the model and the dataset to each other.")
                return
            wrong = [
                *(check_outputs(f"model in {phase!r}", outputs) if whole else ()),
                *check_targets(f"targets of {phase!r}", lossfn, outputs, targets),
            ]
            if whole and not wrong:
                wrong = list(_check_classes(f"targets of {phase!r}", lossfn, outputs, targets))
            yield from wrong
            if wrong or not whole:
                return  # the loss would show the same problem, and on a GPU a target out of range ends the process
            where = f"loss in {phase!r}"
            broadcasts = _Broadcasts(outputs, targets)
            try:
                with broadcasts:
                    loss = loss_trial(outputs, targets)
            except Exception as error:
                what = f"it raised {type(error).__name__}: {error}\n   outputs: {describe(outputs)}, "
                raised = Problem(where, f"{what}targets: {describe(targets)}.", _remedy_for(error))
                # Shapes that do not broadcast explain the exception better than its own text does.
                yield from [*broadcasts.problems(where)] or [raised]
                return
            yield from broadcasts.problems(where)
            yield from check_loss(where, loss, training=training)
            yield from _check_backward(where, loss, outputs)

    def _report(self, found: list[Problem]) -> str:
        count = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
        lines = [f"{self.name or type(self).__name__} found {count} before the first batch:", ""]
        for number, problem in enumerate(found, start=1):
            lines += [f"{number}. {problem.where}: {problem.what}", f"   {problem.remedy}"]
        lines += ["", "Nothing was trained."]
        lines += [f"Not looked at: {each}." for each in self.skipped]
        return "\n".join(lines)


def _trainable(model: Any, lossfn: Any) -> dict[str, torch.Tensor]:
    models = {"": model} if isinstance(model, torch.nn.Module) else dict(model.items())
    if isinstance(lossfn, torch.nn.Module):
        models["lossfn"] = lossfn
    return {
        name: param
        for prefix, module in models.items()
        for name, param in module.named_parameters(prefix)
        if param.requires_grad
    }


class Problem(NamedTuple):
    """A reason why training would fail, or would train badly.

    Attributes:
        where: The place: ``"data of TrainingPhase"``, ``"optimizer"``, ...
        what: A description of the problem, with values.
        remedy: The change that solves the problem.
    """

    where: str
    what: str
    remedy: str


def check_batch(where: str, inputs: Any, targets: Any) -> Iterator[Problem]:
    """Check that all numbers of a batch are finite, and that there is a target for every input."""
    for name, value in (("inputs", inputs), ("targets", targets)):
        for path, tensor in _tensors(name, value):
            if not tensor.numel():
                yield Problem(where, f"{path} is {describe(tensor)}: it holds nothing.", "Look at the dataset.")
            elif bad := _not_finite(tensor):
                yield Problem(
                    where,
                    f"{path} has {bad} of {tensor.numel()} values that are NaN or infinite.",
                    "Leave such samples out, or fill them in, in the dataset; look for a division by a spread of zero.",
                )
    both = isinstance(inputs, torch.Tensor) and isinstance(targets, torch.Tensor)
    if both and inputs.dim() and targets.dim() and len(inputs) != len(targets):
        yield Problem(
            where,
            f"there are {len(inputs)} inputs and {len(targets)} targets: {describe(inputs)}, {describe(targets)}.",
            "Let the dataset, or collate_fn, give one target for each input, along the first dimension.",
        )


def check_outputs(where: str, outputs: Any) -> Iterator[Problem]:
    """Check that the outputs of a model are finite."""
    for path, tensor in _tensors("outputs", outputs):
        if bad := _not_finite(tensor):
            yield Problem(
                where,
                f"{path} has {bad} of {tensor.numel()} values that are NaN or infinite, before any update.",
                "Look for a logarithm or square root of what may be zero or less, and at how weights are initialised.",
            )


def check_targets(where: str, lossfn: Any, outputs: Any, targets: Any) -> Iterator[Problem]:
    """Check that targets are in the range that a loss function of torch needs; no other loss is checked.

    Sources: https://docs.pytorch.org/docs/stable/generated/torch.nn.CrossEntropyLoss.html and the pages of the others.
    """
    name, settings = _torch_loss(lossfn)
    if not (isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor) and targets.numel()):
        return
    if name in ("cross_entropy", "nll_loss") and not targets.is_floating_point() and outputs.dim():
        # The classes are the second dimension, or the only one if there is no batch.
        classes = outputs.shape[1 if outputs.dim() > 1 else 0]
        counted = targets[targets != settings.get("ignore_index", -100)]
        if counted.numel() and not (counted.min() >= 0 and counted.max() < classes):
            yield Problem(
                where,
                f"targets go from {counted.min().item()} to {counted.max().item()}; {name} over outputs with {classes} "
                f"classes takes 0 to {classes - 1}.",
                "Number the classes from 0, or give the model's last layer as many outputs as there are classes.",
            )
    elif name in ("binary_cross_entropy", "binary_cross_entropy_with_logits"):
        yield from _within_unit(where, name, "targets", targets, "Encode the classes as 0.0 and 1.0.")
        if name == "binary_cross_entropy":
            advice = "End the model with a sigmoid, or use binary_cross_entropy_with_logits, which includes one."
            yield from _within_unit(where, name, "outputs", outputs, advice)


def _check_classes(where: str, lossfn: Any, outputs: Any, targets: Any) -> Iterator[Problem]:
    """Check that targets have the dtype and shape of class numbers or probabilities, if a loss of torch needs it."""
    name, _ = _torch_loss(lossfn)
    tensors = isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)
    if name not in ("cross_entropy", "nll_loss") or not tensors or not outputs.dim():
        return
    alike, integers = targets.shape == outputs.shape, targets.dtype in (torch.int64, torch.uint8)
    if alike and name == "cross_entropy" and targets.is_floating_point():
        return  # probabilities
    if alike or not integers:
        advice = "Convert them in the dataset: targets.long()."
        if alike and outputs.dim() > 1:
            advice = "Give class numbers, targets.argmax(1), or to cross_entropy probabilities, targets.float()."
        yield Problem(where, f"{name} takes class numbers of type int64, got {describe(targets)}.", advice)
    elif outputs.dim() == 2 and targets.dim() > 1:
        what = f"{name} takes one class number for each row of outputs, got {describe(targets)}."
        yield Problem(where, what, "Take the last dimension away in the dataset: targets.squeeze(1).")


class _Broadcasts(TorchFunctionMode):
    """A context that notices whether a loss broadcasts outputs and targets to a shape that neither of them has.

    A loss of outputs of shape ``(16, 1)`` and targets of shape ``(16,)`` compares every output with every target. It is
    noticed in functions of torch and in arithmetic, also within a user's loss function.

    Args:
        outputs: The outputs of the model: a tensor, or containers of tensors.
        targets: The targets: a tensor, or containers of tensors.

    Attributes:
        found: The first broadcast, as ``(function, shape of outputs, shape of targets, shape of both)``.
    """

    def __init__(self, outputs: Any, targets: Any) -> None:
        super().__init__()
        self.found: tuple[str, torch.Size, torch.Size, torch.Size] | None = None
        self._outputs = {tensor.shape for _, tensor in _tensors("", outputs)}
        self._targets = {tensor.shape for _, tensor in _tensors("", targets)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compare the shapes of the first two tensors among the arguments, and call the function."""
        kwargs = kwargs or {}
        two = [each.shape for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)][:2]
        both = _broadcast(*two) if len(two) == 2 and self.found is None else None
        if both is None:
            return func(*args, **kwargs)
        straight = two[0] in self._outputs and two[1] in self._targets
        crossed = two[0] in self._targets and two[1] in self._outputs
        larger = both.numel() > max(shape.numel() for shape in two)
        # Torch's losses take the outputs first, so the order is turned only if just that fits both shapes.
        outputs, targets = two[::-1] if crossed and not straight else two
        found = getattr(func, "__name__", "the loss").strip("_"), outputs, targets, both
        # A loss that compares element by element must never broadcast, whatever the shapes are. Any other function may
        # (it weighs, or adds a bias), so it is noticed only with the shapes of the outputs and the targets.
        if func in _ELEMENTWISE and (straight or crossed or larger):
            self.found = found
        result = func(*args, **kwargs)
        if (straight or crossed) and larger and getattr(result, "shape", None) == both:
            self.found = found
        return result

    def problems(self, where: str) -> Iterator[Problem]:
        """Yield the first broadcast as a problem, if there was one."""
        if self.found is not None:
            name, outputs, targets, both = self.found
            yield Problem(
                where,
                f"{name} gets outputs of shape {tuple(outputs)} and targets of shape {tuple(targets)}, and stretches "
                f"them to {tuple(both)}: it compares values that do not belong together.",
                "Give both one shape: targets.unsqueeze(1) in the dataset, or .squeeze(1) at the end of the model.",
            )


def _broadcast(one: torch.Size, other: torch.Size) -> torch.Size | None:
    """Return the common shape of two different shapes; ``None`` for equal shapes, and for such that torch refuses."""
    try:
        both: torch.Size = torch.broadcast_shapes(one, other)
    except RuntimeError:
        return None
    return both if one != other else None


def _check_backward(where: str, loss: Any, outputs: Any) -> Iterator[Problem]:
    """Check that a backward pass from the loss to the outputs runs: some losses refuse a dtype only there."""
    parts = [tensor for _, tensor in _tensors("outputs", outputs) if tensor.requires_grad]
    if parts and isinstance(loss, torch.Tensor) and loss.requires_grad and loss.numel() == 1:
        try:
            torch.autograd.grad(loss.sum(), parts, allow_unused=True)
        except RuntimeError as error:
            yield Problem(where, f"its backward pass raised RuntimeError: {error}", _remedy_for(error))


def _remedy_for(error: Exception) -> str:
    """Return the remedy for an error that a loss function has raised."""
    if any(word in str(error) for word in ("dtype", "Long", "scalar type", "floating point type")):
        return "Let the dataset give class numbers as integers, .long(), and other targets like the outputs: .float()."
    return "Fit the loss and the model's last layer."


def check_loss(where: str, loss: Any, *, training: bool) -> Iterator[Problem]:
    """Check that a loss is a finite tensor with one element and, in training, has a graph."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        yield Problem(where, f"it returned {describe(loss)}, which is no single number.", "Return loss.mean().")
        return
    if not math.isfinite(loss.item()):
        yield Problem(where, f"it is {loss.item()} before any update.", "Look at the outputs and targets it gets.")
    if training and not loss.requires_grad:
        yield Problem(
            where,
            "it has no graph, so no parameter can get a gradient from it.",
            "Look for detach(), item(), torch.no_grad() and frozen parameters between the parameters and the loss.",
        )


def check_optimizers(optimizers: Mapping[str, Any], trainable: Mapping[str, torch.Tensor]) -> Iterator[Problem]:
    """Check that the optimizers hold every trainable parameter, and that learning rates are positive.

    Args:
        optimizers: The optimizers by name; a single one has the empty name.
        trainable: All parameters that require gradients, by name.
    """
    held = {id(param) for each in optimizers.values() for group in each.param_groups for param in group["params"]}
    missing = [name for name, param in trainable.items() if id(param) not in held]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        yield Problem(
            "optimizer",
            f"it does not hold {shown}, which require gradients: they would never change.",
            "Make it from all parameters, or freeze these: requires_grad_(False).",
        )
    for name, optimizer in optimizers.items():
        where = f"optimizer {name!r}" if name else "optimizer"
        for number, group in enumerate(optimizer.param_groups):
            rate = 1.0 if group.get("lr") is None else float(group["lr"])  # an optimizer may choose it itself
            scheduled = "initial_lr" in group  # a scheduler of torch sets the rate, which may begin at zero
            if not math.isfinite(rate) or rate < 0 or (rate == 0 and not scheduled):
                yield Problem(
                    where,
                    f"the learning rate of group {number} is {rate}.",
                    "Give it a positive one, such as lr=1e-3; to train a part of the model, freeze the others.",
                )


def _within_unit(where: str, name: str, what: str, value: torch.Tensor, remedy: str) -> Iterator[Problem]:
    least, most = value.min().item(), value.max().item()
    if least < 0 or most > 1:
        yield Problem(where, f"{what} go from {least:.4g} to {most:.4g}; {name} takes 0 to 1.", remedy)


def _torch_loss(lossfn: Any) -> tuple[str, dict[str, Any]]:
    """Return the name of the function of torch.nn.functional that a loss is, and its arguments; else an empty name."""
    settings: dict[str, Any] = {}
    while isinstance(lossfn, partial):
        settings = {**lossfn.keywords, **settings}
        lossfn = lossfn.func
    for function, kind in _LOSSES.items():
        if lossfn is function or type(lossfn) is kind:
            if isinstance(lossfn, torch.nn.Module) and hasattr(lossfn, "ignore_index"):
                settings = {"ignore_index": lossfn.ignore_index}
            return function.__name__, settings
    return "", settings


_LOSSES: Mapping[Callable[..., Any], type[torch.nn.Module]] = {
    functional.cross_entropy: torch.nn.CrossEntropyLoss,
    functional.nll_loss: torch.nn.NLLLoss,
    functional.binary_cross_entropy: torch.nn.BCELoss,
    functional.binary_cross_entropy_with_logits: torch.nn.BCEWithLogitsLoss,
}
"""The losses whose targets are checked, as functions and as modules."""

_ELEMENTWISE = frozenset({
    functional.binary_cross_entropy, functional.binary_cross_entropy_with_logits, functional.gaussian_nll_loss,
    functional.hinge_embedding_loss, functional.huber_loss, functional.kl_div, functional.l1_loss, functional.mse_loss,
    functional.multilabel_soft_margin_loss, functional.poisson_nll_loss, functional.smooth_l1_loss,
    functional.soft_margin_loss,
})  # fmt: skip
"""Losses of torch that compare each output with its own target, and so need both in one shape."""


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((path, leaf) for path, leaf in leaves(value, name) if isinstance(leaf, torch.Tensor))


def _not_finite(tensor: torch.Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    return int((~torch.isfinite(tensor)).sum())
