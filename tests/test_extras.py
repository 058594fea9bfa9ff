"""Every extra works in a process that sees only the packages that its install command brings.

A folder of links to these packages stands for a fresh environment, and needs neither network nor time. Packages for
other extras or for the tests are not in it, and no environment variable is set.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.support.programs import Programs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]

PRELUDE = """
import os, warnings
from functools import partial
warnings.filterwarnings("error", module="flowtrain")  # those of other packages are their own
import torch
from flowtrain import Learner, Read
from flowtrain.callbacks import LogHistograms, LogHyperParams, LogMetrics, LogVisualization
from flowtrain.logging import *
from flowtrain.testing import tiny_learner

def everything(learner, kinds):
    with open("report.txt", "w") as file:
        file.write("a report")
    shown = [Value(float(learner.batch.loss)), Image(torch.ones(3, 8, 8)), Text("text"), File("report.txt")]
    return [each for each in [*shown, Histogram(torch.arange(9))] if isinstance(each, kinds)]

def train(backend, executor="serial"):
    show = LogVisualization(partial(everything, kinds=backend.accepts), backend, every=2, access={"batch.loss": Read()})
    histograms = [LogHistograms(backend, every=2)] if Histogram in backend.accepts else []
    callbacks = LogMetrics(backend), *histograms, show, LogHyperParams(backend, settings={"a": 1})
    with tiny_learner(*callbacks, executor=executor, n_batches=4) as learner:
        learner.fit(1)
"""

PROGRAMS = {
    "": """
train(JsonlBackend("log.jsonl"))
print(len(open("log.jsonl").readlines()) > 20)
with tiny_learner(LogMetrics(CsvBackend("a.csv"))) as learner:
    learner.fit(1)
print(open("a.csv").readline().strip())
for make in (
    lambda: tiny_learner(executor="dask"),
    lambda: tiny_learner().plot(),
    lambda: tiny_learner().history.to_pandas(),
    lambda: tiny_learner().report("report.html"),
    lambda: train(TensorBoardBackend("board")),
    lambda: train(MLflowBackend("e")),
    lambda: train(WandbBackend("p")),
):
    try:
        make()
    except Exception as error:
        print(type(error).__name__, str(error).rpartition("pip install ")[2].split()[0].rstrip("."))
""",
    "mlflow": """
import logging
logging.disable(logging.INFO)
train(MLflowBackend("e"))
from mlflow.tracking import MlflowClient
client = MlflowClient()
[run] = client.search_runs([client.get_experiment_by_name("e").experiment_id])
print(run.info.status, sorted(run.data.metrics)[0], run.data.params)
store = os.path.exists("mlflow.db") or os.path.isdir("mlruns")  # the default store of mlflow 3.0 is a folder
print(len(client.get_metric_history(run.info.run_id, "Step/TrainingPhase/Loss")), store)
print(sorted(each.path for each in client.list_artifacts(run.info.run_id)))
""",
    "wandb": """
os.environ["WANDB_MODE"] = "offline"  # online it asks for an account
train(WandbBackend("p"))
print(len(os.listdir("wandb")) > 0)
""",
    "tensorboard": """
train(TensorBoardBackend("board"))
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
board = EventAccumulator("board/TrainingPhase").Reload()
print(sorted(board.Tags()["scalars"])[0], len(board.Tags()["images"]), len(board.Tags()["histograms"]))
""",
    "safetensors": """
from flowtrain.callbacks import Checkpointer
with tiny_learner(Checkpointer("folder", weights='safetensors')) as learner:
    learner.fit(1)
from safetensors.torch import load_file
[file] = [each for each in os.listdir("folder") if each.endswith(".safetensors")]
print(sorted(load_file(os.path.join("folder", file))))
""",
    "pandas": """
history = tiny_learner(n_batches=4).fit(1)
print(history.to_pandas()[["epoch", "update", "metric"]].values.tolist())
""",
    "remote": """
from flowtrain.callbacks import Checkpointer
tiny_learner(Checkpointer("memory://runs/a")).fit(1)
learner = tiny_learner(Checkpointer("memory://runs/a"))
learner.fit(2, resume="auto")
print(dict(learner.cbstate.history))
""",
    "torchdata": """
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader
from flowtrain.callbacks import Checkpointer
x = torch.arange(8.0).unsqueeze(1)
def made():
    return tiny_learner(Checkpointer("run", every_steps=1), data=StatefulDataLoader(TensorDataset(x, 3 * x), 2))
made().fit(steps=3)
learner = made()
learner.fit(steps=6, resume="run")
print(dict(learner.cbstate.history))
""",
    "transformers": """
from contextlib import redirect_stdout
from flowtrain.examples import huggingface
with open("lines.txt", "w") as lines, redirect_stdout(lines):
    learner = huggingface.main(1)
print("classifier.weight" in learner.model.state_dict())
""",
    "plot": """
with tiny_learner() as learner:
    learner.fit(1)
    learner.plot(to="curves.png")
print(os.path.getsize("curves.png") > 1000)
""",
    "report": """
import io
from contextlib import redirect_stdout
from flowtrain.diagnostics.report.command import main
with tiny_learner(LogMetrics(JsonlBackend("run/log.jsonl"))) as learner:
    learner.fit(1)
    learner.report("page.html")
with redirect_stdout(io.StringIO()):
    print(main(["report", "run"]))
print(os.path.getsize("page.html") < 2e6, os.path.getsize("run/report.html") < 2e6)
""",
    "dask": """
from flowtrain_dask import DaskExecutor
if __name__ == "__main__":
    for number, executor in enumerate(["dask", DaskExecutor("local")]):
        train(JsonlBackend(f"{number}.jsonl"), executor)
        print(len(open(f"{number}.jsonl").readlines()) > 20)
