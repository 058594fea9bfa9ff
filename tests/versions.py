"""Run the tests with other versions: ``python -m tests.versions [lowest] [pinned] [newest] [options] [-- for pytest]``.

For each pair of an interpreter and a set of packages, this makes a virtual environment, installs flowtrain with the
requirements of its tests into it, runs pytest there, and prints a table of the results. The sets are:

- ``lowest``: each requirement has the lowest version that ``pyproject.toml`` allows,
- ``pinned``: the versions of ``constraints.txt``,
- ``newest``: the newest versions of everything.

The interpreters are those that ``pyproject.toml`` names in its classifiers, searched in ``--python``, on ``PATH`` and
among the versions of pyenv. An environment stays in its folder and is brought up to date by the next run. Each takes
several gigabytes. pip reads its usual settings, such as ``PIP_EXTRA_INDEX_URL`` for builds of torch without CUDA.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SETS = ("lowest", "pinned", "newest")


def claimed(project: Mapping[str, Any]) -> list[str]:
    """Return the versions of Python in the classifiers of a project, such as ``"3.11"``."""
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", each) for each in project["classifiers"])
    return [match[1] for match in found if match]


def floors(requirements: Sequence[str]) -> list[str]:
    """Return constraints for pip that give each requirement its lowest allowed version.

    Raises:
        ValueError: A requirement has no ``>=``, so it has no lowest version.
    """
    pins: list[str] = []
    for each in map(Requirement, requirements):
        lowest = [part.version for part in each.specifier if part.operator == ">="]
        if len(lowest) != 1:
            raise ValueError(f"{each} has no lowest version. Write {each.name}>=VERSION in pyproject.toml.")
        pins.append(f"{each.name}=={lowest[0]}" + (f"; {each.marker}" if each.marker else ""))
    return pins


def constraints(kind: str, project: Mapping[str, Any]) -> str:
    """Return the text of the constraints file for a set of packages."""
    if kind == "pinned":
        return (ROOT / "constraints.txt").read_text("utf-8")
    if kind == "newest":
        return ""
    return "\n".join(floors([*project["dependencies"], *project["optional-dependencies"]["test"]])) + "\n"


def candidates(version: str, named: Sequence[str], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the paths where an interpreter of a version may be: named ones, those on ``PATH``, those of pyenv."""
    yield from named
    for place in environment.get("PATH", os.defpath).split(os.pathsep):
        for name in (f"python{version}", "python"):
            if found := shutil.which(name, path=place):
                yield found
    versions = Path(environment.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    patches = [each for each in versions.glob(f"{version}.*") if each.name.rpartition(".")[2].isdecimal()]
    for folder in sorted(patches, key=lambda each: int(each.name.rpartition(".")[2]), reverse=True):
        yield str(python_in(folder))


def python_in(folder: Path) -> Path:
    """Return the path of the interpreter in an environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def ask(python: str, source: str) -> str:
    """Return the output of a program in an interpreter, or an empty text if the interpreter does not run it."""
    try:
        return subprocess.run([python, "-c", source], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # such as a command of pyenv for a version that is not in use
        return ""


def find(version: str, named: Sequence[str], environment: Mapping[str, str]) -> str | None:
    """Return the path of the first interpreter that runs and has a version, or ``None``."""
    source = "import sys; print('%d.%d' % sys.version_info[:2])"
    return next((each for each in candidates(version, named, environment) if ask(each, source) == version), None)


def summary(report: Path, code: int) -> str:
    """Return the counts in a JUnit report of pytest, or pytest's exit code if there is no report."""
    if not report.exists():
        return f"pytest ended with {code}"
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, "0"))
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    text = f"{passed} passed, {counts['failures']} failed, {counts['errors']} errors, {counts['skipped']} skipped"
    return text if code in (0, 1) else f"{text}, pytest ended with {code}"


def run(python: str, kind: str, folder: Path, minutes: float, arguments: Sequence[str]) -> tuple[str, str, bool]:
    """Make an environment and run the tests in it.

    Args:
        python: The path of the interpreter.
        kind: The set of packages, one of `SETS`.
        folder: The place of the environment.
        minutes: The time limit for the tests.
        arguments: The arguments for pytest.

    Returns:
        The version of torch, the counts of tests or the step that failed, and whether everything passed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    limits, report = folder / "constraints.txt", folder / "report.xml"
    limits.write_text(constraints(kind, project), "utf-8")
    report.unlink(missing_ok=True)
    made = python_in(folder)
    update = ["--upgrade", "--upgrade-strategy", "eager"] if kind == "newest" else []
    install = [str(made), "-m", "pip", "install", *update, "-c", str(limits), "-e", f"{ROOT}[test]"]
    for step in ([python, "-m", "venv", str(folder)], install):
        print("$", *step, flush=True)
        if subprocess.run(step, cwd=ROOT).returncode:
            return "-", "the environment cannot be made" if step is not install else "pip cannot install", False
    test = [str(made), "-m", "pytest", "-n", "2", "--dist", "loadfile", f"--junit-xml={report}", *arguments]
    print("$", *test, flush=True)
    torch = ask(str(made), "import torch; print(torch.__version__)") or "-"
    path = os.pathsep.join([str(made.parent), os.environ.get("PATH", os.defpath)])
    try:
        code = subprocess.run(test, cwd=ROOT, env={**os.environ, "PATH": path}, timeout=60 * minutes).returncode
    except subprocess.TimeoutExpired:
        return torch, f"not done after {minutes:g} minutes", False
    return torch, summary(report, code), code == 0


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for, and return the exit code: 0 if all tests passed that could be run."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    parser = argparse.ArgumentParser("python -m tests.versions", description=__doc__)
    parser.add_argument("sets", nargs="*", metavar="SET", help="of packages: lowest, pinned, newest; all by default")
    parser.add_argument("--on", action="append", metavar="VERSION", help="a version of Python, such as 3.12")
    parser.add_argument("--python", action="append", default=[], metavar="PATH", help="an interpreter to use")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "versions", help="for the environments")
    parser.add_argument("--minutes", type=float, default=90.0, help="the time limit for each run of the tests")
    options = parser.parse_args(arguments[:split])
    if unknown := [each for each in options.sets if each not in SETS]:
        parser.error(f"no set of packages is called {unknown[0]}; there are {', '.join(SETS)}")
    rows, good = [("python", "packages", "torch", "tests")], True
    for version in options.on or claimed(project):
        python = find(version, options.python, os.environ)
        if python is None:
            rows.append((version, "-", "-", "no interpreter found"))
            good = good and not options.on
            continue
        for kind in options.sets or SETS:
            folder = options.folder.resolve() / f"{version}-{kind}"
            torch, result, passed = run(python, kind, folder, options.minutes, arguments[split + 1 :])
            rows.append((version, kind, torch, result))
            good = good and passed
    print(table(rows))
    return 0 if good and len(rows) > 1 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
