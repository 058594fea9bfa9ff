"""What the tests of a cluster share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flowtrain_dask.cluster.connect import connect
from flowtrain_dask.cluster.connection import Connection
from tests.support.dask_processes import DaskProcesses


@pytest.fixture
def connection(dask_processes: DaskProcesses) -> Iterator[Connection]:
    """A connection to the cluster that is left whole."""
    made = connect(dask_processes.address, 60)
    assert made is not None
    yield made
    made.close()
