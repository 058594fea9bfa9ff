"""The settings of a core: the arguments of `flowtrain.core.torch_core.TorchCore`, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from operator import attrgetter
from typing import Any, Literal, TypeAlias

import torch

from flowtrain.core.compile import check_compile
from flowtrain.core.precision import DTYPES, Precision
from flowtrain.core.prefetch import Transfer
from flowtrain.core.world import Parallel
from flowtrain.errors import CoreError
from flowtrain.errors.arguments import is_a, is_positive, whole_number

__all__ = ["CoreSettings", "Shard", "setting", "text_of"]

Shard: TypeAlias = type[torch.nn.Module] | Sequence[type[torch.nn.Module]] | Callable[[str, torch.nn.Module], bool]
"""Which submodules are units of their own: those of one class or of several, or those that a function chooses."""


@dataclass(frozen=True)
class CoreSettings:
    """The arguments of `TorchCore`, checked; its docstring says what each of them means.

    Raises:
        CoreError: An argument has a value that it cannot have.
    """

    device: str | torch.device = "auto"
    precision: Precision = "fp32"
    accumulate: int = 1
    clip_grad_norm: float | None = None
    compile: bool | Literal["loss"] | Mapping[str, Any] = False
    _: KW_ONLY
    clip_grad_value: float | None = None
    init_scale: float = 65536.0
    lag: int | None = None
    prefetch: bool | Transfer | None = None
    channels_last: bool = False
    tf32: bool | None = None
    parallel: Parallel = "auto"
    ddp: Mapping[str, Any] | None = None
    uneven: Literal["stop", "error"] = "stop"
    check_params: bool = False
    shard: Shard | None = None
    fsdp: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if not is_a(self.precision, str) or self.precision not in DTYPES:
            known = ", ".join(map(repr, DTYPES))
            raise CoreError(f"precision={self.precision!r} is unknown. It is one of: {known}.")
        object.__setattr__(self, "accumulate", whole_number("accumulate", self.accumulate, error=CoreError))
        for name, limit in (("clip_grad_norm", self.clip_grad_norm), ("clip_grad_value", self.clip_grad_value)):
            if limit is not None and not is_positive(limit):
                raise CoreError(
                    f"{name}={limit!r}: a limit is a number above zero. Write {name}=1.0, or None for no clipping."
                )
        if not is_positive(self.init_scale):
            raise CoreError(f"init_scale={self.init_scale!r}: a scale is a number above zero, such as 65536.0.")
        if self.lag is not None:
            lag = whole_number("lag, in batches, or None for the device's own,", self.lag, least=0, error=CoreError)
            object.__setattr__(self, "lag", lag)
        if self.prefetch is not None and not is_a(self.prefetch, (bool, Transfer)):
            raise CoreError(f"prefetch is True, False, None or a Transfer of your own; got {self.prefetch!r}.")
        switches = (
            ("channels_last", self.channels_last, "True or False"),
            ("tf32", self.tf32, "True, False or None"),
            ("check_params", self.check_params, "True or False"),
        )
        for name, value, known in switches:
            if not is_a(value, bool) and not (value is None and known.endswith("None")):
                raise CoreError(f"{name} is {known}; got {value!r}.")
        check_compile(self.compile, self.accumulate)
        choices: dict[str, tuple[object, tuple[object, ...]]] = {
            "parallel": (self.parallel, ("auto", "ddp", "fsdp", None)),
            "uneven": (self.uneven, ("stop", "error")),
        }
        for name, (choice, possible) in choices.items():
            if choice not in possible:
                raise CoreError(f"{name}={choice!r} is unknown. It is one of: {', '.join(map(repr, possible))}.")
        if self.parallel == "fsdp" and self.check_params:
            raise CoreError(
                "check_params=True compares parameters that are the same on all ranks, and with parallel='fsdp' each "
                "rank has a part of its own. Leave it out."
            )
        _check_ddp(self.ddp, self.accumulate)
        if self.parallel == "fsdp" and self.ddp is not None:
            raise CoreError(f"ddp={self.ddp!r} is for parallel='ddp'. Write fsdp={{...}} with parallel='fsdp'.")
        _check_fsdp(self.parallel, self.shard, self.fsdp, self.precision, self.compile)

    def of_all_ranks(self) -> dict[str, str]:
        """Return the settings that must be the same on all ranks, by name, as texts that are the same in every process.

        A rank with another one would compute other weights, or would wait for the others at another place.
        """
        own = ("device", "prefetch", "tf32")
        found = {each.name: text_of(getattr(self, each.name)) for each in fields(self) if each.name not in own}
        return found | {"parallel": text_of("ddp" if self.parallel == "auto" else self.parallel)}


def text_of(value: object) -> str:
    """Return a value as a text that is the same in every process.

    That is the `repr` of plain values. Any other value is told by its name or type, since a `repr` may hold an address.

    >>> text_of({"betas": (0.9, 0.99), "fused": None}), text_of(torch.nn.Linear), text_of(torch.nn.ReLU())
    ("{'betas': (0.9, 0.99), 'fused': None}", 'Linear', 'ReLU')
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {text_of(each)}" for name, each in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(text_of, value)) + ")"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def setting(name: str) -> property:
    """Return a property that shows a setting of a core. An assignment is refused, since groups and steps depend on it.

    The getter is a C function, so that a step that asks for the setting makes no Python call.
    """

    def refuse(core: object, value: object) -> None:
        """Refuse the assignment.

        Raises:
            CoreError: Always.
        """
        raise CoreError(
            f"core.{name} = {value!r}: a core keeps the settings that it was made with, since compiled functions and "
            f"open groups depend on them. Make a new Learner(..., core=TorchCore({name}={value!r}))."
        )

    return property(attrgetter(f"settings.{name}"), refuse)


