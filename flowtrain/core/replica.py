"""What a loop needs from the models of one learner, whether one process trains them or several do.

There are three implementations of `Replica`: `Single` for one process, `flowtrain.core.data_parallel.DataParallel`,
where every rank has the whole models, and `flowtrain.core.sharding.Sharded`, where every rank has a part. With the last
two the ranks exchange *flags* in each training batch: numbers by which they decide together how the batch ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

import torch

from flowtrain.core.unsent_gradients import UnsentGradients

__all__ = ["FIRST_FAILURE", "FLAGS", "Replica", "Single"]

FLAGS: Final = 8
"""The number of flags; `flowtrain.training.ranks.sync_points` says what each of them means."""

FIRST_FAILURE: Final = 4
"""The first of the flags that mean a failure, by its index. If any rank sets one of them, no rank makes the update."""


class Replica(Protocol):
    """The models of one learner in this process."""

    @property
    def runs_bundled_steps(self) -> bool:
        """Whether the batches of a bundled phase run through `model` and `backward`, which know the other ranks."""
        ...

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward pass is a collective, in evaluation too, so that all ranks evaluate together."""
        ...

    @property
    def unsent(self) -> UnsentGradients | None:
        """The gradients that are kept beside the parameters; ``None`` if all are those of the parameters."""
        ...

    @property
    def syncs_gradients(self) -> bool:
        """Whether the gradients of this batch travel in its backward pass."""
        ...

    @property
    def has_sync_point(self) -> bool:
        """Whether this batch has a sync point in its backward pass, or right before."""
        ...

    @property
    def model(self) -> Callable[..., Any]:
        """The function by which a bundled step of training runs the model, if `runs_bundled_steps`."""
        ...

    def watch_nan(self, seen: torch.Tensor | None) -> None:
        """Set a tensor of shape ``()``, which is 1 after a NaN loss of this rank, to 1 after that of any rank too."""

    def prepare(self) -> None:
        """Be ready for a batch; all ranks call this when other parameters may be trained than before."""

    @property
    def prepared(self) -> bool:
        """Whether the models train the same parameters as at the last call of `prepare`."""
        ...

    def set_gradient_sync(self, wanted: bool) -> None:
        """Say whether the gradients of the next batch travel: not if its accumulation group has further batches."""

    def backward(self, loss: torch.Tensor, flags: Sequence[int]) -> list[int]:
        """Run the backward pass of a loss, and return the sums of the flags over all ranks.

        Args:
            loss: A tensor with one element, with its graph.
            flags: The flags of this rank, `FLAGS` numbers; the first one is 0 in a training batch.

        Raises:
            RemoteError: A rank has ended or stands still.
        """
        ...

    def leave(self, flags: Sequence[int]) -> list[int]:
        """Take part in the batch of the other ranks without a loss, up to its sync point; return the sums of the flags.

        One of the flags of this rank must mean a failure, so that no rank uses the gradients.
        """
        ...

    def skip_unsent_batch(self) -> None:
        """Take part in a batch of the other ranks that neither sends gradients nor has a sync point."""

    def finish_forward(self) -> bool:
        """Take part in what is left of the present forward pass, without computing anything.

        Returns:
            Whether this rank has come out of the forward pass; otherwise the other ranks wait at a sync point before
            it or within the first one.
        """
        ...

    def average(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Set the gradients of parameters to their means over all ranks, if the backward pass has not sent them.

        The gradients of a NaN loss spread to all ranks with the means, so before that the tensor of `watch_nan` is set
        to 1 on all of them.
        """

    def share_buffers(self) -> None:
        """Set the buffers of all ranks, such as the statistics of BatchNorm, to those of the main rank."""


class Single:
    """The models of a learner that one process trains alone: there is nobody to send anything to, or to wait for.

    Args:
        model: The function that runs the model.
    """

    runs_bundled_steps = forward_is_collective = False
    unsent: UnsentGradients | None = None
    syncs_gradients = has_sync_point = prepared = True

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model

    def watch_nan(self, seen: torch.Tensor | None) -> None:
        """Do nothing: no other rank has a NaN."""

    def prepare(self) -> None:
        """Do nothing: the model runs as it is."""

    def skip_unsent_batch(self) -> None:
        """Do nothing: there is no batch of other ranks."""

    def average(self, params: Iterable[torch.nn.Parameter]) -> None:
        """Do nothing: the gradients of this process are their own means."""

    def share_buffers(self) -> None:
        """Do nothing: there is nobody to share with."""

    def set_gradient_sync(self, wanted: bool) -> None:
        """Note whether the batch fills its group; nothing is sent."""
        self.syncs_gradients = self.has_sync_point = wanted

    def backward(self, loss: torch.Tensor, flags: Sequence[int]) -> list[int]:
        """Run the backward pass, and return the flags of this process as the sums."""
        loss.backward()
        return [*flags]

    def leave(self, flags: Sequence[int]) -> list[int]:
        """Return the flags of this process as the sums."""
        return [*flags]

    def finish_forward(self) -> bool:
        """Return that it is finished: nobody waits."""
        return True
