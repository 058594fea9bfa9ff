"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowtrain import resolution


@pytest.fixture(autouse=True)
def forget_resolutions() -> Iterator[None]:
    """Take back what a test says with `resolve`: it counts for the whole process."""
    answers: dict[object, object] = vars(resolution)["_RESOLVED"]
    before = dict(answers)
    yield
    answers.clear()
    answers.update(before)