""",
    "examples": """
from flowtrain.examples import digits
print(digits.__name__)
""",
}

PRINTED = {
    "": """True
group,step,Loss
ExecutorError 'flowtrain[dask]'
UsageError 'flowtrain[plot]'
UsageError 'flowtrain[pandas]'
UsageError 'flowtrain[report]'
LoggingError 'flowtrain[tensorboard]'
LoggingError 'flowtrain[mlflow]'
LoggingError 'flowtrain[wandb]'
""",
    "mlflow": """FINISHED Epoch/TrainingPhase/Loss {'a': '1'}
4 True
['Step']
""",
    "wandb": "True\n",
    "tensorboard": "Epoch/Loss 1 2\n",
    "safetensors": "['coeff']\n",
    "pandas": "[[1, 4, 'Loss'], [1, 4, 'Loss']]\n",
    "remote": "{TrainingPhase: Counts(epochs=2, steps=32, steps_epoch=16, updates=32), "
    "ValidationPhase: Counts(epochs=2, steps=32, steps_epoch=16, updates=0)}\n",
    "torchdata": "{TrainingPhase: Counts(epochs=2, steps=6, steps_epoch=3, updates=6)}\n",
    "transformers": "True\n",
    "plot": "True\n",
    "report": "True True\n",
    "dask": "True\nTrue\n",
    "examples": "flowtrain.examples.digits\n",
}


def distributions(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """Return the distributions, by name, that pip would install for the requirements."""
    found: dict[str, metadata.Distribution] = {}
    done: set[tuple[str, str]] = set()
    waiting = [Requirement(each) for each in requirements]
    while waiting:
        wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        for extra in {"", *wanted.extras} - {extra for known, extra in done if known == name}:
            done.add((name, extra))
            found[name] = metadata.distribution(name)
            for line in found[name].requires or ():
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    waiting.append(needed)
    return found


def link(folder: Path, requirements: list[str]) -> None:
    """Fill a folder with links to the packages of the requirements, as a fresh environment would have them."""
    for distribution in distributions(requirements).values():
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).is_symlink():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))


REQUIRED: list[str] = PROJECT["dependencies"]


def make_packages(folder: Path, requirements: list[str]) -> Path:
    """Return a new folder with flowtrain and the packages of the requirements."""
    packages = folder / "packages"
    packages.mkdir()
    link(packages, requirements)
    for source in (ROOT / "flowtrain", ROOT / "executors" / "flowtrain_dask"):
        (packages / source.name).symlink_to(source)
    return packages


class Forked:
    """Forks programs from processes that have imported torch, and see what flowtrain requires without extras.

    One of them sees numpy besides, since torch looks for it once, when it is imported.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[bool, Programs] = {}

    def with_numpy(self, numpy: bool) -> Programs:
        """Return what forks those that see numpy, or the others."""
        if numpy not in self._made:
            (self._folder / str(numpy)).mkdir()
            packages = make_packages(self._folder / str(numpy), [*REQUIRED, *(["numpy"] if numpy else [])])
            self._made[numpy] = Programs("torch", "torch._dynamo", bare=True, packages=packages)
        return self._made[numpy]

    def close(self) -> None:
        """End the processes that fork."""
        for each in self._made.values():
            each.close()


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    """Forks the programs of this module."""
    made = Forked(tmp_path_factory.mktemp("required"))
    yield made
    made.close()


def run_program(folder: Path, packages: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in an interpreter of its own that sees only these packages."""
    (folder / "program.py").write_text(program, "utf-8")
    # -S: no site-packages. Workers of a cluster inherit the environment variables and the path of their parent.
    start = f"import runpy, sys; sys.path.append({str(packages)!r}); runpy.run_path('program.py', run_name='__main__')"
    variables = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-S", "-B", "-c", start],
        cwd=folder, env=variables, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def run_forked(folder: Path, packages: Path, program: str, forked: Forked) -> subprocess.CompletedProcess[str]:
    """Run a program that sees only these packages, and finds torch imported."""
    start = f"""
import os, sys
os.chdir({str(folder)!r})
os.environ["HOME"] = os.getcwd()
sys.path[:] = [each for each in sys.path if each != os.environ["PYTHONPATH"]] + [{str(packages)!r}]
del os.environ["PYTHONPATH"]
"""
    return forked.with_numpy((packages / "numpy").exists()).run(start + program, seconds=240)


def test_every_extra_is_tried() -> None:
    assert {"", *EXTRAS} - {"test", "dev", "docs", "peers"} == set(PROGRAMS)


@pytest.mark.parametrize("extra", PROGRAMS)
def test_an_extra_is_all_that_it_needs(extra: str, tmp_path: Path, forked: Forked) -> None:
    packages, here = make_packages(tmp_path, [*REQUIRED, *EXTRAS.get(extra, [])]), tmp_path / "here"
    here.mkdir()
    if extra == "dask":  # its workers import the program from its file
        done = run_program(here, packages, PRELUDE + PROGRAMS[extra])
    else:
        done = run_forked(here, packages, PRELUDE + PROGRAMS[extra], forked)
    assert done.returncode == 0, done.stderr
    assert done.stdout == PRINTED[extra]


@pytest.mark.parametrize("fresh", [True, False])
def test_nothing_else_is_seen(fresh: bool, tmp_path: Path, forked: Forked) -> None:
    packages, here, program = make_packages(tmp_path, REQUIRED), tmp_path / "here", "import torch, sys\nimport pytest"
    here.mkdir()
    done = run_program(here, packages, program) if fresh else run_forked(here, packages, program, forked)
    assert done.stderr.rstrip().endswith("ModuleNotFoundError: No module named 'pytest'")
