"""Data parallel training: every rank trains the model on its own batches, and all make the same updates.

A batch of a bundled phase runs through `torch.nn.parallel.DistributedDataParallel`, which sends the gradients while the
backward pass is still running (https://docs.pytorch.org/docs/stable/notes/ddp.html). The *flags* with which ranks agree
on one decision travel with them: they are the gradient of one more parameter, which DDP averages as any other, so the
agreement of a batch costs no message of its own. A rank that cannot compute its batch takes part all the same: it runs
a backward pass of zeros.

In the steps of a user's phases, and with several models, the gradients are averaged by one collective before the update
instead (`DataParallel.average`), because DDP cannot know which models such a step calls.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Never

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from flowtrain.core.replica import FLAGS
from flowtrain.core.settings import CoreSettings
from flowtrain.core.unsent_gradients import UnsentGradients
from flowtrain.core.world import World
from flowtrain.errors import CoreError

__all__ = ["DataParallel", "check_unwrapped", "equalise", "send_buffers", "share_nan"]

_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")  # the second is the name before torch 2.13
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


def check_unwrapped(modules: Iterable[torch.nn.Module]) -> None:
    """Check that the user has not wrapped a model for several processes.

    Raises:
        CoreError: A model is a `DistributedDataParallel`.
    """
    if any(isinstance(inner, DistributedDataParallel) for module in modules for inner in module.modules()):
        raise CoreError(
            "The model is wrapped in DistributedDataParallel, and the learner wraps it itself: it needs the module to "
            "evaluate, and to write checkpoints whose names do not begin with 'module.'. Pass the module, and "
            "arguments for DDP as TorchCore(ddp={...}); or train with your own wrapper, each process for itself: "
            "TorchCore(parallel=None)."
        )


class _Trained(torch.nn.Module):
    """The module that DDP wraps: it calls the model, or computes zeros on a rank that has no outputs.

    Args:
        modules: The model, and the loss function if it is a module: their parameters are trained.
        call: The function that runs the model, under autocast and compiled where the settings say so.
        flags: The parameter whose gradients are the flags; ``None`` if flags travel on another way.
    """

    def __init__(
        self, modules: Iterable[torch.nn.Module], call: Callable[..., Any], flags: torch.nn.Parameter | None
    ) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(modules)
        self.flags = flags
        self.without_batch = False
        self._call = [call]  # in a list, since a module that is an attribute would be registered a second time

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the outputs of the model, or a zero that depends on every parameter."""
        if self.without_batch:
            sparse = _sparse(self.parts.modules())
            params = [param for param in self.parts.parameters() if param.requires_grad]
            return torch.stack([_zero(param, sparse=param in sparse).float() for param in params]).sum()
        return self._call[0](*inputs, **named)


def _sparse(modules: Iterable[torch.nn.Module]) -> set[torch.Tensor]:
    """Return the parameters whose gradients are sparse tensors: DDP asks the same modules, and then sends no others."""
    kinds = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return {module.weight for module in modules if isinstance(module, kinds) and module.sparse}


def _zero(param: torch.Tensor, *, sparse: bool) -> torch.Tensor:
    """Return a zero of shape ``()`` that depends on a parameter; in the backward pass its gradient is zero."""
    if sparse:
        nothing = torch.empty(0, dtype=torch.int64, device=param.device)
        return torch.nn.functional.embedding(nothing, param, sparse=True).sum()
    return ((torch.view_as_real(param) if param.is_complex() else param) * 0).sum()


