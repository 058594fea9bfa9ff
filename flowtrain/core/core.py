"""The torch core: the one place that knows devices, precision, gradients and optimizers.

`TorchCore` places data, runs the forward pass under autocast, scales and divides the loss for the backward pass, clips,
and steps the optimizers when a group is due (`flowtrain.core.accumulation`). A step with nothing of that (fp32, no
accumulation, no clipping, one optimizer) is *plain*: a step then calls torch's own functions, and the core costs
nothing.

Order of an update: gradients are accumulated and unscaled, handlers of `UpdateBegin` run, then clipping, the
optimizer's step, and handlers of `UpdateEnd`.

On an accelerator nothing here waits for it: batches come ahead (`flowtrain.core.prefetch`), values are read late
(`flowtrain.state.device_values`), optimizers are fused and skip updates by themselves (`flowtrain.core.optimizers`,
`flowtrain.core.nan_guard`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch

from flowtrain.callback.modes import Modes
from flowtrain.core.accumulation import Groups
from flowtrain.core.compile import Compiled, original
from flowtrain.core.devices import find_device
from flowtrain.core.nan_guard import Guard, all_finite
from flowtrain.core.optimizers import clip_gradients, make_optimizers, params_of, scale_gradients, zeroing
from flowtrain.core.placement import Placement
from flowtrain.core.precision import Precision, Scaling, autocast, in_precision
from flowtrain.core.prefetch import Transfer
from flowtrain.core.settings import Settings
from flowtrain.core.structure import Structure
from flowtrain.errors import CoreError
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState, Named
from flowtrain.state.optimizer_view import OptimizerParts
from flowtrain.state.parameters import Gradients, Parameters, named_parameters

__all__ = ["Precision", "TorchCore"]


class TorchCore:
    """How a learner computes: device, precision, accumulation, clipping, compilation.

    Args:
        device: ``"auto"`` (where the model is, if that is not the CPU, otherwise the first accelerator, otherwise the
            CPU), or a device.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"`` run forward and loss under autocast, and ``"fp16"`` scales the
            loss (https://docs.pytorch.org/docs/stable/amp.html). The parameters stay in their own type.
        accumulate: Batches in an accumulation group, which makes one update. The loss is divided by it for the
            backward pass; the last group of an epoch may be shorter, and its gradients are divided by its own length.
            That update is made in the last batch, or behind it if that one was cancelled (rule 16).
        clip_grad_norm: Scale the gradients of an update to at most this total 2-norm.
        compile: Run the model through `torch.compile`, or with ``"loss"`` the model and the loss as one graph; a
            mapping gives keyword arguments, and ``"loss": True`` among them means the same (`flowtrain.core.compile`).
        clip_grad_value: Clamp each element of the gradients to plus or minus this value, after `clip_grad_norm`.
        init_scale: The first scale of the loss with ``"fp16"``.
        lag: After how many batches values of the device are read, such as the loss by `StopOnNaNLoss`; 2 on an
            accelerator and 0 on the CPU, if not given.
        prefetch: Move the next batch while this one is computed (CUDA; `flowtrain.core.prefetch`); or a way of your
        own. channels_last: Keep the model, and tensors of four dimensions in the data, in the memory format that
            convolutions are fast in.
        tf32: Whether float32 products on CUDA may round their factors to TF32; ``None`` leaves torch's setting. It is
            one setting for the whole process.

    Raises:
        CoreError: A value that means nothing, or a device that is not there.
    """

    def __init__(
        self,
        device: str | torch.device = "auto",
        precision: Precision = "fp32",
        accumulate: int = 1,
        clip_grad_norm: float | None = None,
        compile: bool | Literal["loss"] | Mapping[str, Any] = False,  # noqa: A002  # torch's own word for it
        *,
        clip_grad_value: float | None = None,
        init_scale: float = 65536.0,
        lag: int | None = None,
        prefetch: bool | Transfer = True,
        channels_last: bool = False,
        tf32: bool | None = None,
    ) -> None:
        self.settings = Settings(
            device, precision, accumulate, clip_grad_norm, compile, clip_grad_value=clip_grad_value,
            init_scale=init_scale, lag=lag, prefetch=prefetch, channels_last=channels_last, tf32=tf32,
        )  # fmt: skip
        self.precision: Precision = precision
        self.accumulate = self.settings.accumulate
        self.clip_grad_norm = clip_grad_norm
        self.clip_grad_value = clip_grad_value
        self._state: LearnerState | None = None
        self._needs_norm = False
        self._guard: Guard | None = None
        self.modes: Modes | None = None  # while a phase has set them
        self._warned = False

    # --- made once, by the learner

    def release(self) -> None:
        """Belong to no learner: the one that was being built was refused."""
        self._state = None

    def close(self) -> None:
        """Hold nothing of the learner any more: its models, optimizers and data go with it, whoever holds the core."""
        self.guard_nan(False)
        kept = {**vars(self.settings), "settings": 0, "device": 0, "loss_name": 0, "_state": 0, "_scaling": 0}
        for name in set(vars(self)) - set(kept):
            delattr(self, name)
        self.models: dict[str, Any] = {}
        self._loss_modules: list[Any] = []
        self.places = False

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
        models = dict(state.model) if isinstance(state.model, Named) else {"": state.model}
        self.models = {name: original(model) for name, model in models.items()}
        self.loss_name = getattr(state.lossfn, "__name__", type(state.lossfn).__name__)
        self._loss_modules = [state.lossfn] if isinstance(state.lossfn, torch.nn.Module) else []
        self.device = find_device(self.settings.device, self.models.values())
        for module in (*self.models.values(), *self._loss_modules):
            module.to(self.device)
            if self.settings.channels_last:
                module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # documented
        self._model: Any = models.get("")
        self._lossfn: Any = state.lossfn
        if self.settings.compile is not False:
            made = Compiled(models, state.lossfn, self.settings.compile, lambda: state.batch.targets)
            self._model, self._lossfn = made.model, made.lossfn
        self._optimizers = make_optimizers(optimizer, self.models, self._loss_modules)
        self._state = state  # from here on nothing can fail
        state.params = self.params = Parameters(self.models)
        self.grads = Gradients(self.params)
        one = self._optimizers.get("")
        named = partial(named_parameters, self.params, state.lossfn)
        several = {name: each for name, each in self._optimizers.items() if name}
        parts = {name: OptimizerParts(each, f"optimizer.{name}", named) for name, each in several.items()}
        state.optimizer = one if one is not None else Named("optimizer", self._optimizers)
        state.optimizers = OptimizerParts(one, named=named) if one is not None else Named("optimizer", parts)
        self.optimizer = state.optimizer
        self._scaling = Scaling(self.device, self.settings.init_scale) if self.precision == "fp16" else None
        self.groups = Groups(self._optimizers, self.accumulate)
        self._placement = Placement(self.settings, self.device, self.groups)
        self.places, self.place, self.feed = self._placement.needed, self._placement.place, self._placement.feed
        state.lag = self._placement.lag
        self.structure = Structure(
            self.models, state.lossfn, self._optimizers, self.device, lambda: self.modes.own() if self.modes else {}
        )
        self._choose()

    def _choose(self) -> None:
        """Take torch's own functions where nothing comes between them and the step."""
        self.plain = (
            "" in self._optimizers
            and self.accumulate == 1
            and self._scaling is None
            and self.clip_grad_norm is None
            and self.clip_grad_value is None
            and not self._needs_norm
        )
        self.model: Any = in_precision(self._model, self.device, self.precision)
        self.lossfn: Any = in_precision(self._lossfn, self.device, self.precision)
        self.begin: Callable[[], Any] = self.groups.begin
        self.backward: Callable[[torch.Tensor], Any] = self._backward
        if self.plain:
            self.begin = zeroing(self.optimizer)
            if self._guard is None:
                self.backward = torch.Tensor.backward

    def guard_nan(self, wanted: bool) -> None:
        """Say whether a NaN loss must reach no parameter though it is seen late; needs optimizers that can skip."""
        if self._guard is not None:
            self._guard.release()
        late = self._state is not None and self._state.lag > 0
        # A scaler skips by itself what a NaN made of the gradients.
        self._guard = Guard(self._optimizers.values(), self.device) if wanted and late and not self._scaling else None
        self._choose()

    def need_grad_norm(self, needed: bool) -> None:
        """Say whether some callback declares ``batch.grad_norm``, so that it is computed without clipping too."""
        if needed != self._needs_norm:
            self._needs_norm = needed
            self._choose()

    # --- each batch

    def show(self, batch: BatchState) -> None:
        """Let handlers that read this batch see read-only twins of the containers in it."""
        if self._state is not None and self._state.batch is batch:
            self._state.show(batch)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the forward pass."""
        return autocast(self.device, self.precision)

    def end_groups(self) -> None:
        """Throw away the gradients of a group that is open; a group lies within one epoch."""
        self._placement.forget()
        if torch.is_grad_enabled():
            if self._guard is not None:
                self._guard.clear()
            if self.groups.open:
                self.discard()

    def unfilled(self) -> list[list[str]]:
        """Return the optimizers whose groups wait for more batches, as they are updated: alone or together."""
        return self.groups.unfilled if torch.is_grad_enabled() else []  # validation may lie between direct steps

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        if self._guard is not None:
            self._guard.see(loss)
        if self.accumulate > 1:
            loss = loss / self.accumulate
        return loss if self._scaling is None else self._scaling.scale(loss)

    def _backward(self, loss: torch.Tensor) -> None:
        self._scaled(loss).backward()

    def backward_for(self, loss: torch.Tensor, name: str) -> None:
        """Run the backward pass for the parameters of one optimizer; those of the others keep their gradients.

        Raises:
            CoreError: There is no optimizer of that name, or the loss does not depend on its parameters.
        """
        self._check_name("backward", name)
        params = [param for param in params_of(self._optimizers[name]) if param.requires_grad]
        try:
            self._scaled(loss).backward(inputs=params)
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
            if self._scaling is not None:
                self._scaling.unscale(optimizer)
            scale_gradients(optimizer, self.groups.share(name))

    def clip(self, names: Iterable[str]) -> torch.Tensor | None:
        """Clip the gradients, by norm, then by value; return their norm before that, where somebody wants it."""
        params = [param for name in names for param in params_of(self._optimizers[name])]
        wanted = self._needs_norm or self.clip_grad_norm is not None
        return clip_gradients(params, self.clip_grad_norm, self.clip_grad_value, wanted=wanted)

    def step(self, names: Iterable[str]) -> None:
        """Step the optimizers, and end their groups."""
        for name in names:
            optimizer = self._optimizers[name]
            if self._scaling is None:
                optimizer.step()
            else:
                self._scaling.step(optimizer)
        self.groups.end(names)
        if self._scaling is not None:
            self._scaling.update([self._optimizers[name] for name in self.groups.waiting])

    def discard(self) -> None:
        """Throw away the gradients of the groups that are open; the next batch begins new ones."""
        self.groups.discard()
        if self._scaling is not None:
            self._scaling.reset()

    @property
    def skipped(self) -> int:
        """How many updates were skipped, with ``"fp16"``, for gradients that were not finite. Waits for the device."""
        return 0 if self._scaling is None else self._scaling.skipped

    def finite(self) -> bool:
        """Tell whether all parameters that are trained are finite. Waits for the device, once."""
        return all_finite(self.modules)

    @contextmanager
    def own_modes(self) -> Generator[None]:
        """Give a context in which every module has its own mode, also while a phase has set others."""
        if self.modes is not None:
            self.modes.end()
        yield
        if self.modes is not None:
            self.modes.begin()

    def warn_woken(self) -> None:
        """Warn, once, of a model in eval mode that is trained in train mode."""
        if self._warned or self.modes is None or not self.modes.woken:
            return
        self._warned = True
        names = {id(model): f"model {name!r}" if name else "The model" for name, model in self.models.items()}
        which = ", ".join(names.get(id(root), "The loss function") for root in self.modes.woken)
        warnings.warn(
            f"{which} is in eval mode, and is trained in train mode, since not all parameters are frozen. Call train() "
            f"on it before fit. To keep parts in eval mode call eval() on these alone; to keep all of it there freeze "
            f"it: requires_grad_(False).",
            UserWarning,
            stacklevel=2,
        )

    def like(self, **changes: Any) -> TorchCore:
        """Return a core of the same settings, for a copy of the learner; it does not compile and warns of no modes."""
        options: dict[str, Any] = {**vars(self.settings), "compile": False, **changes}
        core = TorchCore(**options)
        core._warned = True
        return core

    def state_dict(self) -> dict[str, Any]:
        """Return what of the core a checkpoint must hold: the scaler's state."""
        return {"scaler": self._scaling.state_dict() if self._scaling is not None else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        if self._scaling is not None and state.get("scaler"):
            self._scaling.load_state_dict(state["scaler"])

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The models, and the loss function where it is a module."""
        return [*self.models.values(), *self._loss_modules]

    def __repr__(self) -> str:
        device = self.device if self._state is not None else self.settings.device
        return f"TorchCore(device={str(device)!r}, precision={self.precision!r}, accumulate={self.accumulate})"
