"""Checkpoints in a remote folder: on fsspec's file systems in memory and of this machine, and on one that fails."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from flowtrain import (
    BatchEnd,
    Callback,
    CancelFittingException,
    CheckpointError,
    EpochBegin,
    Learner,
    Read,
    TrainingPhase,
    load_weights,
)
from flowtrain.callback.view import CheckpointRequest
from flowtrain.callbacks import Checkpointer, CustomCallback, LogMetrics
from flowtrain.errors import UsageError
from flowtrain.graph.executor import Mailbox
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner
from flowtrain.training.checkpoint.files import Writer, point, write_whole
from flowtrain.training.checkpoint.reading import find_file, read, target
from flowtrain.training.checkpoint.remote import Remote, Unreachable, place, real_path, written_at
from tests.support.remote import shared


class FailingFile(MemoryFile):  # type: ignore[misc]  # fsspec has no types
    """A file of which the n-th write fails."""

    def write(self, data: Any) -> int:
        Failing.writes -= 1
        if Failing.writes == 0:
            raise ConnectionResetError(104, "Connection reset by peer")
        return int(super().write(data))

    def commit(self) -> None:
        if Failing.commits is not None:
            raise Failing.commits
        super().commit()


class Failing(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A file system in memory that fails as it is told."""

    protocol = "failing"
    store: dict[str, Any] = {}  # noqa: RUF012  # as in the base: all instances share it
    pseudo_dirs: list[str] = [""]  # noqa: RUF012
    writes = -1
    """The number of writes until one fails; negative for none."""
    commits: Exception | None = None
    """The error of the end of an upload."""
    answers: Exception | None = None
    """The error of every question."""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("failing://")))

    def _open(self, path: str, mode: str = "rb", *more: Any, **options: Any) -> Any:
        if "r" in mode:
            return super()._open(path, mode, *more, **options)
        file = FailingFile(self, self._strip_protocol(path))
        if not self._intrans:
            file.commit()
        return file

    def info(self, path: str, **options: Any) -> Any:
        if Failing.answers is not None:
            raise Failing.answers
        return super().info(path, **options)

    def cat_file(self, path: str, *more: Any, **options: Any) -> Any:
        if Failing.answers is not None:
            raise Failing.answers
        return super().cat_file(path, *more, **options)


fsspec.register_implementation("failing", Failing, clobber=True)


@pytest.fixture(autouse=True)
def sound() -> Iterator[None]:
    yield
    Failing.writes, Failing.commits, Failing.answers = -1, None, None