class DataParallel:
    """The models of one learner on one of several ranks, which all have the whole models: a `Replica`.

    No training batch uses the first flag, so the main rank sends a 1 in it with the gradients. A rank that reads
    another sum there knows that DDP has not sent the flags.

    Args:
        world: The ranks.
        models: The models by name.
        losses: The loss function, if it is a module.
        call: The function that runs the model without a name; ``None`` if there is none.
        device: The device of the models.
        settings: The settings of the core.

    Attributes:
        runs_bundled_steps: See `Replica.runs_bundled_steps`: true if there is one model without a name.
    """

    forward_is_collective = False
    unsent: UnsentGradients | None = None

    def __init__(
        self,
        world: World,
        models: Mapping[str, torch.nn.Module],
        losses: Sequence[torch.nn.Module],
        call: Callable[..., Any] | None,
        device: torch.device,
        settings: CoreSettings,
    ) -> None:
        options = settings.ddp or {}
        self._modules = [*models.values(), *losses]
        check_unwrapped(self._modules)
        self._world, self._device = world, device
        self.runs_bundled_steps, self._options = call is not None, options
        self._nan_seen: torch.Tensor | None = None
        looks = bool(options.get("find_unused_parameters"))  # DDP would take the parameter of the flags as unused
        if looks and any(True for module in losses for _ in module.parameters()):
            raise CoreError(
                "ddp={'find_unused_parameters': True} takes the parameters of the loss function as unused, because DDP "
                "does not call it. Leave the option out, or make the loss function a part of the model."
            )
        on_cpu = device.type == "cpu"  # elsewhere reading the flags would make the host wait for the backward pass
        by_gradient = on_cpu and call is not None and not looks
        self._flags = torch.nn.Parameter(torch.zeros(FLAGS)) if by_gradient else None
        self._sent = torch.tensor([float(world.main), *[0.0] * (FLAGS - 1)])
        self._trained: list[tuple[int, bool]] = []  # of the parameters that DDP was made for, and keeps alive
        self._wrapped = _Trained(self._modules, call, self._flags) if call is not None else None
        self._ddp: Any = None
        equalise(world, self._modules, settings)

    def watch_nan(self, seen: torch.Tensor | None) -> None:
        """Keep the tensor, so that the guards of all ranks skip the update after a NaN of one."""
        self._nan_seen = seen

    def prepare(self) -> None:
        """Wrap the model again, on all ranks, if it has other parameters or trains others."""
        if self._wrapped is not None and not self.prepared:
            self._trained, self._ddp = _trained(self._wrapped), None
            local = None if self._device.type == "cpu" else [self._device]
            self._ddp = self._world.guarded(
                DistributedDataParallel, self._wrapped, device_ids=local, **{_SYNC_BUFFERS: False, **self._options}
            )

    @property
    def prepared(self) -> bool:
        """Whether DDP wraps the parameters that are trained now."""
        return self._wrapped is None or _trained(self._wrapped) == self._trained

    def model(self, *inputs: Any, **named: Any) -> Any:
        """Run the model through DDP."""
        return self._world.guarded(self._ddp, *inputs, **named)  # its second call has a collective of its own

    def set_gradient_sync(self, wanted: bool) -> None:
        """Tell DDP whether the next backward pass sends the gradients."""
        if self.syncs_gradients is not wanted:  # an attribute of a module takes microseconds to set
            self._ddp.require_backward_grad_sync = wanted

    @property
    def syncs_gradients(self) -> bool:
        """Whether DDP sends the gradients of this batch."""
        return bool(self._ddp.require_backward_grad_sync)

    @property
    def has_sync_point(self) -> bool:
        """Whether the flags of this batch travel: with the gradients, or by a message after them."""
        return self.syncs_gradients

    def backward(self, loss: torch.Tensor, flags: Sequence[int]) -> list[int]:
        """Run the backward pass, which sends the gradients; on the CPU the flags travel as one more gradient."""
        if self.syncs_gradients:
            share_nan(self._world, self._nan_seen)
        # Without a graph `backward` raises.
        if self._flags is None or not self.syncs_gradients or not loss.requires_grad:
            self._world.guarded(loss.backward)
            return self._world.sum(flags) if self.syncs_gradients else [0] * FLAGS
        self._flags.grad = None
        # The gradient of a product with the parameter is the other factor, whatever the loss is. The sum is the loss
        # itself, because the parameter is zero.
        sent = self._sent + torch.tensor(flags, dtype=torch.float32) if any(flags) else self._sent
        self._world.guarded((loss + torch.dot(self._flags, sent)).backward)
        received: Any = self._flags.grad
        sums = [round(mean * self._world.size) for mean in received.tolist()]
        if sums[0] != 1:  # only the main rank has sent a 1 there, so what was received is this rank's own
            self._refuse_unused()
        return sums

    def _refuse_unused(self) -> Never:
        """Refuse a backward pass that has not sent its gradients, because some parameters had none."""
        named = [pair for module in self._modules for pair in module.named_parameters()]
        names = [name for name, param in named if param.requires_grad and param.grad is None]
        raise CoreError(
            f"Several ranks need a gradient of every parameter that requires one, and in this batch there is none of "
            f"{', '.join(names[:5]) or 'some'}: the loss does not depend on it. Freeze what is not used, "
            f"requires_grad_(False), or write TorchCore(ddp={{'find_unused_parameters': True}})."
        )

    def leave(self, flags: Sequence[int]) -> list[int]:
        """Run the two passes without a batch: every gradient that this rank sends is zero."""
        if self._wrapped is None:
            return self._world.sum(flags)
        self.set_gradient_sync(True)
        self._wrapped.without_batch = True
        try:
            with torch.enable_grad(), torch.autocast(self._device.type, enabled=False):
                return self.backward(self._ddp(), flags)
        finally:
            self._wrapped.without_batch = False

    def skip_unsent_batch(self) -> None:
        """Run the forward pass without a batch: the second call of DDP has a collective of its own."""
        if self._wrapped is None:
            return
        self._wrapped.without_batch = True
        try:
            with torch.enable_grad():
                self._world.guarded(self._ddp)
        finally:
            self._wrapped.without_batch = False

    def finish_forward(self) -> bool:
        """Return that it is finished: other ranks need nothing from this one in a forward pass."""
        return True

    def average(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Average the gradients, in one collective for each type of number.

        A parameter that has a gradient on some ranks only counts as zero on the others; one without a gradient on any
        rank stays without. Sparse gradients take a collective for each parameter.
        """
        share_nan(self._world, self._nan_seen)
        sparse = _sparse(module for root in self._modules for module in root.modules())
        trained = [param for param in params if param.requires_grad]
        for param in trained:
            if param in sparse:
                own = param.grad if param.grad is not None else torch.zeros_like(param, layout=torch.sparse_coo)
                mean = own.coalesce() / self._world.size
                self._world.guarded(dist.all_reduce, mean)
                param.grad = mean if mean._nnz() else None
        for alike in _by_type(param for param in trained if param not in sparse):
            grads = [param.grad if param.grad is not None else torch.zeros_like(param) for param in alike]
            given = torch.tensor([param.grad is not None for param in alike]).to(grads[0])
            flat = torch.cat([*(grad.reshape(-1) for grad in grads), given]).div_(self._world.size)
            self._world.guarded(dist.all_reduce, flat)
            *means, given = flat.split([*(grad.numel() for grad in grads), len(alike)])
            for param, grad, mean, anyone in zip(alike, grads, means, given.tolist(), strict=True):
                if anyone:
                    param.grad = grad.copy_(mean.view_as(grad))

    def share_buffers(self) -> None:
        """Send the buffers of the main rank to all ranks."""
        send_buffers(self._world, self._modules)


def _trained(module: torch.nn.Module) -> list[tuple[int, bool]]:
    """Return which parameters a module has, and which of them are trained."""
    return [(id(param), param.requires_grad) for param in module.parameters()]


def share_nan(world: World, seen: torch.Tensor | None) -> None:
    """Set the tensor of `Replica.watch_nan` to 1 on all ranks if it is 1 on one of them; ``None`` is not sent."""
    if seen is not None:
        world.guarded(dist.all_reduce, seen, op=dist.ReduceOp.MAX)


def send_buffers(world: World, modules: Iterable[torch.nn.Module]) -> None:
    """Set the buffers of modules on all ranks to those of the main rank."""
    _send_to_all(world, [buffer for module in modules for buffer in module.buffers()])


def equalise(world: World, modules: Sequence[torch.nn.Module], settings: CoreSettings) -> None:
    """Set the parameters and buffers of all ranks to those of the main rank.

    Raises:
        CoreError: The modules of a rank have other parameters or buffers than those of the main rank, or its settings
            are others.
    """
    lazy = [name for module in modules for name, param in module.named_parameters() if is_lazy(param)]
    if lazy:
        raise CoreError(
            f"Several ranks need parameters whose shapes are known, and {', '.join(lazy[:5])} has none yet. Call the "
            f"model once before, model(inputs), and then make the learner."
        )
    tensors = [
        (f"{type(module).__name__}.{name}", tensor)
        for module in modules
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    shapes = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]
    (wanted, main), *others = world.exchange((settings.of_all_ranks(), shapes))
    for rank, (chosen, found) in enumerate(others, 1):
        unlike = next((name for name in wanted if chosen[name] != wanted[name]), None)
        if unlike is not None:
            raise CoreError(
                f"All ranks train with the same settings, and rank {rank} has TorchCore({unlike}={chosen[unlike]}) "
                f"where the main rank has {unlike}={wanted[unlike]}. Pass the same value on every rank."
            )
        if found != main:
            pairs = zip([*found, None], [*main, None], strict=False)
            other, expected = next(((a, b) for a, b in pairs if a != b), (None, None))
            raise CoreError(
                f"All ranks train one model, and the model of rank {rank} differs from that of the main rank: it has "
                f"{_shown(other)} where the main rank has {_shown(expected)}. Make the same model on every rank."
            )
    _send_to_all(world, [tensor.detach() for _, tensor in tensors])


def _shown(entry: tuple[str, tuple[int, ...], str] | None) -> str:
    return "no further parameter" if entry is None else f"{entry[0]} of shape {entry[1]}, {entry[2]}"


def _send_to_all(world: World, tensors: Iterable[torch.Tensor]) -> None:
    """Copy tensors of the main rank to all others, by one collective for each type of number."""
    for alike in _by_type(tensors):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike])
        try:
            world.guarded(dist.broadcast, flat, src=0)
        except RuntimeError as error:  # on every rank alike, before anything is sent
            if not flat.is_complex():
                raise
            raise CoreError(
                f"The model has parameters or buffers of type {flat.dtype}, and the backend {dist.get_backend()} of "
                f"torch {torch.__version__} sends no complex numbers from rank to rank ({error}). Update torch; or "
                f"hold them as real numbers, and have the forward pass call torch.view_as_complex."
            ) from error
        if not world.main:
            for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))


def _by_type(tensors: Iterable[Any]) -> list[list[Any]]:
    """Return tensors in lists of those that can be put into one: of one type of number, on one device."""
    found: dict[tuple[torch.device, torch.dtype], list[Any]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(found.values())
