"""The position of a fit: which epochs are complete, and how many batches of the current epoch.

A fit consists of *rounds*, each with one epoch of every phase. A fit by epochs ends after a number of rounds, a fit by
steps after a number of batches of its training phase. Within an epoch the position is a number of batches. To return to
it, a loader is iterated again with the random number generators as they were when the epoch began, and the batches that
were complete are taken from it and dropped.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.data.loaders import END_OF_DATA, keeps_position, length, set_own_state
from flowtrain.errors import CheckpointError
from flowtrain.state.by_phase import PhaseMap
from flowtrain.training.checkpoint.rng import (
    hold_queues,
    keeps_workers,
    loader_state,
    random_state,
    set_loader_state,
    set_random_state,
    start_workers,
)
from flowtrain.training.fit_data import check_gave, has_workers, set_epoch, unlimited

__all__ = ["Position", "Stream", "check_data", "loader_start", "open_pass", "replay", "warn_of_workers"]


class Position:
    """The position of a fit.

    Args:
        unit: The unit that the fit counts.

    Attributes:
        unit: ``"epochs"`` or ``"steps"``; empty outside of a fit.
        rounds: The number of complete rounds.
        steps: The number of batches of the training phase, in its complete epochs.
        done: The phases whose epoch in this round is complete, by name.
        phase: The name of the phase whose epoch is open; empty between epochs.
        begun: The `loader_start` of the open epoch; ``None`` before its loader is iterated.
        batches: The number of batches of the open epoch that a checkpoint had, when the fit resumed from it.
        stream: The training loader of a fit by steps with ``validate_every``, whose passes span epochs.
    """

    def __init__(self, unit: str = "") -> None:
        self.unit = unit
        self.rounds = self.steps = self.batches = 0
        self.done: list[str] = []
        self.phase = ""
        self.begun: dict[str, Any] | None = None
        self.stream: Stream | None = None
        self._resuming = False
        self._stepping = ""  # the phase whose batches are steps
        self._least = 1  # the steps of an epoch without a batch
        self._given_before = 0  # the batches that the stream gave before this epoch

    def count(self, phase: Phase, least: int) -> None:
        """Count the batches of this phase as steps.

        Args:
            phase: The training phase.
            least: The steps of an epoch without a complete batch, at least 1, because otherwise a fit whose every
                epoch is cancelled at once would not end.
        """
        self._stepping, self._least = repr(phase), least
        self._given_before = 0 if self.stream is None else self.stream.given

    def is_resumed(self, phase: Phase) -> bool:
        """Tell whether the epoch that begins is the open epoch of a checkpoint. Only the first call returns true."""
        resuming, self._resuming = self._resuming, False
        return resuming and self.phase == repr(phase)

    def begin_epoch(self, phase: Phase) -> None:
        """Note that an epoch of `phase` begins with its first batch; outside of a fit there is no position to note."""
        if self.unit:
            self.phase, self.begun, self.batches = repr(phase), None, 0

    def undo_begin(self, data: PhaseMap[Any], batches: int, passes: dict[Phase, int]) -> None:
        """Restore the generators to the beginning of the open pass, if its loader has failed before its first batch.

        The loader may have drawn some of its numbers, as for the seed of its workers, and not yet the others, as for
        its order. A fit that resumes begins the pass anew.

        Args:
            data: The loaders by phase.
            batches: The number of complete batches in the open epoch.
            passes: The number of passes of each phase. That of a stream, which has counted this pass, is changed.
        """
        begun = None if self.stream is None else self.stream.undo_begin()
        if begun is not None and self.stream is not None:
            passes[self.stream.phase] -= 1
        elif not batches:
            begun, self.begun = self.begun, None
        if begun is not None:
            for phase, loader in data.items():
                if repr(phase) == self.phase:
                    set_loader_state(loader, begun["loader"], own=False)
            if begun["random"] is not None:
                set_random_state(begun["random"])

    def end_epoch(self, batches: int) -> None:
        """Note that the epoch has ended after `batches` batches: after its last one, or by a cancel of the epoch."""
        if not self.unit:
            return
        self.done.append(self.phase)
        if self.phase == self._stepping:
            self.steps += batches or self._least
            if self.stream is not None and self._ahead(batches):
                self.stream.put_back()
        self.phase, self.begun = "", None

    def end_round(self) -> None:
        """Note that the epochs of all phases in this round are complete."""
        self.rounds += 1
        self.done.clear()

    def completed(self, phase: Phase) -> int:
        """Return how many epochs of a phase are complete where a fit begins or resumes; in a fit by steps, batches."""
        if self.unit == "epochs":
            return self.rounds + (repr(phase) in self.done)
        return self.steps + (self.batches if self.phase == repr(phase) else 0)

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Return the position as plain values.

        Args:
            batches: The number of complete batches in the open epoch.
        """
        return {
            "unit": self.unit,
            "rounds": self.rounds,
            "steps": self.steps,
            "done": list(self.done),
            "phase": self.phase,
            "batches": batches if self.phase else 0,
            "begun": self.begun if self.phase else None,
            "stream": None if self.stream is None else self.stream.state_dict(self._ahead(batches)),
        }

    def _ahead(self, batches: int) -> int:
        """Return how many batches the stream has given that training has not used yet: prefetch takes one ahead."""
        # With 5 batches given, none of them before this epoch, and 4 trained, prefetch holds 1. The batches that a
        # checkpoint had are not counted, because the stream has not given them in this process.
        if self.stream is None or self.phase != self._stepping:
            return 0
        return self.stream.given - self._given_before - (batches - self.batches)

    @classmethod
    def resumed(cls, state: Mapping[str, Any]) -> Position:
        """Return the position whose `state_dict` returned `state`."""
        position = cls(state["unit"])
        position.rounds, position.steps, position.done = state["rounds"], state["steps"], list(state["done"])
        position.phase, position.batches, position.begun = state["phase"], state["batches"], state["begun"]
        position._resuming = bool(position.phase)
        return position


