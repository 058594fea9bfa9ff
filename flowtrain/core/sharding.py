"""Sharded training: each rank keeps a part of every parameter, of its gradient, and of the state of its optimizer.

`Sharded` is FSDP2, torch's `fully_shard` (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html). The
model is divided into *units*, which are submodules. Before a unit runs, all ranks gather its parameters, and afterwards
they free what is not theirs. So a forward pass is a sequence of collectives, in evaluation as well as in training, and
a rank without a batch has to take part in all of them.

Ranks agree on a training batch by a message between the loss and the backward pass. A rank that fails before takes
part in the gathers that are left, without computing anything (`Sharded.finish_forward`). It knows them from the last
complete forward pass, since the units run in the same order in every batch. In the first forward pass no rank knows the
order yet, so all of them agree before each unit, by a message.

One failure cannot be told: that of one rank alone in a backward pass. The other ranks then wait in a collective that
this rank cannot join. It gives up all exchanges and raises its error at once; the others end with an error as soon as
its process has ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch.optim import Optimizer

from flowtrain.core.data_parallel import check_unwrapped, equalise, send_buffers, share_nan
from flowtrain.core.replica import FIRST_FAILURE
from flowtrain.core.settings import CoreSettings, Shard
from flowtrain.core.unsent_gradients import UnsentGradients
from flowtrain.core.world import World
from flowtrain.errors import CoreError, UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.errors.describing import nearest
from flowtrain.state.shards import whole

__all__ = ["Sharded", "full_state_dict"]

_Place: TypeAlias = Literal["before", "inside", "after"]


def full_state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """Return the whole ``state_dict`` of a model that several processes train, on the main rank and on the CPU.

    Every rank must call this, at the same point. The parameters are put together one after the other, and only the main
    rank keeps them. In one process, and with DDP, it is a copy of ``model.state_dict()`` on the CPU.

    Args:
        model: The model, such as ``learner.model``.

    Returns:
        The entries by name; an empty mapping on all ranks but the main one.

    Raises:
        UsageError: `model` is no module.
    """
    if not is_a(model, torch.nn.Module):
        raise UsageError(f"full_state_dict({model!r}) takes a module. Write full_state_dict(learner.model).")
    main = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
    found: dict[str, Any] = {}
    for name, entry in model.state_dict().items():
        if isinstance(entry, torch.Tensor):
            entry = whole(entry.detach())  # a rank that left this out would make the others wait
            entry = entry.to("cpu", copy=True) if main else None
        if main:
            found[name] = entry
    return found


class Sharded:
    """The model of one learner, sharded over the ranks, on one of them: a `Replica`.

    `torch.distributed.fsdp.fully_shard` changes the model in place: its parameters become `DTensor`, which hold the
    part of this rank, and its class a subclass with ``FSDP`` before the name. The names of parameters stay. A model
    that the user has sharded before is taken as it is.

    Args:
        world: The ranks.
        models: The models by name.
        losses: The loss function, if it is a module.
        device: The device of the models.
        settings: The settings of the core.
        wanted: The optimizer that the user has passed.

    Raises:
        CoreError: The model, the loss function or the optimizer cannot be used with shards.
    """

    # All ranks gather in each forward pass, so each batch has a sync point.
    runs_bundled_steps = forward_is_collective = has_sync_point = True
    prepared = True  # units see by themselves which parameters are trained

    def __init__(
        self,
        world: World,
        models: Mapping[str, torch.nn.Module],
        losses: Sequence[torch.nn.Module],
        device: torch.device,
        settings: CoreSettings,
        wanted: Any,
    ) -> None:
        model = models.get("")
        if model is None:
            raise CoreError(
                f"parallel='fsdp' trains one model, and the learner has {', '.join(models)}. Write parallel='ddp', "
                f"which trains several."
            )
        if any(param.requires_grad for module in losses for param in module.parameters()):
            raise CoreError(
                f"The loss function {type(losses[0]).__name__} has parameters, which parallel='fsdp' does not shard. "
                f"Move them into the model, freeze them (requires_grad_(False)), or write parallel='ddp'."
            )
        self._modules = [model, *losses]
        check_unwrapped(self._modules)
        self._world = world
        self._call: Callable[..., Any] = model
        self._root: Any = model
        self._units: list[Any] = _shard(world, model, device, settings, wanted)
        self.unsent = UnsentGradients(world, self._units)
        self._running: list[int] = []  # the units that have run in the present forward pass, by their numbers
        self._orders: dict[bool, list[int]] = {}  # the units of a complete forward pass, by whether it was training
        self._place: _Place = "before"
        self._first = False  # whether this is a forward pass whose order of units is not known yet
        self.syncs_gradients = True
        self._nan_seen: torch.Tensor | None = None
        self._agree: Callable[[], None] | None = None
        for number, unit in enumerate(self._units):
            unit.register_forward_pre_hook(self._before_unit, prepend=True)  # before that of torch, which gathers
            unit.register_forward_pre_hook(partial(_note, self._running, number))

    def run_by(self, call: Callable[..., Any]) -> None:
        """Run the model by this function, which is the model under autocast where the settings say so."""
        self._call = call

    def agree_by(self, agree: Callable[[], None]) -> None:
        """Let the ranks agree by this function before each unit of the first forward pass."""
        self._agree = agree

    def _before_unit(self, module: torch.nn.Module, inputs: Any) -> None:
        if self._first and self._agree is not None:
            self._agree()

    # --- the forward pass

    def model(self, *inputs: Any, **named: Any) -> Any:
        """Run the model, and note in which order its units run."""
        training = torch.is_grad_enabled()
        self._running.clear()
        self._first, self._place = training not in self._orders, "inside"
        try:
            outputs = self._world.guarded(self._call, *inputs, **named)
        except BaseException:
            if self._first:  # the other ranks are at a sync point, within this forward pass or behind it
                self.reset()
            raise
        finally:
            self._first = False
        self._orders[training] = [*self._running]
        self._place = "after"
        if not training:  # torch keeps the parameters of the whole model gathered, for a backward pass
            self._root.reshard()
        return outputs

    def knows(self) -> bool:
        """Tell whether this rank can take part in a forward pass of the other ranks without a batch of its own."""
        return torch.is_grad_enabled() in self._orders

    def begin_forward(self) -> None:
        """Note that a sync point before a forward pass is over."""
        self._place = "before"

    def finish_forward(self) -> bool:
        """Gather and free the units that the other ranks still run, if their order is known."""
        training = torch.is_grad_enabled()
        order = self._orders.get(training)
        done = len(self._running) if self._place == "inside" else 0
        if self._place == "after":
            return True
        if order is None:
            return False
        for number in order[done:]:
            unit = self._units[number]
            self._world.guarded(unit.unshard)
            unit.reshard()
        self._place = "after"
        return True

    # --- the backward pass

    def skip_unsent_batch(self) -> None:
        """Do nothing: each batch has a sync point, and it is over."""

    def prepare(self) -> None:
        """Do nothing: torch gathers the parameters that there are."""

    def watch_nan(self, seen: torch.Tensor | None) -> None:
        """Keep the tensor: a NaN of one rank is in the gradients of all, so the guard of all must skip it."""
        self._nan_seen = seen

    def set_gradient_sync(self, wanted: bool) -> None:
        """Tell torch. While gradients do not travel, each rank adds whole gradients of its own."""
        self._place = "before"
        if wanted != self.syncs_gradients:
            self.syncs_gradients = wanted
            self._root.set_requires_gradient_sync(wanted)

    def backward(self, loss: torch.Tensor, flags: Sequence[int]) -> list[int]:
        """Sum the flags first, and leave the backward pass out if the batch ends; otherwise run it."""
        if not loss.requires_grad:
            loss.backward()  # raises, and the other ranks are told
        sums = self._world.sum(flags)
        if any(sums[FIRST_FAILURE:]):
            self.reset()
            return sums
        share_nan(self._world, self._nan_seen)
        try:
            self._world.guarded(loss.backward)
        except BaseException:
            self._world.give_up()
            raise
        self._place = "before"
        return sums

    def leave(self, flags: Sequence[int]) -> list[int]:
        """Finish the forward pass of the other ranks, sum the flags, and forget the batch."""
        self.finish_forward()
        sums = self._world.sum(flags)
        self.reset()
        return sums

    def reset(self) -> None:
        """Leave a forward pass that no backward pass follows."""
        if self._running or self._orders:  # otherwise torch has not prepared the units yet
            self._root.reset_iter_state()
        self._running.clear()
        self._place = "before"

    def average(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Average the gradients of a group that has ended before its last batch, which `unsent` keeps."""
        share_nan(self._world, self._nan_seen)
        self.unsent.average()

    def share_buffers(self) -> None:
        """Send the buffers of the main rank to all ranks."""
        send_buffers(self._world, self._modules)


