"""Both type checkers accept and reject the public types as the files in ``tests/typing/`` say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "typing"
ROOT = FOLDER.parents[1]


@pytest.fixture(scope="module", params=["mypy", "pyright"])
def complaints(request: pytest.FixtureRequest) -> dict[str, set[int]]:
    """Return the lines, by file, about which a checker complains."""
    found: dict[str, set[int]] = {path.name: set() for path in FOLDER.glob("*.py")}
    for name, line in _mypy() if request.param == "mypy" else _pyright():
        found[name].add(line)
    return found


def _mypy() -> list[tuple[str, int]]:
    """Run mypy with the options of the project, so that its cache of flowtrain and torch is used."""
    command = [sys.executable, "-m", "mypy", *(str(path) for path in sorted(FOLDER.glob("*.py")))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    rows = re.findall(r"^(?:.*/)?(\w+\.py):(\d+): error: ", done.stdout, re.MULTILINE)
    assert rows or done.returncode == 0, done.stdout + done.stderr
    return [(name, int(line)) for name, line in rows]


def _pyright() -> list[tuple[str, int]]:
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(FOLDER)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] >= 2, done.stdout + done.stderr
    return [
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in report["generalDiagnostics"]
        if each["severity"] == "error"
    ]


def marked(name: str) -> set[int]:
    """Return the lines of a file that are marked as rejected."""
    lines = (FOLDER / name).read_text("utf-8").splitlines()
    return {number for number, line in enumerate(lines, start=1) if "# rejected: " in line}


def test_what_works_is_accepted(complaints: dict[str, set[int]]) -> None:
    assert complaints["accepted.py"] == set()


def test_what_cannot_work_is_rejected_and_nothing_else(complaints: dict[str, set[int]]) -> None:
    wanted = marked("rejected.py")
    assert len(wanted) >= 12
    assert complaints["rejected.py"] == wanted
