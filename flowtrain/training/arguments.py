"""What a user passes to a learner, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from os import PathLike
from typing import Any

import torch

from flowtrain.callback.callback import Callback
from flowtrain.callback.phases import AbstractTrainingPhase, AbstractValidationPhase, Phase
from flowtrain.core.core import TorchCore
from flowtrain.errors import CallbackError, CoreError, UsageError, nearest, whole_number
from flowtrain.state.learner_state import Named

__all__ = [
    "as_list",
    "as_phase",
    "check_core",
    "check_counts",
    "check_keywords",
    "check_lossfn",
    "check_model",
    "check_path",
    "check_phase",
    "no_attribute",
]


_ARGUMENTS = {
    "optimizer=partial(torch.optim.AdamW, lr=1e-3) in Learner; Scheduler({LearningRate: one_cycle(1e-3)}) among the "
    "callbacks changes it while training": "lr learning_rate lr_max max_lr scheduler lr_scheduler",
    "Learner(model, lossfn, ...), the loss function second": "loss loss_fn loss_func loss_function criterion",
    "optimizer=torch.optim.AdamW in Learner": "opt optim opt_func optimizers optimizer_cls",
    "data=(train_loader, valid_loader) in Learner or fit; loaders give batches: DataLoader(dataset, batch_size=32)": (
        "dls loader loaders dataloader dataloaders train_loader train_dataloader train_dataloaders train_data "
        "train_dataset training_data val_loader valid_loader val_dataloader val_dataloaders validation_data "
        "eval_dataset eval_dataloader x y batch_size"
    ),
    "callbacks=[Metrics(accuracy)] in Learner": "metrics compute_metrics",
    "callbacks=[LogMetrics(TensorBoardBackend('runs/a'))] in Learner": "logger loggers log report_to",
    "callbacks=[...] in Learner, or learner.add_callback(callback)": "cbs callbacks callback",
    "core=TorchCore(device=..., precision=..., accumulate=..., clip_grad_norm=..., compile=...) in Learner": (
        "device devices accelerator gpus precision amp fp16 bf16 accumulate accumulate_grad_batches "
        "gradient_accumulation_steps clip_grad_norm gradient_clip_val max_grad_norm compile"
    ),
    "learner.fit(10)": "epochs max_epochs n_epoch n_epochs num_epochs nb_epochs num_train_epochs",
    "learner.fit(steps=1000), with validate_every=100 to evaluate in between": (
        "max_steps num_steps n_steps steps_per_epoch limit_train_batches val_check_interval eval_steps eval_every "
        "validation_freq check_val_every_n_epoch"
    ),
    "learner.fit(10, resume=folder), with Checkpointer(folder) among the callbacks": (
        "ckpt_path checkpoint checkpoint_path resume_from_checkpoint initial_epoch default_root_dir output_dir"
    ),
    'default_callbacks="quiet" in Learner': "verbose progress progress_bar enable_progress_bar",
    "torch.manual_seed(0) before the model is made": "seed random_state",
}
"""What to write, and the names that other libraries have for it as arguments."""

_ATTRIBUTES = {
    "with torch.no_grad(): outputs = learner.model.eval()(inputs), and learner.model.train() before the next fit": (
        "predict get_preds predict_step"
    ),
    "learner.validate(), or learner.epoch(ValidationPhase, loader) for other data; the values are then in "
    "learner.cbstate.metrics_epoch[ValidationPhase]": "evaluate test eval",
    "learner.cbstate.metrics_epoch[ValidationPhase]['Loss'] for the values of a metric, and "
    "learner.cbstate.history[TrainingPhase] for the number of epochs and batches": (
        "history recorder metrics logged_metrics callback_metrics log_history current_epoch global_step epochs losses"
    ),
    "learner.fit(10)": "train fit_one_cycle fine_tune run fit_epochs",
    "torch.save(learner.model.state_dict(), path), or Checkpointer(folder) among the callbacks": (
        "save save_model save_weights save_checkpoint export state_dict"
    ),
    "learner.load(path)": "load_checkpoint load_weights load_model load_state_dict resume",
    "flowtrain.find_learning_rate(learner)": "lr_find lr_finder tune",
    "learner.model": "module net network parameters modules named_parameters",
    "TorchCore(device=...) as Learner(core=...)": "device to cuda cpu half",
    "learner.optimizer": "opt optim optimizers lr learning_rate",
    "learner.lossfn": "loss loss_fn loss_func criterion",
    "learner.data[TrainingPhase]": "dls dataloaders train_dataloader loaders",
    "ModelSummary() among the callbacks": "summary",
    "requires_grad_(False) of the parameters, learner.model.body.requires_grad_(False)": "freeze unfreeze freeze_to",
    "learner.add_callback(callback)": "add_cb add_cbs callback",
}
"""What to write, and the names that other libraries have for it as attributes and methods."""


def check_keywords(call: str, unknown: Mapping[str, Any], known: Callable[..., Any]) -> None:
    """Refuse keyword arguments that a call does not have, and say what to write.

    Args:
        call: ``"Learner"`` or ``"fit"``.
        unknown: What was passed.
        known: The function that was called.

    Raises:
        UsageError: There are any.
    """
    for name in unknown:
        names = [each for each in signature(known).parameters if each not in ("self", "unknown")]
        advice = _written(_ARGUMENTS, name)
        remedy = f" Write {advice}." if advice else nearest(name, names)
        raise UsageError(f"{call}() takes no argument {name!r}.{remedy} It takes {', '.join(names)}.")


def no_attribute(name: str, names: Iterable[str]) -> AttributeError:
    """Return the error for an attribute that a learner does not have, with what to write."""
    advice = _written(_ATTRIBUTES, name)
    remedy = f" Write {advice}." if advice else nearest(name, [each for each in names if not each.startswith("_")])
    return AttributeError(f"A Learner has no attribute {name!r}.{remedy}")


def _written(table: Mapping[str, str], name: str) -> str:
    return next((advice for advice, names in table.items() if name in names.split()), "")


def check_model(model: Any) -> Any:
    """Return the model, or a mapping of names to models as `Named`.

    Raises:
        CoreError: It is neither, or a name is not one that ``learner.model.<name>`` can have.
    """
    if isinstance(model, torch.nn.Module):
        return model
    if isinstance(model, Mapping) and model and all(isinstance(each, torch.nn.Module) for each in model.values()):
        for name in model:
            if not (isinstance(name, str) and name.isidentifier()) or name.startswith("_") or hasattr(Mapping, name):
                raise CoreError(f"model has the name {name!r}, which learner.model.<name> cannot be. Choose another.")
        return Named("model", model)
    raise CoreError(f"model={model!r} is no torch.nn.Module, nor a mapping of names to modules.")


def check_lossfn(lossfn: Any) -> Any:
    """Return the loss function.

    Raises:
        CoreError: It is missing, a class, or cannot be called.
    """
    if isinstance(lossfn, type) or not callable(lossfn):
        made = f" Write {lossfn.__name__}(), an instance." if isinstance(lossfn, type) else ""
        made = made or " Write Learner(model, lossfn), as with torch.nn.functional.mse_loss."
        raise CoreError(f"lossfn={lossfn!r} is not a function of (outputs, targets).{made}")
    return lossfn


def check_core(core: Any) -> TorchCore:
    """Return the core; a new one if it is ``None``.

    Raises:
        CoreError: It is a device, a class, or no core at all.
    """
    if core is None:
        return TorchCore()
    if isinstance(core, TorchCore):
        return core
    if isinstance(core, type):
        raise CoreError(f"core={core.__name__} is a class. Write core={core.__name__}(), an instance.")
    device = str(core) if isinstance(core, (str, torch.device)) else "cuda"
    raise CoreError(f'core={core!r} is no TorchCore. Write core=TorchCore(device="{device}").')


def check_phase(phase: Phase, model: Any, modules: Iterable[torch.nn.Module]) -> None:
    """Check that a step of the library would find one model, and in training something to train.

    Raises:
        CoreError: There are several models, or every parameter is frozen.
    """
    if isinstance(model, Named) and type(phase).step in (AbstractTrainingPhase.step, AbstractValidationPhase.step):
        raise CoreError(
            f"{phase!r} runs one model, and the learner has {', '.join(model)}. Write a phase with "
            f"a step of its own: class MyPhase(AbstractTrainingPhase): def step(self, learner, raw): ..."
        )
    if type(phase).step is AbstractTrainingPhase.step:
        params = [param for module in modules for param in module.parameters()]
        if params and not any(param.requires_grad for param in params):
            raise CoreError(
                f"{phase!r} has nothing to train: no parameter of the model or the loss function requires grad, all "
                f"{len(params)} are frozen. Call requires_grad_(True) on what is to be trained, or pass the data as "
                f"data={{ValidationPhase: loader}}."
            )


def as_list(callbacks: Any) -> list[Callback]:
    """Return the callbacks as a list of its own.

    Raises:
        CallbackError: It is one callback, or nothing that holds several.
    """
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
        raise CallbackError(f"callbacks={callbacks!r} is not a list. Write callbacks=[...].")
    return list(callbacks)


def as_phase(phase: Any, what: str) -> Phase:
    """Return the phase; of a type of phase, an instance.

    Args:
        phase: What the user passed.
        what: The method that it was passed to.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(phase, Phase):
        return phase
    if isinstance(phase, type) and issubclass(phase, Phase):
        return phase()
    raise UsageError(f"{what}() takes a phase first, got {phase!r}. Write learner.{what}(TrainingPhase(), ...).")