@pytest.fixture(params=["memory", "failing", "shared", "file"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "shared":
        return shared(tmp_path / "runs" / "a")
    return f"file://{tmp_path}/runs" if request.param == "file" else f"{request.param}://{uuid4().hex}/runs/a"


@pytest.fixture
def failing() -> str:
    return f"failing://{uuid4().hex}/runs"


def names(folder: str) -> list[str]:
    return sorted(each.name for each in place(folder).iterdir())


# --- training


def noisy(*callbacks: Callback) -> Learner:
    """Return a learner whose result depends on the generators."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    return tiny_learner(*callbacks, model=model, optimizer=partial(torch.optim.SGD, lr=0.01))


def weights(learner: Learner) -> list[list[float]]:
    return [each.flatten().tolist() for each in learner.model.parameters()]


def stopping(batches: int) -> Callback:
    """Return a callback that ends a fit after some batches, as a kill does."""
    left = iter(range(batches - 1))

    def stop(learner: Any) -> None:
        if next(left, None) is None:
            raise CancelFittingException

    return CustomCallback(stop, BatchEnd)


@pytest.mark.parametrize("batches", [16, 41])
def test_a_fit_that_resumes_is_the_whole_fit_to_the_bit(batches: int, folder: str) -> None:
    whole = noisy()
    whole.fit(3)
    noisy(Checkpointer(folder, every_steps=1), stopping(batches)).fit(3, resume="auto")
    learner = noisy(Checkpointer(folder, every_steps=1))
    torch.manual_seed(99)
    learner.fit(3, resume="auto")
    assert weights(learner) == weights(whole)
    losses = [list(each.cbstate.metrics_step[TrainingPhase]["Loss"]) for each in (learner, whole)]
    assert losses[0] == losses[1]
    again = noisy(Checkpointer(f"{folder}-2"))
    again.load(f"{folder}/best")
    again.fit(4, resume=f"{folder}/epoch-0003.ckpt")
    assert again.cbstate.history[TrainingPhase].epochs == 4
    assert names(folder)[-1] == "latest"


def test_the_best_are_kept_and_the_others_removed(folder: str) -> None:
    learner = tiny_learner(Checkpointer(folder, keep_top_k=1, weights="safetensors"))
    learner.fit(4)
    assert names(folder) == ["best", "epoch-0004.ckpt", "epoch-0004.safetensors", "latest"]
    assert target(place(folder), "best") == "epoch-0004.ckpt"
    assert load_weights(folder) == load_weights(folder, "latest") == {"coeff": learner.model.coeff}
    assert torch.equal(read(f"{folder}/epoch-0004.ckpt")["model"][""]["coeff"], learner.model.coeff)


@pytest.mark.parametrize("damaged", ["cut", "gone"])
def test_a_damaged_latest_gives_way_to_the_one_before(damaged: str, failing: str) -> None:
    tiny_learner(Checkpointer(failing)).fit(3)
    system = fsspec.filesystem("failing")
    system.pipe(f"{failing}/epoch-0003.ckpt", system.cat(f"{failing}/epoch-0003.ckpt")[:-5])
    if damaged == "gone":
        system.rm(f"{failing}/epoch-0003.ckpt")
    learner = tiny_learner(Checkpointer(failing))
    with pytest.warns(UserWarning, match=rf"Instead, {failing}/epoch-0002\.ckpt is used, the one before it"):
        learner.fit(4, resume="auto")
    assert names(failing) == ["best", *(f"epoch-000{number}.ckpt" for number in range(1, 5)), "latest"]
    whole = tiny_learner()
    whole.fit(4)
    assert weights(learner) == weights(whole)


def test_a_run_in_the_folder_of_another_one_is_told_so(failing: str) -> None:
    tiny_learner(Checkpointer(failing)).fit(1)
    with pytest.warns(UserWarning, match=rf"folder {failing} holds the checkpoints of another run \(its latest is epo"):
        tiny_learner(Checkpointer(failing)).fit(1)


def test_two_folders_of_which_the_newer_one_is_resumed(failing: str, tmp_path: Path) -> None:
    def made() -> Learner:
        return tiny_learner(Checkpointer(failing, every=2), Checkpointer(tmp_path, monitor=None))

    made().fit(3)
    learner = made()
    learner.fit(4, resume="auto")
    assert learner.cbstate.history[TrainingPhase].epochs == 4
    assert target(place(failing), "latest") == "epoch-0004.ckpt"


def test_a_folder_that_moved_to_an_object_store_is_continued_there(failing: str, tmp_path: Path) -> None:
    """The run counts the files of the moved folder as its own, and removes those that it no longer keeps."""
    tiny_learner(Checkpointer(tmp_path, keep_top_k=1)).fit(2)
    fsspec.filesystem("failing").put(f"{tmp_path}/*", f"{failing}/")
    learner = tiny_learner(Checkpointer(failing, keep_top_k=1))
    learner.fit(3, resume="auto")
    assert names(failing) == ["best", "epoch-0003.ckpt", "latest"]


# --- failures


@pytest.mark.parametrize("write", [1, 2, 9, "commit"])
def test_an_upload_that_fails_leaves_the_last_checkpoint(write: int | str, failing: str) -> None:
    """It fails at the first write, in the middle, or when it is complete; the run continues exactly after that."""

    def fail(learner: Any) -> None:
        if learner.cbstate.history[TrainingPhase].epochs == 1:
            first.loop.checkpoints.writer.wait()
            Failing.writes = write if isinstance(write, int) else -1
            Failing.commits = None if isinstance(write, int) else TimeoutError("the upload was not completed")

    reads = {"cbstate.history": Read()}
    first = noisy(Checkpointer(failing), CustomCallback(fail, EpochBegin, TrainingPhase, reads))
    with pytest.raises(CheckpointError) as caught:
        first.fit(3)
    reason = "Connection reset by peer" if isinstance(write, int) else "the upload was not completed"
    assert reason in str(caught.value)
    assert str(caught.value).startswith(f"The checkpoint {failing}/epoch-0002.ckpt could not be written: ")
    assert f"The last complete one is {failing}/epoch-0001.ckpt." in str(caught.value)
    assert names(failing) == ["best", "epoch-0001.ckpt", "latest"]
    Failing.writes, Failing.commits = -1, None
    learner = noisy(Checkpointer(failing))
    learner.fit(3, resume="auto")
    whole = noisy()
    whole.fit(3)
    assert weights(learner) == weights(whole)


def test_a_run_that_cannot_write_its_first_checkpoint_leaves_no_records(failing: str, tmp_path: Path) -> None:
    """The next run begins anew, and would write the same records after them."""
    Failing.writes = 1
    learner = tiny_learner(Checkpointer(failing), LogMetrics(JsonlBackend(tmp_path / "log")))
    with pytest.raises(CheckpointError, match=r"start\.ckpt could not be written: .* There is no earlier checkpoint\."):
        learner.fit(1, resume="auto")
    learner.close()
    assert (tmp_path / "log").read_bytes() == b""
    Failing.writes, Failing.answers = 1, ConnectionError("reset")
    writer = Writer(Mailbox())
    writer.submit({}, CheckpointRequest(f"{failing}/a.ckpt"))
    with pytest.raises(CheckpointError, match=r"does not answer now; an earlier checkpoint is as it was\. Make"):
        writer.wait()


def test_no_answer_is_not_no_checkpoint(failing: str) -> None:
    """Otherwise a fit would begin anew, or continue from an earlier checkpoint, because of a fault of the network."""
    tiny_learner(Checkpointer(failing)).fit(2)
    before = {name: fsspec.filesystem("failing").cat(f"{failing}/{name}") for name in names(failing)}
    learner = tiny_learner(Checkpointer(failing))
    Failing.answers = PermissionError("403 Forbidden")
    for call in (lambda: learner.fit(3, resume="auto"), lambda: learner.load(failing), lambda: load_weights(failing)):
        with pytest.raises(
            CheckpointError, match=rf"{failing}.* cannot be used: PermissionError: 403 Forbidden\. Check"
        ):
            call()
    Failing.answers = None
    assert before == {name: fsspec.filesystem("failing").cat(f"{failing}/{name}") for name in names(failing)}
    assert learner.cbstate.history[TrainingPhase].epochs == 0
    Failing.answers = ConnectionError("reset")
    with pytest.raises(CheckpointError, match=r"must name epoch-0001\.ckpt before training continues"):
        point(place(failing), "latest", "epoch-0001.ckpt")


def test_errors_say_where_nothing_is(failing: str) -> None:
    for path, text in (
        (failing, f"There is no checkpoint {failing}: no such file"),
        (f"{failing}/latest", f"There is no checkpoint {failing}/latest: no such file"),
        (f"{failing}/a.ckpt", f"There is no checkpoint {failing}/a.ckpt: no such file"),
    ):
        with pytest.raises(CheckpointError) as caught:
            tiny_learner().load(path)
        assert str(caught.value).startswith(text)
    fsspec.filesystem("failing").pipe(f"{failing}/notes.txt", b"text")
    with pytest.raises(CheckpointError, match=r"has no checkpoint that is complete: .* \(it holds: notes\.txt\)"):
        tiny_learner().load(failing)
    with pytest.raises(CheckpointError, match=r"notes\.txt cannot be read as a checkpoint"):
        tiny_learner().load(f"{failing}/notes.txt")


# --- places


def test_a_place_is_a_path_or_an_address(tmp_path: Path) -> None:
    for given in ("runs/a", "/runs/a", "C:/runs", "C:\\runs", "", "a:b", "./runs:/a", tmp_path):
        assert place(given) == Path(given)
    assert place(f"file://{tmp_path}") == place(f"local://{tmp_path}") == tmp_path
    found = place("memory://bucket/runs/")
    assert (str(found), os.fspath(found), repr(found)) == (
        *["memory://bucket/runs"] * 2,
        "Remote('memory://bucket/runs')",
    )
    assert place(found) is found
    assert (found.name, str(found.parent), real_path(found)) == ("runs", "memory://bucket", str(found))
    file = found / "a.b.ckpt"
    assert str(file.with_suffix(".safetensors")) == "memory://bucket/runs/a.b.safetensors"
    assert str(file.with_name("latest")) == "memory://bucket/runs/latest"
    assert pickle.loads(pickle.dumps(file)) == file != found
    assert {file, found / "a.b.ckpt"} == {file}
    assert real_path(Path(".")) == os.path.realpath(".")


def test_mistakes_in_addresses_say_what_to_write() -> None:
    for given in (Path("s3://bucket/a"), "s3:/bucket/a"):
        with pytest.raises(UsageError, match=r"is no address: it has one slash .*Write 's3://bucket/a', as a text"):
            Checkpointer(given)
    for given in ("s3://", "file:///"):
        with pytest.raises(UsageError, match=rf"The address '{given}' names no folder\. Write an address such as 's3:"):
            Checkpointer(given)
    with pytest.raises(
        CheckpointError, match=r"The address s4://bucket cannot be used: Protocol not known: s4\. Write"
    ):
        Checkpointer("s4://bucket/a")
    with pytest.raises(CheckpointError, match=r"The address ftps?://.*|The address .* needs a package"):
        Checkpointer("hdfs://host/a")


def test_a_file_is_what_was_there_or_all_of_the_new_one(failing: str) -> None:
    file, points = place(failing) / "a", list[tuple[str, bool]]()
    assert (file.exists(), file.is_file(), list(place(failing).iterdir())) == (False, False, [])
    write_whole(file, lambda opened: bytes_to(opened, b"old"), lambda at: points.append((at, file.exists())), "x")
    assert points == [("x begun", False), ("x written", False), ("x renamed", True)]
    assert (file.read_text("utf-8"), file.is_file(), file.is_dir(), file.parent.is_dir()) == ("old", True, False, True)
    assert written_at(file) > 0
    Failing.writes = 2
    with pytest.raises(Unreachable, match="ConnectionResetError"):
        write_whole(file, lambda opened: bytes_to(opened, b"new", b"er"), lambda at: None, "x")
    assert isinstance(file, Remote)
    assert (file.read_text("utf-8"), str(find_file(file))) == ("old", str(file))
    file.unlink()
    file.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        file.unlink()


def bytes_to(file: Any, *parts: bytes) -> None:
    for part in parts:
        file.write(part)
