"""The terminal that callbacks print to: rich's own console, imported when there is something to print.

Whoever prints declares ``resource.terminal``, so that two never print at the same time.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console"]


def console() -> Console:
    """Return rich's global console, which a user may have set up with ``rich.reconfigure``."""
    before = random.getstate()
    import rich
    found = rich.get_console()
    random.setstate(before)  # rich draws from Python's generator when it is imported; printing must not change a run
    return found