def check_counts(epochs: object, steps: object, validate_every: object) -> tuple[int | None, ...]:
    """Check what says how long a fit is, and return it in the same order.

    Raises:
        UsageError: Not exactly one of `epochs` and `steps`, a number that is not whole or below 1, or
            `validate_every` without `steps`.
    """
    if (epochs is None) == (steps is None):
        raise UsageError("fit() takes a number of epochs or a number of steps: fit(10), or fit(steps=1000).")
    named = {"epochs": epochs, "steps": steps, "validate_every": validate_every}
    found = (None if each is None else whole_number(f"fit(): {name}", each) for name, each in named.items())
    counts = tuple(found)
    if validate_every is not None and steps is None:
        raise UsageError("fit(validate_every=...) goes with steps: fit(steps=1000, validate_every=100).")
    return counts


def check_path(path: object, called: str, instead: str) -> None:
    """Check that the argument that names a checkpoint is a path.

    Args:
        path: What the user passed.
        called: The call up to the value, as ``"fit(resume="``.
        instead: What to do if no checkpoint is meant.

    Raises:
        UsageError: It is something else, or an empty string.
    """
    if not isinstance(path, (str, PathLike)) or path == "":
        example = "fit(10, resume='runs/a')" if "=" in called else f"{called}'runs/a')"
        raise UsageError(
            f"{called}{path!r}) takes the path of a checkpoint, or of a folder of them: write {example} with the "
            f"folder of a Checkpointer. {instead}"
        )
