"""Optimizers: the ones that a user passes are checked against the models, and made where the user passes a function.

`param_groups` makes the groups of an optimizer by patterns of names, and `check_trained` finds, when a fit begins, the
parameters that no optimizer has.

On an accelerator, an optimizer class of torch gets ``fused=True`` if torch offers that and the user has not chosen an
implementation. A fused optimizer updates all parameters with one kernel, and it can skip an update on the device,
without the host (`takes_found_inf`). Its results differ in the last bits from those of the loop over the parameters.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch._C._autograd import _profiler_enabled  # pyright: ignore[reportPrivateUsage]  # nothing else tells
from torch.optim import Optimizer

from flowtrain.errors import CoreError, UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.errors.describing import nearest
from flowtrain.state.shards import whole

__all__ = [
    "IMPLEMENTATION",
    "OptimizerFactory",
    "check_trained",
    "clip_gradients",
    "dense_part",
    "fused",
    "make_optimizers",
    "match_names",
    "param_groups",
    "params_of",
    "scale_gradients",
    "takes_found_inf",
    "zeroing",
]

IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
"""The options of torch's optimizers that say how an update is computed. They belong to the device and the program."""

_ZERO_GRAD = Optimizer.zero_grad

OptimizerFactory: TypeAlias = Callable[[Iterable[torch.nn.Parameter]], Optimizer]
"""A function that makes an optimizer from parameters, such as ``partial(torch.optim.AdamW, lr=1e-3)``."""


def params_of(optimizer: Optimizer) -> list[torch.nn.Parameter]:
    """Return the parameters of all groups of an optimizer."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def param_groups(
    model: torch.nn.Module,
    groups: Mapping[str, Mapping[str, Any]],
    *,
    no_decay: bool | str | Iterable[str] = False,
) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer, by patterns of the names of the parameters.

    ::

        groups = param_groups(model, {"head.*": {"lr": 1e-3}, "*": {"lr": 1e-5}}, no_decay=True)
        learner = Learner(model, lossfn, optimizer=torch.optim.AdamW(groups))

    Frozen parameters are in the groups too, because an optimizer skips parameters without a gradient.

    Args:
        model: The model.
        groups: The options of each group by its pattern, as for `fnmatch`. The first pattern that fits a name counts.
        no_decay: The parameters that get ``weight_decay=0.0``, in a group of their own behind the others of the
            pattern: ``True`` for those with fewer than two dimensions (biases, and the weights of normalisation
            layers); or patterns of names.

    Returns:
        The groups in the order of the patterns. Each has the entry ``name``, its pattern.

    Raises:
        UsageError: No pattern fits a parameter, a pattern fits none, or an argument is of another kind.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
    >>> groups = param_groups(model, {"1.*": {"lr": 0.1}, "*": {"lr": 0.001}}, no_decay="*.bias")
    >>> [(group["name"], len(group["params"]), group["lr"], group.get("weight_decay")) for group in groups]
    [('1.*', 1, 0.1, None), ('1.*, no decay', 1, 0.1, 0.0), ('*', 1, 0.001, None), ('*, no decay', 1, 0.001, 0.0)]
    """
    named = dict(model.named_parameters())
    if not is_a(groups, Mapping) or not all(is_a(options, Mapping) for options in groups.values()):
        raise UsageError(
            f"param_groups: groups is {groups!r}. It maps patterns of names to the options of the groups: "
            f"{{'head.*': {{\"lr\": 1e-3}}, '*': {{\"lr\": 1e-5}}}}."
        )
    patterns = _patterns(no_decay, named)
    found: dict[tuple[str, bool], list[torch.nn.Parameter]] = {}
    for pattern in groups:
        found |= {(pattern, False): [], (pattern, True): []}
    by_pattern = match_names("param_groups", named, groups)
    left = [name for name, pattern in by_pattern.items() if pattern is None]
    if left:
        raise UsageError(
            f"param_groups: no pattern fits {_listed(left)}. Add a last group for the others: "
            f"{{..., '*': {{\"lr\": 1e-3}}}}."
        )
    for name, param in named.items():
        plain = (no_decay is True and param.ndim < 2) or any(fnmatchcase(name, each) for each in patterns)
        found[str(by_pattern[name]), plain].append(param)
    without = {"weight_decay": 0.0}
    return [
        {"params": params, "name": f"{name}, no decay" if plain else name, **groups[name], **(without if plain else {})}
        for (name, plain), params in found.items()
        if params
    ]


