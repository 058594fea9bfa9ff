"""The digits example: one run in a separate process, as readers start it; the files that it leaves; its options."""

from __future__ import annotations

import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain.examples import digits
from flowtrain.examples.digits import main
from tests.support.logs import log_records

pytestmark = pytest.mark.slow

pytest.importorskip("sklearn", reason="the example's extra is not installed")

ROOT = Path(__file__).parents[2]


@contextmanager
def same_torch() -> Generator[None]:
    """Restore the settings of torch that the example sets for its whole process."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _same_torch() -> Iterator[None]:
    with same_torch():
        yield


@dataclass(frozen=True)
class Ran:
    """A finished run: its output, and the files in its folder and in the folder for temporary files."""

    output: str
    errors: str
    status: int
    in_folder: list[Path]
    temporary: list[Path]


def bare_environment() -> dict[str, str]:
    """Return an environment without settings of a terminal, in which flowtrain can be imported."""
    environment = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    return environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "executors")])}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run the example without arguments, piped, with warnings as errors, in an empty folder that is also its home."""
    home, temporary = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("temporary")
    warnings = "error,ignore:Implicitly cleaning up:ResourceWarning"  # torch 2.6 leaves a folder to Python at the end
    environment = {**bare_environment(), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": warnings}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "TMPDIR": str(temporary)}
    done = subprocess.run(
        [sys.executable, "-m", "flowtrain.examples.digits"],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # Torch makes an empty cache folder among the temporary files for every optimizer, so only files count there.
    files = [path for path in temporary.rglob("*") if path.is_file()]
    return Ran(done.stdout, done.stderr, done.returncode, list(home.rglob("*")), files)


def test_it_reaches_the_accuracy_that_it_prints(ran: Ran) -> None:
    assert (ran.status, ran.errors) == (0, "")
    [percent] = re.findall(r"^Accuracy on held-out digits: (\d+\.\d)%$", ran.output, re.MULTILINE)
    assert 96 <= float(percent) <= 100
    last = [line for line in ran.output.splitlines() if "ValidationPhase" in line][-1]
    epoch = re.fullmatch(r"epoch  10  ValidationPhase   Loss 0\.\d+  Accuracy (0\.\d+)  \S+ s  [\d,]+ samples/s", last)
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


EPOCHS = 3


@dataclass(frozen=True)
class Logged:
    """A run with ``--log``: its folder and its output."""

    folder: Path
    output: str


@pytest.fixture(scope="module", params=["serial", "dask"])
def logged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """Return a run of some epochs."""
    if request.param == "serial":
        found: Logged = request.getfixturevalue("serial")
        return found
    return log_run(tmp_path_factory.mktemp("runs") / "a", request.param)


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """Return the same run under the serial executor, for comparison."""
    return log_run(tmp_path_factory.mktemp("runs") / "serial", "serial")


def log_run(folder: Path, executor: str, *more: str) -> Logged:
    """Run the example in this process, or in a separate one if it starts workers, which import the program."""
    if executor == "local":
        done = subprocess.run(command(folder, executor, *more), env=bare_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Logged(folder, done.stdout)
    with same_torch(), redirect_stdout(io.StringIO()) as output:
        main(options(folder, executor, *more))
    return Logged(folder, output.getvalue())


def options(folder: Path, executor: str, *more: str) -> list[str]:
    return ["--epochs", str(EPOCHS), "--log", str(folder), "--executor", executor, *more]


def command(folder: Path, executor: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "flowtrain.examples.digits", *options(folder, executor, *more)]


def lines(folder: Path) -> list[dict[str, Any]]:
    """Return the JSON lines without clock times, and with the content of the files that they name."""
    found = log_records(folder / "log.jsonl")
    for record in found:
        if record["kind"] == "Image":
            record["content"] = (folder / record["value"]).read_bytes()
    return found


def accuracy(output: str) -> str:
    [percent] = re.findall(r"^Accuracy on held-out digits: (\d+\.\d)%$", output, re.MULTILINE)
    return str(percent)


def test_the_log_is_the_same_in_place_and_beside_training(logged: Logged, serial: Logged) -> None:
    """Rules 13 and 25: every executor gives the serial result, and each record is written once."""
    ours = lines(logged.folder)
    assert (ours, accuracy(logged.output)) == (lines(serial.folder), accuracy(serial.output))
    assert {record["kind"] for record in ours} == {"Value", "Histogram", "Image", "Text", "Settings"}
    assert f"  log.jsonl     {len(ours):,} records, one on each line" in logged.output


def test_tensorboard_reads_it(logged: Logged) -> None:
    readers: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    guidance = dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    found, training, validation = (
        readers.EventAccumulator(str(logged.folder / phase), size_guidance=guidance).Reload()
        for phase in ("", "TrainingPhase", "ValidationPhase")
    )
    losses = validation.Scalars("Epoch/Loss")
    assert [event.step for event in losses] == [*range(1, EPOCHS + 1)]
    in_lines = [
        each for each in lines(logged.folder) if (each["group"], each["name"]) == ("Epoch/ValidationPhase", "Loss")
    ]
    assert [event.value for event in losses] == pytest.approx([each["value"] for each in in_lines])
    assert "HyperParams/LearningRate" in found.Tags()["scalars"]
    assert {"Step/Weights/0.weight", "Step/Gradients/6.bias"} <= {*training.Tags()["histograms"]}
    [tag] = validation.Tags()["images"]
    picture = validation.Images(tag)[0]
    assert (tag, picture.height) == ("Step/Misclassified/Digits", 64)
    assert picture.width in range(64, 513, 64)
    captions = validation.Tensors("Step/Misclassified/Labels")
    said = captions[0].tensor_proto.string_val[0].decode().split(", ")
    assert picture.width == 64 * len(said)
    assert all(re.fullmatch(r"\d read as \d", each) and each[0] != each[-1] for each in said)


def test_its_checkpoints_are_the_latest_and_the_best(logged: Logged) -> None:
    folder = logged.folder / "checkpoints"
    latest, best = ((folder / name).read_text("utf-8") for name in ("latest", "best"))
    assert f"the latest is {latest.strip()}, the best is {best.strip()}" in logged.output
    assert latest.strip() == f"epoch-{EPOCHS:04d}.ckpt"
    [number] = re.findall(r"^Best epoch: (\d+),", logged.output, re.MULTILINE)
    assert best.strip() == f"epoch-{int(number):04d}.ckpt"
    assert torch.load(folder / latest.strip(), weights_only=True)["model"][""]["0.weight"].shape == (32, 1, 3, 3)


def test_the_report_of_the_lanes_comes_last(logged: Logged) -> None:
    title = "What the callbacks that log did beside training:"
    if title not in logged.output:
        assert "lane" not in logged.output
        return  # the serial executor has no lanes
    after = logged.output.split(title)[1].splitlines()
    name = "LogMetrics+LogHyperParams+LogHistograms+LogVisualization"
    assert any(line.startswith((f"  {name}: in place: ", f"  {name}: lane: ")) for line in after)
    if after[1] != "no deferred callbacks":  # the cost decides
        assert after[1].split()[:5] == ["lane", "where", "events", "done", "pending"]
        lane, where, events, done, pending, *_ = after[2].split()
        assert (lane, where, done, pending) == (name, "thread", events, "0")


@pytest.mark.cpu_only("the interrupted run is a process of its own, which computes on the CPU")
@pytest.mark.parametrize(
    ("executor", "number", "where"),
    [("dask", signal.SIGTERM, "thread"), ("local", signal.SIGINT, "process, worker tcp:")],
)
def test_a_run_that_was_interrupted_goes_on_as_if_it_had_not_been(
    serial: Logged, tmp_path: Path, executor: str, number: signal.Signals, where: str
) -> None:
    """Rules 28 and 29: the same log, checkpoints and accuracy; workers get the signal too.

    Workers on the same machine import the program, which trains only if it is the main module.
    """
    folder = tmp_path / "a"
    running = subprocess.Popen(
        command(folder, executor), env=bare_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    with running:
        while not (folder / "checkpoints" / "epoch-0001.ckpt").exists():
            assert running.poll() is None, running.communicate()
            time.sleep(0.005)
        os.killpg(running.pid, number)
        _, errors = running.communicate(timeout=60)
    said = {
        signal.SIGINT: "Ctrl-C: training stops after this batch; press it again to stop at once.",
        signal.SIGTERM: "SIGTERM: training stops after this batch.",
    }
    assert (running.returncode, errors) == (
        1, f"{said[number]}\n\nInterrupted. Continue with the same command and --resume: {folder}\n"
    )  # fmt: skip
    assert (folder / "checkpoints" / "interrupted.ckpt").exists()
    with_rest = log_run(folder, executor, "--resume")
    assert re.search(rf"^epoch +{EPOCHS}  ValidationPhase", with_rest.output, re.MULTILINE)
    assert "epoch   1  TrainingPhase" not in with_rest.output
    assert accuracy(with_rest.output) == accuracy(serial.output)
    assert lines(folder) == lines(serial.folder)
    # The cost decides whether it was deferred at all.
    assert re.search(rf"^ *LogMetrics\+\S+(  {where}|: in place: )", with_rest.output, re.MULTILINE)


def test_a_run_that_was_interrupted_before_it_began_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting the workers takes seconds, in which the signal comes."""

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "make_learner", interrupted)
    with pytest.raises(SystemExit, match="Interrupted before training began: there is no checkpoint to resume from"):
        main(["--log", str(tmp_path / "a")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--executor", "no://127.0.0.1:1"], "DaskExecutor(cluster='no://127.0.0.1:1') is no address of a dask sch"),
        (["--resume"], "The folder {folder}/checkpoints has no checkpoint that is complete: there is no file 'latest'"),
    ],
)
def test_what_is_found_out_later_is_said_in_one_line_too(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--quiet", "--log", str(tmp_path / "a"), *arguments])
    error = capsys.readouterr().err.splitlines()[-1]
    expected = message.replace("{folder}", str(tmp_path / "a"))
    assert error.startswith(f"python -m flowtrain.examples.digits: error: {expected}")


def test_a_folder_with_a_run_in_it_is_left_alone(logged: Logged, capsys: pytest.CaptureFixture[str]) -> None:
    before = lines(logged.folder)
    with pytest.raises(SystemExit):
        main(["--log", str(logged.folder)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(
        f"error: {logged.folder} has a run in it. Add --resume to continue it, or log to another folder"
    )
    assert lines(logged.folder) == before


@pytest.mark.parametrize(
    ("missing", "executor", "message"),
    [
        ("flowtrain_dask", "local", "executor='local' needs flowtrain_dask, which is not installed: pip install 'flow"),
        ("flowtrain_dask", "dask", "executor='dask' needs flowtrain_dask, which is not installed: pip install 'flow"),
        ("tensorboard", "serial", "TensorBoardBackend needs tensorboard, which cannot be imported"),
    ],
)
def test_a_missing_extra_is_named(
    missing: str,
    executor: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit):
        main(["--quiet", "--log", str(tmp_path / "a"), "--executor", executor])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"python -m flowtrain.examples.digits: error: {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume continues the run in a folder. Name the folder: --log FOLDER"),
        (["--executor", "local"], "--executor local is for callbacks that log, and without --log there are none. Add"),
        (["--executor", "tcp://127.0.0.1:1"], "--executor tcp://127.0.0.1:1 is for callbacks that log, and without"),
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
    monkeypatch.setitem(sys.modules, "sklearn", None)  # this makes the import fail as if the package were missing
    with pytest.raises(SystemExit) as ended:
        main(["--quiet"])
    assert ended.value.code == (
        "This example needs scikit-learn, because the digits come with it. Install it and run this again:\n\n"
        "    pip install scikit-learn"
    )
