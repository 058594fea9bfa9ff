"""The direction of imports inside ``flowtrain/``, held by parsing every import statement.

A module imports what stands before it in `LAYERS`: from the rows above its own, and from the left in its own row.
Every import counts as its reader sees it: inside a function or under ``if TYPE_CHECKING`` as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

# A package stands here as one module, and ``flowtrain`` is ``flowtrain/__init__.py``, the public face.
LAYERS: dict[int, tuple[str, ...]] = {
    # the words: what there is and what may be said of it; nothing here runs a callback
    0: (
        "errors", "signals", "events", "requests", "access", "readonly", "batch", "steps", "modes", "phases",
        "hyperparams", "parameters", "phasemap", "lag", "series", "containers", "draws", "state", "reach", "detached",
    ),
    # what handlers see, what sinks get
    1: (
        "part", "namespace", "protect", "recording", "fingerprint", "terminal", "loggables", "records", "plain",
        "metric",
    ),
    2: ("resolution", "handler", "callback", "conditions", "providers", "holding"),  # what a user writes
    3: ("graph", "resolver", "conflicts", "order"),  # from declarations to an order, with reasons
    4: ("naming", "checks", "plan", "strict", "registry", "execution", "sinks"),  # from an order to something that runs
    5: (
        "devices", "prefetch", "optimizers", "groups", "guard", "scaling", "compiling", "settings", "placement",
        "structure", "core",
        "data", "planned", "scopes", "dispatch", "randomness", "position", "checkpointfile", "checkpoint", "writer",
        "cuts", "interrupts", "loop", "stepsite",
        "scratch", "dryrun", "syncs", "audit",
    ),  # training itself
    6: ("trial", "summary", "sanity", "logging", "metrics", "hyperparameter", "schedule", "schedules", "combining",
        "criterion", "plateau", "prechelt", "stopping"),  # what the bundled callbacks work with
    7: ("callbacks",),  # bundled callbacks, written as a user's would be: see `NARROWED`
    8: ("curves", "figure", "plot", "arguments", "callbacksite", "learner", "finder", "flowtrain"),  # one object
    9: ("testing", "examples"),  # users of the face
}
NARROWED = {"callbacks": {0, 1, 2, 6}}  # the only layers these may import, and never a sibling in their package

# The folders of ``executors/flowtrain_dask/``, each importing from those before it when it is loaded; no two modules
# import each other. ``""`` stands for the modules beside them, which put the parts together.
DASK = ("parallel", "snapshots", "lanes", "cluster", "")
OPEN_TO_DASK = range(5)  # the layers of ``flowtrain/`` that an executor may know

PACKAGE = Path(__file__).parents[1] / "flowtrain"
EXECUTOR = Path(__file__).parents[1] / "executors" / "flowtrain_dask"
PLACES = {name: (layer, column) for layer, names in LAYERS.items() for column, name in enumerate(names)}
FOREIGN = {"dask", "distributed", "flowtrain_dask"}  # executors import flowtrain, never the other way round


class Import(NamedTuple):
    """One imported module: where, its absolute name, and whether it is loaded when its importer is."""

    line: int
    module: str
    at_import: bool


def test_every_import_goes_down_the_layers() -> None:
    sources = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    assert sources, f"no source in {PACKAGE}"
    wrong = [f"flowtrain/{file}:{each}" for file, source in sources.items() for each in complaints(file, source)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("plan.py", "from flowtrain.graph import Graph"),
        ("registry.py", "from flowtrain.plan import Plan"),
        ("callbacks/metrics.py", "from flowtrain.metrics import accuracy\nimport flowtrain.events, torch"),
        ("callbacks/__init__.py", "from flowtrain.callbacks.metrics import Metrics"),
        ("logging/csv.py", "from flowtrain.logging.files import rename"),
        ("examples/digits.py", "from flowtrain import Learner, testing"),
        ("examples/digits.py", "def f():\n    from flowtrain_dask import DaskExecutor"),
        ("__init__.py", "from flowtrain.learner import Learner"),
        ("graph.py", "def to_networkx():\n    import networkx"),
        ("graph.py", "if TYPE_CHECKING:\n    import networkx as nx"),
    ],
)
def test_right_imports_pass(file: str, source: str) -> None:
    assert complaints(file, source) == []


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("graph.py", "import torch\nimport flowtrain.plan", "2: graph (layer 3) imports plan (layer 4)"),
        ("events.py", "def f():\n    from flowtrain import state", "2: events (layer 0) imports state (layer 0)"),
        ("plan.py", "if TYPE_CHECKING:\n    import flowtrain.learner", "2: plan (layer 4) imports learner (layer 8)"),
        ("core.py", "from flowtrain import Learner", "1: core (layer 5) imports flowtrain (layer 8)"),
        ("callbacks/tune.py", "from flowtrain.core import TorchCore", "1: callbacks (layer 7) imports core (layer 5)"),
        ("callbacks/tune.py", "from flowtrain.callbacks import Recorder", "1: callbacks (layer 7) imports a sibling"),
        ("errors.py", "from flowtrain.utils import shorten", "1: errors (layer 0) imports utils, which has no layer"),
        ("errors.py", "from .signals import CancelException", "1: errors imports relatively"),
        ("utils.py", "", "1: utils has no layer"),
        ("core.py", "def f():\n    import dask.threaded", "2: core imports dask"),
        ("examples/digits.py", "import flowtrain_dask", "1: examples imports flowtrain_dask"),
        ("core.py", "def f():\n    from networkx import DiGraph", "2: core imports networkx"),
        ("graph.py", "try:\n    import networkx\nfinally:\n    pass", "2: graph imports networkx when it is loaded"),
    ],
)
def test_a_wrong_import_is_named(file: str, source: str, message: str) -> None:
    [complaint] = complaints(file, source)
    assert complaint.startswith(message)


def test_the_dask_executor_imports_down_its_folders_and_knows_the_lower_layers_only() -> None:
    sources = {path.relative_to(EXECUTOR).as_posix(): path.read_text("utf-8") for path in EXECUTOR.rglob("*.py")}
    assert {file.rpartition("/")[0] for file in sources} == set(DASK)
    wrong = [f"{file}:{each}" for file, source in sources.items() for each in dask_complaints(file, source)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "source", "message"),
    [
        ("lanes/lane.py", "import torch\nfrom flowtrain_dask.cluster.calls import Calls", "2: lanes imports cluster"),
        ("snapshots/pool.py", "from flowtrain_dask.executor import DaskExecutor", "1: snapshots imports executor"),
        ("cluster/worker.py", "from flowtrain.learner import Learner", "1: cluster imports flowtrain.learner"),
        ("executor.py", "import flowtrain", "1: executor.py imports flowtrain"),
        ("cluster/calls.py", "from .connect import connect", "1: cluster imports relatively"),
    ],
)
def test_a_wrong_import_of_the_dask_executor_is_named(file: str, source: str, message: str) -> None:
    [complaint] = dask_complaints(file, source)
    assert complaint.startswith(message)


def test_the_dask_executor_imports_in_no_circle() -> None:
    """When it is loaded; what is imported for types only, or when it is needed, is left out."""
    known = {f"flowtrain_dask.{'.'.join(path.relative_to(EXECUTOR).with_suffix('').parts)}": path
             for path in EXECUTOR.rglob("*.py")}  # fmt: skip
    needs = {
        name: {each.module for each in imports(ast.parse(path.read_text("utf-8"))) if each.at_import} & known.keys()
        for name, path in known.items()
    }
    assert sum(map(len, needs.values())) > 100
    order = list(TopologicalSorter(needs).static_order())  # a circle is an error that names it
    assert len(order) == len(known)


def dask_complaints(file: str, source: str) -> list[str]:
    """What is wrong with the imports of ``executors/flowtrain_dask/<file>``, each as ``line: message``."""
    folder = file.rpartition("/")[0]
    found = [(each, dask_objection(folder, each)) for each in imports(ast.parse(source, file))]
    return [f"{each.line}: {folder or file} {why}" for each, why in found if why]


def dask_objection(folder: str, found: Import) -> str | None:
    top, _, rest = found.module.partition(".")
    if not top:
        return "imports relatively: write the module's whole name"
    if top == "flowtrain":
        place = PLACES.get(rest.split(".")[0] or "flowtrain")
        if place is None or place[0] not in OPEN_TO_DASK:
            return f"imports {found.module}: only layers 0 to {OPEN_TO_DASK[-1]} are open to an executor"
    if top == "flowtrain_dask" and found.at_import:
        there = rest.split(".")[0] if rest.split(".")[0] in DASK else ""
        before = DASK[: DASK.index(folder)]
        if there not in (*before, folder):
            return f"imports {rest or top}: of this package it may only import {', '.join(before) or 'its own folder'}"
    return None


def complaints(file: str, source: str) -> list[str]:
    """What is wrong with the imports of ``flowtrain/<file>``, each as ``line: message``."""
    importer = "flowtrain" if file == "__init__.py" else file.split("/")[0].removesuffix(".py")
    if importer not in PLACES:
        return [f"1: {importer} has no layer: enter it in LAYERS, below and right of all it imports"]
    found = imports(ast.parse(source, file))
    return [f"{each.line}: {why}" for each in found if (why := objection(file, importer, each))]


def objection(file: str, importer: str, found: Import) -> str | None:
    top, _, rest = found.module.partition(".")
    if not top:
        return f"{importer} imports relatively: write the module's whole name"
    if top in FOREIGN and (importer != "examples" or found.at_import):  # examples show it to those who have it
        return f"{importer} imports {top}: the core knows no executor but its own"
    if top == "networkx" and importer != "graph":
        return f"{importer} imports networkx: only graph does"
    if top == "networkx" and found.at_import:
        return f"{importer} imports networkx when it is loaded: import it inside the function that needs it"
    if top != "flowtrain":
        return None
    return against_the_layers(file, importer, rest.split(".")[0] or "flowtrain")


def against_the_layers(file: str, importer: str, imported: str) -> str | None:
    layer = PLACES[importer][0]
    if imported not in PLACES:
        return f"{importer} (layer {layer}) imports {imported}, which has no layer"
    if imported == importer:
        if importer in NARROWED and not file.endswith("/__init__.py"):
            return f"{importer} (layer {layer}) imports a sibling: what two of them need belongs in a layer below"
        return None
    words = f"{importer} (layer {layer}) imports {imported} (layer {PLACES[imported][0]})"
    if PLACES[imported] > PLACES[importer]:
        return f"{words}: only rows above, and modules further left in its row, are open to it"
    if importer in NARROWED and PLACES[imported][0] not in NARROWED[importer]:
        return f"{words}: only layers {sorted(NARROWED[importer])} are open to it"
    return None


def imports(tree: ast.AST, at_import: bool = True) -> Iterator[Import]:
    """All imports below `tree`, in the order of the source."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import(names=names):
                yield from (Import(node.lineno, name.name, at_import) for name in names)
            case ast.ImportFrom(module="flowtrain", level=0, names=names):
                # `from flowtrain import x` means the module x where there is one, otherwise a name of the face.
                modules = {f"flowtrain.{name.name}" if name.name in PLACES else "flowtrain" for name in names}
                yield from (Import(node.lineno, module, at_import) for module in sorted(modules))
            case ast.ImportFrom(module=module, level=level):
                yield Import(node.lineno, "." * level + (module or ""), at_import)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                yield from imports(node, at_import=False)
            case _:
                yield from imports(node, at_import)
