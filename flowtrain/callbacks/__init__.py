"""The bundled callbacks, built on the interface of `flowtrain.callback`: handlers, declared state, ``run_after``.

A learner adds `Recorder`, `Metrics`, `StopOnNaNLoss`, `ProgressBar` and `MetricsPrinter` by default. Few callbacks look
beyond the interface: `Metrics` reads the declarations of the other callbacks, and `SanityCheck`, `ModelSummary` and
`SWA` read batches of a loader and leave its random state as it was.

=======================================  =============================================================================
concern                                  modules
=======================================  =============================================================================
counts and metrics                       `recorder`, `metrics`, `smooth` (`SmoothLoss`), `traces`, `timer`,
                                         `gradients` (`GradNorm`), `rates` (`LearningRateMonitor`), `devices`
                                         (`DeviceStats`)
the terminal                             `progress` (`ProgressBar`), `printer` (`MetricsPrinter`), `summary`
                                         (`ModelSummary`); `terminal` has the console and the bar's last line
logs                                     `logmetrics`, `logtraces`, `loghyperparams`, `loghistograms`,
                                         `logvisualization`
weights and hyperparameters              `averaging` is the base of `ema` and `swa`; `freeze`, `scheduler`, with the
                                         package `schedules`
the end of training, and its checkpoint  `early_stopping`, with the package `stopping`; `nan` (`StopOnNaNLoss`),
                                         `checkpointer`
examination of a run                     `sanity` (`SanityCheck`), `profiler`, `collect` (`GarbageCollect`)
callbacks of functions and callbacks     `custom` (`CustomCallback`); `throttle` has `once`, `after`, `before` and
                                         `when` too
=======================================  =============================================================================
"""

from __future__ import annotations

from flowtrain.callbacks.checkpointer import Checkpointer
from flowtrain.callbacks.collect import GarbageCollect
from flowtrain.callbacks.custom import CustomCallback
from flowtrain.callbacks.devices import DeviceStats
from flowtrain.callbacks.early_stopping import EarlyStopping
from flowtrain.callbacks.ema import EMA
from flowtrain.callbacks.freeze import Freeze
from flowtrain.callbacks.gradients import GradNorm
from flowtrain.callbacks.loghistograms import LogHistograms
from flowtrain.callbacks.loghyperparams import LogHyperParams
from flowtrain.callbacks.logmetrics import LogMetrics
from flowtrain.callbacks.logtraces import LogTraces
from flowtrain.callbacks.logvisualization import LogVisualization
from flowtrain.callbacks.metrics import Metrics
from flowtrain.callbacks.nan import StopOnNaNLoss
from flowtrain.callbacks.printer import MetricsPrinter
from flowtrain.callbacks.profiler import Profiler
from flowtrain.callbacks.progress import ProgressBar
from flowtrain.callbacks.rates import LearningRateMonitor
from flowtrain.callbacks.recorder import Recorder
from flowtrain.callbacks.sanity import SanityCheck
from flowtrain.callbacks.scheduler import Scheduler
from flowtrain.callbacks.schedules.combining import per_epoch, sequence, swa_lr, warmup
from flowtrain.callbacks.schedules.curves import constant, cosine, exponential, from_torch, one_cycle, polynomial, step
from flowtrain.callbacks.schedules.plateau import reduce_on_plateau
from flowtrain.callbacks.schedules.schedule import Schedule
from flowtrain.callbacks.smooth import SmoothLoss
from flowtrain.callbacks.summary import ModelSummary
from flowtrain.callbacks.swa import SWA
from flowtrain.callbacks.throttle import after, before, once, throttle, when
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
    "swa_lr",
    "throttle",
    "warmup",
    "when",
]
