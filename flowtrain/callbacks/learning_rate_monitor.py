"""LearningRateMonitor: the learning rate of every update, read from the optimizer."""

from __future__ import annotations

from typing import Any

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import UpdateBegin
from flowtrain.callback.phases import AbstractTrainingPhase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a

__all__ = ["LearningRateMonitor"]


class LearningRateMonitor(Callback):
    """Record the learning rate of every parameter group whenever it changes.

    `Scheduler` records the values that it sets in ``cbstate.hyperparams``. This callback reads the optimizer itself, so
    it also records the rates of a torch scheduler in a user's step, and rates that were set by hand. It writes to
    ``cbstate.tracehistory[phase]``; the step is the number of the batch whose update is the first with this rate. The
    name is ``"LearningRate"``, or ``"LearningRate.0"``, ``"LearningRate.1"``, ... if the optimizer has several groups;
    with names of optimizers ``"LearningRate.gen"``, ``"LearningRate.gen.0"``, and so on.

    Reads ``optimizer.hyperparams`` and ``cbstate.history`` at `UpdateBegin`, so it runs after callbacks that set the
    rate for the update there. Costs a look at each group in each update; reading a rate on a GPU waits for the GPU.

    Args:
        optimizers: The names of the optimizers to read, if a learner has several.

    Raises:
        UsageError: A name is no text, is empty, or has a dot.

    >>> from flowtrain import TrainingPhase
    >>> from flowtrain.testing import tiny_learner
    >>> learner = tiny_learner(LearningRateMonitor(), n_batches=4)
    >>> history = learner.fit(1)
    >>> learner.optimizer.param_groups[0]["lr"] = 0.05
    >>> history = learner.fit(1)
    >>> list(learner.cbstate.tracehistory[TrainingPhase]["LearningRate"])
    [(1, 0.1), (5, 0.05)]
    """

    may_cancel = False

    def __init__(self, *optimizers: str) -> None:
        for name in optimizers:
            if not is_a(name, str) or not name or "." in name:
                raise UsageError(
                    f"LearningRateMonitor({name!r}) takes names of optimizers. Write LearningRateMonitor() for one "
                    f'optimizer, LearningRateMonitor("gen", "disc") for those of optimizer={{"gen": ..., "disc": ...}}.'
                )
        self.optimizers = optimizers

    def state_access(self) -> Access:
        """Declare reads of the counts and of the optimizers' hyperparameters, and a write of each recorded series."""
        names = [f".{name}" for name in self.optimizers] or [""]
        reads: Access = {f"optimizer{name}.hyperparams": Read() for name in names}
        writes: Access = {f"cbstate.tracehistory.LearningRate{name}": Write() for name in names}
        return {"cbstate.history": Read(), **reads, **writes}

    @on(UpdateBegin, AbstractTrainingPhase)
    def look(self, event: UpdateBegin, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Record the rates that have changed since the last update."""
        # `Recorder` counts this batch only at its end. An update after the last batch of an epoch is in no batch.
        series, step = learner.cbstate.tracehistory[phase], learner.cbstate.history[phase].steps + event.in_batch
        for name in self.optimizers or ("",):
            groups = (getattr(learner.optimizer, name) if name else learner.optimizer).hyperparams
            title = f"LearningRate.{name}" if name else "LearningRate"
            for number, group in enumerate(groups):
                if group["lr"] is not None:  # an optimizer may choose the rate itself, as Adafactor of transformers
                    self._record(series, f"{title}.{number}" if len(groups) > 1 else title, float(group["lr"]), step)

    def _record(self, series: Any, title: str, rate: float, step: int) -> None:
        known = series.get(title)
        if known is None or not len(known) or known.last()[1] != rate:
            series.push(title, rate, step)
