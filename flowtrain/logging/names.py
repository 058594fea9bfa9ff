"""Names for trackers that do not take every text as a name.

1. Each character that the tracker does not take becomes ``_``.
2. A part between two slashes that is empty, ``.`` or ``..`` becomes ``_``, because it would name another folder.
3. A name that is too long is cut.
4. If an earlier name has given the same result, ``_2`` is added, or ``_3``, and so on.

A name that the tracker takes stays the same, unless an earlier name was changed into it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["Names", "readable"]


class Names:
    """Translates the names of one run into names of a tracker.

    Args:
        forbidden: A regular expression for the characters that the tracker does not take.
        longest: The largest length of a name, in bytes.
    """

    def __init__(self, forbidden: str, longest: int) -> None:
        self._forbidden = re.compile(forbidden)
        self._longest = longest
        self._given: dict[str, str] = {}
        self._taken: set[str] = set()

    def of(self, name: str) -> str:
        """Return the name in the tracker, which is the same at every call."""
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
        """The translated names: the name in the tracker by the name that was passed to `of`."""
        return dict(self._given)

    def restore(self, given: Mapping[str, str]) -> None:
        """Translate these names as before, and forget all others."""
        self._given = dict(given)
        self._taken = set(given.values())

    def _cleaned(self, name: str) -> str:
        parts = self._forbidden.sub("_", name).split("/")
        clean = "/".join("_" if part in ("", ".", "..") else part for part in parts)
        if len(clean.encode()) > self._longest - 4:  # leaves room for "_2" up to "_999"
            clean = clean.encode()[: self._longest - 4].decode(errors="ignore").rstrip("/.") or "_"
        return clean


def readable(text: str) -> str:
    """Return a text as UTF-8 can write it: a lone surrogate, as names of files may have, becomes ``?``."""
    return text.encode(errors="replace").decode()
