"""The callbacks that come with flowtrain.

A learner has `Recorder`, `Metrics`, `StopOnNaNLoss`, `ProgressBar` and `MetricsPrinter` unless told otherwise. All of
them use only what any callback can: handlers, declared state, ``run_after``.
"""

from __future__ import annotations

from flowtrain.callbacks.collect import GarbageCollect
from flowtrain.callbacks.custom import CustomCallback
from flowtrain.callbacks.devices import DeviceStats
from flowtrain.callbacks.gradients import GradNorm
from flowtrain.callbacks.loghistograms import LogHistograms
from flowtrain.callbacks.loghyperparams import LogHyperParams
from flowtrain.callbacks.logmetrics import LogMetrics
from flowtrain.callbacks.logtraces import LogTraces
from flowtrain.callbacks.logvisualization import LogVisualization
from flowtrain.callbacks.metrics import Metric, Metrics
from flowtrain.callbacks.nan import StopOnNaNLoss
from flowtrain.callbacks.printer import MetricsPrinter
from flowtrain.callbacks.progress import ProgressBar
from flowtrain.callbacks.rates import LearningRateMonitor
from flowtrain.callbacks.recorder import Recorder
from flowtrain.callbacks.smooth import SmoothLoss
from flowtrain.callbacks.stopping import EarlyStopping
from flowtrain.callbacks.throttle import after, before, once, throttle, when
from flowtrain.callbacks.timer import Timer
from flowtrain.callbacks.traces import Traces

__all__ = [
    "CustomCallback",
    "DeviceStats",
    "EarlyStopping",
    "GarbageCollect",
    "GradNorm",
    "LearningRateMonitor",
    "LogHistograms",
    "LogHyperParams",
    "LogMetrics",
    "LogTraces",
    "LogVisualization",
    "Metric",
    "Metrics",
    "MetricsPrinter",
    "ProgressBar",
    "Recorder",
    "SmoothLoss",
    "StopOnNaNLoss",
    "Timer",
    "Traces",
    "after",
    "before",
    "once",
    "throttle",
    "when",
]
