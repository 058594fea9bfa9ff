"""Each mistake in the synchronisation is seen: the other tests of this folder prove something."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.accelerator.mutations import MUTATIONS, Mutation, Seen, mutated
from tests.accelerator.simulated.clocks import Race
from tests.accelerator.simulated.machine import Machine, Schedule
from tests.accelerator.trainings import train

SCHEDULES: tuple[Schedule, ...] = ("lazy", "side first", "main first", "eager")


class Looked(NamedTuple):
    """What a training on the simulated device shows."""

    race: bool
    values: dict[str, str]
    waits: dict[str, int]


def look(machine: Machine, schedule: Schedule, training: str) -> Looked:
    """Train, and return what shows."""
    machine.begin(schedule)
    try:
        values, race = train(training, "sim"), False
    except Race:
        values, race = {}, True
    waits: dict[str, int] = {kind: count for kind, count in machine.waits.items() if kind != "event"}
    if training != "deferred callbacks":  # whose lanes wait in threads of their own, sooner or later
        waits["events of everything"] = machine.slack.count(0)
    return Looked(race, values, waits)


@cache
def right(machine: Machine, schedule: Schedule, training: str) -> Looked:
    """Return what shows where there is no mistake."""
    return look(machine, schedule, training)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_it_is_seen(machine: Machine, mutation: Mutation) -> None:
    seen: set[Seen] = set()
    for schedule in SCHEDULES:
        expected = right(machine, schedule, mutation.training)
        with mutated(mutation):
            found = look(machine, schedule, mutation.training)
        if found.race:
            seen.add("race")
        else:
            seen |= {"values"} if found.values != expected.values else set()
            seen |= {"waits"} if found.waits != expected.waits else set()
        if mutation.seen in seen:
            return
    pytest.fail(f"{mutation.name}: seen are {sorted(seen)}, not {mutation.seen}")


def test_the_documentation_says_how_many_there_are() -> None:
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text()
    assert f"\n- {len(MUTATIONS)} mistakes, such as " in page
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_without_a_mistake_nothing_shows(machine: Machine) -> None:
    for schedule in SCHEDULES:
        assert look(machine, schedule, "deferred callbacks") == right(machine, schedule, "deferred callbacks")
