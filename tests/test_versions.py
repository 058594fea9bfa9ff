"""Which versions ``python -m tests.versions`` installs, which interpreters it finds, and what it prints."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from tests.versions import ROOT, SETS, candidates, claimed, constraints, find, floors, main, summary, table

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_a_floor_becomes_a_pin() -> None:
    requirements = ["torch>=2.6", "pyright[nodejs]>=1.1.400", "a>=1.2,<3", 'b>=1; python_version < "3.13"']
    assert floors(requirements) == ["torch==2.6", "pyright==1.1.400", "a==1.2", 'b==1; python_version < "3.13"']


def test_a_requirement_without_a_floor_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^rich<9 has no lowest version\. Write rich>=VERSION in pyproject\.toml\.$"):
        floors(["rich<9"])


def test_constraints_of_each_set() -> None:
    lowest = constraints("lowest", PROJECT).splitlines()
    assert {"torch==2.6", "networkx==3.2.1", "dask==2025.1", "pytest-xdist==3.6"} <= {*lowest}
    assert len(lowest) == len(PROJECT["dependencies"]) + len(PROJECT["optional-dependencies"]["test"])
    assert "\ntorch==" in constraints("pinned", PROJECT)
    assert constraints("newest", PROJECT) == ""


def test_claimed_versions_begin_with_the_required_one() -> None:
    versions = claimed(PROJECT)
    assert versions[0] == PROJECT["requires-python"].removeprefix(">=")
    assert versions == [f"3.{11 + each}" for each in range(len(versions))]


def test_the_public_workflow_runs_every_set_on_every_claimed_version() -> None:
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8")
    versions = ", ".join(f'"{each}"' for each in claimed(PROJECT))
    assert f"matrix:\n        python: [{versions}]\n        packages: [{', '.join(SETS)}]\n" in workflow


@pytest.mark.skipif(sys.platform == "win32", reason="names of interpreters")
def test_interpreters_are_those_named_then_those_on_path_then_the_last_patch_of_pyenv(tmp_path: Path) -> None:
    on_path = tmp_path / "bin" / "python3.12"
    pyenv = [tmp_path / "pyenv" / "versions" / name / "bin" / "python" for name in ("3.12.9", "3.12.10", "3.12-dev")]
    for each in (on_path, *pyenv):
        each.parent.mkdir(parents=True)
        each.touch(0o755)
    environment = {"PATH": str(on_path.parent), "PYENV_ROOT": str(tmp_path / "pyenv")}
    found = list(candidates("3.12", ["mine"], environment))
    assert found == ["mine", str(on_path), str(pyenv[1]), str(pyenv[0])]


def test_an_interpreter_of_another_version_or_one_that_does_not_run_is_passed_over(tmp_path: Path) -> None:
    environment = {"PATH": "", "PYENV_ROOT": str(tmp_path)}
    version = "{}.{}".format(*sys.version_info)
    assert find(version, [str(tmp_path / "gone"), sys.executable], environment) == sys.executable
    assert find("3.1", [sys.executable], environment) is None


def test_counts_come_from_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert summary(report, 4) == "pytest ended with 4"
    report.write_text('<testsuites><testsuite tests="9" failures="2" errors="1" skipped="3"/></testsuites>', "utf-8")
    assert summary(report, 1) == "3 passed, 2 failed, 1 errors, 3 skipped"
    assert summary(report, 2) == "3 passed, 2 failed, 1 errors, 3 skipped, pytest ended with 2"


def test_columns_are_aligned() -> None:
    assert table([("python", "torch"), ("3.11", "2.6.0"), ("3.9", "-")]) == "python  torch\n3.11    2.6.0\n3.9     -"


def test_a_set_that_does_not_exist_and_a_version_that_is_not_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["oldest"])
    assert "no set of packages is called oldest; there are lowest, pinned, newest" in capsys.readouterr().err
    assert main(["--on", "3.1", "--folder", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "3.1     -         -      no interpreter found"
