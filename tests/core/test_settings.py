"""The settings of a core: values that it refuses, and attributes of the core that show them."""

from __future__ import annotations

import math
from typing import Any

import pytest

from flowtrain import CoreError, TorchCore


def limit(name: str, value: str) -> str:
    return f"{name}={value}: a limit is a number above zero. Write {name}=1.0, or None for no clipping."


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"precision": "fp8"}, "precision='fp8' is unknown. It is one of: 'fp32', 'bf16', 'fp16'."),
        ({"precision": ["fp16"]}, "precision=['fp16'] is unknown. It is one of: 'fp32', 'bf16', 'fp16'."),
        ({"accumulate": 0}, "accumulate is a whole number, at least 1, got 0."),
        ({"accumulate": 2.0}, "accumulate is a whole number, at least 1, got 2.0."),
        ({"accumulate": True}, "accumulate is a whole number, at least 1, got True."),
        ({"clip_grad_norm": 0.0}, limit("clip_grad_norm", "0.0")),
        ({"clip_grad_value": -1}, limit("clip_grad_value", "-1")),
        ({"clip_grad_norm": math.nan}, limit("clip_grad_norm", "nan")),
        ({"clip_grad_norm": "1"}, limit("clip_grad_norm", "'1'")),
        ({"clip_grad_value": 0}, limit("clip_grad_value", "0")),
        ({"clip_grad_value": True}, limit("clip_grad_value", "True")),
        ({"init_scale": -1}, "init_scale=-1: a scale is a number above zero, such as 65536.0."),
        ({"init_scale": 0.0}, "init_scale=0.0: a scale is a number above zero, such as 65536.0."),
        ({"init_scale": None}, "init_scale=None: a scale is a number above zero, such as 65536.0."),
        (
            {"compile": "eager"},
            "compile is True, False, \"loss\" or a mapping of arguments for torch.compile; got 'eager'. To compile "
            'model and loss as one with arguments write compile={"loss": True, "mode": ...}.',
        ),
        (
            {"compile": {"mode": "reduce-overhead"}, "accumulate": 2},
            "compile={'mode': 'reduce-overhead'} records CUDA graphs, which give the gradients of every batch in the "
            "same memory, and accumulate=2 adds them up. Use compile=True, or a mode without CUDA graphs such as "
            "'max-autotune-no-cudagraphs'.",
        ),
        ({"lag": -1}, "lag, in batches, or None for the device's own, is a whole number, at least 0, got -1."),
        ({"lag": True}, "lag, in batches, or None for the device's own, is a whole number, at least 0, got True."),
        ({"check_params": "yes"}, "check_params is True or False; got 'yes'."),
        ({"prefetch": "yes"}, "prefetch is True, False, None or a Transfer of your own; got 'yes'."),
        ({"channels_last": None}, "channels_last is True or False; got None."),
        ({"tf32": 1}, "tf32 is True, False or None; got 1."),
        ({"ddp": 3}, "ddp is a mapping of arguments for DistributedDataParallel, got 3. Write ddp={'name': value}."),
    ],
)
def test_values_that_mean_nothing(options: dict[str, Any], text: str) -> None:
    with pytest.raises(CoreError) as raised:
        TorchCore(**options)
    assert str(raised.value) == text


@pytest.mark.parametrize(("name", "value"), [("precision", "bf16"), ("accumulate", 4), ("clip_grad_norm", 0.1)])
def test_settings_of_a_core_are_not_assigned(name: str, value: Any) -> None:
    core = TorchCore(device="cpu")
    with pytest.raises(CoreError) as raised:
        setattr(core, name, value)
    assert str(raised.value) == (
        f"core.{name} = {value!r}: a core keeps the settings that it was made with, since compiled functions and open "
        f"groups depend on them. Make a new Learner(..., core=TorchCore({name}={value!r}))."
    )
    assert getattr(core, name) == getattr(core.settings, name)
