"""The program ``flowtrain``: its texts, its exit status, and what it refuses to replace."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from flowtrain.callbacks import LogMetrics
from flowtrain.diagnostics.report.command import main
from flowtrain.logging import CsvBackend
from flowtrain.testing import tiny_learner


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run."""
    with tiny_learner(LogMetrics(CsvBackend(tmp_path / "first" / "a.csv")), n_batches=2) as learner:
        learner.fit(1)
    return tmp_path / "first"


def test_the_report_is_in_the_folder_and_is_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = folder / "report.html"
    for _ in range(2):
        assert main(["report", str(folder)]) == 0
        assert capsys.readouterr() == (f"{report}: 1 run (first), {report.stat().st_size / 2**20:.1f} MiB\n", "")
    assert sorted(path.name for path in folder.iterdir()) == ["a.csv", "report.html"]


def test_the_report_can_be_elsewhere(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--to", str(tmp_path / "new" / "r.html")]) == 0
    assert (tmp_path / "new" / "r.html").read_text("utf-8").startswith("<!doctype html>")
    assert [path.name for path in folder.iterdir()] == ["a.csv"]


def test_damage_is_said_in_the_terminal_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "a.csv").open("a") as file:
        file.write("Step/Tr")
    assert main(["report", str(folder)]) == 0
    assert "\n  a.csv: row 8 is cut off or damaged, and left out; the other rows" in capsys.readouterr().out


def test_a_page_of_somebody_else_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "report.html").write_text("mine", "utf-8")
    assert main(["report", str(folder)]) == 1
    said = f"flowtrain report: {folder}/report.html is no report of flowtrain, and is not replaced. Write --to PATH.\n"
    assert capsys.readouterr() == ("", said)
    assert main(["report", str(folder), "--to", str(folder / "report.html")]) == 0


def test_what_cannot_be_read_or_written_ends_with_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder / "no")]) == 1
    assert capsys.readouterr().err == (
        f"flowtrain report: There is no folder {folder}/no. Pass the folder of a run: the one that its logs are in.\n"
    )
    assert main(["report", str(folder), "--to", str(folder)]) == 1
    assert capsys.readouterr().err == (
        f"flowtrain report: The report cannot be written to '{folder}': Is a directory. Choose a path in a folder "
        f"that you may write to.\n"
    )
    assert main(["report", str(folder), "--to", str(folder / "a.csv" / "r.html")]) == 1
    assert f"File exists: {folder}/a.csv. Choose a path" in capsys.readouterr().err


def test_a_missing_bokeh_ends_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bokeh.plotting", None)
    assert main(["report", str(folder)]) == 1
    assert capsys.readouterr().err.endswith("Install it: pip install 'flowtrain[report]'\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["rapport"], "invalid choice: 'rapport'"),
        (["report"], "the following arguments are required: RUN_FOLDER"),
        (["report", "a", "b"], "unrecognized arguments: b"),
        (["report", "a", "--t", "b"], "unrecognized arguments: --t b"),
    ],
)
def test_wrong_arguments_end_with_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_and_version_end_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in ((["--help"], "report"), (["report", "--help"], "RUN_FOLDER"), (["--version"], "flowtrain")):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        assert text in capsys.readouterr().out


def test_the_program_is_installed_under_its_name() -> None:
    project = tomllib.loads(Path(__file__).parents[3].joinpath("pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"flowtrain": f"{main.__module__}:{main.__name__}"}
