"""The digits example: once as its readers run it, in a process of its own, and then its options."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from flowtrain.examples.digits import main

pytest.importorskip("sklearn", reason="the example's extra is not installed")

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _same_torch() -> Iterator[None]:
    """Put back what the example sets for its whole process."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Ran:
    """A finished run: what it printed and what it left in its folder and in the folder for temporary files."""

    output: str
    errors: str
    status: int
    in_folder: list[Path]
    temporary: list[Path]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """The example without arguments, piped, warnings as errors, in an empty folder that is also its home."""
    home, temporary = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("temporary")
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "error"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-m", "flowtrain.examples.digits"],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # torch makes an empty cache folder among the temporary files whenever an optimizer is made: only files count there.
    files = [path for path in temporary.rglob("*") if path.is_file()]
    return Ran(done.stdout, done.stderr, done.returncode, list(home.rglob("*")), files)


def test_it_reaches_the_accuracy_that_it_prints(ran: Ran) -> None:
    assert (ran.status, ran.errors) == (0, "")
    [percent] = re.findall(r"^Accuracy on held-out digits: (\d+\.\d)%$", ran.output, re.MULTILINE)
    assert 96 <= float(percent) <= 100
    last = [line for line in ran.output.splitlines() if "ValidationPhase" in line][-1]
    epoch = re.fullmatch(r"epoch  10  ValidationPhase   Loss 0\.\d+  Accuracy (0\.\d+)", last)
    assert epoch is not None, last
    assert f"{float(epoch[1]):.1%}" == f"{percent}%"


def test_it_explains_the_order_and_says_where_to_look_next(ran: Ran) -> None:
    lines = ran.output.splitlines()
    own = "after Metrics: Metrics writes cbstate.metrics_epoch.Accuracy, BestEpoch reads it"
    assert [line.split("  ")[-1] for line in lines if "BestEpoch.compare" in line] == [own]
    assert re.search(r"^Best epoch: \d+, with 9[6-9]\.\d%$", ran.output, re.MULTILINE)
    [guide] = re.findall(r"^Where to look next: (\S+)", lines[-1])
    assert (ROOT / guide).is_file()


def test_what_is_piped_is_plain_text(ran: Ran) -> None:
    control = {character for character in ran.output if not character.isprintable()} - {"\n"}
    assert (control, ran.output.isascii()) == (set(), True)


def test_it_leaves_no_file_behind(ran: Ran) -> None:
    assert (ran.in_folder, ran.temporary) == ([], [])


def test_quiet_prints_the_accuracy_only(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--quiet", "--epochs", "1", "--executor", "serial"])
    printed = capsys.readouterr()
    assert re.fullmatch(r"Accuracy on held-out digits: \d+\.\d%\n", printed.out)
    assert printed.err == ""


def test_explain_prints_every_event(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--explain", "--epochs", "1"])
    titles = re.findall(r"^(\w+, \w*Phase)$", capsys.readouterr().out, re.MULTILINE)
    assert {"FitBegin, Phase", "BatchEnd, TrainingPhase", "EpochEnd, ValidationPhase", "FitEnd, Phase"} <= {*titles}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: '0' is not a whole number of at least 1"),
        (["--epochs", "-3"], "argument --epochs: '-3' is not a whole number of at least 1"),
        (["--epochs", "many"], "argument --epochs: 'many' is not a whole number of at least 1"),
        (["--executor", "seriall"], "There is no executor 'seriall'. Did you mean 'serial'? Known are: "),
        (["--quiet", "--explain"], "argument --explain: not allowed with argument --quiet"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    assert (ended.value.code, printed.out) == (2, "")
    assert printed.err.splitlines()[-1].startswith(f"python -m flowtrain.examples.digits: error: {message}")


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)  # what an import meets where a package is not installed
    with pytest.raises(SystemExit) as ended:
        main(["--quiet"])
    assert ended.value.code == (
        "This example needs scikit-learn, because the digits come with it. Install it and run this again:\n\n"
        "    pip install scikit-learn"
    )
