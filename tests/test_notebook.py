"""flowtrain in a notebook of Jupyter: a real kernel executes the cells, and the tests look at their outputs."""

from __future__ import annotations

import json
import re
import struct
from base64 import b64decode
from typing import Any

import pytest

from tests.support.programs import importing_the_same

pytestmark = pytest.mark.slow

pytest.importorskip("ipykernel")
nbclient: Any = pytest.importorskip("nbclient")
nbformat: Any = pytest.importorskip("nbformat.v4")

LEARNER = """
from flowtrain import ValidationPhase
from flowtrain.callbacks import CustomCallback, EarlyStopping, Metric, Metrics
from flowtrain.testing import tiny_learner

def learner(*callbacks, **options):
    half = Metric(lambda outputs, targets: 0.5, name="[b]Half", phase=ValidationPhase)
    return tiny_learner(*callbacks, Metrics(half), n_batches=2, default_callbacks=True, **options)
"""

CELLS = {
    "fit": LEARNER + "one = learner()\none.fit(2)",
    "fit again": "one.fit(1);",
    "validate": "one.validate()",
    "losses": """
import json
print(json.dumps({repr(phase): each["Loss"].values for phase, each in one.cbstate.metrics_epoch.items()}))
""",
    "plot": "one.plot('loss')",
    "dask": "learner(executor='dask').fit(2)",
    "stopped": "learner(EarlyStopping(patience=1, monitor='[b]Half', mode='max')).fit(9)",
    "many epochs": "learner().fit(101)",
}


@pytest.fixture(scope="module")
def notebook() -> dict[str, list[Any]]:
    """Execute the cells of a notebook; return the outputs of each as they are when the last cell has ended."""
    made = nbformat.new_notebook(cells=[nbformat.new_code_cell(source) for source in CELLS.values()])
    nbclient.NotebookClient(made, timeout=240).execute(env=importing_the_same())
    return {name: list(cell.outputs) for name, cell in zip(CELLS, made.cells, strict=True)}


def text(output: Any) -> str:
    """Return the text of an output without colours."""
    shown = output.text if output.output_type == "stream" else output.data["text/plain"]
    return re.sub(r"\x1b\[[0-9;]*m", "", shown).strip("\n")


def displayed(outputs: list[Any]) -> list[Any]:
    """Return the outputs without the result of the cell and the bar, which ends as an empty output."""
    return [output for output in outputs if output.output_type == "display_data" and text(output)]


def table(output: Any) -> list[list[str]]:
    """Return the texts in a table by row; its titles are two rows, since they have two lines."""
    assert output.data["text/html"].startswith("<pre")
    return [re.split(r"\s{2,}", line.strip()) for line in text(output).splitlines() if "─" not in line and line.strip()]


TITLES = [["Training", "Validation", "Validation"], ["Epoch", "Loss", "Loss", "[b]Half", "Time"]]


@pytest.mark.parametrize(("cell", "epochs"), [("fit", [1, 2]), ("fit again", [3]), ("dask", [1, 2])])
def test_a_fit_has_one_table_with_a_row_for_each_epoch(
    cell: str, epochs: list[int], notebook: dict[str, list[Any]]
) -> None:
    [shown] = displayed(notebook[cell])
    phases, names, *rows = table(shown)
    assert [phases, names] == TITLES
    losses = json.loads(notebook["losses"][0].text)
    for row, epoch in zip(rows, epochs, strict=True):
        values = [f"{losses[phase][epoch - 1]:.4g}" for phase in ("TrainingPhase", "ValidationPhase")]
        assert row[:-1] == [str(epoch), *values, "0.5"]
        assert re.fullmatch(r"\d+\.\d\d s", row[-1])


def test_a_semicolon_leaves_out_the_history(notebook: dict[str, list[Any]]) -> None:
    results = {name: [each for each in notebook[name] if each.output_type == "execute_result"] for name in CELLS}
    [history] = results["fit"]
    assert history.data["text/html"].startswith("<table>")
    assert results["fit again"] == []


def test_an_evaluation_outside_of_a_fit_is_a_line(notebook: dict[str, list[Any]]) -> None:
    [line] = displayed(notebook["validate"])
    loss = json.loads(notebook["losses"][0].text)["ValidationPhase"][-1]
    assert re.fullmatch(rf"epoch   3  ValidationPhase   Loss {loss:.4g}  \[b\]Half 0\.5  \d\.\d\d s", text(line))


def test_a_plot_is_a_picture_in_the_notebook(notebook: dict[str, list[Any]]) -> None:
    """No magic line and no call of pyplot is needed."""
    [picture] = notebook["plot"]
    png = b64decode(picture.data["image/png"])
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack_from(">II", png, 16) == (700, 300)


def test_the_reason_of_an_early_end_comes_after_the_table(notebook: dict[str, list[Any]]) -> None:
    shown, reason = displayed(notebook["stopped"])
    assert [row[0] for row in table(shown)[1:]] == ["Epoch", "1", "2"]
    assert " ".join(text(reason).split()).startswith("EarlyStopping ends training after epoch 2 of ValidationPhase. ")


def test_a_long_table_continues_in_another_output(notebook: dict[str, list[Any]]) -> None:
    """A table is sent again with each epoch, so it must not grow without limit."""
    first, second = displayed(notebook["many epochs"])
    assert [row[0] for row in table(first)[1:]] == ["Epoch", *map(str, range(1, 101))]
    assert [row[0] for row in table(second)[1:]] == ["Epoch", "101"]
