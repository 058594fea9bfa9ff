"""The command line; see `tests.chaos`."""

from __future__ import annotations

import argparse
import sys

from tests.chaos.run import run


def main() -> int:
    """Run what was asked for, and return the exit code: 0 if everything was as it should be."""
    parser = argparse.ArgumentParser("python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for how long the cluster is disturbed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--gap", type=float, default=2.5, help="mean seconds between two disturbances")
    parser.add_argument("--keep", action="store_true", help="leave the folder with the logs")
    arguments = parser.parse_args()
    equal = run(arguments.minutes * 60, arguments.seed, arguments.workers, arguments.gap, arguments.keep)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
