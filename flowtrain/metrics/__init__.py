"""Metrics: functions of a batch, and what is computed from them over an epoch.

`functions` has those that are bundled; `metric` says what a metric is: a function of ``(outputs, targets)`` or a
torchmetrics object, with a name, a weight and the phases that it is computed in. `flowtrain.callbacks.Metrics` records
them.
"""

from __future__ import annotations

from flowtrain.metrics.functions import accuracy, mean_absolute_error, mean_squared_error, top_k_accuracy

__all__ = ["accuracy", "mean_absolute_error", "mean_squared_error", "top_k_accuracy"]
