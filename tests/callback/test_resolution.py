"""Resolutions of a conflict: which callbacks may give one, and which of them count for two callbacks (rule 8)."""

from __future__ import annotations

from typing import Any

import pytest

from flowtrain import Callback, NoConflict, Resolution, RunFirst, Unresolvable, resolve
from flowtrain.callback.resolution import resolutions_for
from flowtrain.errors import ResolutionError


class One(Callback): ...


class Sub(One): ...


class Other(Callback): ...


def heard(one: Callback, other: Callback) -> list[Resolution]:
    return [answer for _, answer in resolutions_for(one, other)]


def test_an_answer_counts_for_subclasses_and_in_both_directions() -> None:
    resolve(One, Other, RunFirst(One))
    for pair in ((One(), Other()), (Other(), One()), (Sub(), Other()), (Other(), Sub())):
        assert resolutions_for(*pair) == [("resolve(One, Other, ...)", RunFirst(One))]
    assert heard(One(), Sub()) == heard(One(), One()) == []


def test_every_answer_that_fits_is_heard() -> None:
    resolve(One, Other, NoConflict())
    resolve(Other, Sub, Unresolvable())
    assert heard(Sub(), Other()) == [NoConflict(), Unresolvable()]
    assert heard(One(), Other()) == [NoConflict()]


@pytest.mark.parametrize("turned", [False, True])
def test_a_later_answer_replaces_an_earlier_one(turned: bool) -> None:
    resolve(One, Other, RunFirst(One))
    one, other = (Other, One) if turned else (One, Other)
    resolve(one, other, RunFirst(Other))
    assert heard(One(), Other()) == [RunFirst(Other)]


@pytest.mark.parametrize("turned", [False, True])
def test_an_answer_is_taken_back(turned: bool) -> None:
    resolve(One, Other, NoConflict())
    one, other = (Other, One) if turned else (One, Other)
    resolve(one, other, None)
    assert heard(One(), Other()) == []


def test_two_of_one_type() -> None:
    resolve(One, One, NoConflict())
    assert heard(One(), One()) == heard(One(), Sub()) == [NoConflict()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((One(), Other, NoConflict()), "resolve() takes two callback types and a resolution, got <One> and <class "),
        ((One(), Other, NoConflict()), "Write resolve(Mine, Yours, RunFirst(Mine)), with the classes and not instan"),
        (
            (One, Other, RunFirst),
            "resolve(One, Other, ...) got <class 'flowtrain.callback.resolution.RunFirst'>. "
            "Write RunFirst(One), NoConflict() or Unresolvable().",
        ),
        ((One, Other, True), "resolve(One, Other, ...) got True."),
        ((One, Other, RunFirst(Sub)), "resolve(One, Other, RunFirst(...)) names <class "),
        ((One, Other, RunFirst(Sub)), "Name one of the two types."),
    ],
)
def test_what_resolve_refuses(arguments: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(ResolutionError) as caught:
        resolve(*arguments)
    assert message in str(caught.value)
    assert heard(One(), Other()) == []
