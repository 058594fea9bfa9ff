"""flowtrain: train PyTorch models with callbacks that cannot race.

A callback declares what it reads and writes. From the declarations flowtrain derives an order before anything runs,
refuses callbacks that have no valid order, and runs independent callbacks in parallel or later, with the result of a
serial run. Start with `Learner` and `Callback`; the bundled callbacks are in `flowtrain.callbacks`.

The code and the documentation use these words, each for one thing.

Training:

- *learner*: the object that a user makes; it holds the state of training and delegates the work to its parts.
- *loop*: the part of the learner that runs fits, epochs and batches, and that fires the events.
- *core*: the part of the learner that computes: it knows devices, precision, gradients and optimizers (`TorchCore`).
- *phase*: a type that says what kind of epoch runs (`TrainingPhase`, `ValidationPhase`) and that defines its step.
- *step*: the work of a phase on one batch, from the data of the loader to the loss or the update.
- *accumulation group*: the batches whose gradients are added up for one update.
- *update*: the change that an optimizer makes to the parameters at the end of an accumulation group.
- *batch state*: the object that holds the inputs, outputs, loss and further entries of one batch (``learner.batch``).
- *cbstate*: the state that callbacks share with each other (``learner.cbstate``).
- *history*: the metrics of all epochs of a learner, a table (``learner.history``); ``cbstate.history`` has the counts.
- *series*: the values that were pushed under one name, each with its step number; a series only grows.
- *host* and *device*: the CPU that runs Python, and the accelerator that computes the model (or the CPU again).
- *lag*: the number of batches after which the host reads a value of the device, so that it need not wait.
- *training thread*: the thread that calls `Learner.fit`; it runs the loop, the model and the optimizers.

Callbacks:

- *event*: a type that names a moment of training, such as `BatchEnd`; the loop fires instances of it.
- *callback*: an object with handlers, with declarations of access, and with state of its own.
- *handler*: a method of a callback that is marked with `on` and runs at an event in a phase.
- *condition*: an object that decides whether a callback handles an event, such as every tenth one (``every=10``).
- *path*: the name of a piece of the learner's state, such as ``batch.loss``; a path covers everything below it.
- *declaration* (of access): the paths that a handler touches, each with `Read()` or `Write()`, which includes reading.
- *resource*: something that no path names and that handlers use one after the other, such as a file.
- *view*: the object that a handler gets as ``learner``; it shows the declared paths and refuses all others.
- *twin*: the read-only counterpart of a container; a view shows the twin where only `Read()` is declared.

Order:

- *meet*: two callbacks meet at an event and phase if both have a handler for that event in that phase.
- *conflict*: two callbacks meet, and at least one of them writes state that the other one touches.
- *region*: one piece of state, however many paths reach it (`flowtrain.graph.reach`).
- *resolution*: the answer to a conflict: which callback runs first, or that the order does not matter (`RunFirst`).
- *dependency graph*: callbacks as nodes, and an edge with its reasons where one must run before another.
- *serial order*: the topological order of the dependency graph that follows the list of callbacks where it can choose.
- *plan*: the handlers for one event type and one phase type, each with its view, in serial order, and their edges.

Execution:

- *executor*: the object that runs plans, in series, in parallel or deferred, with the result of the serial order.
- *runner*: the function that an executor makes of a plan and that the loop calls for each event.
- *strand*: the handlers of one event that run one after the other on one thread, beside the other strands.
- *deferrable*: said of a callback that only consumes: nothing in training waits for its handlers.
- *deferred*: said of a callback whose handlers the executor runs later, on a snapshot; all others run *in place*.
- *snapshot*: a frozen copy of the state that a deferred handler reads, taken at the handler's place in the plan.
- *copier*: a function that copies objects of one type for snapshots.
- *cut*: the copy of a series in a snapshot: the same list of values, shown up to the length that it had.
- *lane*: a queue of deferred events and the thread that processes them, one at a time and in order.
- *worker*: a process that computes for the training process: of a dask cluster for lanes, or of a data loader.
- *rank*: one of several processes that run one training together, and its number from 0; rank 0 is the *main rank*.

Records:

- *loggable*: an object that a callback can log: a value, an image, a text, a histogram, a file.
- *record*: a loggable with its name, its step and its group, as it is written.
- *backend* (for logging): the object that callbacks log to; it encodes loggables and writes records (`LoggerBackend`).
- *sink*: the place where the records of a backend end up: a file, or a tracker.
- *run*: one fit, together with the fits that resume it, as backends know it.
- *packed*: said of state in the form that a checkpoint holds, as tensors and plain values (`flowtrain.state.encoding`).
- *checkpoint*: a file with the state of training between two batches, from which a later fit resumes.
- *position*: the point that a fit has reached in its epochs and batches, or up to which a sink has been written.
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
from flowtrain.callbacks import model_summary as _summary
from flowtrain.callbacks import schedules as _schedules
from flowtrain.callbacks import stopping as _stopping
from flowtrain.core.optimizers import param_groups
from flowtrain.core.prefetch import Transfer
from flowtrain.core.sharding import full_state_dict
from flowtrain.core.torch_core import TorchCore
from flowtrain.diagnostics.history import History
from flowtrain.diagnostics.lr_finder import LearningRateSweep, find_learning_rate
from flowtrain.diagnostics.recording.recorder import record
from flowtrain.diagnostics.recording.replay import Replayed, replay
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
    DivergedError,
    ExecutorError,
    FlowtrainError,
    HandlerError,
    LoggingError,
    LossError,
    MissingStateError,
    ProtectedException,
    RankError,
    RemoteError,
    ResolutionError,
    SanityCheckError,
    UndeclaredWriteError,
    UsageError,
    WriteConflictError,
)
from flowtrain.graph.executor import Executor
from flowtrain.graph.registry import callback_graph
from flowtrain.graph.serial import SerialExecutor
from flowtrain.learner import Learner
from flowtrain.logging import backend as _backend
from flowtrain.state import hyperparameters as _hyperparameters
from flowtrain.state.by_phase import epoch_of
from flowtrain.state.random_numbers import seed_everything
from flowtrain.training.checkpoint.reading import load_weights

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
    "DivergedError",
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
    "History",
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
    "RankError",
    "Read",
    "RemoteError",
    "Replayed",
    "Resolution",
    "ResolutionError",
    "RunFirst",
    "SanityCheckError",
    "SerialExecutor",
    "StepContext",
    "TorchCore",
    "TrainingPhase",
    "Transfer",
    "UndeclaredWriteError",
    "Unresolvable",
    "UpdateBegin",
    "UpdateEnd",
    "UsageError",
    "ValidationPhase",
    "Write",
    "WriteConflictError",
    "callback_graph",
    "epoch_of",
    "find_learning_rate",
    "full_state_dict",
    "load_weights",
    "on",
    "param_groups",
    "record",
    "replay",
    "resolve",
    "seed_everything",
]

# The documented paths of modules that have moved since: both names are one module. They stay until 1.0, and
# tests/test_exports.py holds them.
_sys.modules.update(
    {
        f"{__name__}.callbacks.summary": _summary,
        f"{__name__}.hyperparameter": _hyperparameters,
        f"{__name__}.records": _backend,
        f"{__name__}.schedules": _schedules,
        f"{__name__}.stopping": _stopping,
        f"{__name__}.summary": _summary,
    }
)
