"""The commands that make a release: a source distribution and a wheel, installed in a fresh environment.

Both type checkers find the types of what is installed there, from the wheel or, with ``pip install -e``, a checkout.

The tests take nothing from the network: the wheel is built from the source distribution with the hatchling of this
environment, and the fresh environment finds the requirements of flowtrain in this one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.versions import ROOT, python_in

pytestmark = pytest.mark.slow

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]

PROGRAM = """
from importlib import metadata, resources
import flowtrain, flowtrain_dask
from flowtrain.testing import tiny_learner

for package in (flowtrain, flowtrain_dask):
    print(package.__name__, package.__file__, resources.files(package).joinpath("py.typed").is_file())
print(metadata.version("flowtrain"))
with tiny_learner(executor="dask", n_batches=4) as learner:
    learner.fit(2)
    print(learner.cbstate.metrics_epoch[flowtrain.TrainingPhase]["Loss"].last()[0])
"""


TYPED = """from torch.nn import Linear
from flowtrain import Learner
from flowtrain_dask import DaskExecutor

Learner(Linear(1, 1), strict="very")
DaskExecutor(workers="two")
"""

# Reading torch takes mypy a minute; what it finds in calls of flowtrain is the same if all else has unknown types.
FLOWTRAIN_ALONE = """[mypy]
follow_imports = skip

[mypy-flowtrain.*,flowtrain_dask.*]
follow_imports = silent
"""

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-index", "--no-deps"]


def call(*command: str, folder: Path, code: int = 0) -> str:
    """Return the output of a command that runs in a folder and imports nothing from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


def copy_source(folder: Path) -> Path:
    """Copy the files of which a release is built, and return their folder."""
    source = folder / "source"
    for name in ("flowtrain", "executors"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return source


def make_environment(folder: Path) -> tuple[str, Path]:
    """Make an environment that has the requirements of flowtrain; return its interpreter and its site-packages."""
    call(sys.executable, "-m", "venv", "--without-pip", str(folder / "fresh"), folder=folder)
    python = str(python_in(folder / "fresh"))
    place = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    here = [each for each in sys.path if Path(each).name in ("site-packages", "dist-packages")]
    (place / "requirements.pth").write_text("\n".join(here), "utf-8")
    return python, place


def test_what_is_built_can_be_installed_and_trains(tmp_path: Path) -> None:
    source, dist = copy_source(tmp_path), tmp_path / "dist"
    hook = "import sys; from hatchling import build; build.build_sdist(sys.argv[1])"
    call(sys.executable, "-c", hook, str(dist), folder=source)
    [archive] = dist.iterdir()
    call(*PIP, "wheel", "--no-build-isolation", *OFFLINE, "-w", str(dist), str(archive), folder=tmp_path)
    [wheel] = dist.glob("*.whl")
    modules = {str(each.relative_to(source)) for each in (source / "flowtrain").rglob("*.py")}
    modules |= {str(each.relative_to(source / "executors")) for each in (source / "executors").rglob("*.py")}
    with ZipFile(wheel) as file:
        assert {name for name in file.namelist() if name.endswith(".py")} == modules
        others = {name.partition(".dist-info/")[2] or name for name in {*file.namelist()} - modules}
        described = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}
        assert others == described | {"flowtrain/py.typed", "flowtrain_dask/py.typed"}
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    copied = {str(each.relative_to(source)) for each in source.rglob("*") if each.is_file()}
    assert held == copied | {"PKG-INFO"}

    python, place = make_environment(tmp_path)
    call(*PIP, "--python", python, "install", *OFFLINE, str(wheel), folder=tmp_path)
    lines = call(python, "-c", PROGRAM, folder=tmp_path).splitlines()
    assert lines[:2] == [f"{name} {place / name / '__init__.py'} True" for name in ("flowtrain", "flowtrain_dask")]
    assert lines[2:] == [VERSION, "2"]


@pytest.mark.parametrize("editable", [False, True], ids=["installed", "editable"])
def test_type_checkers_find_the_types_of_what_is_installed(tmp_path: Path, editable: bool) -> None:
    source, project = copy_source(tmp_path), tmp_path / "project"
    python, _ = make_environment(tmp_path)
    how = ["--editable"] if editable else []
    call(*PIP, "--python", python, "install", "--no-build-isolation", *OFFLINE, *how, str(source), folder=tmp_path)
    project.mkdir()
    (project / "program.py").write_text(TYPED, "utf-8")
    (project / "mypy.ini").write_text(FLOWTRAIN_ALONE, "utf-8")

    mypy = call(sys.executable, "-m", "mypy", "--python-executable", python, "program.py", folder=project, code=1)
    assert re.findall(r"\w+\.py:(\d+): error: .*\[(.+)\]", mypy) == [("5", "arg-type"), ("6", "arg-type")], mypy
    pyright = call(sys.executable, "-m", "pyright", "--pythonpath", python, "program.py", folder=project, code=1)
    found = re.findall(r"\w+\.py:(\d+):\d+ - error: (?:.|\n  )*?\((report\w+)\)", pyright)
    assert found == [("5", "reportArgumentType"), ("6", "reportArgumentType")], pyright
