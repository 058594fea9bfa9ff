"""Checkpoints of several ranks: the main rank writes one file, with the parts of all ranks in it.

All ranks request the same checkpoints at the same points, copy their state there, and send their parts to the main rank
(`flowtrain.training.checkpoint.rank_parts`). Training continues while the main rank writes. Every rank resumes from the
file, which therefore lies in a folder that all of them can read.

If the model is sharded, each rank also writes the pieces that it has of the sharded tensors, on the thread of its
writer (`flowtrain.training.checkpoint.shard_files`). There the ranks tell each other, over a process group for this
alone, whether they could write them. Only then does the main rank write the file, so that it is complete or not there.
"""

from __future__ import annotations

import random
import secrets
import shutil
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowtrain.callback.view import NO_REQUEST, CheckpointRequest
from flowtrain.core.replica import Replica
from flowtrain.core.world import World
from flowtrain.data.rank_batches import fingerprint
from flowtrain.errors import CheckpointError, RankError, RemoteError, text_of
from flowtrain.graph.plan_texts import Description, first_difference
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain.training.checkpoint.files import Writer, save, write_whole
from flowtrain.training.checkpoint.rank_parts import check_size, digests, part_of, reduced
from flowtrain.training.checkpoint.reading import IN_PIECES, find_file
from flowtrain.training.checkpoint.remote import Remote, place
from flowtrain.training.checkpoint.shard_files import shard_folder, shard_name
from flowtrain.training.failures import Failures

__all__ = ["RankParts", "check_shapes"]


class _Asks(NamedTuple):
    """What a rank tells where ranks may begin a checkpoint.

    Attributes:
        requests: The requests of its handlers, as texts.
        reason: Why it takes no part, as text; empty if it does.
    """

    requests: tuple[str, ...]
    reason: str


def check_shapes(found: Sequence[Description]) -> None:
    """Check that the buffers of the main rank can be sent to all others.

    Args:
        found: The `RankParts.shapes` of all ranks, in their order.

    Raises:
        RankError: A rank has other buffers than the main rank, or of other shapes.
    """
    difference = first_difference(found) if found else ""
    if difference:
        raise RankError(
            f"The ranks have different buffers, and those of the main rank are sent to all: {difference}. Let every "
            f"rank make or enlarge a buffer in the same batch; or keep the tensor in an attribute that is no buffer."
        )


