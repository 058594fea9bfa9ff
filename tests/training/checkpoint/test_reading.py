"""Checkpoint files are found through pointers, and refused with a message about what is wrong."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from flowtrain import (
    CheckpointError,
    UsageError,
    load_weights,
)
from flowtrain.callbacks import Checkpointer
from flowtrain.testing import tiny_learner
from flowtrain.training.checkpoint.reading import FORMAT, VERSION, find_file, read, real_folder, target
from tests.support.untyped import untyped


def saved(path: Path, **contents: object) -> Path:
    torch.save({"format": FORMAT, "version": VERSION, "flowtrain": "1", **contents}, path)
    return path


def test_pointers_are_followed(tmp_path: Path) -> None:
    file = saved(tmp_path / "two.ckpt")
    (tmp_path / "latest").write_text("two.ckpt\n")
    assert target(tmp_path, "latest") == "two.ckpt"
    assert target(tmp_path, "best") == ""
    assert find_file(tmp_path) == find_file(str(tmp_path / "latest")) == find_file(file) == file
    assert read(tmp_path)["version"] == VERSION


def test_a_folder_without_a_checkpoint_says_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "epoch-0001.ckpt").touch()
    (tmp_path / ".epoch-0002.ckpt.tmp").touch()  # the temporary file of a killed process
    with pytest.raises(
        CheckpointError, match=r"no file 'latest' in it \(it holds: epoch-0001\.ckpt\)\. Pass the folder"
    ):
        find_file(tmp_path)
    (tmp_path / "latest").write_text("gone.ckpt\n")
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*gone\.ckpt: no such file"):
        find_file(tmp_path)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint .*nowhere: no such file"):
        find_file(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("contents", "text"),
    [
        ({"version": 99}, r"has version 99 of the format, written by flowtrain 1; this one reads 1 to 3\. Use the"),
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
    with pytest.raises(CheckpointError, match=r"a\.ckpt cannot be read as a checkpoint: .* It is truncated, da"):
        read(path)


def test_the_folder_of_a_file_is_without_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert real_folder(tmp_path / "link" / "a.ckpt") == str((tmp_path / "real").resolve())


def test_weights_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no checkpoint that is complete: there is no file 'latest'"):
        load_weights(tmp_path)
    tiny_learner(Checkpointer(tmp_path, monitor=None), n_batches=1).fit(1)
    with pytest.raises(CheckpointError, match=r"counts as the best.*Write load_weights\(path, 'latest'\)"):
        load_weights(tmp_path)
    with pytest.raises(UsageError, match=r"which='last'\): which is 'best' or 'latest'"):
        load_weights(tmp_path, untyped("last"))
    with pytest.raises(UsageError, match=r"load_weights\(3\) takes the folder"):
        load_weights(untyped(3))


def flipped(path: Path, place: int, bit: int) -> None:
    """Flip a bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    """The first and last bytes with all of their bits, and random ones between them."""
    tiny_learner(Checkpointer(tmp_path), n_batches=1).fit(1)
    path, draw = tmp_path / "epoch-0001.ckpt", random.Random(0)
    size = path.stat().st_size
    ends = [(place, bit) for place in (*range(8), *range(size - 50, size)) for bit in range(8)]
    for place, bit in [*ends, *((draw.randrange(size), draw.randrange(8)) for _ in range(200))]:
        flipped(path, place, bit)
        with pytest.raises(CheckpointError, match="It is truncated, damaged, or something else"):
            read(path)
        flipped(path, place, bit)
    assert read(path)["finite"]


def test_a_flipped_bit_of_an_early_checkpoint_is_noticed(tmp_path: Path) -> None:
    """Earlier versions wrote no checksum of the file; each part of it has one."""
    path = saved(tmp_path / "a.ckpt", weights=torch.full((1000,), 2.95))
    assert read(path)["weights"][0] == torch.tensor(2.95)
    flipped(path, path.read_bytes().index(torch.full((10,), 2.95).numpy().tobytes()) + 402, 4)
    with pytest.raises(CheckpointError, match=r"its part .*data/0 has another checksum than it was written with"):
        read(path)


def test_torch_reads_a_file_with_its_checksum(tmp_path: Path) -> None:
    tiny_learner(Checkpointer(tmp_path), n_batches=1).fit(1)
    assert torch.load(tmp_path / "epoch-0001.ckpt", weights_only=True)["model"][""]["coeff"].shape == ()
    assert (tmp_path / "epoch-0001.ckpt").read_bytes()[-24:-8] == b"flowtrain crc32 "


@pytest.mark.parametrize("damaged", ["the newest file", "the two newest files", "the pointer", "a file that is gone"])
def test_a_damaged_latest_gives_way_to_the_one_before(damaged: str, tmp_path: Path) -> None:
    """The fit continues from there, with the result of the whole fit, and removes what it abandons."""
    tiny_learner(Checkpointer(tmp_path, keep_top_k=3), n_batches=2).fit(3)
    epoch = 1 if "two" in damaged else 3 if "pointer" in damaged else 2
    if "pointer" in damaged:
        (tmp_path / "latest").write_bytes(b"\xff")
    elif "gone" in damaged:
        (tmp_path / "epoch-0003.ckpt").unlink()
    for name in ("epoch-0003.ckpt", "epoch-0002.ckpt")[: (0 if epoch == 3 or "gone" in damaged else 3 - epoch)]:
        flipped(tmp_path / name, 5000, 3)
    with pytest.warns(UserWarning, match=rf"Instead, .*epoch-000{epoch}\.ckpt is used, the one before it") as caught:
        weights = load_weights(tmp_path, "latest")
    assert list(weights) == ["coeff"]
    assert str(caught[0].message).startswith(
        f"The file {tmp_path}/latest names no checkpoint: it is empty or damaged" if epoch == 3
        else f"There is no checkpoint {tmp_path}/epoch-0003.ckpt" if "gone" in damaged
        else f"{tmp_path}/epoch-0003.ckpt cannot be read as a checkpoint: it has "
    )  # fmt: skip
    with tiny_learner(Checkpointer(tmp_path, keep_top_k=3), n_batches=2) as learner:
        with pytest.warns(UserWarning, match="is used, the one before it"):
            learner.fit(4, resume="auto")
        whole = tiny_learner(n_batches=2)
        whole.fit(4)
        assert torch.equal(learner.model.coeff, whole.model.coeff)
    for path in tmp_path.glob("*.ckpt"):
        assert read(path)["format"] == FORMAT


def test_a_damaged_checkpoint_without_another_is_an_error(tmp_path: Path) -> None:
    tiny_learner(Checkpointer(tmp_path, keep_top_k=1), n_batches=1).fit(1)
    flipped(tmp_path / "epoch-0001.ckpt", 5000, 3)
    with pytest.raises(CheckpointError, match=r"epoch-0001\.ckpt cannot be read as a checkpoint: it has \d+ bytes"):
        tiny_learner(Checkpointer(tmp_path)).fit(2, resume="auto")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        read(tmp_path / "best")


def test_values_that_are_not_finite_do_not_replace_a_damaged_checkpoint(tmp_path: Path) -> None:
    tiny_learner(Checkpointer(tmp_path), n_batches=1).fit(2)
    contents = torch.load(tmp_path / "epoch-0001.ckpt", weights_only=True)
    torch.save({**contents, "finite": False}, tmp_path / "epoch-0001.ckpt")
    flipped(tmp_path / "epoch-0002.ckpt", 5000, 3)
    with pytest.raises(CheckpointError, match=r"epoch-0002\.ckpt cannot be read"):
        read(tmp_path)
