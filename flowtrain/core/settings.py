"""The settings of a core: the arguments of `flowtrain.core.torch_core.TorchCore`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch

from flowtrain.core.compile import check_compile
from flowtrain.core.data_parallel import check_ddp
from flowtrain.core.precision import DTYPES, Precision
from flowtrain.core.prefetch import Transfer
from flowtrain.core.sharding import Shard, check_fsdp
from flowtrain.core.world import Parallel
from flowtrain.errors import CoreError, is_a, is_positive, whole_number

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
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
    shard: Shard | None = None
    fsdp: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            known = ", ".join(map(repr, DTYPES))
            raise CoreError(f"precision={self.precision!r} is unknown. It is one of: {known}.")
        object.__setattr__(self, "accumulate", whole_number("accumulate", self.accumulate, error=CoreError))
        for name, limit in (("clip_grad_norm", self.clip_grad_norm), ("clip_grad_value", self.clip_grad_value)):
            if limit is not None and not is_positive(limit):
                raise CoreError(f"{name} must be a positive number, or None for no clipping; got {limit!r}.")
        if not is_positive(self.init_scale):
            raise CoreError(f"init_scale must be a positive number, such as 65536.0; got {self.init_scale!r}.")
        if self.lag is not None:
            lag = whole_number("lag, in batches, or None for the device's own,", self.lag, least=0, error=CoreError)
            object.__setattr__(self, "lag", lag)
        if self.prefetch is not None and not is_a(self.prefetch, (bool, Transfer)):
            raise CoreError(f"prefetch is True, False, None or a Transfer of your own; got {self.prefetch!r}.")
        for name, value, also in (("channels_last", self.channels_last, ""), ("tf32", self.tf32, " or None")):
            if not is_a(value, bool) and not (also and value is None):
                raise CoreError(f"{name} is True, False{also}; got {value!r}.")
        check_compile(self.compile, self.accumulate)
        choices: dict[str, tuple[object, tuple[object, ...]]] = {
            "parallel": (self.parallel, ("auto", "ddp", "fsdp", None)),
            "uneven": (self.uneven, ("stop", "error")),
        }
        for name, (choice, possible) in choices.items():
            if choice not in possible:
                raise CoreError(f"{name}={choice!r} is unknown. It is one of: {', '.join(map(repr, possible))}.")
        check_ddp(self.ddp, self.accumulate)
        if self.parallel == "fsdp" and self.ddp is not None:
            raise CoreError(f"ddp={self.ddp!r} is for parallel='ddp'. Write fsdp={{...}} with parallel='fsdp'.")
        check_fsdp(self.parallel, self.shard, self.fsdp, self.precision, self.compile)
