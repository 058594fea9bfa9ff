"""EMA: an exponential moving average of the weights, which the model has during validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from numbers import Real

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from flowtrain.callbacks.averaging import Averaging
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, switch

__all__ = ["EMA"]


class EMA(Averaging):
    """Keep an exponential moving average of the weights, and validate with it.

    After each batch with an update ``average = decay * average + (1 - decay) * weight``; the first average is a copy of
    the weights. This is torch's ``AveragedModel`` with ``get_ema_multi_avg_fn(decay)``, bit for bit
    (https://docs.pytorch.org/docs/stable/optim.html#weight-averaging-swa-and-ema). Polyak and Juditsky, "Acceleration
    of stochastic approximation by averaging", https://doi.org/10.1137/0330046.

    Buffers are not averaged by default. With ``buffers=True`` the running statistics of normalisation layers, which are
    floating point buffers named ``running_...``, are averaged like the weights. Other buffers never are: the mean of
    counters, unit vectors (spectral normalisation) or masks is not a valid value of them. A weight that contains an
    infinity, as a mask that is a frozen parameter does, is copied, because its average would be NaN.

    The model has the averages during each epoch of a validation phase, and the trained weights again when the epoch
    ends, normally or not. Training continues with the trained weights. After training ``with ema.applied(): ...``
    evaluates or saves the averages, and `averages` has them by name.

    A checkpoint that a `Checkpointer` takes after a validation epoch holds the averages as ``model``, and in its
    safetensors file, since these are the weights that were judged. It holds the trained weights as ``trained``, with
    which ``fit(resume=...)`` continues, bit for bit. After ``learner.load(...)`` the model has the averages until
    training continues.

    In a training of several ranks each rank averages the weights, which are equal on all of them. Running statistics
    are those of the batches of a rank until the epoch ends: then all ranks have the averages of the main rank, as they
    have its statistics.

    Reads ``model`` at `BatchEnd`, and at `EpochEnd` and `EpochCancelled` of training. Writes it at `EpochBegin` of
    training and of validation phases, at `EpochEnd` and `EpochCancelled` of validation phases and at `FitEnd`, so it
    runs after callbacks that write the model and before callbacks that read it. Costs a pass over the weights for each
    update, their size in memory for the averages, and the same again during a validation epoch.

    Args:
        decay: The share of the average that is kept at each update, from 0 to below 1.
        buffers: Whether to average running statistics too.
        model: The name of the model, if the learner has several; or of the part of the only model that is averaged.

    Raises:
        UsageError: `decay` is out of its range, `buffers` is not ``True`` or ``False``, or `model` is no name of a
            model.

    Attributes:
        averages: The averages by the name of the parameter; empty before the first update.

    >>> from flowtrain.testing import tiny_learner
    >>> ema = EMA(0.5)
    >>> learner = tiny_learner(ema, n_batches=2)
    >>> history = learner.fit(1)
    >>> with ema.applied():
    ...     averaged = learner.model.coeff.item()
    >>> 0 < averaged < learner.model.coeff.item()  # on its way to 3, the average is behind
    True
    """

    def __init__(self, decay: float = 0.999, *, buffers: bool = False, model: str = "") -> None:
        if not is_a(decay, Real) or is_a(decay, bool) or not 0 <= decay < 1:
            raise UsageError(f"EMA(decay={decay!r}): decay is at least 0 and below 1, such as 0.999.")
        super().__init__(model)
        self.decay = decay
        self.buffers = switch("EMA", "buffers", buffers)
        self._average = get_ema_multi_avg_fn(decay)

    def average(self, averages: list[torch.Tensor], weights: list[torch.Tensor]) -> None:
        """Change the averages by the weights, by torch's function."""
        self._average(averages, weights, 0)

    def more_averaged(self, module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the running statistics of normalisation layers, with their names, if buffers are averaged."""
        for name, buffer in module.named_buffers() if self.buffers else ():
            if _is_running(name) and buffer.is_floating_point():
                yield name, buffer

    def rank_state(self) -> dict[str, torch.Tensor] | None:
        """Return the averages of running statistics, on the CPU; ``None`` without any."""
        if not self.buffers:
            return None
        return {name: each.cpu() for name, each in self.averages.items() if _is_running(name)}

    def merge_ranks(self, states: Sequence[dict[str, torch.Tensor] | None]) -> None:
        """Take the averages of running statistics from the main rank."""
        for name, average in (states[0] or {}).items():
            self.averages[name].copy_(average)

    @property
    def required_arguments(self) -> str:
        """The argument that a callback must have to load the averages, as the end of a sentence."""
        return f", made with buffers={self.buffers}"


def _is_running(name: str) -> bool:
    """Tell whether a buffer has the name of a running statistic, such as ``"norm.running_mean"``."""
    return name.rpartition(".")[2].startswith("running_")
