"""Runs the documents: every ```python block is executed, and its output is compared with the text after it.

The blocks of one document are executed in order in one namespace. The output of a block, or its exception, must equal
the next ```text block character for character, except for the times of epochs; a block with neither has no such block.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch

from flowtrain import Learner, TorchCore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        line: The number of the line after the opening fence.
        language: The word after the fence: ``python``, ``text``, ``sh``, ...
        source: The lines between the fences, with indentation.
    """

    line: int
    language: str
    source: str


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("flowtrain")
    level = logger.level  # which a document may set
    try:
        with torch.random.fork_rng():
            execute(document.read_text("utf-8"), document.name, monkeypatch)
    finally:
        logger.setLevel(level)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    text = document.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, heading = str(target).partition("#")
        if "://" in path:
            continue
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{document.name} links to {target}, and there is no such file"
        if heading:
            assert heading in anchors(linked.read_text("utf-8")), f"{document.name} links to {target}: no such heading"


def test_readme_shows_a_program_and_its_output_at_once() -> None:
    program, output = [block for block in blocks((ROOT / "README.md").read_text("utf-8")) if block.language != "sh"][:2]
    assert (program.language, output.language) == ("python", "text")
    assert "learner.fit(" in program.source
    assert program.source.count("\n") < 15
    assert output.line + output.source.count("\n") < 35


def test_rules_are_numbered_without_a_gap() -> None:
    text = (ROOT / "docs" / "rules.md").read_text("utf-8")
    assert [int(number) for number in re.findall(r"^(\d+)\. ", text, re.MULTILINE)] == list(range(1, 45))


@pytest.mark.parametrize(("heading", "call"), [("Learner", Learner), ("fit", Learner.fit), ("TorchCore", TorchCore)])
def test_the_tables_of_arguments_are_the_signatures(heading: str, call: Callable[..., Any]) -> None:
    text = (ROOT / "docs" / "learner.md").read_text("utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| `")]
    found = signature(call).parameters.values()
    known = [each for each in found if each.name != "self" and each.kind is not Parameter.VAR_KEYWORD]
    assert [row[0] for row in rows] == [f"| `{each.name}`" for each in known]
    for (_, _, default, _), each in zip(rows, known, strict=True):
        shown = getattr(each.default, "__name__", repr(each.default))
        assert default.startswith(f"`{shown}`") if each.default is not Parameter.empty else default == "required"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("```python\nprint(2)\n```\n```text\n1\n```", "README.md:2 printed something else"),
        ("```python\nx = 1\n```\n```text\n1\n```", "README.md:2 printed something else"),
        ("```python\nprint(1)\n```", "README.md:2 prints and no ```text block says what"),
        ("```python\nprint(1)\n```\n```python\nx = 1\n```\n", "README.md:2 prints and no ```text block says what"),
        ("```python\n1 / 0\n```", "README.md:2 prints and no ```text block says what"),
        ("```python\n1 / 0\n```\n```text\nZeroDivisionError: by one\n```", "README.md:2 printed something else"),
        ("```text\n1\n```", "README.md:2 is a ```text block without a ```python block before it"),
        ("```python\nx = 1\n```\n```text\n```\n```text\n```", "README.md:7 is a ```text block without"),
        ("```py\nprint(1)\n```", "README.md:2 is a ```py block; known are python, text and sh"),
        ("text\n```\nprint(1)\n```", "README.md:3 is a ``` block; known are python, text and sh"),
        ("```python\nprint(1)\n", "README.md:2 begins a block that does not end"),
    ],
)
def test_a_document_that_is_wrong_fails(document: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError) as failed:
        execute(document, "README.md", monkeypatch)
    assert str(failed.value).startswith(message)


def test_blocks_share_a_namespace_and_raise_what_the_text_says(monkeypatch: pytest.MonkeyPatch) -> None:
    document = (
        "```python\nfrom flowtrain import UsageError\nn = 2\nprint(n)\n```\nprints:\n```text\n2\n```\n"
        "```sh\nexit 1\n```\n"
        "```python\nprint('first')\nraise UsageError(f'{n}\\nlines')\n```\n"
        "```text\nfirst\nflowtrain.errors.UsageError: 2\nlines\n```\n"
    )
    execute(document, "README.md", monkeypatch)


def execute(text: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Execute the ```python blocks of a document in an empty folder; compare each with the ```text block after it.

    Args:
        text: The document.
        name: The name of the document for messages.
        monkeypatch: Registers the namespace as a module, so that its classes can be pickled by name.
    """
    module = ModuleType("docs_" + name.removesuffix(".md"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with TemporaryDirectory() as folder:
        monkeypatch.chdir(folder)
        try:
            _execute(text, name, module)
        finally:
            monkeypatch.chdir(ROOT)


def _execute(text: str, name: str, module: ModuleType) -> None:
    for block, expected in pairs(text, name):
        printed = run(block, name, module)
        where = f"{name}:{block.line}"
        assert expected is not None or not printed, f"{where} prints and no ```text block says what:\n{printed}"
        said = expected.source if expected is not None else ""
        same = untimed(printed) == untimed(said)
        assert same, f"{where} printed something else:\n{printed}\n--- the document says:\n{said}"


def run(block: Block, name: str, module: ModuleType) -> str:
    """Execute one block; return its output, followed by the exception as Python prints it, without a traceback."""
    code = compile("\n" * (block.line - 1) + block.source, name, "exec")
    output = io.StringIO()
    with redirect_stdout(output):
        try:
            exec(code, module.__dict__)
        except Exception as error:  # any exception of a block is compared with the text after it
            output.writelines(traceback.format_exception_only(error))
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())


def untimed(output: str) -> str:
    """Return an output without the times at the ends of the lines of `MetricsPrinter`, which differ from run to run."""
    return re.sub(
        r"^(epoch [ \d]+  \w+ .*)  (?:\d+\.\d\d s|\d+:\d\d:\d\d)(?:  [\d,.]+ samples/s)?$", r"\1", output, flags=re.M
    )


def pairs(text: str, name: str) -> Iterator[tuple[Block, Block | None]]:
    """Yield each ```python block with the ```text block that follows it before the next ```python block, if any."""
    waiting: Block | None = None
    for block in blocks(text):
        where = f"{name}:{block.line}"
        if block.language == "python":
            if waiting is not None:
                yield waiting, None
            waiting = block
        elif block.language == "text":
            assert waiting is not None, f"{where} is a ```text block without a ```python block before it"
            yield waiting, block
            waiting = None
        elif block.language == "unclosed":
            raise AssertionError(f"{where} begins a block that does not end")
        else:
            assert block.language == "sh", f"{where} is a ```{block.language} block; known are python, text and sh"
    if waiting is not None:
        yield waiting, None


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a document; a last one without its closing fence has the language ``unclosed``."""
    begun: tuple[int, str] | None = None
    inside: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if begun is None and line.startswith("```"):
            begun, inside = (number + 1, line[3:].strip()), []
        elif begun is not None and line == "```":
            yield Block(*begun, "\n".join(inside).rstrip())
            begun = None
        elif begun is not None:
            inside.append(line)
    if begun is not None:
        yield Block(begun[0], "unclosed", "")


def anchors(text: str) -> set[str]:
    """Return the link targets that GitHub makes for the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", str(heading).lower()).replace(" ", "-") for heading in headings}