def _check_ddp(options: object, accumulate: int) -> None:
    """Check the arguments for DDP that a user has passed.

    Raises:
        CoreError: They are no mapping from names to values, or one of them cannot work here.
    """
    if options is None:
        return
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise CoreError(
            f"ddp is a mapping of arguments for DistributedDataParallel, got {options!r}. Write ddp={{'name': value}}."
        )
    refused = {
        "module": "the model is that of the learner",
        "device_ids": "the device is that of the core: TorchCore(device=...)",
        "output_device": "the device is that of the core: TorchCore(device=...)",
        "process_group": "it is torch's default group: call torch.distributed.init_process_group before Learner",
    }
    for name in ("broadcast_buffers", "forward_sync_buffers"):
        if options.get(name):
            refused[name] = "buffers are made equal at the end of each epoch, which costs less"
    if options.get("static_graph") and accumulate > 1:
        refused["static_graph"] = "with accumulate > 1 torch computes wrong gradients with it"
    for name, why in refused.items():
        if name in options:
            raise CoreError(f"ddp={{{name!r}: {options[name]!r}}} cannot be set: {why}. Leave it out.")


def _check_fsdp(parallel: object, shard: object, options: object, precision: Precision, compiles: object) -> None:
    """Check the arguments of `TorchCore` for sharded training.

    Raises:
        CoreError: An argument has a value that it cannot have, or needs ``parallel="fsdp"``.
    """
    if parallel != "fsdp":
        for name, value in (("shard", shard), ("fsdp", options)):
            if value is not None:
                raise CoreError(f'{name}={value!r} is for sharded training. Write parallel="fsdp" with it.')
        return
    listed = shard if isinstance(shard, (list, tuple)) else [shard]
    if not all(isinstance(each, type) and issubclass(each, torch.nn.Module) for each in listed) and (
        shard is not None and (isinstance(shard, (type, list, tuple)) or not callable(shard))
    ):
        raise CoreError(
            f"shard is a class of modules, a list of such classes, or a function of (name, module) that returns a "
            f"bool; got {shard!r}. Write shard=torch.nn.TransformerEncoderLayer."
        )
    if options is not None and (not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options)):
        raise CoreError(
            f"fsdp is a mapping of arguments for fully_shard, got {options!r}. Write fsdp={{'name': value}}."
        )
    refused = {
        "module": "the model is that of the learner",
        "ignored_params": "the gradients of these parameters would differ between the ranks",
    }
    for name, value in (options or {}).items():
        if name in refused:
            raise CoreError(f"fsdp={{{name!r}: {value!r}}} cannot be set: {refused[name]}. Leave it out.")
    if precision == "fp16":
        raise CoreError(
            "precision='fp16' scales the loss by a scaler that each rank would change alone, so it cannot be used with "
            "parallel='fsdp'. Use precision='bf16'."
        )
    if compiles is not False:
        raise CoreError(
            f"compile={compiles!r} compiles the model as a whole, and with parallel='fsdp' its parts are gathered one "
            f"by one. Leave compile= out, and compile these parts before: `for block in model.blocks: block.compile()`."
        )
