"""Loaded by a worker (``dask worker --preload tests.chaos.preload``): it dies while it is sending a result, if told to.

The file ``die-<name>`` in the worker's working directory tells it. It renames that to ``died-<name>``, and kills itself
after it has begun to answer a request for the result of a lane's batch. So the result was made, and did not arrive.

It also imports what lanes need before the worker joins: a worker that takes its first batch with it and spends seconds
importing would be killed in that, and then the longest gap would be the time between kills.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
from pathlib import Path
from typing import Any

__all__ = ["dask_setup"]

importlib.import_module("flowtrain_dask.cluster.worker")  # see above


def dask_setup(worker: Any) -> None:
    """Replace what answers such requests; called by dask when the worker begins."""
    told, answer = Path(f"die-{worker.name}"), worker.handlers["get_data"]

    async def get_data(comm: Any, keys: Any, **options: Any) -> Any:
        """Answer, or begin to and die."""
        if not told.exists() or not any("@" in str(key) for key in keys):
            return await answer(comm, keys=keys, **options)
        os.rename(told, f"died-{worker.name}")
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGKILL)
        return await answer(comm, keys=keys, **options)

    worker.handlers["get_data"] = get_data
