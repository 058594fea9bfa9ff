"""The position of a fit: which epochs are done, and how far the current one is.

A fit by epochs consists of *rounds*, each an epoch of every phase. A fit by steps does too; there the steps of the
training phase count. Within an epoch the position is a number of batches. To get back there the loader begins as it
did, with the generators as they were then, and the batches that were done are taken from it and dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.errors import CheckpointError
from flowtrain.state.by_phase import PhaseMap
from flowtrain.training.checkpoint.rng import (
    loader_state,
    random_state,
    set_loader_state,
    set_random_state,
    start_workers,
)
from flowtrain.training.data import check_gave, length, set_epoch

__all__ = ["Position", "Stream", "begin_again", "beginning", "check_data", "open_pass"]


class Position:
    """Where a fit is.

    Attributes:
        unit: ``"epochs"`` or ``"steps"``, what the fit counts; empty outside of a fit.
        rounds: Rounds that are complete.
        steps: Batches of the training phase in its epochs that have ended.
        done: The phases whose epoch in this round has ended.
        phase: The phase whose epoch is open; empty between epochs.
        begun: What the loader of that epoch began with; ``None`` until it has.
        batches: How many batches of that epoch were done when it was resumed.
        stream: The training loader of a fit by steps that goes on over epochs.
    """

    def __init__(self, unit: str = "") -> None:
        self.unit = unit
        self.rounds = self.steps = self.batches = 0
        self.done: list[str] = []
        self.phase = ""
        self.begun: dict[str, Any] | None = None
        self.stream: Stream | None = None
        self._resuming = False
        self._stepping = ""
        self._least = 1
        self._given = 0

    def count(self, phase: Phase, least: int) -> None:
        """Count the batches of this phase as steps; an epoch without any counts as `least`, or a fit might not end."""
        self._stepping, self._least = repr(phase), least
        self._given = 0 if self.stream is None else self.stream.given

    def leave_resumed(self, phase: Phase) -> bool:
        """Return whether this epoch is the one that a checkpoint was taken in; once only."""
        resuming, self._resuming = self._resuming, False
        return resuming and self.phase == repr(phase)

    def begin_epoch(self, phase: Phase) -> None:
        """The epoch of a phase begins, from its first batch."""
        self.phase, self.begun, self.batches = repr(phase), None, 0

    def end_epoch(self, batches: int) -> None:
        """The epoch has ended normally, after so many batches."""
        if self.unit:
            self.done.append(self.phase)
        if self.phase == self._stepping:
            self.steps += batches or self._least
            if self.stream is not None and self._ahead(batches):
                self.stream.put_back()
        self.phase, self.begun = "", None

    def end_round(self) -> None:
        """All epochs of a round are done."""
        self.rounds += 1
        self.done.clear()

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Return the position as plain values, after so many batches of the open epoch."""
        return {
            "unit": self.unit,
            "rounds": self.rounds,
            "steps": self.steps,
            "done": list(self.done),
            "phase": self.phase,
            "batches": batches if self.phase else 0,
            "begun": self.begun,
            "stream": None if self.stream is None else self.stream.state_dict(self._ahead(batches)),
        }

    def _ahead(self, batches: int) -> int:
        """Return how many batches were taken from the stream and not used yet: prefetch takes one."""
        if self.stream is None or self.phase != self._stepping:
            return 0
        return self.stream.given - self._given - (batches - self.batches)

    @classmethod
    def resumed(cls, state: Mapping[str, Any]) -> Position:
        """Return the position that `state_dict` gave."""
        position = cls(state["unit"])
        position.rounds, position.steps, position.done = state["rounds"], state["steps"], list(state["done"])
        position.phase, position.batches, position.begun = state["phase"], state["batches"], state["begun"]
        position._resuming = bool(position.phase)
        return position


def beginning(loader: Any) -> dict[str, Any]:
    """Return what `begin_again` needs to go through a loader once more; a list gives the same without being told."""
    return {"random": None if type(loader) in (list, tuple) else random_state(), "loader": loader_state(loader)}


