"""The torch core: the one place that knows devices, precision, gradients and optimizers.

`TorchCore` places data, runs the forward pass under autocast, scales and divides the loss for the backward pass, clips
gradients, and updates the parameters when an accumulation group is due (`flowtrain.core.accumulation`). A core that
needs none of this (fp32, no accumulation, no clipping, one optimizer) is *plain*: a step then calls torch's own
functions, and the core costs nothing.

The order of an update is: gradients are accumulated and unscaled, handlers of `UpdateBegin` run, gradients are clipped,
the optimizer updates the parameters, handlers of `UpdateEnd` run.

On an accelerator nothing here waits for the device: batches are moved ahead of time (`flowtrain.core.prefetch`),
values are read late (`flowtrain.state.device_values`), and optimizers are fused, so that they skip updates on the
device (`flowtrain.core.optimizers`, `flowtrain.core.precision`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch

from flowtrain.callback.modes import Modes
from flowtrain.core.accumulation import Groups
from flowtrain.core.compile import Compiled, original
from flowtrain.core.data_parallel import DataParallel
from flowtrain.core.devices import allow_tf32, find_device, move_modules
from flowtrain.core.optimizers import clip_gradients, make_optimizers, params_of, scale_gradients, zeroing
from flowtrain.core.precision import (
    NaNGuard,
    Precision,
    Scaling,
    all_finite,
    autocast,
    check_precision,
    in_precision,
)
from flowtrain.core.prefetch import BatchMover, Transfer, warn_unable
from flowtrain.core.replica import Replica, Single
from flowtrain.core.settings import CoreSettings, Shard, setting
from flowtrain.core.sharding import Sharded
from flowtrain.core.world import Parallel, World, find_world, local_rank
from flowtrain.errors import CoreError
from flowtrain.state.batch import BatchState
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain.state.parameters import Gradients, Parameters, named_parameters

__all__ = ["CoreSettings", "Precision", "TorchCore"]


class TorchCore:
    """The part of a learner that computes: device, precision, accumulation, clipping, compilation.

    Args:
        device: A device, or ``"auto"``: the device of the model if that is not the CPU, otherwise the first
            accelerator, otherwise the CPU.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"`` run forward and loss under autocast, and ``"fp16"`` scales the
            loss (https://docs.pytorch.org/docs/stable/amp.html). The parameters stay in their own type.
        accumulate: The number of batches in an accumulation group, which makes one update. The loss is divided by it
            for the backward pass. The last group of an epoch may be shorter, and its gradients are divided by its own
            length. Its update is made in the last batch, or after that batch if it was cancelled (rule 16).
        clip_grad_norm: The largest total 2-norm of the gradients of an update: larger gradients are scaled down.
        compile: Whether the model runs through `torch.compile`. ``"loss"`` compiles the model and the loss function as
            one graph. A mapping gives arguments for `torch.compile`; ``"loss": True`` among them means the same as
            ``"loss"`` (`flowtrain.core.compile`).
        clip_grad_value: The largest absolute value of an element of the gradients, to which elements are clamped after
            `clip_grad_norm`.
        init_scale: The first scale of the loss with ``"fp16"``.
        lag: The number of batches after which values of the device are read, such as the loss by `StopOnNaNLoss`. By
            default 2 on an accelerator with streams and pinned memory, and 0 elsewhere.
        prefetch: Whether the next batch is moved while the current one is computed, on an accelerator with streams and
            pinned memory (``True`` warns if it lacks them); or a `flowtrain.Transfer` of your own.
        channels_last: Whether the model, and tensors of shape ``(batch, channels, height, width)`` in the data, get the
            memory format in which convolutions are fast.
        tf32: Whether float32 products on CUDA may round to TF32, in the whole process; ``None`` changes nothing.
        parallel: How several processes train the model: ``"ddp"``; ``"fsdp"`` (`flowtrain.core.sharding`); ``"auto"``,
            which is DDP in the processes that ``torchrun`` has started; or ``None`` for one process.
        ddp: Arguments for `torch.nn.parallel.DistributedDataParallel`, such as ``{"find_unused_parameters": True}``.
        uneven: If loaders of several processes differ in length: ``"stop"`` with the shortest one, or ``"error"``.
        check_params: Whether several processes compare their parameters and buffers after each epoch of training.
        shard: With ``"fsdp"``, which submodules are gathered and freed as one: those of a class or of several; or those
            for which a function of ``(name, module)`` returns ``True``. The rest of the model is one more part.
        fsdp: Arguments for `torch.distributed.fsdp.fully_shard`, such as ``{"reshard_after_forward": False}``.

    Raises:
        CoreError: An argument has a value that it cannot have, or the device does not exist.
    """

    # A step calls these for every batch. They are attributes, since most cores need nothing but torch's own functions.

    plain: bool
    """Whether the core adds nothing to a step: an update is ``optimizer.step()``, and nothing counts batches."""
    model: Callable[..., Any]
    """The model if the learner has one without a name, compiled and under autocast where the settings say so."""
    lossfn: Callable[..., Any]
    """The loss function, a function of ``(outputs, targets)``, compiled and under autocast as `model` is."""
    begin: Callable[[], Any]
    """Begins the gradients of a training batch: zeroes them, or leaves those of an open accumulation group."""
    backward: Callable[[torch.Tensor], Any]
    """Runs the backward pass of a loss, a tensor with one element: `torch.Tensor.backward` or `_backward`."""
    places: bool
    """Whether data must be moved or changed by `place` before a step; a core on the CPU leaves data as they are."""
    place: Callable[[Any], Any]
    """Returns the data of a batch on the device, in the memory format of the core."""
    feed: Callable[[Iterable[Any], int | None], Iterable[Any]]
    """Returns the batches of an epoch, of which there are the given number, with the next one moved ahead of time."""

    precision, accumulate = setting("precision"), setting("accumulate")
    clip_grad_norm, clip_grad_value = setting("clip_grad_norm"), setting("clip_grad_value")

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
        prefetch: bool | Transfer | None = None,
        channels_last: bool = False,
        tf32: bool | None = None,
        parallel: Parallel = "auto",
        ddp: Mapping[str, Any] | None = None,
        uneven: Literal["stop", "error"] = "stop",
        check_params: bool = False,
        shard: Shard | None = None,
        fsdp: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = CoreSettings(
            device, precision, accumulate, clip_grad_norm, compile, clip_grad_value=clip_grad_value,
            init_scale=init_scale, lag=lag, prefetch=prefetch, channels_last=channels_last, tf32=tf32,
            parallel=parallel, ddp=ddp, uneven=uneven, check_params=check_params, shard=shard, fsdp=fsdp,
        )  # fmt: skip
        self._state: LearnerState | None = None
        self._needs_norm = self._warned = False
        self._guard: NaNGuard | None = None
        self.world: World | None = None  # the ranks that train together; ``None`` for one process
        self.modes: Modes | None = None  # set by the loop while an epoch of a phase runs

    # --- called once, by the learner

    def release(self, state: LearnerState) -> None:
        """Belong to no learner any more, because the learner of this state, which was being built, was refused."""
        if self._state is state:  # otherwise the core belongs to another learner, which still uses it
            self._state = None

    def close(self) -> None:
        """Drop all references to the learner's state, so that it is freed even if a user keeps the core."""
        self.guard_nan(False)
        # The settings stay for `like` and `repr`, the scaler for `skipped`.
        keeps = {*vars(self.settings), "settings", "device", "loss_name", "_state", "_scaling", "_abilities"}
        for name in set(vars(self)) - keeps:
            delattr(self, name)
        self.models: dict[str, Any] = {}
        self._loss_modules: list[Any] = []
        self.places = False

    def attach(self, state: LearnerState, optimizer: Any) -> None:
        """Move models and loss function to the device and make the optimizers. Called once, by the learner.

        Args:
            state: The state of the learner, with ``model`` and ``lossfn``. ``optimizer``, ``optimizers``, ``params``
                and ``lag`` are set here.
            optimizer: An optimizer, a function that makes one from parameters, or a mapping from names to either.

        Raises:
            CoreError: The core belongs to another learner, or the optimizer does not fit the models.
        """
        if self._state is not None:
            raise CoreError(f"{self!r} belongs to another learner. Give each learner a core of its own.")
        models = by_name(state.model)
        self.models = {name: original(model) for name, model in models.items()}
        self.loss_name = getattr(state.lossfn, "__name__", type(state.lossfn).__name__)
        self._loss_modules = [state.lossfn] if isinstance(state.lossfn, torch.nn.Module) else []
        self.world = find_world(self.settings.parallel)
        self.device = find_device(self.settings.device, self.models.values(), local_rank())
        check_precision(self.device, self.precision)
        model: Any = models.get("")
        lossfn: Any = state.lossfn
        if self.settings.compile is not False:
            compiled = Compiled(models, state.lossfn, self.settings.compile, lambda: state.batch.targets)
            model, lossfn = compiled.model, compiled.lossfn
        sharded: Sharded | None = None
        if self.world is not None and self.settings.parallel == "fsdp":  # first, since the parameters become others
            move_modules(self.modules, self.device, channels_last=self.settings.channels_last)
            sharded = Sharded(self.world, self.models, self._loss_modules, self.device, self.settings, optimizer)
        made = self.make_optimizers(optimizer)
        self._state = state
        state.params = self.params = Parameters(self.models)
        self.grads = Gradients(self.params)
        self._scaling = Scaling(self.device, self.settings.init_scale) if self.precision == "fp16" else None
        if not self._warned and (self.world is None or self.world.main):
            warn_unable(self.device, self.settings.prefetch, self.settings.lag)
        allow_tf32(self.device, self.settings.tf32)
        self.model, self.lossfn = (in_precision(each, self.device, self.precision) for each in (model, lossfn))
        self.replica: Replica = Single(self.model)
        if self.world is not None:
            state.rank, state.world_size = self.world.rank, self.world.size
        if sharded is not None:
            sharded.run_by(self.model)
            self.replica, self.model = sharded, sharded.model
        elif self.world is not None:
            call = self.model if "" in self.models else None
            self.replica = DataParallel(self.world, self.models, self._loss_modules, call, self.device, self.settings)
        self.use_optimizers(state, made)

    def make_optimizers(self, wanted: Any) -> dict[str, Any]:
        """Move the modules to the device, and return the optimizers by name. Raises `CoreError` as `attach` does."""
        move_modules(self.modules, self.device, channels_last=self.settings.channels_last)
        # Only now: moving a module to another type of device may replace its parameters, which optimizers hold.
        return make_optimizers(wanted, self.models, self._loss_modules)

    def use_optimizers(self, state: LearnerState, optimizers: dict[str, Any]) -> None:
        """Train with the results of `make_optimizers` from now on, and show them in the state."""
        self._optimizers = optimizers
        state.use_optimizers(optimizers, partial(named_parameters, self.params, state.lossfn))
        self.optimizer = state.optimizer
        self.groups = Groups(self._optimizers, self.accumulate)
        chosen = self.settings
        self._placement = BatchMover(
            self.device, self.groups, prefetch=chosen.prefetch, channels_last=chosen.channels_last, lag=chosen.lag
        )
        self.places, self.place, self.feed = self._placement.needed, self._placement.place, self._placement.feed
        state.lag = self._placement.lag
        # `repr` tells these two, which depend on the abilities of the device, and it does so after `close` too.
        self._abilities = f", prefetch={self._placement.prefetches}, lag={state.lag}"
        self.guard_nan(self._guard is not None)

    def _choose(self) -> None:
        """Choose `begin` and `backward` for the present settings: torch's own functions if the core is plain."""
        self.plain = (
            "" in self._optimizers
            and self.accumulate == 1
            and self._scaling is None
            and self.clip_grad_norm is None
            and self.clip_grad_value is None
            and not self._needs_norm
            and self.world is None
        )
        self.begin = zeroing(self.optimizer) if self.plain else self.groups.begin
        # The guard has to see each loss, so a core with a guard is plain and still runs the backward pass itself.
        self.backward = torch.Tensor.backward if self.plain and self._guard is None else self._backward

    def guard_nan(self, wanted: bool) -> None:
        """Say whether updates must be skipped after a NaN loss, since a callback stops at it and reads losses late."""
        if self._guard is not None:
            self._guard.release()
            self._guard = None
        late = self._state is not None and self._state.lag > 0
        # A scaler needs no guard: it skips every update whose gradients are not finite.
        if wanted and late and self._scaling is None:
            self._guard = NaNGuard(self._optimizers.values(), self.device)
        self.replica.watch_nan(self._guard.nan_seen if self._guard is not None else None)
        self._choose()

    def need_grad_norm(self, needed: bool) -> None:
        """Say whether a callback declares ``batch.grad_norm``, so that the norm is computed without clipping too."""
        if needed != self._needs_norm:
            self._needs_norm = needed
            self._choose()

    # --- each batch

    def show(self, batch: BatchState) -> None:
        """Make the read-only twins of the containers in a batch, for handlers that read it."""
        if self._state is not None and self._state.batch is batch:
            self._state.show(batch)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the forward pass."""
        return autocast(self.device, self.precision)

    def end_groups(self) -> None:
        """End an epoch: discard the gradients of open groups, since a group lies within one epoch."""
        self._placement.forget()
        if torch.is_grad_enabled():  # an epoch of validation may come between direct steps of training
            if self._guard is not None:
                self._guard.clear()
            if self.groups.open:
                self.discard()

    def unfilled(self) -> list[list[str]]:
        """Return the optimizers whose groups are not full, in lists of those to update together."""
        return self.groups.unfilled if torch.is_grad_enabled() else []

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss for the backward pass, divided by the size of a group and multiplied by the scale of fp16."""
        if self._guard is not None:
            self._guard.see(loss)
        if self.accumulate > 1:
            loss = loss / self.accumulate
        return loss if self._scaling is None else self._scaling.scale(loss)

    def backward_on_ranks(self, loss: torch.Tensor, flags: Sequence[int]) -> list[int]:
        """Run the backward pass of a batch that all ranks run; return the sums of the flags (`Replica.backward`)."""
        return self.replica.backward(self._scaled(loss), flags)

    def _backward(self, loss: torch.Tensor) -> None:
        self._scaled(loss).backward()

    def backward_for(self, loss: torch.Tensor, name: str) -> None:
        """Run the backward pass for the parameters of one optimizer; all other parameters keep their gradients.

        Args:
            loss: A tensor with one element, with its graph.
            name: The name of the optimizer.

        Raises:
            CoreError: There is no optimizer of that name.
            RuntimeError: The loss does not depend on the parameters of the optimizer.
        """
        self._check_name("backward", name)
        params = [param for param in params_of(self._optimizers[name]) if param.requires_grad]
        try:
            self._scaled(loss).backward(inputs=params)
        except RuntimeError as error:
            error.add_note(f"raised by backward(name={name!r}), for the parameters of optimizer {name!r} alone")
            raise

    def _check_name(self, method: str, name: str) -> None:
        """Check that there is an optimizer of a name, for a method that a step has called with it."""
        if name not in self._optimizers:
            has = ", ".join(map(repr, filter(None, self._optimizers))) or "one without a name: leave name= out"
            raise CoreError(f"{method}(name={name!r}): there is no such optimizer; the learner has {has}.")

    def due(self, name: str | None) -> list[str]:
        """Count a batch for one optimizer, or for all, and return the optimizers whose group is complete.

        Raises:
            CoreError: There is no optimizer of that name.
        """
        if name is not None:
            self._check_name("update", name)
        return self.groups.due(name)

    def average(self, names: Iterable[str]) -> None:
        """Set the gradients of optimizers to their means over all ranks (`Replica.average`)."""
        self.replica.average([param for name in names for param in params_of(self._optimizers[name])])

    def unscale(self, names: Iterable[str]) -> None:
        """Bring the gradients to the values that one batch with the samples of the whole group would have given."""
        for name in names:
            optimizer = self._optimizers[name]
            if self._scaling is not None:  # first, since the scaler judges whether the gradients are finite
                self._scaling.unscale(optimizer)
            scale_gradients(optimizer, self.groups.share(name))

    def clip(self, names: Iterable[str]) -> torch.Tensor | None:
        """Clip the gradients by norm, then by value.

        Returns:
            The norm before clipping, a tensor of shape ``()``, if clipping or a handler needs it; otherwise ``None``.
        """
        params = [param for name in names for param in params_of(self._optimizers[name])]
        needs_norm = self._needs_norm or self.clip_grad_norm is not None
        return clip_gradients(params, self.clip_grad_norm, self.clip_grad_value, needs_norm=needs_norm)

    def step(self, names: Iterable[str]) -> None:
        """Update the parameters of optimizers, and end their groups."""
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
        """Discard the gradients of the open groups; the next batch begins new groups."""
        self.groups.discard()
        if self.replica.unsent is not None:
            self.replica.unsent.discard()
        if self._scaling is not None:
            self._scaling.reset()

    @property
    def skipped(self) -> int:
        """The number of updates that ``"fp16"`` has skipped for gradients that are not finite. Waits for the device."""
        return 0 if self._scaling is None else self._scaling.skipped

    def finite(self) -> bool:
        """Tell whether all parameters that are trained are finite. Waits for the device, once."""
        return all_finite(self.modules)

    @contextmanager
    def own_modes(self) -> Generator[None]:
        """Return a context in which every module has its own mode, even while a phase has set other modes."""
        if self.modes is not None:
            self.modes.end()
        try:
            yield
        finally:
            if self.modes is not None:
                self.modes.begin()

    def warn_switched(self) -> None:
        """Warn, once for each core, that a model in eval mode is trained in train mode."""
        if self._warned or self.modes is None or not self.modes.switched or (self.world and not self.world.main):
            return
        self._warned = True
        names = {id(model): f"model {name!r}" if name else "The model" for name, model in self.models.items()}
        which = ", ".join(names.get(id(root), "The loss function") for root in self.modes.switched)
        warnings.warn(
            f"{which} is in eval mode, and is trained in train mode, since not all parameters are frozen. Call train() "
            f"on it before fit. To keep parts in eval mode call eval() on these alone; to keep all of it there freeze "
            f"it: requires_grad_(False).",
            UserWarning,
            stacklevel=2,
        )

    def like(self, **changes: Any) -> TorchCore:
        """Return a core with the same settings for a copy of the learner; it does not compile, and does not warn.

        Args:
            changes: CoreSettings that differ.
        """
        alone: dict[str, Any] = {"compile": False, "parallel": None, "shard": None, "fsdp": None}
        core = TorchCore(**{**vars(self.settings), **alone, **changes})
        core._warned = True
        return core

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the scaler for a checkpoint. The accumulation groups have a state of their own."""
        return {"scaler": self._scaling.state_dict() if self._scaling is not None else {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        if self._scaling is not None and state.get("scaler"):
            self._scaling.load_state_dict(state["scaler"])

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The models, and the loss function where it is a module."""
        return [*self.models.values(), *self._loss_modules]

    def __repr__(self) -> str:
        device = str(self.device if self._state is not None else self.settings.device)
        shown = f"device={device!r}, precision={self.precision!r}, accumulate={self.accumulate}"
        if self._state is not None and self.device.type != "cpu":
            shown += self._abilities
        return f"TorchCore({shown})"
