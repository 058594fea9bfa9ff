"""How many examples hypothesis tries."""

from __future__ import annotations

from hypothesis import settings

ORDINARY = 300
"""The number of examples of a property in an ordinary run; `tests/conftest.py` has the profiles."""


def examples(number: int) -> int:
    """Return how many examples to try where an ordinary run has time for `number` only; a long run has more."""
    return max(1, settings().max_examples * number // ORDINARY)
