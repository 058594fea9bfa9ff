"""The program ``flowtrain``, of which ``flowtrain report RUN_FOLDER`` writes the report of the runs in a folder.

It ends with 0 when the report is written, with 1 when it cannot be, and with 2 when its arguments are wrong. The other
command, ``flowtrain replay``, is in `flowtrain.diagnostics.recording.command`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flowtrain.diagnostics.recording.command import add_replay
from flowtrain.diagnostics.report.charts import need_bokeh
from flowtrain.diagnostics.report.folder import find_runs
from flowtrain.diagnostics.report.page import MARK, write_page
from flowtrain.errors import FlowtrainError, UsageError
from flowtrain.training.checkpoint.reading import own_version

__all__ = ["main"]

_HEAD = 1024
"""The number of bytes at the beginning of a file in which a report has its mark."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program, and return its exit status.

    Args:
        arguments: The arguments of the program; those of this process by default.

    Raises:
        SystemExit: The arguments are wrong (2), or ask for help (0).
    """
    given = _parser().parse_args(arguments)
    status: int = given.run(given)
    return status


def _report(given: argparse.Namespace) -> int:
    folder = Path(given.folder)
    try:
        need_bokeh()
        path = folder / "report.html" if given.to is None else Path(given.to)
        runs = find_runs(folder)
        if given.to is None and path.exists() and not _is_report(path):
            raise UsageError(f"{path} is no report of flowtrain, and is not replaced. Write --to PATH.")
        write_page(runs, path)
    except FlowtrainError as error:
        print(f"flowtrain report: {error}", file=sys.stderr)
        return 1
    shown = ", ".join(run.title for run in runs)
    print(f"{path}: {len(runs)} run{'s' * (len(runs) > 1)} ({shown}), {path.stat().st_size / 2**20:.1f} MiB")
    for note in dict.fromkeys(note for run in runs for note in run.notes):
        print(f"  {note}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("flowtrain", description="Look at the runs of flowtrain.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"flowtrain {own_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="write the report of a run as one page of HTML",
        description="Write the report of the runs in a folder, from their logs and checkpoints, as one page of HTML.",
        allow_abbrev=False,
    )
    report.add_argument("folder", metavar="RUN_FOLDER", help="the folder that the callbacks of the run wrote to")
    report.add_argument("--to", metavar="PATH", help="the file to write (default: report.html in RUN_FOLDER)")
    report.set_defaults(run=_report)
    add_replay(commands)
    return parser


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(_HEAD)
    except OSError:
        return False
