"""The public interface: every module lists its public names, and importing flowtrain only defines them."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import flowtrain
import flowtrain_dask

MODULES = [
    name
    for package in (flowtrain, flowtrain_dask)
    for name in (
        package.__name__,
        *(found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")),
    )
]

# These modules are slow to import or not installed everywhere, so users import them themselves.
LAZY = ["dask", "distributed", "matplotlib", "networkx", "pandas", "rich", "sklearn", "tensorboard", "torchmetrics"]
IMPORT = """
import json, sys, threading
started, start = [], threading.Thread.start
threading.Thread.start = lambda thread: (started.append(thread.name), start(thread))
import flowtrain
print(json.dumps({"modules": list(sys.modules), "threads": started}))
"""


@pytest.mark.parametrize("name", [name for name in MODULES if "._" not in name])
def test_exports_are_sorted_and_resolve(name: str) -> None:
    module = importlib.import_module(name)
    assert hasattr(module, "__all__"), f"{name} does not say what is public: give it an __all__"
    exported: list[str] = module.__all__
    assert exported == sorted(exported, key=isort_style)
    assert len(exported) == len(set(exported)), f"{name}.__all__ names something twice"
    missing = [export for export in exported if not hasattr(module, export)]
    assert not missing, f"{name}.__all__ names missing attributes: {missing}"


@pytest.mark.parametrize("name", [name for name in MODULES if "._" not in name])
def test_a_name_without_an_underscore_is_exported(name: str) -> None:
    """So a reader sees at the top of a module all that other modules may use."""
    module = importlib.import_module(name)
    forgotten = defined_in(Path(str(module.__file__)).read_text("utf-8")) - set(module.__all__)
    assert not forgotten, f"{name}: put {sorted(forgotten)} into __all__, or give each a name with an underscore"


@pytest.mark.parametrize("name", MODULES)
def test_no_docstring_only_points_elsewhere(name: str) -> None:
    """An implementation of an interface says what it does itself: the interface cannot know."""
    path = Path(str(importlib.import_module(name).__file__))
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    pointing = [
        f"{path.name}:{node.lineno} {node.name}"
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, defined) and re.match(r"See `[\w.]+`", ast.get_docstring(node) or "")
    ]
    assert not pointing


def test_no_two_modules_export_a_class_of_one_name() -> None:
    """So a name in a docstring or an error means one thing."""
    homes: dict[str, list[str]] = {}
    for name in MODULES:
        for each in ast.parse(Path(str(importlib.import_module(name).__file__)).read_text("utf-8")).body:
            if isinstance(each, ast.ClassDef) and not each.name.startswith("_"):
                homes.setdefault(each.name, []).append(name)
    assert not {each: modules for each, modules in homes.items() if len(modules) > 1}


def test_names_that_a_source_defines() -> None:
    source = """
from elsewhere import imported
T = TypeVar("T")
P = ParamSpec("P")
LIMIT: Final = 3
Alias = dict[str, T]
_own = made = 1
def function(): inner = 1
class Public: attribute = 1
class _Private: ...
"""
    assert defined_in(source) == {"LIMIT", "Alias", "made", "function", "Public"}


def defined_in(source: str) -> set[str]:
    """Return the public names that a module defines itself, except its type variables, which serve it alone."""
    names: set[str] = set()
    for node in ast.parse(source).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Assign(value=ast.Call(func=ast.Name(id="TypeVar" | "ParamSpec"))):
                pass
            case ast.Assign(targets=targets):
                names.update(target.id for target in targets if isinstance(target, ast.Name))
            case _:
                pass
    return {name for name in names if not name.startswith("_")}


def test_the_face_exports_all_that_it_holds() -> None:
    public = {name for name, held in vars(flowtrain).items() if name[0] != "_" and not isinstance(held, ModuleType)}
    public.discard("annotations")  # `from __future__ import annotations` leaves this name behind
    forgotten = sorted(public - set(flowtrain.__all__))
    assert not forgotten, f"export it, or import it under a name with an underscore: {forgotten}"


@pytest.mark.parametrize(
    ("documented", "module"),
    [
        ("callbacks.summary", "callbacks.model_summary"),
        ("hyperparameter", "state.hyperparameters"),
        ("records", "logging.backend"),
        ("schedules", "callbacks.schedules"),
        ("stopping", "callbacks.stopping"),
        ("summary", "callbacks.model_summary"),
    ],
)
def test_documented_paths_of_moved_modules_are_the_modules(documented: str, module: str) -> None:
    """A callback or a criterion that an older version has pickled is found, and is of the same class."""
    assert importlib.import_module(f"flowtrain.{documented}") is importlib.import_module(f"flowtrain.{module}")


def test_importing_starts_no_thread_and_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT], stdout=subprocess.PIPE, check=True, text=True)
    seen = json.loads(done.stdout)
    heavy = sorted(set(LAZY) & set(seen["modules"]))
    assert (heavy, seen["threads"]) == ([], [])


def test_isort_style() -> None:
    names = ["MAX", "Read", "Step2", "Step10", "accuracy", "on"]
    assert sorted(sorted(names, key=str.lower), key=isort_style) == names


def isort_style(name: str) -> tuple[int, list[str | int]]:
    """Return the sort key of ruff's RUF022: CONSTANTS, then Classes, then the rest; digits compare as numbers."""
    kind = 0 if len(name) > 1 and name.isupper() else 1 if name[0].isupper() else 2
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
