"""Comments by which a type checker ignores a line: each says why, and there are few."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MOST = 2.0
"""The most ignores per 1,000 lines."""

_IGNORE = re.compile(r"# (?:type|pyright): ignore(?:\[[^]]*\])?")


def lines_of(folder: str) -> Iterator[tuple[str, str]]:
    """Return the lines of the modules in a folder, each with its place. ``tests/typing`` is wrong on purpose."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("tests/typing/"):
            yield from (
                (f"{name}:{number}", line) for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
            )


@pytest.mark.parametrize("folder", ["flowtrain", "executors", "tests", "bench"])
def test_every_ignore_has_a_reason_and_there_are_few(folder: str) -> None:
    lines = list(lines_of(folder))
    found = [(place, line) for place, line in lines if _IGNORE.search(line) and not line.lstrip().startswith("_IGNORE")]
    silent = [place for place, line in found if not re.search(r"\w", _IGNORE.split(line)[-1])]
    assert not silent, f"write the reason after the ignore, as a second comment: {', '.join(silent)}"
    assert sum(len(_IGNORE.findall(line)) for _, line in found) <= MOST * len(lines) / 1000