def _patterns(no_decay: Any, named: Iterable[str]) -> list[str]:
    """Return the patterns in the argument `no_decay` of `param_groups`, each of which fits a parameter.

    Raises:
        UsageError: The argument is of another kind, or a pattern fits no parameter.
    """
    if isinstance(no_decay, bool):
        return []
    if not is_a(no_decay, str) and not (is_a(no_decay, Iterable) and all(is_a(each, str) for each in no_decay)):
        raise UsageError(f"param_groups: no_decay is {no_decay!r}. It is True, False, a pattern or a list of patterns.")
    patterns = [no_decay] if isinstance(no_decay, str) else list(no_decay)
    for pattern in patterns:
        match_names("param_groups(no_decay=...)", named, [pattern])
    return patterns


def match_names(what: str, names: Iterable[str], patterns: Iterable[str]) -> dict[str, str | None]:
    """Return, for each name, the first pattern that fits it, or ``None``.

    Args:
        what: The object that takes the patterns, for the message.
        names: The names of parameters.
        patterns: The patterns, as for `fnmatch`.

    Raises:
        UsageError: A pattern fits no name that no pattern before it fits.
    """
    names, patterns = list(names), list(patterns)
    found = {name: next((each for each in patterns if fnmatchcase(name, each)), None) for name in names}
    for pattern in patterns:
        if pattern not in found.values():
            earlier = [name for name in names if fnmatchcase(name, pattern)]
            why = f"an earlier pattern fits {_listed(earlier)} first" if earlier else f"names are {_listed(names)}"
            raise UsageError(
                f"{what}: the pattern {pattern!r} fits no parameter: {why}. Patterns are compared with whole names of "
                f"parameters, in order: 'head.*', '*.bias', '*'."
            )
    return found


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_trained(
    optimizers: Mapping[str, Optimizer], models: Mapping[str, torch.nn.Module], lossfn: Any, *, warns: bool = True
) -> None:
    """Check that every parameter that requires a gradient is in an optimizer, and warn if one is not.

    Args:
        optimizers: The optimizers by name; a single one has the empty name.
        models: The models by name; a single one has the empty name.
        lossfn: The loss function, whose parameters are trained if it is a module.
        warns: Whether to warn: of several ranks the main one does.

    Raises:
        CoreError: An optimizer has a parameter of no module as well: a layer was replaced after the learner was built.
    """
    modules = {**models, "lossfn": lossfn} if isinstance(lossfn, torch.nn.Module) else models
    named = {name: param for root, module in modules.items() for name, param in module.named_parameters(root)}
    known = {id(param) for param in named.values()}
    held = {id(param): param for optimizer in optimizers.values() for param in params_of(optimizer)}
    missing = [name for name, param in named.items() if param.requires_grad and id(param) not in held]
    if not missing:
        return
    stale = [str(tuple(param.shape)) for key, param in held.items() if key not in known]
    kinds = " and ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in optimizers.values()))
    made_by = _called(next(iter(optimizers.values())))
    if stale:
        raise CoreError(
            f"{_listed(missing)} would not be trained: no optimizer has them, and {kinds} has parameters of shape "
            f"{_listed(stale)} that the model no longer has. A layer was replaced after the learner was built. Make "
            f"the optimizer anew: learner.replace_optimizer(partial({made_by}, lr=...))."
        )
    if not warns:
        return
    warnings.warn(
        f"{_listed(missing)} would not be trained: no optimizer has them, and they require gradients. Freeze them, "
        f"requires_grad_(False), or put them into an optimizer: learner.replace_optimizer(partial({made_by}, lr=...)) "
        f"takes all parameters.",
        UserWarning,
        stacklevel=7,
    )


def _called(optimizer: Optimizer) -> str:
    """Return the class of an optimizer as a program calls it: ``torch.optim.SGD``, or with the module of the class."""
    kind = type(optimizer)
    module = "torch.optim" if kind.__module__.startswith("torch.optim.") else kind.__module__
    return f"{module}.{kind.__qualname__}"


def zeroing(optimizer: Optimizer) -> Callable[[], object]:
    """Return a function that sets the gradients of an optimizer's parameters to ``None``.

    The `zero_grad` of torch records itself for the profiler, which takes several microseconds even if no profiler runs.
    So the returned function calls it only while a profiler runs. An optimizer with a `zero_grad` of its own, or a
    patched one, has that called.
    """
    if type(optimizer).zero_grad is not _ZERO_GRAD or _ZERO_GRAD.__module__ != Optimizer.__module__:
        return optimizer.zero_grad

    def zero_grad() -> None:
        """Do the same as `torch.optim.Optimizer.zero_grad`."""
        if _profiler_enabled() or "zero_grad" in vars(optimizer):
            optimizer.zero_grad()
            return
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = None

    return zero_grad


