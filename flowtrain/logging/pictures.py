"""Pictures as PNG: the pixels of an `Image`, and the drawing of a `Figure`.

The encoder uses only zlib (PNG specification, third edition, https://www.w3.org/TR/png-3/), so `Image` needs no further
package. It writes the rows of pixels one after the other, unfiltered. Equal pixels give equal bytes.
"""

from __future__ import annotations

import ctypes
import io
import struct
import zlib
from typing import Any

import torch

from flowtrain.errors import LoggingError
from flowtrain.errors.describing import describe
from flowtrain.logging.backend import Figure, Image

__all__ = ["figure_png", "image_png", "pixels", "png"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # PNG's colour type by the number of channels: grey, RGB, RGB with transparency


def image_png(image: Image) -> bytes:
    """Return an image as PNG."""
    return png(pixels(image.image))


def figure_png(figure: Figure) -> bytes:
    """Return a drawing as PNG, in its own size and resolution.

    Raises:
        LoggingError: `figure` holds no figure of matplotlib.
    """
    if not hasattr(figure.figure, "savefig"):
        raise LoggingError(f"Figure({figure.figure!r}) takes a matplotlib.figure.Figure; pixels are an Image(...).")
    buffer = io.BytesIO()
    # Without the version of matplotlib in the metadata, equal drawings give equal bytes.
    figure.figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def pixels(image: Any) -> torch.Tensor:
    """Return the pixels of a picture as bytes, of shape (height, width, channels), on the CPU.

    Args:
        image: The picture, as for `Image`.

    Raises:
        LoggingError: `image` has not the shape or the dtype of a picture.

    >>> pixels(torch.tensor([[0.0, 0.5, 2.0]])).flatten().tolist()
    [0, 128, 255]
    """
    try:
        found = torch.as_tensor(image).detach().cpu()
        found = found if found.layout is torch.strided else found.to_dense()
        shape = tuple(found.shape)  # a nested tensor has none
    except (TypeError, ValueError, RuntimeError) as error:
        raise LoggingError(
            f"Image(...) takes a tensor or array of pixels, and got a {describe(image)}: {error}. Log the pictures of "
            f"a batch one by one."
        ) from error
    if found.ndim == 2:
        found = found.unsqueeze(2)
    elif found.ndim == 3 and shape[0] in _COLOUR_TYPES:
        found = found.permute(1, 2, 0)
    if found.ndim != 3 or found.shape[2] not in _COLOUR_TYPES or 0 in found.shape or found.is_complex():
        raise LoggingError(
            f"Image(...) got {found.dtype} of shape {shape}; a picture is (height, width), (channels, height, width) "
            f"or (height, width, channels), with 1, 3 or 4 channels. Log the pictures of a batch one by one."
        )
    if found.is_floating_point():
        found = found.float().nan_to_num(0.0).clamp(0, 1).mul(255).round()
    elif found.dtype is torch.bool:
        found = found.to(torch.uint8) * 255
    else:
        found = found.to(torch.int64)  # torch cannot clamp the wide unsigned types of a picture of 16 bits
    return found.clamp(0, 255).to(torch.uint8).contiguous()


def png(picture: torch.Tensor) -> bytes:
    """Return bytes of shape (height, width, channels) as PNG."""
    height, width, channels = picture.shape
    unfiltered = torch.zeros(height, 1, dtype=torch.uint8)  # each row begins with the number of its filter: 0 for none
    rows = torch.cat([unfiltered, picture.reshape(height, width * channels)], dim=1).contiguous()
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    data = zlib.compress(ctypes.string_at(rows.data_ptr(), rows.numel()), 6)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
