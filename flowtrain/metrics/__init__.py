"""Metrics: functions of a batch, and the values of an epoch that are computed from them.

`functions` has the bundled functions; `metric` defines a metric: a function of ``(outputs, targets)`` or a torchmetrics
object, with a name, a weight and the phases that it is computed in; `running` accumulates the batches of a torchmetrics
object, and merges those of several ranks; `means` has the weighted sums of an epoch; `track` defines a value of the
batch state that is recorded in the same way. `flowtrain.callbacks.Metrics` records the values.
"""

from __future__ import annotations

from flowtrain.metrics.functions import accuracy, mean_absolute_error, mean_squared_error, model_loss, top_k_accuracy

__all__ = ["accuracy", "mean_absolute_error", "mean_squared_error", "model_loss", "top_k_accuracy"]
