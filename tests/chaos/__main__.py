"""The command line; see `tests.chaos`."""

from __future__ import annotations

import argparse
import sys

from tests.chaos.cut import cut
from tests.chaos.loaders import loaders
from tests.chaos.run import run
from tests.chaos.soak import soak


def main() -> int:
    """Run what was asked for, and return the exit code: 0 if everything was as it should be."""
    parser = argparse.ArgumentParser("python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="for how long the cluster is disturbed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--gap", type=float, default=2.5, help="mean seconds between two disturbances")
    parser.add_argument("--keep", action="store_true", help="leave the folder with the logs")
    parser.add_argument("--soak", type=int, nargs="?", const=500_000, metavar="EVENTS", help="a long run instead")
    parser.add_argument("--embedded", action="store_true", help="with --soak: lanes in threads")
    parser.add_argument("--loaders", type=int, nargs="?", const=200, metavar="EPOCHS", help="loader workers instead")
    parser.add_argument("--cut", type=float, nargs="?", const=15.0, metavar="SECONDS", help="the link is cut instead")
    arguments = parser.parse_args()
    if arguments.soak is not None:
        return 0 if soak(arguments.soak, arguments.embedded) else 1
    if arguments.cut is not None:
        return 0 if cut(arguments.cut, arguments.seed) else 1
    if arguments.loaders is not None:
        return 0 if loaders(arguments.loaders, "fork") & loaders(arguments.loaders, "forkserver") else 1
    equal = run(arguments.minutes * 60, arguments.seed, arguments.workers, arguments.gap, arguments.keep)
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
