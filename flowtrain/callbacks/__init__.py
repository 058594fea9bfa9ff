"""The bundled callbacks, built on the interface of `flowtrain.callback`: handlers, declared state, ``run_after``.

A learner adds `Recorder`, `Metrics`, `StopOnNaNLoss`, `ProgressBar` and `MetricsPrinter` by default. Few callbacks look
beyond the interface: `Metrics` reads the declarations of the other callbacks, `Checkpointer` the list of callbacks, and
`SanityCheck`, `ModelSummary` and `SWA` read batches of a loader and leave its random state as it was.

=======================================  =============================================================================
concern                                  modules
=======================================  =============================================================================
counts and metrics                       `recorder`, `metrics`, `smooth_loss`, `traces`, `timer`, `grad_norm`,
                                         `learning_rate_monitor`, `device_stats`
the terminal                             `progress_bar`, `metrics_printer`, `model_summary`; `terminal` has the console
                                         and the bar's last line
logs                                     `log_metrics`, `log_traces`, `log_hyperparams`, `log_histograms`,
                                         `log_visualization`
weights and hyperparameters              `averaging` is the base of `ema` and `swa`; `freeze`, `scheduler`, with the
                                         package `schedules`
the end of training, and its checkpoint  `early_stopping`, with the package `stopping`; `stop_on_nan_loss`,
                                         `checkpointer`; `monitoring` finds the metric that a callback watches
examination of a run                     `sanity_check`, `profiler`, `timeline`, `garbage_collect`
callbacks of functions and callbacks     `custom`; `throttle` has `once`, `after`, `before` and
                                         `when` too
=======================================  =============================================================================
"""

from __future__ import annotations

from flowtrain.callbacks.checkpointer import Checkpointer
from flowtrain.callbacks.custom import CustomCallback
from flowtrain.callbacks.device_stats import DeviceStats
from flowtrain.callbacks.early_stopping import EarlyStopping
from flowtrain.callbacks.ema import EMA
from flowtrain.callbacks.freeze import Freeze
from flowtrain.callbacks.garbage_collect import GarbageCollect
from flowtrain.callbacks.grad_norm import GradNorm
from flowtrain.callbacks.learning_rate_monitor import LearningRateMonitor
from flowtrain.callbacks.log_histograms import LogHistograms
from flowtrain.callbacks.log_hyperparams import LogHyperParams
from flowtrain.callbacks.log_metrics import LogMetrics
from flowtrain.callbacks.log_traces import LogTraces
from flowtrain.callbacks.log_visualization import LogVisualization
from flowtrain.callbacks.metrics import Metrics
from flowtrain.callbacks.metrics_printer import MetricsPrinter
from flowtrain.callbacks.model_summary import ModelSummary, summarize
from flowtrain.callbacks.profiler import Profiler
from flowtrain.callbacks.progress_bar import ProgressBar
from flowtrain.callbacks.recorder import Recorder
from flowtrain.callbacks.sanity_check import SanityCheck
from flowtrain.callbacks.scheduler import Scheduler
from flowtrain.callbacks.schedules.combining import per_epoch, sequence, swa_lr, warmup
from flowtrain.callbacks.schedules.curves import constant, cosine, exponential, from_torch, one_cycle, polynomial, step
from flowtrain.callbacks.schedules.plateau import reduce_on_plateau
from flowtrain.callbacks.schedules.schedule import Schedule
from flowtrain.callbacks.smooth_loss import SmoothLoss
from flowtrain.callbacks.stop_on_nan_loss import StopOnNaNLoss
from flowtrain.callbacks.swa import SWA
from flowtrain.callbacks.throttle import after, before, once, throttle, when
from flowtrain.callbacks.timeline import Timeline
from flowtrain.callbacks.timer import Timer
from flowtrain.callbacks.traces import Traces
from flowtrain.metrics.metric import Metric
from flowtrain.metrics.track import Track
from flowtrain.state.hyperparameters import HyperParameter, LearningRate, Momentum, Setting, WeightDecay

__all__ = [
    "EMA",
    "SWA",
    "Checkpointer",
    "CustomCallback",
    "DeviceStats",
    "EarlyStopping",
    "Freeze",
    "GarbageCollect",
    "GradNorm",
    "HyperParameter",
    "LearningRate",
    "LearningRateMonitor",
    "LogHistograms",
    "LogHyperParams",
    "LogMetrics",
    "LogTraces",
    "LogVisualization",
    "Metric",
    "Metrics",
    "MetricsPrinter",
    "ModelSummary",
    "Momentum",
    "Profiler",
    "ProgressBar",
    "Recorder",
    "SanityCheck",
    "Schedule",
    "Scheduler",
    "Setting",
    "SmoothLoss",
    "StopOnNaNLoss",
    "Timeline",
    "Timer",
    "Traces",
    "Track",
    "WeightDecay",
    "after",
    "before",
    "constant",
    "cosine",
    "exponential",
    "from_torch",
    "once",
    "one_cycle",
    "per_epoch",
    "polynomial",
    "reduce_on_plateau",
    "sequence",
    "step",
    "summarize",
    "swa_lr",
    "throttle",
    "warmup",
    "when",
]