def _note(running: list[int], number: int, module: torch.nn.Module, inputs: Any) -> None:
    """Note that a unit runs, whose parameters are gathered now."""
    running.append(number)


def _shard(
    world: World,
    model: torch.nn.Module,
    device: torch.device,
    settings: CoreSettings,
    wanted: Any,
) -> list[Any]:
    """Shard a model in place, and return its units; `Sharded` describes the arguments and the errors."""
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard
    except ImportError:  # a build of torch without torch.distributed
        raise CoreError("parallel='fsdp' needs a torch with torch.distributed.fsdp.fully_shard.") from None
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise CoreError(
            f"parallel='fsdp' needs a newer torch than {torch.__version__}, in which FSDPModule has reset_iter_state: "
            f"a cancelled batch could not be left without it. Update torch, or write parallel='ddp'."
        )
    shard, options = settings.shard, settings.fsdp or {}
    known = [name for name in inspect.signature(fully_shard).parameters if name not in ("module", "ignored_params")]
    for name in options:
        if name not in known:
            raise CoreError(
                f"fsdp={{{name!r}: ...}} is no argument of fully_shard.{nearest(name, known)} It has: "
                f"{', '.join(known)}."
            )
    if isinstance(model, FSDPModule):
        if shard is not None or options:
            raise CoreError(
                "The model is sharded already, and shard= or fsdp= was given too. Leave these out to train it as it "
                "is, or pass the model as it was before fully_shard."
            )
        return [module for module in model.modules() if isinstance(module, FSDPModule)]
    _check_options(world, device, options)
    chosen = _units(model, shard)
    _check_before(wanted)
    equalise(world, [model], settings)
    given = dict(options)
    if "mesh" not in given:
        given["mesh"] = init_device_mesh(device.type, (world.size,))
    units = [*chosen, model]
    for unit in units:
        try:
            fully_shard(unit, **given)
        except Exception as error:  # as the arguments of the user, and their combinations, are those of torch
            raise CoreError(
                f"fully_shard cannot shard {type(unit).__name__} with fsdp={dict(options)!r}: {type(error).__name__}: "
                f"{error}. Change fsdp=, or write parallel='ddp'."
            ) from error
    return units


