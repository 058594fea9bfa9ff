"""Values without a type for the checkers: wrong arguments, whose error at run time a test asserts."""

from __future__ import annotations

from typing import Any

__all__ = ["untyped"]


def untyped(value: object) -> Any:
    """Return `value` without its type, so that a test can pass it where a checker expects another type."""
    return value