def loader_start(loader: Any) -> dict[str, Any]:
    """Return the random number generators at the start of a pass, with which `replay` repeats the pass.

    A list or a tuple draws no random numbers, so the generators of the process are left out.
    """
    return {"random": None if type(loader) in (list, tuple) else random_state(), "loader": loader_state(loader)}


def check_data(state: Mapping[str, Any], data: PhaseMap[Any]) -> None:
    """Check that a fit with this data can return to a position.

    A loader that does not know its length passes, and `replay` checks it.

    Args:
        state: The position as `Position.state_dict` returned it.
        data: The loaders by phase.

    Raises:
        CheckpointError: `data` has no loader for the phase of the open epoch, or a loader has too few batches.
    """
    names = {repr(phase): phase for phase in data}
    if state["phase"] and state["phase"] not in names:
        raise CheckpointError(
            f"The checkpoint was taken in an epoch of {state['phase']}, and this fit has data for "
            f"{', '.join(names)}. Resume with the data of the run that wrote it."
        )
    for phase, loader in data.items():
        _, given = open_pass(state, phase)
        available = length(loader)
        if available is not None and available < given:
            raise _too_short(given, phase, available)


def open_pass(state: Mapping[str, Any], phase: Phase) -> tuple[dict[str, Any] | None, int]:
    """Return the start of the pass over a phase's data that is open at a position, and its number of batches so far.

    Args:
        state: The position as `Position.state_dict` returned it.
        phase: The phase.

    Returns:
        The `loader_start` of the pass, ``None`` if no pass is open, and the number of batches that it has given.
    """
    stream = state["stream"]
    if stream is not None and isinstance(phase, AbstractTrainingPhase):
        return stream["begun"], stream["count"] if stream["begun"] is not None else 0
    return (state["begun"], state["batches"]) if repr(phase) == state["phase"] else (None, 0)


def warn_of_workers(contents: Mapping[str, Any], data: PhaseMap[Any]) -> None:
    """Warn of workers whose random numbers a checkpoint cannot hold, and which do not draw them again.

    Args:
        contents: The contents of the checkpoint.
        data: The loaders of the fit that resumes.
    """
    stay: list[str] = []
    anew: list[str] = []
    for phase, loader in data.items():
        begun, batches = open_pass(contents["position"], phase)
        state = begun["loader"] if begun is not None else contents["loaders"].get(repr(phase), {})
        if state.get("workers") and keeps_workers(loader):
            stay.append(repr(phase))
        elif begun is not None and batches and keeps_position(unlimited(loader)) and has_workers(loader):
            anew.append(repr(phase))
    for found, what, remedy in (
        (stay, "keeps its workers from one pass to the next (persistent_workers=True)", "persistent_workers=False"),
        (anew, "continues within a pass with new workers (StatefulDataLoader)", "num_workers=0, or take a DataLoader"),
    ):
        if found:
            warnings.warn(
                f"The loader for {' and '.join(found)} {what}, and no checkpoint holds the states of their random "
                f"numbers: what the workers draw from here on (an augmentation) is not what they would have drawn "
                f"without the interruption. If they draw nothing, all is exact. Otherwise write {remedy}.",
                UserWarning,
                stacklevel=7,
            )


def _too_short(batches: int, phase: Phase, available: int) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint was taken after batch {batches} of an epoch of {phase!r}, and the loader gives only "
        f"{available}. Resume with the data of the run that wrote it."
    )


