"""A remote file system that several processes see, and that has folders: that of this machine, under another name."""

from __future__ import annotations

from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

__all__ = ["shared"]


class Shared(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The file system of this machine, with addresses that begin with ``shared://``."""

    protocol = "shared"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("shared://")))


fsspec.register_implementation("shared", Shared, clobber=True)


def shared(folder: Path) -> str:
    """Return the address of a folder."""
    return f"shared://{folder}"
