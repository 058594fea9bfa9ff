"""Arguments: checks of everything that a user passes to a learner, before the learner uses any of it.

Each check raises an error that names the value and says what to write instead. Two tables translate the names that
other training libraries have for arguments and attributes into flowtrain's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from os import PathLike
from typing import Any

import torch

from flowtrain.callback.callback import Callback
from flowtrain.callback.phases import AbstractTrainingPhase, Phase, as_phase, has_bundled_step
from flowtrain.core.torch_core import TorchCore
from flowtrain.errors import CallbackError, CoreError, UsageError
from flowtrain.errors.arguments import whole_number
from flowtrain.errors.describing import nearest
from flowtrain.state.learner_state import Named

__all__ = [
    "as_list",
    "check_core",
    "check_counts",
    "check_keywords",
    "check_lossfn",
    "check_model",
    "check_path",
    "check_phase",
    "given_phase",
    "no_attribute",
    "set_attribute",
    "with_defaults",
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
    "callbacks=[Profiler('runs/profile')] in Learner": "profiler",
    "callbacks=[...] in Learner, or learner.add_callback(callback)": "cbs callbacks callback",
    "core=TorchCore(device=..., precision=..., accumulate=..., clip_grad_norm=..., compile=...) in Learner": (
        "device devices accelerator gpus precision amp fp16 bf16 accumulate accumulate_grad_batches "
        "gradient_accumulation_steps clip_grad_norm gradient_clip_val max_grad_norm compile"
    ),
    "learner.fit(10)": "epochs max_epochs n_epoch n_epochs num_epochs nb_epochs num_train_epochs",
    "learner.fit(steps=1000), with validate_every=100 to evaluate in between": (
        "max_steps num_steps n_steps steps_per_epoch val_check_interval eval_steps eval_every"
    ),
    "learner.fit(10, validate_every=2) to evaluate after every second epoch": "validation_freq check_val_every_n_epoch",
    "learner.fit(10, limit_batches=100), or limit_batches={TrainingPhase: 0.1, ValidationPhase: 5}": (
        "limit_train_batches limit_val_batches limit_test_batches overfit_batches validation_steps"
    ),
    "learner.dry_run() before fit": "fast_dev_run num_sanity_val_steps",
    "learner.fit(10, resume=folder), with Checkpointer(folder) among the callbacks": (
        "ckpt_path checkpoint checkpoint_path resume_from_checkpoint initial_epoch default_root_dir output_dir"
    ),
    'default_callbacks="quiet" in Learner': "verbose progress progress_bar enable_progress_bar",
    "flowtrain.seed_everything(0) before the model is made": "seed random_state deterministic",
}
"""Maps the code to write to the names, separated by spaces, that other libraries have for that argument."""

_ATTRIBUTES = {
    "learner.predict(loader)": "get_preds predict_step predict_on_batch",
    "learner.evaluate(loader)": "test eval",
    "learner.history[ValidationPhase]['Loss'].values for the values of a metric, and "
    "learner.cbstate.history[TrainingPhase] for the number of epochs and batches": (
        "recorder metrics logged_metrics callback_metrics log_history current_epoch global_step epochs losses"
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
    "Freeze({'body.*': None}) among the callbacks, or requires_grad_(False) of the parameters": (
        "freeze unfreeze freeze_to"
    ),
    "learner.add_callback(callback)": "add_cb add_cbs callback",
}
"""Maps the code to write to the names, separated by spaces, that other libraries have for that attribute or method."""

_CHANGES = {
    "callbacks": "Call learner.set_callbacks([...]) or learner.add_callback(...).",
    "core": "Make a new Learner(..., core=...).",
    "data": "Pass the loaders to a fit, learner.fit(10, data=...), or to learner.evaluate(...).",
    "executor": "Make a new Learner(..., executor=...).",
    "optimizer": "Call learner.replace_optimizer(...).",
    "strict": "Make a new Learner(..., strict=True).",
}
"""The code to write instead of an assignment to an attribute of a learner."""


def check_keywords(call: str, unknown: Mapping[str, Any], known: Callable[..., Any]) -> None:
    """Refuse keyword arguments that a call does not have, with the code to write instead.

    Args:
        call: The name of the call in the message: ``"Learner"`` or ``"fit"``.
        unknown: The keyword arguments that the call does not have.
        known: The function that was called; its signature gives the names it takes.

    Raises:
        UsageError: `unknown` is not empty. The message is about its first name.
    """
    for name in unknown:
        # `unknown` is the ``**`` parameter of the call, which collects the wrong names and is no argument itself.
        names = [each for each in signature(known).parameters if each not in ("self", "unknown")]
        # A name of another library says what the user means; the spelling is compared only for all other names.
        advice = _advice(_ARGUMENTS, name)
        remedy = f" Write {advice}." if advice else nearest(name, names)
        raise UsageError(f"{call}() takes no argument {name!r}.{remedy} It takes {', '.join(names)}.")


def no_attribute(name: str, names: Iterable[str]) -> AttributeError:
    """Return the error for an attribute that a learner does not have, with the code to write instead.

    Args:
        name: The attribute that was looked up.
        names: The attributes of the learner; the closest one is suggested if no other library has `name`.
    """
    advice = _advice(_ATTRIBUTES, name)
    remedy = f" Write {advice}." if advice else nearest(name, [each for each in names if not each.startswith("_")])
    return AttributeError(f"A Learner has no attribute {name!r}.{remedy}")


def set_attribute(learner: object, name: str, value: object) -> None:
    """Assign an attribute of a learner; `__setattr__` of the class.

    Raises:
        UsageError: The attribute is one that the learner was built with, or that it only shows, so that the assignment
            would have no effect.
    """
    kind = getattr(type(learner), name, None)
    if (isinstance(kind, property) and kind.fset is None) or (name == "core" and name in vars(learner)):
        remedy = _CHANGES.get(name, "Change the object itself, or make a new Learner.")
        raise UsageError(f"learner.{name} cannot be assigned: other parts of the learner hold what it had. {remedy}")
    object.__setattr__(learner, name, value)


def _advice(table: Mapping[str, str], name: str) -> str:
    """Return the code to write for a name of another library, or an empty string for a name that no table has."""
    return next((advice for advice, names in table.items() if name in names.split()), "")


def check_model(model: Any) -> Any:
    """Return the model; a mapping from names to models becomes a `Named`.

    Raises:
        CoreError: `model` is neither, or one of its names cannot be written as ``learner.model.<name>``.
    """
    if isinstance(model, torch.nn.Module):
        return model
    if isinstance(model, Mapping) and model and all(isinstance(each, torch.nn.Module) for each in model.values()):
        for name in model:
            # A name such as "items" would hide a method of the mapping, and a private name one of its attributes.
            if not (isinstance(name, str) and name.isidentifier()) or name.startswith("_") or hasattr(Mapping, name):
                raise CoreError(f"model has the name {name!r}, which learner.model.<name> cannot be. Choose another.")
        return Named("model", model)
    raise CoreError(
        f"model={model!r} is no torch.nn.Module, nor a mapping of names to modules. Pass a module, or "
        f"several by name, as in model={{'gen': generator, 'disc': discriminator}}."
    )


def check_lossfn(lossfn: Any) -> Any:
    """Return the loss function as it was passed.

    Raises:
        CoreError: `lossfn` is missing, a class, or cannot be called.
    """
    # A class can be called too, and would be made anew for each batch with the outputs as its argument.
    if isinstance(lossfn, type) or not callable(lossfn):
        made = f" Write {lossfn.__name__}(), an instance." if isinstance(lossfn, type) else ""
        made = made or " Write Learner(model, lossfn), as with torch.nn.functional.mse_loss."
        raise CoreError(f"lossfn={lossfn!r} is not a function of (outputs, targets).{made}")
    return lossfn


def check_core(core: Any) -> TorchCore:
    """Return the core as it was passed, or a new `TorchCore` for ``None``.

    Raises:
        CoreError: `core` is a device, a class, or any other object that is no `TorchCore`.
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
    """Check that the bundled step of a phase, if the phase uses it, finds one model and a parameter to train.

    Args:
        phase: The phase. One with its own step passes, since that step may run several models.
        model: The module, or several as `Named`.
        modules: The modules whose parameters are trained: the models and the loss function.

    Raises:
        CoreError: There are several models, or the step trains and every parameter is frozen.
    """
    if isinstance(model, Named) and has_bundled_step(type(phase)):
        raise CoreError(
            f"{phase!r} runs one model, and the learner has {', '.join(model)}. Write a phase with "
            f"a step of its own: class MyPhase(AbstractTrainingPhase): def step(self, learner, raw): ..."
        )
    if has_bundled_step(type(phase), AbstractTrainingPhase):
        params = [param for module in modules for param in module.parameters()]
        # A model without parameters, such as a baseline, has nothing that could be frozen, so it passes.
        if params and not any(param.requires_grad for param in params):
            raise CoreError(
                f"{phase!r} has nothing to train: no parameter of the model or the loss function requires grad, all "
                f"{len(params)} are frozen. Call requires_grad_(True) on what is to be trained, or pass the data as "
                f"data={{ValidationPhase: loader}}."
            )


