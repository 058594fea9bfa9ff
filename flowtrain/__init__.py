"""flowtrain: train PyTorch models with callbacks that cannot race.

A callback declares what it reads and writes; from the declarations flowtrain proves an order before anything runs.
Start with `Learner` and `Callback`; the callbacks that come with it are in `flowtrain.callbacks`.
"""

from __future__ import annotations

from flowtrain.access import Access, Read, Write
from flowtrain.callback import Callback, on
from flowtrain.core import TorchCore
from flowtrain.errors import (
    AccessError,
    AmbiguousHandlerError,
    CallbackError,
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
from flowtrain.events import (
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
from flowtrain.execution import Executor, SerialExecutor
from flowtrain.finder import LearningRateSweep, find_learning_rate
from flowtrain.learner import Learner
from flowtrain.phases import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Phase,
    StepContext,
    TrainingPhase,
    ValidationPhase,
)
from flowtrain.protect import LearnerView
from flowtrain.registry import callback_graph
from flowtrain.resolution import NoConflict, Resolution, RunFirst, Unresolvable, resolve
from flowtrain.signals import CancelBatchException, CancelEpochException, CancelException, CancelFittingException

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
