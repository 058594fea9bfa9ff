"""What the tests of one event on several threads share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowtrain_dask.parallel.firing import StrandPool


@pytest.fixture
def pool() -> Iterator[StrandPool]:
    """Two strands: the thread of the test, and one of a pool."""
    made = StrandPool(2)
    yield made
    made.close()