def as_list(callbacks: Any) -> list[Callback]:
    """Return the callbacks as a new list, so that a later change of the user's list has no effect.

    Raises:
        CallbackError: `callbacks` is a single callback, or cannot be iterated.
    """
    if isinstance(callbacks, Callback) or not isinstance(callbacks, Iterable):
        raise CallbackError(f"callbacks={callbacks!r} is not a list. Write callbacks=[...].")
    return list(callbacks)


def with_defaults(
    chosen: list[Callback], wanted: object, quiet: Iterable[type[Callback]], printing: Iterable[type[Callback]]
) -> list[Callback]:
    """Return the chosen callbacks, followed by the default ones whose type is not among them, as far as wanted.

    Args:
        chosen: The callbacks of the user.
        wanted: The argument ``default_callbacks`` of a learner.
        quiet: The types of the default callbacks that print no line.
        printing: The types of those that print.

    Raises:
        UsageError: `wanted` is neither ``True`` nor ``False`` nor ``"quiet"``.
    """
    if wanted not in (True, False, "quiet"):
        raise UsageError(
            f'default_callbacks={wanted!r} is not True, False or "quiet". Your own callbacks go into callbacks=[...].'
        )
    kinds = [*quiet, *(() if wanted == "quiet" else printing)] if wanted else []
    return [*chosen, *(kind() for kind in kinds if not any(isinstance(callback, kind) for callback in chosen))]


