"""The documentation page of the bundled callbacks agrees with their declarations and docstrings."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import flowtrain.callbacks
from flowtrain import Callback

SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:", "Yields:")
SCRIPT = Path(__file__).parents[1] / "docs" / "reference.py"


@pytest.fixture(scope="module")
def reference() -> Any:
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("reference", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(reference: Any) -> None:
    assert reference.PAGE.read_text("utf-8") == reference.page(), "stale: run python docs/reference.py"


def test_every_bundled_callback_has_a_row_and_a_section(reference: Any) -> None:
    text = reference.page()
    for name in flowtrain.callbacks.__all__:
        value = getattr(flowtrain.callbacks, name)
        if isinstance(value, type) and issubclass(value, Callback):
            assert f"| [`{name}`](#{name.lower()}) | " in text
            assert f"\n## {name}\n" in text


def test_code_is_in_fences_and_nothing_else_is(reference: Any) -> None:
    """A section of a docstring that follows its examples would be taken for their output."""
    fences = re.findall(r"^~~~pycon\n(.*?)^~~~$", reference.page(), re.MULTILINE | re.DOTALL)
    assert fences
    assert not [line for fence in fences for line in fence.splitlines() if line.strip() in SECTIONS]


def test_a_row_says_what_the_callback_declares(reference: Any) -> None:
    [row] = [line for line in reference.page().splitlines() if line.startswith("| [`SmoothLoss`]")]
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert cells[2:] == [
        "`BatchEnd, AbstractTrainingPhase`",
        "`batch.loss`, `cbstate.history`",
        "`cbstate.smooth_loss`",
        "`Recorder`",
        "every",
        "`SmoothLoss()`",
    ]


def test_a_callback_that_needs_arguments_needs_an_example(reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Needy(Callback):
        """Take something."""

        def __init__(self, something: int) -> None:
            self.something = something

    monkeypatch.setattr(flowtrain.callbacks, "Needy", Needy, raising=False)
    monkeypatch.setattr(flowtrain.callbacks, "__all__", [*flowtrain.callbacks.__all__, "Needy"])
    with pytest.raises(LookupError, match=r"Needy takes arguments: enter it in EXAMPLES of reference\.py\."):
        reference.page()