def _check_options(world: World, device: torch.device, options: Mapping[str, Any]) -> None:
    """Check the mesh and the offloading that the user wants, which torch would refuse late, or on some ranks only.

    Raises:
        CoreError: The mesh has not all ranks, or no names; or memory would be pinned and there is no accelerator.
    """
    mesh: Any = options.get("mesh")
    if mesh is not None and mesh.size() != world.size:
        raise CoreError(
            f"fsdp={{'mesh': ...}} is a mesh of {mesh.size()} ranks, and {world.size} train. All of them train one "
            f"model: write init_device_mesh({device.type!r}, ({world.size},)), or two numbers whose product is "
            f"{world.size}."
        )
    if mesh is not None and mesh.ndim > 1 and not mesh.mesh_dim_names:
        raise CoreError(
            f"fsdp={{'mesh': ...}} is a mesh of shape {tuple(mesh.shape)} without names, by which fully_shard tells "
            f"what is replicated and what is sharded. Write init_device_mesh({device.type!r}, {tuple(mesh.shape)}, "
            f"mesh_dim_names=('replicate', 'shard'))."
        )
    if device.type == "cpu" and getattr(options.get("offload_policy"), "pin_memory", False):
        raise CoreError(
            "fsdp={'offload_policy': CPUOffloadPolicy()} pins memory, for which there is no accelerator here. Write "
            "CPUOffloadPolicy(pin_memory=False), or leave it out: the model is in the memory of the CPU anyway."
        )


def _units(model: torch.nn.Module, shard: Shard | None) -> list[torch.nn.Module]:
    """Return the submodules that are units of their own, those inside of others first.

    Raises:
        CoreError: There is none.
    """
    if shard is None:
        return []
    if isinstance(shard, (type, list, tuple)):
        kinds = tuple(shard) if isinstance(shard, (list, tuple)) else (shard,)
        found = {name: module for name, module in model.named_modules() if name and isinstance(module, kinds)}
    else:
        chooses: Any = shard
        found = {name: module for name, module in model.named_modules() if name and chooses(name, module)}
    if not found:
        classes = dict.fromkeys(type(module).__name__ for name, module in model.named_modules() if name)
        raise CoreError(
            f"shard={shard!r} fits no submodule of {type(model).__name__}, whose submodules are of "
            f"{', '.join(classes) or 'no class'}. Write one of these classes, or leave shard= out: the model is then "
            f"one unit."
        )
    return [*found.values()][::-1]


def _check_before(wanted: Any) -> None:
    """Check that no optimizer was made from the parameters that sharding is about to replace."""
    for name, each in wanted.items() if isinstance(wanted, Mapping) else [("", wanted)]:
        if isinstance(each, Optimizer):
            what, kind = f"optimizer[{name!r}]" if name else "optimizer", type(each).__name__
            raise CoreError(
                f"{what} is a {kind} that was made before the model is sharded, and holds parameters that "
                f"parallel='fsdp' replaces. Pass a function, which is called with the new ones: "
                f"optimizer=partial(torch.optim.{kind}, lr=...); for parameter groups, a function that makes them from "
                f"the names: optimizer=lambda params: torch.optim.{kind}(param_groups(model, ...))."
            )
