"""Checkpointer: a folder of checkpoints, and the decision which of them to keep.

The callback only requests checkpoints. When the event has ended, the loop calls ``decide`` of each request, which
returns whether this checkpoint is the best, and which older files to remove; then it copies the state, which includes
these decisions, and a thread writes the file. So the lists of files here change when a checkpoint is taken.
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from flowtrain.callback.access import Access, Read
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.conditions import Every, EverySeconds
from flowtrain.callback.events import BatchEnd, EpochEnd, FitBegin, FitEnd
from flowtrain.callback.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase
from flowtrain.callback.view import POINTERS, LearnerView
from flowtrain.callbacks.monitoring import UNKNOWN_METRIC, Mode, check_monitor, direction, value_of_epoch, watched_phase
from flowtrain.errors import CheckpointError, RankError, UsageError
from flowtrain.errors.arguments import is_a, switch, whole_number
from flowtrain.logging.records import identity
from flowtrain.state.by_phase import epoch_of
from flowtrain.training.checkpoint.files import point
from flowtrain.training.checkpoint.reading import number_of, target
from flowtrain.training.checkpoint.remote import Place, Remote, place, real_path, written_at

__all__ = ["Checkpointer", "latest_of"]

_INTERRUPTED = "interrupted.ckpt"
"""The file of the checkpoint that an interrupt takes; any later checkpoint removes it."""

_CALL = "Checkpointer(..."

_START = "start.ckpt"
"""The file of the checkpoint at the beginning of a fit; any later checkpoint removes it."""


class Checkpointer(Callback):
    """Write a checkpoint of the whole training into a folder, at the end of epochs and when training is interrupted.

    The files are ``epoch-0001.ckpt`` and so on, with the number of the training epoch; an evaluation has the number of
    the training epoch before it. Outside of `fit`, as in ``learner.validate()``, no file is written. The files
    ``latest`` and ``best`` name one checkpoint each: ``learner.fit(10, resume=folder)`` resumes from the latest,
    ``learner.load(folder + "/best")`` loads the best. A file with its final name is complete. If the model is sharded
    over several processes, its tensors are in a folder beside the file, ``epoch-0001.<drawn>.shards``. Until the first
    of these files is written there is ``start.ckpt``, with the state after `FitBegin`, so that a run that is killed
    early can be resumed too. Give each run its own folder.

    - Reads ``cbstate.metrics_epoch.<monitor>`` and ``cbstate.history`` at `EpochEnd`, so it runs after `Metrics` and
      `Recorder`; with `every_steps`, ``cbstate.history`` at `BatchEnd`; and ``data`` and ``callbacks`` at `FitBegin`.
      Writes no state: it requests checkpoints, and the loop takes each when the event has ended.
    - Costs a comparison an epoch, and for each checkpoint a copy of the state to the CPU; the copy is written
      while training continues, and its memory is kept for the next one until the fit ends.

    Args:
        folder: The folder, which is made if it does not exist; or the address of a folder of a remote file system, such
            as ``"s3://bucket/runs/a"``, with ``flowtrain[remote]`` and the package of the file system, as s3fs. No
            other run may write into it: that is noticed in folders of this machine alone.
        keep_top_k: How many of the best epochs to keep, beside the latest one; all by default. Without a monitor the
            newest epochs count as the best.
        every: Write a checkpoint after the epochs whose number is a multiple of this, or after the next epoch of the
            phase if that one is not evaluated. The last epoch of a fit is written in any case.
        monitor: The metric that ranks epochs, by its name in ``cbstate.metrics_epoch``. For a metric with several
            values name one of these, as ``"F1.cat"``. ``None`` ranks no epochs.
        phase: The phase whose epochs are counted and ranked. By default the last phase in ``data`` that evaluates, or,
            without such a phase, the last one that trains. If ``data`` has no phase of exactly this type, the last
            phase of a subclass counts.
        mode: ``"min"`` if small values of the metric are good, ``"max"`` if large values are. Needed only for metrics
            that do not say it themselves; the loss, the metrics of `flowtrain.metrics`, torchmetrics objects and
            ``Metric(f, mode=...)`` do.
        every_steps: Write a checkpoint after every n-th training batch too, and keep only the newest of these.
        restore_best: Give the model the weights of the best checkpoint when a fit has ended, by itself or by a cancel.
            The optimizer and the recorded metrics stay those of the last epoch. Needs a `monitor`.
        weights: ``"safetensors"`` writes the weights of the model beside each checkpoint, as
            ``epoch-0001.safetensors`` (https://huggingface.co/docs/safetensors).

    Raises:
        UsageError: An argument is out of its range. When the learner is built: `mode` is needed. At `FitBegin`: the
            data lacks the phase, or two callbacks have one folder. At the end of an epoch: the metric is not computed
            in that phase.
        MissingStateError: When the learner is built: there is no metric of that name.
        RankError: At `FitBegin`: a ``throttle(seconds=...)`` decides on several ranks, each of which has a clock.
        CheckpointError: safetensors is not installed. Before `FitBegin`: the folder cannot be written, or another run
            uses it. Later: the disk is full; the last complete checkpoint stays.

    >>> import tempfile
    >>> from flowtrain.testing import tiny_learner
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     history = tiny_learner(Checkpointer(folder, keep_top_k=1)).fit(3)
    ...     sorted(os.listdir(folder))
    ['best', 'epoch-0003.ckpt', 'latest']
    """

    ranks = "every"  # all ranks ask for the same checkpoints, each of which has a part of every rank
    may_checkpoint = True
    missing = UNKNOWN_METRIC

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep_top_k: int | None = None,
        every: int = 1,
        monitor: str | None = "Loss",
        phase: type[Phase] | None = None,
        mode: Mode | None = None,
        *,
        every_steps: int | None = None,
        restore_best: bool = False,
        weights: Literal["safetensors"] | None = None,
    ) -> None:
        if not is_a(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise UsageError(f"Checkpointer(folder={folder!r}): folder is a path, such as 'runs/a'.")
        if keep_top_k is not None:
            keep_top_k = whole_number("Checkpointer(): keep_top_k", keep_top_k)
        if every_steps is not None:
            every_steps = whole_number("Checkpointer(): every_steps", every_steps)
        check_monitor("Checkpointer", "Loss" if monitor is None else monitor, Phase if phase is None else phase, mode)
        if restore_best and monitor is None:
            raise UsageError(
                "Checkpointer(monitor=None, restore_best=True): without a monitor no epoch is the best. Name the "
                "metric that ranks them, as in monitor='Loss'."
            )
        _check_weights(weights)
        self.folder = place(folder)
        self.keep_top_k, self.monitor, self.phase = keep_top_k, monitor, phase
        self.mode: Mode | None = mode
        self.every = whole_number("Checkpointer(): every", every)
        self.every_steps, self.weights = every_steps, weights is not None
        self.restore_best = switch("Checkpointer", "restore_best", restore_best)
        if every_steps is not None:
            self.conditions = (*self.conditions, Every(BatchEnd, every_steps))
        self._direction: Mode = mode or "min"  # `check_callbacks` replaces it by the mode of the metric
        self._watched: Phase | None = None  # the phase whose epochs are saved; None outside of a fit
        self._files: list[tuple[str, float]] = []  # the names of the files with their ranks, oldest first
        self._step_file = ""  # the newest file within an epoch
        self._ranked_by: list[str | None] = []  # the metric, its mode and the phase that the ranks are of
        self._loaded_from = ""  # the folder that the files of a loaded state are in
        self._latest = self._epoch_file = ""  # the newest file, and the newest one of an epoch
        self._returned_here = False  # whether the loaded state is of this folder, which may have later files
        self._abandoned: list[str] = []  # files after the checkpoint that the run went back to, to be removed
        self._removed: list[str] = []  # files that the newest one of an epoch removes after it is written
        self._damaged: list[str] = []  # files whose values are not finite, to be removed with the next request
        self._left_out: tuple[int, float, int] | None = None  # the newest epoch: its number, rank and updates of before

    def _phase_type(self) -> type[Phase]:
        return self.phase or Phase

    def _reads(self) -> Access:
        metric: Access = {} if self.monitor is None else {f"cbstate.metrics_epoch.{self.monitor}": Read()}
        return {"cbstate.history": Read(), **metric}

    def own_folders(self) -> Sequence[Path]:
        """Return the folder if it can be locked, and this is no dry run, which writes no checkpoints."""
        return () if identity() is not None or isinstance(self.folder, Remote) else (self.folder,)

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Find out whether small or large values of the metric are good."""
        if self.monitor is not None:
            self._direction = direction(_CALL, self.monitor, self.mode, callbacks)

    @on(FitBegin, access={"callbacks": Read(), "data": Read()})
    def begin(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Find the phase, and request a checkpoint in case of an interrupt."""
        self._check_clock(learner.world_size)
        writes = identity() is None and learner.rank == 0  # neither a dry run nor a further rank makes a folder
        if writes:
            self._remove_temporary()
            if not event.resumed:
                self._warn_of_others()
        for other in learner.callbacks:
            if (
                isinstance(other, Checkpointer)
                and other is not self
                and other.folder.resolve() == self.folder.resolve()
            ):
                raise UsageError(
                    f"{self.name} and {other.name} both keep their checkpoints in {self.folder}, and would remove each "
                    f"other's. Give each of them a folder of its own."
                )
        phases = list(learner.data)
        if self.phase is not None:
            self._watched = watched_phase(self.name, _CALL, self.phase, phases, last=True)
        else:
            self._watched = ([each for each in phases if isinstance(each, AbstractValidationPhase)] or phases)[-1]
        self._rank_by(self._ranked_by, [self.monitor, self._direction, repr(self._watched)])
        if self._returned_here and writes:
            self._abandon()
        if not event.resumed and not self._latest:  # no state of this class depends on the rank, so all ranks ask
            learner.request_checkpoint(self.folder / _START, decide=self._take_start)
        decide = self._take_interrupted
        learner.request_checkpoint(self.folder / _INTERRUPTED, weights=self.weights, on_interrupt=True, decide=decide)

    @on(EpochEnd, "_phase_type", access="_reads")
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Request a checkpoint of the epoch; when it is taken, decide which older files to remove."""
        if phase is not self._watched:
            return
        epoch = epoch_of(learner.cbstate.history, phase)
        last = max(number_of(name) or 0 for name in (self._epoch_file, *(name for name, _ in self._files)))
        if epoch % self.every and epoch // self.every == last // self.every:
            self._left_out = epoch, self._rank(phase, learner), learner.updates
            return
        self._left_out = None
        self._request(epoch, self._rank(phase, learner), learner)

    def _request(self, epoch: int, rank: float, learner: LearnerView) -> None:
        name = f"epoch-{epoch:04d}.ckpt"
        decide = partial(self._take_epoch, name, rank)
        judged = isinstance(self._watched, AbstractValidationPhase)
        learner.request_checkpoint(self.folder / name, weights=self.weights, judged=judged, decide=decide)

    @on(FitEnd)
    def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Request a checkpoint of the last epoch, if it was left out and no update has followed it.

        Later ones are not requested, because no fit could resume from an evaluation outside of a fit. With
        `restore_best`, request the weights of the best one.
        """
        best = self._best()
        if self._left_out is not None and event.complete and learner.updates == self._left_out[2]:
            epoch, rank, _ = self._left_out
            self._request(epoch, rank, learner)
            # The pointer names the better of the two files, once the new one is written.
            best = "best" if best else f"epoch-{epoch:04d}.ckpt" if rank < math.inf else ""
        self._watched = self._left_out = None
        if self.restore_best and best:
            learner.request_weights(self.folder / best)

    @on(BatchEnd, AbstractTrainingPhase, access={"cbstate.history": Read()}, enabled="every_steps")
    def end_batch(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Request a checkpoint within an epoch; it replaces the previous one within an epoch."""
        if self._watched is None:  # no fit could resume from a checkpoint that was taken outside of a fit
            return
        name = f"step-{learner.cbstate.history[phase].steps:08d}.ckpt"
        decide = partial(self._take_step, name)
        learner.request_checkpoint(self.folder / name, weights=self.weights, decide=decide)

    def state_dict(self) -> dict[str, Any]:
        """Return the names of the files with their ranks, of which the least is best, and the metric of the ranks."""
        least = math.inf if self.monitor is None else min((rank for _, rank in self._files), default=math.inf)
        return {  # earlier versions of flowtrain read the entry "best"
            "files": list(self._files), "best": least, "step file": self._step_file, "spare": list(self._damaged),
            "folder": real_path(self.folder), "ranked by": list(self._ranked_by),
            "latest": self._latest, "epoch file": self._epoch_file, "removed": list(self._removed),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._files = [(name, rank) for name, rank in state["files"]]
        self._step_file = state["step file"]
        self._damaged = list(state.get("spare", ()))  # early checkpoints lack this entry and the next two
        self._loaded_from, self._removed = state.get("folder", ""), list(state.get("removed", ()))
        ranked_by = state.get("ranked by", self._ranked_by)
        self._rank_by(ranked_by, self._ranked_by if ranked_by else [])
        self._latest, self._epoch_file = state.get("latest", "?"), state.get("epoch file", "?")

    def moved(self, before: str, here: str) -> None:
        """Keep only the files that are in this folder, which may have been moved together with the checkpoint.

        A fit that resumes from a checkpoint in another folder never removes the files of that folder.
        """
        recorded = self._loaded_from or before
        moved = here if recorded == before else os.path.normpath(os.path.join(here, os.path.relpath(recorded, before)))
        self._returned_here = real_path(self.folder) in (recorded, moved)
        if not self._returned_here:
            self._files, self._damaged = [], []
            self._step_file = self._latest = self._epoch_file = ""
        self._files = [each for each in self._files if (self.folder / each[0]).is_file()]

    def _abandon(self) -> None:
        """Let the pointers name the files of this run, and note the later files of the run that it abandons.

        A fit that continues from ``latest`` would otherwise have a state that this run never had, if this one is killed
        before its next checkpoint. That checkpoint removes the noted files.
        """
        point(self.folder, "best", self._best())
        if "?" in (self._latest, self._epoch_file):  # early checkpoints lack these entries of the state
            return
        point(self.folder, "latest", self._latest if (self.folder / self._latest).is_file() else "")
        own = {self._latest, self._step_file, *self._damaged, *(name for name, _ in self._files)}
        last = number_of(self._epoch_file) or 0
        found = ((each.name, number_of(each.name)) for each in self.folder.glob("*.ckpt"))
        # A run keeps one file within an epoch, so every other one is of the abandoned run, or was left by a kill.
        later = [name for name, number in found if number is not None and (number > last or name.startswith("step"))]
        self._abandoned = sorted({*later, *self._removed} - own)  # a killed process may not have removed these

    def _best(self) -> str:
        """Return the name of the best file that this run has, the oldest of equals; empty if it ranks none."""
        name, rank = min(self._files, key=lambda each: each[1], default=("", math.inf))
        return name if self.monitor is not None and rank < math.inf else ""

    def _rank_by(self, before: list[str | None], now: list[str | None]) -> None:
        """Rank by a metric of a phase from now on, and forget ranks by another metric, which do not compare."""
        if before and now and before != now:
            self._files = []
        self._ranked_by = now or before

    def _take_epoch(self, name: str, rank: float, finite: bool) -> tuple[bool, list[str]]:
        """Add the file of an epoch to the list; return whether it is the best, and the files to remove."""
        if not finite:
            return False, self._take_damaged(name, kept=self.keep_top_k is None)
        self._files = [each for each in self._files if each[0] != name]
        self._files.append((name, rank))
        self._latest = self._epoch_file = name
        best = self._best() == name
        self._removed = [*filter(None, [*self._drop(), *self._replaced(name), self._step_file])]
        self._step_file = ""
        return best, self._removed

    def _take_step(self, name: str, finite: bool) -> tuple[bool, list[str]]:
        """Make this the file within an epoch; return that it is not the best, and the files to remove."""
        if not finite:
            return False, self._take_damaged(name, kept=False)
        before, self._step_file = self._step_file, name
        self._latest = name
        return False, list(filter(None, [*self._replaced(name), before]))

    def _take_start(self, finite: bool) -> tuple[bool, list[str]]:
        """Make the file of the beginning the newest one; return that it is not the best, and no file to remove."""
        if finite:
            self._latest = _START
        return False, []

    def _take_interrupted(self, finite: bool) -> tuple[bool, list[str]]:
        """Make the file of an interrupt the newest one; return that it is not the best, and no file to remove."""
        if finite:
            self._latest = _INTERRUPTED
        return False, []

    def _take_damaged(self, name: str, kept: bool) -> list[str]:
        """Note a file with values that are not finite; return the files to remove, which are the earlier such files.

        It becomes neither the best nor the latest, and the next request removes it unless it is `kept`.
        """
        damaged, self._damaged = self._damaged, [] if kept else [name]
        return [each for each in damaged if each != name]

    def _replaced(self, name: str) -> list[str]:
        """Return the files that any later checkpoint replaces, and forget them."""
        replaced = [*self._damaged, *self._abandoned]
        self._damaged, self._abandoned = [], []
        return [_START, _INTERRUPTED, *(each for each in replaced if each != name)]

    def _rank(self, phase: Phase, learner: LearnerView) -> float:
        """Return the rank of the epoch that has ended: the smaller, the better.

        An epoch without a value of its own is the worst.

        Raises:
            UsageError: The metric was never recorded, though the epoch has complete batches.
        """
        if self.monitor is None:
            return -float(len(self._files) and 1 - self._files[-1][1])  # one less than the last: newer is better
        cbstate = learner.cbstate
        found = value_of_epoch(self.name, _CALL, self.monitor, phase, cbstate.metrics_epoch, cbstate.history)
        if found is None or math.isnan(found[1]):
            return math.inf
        return found[1] if self._direction == "min" else -found[1]

    def _drop(self) -> list[str]:
        """Forget the files that are neither among the best nor the newest, and return their names for removal."""
        if self.keep_top_k is None:
            return []
        kept = {name for name, _ in sorted(self._files, key=lambda each: each[1])[: self.keep_top_k]}
        kept.add(self._files[-1][0])
        dropped = [name for name, _ in self._files if name not in kept]
        self._files = [each for each in self._files if each[0] in kept]
        return dropped

    def _check_clock(self, ranks: int) -> None:
        """Check that the ranks agree on when a checkpoint is taken, since each of them takes part in it.

        Raises:
            RankError: A clock decides it.
        """
        clocks = [each for each in self.conditions if isinstance(each, EverySeconds)]
        if clocks and ranks > 1:
            raise RankError(
                f"throttle({self.name}, {clocks[0].event_type.__name__}, seconds={clocks[0].seconds:g}) depends on a "
                f"clock, and all {ranks} ranks take part in a checkpoint: where their clocks disagree, one would wait "
                f"for the others for ever. Count batches instead: Checkpointer(..., every_steps=1000)."
            )

    def _remove_temporary(self) -> None:
        """Remove the unfinished files of a process that was killed while it wrote them.

        Without a ``latest`` no checkpoint was finished either, so one within an epoch, which no later one replaces, is
        removed too.
        """
        for path in self.folder.glob(".*tmp"):  # a remote folder has none
            name = path.name[1:].split(".")[0]
            if name in (*POINTERS, "start", "interrupted") or number_of(f"{name}.ckpt") is not None:
                path.unlink(missing_ok=True)
        if not (self.folder / POINTERS[0]).exists():
            for path in self.folder.glob("step-*.ckpt"):
                path.unlink(missing_ok=True)

    def _warn_of_others(self) -> None:
        latest = target(self.folder, "latest")
        if latest and not self._ranked_by:  # this callback has neither begun a fit nor loaded a state
            warnings.warn(
                f"The folder {self.folder} holds the checkpoints of another run (its latest is {latest}), and this fit "
                f"begins anew: it replaces files of the same name, and 'latest' and 'best' will name its own. Write "
                f"fit(..., resume='auto') to continue that run, or give this run a folder of its own.",
                UserWarning,
                stacklevel=2,
            )


def latest_of(callbacks: Iterable[Callback]) -> Place | None:
    """Return the folder whose latest checkpoint ``fit(resume="auto")`` continues, or ``None`` if there is none yet.

    With several Checkpointers that is the folder whose latest checkpoint is the newest.

    Raises:
        UsageError: There is no `Checkpointer`.
        CheckpointError: A remote file system does not answer.
    """
    folders = [each.folder for each in callbacks if isinstance(each, Checkpointer)]
    if not folders:
        raise UsageError(
            "fit(resume='auto') continues from the latest checkpoint in the folder of a Checkpointer, and the learner "
            "has no Checkpointer. Add one, as in callbacks=[Checkpointer('runs/a')], or pass the path of a checkpoint."
        )
    found = [(folder / "latest", folder / target(folder, "latest")) for folder in folders]
    # A pointer whose checkpoint is missing counts too: the fit then continues from an earlier one, or says why not.
    found = [(file if file.is_file() else pointer, pointer) for pointer, file in found if pointer.is_file()]
    return max(found, key=lambda each: written_at(each[0]))[1].parent if found else None


def _check_weights(weights: object) -> None:
    if weights not in (None, "safetensors"):
        raise UsageError(f'Checkpointer(weights={weights!r}): weights is "safetensors", or None for no such file.')
    if weights is not None and importlib.util.find_spec("safetensors") is None:
        raise CheckpointError(
            "Checkpointer(weights='safetensors') needs safetensors, which is not installed: "
            "pip install 'flowtrain[safetensors]'"
        )