def replay(
    loader: Any,
    begun: Mapping[str, Any],
    batches: int,
    phase: Phase,
    reached: Mapping[str, Any] | None = None,
) -> Iterator[Any]:
    """Return an iterator of a loader after its first batches, with the random numbers of the pass that is repeated.

    Args:
        loader: The loader.
        begun: The `loader_start` of the pass.
        batches: The number of batches to take from the iterator and drop.
        phase: The phase that the batches are for.
        reached: The `loader_state` after these batches. A loader that keeps its position continues there and draws no
            batch again, unless it had given one more batch, which was held for prefetch.

    Raises:
        CheckpointError: The loader gives fewer than `batches` batches.
    """
    kept = unlimited(loader)
    if batches and reached is not None and reached.get("given") == batches and keeps_position(kept):
        set_own_state(kept, reached["own"], within=True)
        return islice(kept, None if kept is loader else loader.most - batches)
    start_workers(loader, begun["loader"])
    set_loader_state(loader, begun["loader"])
    if begun["random"] is not None:
        set_random_state(begun["random"])
    iterator: Iterator[Any] = iter(loader)
    for number in range(batches):
        if next(iterator, END_OF_DATA) is END_OF_DATA:
            raise _too_short(batches, phase, number)
    if batches:
        return iterator
    # Take the next batch now, before the generators change again. A loader draws its order at the first batch.
    return chain(list(islice(iterator, 1)), iterator)


class Stream:
    """The batches of a loader, pass after pass, without end.

    Every iteration continues after the last batch that the previous iteration took.

    Args:
        loader: The loader.
        phase: The phase that the batches are for.
        number: Called when a pass begins; returns the number of the pass, for `set_epoch`.

    Attributes:
        phase: The phase that the batches are for.
        given: The number of batches given so far.

    Raises:
        DataError: While iterating: a pass gives no batch.
    """

    def __init__(self, loader: Iterable[Any], phase: Phase, number: Callable[[], int]) -> None:
        self.given = 0
        self.phase = phase
        self._loader, self._number = loader, number
        self._pass: tuple[dict[str, Any] | None, int] = (None, 0)  # its `loader_start`, and the batches it has given
        self._previous: tuple[dict[str, Any] | None, int] = (None, 0)  # the same of the pass before
        self._resumed: Iterable[Any] | None = None
        self._again = False  # the last batch is given again
        self._batches = self._run()

    def undo_begin(self) -> dict[str, Any] | None:
        """Forget the open pass if its loader has failed before its first batch; return the `loader_start` of it."""
        begun, count = self._pass
        if count or inspect.getgeneratorstate(self._batches) != inspect.GEN_CLOSED:  # only an error ends the generator
            return None
        self._pass = None, 0
        return begun

    def __iter__(self) -> Iterator[Any]:
        return self._batches

    def _run(self) -> Generator[Any]:
        while True:
            source, self._resumed = self._resumed, None
            begun, count = self._pass
            if source is None:
                number = self._number()
                set_epoch(self._loader, number)
                source, begun, count = self._loader, {**loader_start(self._loader), "number": number}, 0
                self._pass, self._previous = (begun, count), self._pass
            for raw in source:
                count += 1
                self._again = True
                while self._again:
                    self._again = False
                    self._pass = begun, count
                    self.given += 1
                    yield raw
            check_gave(count, self.phase, self._loader)

    def close(self) -> None:
        """End the open pass, and so the workers of the loader.

        The generator and this stream refer to each other, so otherwise garbage collection would end them later. It may
        close the queue of a worker first, and then torch waits five seconds for that worker.
        """
        self._batches.close()
        hold_queues(self._loader)

    def put_back(self) -> None:
        """Give the last batch again: prefetch had taken it for an epoch that was cancelled before that batch."""
        begun, count = self._pass
        self._pass = begun, count - 1
        self.given -= 1
        self._again = True

    def resume(self, state: Mapping[str, Any], reached: Mapping[str, Any] | None = None) -> None:
        """Return to the position that `state_dict` returned. Call this before the first batch is taken.

        Args:
            state: The position.
            reached: The `loader_state` at this position.
        """
        if state["begun"] is not None:
            self._pass = state["begun"], state["count"]
            set_epoch(self._loader, state["begun"].get("number", 0))
            self._resumed = replay(self._loader, state["begun"], state["count"], self.phase, reached=reached)

    def state_dict(self, ahead: int) -> dict[str, Any]:
        """Return the start of the pass, and the number of its batches that training has used.

        Args:
            ahead: How many batches prefetch has taken that training has not used: 0 or 1.
        """
        # A pass that has given fewer batches than `ahead` has only begun: the unused batch ends the pass before.
        begun, count = self._pass if self._pass[1] >= ahead else self._previous
        return {"begun": begun, "count": count - ahead}