def given_phase(phase: object, what: str) -> Phase:
    """Return the phase; for a phase type, its instance.

    Args:
        phase: The argument of the user.
        what: The name of the method that took it.

    Raises:
        UsageError: `phase` is neither a phase nor a phase type.
    """
    found = as_phase(phase)
    if found is None:
        raise UsageError(f"{what}() takes a phase first, got {phase!r}. Write learner.{what}(TrainingPhase(), ...).")
    return found


def check_counts(epochs: object, steps: object, validate_every: object) -> tuple[int | None, ...]:
    """Check the three arguments that set the length of a fit, and return them in the same order.

    Raises:
        UsageError: Both or neither of `epochs` and `steps` are given, or one of the numbers is not whole or below 1.
    """
    if (epochs is None) == (steps is None):
        got = "neither" if epochs is None else f"both, epochs={epochs!r} and steps={steps!r}"
        raise UsageError(
            f"fit() takes a number of epochs or a number of steps, got {got}. Write fit(10), or fit(steps=1000)."
        )
    named = {"epochs": epochs, "steps": steps, "validate_every": validate_every}
    found = (None if each is None else whole_number(f"fit(): {name}", each) for name, each in named.items())
    return tuple(found)


def check_path(path: object, called: str, instead: str) -> None:
    """Check that the argument that names a checkpoint is a path.

    Args:
        path: The argument of the user.
        called: The text of the call up to the value, as ``"fit(resume="``.
        instead: A sentence for a user who meant no checkpoint.

    Raises:
        UsageError: `path` is no path, or an empty string.
    """
    if not isinstance(path, (str, PathLike)) or path == "":  # an empty path would mean the working directory
        example = "fit(10, resume='runs/a')" if "=" in called else f"{called}'runs/a')"
        raise UsageError(
            f"{called}{path!r}) takes the path of a checkpoint, or of a folder of them: write {example} with the "
            f"folder of a Checkpointer. {instead}"
        )
