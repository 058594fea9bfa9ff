"""flowtrain: train PyTorch models with callbacks that cannot race.

A callback declares what it reads and writes; from the declarations flowtrain proves an order before anything runs.
Start with `Learner` and `Callback`; the callbacks that come with it are in `flowtrain.callbacks`.
"""

from __future__ import annotations

import sys as _sys

from flowtrain.callback.access import Access, Read, Write
from flowtrain.callback.callback import Callback, on
from flowtrain.callback.events import (
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchCancelled,
    BatchEnd,
    EpochBegin,
    EpochCancelled,
    EpochEnd,
    Event,
    FitBegin,
    FitEnd,
    LossBegin,
    UpdateBegin,
    UpdateEnd,
)
from flowtrain.callback.phases import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Phase,
    StepContext,
    TrainingPhase,
    ValidationPhase,
)
from flowtrain.callback.resolution import NoConflict, Resolution, RunFirst, Unresolvable, resolve
from flowtrain.callback.view import LearnerView
from flowtrain.callbacks import schedules as _schedules
from flowtrain.callbacks import stopping as _stopping
from flowtrain.callbacks import summary as _summary
from flowtrain.core.core import TorchCore
from flowtrain.diagnostics.lr_finder import LearningRateSweep, find_learning_rate
from flowtrain.errors import (
    AccessError,
    AmbiguousHandlerError,
    CallbackError,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFittingException,
    CheckpointError,
    CoreError,
    CycleError,
    DataError,
    DeferredCancelError,
    ExecutorError,
    FlowtrainError,
    HandlerError,
    LoggingError,
    LossError,
    MissingStateError,
    ProtectedException,
    ResolutionError,
    SanityCheckError,
    UndeclaredWriteError,
    UsageError,
    WriteConflictError,
)
from flowtrain.graph.executor import Executor, SerialExecutor
from flowtrain.graph.registry import callback_graph
from flowtrain.learner import Learner
from flowtrain.logging import backend as _backend
from flowtrain.state import hyperparameters as _hyperparameters

__all__ = [
    "AbstractTrainingPhase",
    "AbstractValidationPhase",
    "Access",
    "AccessError",
    "AmbiguousHandlerError",
    "BackwardBegin",
    "BackwardEnd",
    "BatchBegin",
    "BatchCancelled",
    "BatchEnd",
    "Callback",
    "CallbackError",
    "CancelBatchException",
    "CancelEpochException",
    "CancelException",
    "CancelFittingException",
    "CheckpointError",
    "CoreError",
    "CycleError",
    "DataError",
    "DeferredCancelError",
    "EpochBegin",
    "EpochCancelled",
    "EpochEnd",
    "Event",
    "Executor",
    "ExecutorError",
    "FitBegin",
    "FitEnd",
    "FlowtrainError",
    "HandlerError",
    "Learner",
    "LearnerView",
    "LearningRateSweep",
    "LoggingError",
    "LossBegin",
    "LossError",
    "MissingStateError",
    "NoConflict",
    "Phase",
    "ProtectedException",
    "Read",
    "Resolution",
    "ResolutionError",
    "RunFirst",
    "SanityCheckError",
    "SerialExecutor",
    "StepContext",
    "TorchCore",
    "TrainingPhase",
    "UndeclaredWriteError",
    "Unresolvable",
    "UpdateBegin",
    "UpdateEnd",
    "UsageError",
    "ValidationPhase",
    "Write",
    "WriteConflictError",
    "callback_graph",
    "find_learning_rate",
    "on",
    "resolve",
]

# The documented paths of modules that have moved since: both names are one module.
_sys.modules.update(
    {
        f"{__name__}.hyperparameter": _hyperparameters,
        f"{__name__}.records": _backend,
        f"{__name__}.schedules": _schedules,
        f"{__name__}.stopping": _stopping,
        f"{__name__}.summary": _summary,
    }
)
