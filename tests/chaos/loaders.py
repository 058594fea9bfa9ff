"""Workers of data loaders that are started in every epoch, beside lanes that run: does one hang?

A worker is forked from a process whose other threads may hold locks; nobody gives those back in the child.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from flowtrain import Learner
from flowtrain.callbacks import LogHistograms, LogMetrics
from flowtrain.logging import JsonlBackend
from flowtrain_dask import DaskExecutor
from tests.chaos.callbacks import Chain

__all__ = ["loaders"]

_BATCHES = 8
_PATIENCE = 120.0
"""Seconds after which a worker that has not given a batch hangs."""


def loaders(epochs: int, method: str) -> bool:
    """Train with workers, print what was found, and return whether every batch has been logged.

    Args:
        epochs: How many times workers are started.
        method: How: ``"fork"`` or ``"forkserver"``.
    """
    torch.manual_seed(0)
    dataset = TensorDataset(torch.randn(16 * _BATCHES, 8), torch.randint(3, (16 * _BATCHES,)))
    loader = DataLoader(dataset, batch_size=16, num_workers=2, multiprocessing_context=method, timeout=_PATIENCE)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        shared, own = JsonlBackend(Path(name) / "shared.jsonl"), JsonlBackend(Path(name) / "chain.jsonl")
        callbacks = LogMetrics(shared), LogHistograms(shared, every=2), Chain(own)
        with Learner(
            torch.nn.Linear(8, 3), F.cross_entropy, data=loader, callbacks=callbacks, default_callbacks="quiet",
            executor=DaskExecutor(defer="always"),
        ) as learner:  # fmt: skip
            learner.fit(epochs)
        lines = Path(own.path).read_text().count("\n")
    complete = lines == epochs * _BATCHES
    print(
        f"{method}: {epochs} epochs with 2 new workers each in {time.monotonic() - begin:.0f} s, {lines:,} records, "
        f"{'complete' if complete else 'INCOMPLETE'}",
        flush=True,
    )
    return complete
