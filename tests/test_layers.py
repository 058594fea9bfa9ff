"""The order of packages in imports, checked by parsing every import statement, and the docstrings of packages.

A package of ``flowtrain/`` imports only from packages before it in `PACKAGES`, and no two modules import each other.
Imports inside of functions and under ``if TYPE_CHECKING`` count as well. The docstring of a package names its modules.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

# The entries of ``flowtrain/`` from the bottom up; ``flowtrain`` is ``flowtrain/__init__.py``, the public interface.
PACKAGES = (
    "errors",
    "data",
    "callback",
    "state",
    "logging",
    "metrics",
    "graph",
    "core",
    "training",
    "diagnostics",
    "callbacks",
    "learner",
    "flowtrain",
    "testing",
    "examples",
)
ENTRIES = {*PACKAGES} - {"flowtrain"} | {"__init__"}

# The folders of ``executors/flowtrain_dask/``; a module that is loaded imports only from folders before its own. ``""``
# stands for the modules beside the folders, which put the parts together.
DASK = ("parallel", "snapshots", "lanes", "cluster", "deferred", "")
OPEN_TO_DASK = ("errors", "data", "callback", "state", "logging", "metrics", "graph")  # what an executor may import

PACKAGE = Path(__file__).parents[1] / "flowtrain"
EXECUTOR = Path(__file__).parents[1] / "executors" / "flowtrain_dask"
PACKAGE_FOLDERS = [path.parent for root in (PACKAGE, EXECUTOR) for path in sorted(root.rglob("__init__.py"))][1:]
FOREIGN = {"dask", "distributed", "flowtrain_dask"}  # executors import flowtrain, and never the other way round


class Import(NamedTuple):
    """One imported module: its line, its absolute name, and whether it is imported together with its importer."""

    line: int
    module: str
    at_import: bool


def test_the_top_folder_has_the_entries_of_the_design() -> None:
    found = {
        path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")
    }
    assert found == ENTRIES


def test_every_import_goes_down() -> None:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    assert sources, f"no source in {PACKAGE}"
    wrong = [f"flowtrain/{file}:{each}" for file, source in sources.items() for each in complaints(file, source)]
    assert not wrong, "\n".join(wrong)


def test_only_the_table_of_executors_names_their_package() -> None:
    """An import by a text would be one that no other test of this file sees."""
    naming = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Constant) and re.fullmatch(r"flowtrain_dask[\w.:]*", str(node.value))
    }
    assert naming == {"graph/executor.py"}


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("graph/plan.py", "from flowtrain.graph.nodes import Graph"),
        ("graph/registry.py", "from flowtrain.callback.callback import Callback"),
        ("callbacks/metrics.py", "from flowtrain.metrics import accuracy\nimport flowtrain.callback.events, torch"),
        ("callbacks/__init__.py", "from flowtrain.callbacks.metrics import Metrics"),
        ("logging/csv.py", "from flowtrain.logging.files import rename"),
        ("examples/digits.py", "from flowtrain import Learner, testing"),
        ("__init__.py", "from flowtrain.learner import Learner"),
        ("graph/nodes.py", "def to_networkx():\n    import networkx"),
        ("graph/nodes.py", "if TYPE_CHECKING:\n    import networkx as nx"),
    ],
)
def test_right_imports_pass(file: str, source: str) -> None:
    assert complaints(file, source) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("graph/plan.py", "import torch\nimport flowtrain.core", "2: graph imports core, which stands above it"),
        ("callback/events.py", "def f():\n    from flowtrain import state", "2: callback imports state, which stands"),
        ("graph/plan.py", "if TYPE_CHECKING:\n    import flowtrain.learner", "2: graph imports learner, which stands"),
        ("core/torch_core.py", "from flowtrain import Learner", "1: core imports flowtrain, which stands above it"),
        (
            "errors.py",
            "from flowtrain.utils import shorten",
            "1: errors imports utils, which is no entry of flowtrain/",
        ),
        ("errors.py", "from .signals import CancelException", "1: errors imports relatively"),
        ("utils.py", "", "1: utils is no entry of flowtrain/"),
        ("core/torch_core.py", "def f():\n    import dask.threaded", "2: core imports dask"),
        ("examples/digits.py", "def f():\n    import flowtrain_dask", "2: examples imports flowtrain_dask"),
        ("core/torch_core.py", "def f():\n    from networkx import DiGraph", "2: core imports networkx"),
        (
            "graph/nodes.py",
            "try:\n    import networkx\nfinally:\n    pass",
            "2: graph imports networkx when it is loaded",
        ),
    ],
)
def test_a_wrong_import_is_named(file: str, source: str, message: str) -> None:
    [complaint] = complaints(file, source)
    assert complaint.startswith(message)


def test_the_dask_executor_imports_down_its_folders_and_knows_the_lower_packages_only() -> None:
    sources = {path.relative_to(EXECUTOR).as_posix(): path.read_text("utf-8") for path in EXECUTOR.rglob("*.py")}
    assert {file.rpartition("/")[0] for file in sources} == set(DASK)
    wrong = [f"{file}:{each}" for file, source in sources.items() for each in dask_complaints(file, source)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        (
            "lanes/lane.py",
            "import torch\nfrom flowtrain_dask.cluster.calls import ClusterCalls",
            "2: lanes imports cluster",
        ),
        ("snapshots/pool.py", "from flowtrain_dask.executor import DaskExecutor", "1: snapshots imports executor"),
        ("cluster/worker.py", "from flowtrain.learner import Learner", "1: cluster imports flowtrain.learner"),
        ("executor.py", "import flowtrain", "1: executor.py imports flowtrain"),
        ("cluster/calls.py", "from .connect import connect", "1: cluster imports relatively"),
    ],
)
def test_a_wrong_import_of_the_dask_executor_is_named(file: str, source: str, message: str) -> None:
    [complaint] = dask_complaints(file, source)
    assert complaint.startswith(message)


@pytest.mark.parametrize(("root", "name"), [(PACKAGE, "flowtrain"), (EXECUTOR, "flowtrain_dask")])
def test_no_two_modules_import_each_other(root: Path, name: str) -> None:
    """Imports for types only, and imports inside of functions, are left out."""
    known = {".".join((name, *path.relative_to(root).with_suffix("").parts)): path
             for path in root.rglob("*.py") if path.name != "__init__.py"}  # fmt: skip
    needs = {
        module: {each.module for each in imports(ast.parse(path.read_text("utf-8"))) if each.at_import} & known.keys()
        for module, path in known.items()
    }
    assert sum(map(len, needs.values())) > 50
    order = list(TopologicalSorter(needs).static_order())  # a cycle raises an error that names it
    assert len(order) == len(known)


@pytest.mark.parametrize("folder", PACKAGE_FOLDERS, ids=lambda folder: folder.relative_to(folder.parents[2]).as_posix())
def test_the_docstring_of_a_package_names_its_modules_and_no_others(folder: Path) -> None:
    """A name in backticks is a module of the package, or in the ``__all__`` of one; classes begin with a capital."""
    modules = {path.stem for path in folder.glob("[!_]*.py")}
    modules |= {path.parent.name for path in folder.glob("*/__init__.py")}
    named = set(re.findall(r"(?<!`)`([a-z_]+)`(?!`)", docstring(folder / "__init__.py")))
    assert modules - named == set(), "modules that the docstring does not name"
    public = {name for path in folder.glob("*.py") for name in public_names(path)}
    assert named - modules - public == set(), "names in the docstring that are no modules"


def test_the_two_packages_of_callbacks_say_in_their_first_line_which_is_which() -> None:
    one, other = (docstring(PACKAGE / name / "__init__.py").splitlines()[0] for name in ("callback", "callbacks"))
    assert one.startswith("The interface of callbacks")
    assert other.startswith("The bundled callbacks")


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""


def public_names(path: Path) -> list[str]:
    """Return the ``__all__`` of a module, without loading it."""
    for node in ast.parse(path.read_text("utf-8")).body:
        match node:
            case (ast.Assign(targets=[ast.Name(id="__all__")]) | ast.AnnAssign(target=ast.Name(id="__all__"))) as found:
                assert found.value is not None
                names: list[str] = ast.literal_eval(found.value)
                return names
            case _:
                pass
    return []


def dask_complaints(file: str, source: str) -> list[str]:
    """Return the forbidden imports of ``executors/flowtrain_dask/<file>``, each as ``line: message``."""
    folder = file.rpartition("/")[0]
    found = [(each, dask_objection(folder, each)) for each in imports(ast.parse(source, file))]
    return [f"{each.line}: {folder or file} {why}" for each, why in found if why]


def dask_objection(folder: str, found: Import) -> str | None:
    top, _, rest = found.module.partition(".")
    if not top:
        return "imports relatively: write the module's whole name"
    if top == "flowtrain" and rest.split(".")[0] not in OPEN_TO_DASK:
        return f"imports {found.module}: open to an executor are {', '.join(OPEN_TO_DASK)}"
    if top == "flowtrain_dask" and found.at_import:
        there = rest.split(".")[0] if rest.split(".")[0] in DASK else ""
        before = DASK[: DASK.index(folder)]
        if there not in (*before, folder):
            return f"imports {rest or top}: of this package it may only import {', '.join(before) or 'its own folder'}"
    return None


def complaints(file: str, source: str) -> list[str]:
    """Return the forbidden imports of ``flowtrain/<file>``, each as ``line: message``."""
    importer = "flowtrain" if file == "__init__.py" else file.split("/")[0].removesuffix(".py")
    if importer not in PACKAGES:
        return [f"1: {importer} is no entry of flowtrain/: put the module into the package that its lines belong to"]
    found = imports(ast.parse(source, file))
    return [f"{each.line}: {why}" for each in found if (why := objection(importer, each))]


def objection(importer: str, found: Import) -> str | None:
    top, _, rest = found.module.partition(".")
    if not top:
        return f"{importer} imports relatively: write the module's whole name"
    if top in FOREIGN:
        return f"{importer} imports {top}: the core knows no executor but its own"
    if top == "networkx" and importer != "graph":
        return f"{importer} imports networkx: only graph does"
    if top == "networkx" and found.at_import:
        return f"{importer} imports networkx when it is loaded: import it inside the function that needs it"
    if top != "flowtrain":
        return None
    imported = rest.split(".")[0] or "flowtrain"
    if imported not in PACKAGES:
        return f"{importer} imports {imported}, which is no entry of flowtrain/"
    if PACKAGES.index(imported) > PACKAGES.index(importer):
        return f"{importer} imports {imported}, which stands above it: {', '.join(PACKAGES)} is the order"
    return None


def imports(tree: ast.AST, at_import: bool = True) -> Iterator[Import]:
    """Return all imports below `tree`, in the order of the source."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import(names=names):
                yield from (Import(node.lineno, name.name, at_import) for name in names)
            case ast.ImportFrom(module="flowtrain", level=0, names=names):
                # `from flowtrain import x` imports the entry x if there is one, otherwise a name of
                # ``flowtrain/__init__.py``.
                modules = {f"flowtrain.{name.name}" if name.name in PACKAGES else "flowtrain" for name in names}
                yield from (Import(node.lineno, module, at_import) for module in sorted(modules))
            case ast.ImportFrom(module=module, level=level, names=names) if module and level == 0:
                # `from package import module` loads the module; callers filter names that are no modules.
                yield Import(node.lineno, module, at_import)
                if module.startswith(("flowtrain.", "flowtrain_dask")):
                    yield from (
                        Import(node.lineno, f"{module}.{name.name}", at_import)
                        for name in names
                        if submodule(module, name.name)
                    )
            case ast.ImportFrom(module=module, level=level):
                yield Import(node.lineno, "." * level + (module or ""), at_import)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from imports(node, at_import=False)
            case _:
                yield from imports(node, at_import)


def submodule(package: str, name: str) -> bool:
    """Return whether a name that is imported from a package is a module of it."""
    root = EXECUTOR.parent if package.startswith("flowtrain_dask") else PACKAGE.parent
    return (root.joinpath(*package.split(".")) / f"{name}.py").exists()
