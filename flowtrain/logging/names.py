"""Names for trackers that do not take every text as a name.

1. A character that the tracker does not take becomes ``_``.
2. So does what stands between two slashes if it is empty, ``.`` or ``..``, which would name another place.
3. A name that is too long is cut.
4. If another name has become the same before, ``_2`` is added, then ``_3``, and so on.

A name that the tracker takes stays as it is, unless another one has become the same before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["Names"]


class Names:
    """What the names of one run are called in a tracker.

    Args:
        forbidden: A regular expression for the characters that the tracker does not take.
        longest: How many bytes a name has at most.
    """

    def __init__(self, forbidden: str, longest: int) -> None:
        self._forbidden = re.compile(forbidden)
        self._longest = longest
        self._given: dict[str, str] = {}
        self._taken: set[str] = set()

    def of(self, name: str) -> str:
        """Return what a name is called in the tracker: the same whenever it is asked for."""
        found = self._given.get(name)
        if found is None:
            clean = self._cleaned(name)
            found, number = clean, 2
            while found in self._taken:
                found, number = f"{clean}_{number}", number + 1
            self._given[name] = found
            self._taken.add(found)
        return found

    @property
    def given(self) -> dict[str, str]:
        """The names that were asked for, and what each is called."""
        return dict(self._given)

    def restore(self, given: Mapping[str, str]) -> None:
        """Call these names as they were called before; others are new."""
        self._given = dict(given)
        self._taken = set(given.values())

    def _cleaned(self, name: str) -> str:
        parts = self._forbidden.sub("_", name).split("/")
        clean = "/".join("_" if part in ("", ".", "..") else part for part in parts)
        if len(clean.encode()) > self._longest - 4:  # with room for a number
            clean = clean.encode()[: self._longest - 4].decode(errors="ignore").rstrip("/.") or "_"
        return clean
