"""What a folder of checkpoints holds, in short: an epoch stands for its file."""

from __future__ import annotations

from pathlib import Path


def files(folder: Path) -> list[str]:
    """Return the checkpoints of a folder, as ``["1", "step-00000003"]``."""
    return sorted(each.name.removeprefix("epoch-000").removesuffix(".ckpt") for each in folder.glob("*.ckpt"))


def pointer(folder: Path, name: str) -> str:
    """Return the checkpoint that a pointer names, as ``"2"``."""
    return (folder / name).read_text().strip().removeprefix("epoch-000").removesuffix(".ckpt")
