"""Pictures: another decoder reads the encoded bytes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Reader

from flowtrain.errors import LoggingError
from flowtrain.logging.backend import Figure, Image
from flowtrain.logging.pictures import figure_png, image_png, pixels


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_a_png_decodes_to_its_pixels(channels: int, mode: str) -> None:
    picture = torch.randint(0, 256, (5, 7, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    read = Reader.open(io.BytesIO(image_png(Image(picture))))
    assert (read.mode, read.size) == (mode, (7, 5))
    assert read.tobytes() == bytes(picture.flatten().tolist())
    assert image_png(Image(picture.permute(2, 0, 1))) == image_png(Image(picture))
    assert image_png(Image(picture.numpy())) == image_png(Image(picture))


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (torch.tensor([[-1.0, 0.5, 2.0, float("nan")]]), [0, 128, 255, 0]),
        (torch.tensor([[-1, 128, 300]]), [0, 128, 255]),
        (torch.tensor([[True, False]]), [255, 0]),
        (np.array([[0.0, 1.0]]), [0, 255]),
        (torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16, requires_grad=True), [0, 255]),
    ],
)
def test_values_become_bytes(image: Any, wanted: list[int]) -> None:
    assert pixels(image).flatten().tolist() == wanted


@pytest.mark.parametrize("shape", [(3,), (2, 5, 5), (8, 3, 5, 5), (0, 5), (5, 5, 2)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LoggingError, match=r"Image\(\.\.\.\) got torch\.float32 of shape .*; a picture is \(hei"):
        pixels(torch.zeros(shape))
    with pytest.raises(LoggingError, match=r"a tensor or array of pixels, and got a str 'picture': .* one by"):
        pixels("picture")
    with pytest.raises(LoggingError, match=r"Figure\(3\) takes a matplotlib\.figure\.Figure"):
        figure_png(Figure(3))
