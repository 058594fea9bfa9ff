"""Checkpoint files: whole or not there, found by pointers, and read with a message about what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import pytest
import torch

from flowtrain import CheckpointError
from flowtrain.training.checkpoint.files import FORMAT, VERSION, read, real_folder, replace, resolve, target


def saved(path: Path, **contents: object) -> Path:
    torch.save({"format": FORMAT, "version": VERSION, "flowtrain": "1", **contents}, path)
    return path


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path, points = tmp_path / "a.ckpt", list[tuple[str, bool]]()

    def write(file: IO[bytes]) -> None:
        file.write(b"new")

    replace(path, write, lambda at: points.append((at, path.exists())), "checkpoint")
    assert points == [("checkpoint begun", False), ("checkpoint written", False), ("checkpoint renamed", True)]
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


def test_what_fails_leaves_the_file_that_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    path.write_bytes(b"old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace(path, fail, lambda point: None, "checkpoint")
    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


def test_pointers_are_followed(tmp_path: Path) -> None:
    file = saved(tmp_path / "two.ckpt")
    (tmp_path / "latest").write_text("two.ckpt\n")
    assert target(tmp_path, "latest") == "two.ckpt"
    assert target(tmp_path, "best") == ""
    assert resolve(tmp_path) == resolve(str(tmp_path / "latest")) == resolve(file) == file
    assert read(tmp_path)["version"] == VERSION


def test_a_folder_without_a_checkpoint_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "epoch-0001.ckpt").touch()
    (tmp_path / ".epoch-0002.ckpt.tmp").touch()  # of a process that was killed
    with pytest.raises(
        CheckpointError, match=r"no file 'latest' in it \(it holds: epoch-0001\.ckpt\)\. Pass the folder"
    ):
        resolve(tmp_path)
    (tmp_path / "latest").write_text("gone.ckpt\n")
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*gone\.ckpt: no such file"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*nowhere: no such file"):
        resolve(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("contents", "text"),
    [
        ({"version": 99}, r"has version 99 of the format, written by flowtrain 1; this one reads 1 and 2\. Use the"),
        ({"format": "another"}, r"is no checkpoint of flowtrain: it holds dict\. For weights alone call"),
    ],
)
def test_another_format(contents: dict[str, object], text: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=text):
        read(saved(tmp_path / "a.ckpt", **contents))


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_file(kept: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.ckpt", weights=torch.arange(1000))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"a\.ckpt cannot be read as a checkpoint: .* It is truncated, or"):
        read(path)


def test_the_folder_of_a_file_is_without_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert real_folder(tmp_path / "link" / "a.ckpt") == str((tmp_path / "real").resolve())
