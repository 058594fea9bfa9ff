"""The fixture of tests with several ranks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.ranks import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Yield a runner of functions on several ranks."""
    made = Ranks()
    yield made
    made.close()