def check_data(state: Mapping[str, Any], data: PhaseMap[Any]) -> None:
    """Check that a fit with this data can get to the position that `Position.state_dict` gave, as far as that is known.

    A loader that does not know its length is found to be too short only when it is gone through.

    Raises:
        CheckpointError: It has no data for the phase, or a loader that is too short.
    """
    names = {repr(phase): phase for phase in data}
    if state["phase"] and state["phase"] not in names:
        raise CheckpointError(
            f"The checkpoint was taken in an epoch of {state['phase']}, and this fit has data for "
            f"{', '.join(names)}. Resume with the data of the run that wrote it."
        )
    for phase, loader in data.items():
        _, given = open_pass(state, phase)
        there = length(loader)
        if there is not None and there < given:
            raise _too_short(given, phase, there)


def open_pass(state: Mapping[str, Any], phase: Phase) -> tuple[dict[str, Any] | None, int]:
    """Return what the pass of a phase began with that was open at a position, and how many batches it had given."""
    stream = state["stream"]
    if stream is not None and isinstance(phase, AbstractTrainingPhase):
        return stream["begun"], stream["count"] if stream["begun"] is not None else 0
    return (state["begun"], state["batches"]) if repr(phase) == state["phase"] else (None, 0)


def _too_short(batches: int, phase: Phase, there: int) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint was taken after batch {batches} of an epoch of {phase!r}, and the loader gives only {there}. "
        f"Resume with the data of the run that wrote it."
    )


def begin_again(loader: Iterable[Any], begun: Mapping[str, Any], batches: int, phase: Phase) -> Iterator[Any]:
    """Return an iterator of a loader that has given so many batches, drawn as they were drawn the first time.

    Raises:
        CheckpointError: The loader has fewer.
    """
    start_workers(loader, begun["loader"])
    if begun["random"] is not None:
        set_random_state(begun["random"])
    set_loader_state(loader, begun["loader"])
    iterator = iter(loader)
    if not batches:  # a loader draws its order when it is first asked: now, before the generators are put elsewhere
        return chain(list(islice(iterator, 1)), iterator)
    missing = object()
    for number in range(batches):
        if next(iterator, missing) is missing:
            raise _too_short(batches, phase, number)
    return iterator


class Stream:
    """The batches of a loader, pass after pass, without end.

    Iterating again goes on where the last iteration stopped.

    Args:
        loader: The loader.
        phase: The phase whose data it gives.
        number: Called when a pass begins; returns its number, for `set_epoch`.

    Attributes:
        given: How many batches it has given.

    Raises:
        DataError: A pass gives no batch.
    """

    def __init__(self, loader: Iterable[Any], phase: Phase, number: Callable[[], int]) -> None:
        self.given = 0
        self._loader, self._phase, self._number = loader, phase, number
        self._pass: tuple[dict[str, Any] | None, int] = (None, 0)  # what it began with, and the batches it has given
        self._before: tuple[dict[str, Any] | None, int] = (None, 0)
        self._resumed: Iterable[Any] | None = None
        self._again = False
        self._batches = self._run()

    def __iter__(self) -> Iterator[Any]:
        return self._batches

    def _run(self) -> Iterator[Any]:
        while True:
            source, self._resumed = self._resumed, None
            begun, count = self._pass
            if source is None:
                number = self._number()
                set_epoch(self._loader, number)
                source, begun, count = self._loader, {**beginning(self._loader), "number": number}, 0
                self._pass, self._before = (begun, count), self._pass
            for raw in source:
                count += 1
                self._again = True
                while self._again:
                    self._again = False
                    self._pass = begun, count
                    self.given += 1
                    yield raw
            check_gave(count, self._phase, self._loader)

    def put_back(self) -> None:
        """Give the last batch once more: prefetch had taken it for an epoch that was cancelled before it."""
        begun, count = self._pass
        self._pass = begun, count - 1
        self.given -= 1
        self._again = True

    def resume(self, state: Mapping[str, Any]) -> None:
        """Draw again what was drawn, from what `state_dict` returned. To be called before the first batch."""
        if state["begun"] is not None:
            self._pass = state["begun"], state["count"]
            set_epoch(self._loader, state["begun"].get("number", 0))
            self._resumed = begin_again(self._loader, state["begun"], state["count"], self._phase)

    def state_dict(self, ahead: int) -> dict[str, Any]:
        """Return what the pass began with, and how many batches it has given, less those that were taken `ahead`."""
        # What was taken ahead, one batch at most, may be the last of the pass before.
        begun, count = self._pass if self._pass[1] >= ahead else self._before
        return {"begun": begun, "count": count - ahead}