def scale_gradients(optimizer: Optimizer, factor: float) -> None:
    """Multiply the gradients of an optimizer's parameters with a factor, in place."""
    if factor != 1:
        for param in params_of(optimizer):
            if param.grad is not None:
                param.grad.mul_(factor)


def dense_part(gradient: torch.Tensor) -> torch.Tensor:
    """Return the values of a sparse gradient, which alone count in a norm; any other gradient as it is."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def clip_gradients(
    params: Iterable[torch.nn.Parameter], norm_limit: float | None, value_limit: float | None, *, needs_norm: bool
) -> torch.Tensor | None:
    """Clip gradients in place, by their total norm, then by value. Does not wait for the device.

    Args:
        params: The parameters whose gradients are clipped; those without a gradient are left out.
        norm_limit: The largest total 2-norm of the gradients; ``None`` for no limit.
        value_limit: The largest absolute value of an element; ``None`` for no limit.
        needs_norm: Whether to compute the norm. Must be ``True`` if `norm_limit` is given.

    Returns:
        The norm before clipping, a tensor of shape ``()``, if it was computed.
    """
    params = [param for param in params if param.grad is not None]
    norm: torch.Tensor | None = None
    if needs_norm:
        norm = torch.nn.utils.get_total_norm([dense_part(param.grad) for param in params if param.grad is not None])
    if norm_limit is not None and norm is not None:
        torch.nn.utils.clip_grads_with_norm_(params, norm_limit, norm)
    if value_limit is not None:
        sparse = [param for param in params if param.grad is not None and param.grad.is_sparse]
        dense = [param for param in params if param.grad is not None and not param.grad.is_sparse]
        if dense:
            torch.nn.utils.clip_grad_value_(dense, value_limit)
        for param in sparse:
            param.grad = gradient = param.grad.coalesce()  # type: ignore[union-attr]  # it has a gradient
            gradient.values().clamp_(-value_limit, value_limit)
    return norm if norm is None else whole(norm)  # only now, as shards are scaled by a norm of shards


def takes_found_inf(optimizer: Optimizer) -> bool:
    """Tell whether the optimizer skips its update if its attribute ``found_inf``, a tensor of shape ``()``, is 1."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def fused(wanted: Any, params: Iterable[torch.nn.Parameter], slow: Collection[str] = ("cpu",)) -> Any:
    """Return the function that makes an optimizer, with ``fused=True`` added where torch offers it and it is faster.

    Args:
        wanted: The argument of the user. Anything but an optimizer class of torch, or a partial of one, is returned as
            it is.
        params: The parameters to train. Each must be a floating point tensor on a device that has a fused optimizer.
        slow: The types of devices on which fused optimizers are not faster.
    """
    made = wanted.func if isinstance(wanted, partial) else wanted
    given = wanted.keywords if isinstance(wanted, partial) else {}
    if not (isinstance(made, type) and issubclass(made, Optimizer) and made.__module__.startswith("torch.optim.")):
        return wanted
    # With any of these arguments the user has chosen an implementation.
    if {*IMPLEMENTATION} & {*given}:
        return wanted
    if "fused" not in inspect.signature(made).parameters:
        return wanted
    kinds = {(param.device, param.dtype) for param in params}
    name = made.__name__
    if all(device.type not in slow and _runs_fused(name, device, dtype) for device, dtype in kinds):
        return partial(wanted, fused=True)
    return wanted


