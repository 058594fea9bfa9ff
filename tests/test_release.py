"""The commands that make a release: a source distribution and a wheel, installed in a fresh environment.

The test takes nothing from the network: the wheel is built from the source distribution with the setuptools of this
environment, and the fresh environment finds the requirements of flowtrain in this one.
"""

from __future__ import annotations

import os
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


def call(*command: str, folder: Path) -> str:
    """Return the output of a command that runs in a folder and imports nothing from the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_what_is_built_can_be_installed_and_trains(tmp_path: Path) -> None:
    source, dist, fresh = tmp_path / "source", tmp_path / "dist", tmp_path / "fresh"
    for name in ("flowtrain", "executors"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    hook = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    call(sys.executable, "-c", hook, str(dist), folder=source)
    [archive] = dist.iterdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    call(*pip, "wheel", "--no-build-isolation", *offline, "-w", str(dist), str(archive), folder=tmp_path)
    [wheel] = dist.glob("*.whl")
    modules = {str(each.relative_to(source)) for each in (source / "flowtrain").rglob("*.py")}
    modules |= {str(each.relative_to(source / "executors")) for each in (source / "executors").rglob("*.py")}
    with ZipFile(wheel) as file:
        assert {name for name in file.namelist() if name.endswith(".py")} == modules
        assert any(name.endswith("licenses/LICENSE") for name in file.namelist())
    with tarfile.open(archive) as file:
        assert any(name.endswith("/executors/flowtrain_dask/py.typed") for name in file.getnames())

    call(sys.executable, "-m", "venv", "--without-pip", str(fresh), folder=tmp_path)
    python = str(python_in(fresh))
    call(*pip, "--python", python, "install", *offline, str(wheel), folder=tmp_path)
    place = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=tmp_path).strip())
    here = [each for each in sys.path if Path(each).name in ("site-packages", "dist-packages")]
    (place / "requirements.pth").write_text("\n".join(here), "utf-8")
    lines = call(python, "-c", PROGRAM, folder=tmp_path).splitlines()
    assert lines[:2] == [f"{name} {place / name / '__init__.py'} True" for name in ("flowtrain", "flowtrain_dask")]
    assert lines[2:] == [VERSION, "2"]
