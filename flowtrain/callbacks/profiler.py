"""Profiler: traces of some training batches by torch's profiler, as files for Chrome, Perfetto and TensorBoard."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flowtrain.callback.access import Access, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchEnd, FitBegin, FitEnd
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.view import LearnerView
from flowtrain.errors import CallbackError, UsageError
from flowtrain.errors.arguments import is_a, switch, whole_number
from flowtrain.logging.records import identity

__all__ = ["Profiler"]


class Profiler(Callback):
    """Profile some training batches of each fit with ``torch.profiler``, and write a trace of them.

    The schedule is that of ``torch.profiler.schedule``: after `skip_first` batches come cycles of `wait` batches that
    are left out, `warmup` batches that are measured and thrown away, and `active` batches of which the trace is
    written. After `repeat` cycles the profiler is off, and further batches cost nothing. If the fit ends within a
    cycle, by a cancel or an error too, the active batches so far are written, and the profiler is switched off.

    A trace is a file ``batch-000005.pt.trace.json``, with the number of its last batch in the life of the learner. Open
    it with https://ui.perfetto.dev or ``chrome://tracing``; TensorBoard's profiler plugin reads the folder. The trace
    shows the operators, the kernels of the device, and what each waits for, of the training thread: handlers that an
    executor runs on other threads are not in it. Of several ranks the main rank is profiled; with ``profiler.ranks =
    "every"`` all are, and the files of the others begin with ``rank-1-`` and so on.

    Reads and writes no state. Declares the resource ``rng``, although it draws no random numbers, because this
    keeps it on the training thread. No declaration makes it run after other callbacks: put it last in the list, so
    that a batch includes the handlers of `BatchEnd`. Costs a record for each operator of the active and the warm-up
    batches. No trace is made in a dry run.

    Args:
        folder: The folder of the traces, which is made if it does not exist.
        wait: The batches at the beginning of each cycle that are left out.
        warmup: The batches after them that are measured and thrown away. With 0 the first times are too long.
        active: The batches after them that are written.
        repeat: The number of cycles; 0 for as many as the fit has.
        skip_first: The batches before the first cycle.
        activities: The ``torch.profiler.ProfilerActivity`` to record; all that this machine has by default.
        record_shapes: Whether the shapes of the inputs of operators are recorded.
        profile_memory: Whether allocations are recorded.
        with_stack: Whether the line of code of each operator is recorded, which costs much time.

    Raises:
        UsageError: `folder` is no path, a number is not whole or too small, a switch is not ``True`` or ``False``, or
            `activities` has another type. At `FitBegin`: another profiler of torch
            is active.
        CallbackError: At `FitBegin`: the folder cannot be written.

    Attributes:
        files: The paths of the traces that this callback has written, in their order.

    >>> import tempfile
    >>> from flowtrain.testing import tiny_learner
    >>> profiler = Profiler(tempfile.mkdtemp())
    >>> history = tiny_learner(profiler).fit(1)
    >>> [path.name for path in profiler.files]
    ['batch-000005.pt.trace.json']
    """

    audited = False

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        wait: int = 1,
        warmup: int = 1,
        active: int = 3,
        repeat: int = 1,
        skip_first: int = 0,
        activities: Iterable[torch.profiler.ProfilerActivity] | None = None,
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
    ) -> None:
        if not is_a(folder, (str, os.PathLike)) or folder == "":
            raise UsageError(f"Profiler(folder={folder!r}): folder is a path, such as 'runs/profile'.")
        self.folder = Path(folder)
        given = {"wait": wait, "warmup": warmup, "repeat": repeat, "skip_first": skip_first}
        numbers = {name: whole_number(f"Profiler(): {name}", number, least=0) for name, number in given.items()}
        self.repeat, self.skip_first = numbers.pop("repeat"), numbers.pop("skip_first")
        self.schedule = {**numbers, "active": whole_number("Profiler(): active", active)}
        self.options: dict[str, Any] = {
            "record_shapes": switch("Profiler", "record_shapes", record_shapes),
            "profile_memory": switch("Profiler", "profile_memory", profile_memory),
            "with_stack": switch("Profiler", "with_stack", with_stack),
        }
        self.activities = None if activities is None else list(activities)
        if self.activities is not None and not (
            self.activities and all(is_a(each, torch.profiler.ProfilerActivity) for each in self.activities)
        ):
            raise UsageError(
                f"Profiler(activities={activities!r}): activities are torch.profiler.ProfilerActivity.CPU, .CUDA and "
                f"others, in a list."
            )
        self.files: list[Path] = []
        self._rank = 0
        self._batches = 0  # in the life of the learner
        self._cycles = 0  # that are complete in this fit
        self._left = 0  # the batches of this cycle that are left
        self._profile: Any = None  # None while the profiler is off

    def state_access(self) -> Access:
        """Declare the resource that keeps a handler on the training thread, which is the thread to be profiled."""
        return {"resource.rng": Write()}

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Refuse a second profiler, whose traces would end those of the first."""
        if len([each for each in callbacks if isinstance(each, Profiler)]) > 1:
            raise CallbackError(
                "The learner has two Profilers, and torch has one profiler at a time. Give it one; repeat= makes "
                "several traces."
            )

    @on(FitBegin)
    def begin(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Switch the profiler on."""
        self._stop()  # if a second interrupt has broken off the last fit
        self._rank = learner.rank
        if identity() is not None:  # a dry run, which writes no files
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CallbackError(
                f"{self.name} cannot make the folder {self.folder}: {error}. Choose another folder for the traces."
            ) from error
        if getattr(torch.autograd.profiler, "_is_profiler_enabled", False):  # torch would silently end the other one
            raise UsageError(
                f"{self.name} cannot begin: another profiler of torch is active, and there can be one at a time. End "
                f"it before fit()."
            )
        self._cycles = 0
        self._start(self.skip_first)

    def _start(self, skipped: int) -> None:
        """Switch a new profiler on for the next cycle, which begins after some skipped batches."""
        self._left = skipped + sum(self.schedule.values())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Profiler won't be using warmup")  # the user has asked for warmup=0
            schedule = torch.profiler.schedule(**self.schedule, skip_first=skipped, repeat=1)
        profile = torch.profiler.profile(
            activities=self.activities, schedule=schedule, on_trace_ready=self._write, **self.options
        )
        self._profile = profile
        profile.start()

    @on(BatchEnd, AbstractTrainingPhase)
    def step(self, event: BatchEnd, phase: AbstractTrainingPhase, learner: LearnerView) -> None:
        """Tell the profiler that a batch has ended; switch it off after the last cycle."""
        self._batches += 1
        if self._profile is None:
            return
        self._profile.step()
        self._left -= 1
        if self._left == 0:
            self._stop()
            self._cycles += 1
            if self._cycles != self.repeat:
                self._start(0)

    @on(FitEnd)
    def end(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Switch the profiler off, which writes the trace of a cycle that is not complete."""
        self._stop()

    def _stop(self) -> None:
        profile, self._profile = self._profile, None
        if profile is not None:
            profile.stop()
            profile.on_trace_ready = None  # the reference to this callback lies in a cycle of torch's objects

    def _write(self, profile: Any) -> None:
        """Write a trace, under its name only when it is complete."""
        of_rank = f"rank-{self._rank}-" if self._rank else ""
        path = self.folder / f"{of_rank}batch-{self._batches:06d}.pt.trace.json"
        part = path.with_name(f".{path.name}")
        profile.export_chrome_trace(str(part))
        os.replace(part, path)
        self.files.append(path)

    def state_dict(self) -> dict[str, Any]:
        """Return the number of batches, by which traces are named."""
        return {"batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self._batches = state["batches"]