@cache
def _runs_fused(name: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Try whether a device has the fused kernel of an optimizer of torch for a type of numbers.

    Torch has no list of these kernels, and each combination is tried once.
    """
    if not dtype.is_floating_point:
        return False
    param = torch.nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
    param.grad = torch.zeros_like(param)
    try:
        getattr(torch.optim, name)([param], lr=0.0, fused=True).step()
    except (RuntimeError, TypeError):  # torch refuses the argument, or has no such kernel
        return False
    return True


def make_optimizers(
    wanted: Any, models: Mapping[str, torch.nn.Module], loss_modules: Iterable[torch.nn.Module]
) -> dict[str, Optimizer]:
    """Return the optimizers by name; a single optimizer has the empty name.

    Args:
        wanted: An optimizer, a function that makes one from parameters, or a mapping from names to either.
        models: The models by name; a single model has the empty name.
        loss_modules: The loss function, if it is a module. Its parameters go to the first optimizer that is made here.

    Raises:
        CoreError: An optimizer does not fit the models, or there is no optimizer.
    """
    loss_params = [param for module in loss_modules for param in module.parameters()]
    listed = [param for model in models.values() for param in model.parameters()] + loss_params
    all_params = list({id(param): param for param in listed}.values())  # models may share parameters
    if not any(getattr(module, "sparse", False) for model in models.values() for module in model.modules()):
        wanted = _with_fused(wanted, models, all_params)  # fused optimizers take no sparse gradients
    if not isinstance(wanted, Mapping):
        return {"": _make_optimizer(wanted, all_params, all_params, "optimizer")}
    made: dict[str, Optimizer] = {}
    left = loss_params  # those that no optimizer has been made with yet
    for name, one in wanted.items():
        if name not in models and not isinstance(one, Optimizer):
            known = ", ".join(repr(known) for known in models if known)
            raise CoreError(
                f"optimizer[{name!r}] is called with the parameters of model {name!r}, and there is no such model"
                f"{f' ({known} are there)' if known else ', but one without a name'}.{nearest(name, models)} "
                f"Use the models' names, or pass an optimizer instance."
            )
        own = list(models[name].parameters()) if name in models else all_params
        if not isinstance(one, Optimizer):
            own, left = list({id(param): param for param in [*own, *left]}.values()), []
        made[name] = _make_optimizer(one, own, all_params, f"optimizer[{name!r}]")
    if not made:
        raise CoreError("optimizer={} has no optimizer. Pass one, such as torch.optim.AdamW, or one for each model.")
    return made


def _with_fused(wanted: Any, models: Mapping[str, torch.nn.Module], all_params: list[torch.nn.Parameter]) -> Any:
    """Return the argument of the user, with ``fused=True`` in each function that can take it."""
    if not isinstance(wanted, Mapping):
        return fused(wanted, all_params)
    own = {name: model.parameters() for name, model in models.items()}
    return {name: fused(one, own.get(name, all_params)) for name, one in wanted.items()}


def _make_optimizer(
    wanted: Any, params: list[torch.nn.Parameter], known: list[torch.nn.Parameter], what: str
) -> Optimizer:
    """Return the optimizer that a user passed, or the one that the user's function makes.

    Args:
        wanted: The optimizer, or a function that makes one from parameters.
        params: The parameters for the function.
        known: The parameters that an optimizer may have: those of all models and of the loss function.
        what: The argument of the user, for messages.
    """
    if isinstance(wanted, Optimizer):
        ids = {id(param) for param in known}
        for number, group in enumerate(wanted.param_groups):
            for param in group["params"]:
                if id(param) not in ids:
                    raise CoreError(
                        f"{what} ({type(wanted).__name__}) has, in group {number}, a parameter of shape "
                        f"{tuple(param.shape)} that is neither the model's nor the loss function's, so training would "
                        f"not change the model. Make the optimizer from this model's parameters, or pass a function: "
                        f"optimizer=partial({_called(wanted)}, lr=...)."
                    )
        return _needs_no_closure(wanted, what)
    if not callable(wanted):
        raise CoreError(
            f"{what} is {wanted!r}. Pass an optimizer, or a function of the parameters such as "
            f"partial(torch.optim.AdamW, lr=1e-3)."
        )
    if not params:
        raise CoreError(f"{what} has nothing to train: the model has no parameters. Pass a model with parameters.")
    _import_dynamo()
    made = wanted(params)
    if not isinstance(made, Optimizer):
        raise CoreError(
            f"{what} was called with the parameters and returned {type(made).__name__}, which is no torch optimizer. "
            f"Pass a function that returns one, such as partial(torch.optim.AdamW, lr=1e-3)."
        )
    return _needs_no_closure(made, what)


def _import_dynamo() -> None:
    """Import the module that torch imports when it makes its first optimizer, in a thread of its own.

    The import leaves reference cycles behind that hold all frames of its call stack. With the frames of a learner among
    them, reference counting would never free the first learner of a process.
    """
    if "torch._dynamo" not in sys.modules:
        thread = threading.Thread(target=importlib.import_module, args=("torch._dynamo",), name="flowtrain import")
        thread.start()
        thread.join()


def _needs_no_closure(optimizer: Optimizer, what: str) -> Optimizer:
    """Return the optimizer, if its step can be called without a closure."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise CoreError(
            f"{what} is LBFGS, whose step runs the model several times through a closure, and an update here steps "
            f"once. Use another optimizer, or call LBFGS yourself in the step of a phase of your own."
        )
    return optimizer