class RankParts:
    """The parts of the checkpoints of one learner on one of several ranks: a `Parts`.

    Args:
        world: The ranks.
        replica: The models of this rank.
        state: The state of the learner.
    """

    def __init__(self, world: World, replica: Replica, state: LearnerState) -> None:
        self._world, self._replica, self._state = world, replica, state
        self._writers: World | None = None  # the ranks, for the exchanges of the threads that write shards
        self._reseed = False  # whether the generators of the checkpoint belong to another number of ranks
        self._loads: list[str] = []  # the files that were loaded since the last epoch began
        self._missed = False  # whether an error has dropped requests here that the other ranks carry out
        self._refused = False  # whether the ranks have just told each other that they carry out none

    # --- take

    def drop(self, requests: Sequence[CheckpointRequest]) -> None:
        """Note that requests were dropped here, unless all ranks have just refused them."""
        self._missed = self._missed or (bool(requests) and not self._refused)

    def miss(self, failure: BaseException | None) -> None:
        """Tell the other ranks, which compare their requests now, that this one has dropped its own, if it has.

        Args:
            failure: The error that has dropped them; ``None`` if the other ranks know of it, and compare nothing.
        """
        if self._missed and failure is not None and not self._world.lost:
            self._world.exchange(_Asks((), _reason(failure)))
        self._missed = self._refused = False

    def compare(self, requests: Sequence[CheckpointRequest]) -> None:
        """Exchange the requests of all ranks, and raise if they differ or a rank has failed."""
        asked = tuple(_described(request) for request in requests if request is not NO_REQUEST)
        found = self._world.exchange(_Asks(asked, ""))
        failed = {
            rank: getattr(each, "reason", "") or "it has come to another point"
            for rank, each in enumerate(found)
            if not isinstance(each, _Asks) or each.reason
        }
        self._refused = bool(failed) or any(each.requests != asked for each in found)
        if failed:
            raise RemoteError("; ".join(f"rank {rank}: {reason}" for rank, reason in failed.items()), tuple(failed))
        if self._refused:
            shown = "; ".join(f"rank {rank}: {', '.join(each.requests) or 'none'}" for rank, each in enumerate(found))
            raise RankError(
                f"The ranks request different checkpoints ({shown}), and each checkpoint needs all ranks. Let a "
                f"callback decide by what is the same on every rank, as the number of the event or "
                f"cbstate.metrics_epoch, and not by the rank, the clock, or its own batch."
            )

    def begin(self, finite: bool) -> bool:
        """Agree whether all ranks are finite, and give all of them the buffers of the main rank."""
        found = self._world.exchange((finite, self.shapes()))
        check_shapes([shapes for _, shapes in found])
        self._replica.share_buffers()
        return all(each for each, _ in found)

    def shapes(self) -> Description:
        """Return the shapes of all buffers by path, which `check_shapes` compares before the buffers are sent."""
        models = by_name(self._state.model).items()
        named = (pair for root, model in models for pair in model.named_buffers(root))
        return [(f"model.{name}", f"{buffer.dtype} of shape {tuple(buffer.shape)}") for name, buffer in named]

    def gather(self, own: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the contents with the parts of all ranks; the others than the main rank get just their own."""
        failures = Failures()
        contents = failures.attempt(own)
        known = digests(contents) if self._world.main and contents is not None else {}
        found = self._world.exchange((_reason(failures.worst), known, secrets.token_hex(4)))
        failures.raise_worst()
        assert contents is not None
        wrong = [f"rank {rank}: {reason}" for rank, (reason, _, _) in enumerate(found) if reason]
        if wrong:
            raise CheckpointError("; ".join(wrong))
        _, known, token = found[0]
        parts = self._world.gather(None if self._world.main else reduced(contents, known))
        if "shards" in contents:
            self._writers = self._writers or self._world.beside()
        return {**contents, "ranks": parts[1:], "token": token}

    def write(self, writer: Writer, contents: dict[str, Any], request: CheckpointRequest) -> None:
        """Let the main rank write the file, and every rank its pieces of a sharded model."""
        token, pieces = contents.pop("token", ""), contents.pop("shards", None)
        if pieces is None:
            if self._world.main:
                writer.submit(contents, request)
            return
        if isinstance(place(request.path), Remote):  # on all ranks alike, so none waits for another one
            raise CheckpointError(
                f"The checkpoint {request.path} is of a sharded model, of which each rank writes a part, and a remote "
                f"folder takes no parts. Write Checkpointer(folder) with a folder that all ranks can write to."
            )
        folder = shard_folder(Path(request.path), token)
        named = {**contents, "version": IN_PIECES, "shards": folder.name, "shard count": self._world.size}
        writer.submit(named if self._world.main else None, request, self._with_shards(writer, folder, pieces))

    @contextmanager
    def _with_shards(self, writer: Writer, folder: Path, pieces: list[Any]) -> Generator[None]:
        """Write the pieces of this rank, and give a context in which the main rank writes the file of the checkpoint.

        Runs on the thread of the writer. The ranks meet twice: before the file is written, and when it is.

        Raises:
            BaseException: This rank could not write.
            CheckpointError: Another rank could not.
            RemoteError: Another rank has ended.
        """
        try:
            with self._agreed():
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / shard_name(self._world.rank)
                write_whole(path, partial(save, pieces), writer.reached, "shards")
        except BaseException:
            if self._world.main:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._agreed():
            yield

    @contextmanager
    def _agreed(self) -> Generator[None]:
        """Give a context that fails on all ranks if it fails on one, with the errors of `_with_shards`."""
        failures = Failures()
        with failures:
            yield
        assert self._writers is not None
        reasons = self._writers.exchange("; ".join(map(text_of, failures)))
        failures.raise_worst()
        if any(reasons):
            raise CheckpointError("; ".join(f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason))

    # --- restore

    def note_load(self, path: Any) -> None:
        """Note the name of the file that was loaded, by which `loaded` lets the ranks notice a difference."""
        try:
            self._loads.append(find_file(path).name)
        except CheckpointError:  # its pointer is damaged, and the checkpoint before was loaded
            self._loads.append(Path(path).name)

    def loaded(self) -> dict[str, str]:
        """Return the names of the files that were loaded since the last call, and a fingerprint of what they gave."""
        names, self._loads = self._loads, []
        if not names:
            return {}
        shards = any(hasattr(param, "full_tensor") for param in self._state.params.values())
        content = "" if shards else fingerprint(("", dict(self._state.params)))
        return {"load": " and ".join(names), "content": content}

    def own(self, contents: dict[str, Any]) -> dict[str, Any]:
        """Return the part of this rank in the contents of a file."""
        return part_of(contents, self._world.rank, self._world.size)

    def same_size(self, contents: Mapping[str, Any]) -> bool:
        """Compare the number of ranks; if it has changed, `seed_anew` seeds the generators."""
        same = check_size(contents, self._world.size, stacklevel=7 if self._world.main else None)
        self._reseed = not same
        return same

    def seed_anew(self) -> None:
        """Seed the generators of this rank, if it is not the main one, after another number of ranks."""
        if self._reseed and self._world.rank:
            seed = int(torch.randint(2**62, ()).item()) + self._world.rank  # drawn from the generator of the main rank
            torch.manual_seed(seed)
            random.seed(seed)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(seed % 2**32)


def _reason(failure: BaseException | None) -> str:
    """Return the failure of a rank for the others; the text of an error of checkpoints alone, empty without one."""
    if failure is None or isinstance(failure, CheckpointError):
        return "" if failure is None else str(failure)
    return text_of(failure)


def _described(request: CheckpointRequest) -> str:
    """Return the file of a request and what is done with it, without the folder, whose path may differ by machine."""
    when = "weights to load, " if request.loads else "at an interrupt, " if request.on_interrupt else ""
    return f"{when}{place(request.path).name}"
