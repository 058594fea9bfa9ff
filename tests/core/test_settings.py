"""Settings: what a core can be told; what means nothing is named with its value."""

from __future__ import annotations

from typing import Any

import pytest

from flowtrain.core.settings import Settings
from flowtrain.errors import CoreError


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"precision": "fp8"}, "precision='fp8' is unknown. It is one of: 'fp32'"),
        ({"accumulate": 0}, "accumulate is a whole number, at least 1, got 0."),
        ({"accumulate": True}, "accumulate is a whole number, at least 1, got True."),
        ({"clip_grad_norm": -1.0}, "clip_grad_norm must be a positive number, or None for no clipping; got -1.0."),
        ({"clip_grad_value": 0}, "clip_grad_value must be a positive number, or None for no clipping; got 0."),
        ({"clip_grad_norm": float("nan")}, "clip_grad_norm must be a positive number"),
        ({"init_scale": 0.0}, "init_scale must be a positive number, such as 65536.0; got 0.0."),
        ({"lag": -1}, "lag, in batches, or None for the device's own, is a whole number, at least 0, got -1."),
        ({"lag": True}, "lag, in batches, or None for the device's own, is a whole number, at least 0, got True."),
        ({"prefetch": "yes"}, "prefetch is True, False or a Transfer of your own; got 'yes'."),
        ({"channels_last": None}, "channels_last is True, False; got None."),
        ({"tf32": 1}, "tf32 is True, False or None; got 1."),
    ],
)
def test_what_means_nothing(given: dict[str, Any], text: str) -> None:
    with pytest.raises(CoreError) as caught:
        Settings(**given)
    assert text in str(caught.value)


def test_what_means_something() -> None:
    settings = Settings(accumulate=4, clip_grad_norm=1, lag=0, tf32=False)
    assert (settings.accumulate, settings.clip_grad_norm, settings.lag, settings.tf32) == (4, 1, 0, False)
    assert (Settings().precision, Settings().lag, Settings().clip_grad_value) == ("fp32", None, None)
