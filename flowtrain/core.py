"""The torch core: the one place that knows devices, precision, gradients and optimizers.

`TorchCore` places data, runs the forward pass under autocast, scales and divides the loss for the backward pass, clips,
and steps the optimizers when a group is due (`flowtrain.groups`). A step with nothing of that (fp32, no accumulation,
no clipping, one optimizer) is *plain*: a step then calls torch's own functions, and the core costs nothing.

Order of an update: gradients are accumulated and unscaled, handlers of `UpdateBegin` run, then clipping, the
optimizer's step, and handlers of `UpdateEnd`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

import torch

from flowtrain.batch import BatchState
from flowtrain.devices import find_device, place
from flowtrain.errors import CoreError, is_a, is_positive
from flowtrain.groups import Groups
from flowtrain.hyperparams import OptimizerParts
from flowtrain.optimizers import make_optimizers, params_of, scale_gradients
from flowtrain.parameters import Gradients, Parameters
from flowtrain.state import LearnerState, Named

__all__ = ["Precision", "TorchCore"]

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchCore:
    """How a learner computes: device, precision, accumulation, clipping, compilation.

    Args:
        device: ``"auto"`` (where the model is, if that is not the CPU, otherwise the first accelerator, otherwise the
            CPU), or a device.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"`` run forward and loss under autocast, and ``"fp16"`` scales the
            loss (https://docs.pytorch.org/docs/stable/amp.html). The parameters stay in their own type.
        accumulate: Batches in an accumulation group, which makes one update. The loss is divided by it for the
            backward pass; the last group of an epoch may be shorter, and its gradients are divided by its own length.
        clip_grad_norm: Scale the gradients of an update to at most this total 2-norm.
        compile: Run the model through `torch.compile`; a mapping gives its keyword arguments.
        clip_grad_value: Clamp each element of the gradients to plus or minus this value, after `clip_grad_norm`.
        init_scale: The first scale of the loss with ``"fp16"``.

    Raises:
        CoreError: A value that means nothing, or a device that is not there.
    """

    def __init__(
        self,
        device: str | torch.device = "auto",
        precision: Precision = "fp32",
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        compile: bool | Mapping[str, Any] = False,  # noqa: A002  # torch's own word for it
        *,
        clip_grad_value: float | None = None,
        init_scale: float = 65536.0,
    ) -> None:
        if precision not in _DTYPES:
            raise CoreError(f"precision={precision!r} is unknown. It is one of: {', '.join(map(repr, _DTYPES))}.")
        if not is_a(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
            raise CoreError(f"accumulate is a number of batches, at least 1; got {accumulate!r}.")
        for name, limit in (("clip_grad_norm", clip_grad_norm), ("clip_grad_value", clip_grad_value)):
            if limit is not None and not is_positive(limit):
                raise CoreError(f"{name} must be a positive number, or None for no clipping; got {limit!r}.")
        if not is_positive(init_scale):
            raise CoreError(f"init_scale must be a positive number, such as 65536.0; got {init_scale!r}.")
        if not is_a(compile, (bool, Mapping)):
            raise CoreError(f"compile is True, False or a mapping of arguments for torch.compile; got {compile!r}.")
        self._wanted_device = device
        self.precision: Precision = precision
        self.accumulate = accumulate
        self.clip_grad_norm = clip_grad_norm
        self.clip_grad_value = clip_grad_value
        self._compile, self._init_scale = compile, init_scale
        self._state: LearnerState | None = None
        self._needs_norm = False

    # --- made once, by the learner

    def release(self) -> None:
        """Belong to no learner: the one that was being built was refused."""
        self._state = None

    def attach(self, state: LearnerState, optimizer: Any) -> None:
        """Move models and loss to the device and make the optimizers. Called once, by the learner.

        Args:
            state: Its ``model`` and ``lossfn`` are there; ``optimizer``, ``optimizers`` and ``params`` are set here.
            optimizer: An optimizer, a callable that makes one from parameters, or a mapping of either by name.

        Raises:
            CoreError: The core belongs to another learner, or the optimizer does not fit the models.
        """
        if self._state is not None:
            raise CoreError("This TorchCore belongs to another learner. Give each learner a core of its own.")
        self.models = dict(state.model) if isinstance(state.model, Named) else {"": state.model}
        if self._compile is not False and "" not in self.models:
            raise CoreError(
                f"compile={self._compile!r} compiles the model that a phase of the library runs, and there are "
                f"several: {', '.join(self.models)}. Pass them compiled: torch.compile(model)."
            )
        self.loss_name = getattr(state.lossfn, "__name__", type(state.lossfn).__name__)
        self._loss_modules = [state.lossfn] if isinstance(state.lossfn, torch.nn.Module) else []
        self.device = find_device(self._wanted_device, self.models.values())
        for module in (*self.models.values(), *self._loss_modules):
            module.to(self.device)
        model = self.models.get("")
        if self._compile is not False:
            model = torch.compile(model, **(self._compile if isinstance(self._compile, Mapping) else {}))
        self._model: Any = model
        self._optimizers = make_optimizers(optimizer, self.models, self._loss_modules)
        self._state = state  # from here on nothing can fail
        state.params = self.params = Parameters(self.models)
        self.grads = Gradients(self.params)
        one = self._optimizers.get("")
        parts = {name: OptimizerParts(made, f"optimizer.{name}") for name, made in self._optimizers.items() if name}
        state.optimizer = one if one is not None else Named("optimizer", self._optimizers)
        state.optimizers = OptimizerParts(one) if one is not None else Named("optimizer", parts)
        self.optimizer = state.optimizer
        self._autocast_dtype = _DTYPES[self.precision]
        self._scaler = self._make_scaler() if self.precision == "fp16" else None
        self.groups = Groups(self._optimizers, self.accumulate)
        self.places = self.device.type != "cpu"
        self._choose()

    def _make_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, init_scale=self._init_scale)

    def _choose(self) -> None:
        """Take torch's own functions where nothing comes between them and the step."""
        self.plain = (
            "" in self._optimizers
            and self.accumulate == 1
            and self._autocast_dtype is None
            and self.clip_grad_norm is None
            and self.clip_grad_value is None
            and not self._needs_norm
        )
        lossfn = self._state.lossfn if self._state is not None else None
        self.model: Any = self._model if self._autocast_dtype is None else self._forward
        self.lossfn: Any = lossfn if self._autocast_dtype is None else self._loss
        self.begin: Callable[[], Any] = self.groups.begin
        self.backward: Callable[[torch.Tensor], Any] = self._backward
        if self.plain:
            self.begin = self.optimizer.zero_grad
            self.backward = torch.Tensor.backward

    def need_grad_norm(self, needed: bool) -> None:
        """Say whether some callback declares ``batch.grad_norm``, so that it is computed without clipping too."""
        if needed != self._needs_norm:
            self._needs_norm = needed
            self._choose()

    # --- each batch

    def place(self, data: Any) -> Any:
        """Return the data on the device: tensors in tuples, lists, dicts and objects with ``.to(device)``."""
        return place(data, self.device)

    def show(self, batch: BatchState) -> None:
        """Let handlers that read this batch see read-only twins of the containers in it."""
        if self._state is not None and self._state.batch is batch:
            self._state.show(batch)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the forward pass."""
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast_dtype)

    def _forward(self, inputs: Any) -> Any:
        with torch.autocast(self.device.type, self._autocast_dtype):
            return self._model(inputs)

    def _loss(self, outputs: Any, targets: Any) -> torch.Tensor:
        with torch.autocast(self.device.type, self._autocast_dtype):
            loss: torch.Tensor = self._state.lossfn(outputs, targets)  # type: ignore[union-attr]  # attached
            return loss

    def end_groups(self) -> None:
        """Throw away the gradients of a group that a cancelled batch left open; a group lies within one epoch."""
        if torch.is_grad_enabled() and self.groups.open:
            self.discard()

    def _backward(self, loss: torch.Tensor) -> None:
        if self.accumulate > 1:
            loss = loss / self.accumulate
        (loss if self._scaler is None else self._scaler.scale(loss)).backward()

    def backward_for(self, loss: torch.Tensor, name: str) -> None:
        """Run the backward pass for the parameters of one optimizer; those of the others keep their gradients.

        Raises:
            CoreError: There is no optimizer of that name, or the loss does not depend on its parameters.
        """
        self._check_name("backward", name)
        params = [param for param in params_of(self._optimizers[name]) if param.requires_grad]
        if self.accumulate > 1:
            loss = loss / self.accumulate
        try:
            (loss if self._scaler is None else self._scaler.scale(loss)).backward(inputs=params)
        except RuntimeError as error:
            error.add_note(f"raised by backward(name={name!r}), for the parameters of optimizer {name!r} alone")
            raise

    def _check_name(self, what: str, name: str) -> None:
        if name not in self._optimizers:
            known = ", ".join(repr(known) for known in self._optimizers if known) or "one without a name"
            raise CoreError(f"{what}(name={name!r}): there is no such optimizer; the learner has {known}.")

    def due(self, name: str | None) -> list[str]:
        """Count a batch for one optimizer, or for all, and return those whose group is complete.

        Raises:
            CoreError: There is no optimizer of that name.
        """
        if name is not None:
            self._check_name("update", name)
        return self.groups.due(name)

    def unscale(self, names: Iterable[str]) -> None:
        """Bring the gradients to what one batch of the whole group would have given."""
        for name in names:
            optimizer = self._optimizers[name]
            if self._scaler is not None:
                self._scaler.unscale_(optimizer)
            scale_gradients(optimizer, self.groups.share(name))

    def clip(self, names: Iterable[str]) -> torch.Tensor | None:
        """Clip the gradients, by norm, then by value; return their norm before that, where somebody wants it."""
        params = [param for name in names for param in params_of(self._optimizers[name]) if param.grad is not None]
        norm: torch.Tensor | None = None
        if self._needs_norm or self.clip_grad_norm is not None:
            norm = torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
        if self.clip_grad_norm is not None and norm is not None:
            torch.nn.utils.clip_grads_with_norm_(params, self.clip_grad_norm, norm)
        if self.clip_grad_value is not None:
            torch.nn.utils.clip_grad_value_(params, self.clip_grad_value)
        return norm

    def step(self, names: Iterable[str]) -> None:
        """Step the optimizers, and end their groups."""
        for name in names:
            optimizer = self._optimizers[name]
            if self._scaler is None:
                optimizer.step()
            else:
                self._scaler.step(optimizer)
        self.groups.end(names)
        if self._scaler is not None:
            waiting = self.groups.waiting
            before = self._scaler.get_scale() if waiting else 1.0
            self._scaler.update()
            for name in waiting:  # the scale in their gradients is the one from before
                scale_gradients(self._optimizers[name], self._scaler.get_scale() / before)

    def discard(self) -> None:
        """Throw away the gradients of the groups that are open; the next batch begins new ones."""
        self.groups.discard()
        if self._scaler is not None:
            # A new one with the same state: the old one may remember that gradients were unscaled for this update.
            before, self._scaler = self._scaler.state_dict(), self._make_scaler()
            self._scaler.load_state_dict(before)

    def like(self) -> TorchCore:
        """Return a core of the same settings that belongs to nobody yet; it does not compile."""
        return TorchCore(
            self._wanted_device,
            self.precision,
            self.accumulate,
            self.clip_grad_norm,
            clip_grad_value=self.clip_grad_value,
            init_scale=self._init_scale,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what of the core a checkpoint must hold: the scaler's state."""
        return {"scaler": self._scaler.state_dict() if self._scaler is not None else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if self._scaler is not None and state.get("scaler"):
            self._scaler.load_state_dict(dict(state["scaler"]))

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The models, and the loss function where it is a module."""
        return [*self.models.values(), *self._loss_modules]

    def __repr__(self) -> str:
        device = self.device if self._state is not None else self._wanted_device
        return f"TorchCore(device={str(device)!r}, precision={self.precision!r}, accumulate={self.accumulate})"
