"""Fixtures and settings for all tests."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from flowtrain.callback import resolution
from tests.support.examples import ORDINARY
from tests.support.programs import Programs

ROOT = Path(__file__).resolve().parent.parent

# The tensors of the tests are so small that several torch threads would mostly wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # inherited by the programs that tests start

# Every worker of a loader with a fork server would import these for two seconds and more: the server imports them once.
multiprocessing.set_forkserver_preload(["pytest", "torch", "flowtrain.callbacks", "flowtrain.testing"])

# A shell starts programs in the background with this signal ignored, and the programs of the tests inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("ordinary", max_examples=ORDINARY, deadline=None)
settings.register_profile(
    "long", max_examples=100 * ORDINARY, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ordinary")  # the option --hypothesis-profile=long is read later, and overrides this


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a cluster or several ranks; other slow tests have their marks in the source."""
    for item in items:
        if {"dask_processes", "make_dask_processes", "ranks"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


def untracked() -> set[str]:
    """Return the files that git neither tracks nor ignores, or none if this is no checkout."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return set()
    command = [git, "ls-files", "--others", "--exclude-standard"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines())


@pytest.fixture(autouse=True, scope="session")
def leave_no_files() -> Iterator[None]:
    """Fail if the tests have left files in the checkout; tests write into `tmp_path`."""
    before = untracked()
    yield
    left = sorted(untracked() - before)
    assert not left, f"the tests have left files in the checkout: {', '.join(left)}. Write into tmp_path."


@pytest.fixture(autouse=True, scope="session")
def freeze_imports() -> None:
    """Exclude imported modules from garbage collection: many tests collect, and each collection took 0.2 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def freeze_what_is_there() -> None:
    """Do so again for a module with many collections: other tests have imported more meanwhile."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """Yield a runner of programs in separate processes."""
    made = Programs()
    yield made
    made.close()


@pytest.fixture
def forget_compilations() -> None:
    """Forget what torch has compiled in this process: it compiles a function for eight backends, then no more."""
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def leave_no_signal_handlers() -> Iterator[None]:
    """Fail if a test leaves another handler of Ctrl-C or SIGTERM, with which a later test would wait for nothing."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    if after != before:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert after == before, "the test leaves other handlers of SIGINT and SIGTERM"


@pytest.fixture(autouse=True)
def forget_resolutions() -> Iterator[None]:
    """Take back the resolutions that a test makes with `resolve`, which count for the whole process."""
    answers: dict[object, object] = vars(resolution)["_RESOLVED"]
    before = dict(answers)
    yield
    answers.clear()
    answers.update(before)
