"""Where the contents of a checkpoint come from, and who writes them: this process alone, or all ranks.

`flowtrain.training.checkpoint.checkpoints.Checkpoints` calls a `Parts` at each place where ranks must act together.
`WholeParts` is that of one process, `flowtrain.training.checkpoint.rank_checkpoints.RankParts` that of several ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from flowtrain.callback.view import CheckpointRequest
from flowtrain.training.checkpoint.files import Writer
from flowtrain.training.checkpoint.rank_parts import check_size

__all__ = ["Parts", "WholeParts"]


class Parts(Protocol):
    """The parts of the checkpoints of one learner."""

    def compare(self, requests: Sequence[CheckpointRequest]) -> None:
        """Compare the requests of all ranks, each of which has come to a handler that may request a checkpoint.

        Raises:
            RankError: The ranks request different ones, so some would wait for others.
            RemoteError: A rank has failed at the event that requested them.
        """

    def drop(self, requests: Sequence[CheckpointRequest]) -> None:
        """Note that an error has dropped these requests on this rank, which other ranks may carry out."""

    def begin(self, finite: bool) -> bool:
        """Begin a checkpoint on all ranks.

        Args:
            finite: Whether the parameters and the last loss of this rank are finite.

        Returns:
            Whether they are on all ranks.
        """
        ...

    def gather(self, own: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the contents of a checkpoint, made of what `own` returns on each rank.

        Raises:
            Exception: What `own` has raised on this rank.
            CheckpointError: The state of another rank cannot be saved.
        """
        ...

    def write(self, writer: Writer, contents: dict[str, Any], request: CheckpointRequest) -> None:
        """Begin to write a checkpoint."""

    def note_load(self, path: Any) -> None:
        """Note that the learner was put into the state of a checkpoint."""

    def own(self, contents: dict[str, Any]) -> dict[str, Any]:
        """Return the contents of a file as this rank has written them."""
        ...

    def same_size(self, contents: Mapping[str, Any]) -> bool:
        """Tell whether as many processes have written a checkpoint as resume from it; warn if not.

        Raises:
            CheckpointError: It was taken within an epoch by another number of processes.
        """
        ...

    def seed_anew(self) -> None:
        """Seed the generators of a rank that the training of the resumed checkpoint did not have."""


class WholeParts:
    """The parts of checkpoints of a learner in one process, which has the whole state: a `Parts`."""

    def compare(self, requests: Sequence[CheckpointRequest]) -> None:
        """Do nothing: no other rank requests anything."""

    def drop(self, requests: Sequence[CheckpointRequest]) -> None:
        """Do nothing: no other rank carries them out."""

    def note_load(self, path: Any) -> None:
        """Do nothing: no other rank could have loaded another one."""

    def seed_anew(self) -> None:
        """Do nothing: the checkpoint has the generators of this process."""

    def begin(self, finite: bool) -> bool:
        """Return whether this process is finite."""
        return finite

    def gather(self, own: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the state of this process, which is all of it."""
        return own()

    def write(self, writer: Writer, contents: dict[str, Any], request: CheckpointRequest) -> None:
        """Let the writer write the contents to one file."""
        writer.submit(contents, request)

    def own(self, contents: dict[str, Any]) -> dict[str, Any]:
        """Return all contents."""
        return contents

    def same_size(self, contents: Mapping[str, Any]) -> bool:
        """Compare the number of processes with one."""
        return check_size(contents, 1, stacklevel=7)
