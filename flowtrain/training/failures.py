"""The failures that a piece of work meets on its way, which are raised when the rest of the work is done.

Whatever is raised in a fit, every scope is closed with its event, and pending work is finished. So the loop collects
failures in an object of the class here, and raises the worst of them at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from flowtrain.errors import merge, raise_worst

__all__ = ["Failures"]

P = ParamSpec("P")
T = TypeVar("T")


class Failures:
    """Exceptions in the order in which they were raised; without any it is false.

    ``with failures:`` adds the exception that leaves the block, and the program continues behind the block.

    Args:
        found: Exceptions that are known already.

    >>> failures = Failures()
    >>> failures.attempt(int, "1")
    1
    >>> with failures:
    ...     raise KeyError("a")
    >>> failures.add(ValueError("b"))
    >>> failures, failures.first, failures.only(KeyError)
    (Failures(KeyError('a'), ValueError('b')), KeyError('a'), False)
    """

    def __init__(self, *found: BaseException) -> None:
        self._found = [*found]

    def add(self, failure: BaseException) -> None:
        """Add a failure."""
        self._found.append(failure)

    def attempt(self, do: Callable[P, T], *args: P.args, **named: P.kwargs) -> T | None:
        """Call a function, and return its result; or add its failure, and return ``None``."""
        with self:
            return do(*args, **named)
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if failure is not None:
            self._found.append(failure)
        return True

    def __bool__(self) -> bool:
        return bool(self._found)

    def __iter__(self) -> Iterator[BaseException]:
        return iter(self._found)

    @property
    def first(self) -> BaseException | None:
        """The failure that was raised first; ``None`` without any."""
        return self._found[0] if self._found else None

    @property
    def worst(self) -> BaseException | None:
        """The failure that `raise_worst` raises, with all others noted on it (`merge`); ``None`` without any."""
        return merge(self._found) if self._found else None

    def only(self, *kinds: type[BaseException]) -> bool:
        """Tell whether every failure is of one of these types; also true without any."""
        return all(isinstance(failure, kinds) for failure in self._found)

    def drop(self) -> None:
        """Forget all failures, which have no effect."""
        self._found.clear()

    def raise_worst(self, *ends: type[BaseException]) -> None:
        """Raise the worst failure, if there is one that has none of the types `ends`, and forget all.

        See `flowtrain.errors.raise_worst` for why this object does not keep the exception that it raises.
        """
        if self._found:
            raise_worst(self._found, *ends)

    def __repr__(self) -> str:
        return f"Failures({', '.join(map(repr, self._found))})"
