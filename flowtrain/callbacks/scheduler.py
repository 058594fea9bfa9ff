"""Scheduler: set the hyperparameters of optimizers before each update, by schedules.

A schedule without a length is *stretched*: it gets the length of the fit when the fit begins. So the number of planned
updates and epochs, and the counts at the beginning of the fit, belong to the state in a checkpoint. Epochs are those of
``cbstate.history``. Updates are counted here, because a batch in which several optimizers are updated counts once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import BatchBegin, EpochEnd, FitBegin, FitEnd, UpdateBegin
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.callback.resolution import NoConflict, Resolution
from flowtrain.callback.view import LearnerView
from flowtrain.callbacks.monitoring import UNKNOWN_METRIC, direction, value_of_epoch, watched_phase
from flowtrain.callbacks.schedules.plateau import Plateau, ReduceOnPlateau
from flowtrain.callbacks.schedules.schedule import Schedule, ScheduleLike, as_schedule
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, whole_number
from flowtrain.state.by_phase import Counts
from flowtrain.state.hyperparameters import HyperParameter, Setting

__all__ = ["Scheduler"]

_EXAMPLE = "Scheduler({LearningRate: one_cycle(1e-3)})"


class Scheduler(Callback):
    """Set hyperparameters before each update, and record them: ``cbstate.hyperparams["LearningRate"]``.

    A schedule without a length is stretched over the updates of each fit (`flowtrain.callbacks.schedules`). Updates and
    epochs are counted over the life of the learner, also those before this callback was added. A batch in which several
    optimizers are updated counts once, and their hyperparameters are set before the first of these updates; the updates
    of several optimizers are counted over the life of this callback. In the series the step is the number of the
    update.

    Writes ``optimizer.hyperparams`` (of the optimizer that a hyperparameter names) and the series of its
    hyperparameters, at `UpdateBegin`. Reads ``cbstate.history`` at `FitBegin`, and at `UpdateBegin` for a schedule of
    epochs. For a `reduce_on_plateau` it reads the epoch metric and ``cbstate.history`` at `EpochEnd`, so it runs after
    `Metrics` and `Recorder`. Costs a call of the schedule for each hyperparameter and update. Two schedulers may set
    different hyperparameters; two for the same one are a conflict.

    Args:
        schedules: A number, a function of the update, a schedule, or `reduce_on_plateau` for each hyperparameter. The
            key is a type, or an instance if the learner has several optimizers or parameter groups.
        keep: How many of the newest values of each hyperparameter to keep, so that memory and checkpoints stay small in
            a long run; all by default. Older values are dropped once there are twice as many.

    Raises:
        UsageError: `schedules` is no such mapping, or has two schedules for one hyperparameter, or `keep` is no number
            of values. At `FitBegin`: a schedule has no length, and the length of the fit is not known; or ``data`` has
            not the phase that a `reduce_on_plateau` watches, or several of its subclasses. At an update: a schedule
            returns no finite number, or one below the least value of the hyperparameter. At the end of an epoch: a
            watched metric is not computed in that phase.

    >>> from flowtrain.callbacks import LearningRate, Momentum, one_cycle
    >>> Scheduler({LearningRate: one_cycle(1e-3), Momentum: one_cycle(0.85, start=0.95, end=0.95)})
    <Scheduler>
    """

    may_cancel = False
    missing = UNKNOWN_METRIC

    def __init__(self, schedules: Mapping[Any, ScheduleLike | ReduceOnPlateau], *, keep: int | None = None) -> None:
        self.schedules: dict[Setting, Schedule | ReduceOnPlateau] = {}
        self.updates = 0
        if not is_a(schedules, Mapping) or not schedules:
            raise UsageError(f"Scheduler({schedules!r}) takes schedules by hyperparameter: {_EXAMPLE}.")
        for key, given in schedules.items():
            setting: Any = key() if isinstance(key, type) else key
            if not isinstance(setting, Setting) or type(setting) in (Setting, HyperParameter):
                raise UsageError(f"Scheduler got {key!r} where a hyperparameter belongs. Write {_EXAMPLE}.")
            for other in self.schedules:
                if setting.overlaps(other):
                    raise UsageError(
                        f"Scheduler has two schedules for {setting.name}: of {other!r} and {setting!r}. "
                        f"Give each hyperparameter one; sequence([...], at=[...]) joins two."
                    )
            self.schedules[setting] = given if isinstance(given, ReduceOnPlateau) else as_schedule(given)
        self.keep = None if keep is None else whole_number("Scheduler(): keep", keep)
        watching = [(each.name, plan) for each, plan in self.schedules.items() if isinstance(plan, ReduceOnPlateau)]
        self._watching = dict(watching)  # by hyperparameter: the `reduce_on_plateau` as the user wrote it
        self._judging = dict(watching)  # the same with the mode of the metric, which `check_callbacks` finds
        self._plateaus = {name: plan.begin() for name, plan in watching}
        self._judged: dict[str, int] = {}  # by phase: how many updates the newest judged metric follows
        self._phases = {name: plan.phase for name, plan in watching}  # in a fit the type of the phase that is watched
        self._several = any(getattr(each, "optimizer", "") for each in self.schedules)  # whether it names optimizers
        self._counted = False  # whether the update of this batch has been counted
        # Of the fit that runs, or of the last one: the planned updates and epochs, and the counts at its beginning.
        self._planned: tuple[int | None, int | None] = (None, None)
        self._began: tuple[int, dict[str, int]] = (0, {})
        self._in_fit = False
        self._stretch()

    def state_access(self) -> Access:
        """Declare a write of every scheduled hyperparameter, and of the series of its values."""
        access: dict[str, Any] = {}
        for setting in self.schedules:
            access |= {**setting.access(), f"cbstate.hyperparams.{setting.name}": Write()}
        if any(isinstance(each, Schedule) and each.unit == "epoch" for each in self.schedules.values()):
            access["cbstate.history"] = Read()
        return access

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        """Find no conflict with a scheduler that has none of these hyperparameters."""
        if not isinstance(other, Scheduler):
            return None
        shared = any(mine.overlaps(theirs) for mine in self.schedules for theirs in other.schedules)
        return None if shared else NoConflict()

    def _watches(self) -> bool:
        return bool(self._watching)

    def _reads_at_end(self) -> Access:
        metrics: Access = {f"cbstate.metrics_epoch.{plan.monitor}": Read() for plan in self._watching.values()}
        return {"cbstate.history": Read(), **metrics}

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Find out, for each watched metric, whether small or large values are good."""
        for name, plan in self._watching.items():
            mode = direction(f"reduce_on_plateau({plan.value}", plan.monitor, plan.mode, callbacks)
            self._judging[name] = replace(plan, mode=mode)

    def setup(self, learner: LearnerView) -> None:
        """Check that the hyperparameters exist, and set those outside of optimizers, which other callbacks may read."""
        for setting, schedule in self.schedules.items():
            if isinstance(schedule, ReduceOnPlateau):
                setting.prepare(learner, schedule.value)
            else:
                # The length of the fit is not known yet, but the first value of a schedule hardly depends on it.
                first = schedule.value(1, 1_000_000) if schedule.is_open else schedule(1)
                setting.prepare(learner, self._checked(setting, schedule, first))

    @on(FitBegin, access={"cbstate.history": Read(optional=True)})
    def begin_fit(self, event: FitBegin, phase: Phase, learner: LearnerView) -> None:
        """Stretch the schedules without a length over the fit, and find the phases of the watched metrics."""
        for name, plan in self._watching.items():
            who, call = f"{self.name} with {plan!r}", f"reduce_on_plateau({plan.value}"
            self._phases[name] = type(watched_phase(who, call, plan.phase, event.phases))
        trained: dict[Phase, Counts] = {
            each: counts
            for each, counts in (learner.cbstate.history or {}).items()
            if isinstance(each, AbstractTrainingPhase)
        }
        epochs = {repr(each): counts.epochs for each, counts in trained.items()}
        new = self._take_over(learner)
        if not event.resumed:
            self._began = (self.updates, epochs)
        elif new:
            self._began = self._began_without(event, trained)
        before, self._planned, self._in_fit = self._planned, (event.updates, event.epochs), True
        self._stretch()
        if event.resumed and not new and not learner.rank:  # the main rank of several warns
            self._warn_of_another_length(before, epochs)
        for setting, schedule in self._stretched.items():
            if isinstance(schedule, Schedule) and schedule.is_open:
                why = "the fit counts steps" if schedule.unit == "epoch" else "a loader does not know how many it has"
                raise UsageError(
                    f"The schedule {schedule} of {setting.name} is stretched over the {schedule.unit}s of the fit, and "
                    f"how many these are is not known: {why}. Give it a length, in {schedule.unit}s: length=1000."
                )

    @on(FitEnd, access={})
    def end_fit(self, event: FitEnd, phase: Phase, learner: LearnerView) -> None:
        """Note that the fit is over: a state that is loaded from now on replaces the plan too."""
        self._in_fit = False

    @on(BatchBegin, access={})
    def begin_batch(self, event: BatchBegin, phase: Phase, learner: LearnerView) -> None:
        """Note that the next update is the first one of this batch."""
        self._counted = False

    @on(UpdateBegin)
    def set_values(self, event: UpdateBegin, phase: Phase, learner: LearnerView) -> None:
        """Set the values for an update, and record them. Further updates in the same batch use the same values."""
        if self._counted:
            return
        self._counted = True
        if not self.updates:
            self._take_over(learner)
        self.updates += 1
        series = learner.cbstate.hyperparams
        for setting, schedule in self._stretched.items():
            value = self._checked(setting, schedule, self._value(setting, schedule, phase, learner))
            setting.set(learner, value)
            series.push(setting.name, value, self.updates)
            if self.keep is not None:
                series[setting.name].shorten(self.keep)

    @on(EpochEnd, access="_reads_at_end", enabled="_watches")
    def end_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        """Let the watched metrics change their hyperparameters."""
        if self._judged.get(repr(phase), 0) == self.updates:
            return  # another evaluation of the same parameters, as by validate(), does not count as an epoch
        self._judged[repr(phase)] = self.updates
        metrics, history = learner.cbstate.metrics_epoch, learner.cbstate.history
        for name, plan in self._judging.items():
            if type(phase) is self._phases[name]:
                call = f"reduce_on_plateau({plan.value}"
                found = value_of_epoch(self.name, call, plan.monitor, phase, metrics, history)
                if found is not None:
                    self._plateaus[name] = plan.after(self._plateaus[name], found[1])

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, the planned length of the fit, and the state of each watched metric."""
        return {
            "updates": self.updates,
            "planned": list(self._planned),
            "began": [self._began[0], dict(self._began[1])],
            "judged": dict(self._judged),
            "plateaus": {name: list(plateau) for name, plateau in self._plateaus.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.updates = state["updates"]
        if not self._in_fit:  # a fit that resumes loads the state a second time, and may have another length than then
            self._planned = (state["planned"][0], state["planned"][1])
        self._began = (state["began"][0], dict(state["began"][1]))
        self._judged = dict(state.get("judged", {}))  # early checkpoints lack this entry
        for name in self._watching.keys() & state["plateaus"].keys():
            self._plateaus[name] = Plateau(*state["plateaus"][name])
        self._stretch()

    def _stretch(self) -> None:
        """Stretch the schedules without a length over the planned updates or epochs."""
        updates, epochs = self._planned
        self._stretched: dict[Setting, Schedule | ReduceOnPlateau] = {}
        for setting, schedule in self.schedules.items():
            planned = None
            if isinstance(schedule, Schedule) and schedule.is_open:
                planned = epochs if schedule.unit == "epoch" else updates
            self._stretched[setting] = schedule if planned is None else schedule.over(planned)  # type: ignore[union-attr]  # a Schedule

    def _take_over(self, learner: LearnerView) -> bool:
        """Take over the updates that the learner has made before this callback; tell whether there are such updates."""
        if self.updates or self._several or not learner.updates:
            return False
        self.updates = learner.updates
        return True

    def _began_without(self, event: FitBegin, trained: Mapping[Phase, Counts]) -> tuple[int, dict[str, int]]:
        """Return the updates and epochs before a fit that resumes and that this callback was not in before.

        The updates are computed: as many of those planned are made as there are complete epochs, or steps.
        """
        total = event.steps if event.epochs is None else event.epochs
        counts = [each.steps if event.epochs is None else each.epochs for each in trained.values()]
        if max(counts, default=0) <= event.done or not total or event.updates is None:
            return 0, {}
        made = round(event.updates * event.done / total)
        return self.updates - made, {repr(each): max(counts.epochs - event.done, 0) for each, counts in trained.items()}

    def _warn_of_another_length(self, before: tuple[int | None, int | None], epochs: Mapping[str, int]) -> None:
        """Warn, once for all schedules, if the interrupted fit was planned with another length than this one.

        Args:
            before: The planned updates and epochs of the interrupted fit.
            epochs: The epochs of each training phase.
        """
        totals: dict[str, str] = {}
        jumps: list[str] = []
        for setting, schedule in self.schedules.items():
            if not isinstance(schedule, Schedule) or not schedule.is_open:
                continue
            by_epoch = schedule.unit == "epoch"
            old, new = before[by_epoch], self._planned[by_epoch]
            phases = epochs.items() if by_epoch else [("", self.updates)]
            began = self._began[1] if by_epoch else {"": self._began[0]}
            done = max((count - began.get(name, 0) for name, count in phases), default=0)
            if old is None or new is None or old == new or done >= new:
                continue
            totals[schedule.unit] = f"{old} {schedule.unit}s, and this fit has {new}"
            values = schedule.value(done + 1, old), schedule.value(done + 1, new)
            jumps.append(f"{setting.name} is now {values[1]:.4g}, and would have been {values[0]:.4g}, by {schedule}")
        if jumps:
            warnings.warn(
                f"The fit that wrote the checkpoint was planned to have {'; '.join(totals.values())}. A schedule "
                f"without a length is stretched over the new total, so it jumps here: {'; '.join(jumps)}. To continue "
                f"without a jump, resume with the earlier total, or give the schedule a length from the beginning.",
                UserWarning,
                stacklevel=2,
            )

    def _value(
        self, setting: Setting, schedule: Schedule | ReduceOnPlateau, phase: Phase, learner: LearnerView
    ) -> object:
        """Return the value of a schedule for the coming update; a stretched schedule counts from the start of a fit."""
        if isinstance(schedule, ReduceOnPlateau):
            return self._plateaus[setting.name].value
        given = self.schedules[setting]
        restarts = isinstance(given, Schedule) and given.is_open
        if schedule.unit == "epoch":
            began = self._began[1].get(repr(phase), 0) if restarts else 0
            return schedule(learner.cbstate.history[phase].epochs + 1 - began)
        return schedule(self.updates - (self._began[0] if restarts else 0))

    def _checked(self, setting: Setting, schedule: object, value: Any) -> float:
        """Return the value of a schedule as a number.

        Raises:
            UsageError: The value is no finite number, or is below the least value of the hyperparameter.
        """
        if getattr(value, "numel", lambda: 0)() == 1:
            value = value.item()
        what = f"The schedule {schedule} of {setting.name} gave {value!r} for update {max(self.updates, 1)}"
        if not is_a(value, Real) or is_a(value, bool):
            raise UsageError(f"{what}, which is a {type(value).__name__} and no number. Return a float.")
        number = float(value)
        if not math.isfinite(number):
            raise UsageError(f"{what}. A hyperparameter is finite; look for a division by zero or an overflow.")
        if setting.minimum is not None and number < setting.minimum:
            raise UsageError(
                f"{what}, and {setting.name} is at least {setting.minimum}. If it falls too far, bound it: "
                f"lambda n: max({setting.minimum}, f(n))."
            )
        return number
