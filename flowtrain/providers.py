"""Which bundled callback provides an entry of ``cbstate``: names only, for messages."""

from __future__ import annotations

__all__ = ["PROVIDERS"]

PROVIDERS = {
    "history": "Recorder",
    "hyperparams": "Scheduler",
    "metrics_epoch": "Metrics",
    "metrics_step": "Metrics",
    "smooth_loss": "SmoothLoss",
    "tracehistory": "Traces",
}
