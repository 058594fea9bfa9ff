"""The contents of a checkpoint: the state of a learner as tensors and plain values, gathered, checked and restored.

==============  =====================================================================================================
entry           meaning
==============  =====================================================================================================
``format``      the mark of a checkpoint of flowtrain; ``version`` of the format, ``flowtrain`` and ``torch``
``model``       the state of each model by its name; a single model has the empty name. A checkpoint taken after an
                evaluation has the parameters that were evaluated: the averages of `flowtrain.callbacks.EMA`
``trained``     the parameters that training continues with, in the same form; only where they differ from ``model``
``loss module`` the state of the loss function, if it is a module
``structure``   changes of modules and optimizers that their ``state_dict`` leaves out (`Changes`)
``optimizer``   for each optimizer by name its ``type``, its ``groups`` by names of parameters, and its ``state``
``core``        the state of the gradient scaler
``updates``     the number of updates that the learner has made
``group``       the open accumulation group, if any: its counts, and the gradients in the order of the parameters
``cbstate``     the state that callbacks share, as `flowtrain.state.encoding` packs it
``arrivals``    the late writes that have not arrived; ``None`` if no handler makes any
``callbacks``   for each callback by name its ``type``, ``state`` and ``conditions``, and counts of its ``recording``
``random``      the generators of the process; the seed of the run, and the events that callbacks drew numbers for
``loaders``     for each phase the generators of its loader
``position``    the position of the fit: `flowtrain.training.checkpoint.position`
``numbers``     for each phase how many of its epochs have begun; ``passes`` how many passes over its data
``run``         the ``id`` of the run, the ``positions`` of its sinks, and the ``folder`` of the checkpoint
``lanes``       the number of events of each lane, and the events that were not done in time; ``None`` without lanes
``finite``      whether the trained parameters and the last loss are neither NaN nor infinite
==============  =====================================================================================================

The learner is changed only after every entry has been checked. If a module or a callback then refuses its state, the
learner's earlier state is restored.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from flowtrain.callback.callback import Callback, recording_of
from flowtrain.core.optimizers import IMPLEMENTATION
from flowtrain.core.torch_core import TorchCore
from flowtrain.errors import CheckpointError, FlowtrainError
from flowtrain.graph.executor import Executor, Site, finish_waiting
from flowtrain.state.by_phase import CountsMap
from flowtrain.state.encoding import Packer
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain.state.shards import Pieces, shard_like
from flowtrain.training.checkpoint.changes import Changes
from flowtrain.training.checkpoint.reading import FORMAT, JUDGED, VERSION, own_version
from flowtrain.training.sinks import Sinks

__all__ = [
    "apply",
    "check_fits",
    "check_models",
    "finish",
    "gather",
    "load_callbacks",
    "load_models",
    "without_callback",
]

_COMPILED = "_orig_mod."
"""Torch puts this before the names of parameters in a compiled module."""


def gather(
    state: LearnerState, core: TorchCore, changes: Changes, packer: Packer, *, judged: bool = False
) -> dict[str, Any]:
    """Return the state of a learner, copied to the CPU, without the entries of its fit.

    Args:
        state: The state of the learner.
        core: The core of the learner.
        changes: The changes that training has made to modules and optimizers.
        packer: Copies the values. Without a list of pieces the copy never leaves this process, so that it may hold
            unpicklable objects.
        judged: Whether ``model`` is to hold the parameters that evaluation judges.

    Returns:
        The entries by name. If the model is sharded, and the copy leaves this process, ``shards`` has the pieces that
        this rank has (`Packer`).

    Raises:
        CheckpointError: A callback, ``cbstate`` or a module holds an object that a checkpoint cannot.
    """
    with ExitStack() as rest:  # a callback undoes temporary changes while it is at rest, so that they are not saved
        for callback in state.callbacks:
            rest.enter_context(callback.at_rest())
        contents = _gather(state, core, changes, packer)
        if judged and [callback for callback in state.callbacks if callback.hold_judged(True)]:
            judging = _models(core, Packer(packer.pieces, packer.buffers))
            contents |= {"version": JUDGED, "trained": contents["model"], "model": judging}
        return {**contents, "shards": packer.pieces} if packer.pieces else contents


def _gather(state: LearnerState, core: TorchCore, changes: Changes, packer: Packer) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "flowtrain": own_version(),
        "torch": str(torch.__version__),
        "model": _models(core, packer),
        "loss module": packer.copy(_state_of(state.lossfn), "the loss function"),
        "structure": changes.state_dict(packer, here=packer.pieces is None),
        "optimizer": {
            name: {
                "type": type(each).__name__,
                "groups": changes.groups.state(name),
                "state": packer.copy(each.state_dict(), f"optimizer {name}".strip()),
            }
            for name, each in by_name(state.optimizer).items()
        },
        "core": packer.copy(core.state_dict(), "core"),
        "updates": state.updates,
        "group": _group(core, packer),
        "cbstate": state.cbstate.__packed__(packer, "cbstate"),
        "arrivals": state.arrivals.state_dict(packer),
        "callbacks": {callback.name: _callback(callback, packer) for callback in state.callbacks},
    }


def _models(core: TorchCore, packer: Packer) -> dict[str, Any]:
    return {name: packer.copy(_state_of(model), f"model {name}".strip()) for name, model in core.models.items()}


def _callback(callback: Callback, packer: Packer) -> dict[str, Any]:
    conditions: list[dict[str, Any]] = []
    for condition in callback.conditions:
        kind = type(condition).__name__
        state = packer.copy(condition.state_dict(), f"the condition {kind} of {callback.name}")
        conditions.append({"type": kind, "state": state})
    return {
        "type": type(callback).__name__,
        "state": packer.copy(callback.state_dict(), f"{callback.name}.state_dict()"),
        "conditions": conditions,
        **({} if (recording := recording_of(callback)) is None else {"recording": recording.state_dict()}),
    }


def _group(core: TorchCore, packer: Packer) -> dict[str, Any] | None:
    if not core.groups.open:
        return None
    unsent = core.replica.unsent
    own = {} if unsent is None else unsent.by_parameter()
    gradients = [own.get(param, param.grad) for module in core.modules for param in module.parameters()]
    contents = {"state": core.groups.state_dict(), "gradients": gradients}
    copied: dict[str, Any] = packer.copy(contents, "the gradients")
    return copied


def _state_of(module: Any) -> dict[str, Any]:
    """Return the state of a module by name. The names do not depend on whether the module or a part is compiled."""
    if not isinstance(module, torch.nn.Module):
        return {}
    return {key.replace(_COMPILED, ""): value for key, value in module.state_dict().items()}


# --- check


@contextmanager
def _explained() -> Generator[None]:
    """Give a context in which an unforeseen error is one of the checkpoint, whose entries have impossible contents.

    Raises:
        CheckpointError: Another error than one of flowtrain was raised in the body.
    """
    try:
        yield
    except (FlowtrainError, OSError):  # a callback may have a file that is gone
        raise
    except Exception as error:
        raise CheckpointError(
            f"The checkpoint has contents that cannot be loaded: {type(error).__name__}: {error}. It was changed after "
            f"flowtrain wrote it, or the model or optimizer refuses its state. Pass another checkpoint. Nothing has "
            f"been changed."
        ) from error


@_explained()
def check_fits(contents: Mapping[str, Any], state: LearnerState, core: TorchCore, changes: Changes) -> None:
    """Check that the contents of a checkpoint fit a learner.

    Raises:
        CheckpointError: The checkpoint has another model or other optimizers, or has the state of a callback under
            the name of a callback of another type.
    """
    check_models(contents, core)
    _refuse_model(list(_differences(contents["loss module"], _state_of(state.lossfn))))
    _refuse_model(list(changes.differences(contents.get("structure"))))
    optimizers = by_name(state.optimizer)
    wrong = _wrong_names("optimizer", contents["optimizer"], optimizers)
    for name, optimizer in optimizers.items():
        wrong = wrong or list(_other_optimizer(name, contents["optimizer"][name], optimizer, changes))
    if wrong:
        raise CheckpointError(
            f"The checkpoint was taken with another optimizer: {wrong[0]}. Build the learner with that optimizer. "
            f"Nothing has been changed."
        )
    for callback in state.callbacks:
        saved = contents["callbacks"].get(callback.name)
        if saved is not None and saved["type"] != type(callback).__name__ and saved["state"]:
            raise CheckpointError(
                f"The checkpoint has the state of a {saved['type']} under the name {callback.name!r}, and here that is "
                f"a {type(callback).__name__}. Give one of them another name. Nothing has been changed."
            )


@_explained()
def check_models(contents: Mapping[str, Any], core: TorchCore) -> None:
    """Check that the models of a checkpoint have the names, shapes and dtypes of the models of a core.

    Raises:
        CheckpointError: They have others.
    """
    wrong = _wrong_names("model", contents["model"], core.models)
    for name, model in core.models.items():
        wrong = wrong or list(_differences(contents["model"][name], _state_of(model)))
    _refuse_model(wrong)


def _refuse_model(wrong: list[str]) -> None:
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(
            f"The checkpoint was taken of another model: {'; '.join(wrong[:5])}{more}. Build the learner with the "
            f"model that the checkpoint was taken of. Nothing has been changed."
        )


def _wrong_names(what: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    if set(saved) == set(here):
        return []

    def listed(names: Mapping[str, Any]) -> str:
        """Return the names as a text."""
        return ", ".join(repr(name) for name in names if name) or "one without a name"

    return [f"it has as {what} {listed(saved)}, the learner has {listed(here)}"]


def _differences(saved: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """Yield a text for each difference between two states of a module: in names, shapes and dtypes."""
    for name in here:
        if name not in saved:
            yield f"it has no {name}"
    for name, value in saved.items():
        if name not in here:
            yield f"it has {name}, and the learner's has not"
        elif is_lazy(here[name]):  # a lazy parameter cannot be compared: it gets its shape with the first batch
            yield f"its {name} has a shape, the learner's has none yet: call the model once before, model(inputs)"
        elif isinstance(value, (torch.Tensor, Pieces)) and isinstance(here[name], torch.Tensor):
            if value.shape != here[name].shape:
                yield f"its {name} has shape {tuple(value.shape)}, the learner's {tuple(here[name].shape)}"
            elif value.dtype != here[name].dtype:
                yield f"its {name} is {value.dtype}, the learner's {here[name].dtype}"


def _other_optimizer(
    name: str, saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, changes: Changes
) -> Iterator[str]:
    if saved["type"] != type(optimizer).__name__:
        called = f"optimizer {name!r}" if name else "it"
        yield f"{called} was a {saved['type']}, the learner has a {type(optimizer).__name__}"
    other = changes.groups.difference(name, saved)
    if other:
        yield other


# --- restore


def finish(
    contents: Mapping[str, Any], core: TorchCore, executor: Executor, site: Site, sinks: Sinks
) -> dict[str, Any]:
    """Process the events that waited in lanes when a checkpoint was taken that has just been restored.

    Args:
        contents: The contents of the checkpoint.
        core: The core of the learner; of several ranks the main one processes the events.
        executor, site, sinks: The executor, the loop and the backends, which stand where the checkpoint says.

    Returns:
        The contents that the checkpoint would have if no event had waited.

    Raises:
        Exception: The events cannot be read (`CheckpointError`), or a handler failed.
    """
    lanes = contents["lanes"]
    waiting = lanes and lanes.get("waiting")
    if not waiting or (core.world is not None and not core.world.main):
        return {**contents}
    finish_waiting(executor, waiting, site)
    names, packer = {name.partition(".")[0] for each in waiting.values() for name in each["handlers"]}, Packer()
    states = {
        each.name: {**contents["callbacks"][each.name], "state": _callback(each, packer)["state"]}
        for each in site.state.callbacks
        if each.name in names and each.name in contents["callbacks"]
    }
    counts = {lane: lanes["sequences"].get(lane, 0) + each["count"] for lane, each in waiting.items()}
    return {
        **contents,
        "callbacks": {**contents["callbacks"], **states},
        "arrivals": site.state.arrivals.state_dict(packer),
        "lanes": {"sequences": {**lanes["sequences"], **counts}, "waiting": {}},
        "run": {**contents["run"], "positions": sinks.flush()},
    }


@_explained()
def apply(
    contents: Mapping[str, Any],
    state: LearnerState,
    core: TorchCore,
    changes: Changes,
    before: Mapping[str, Any] | None = None,
) -> None:
    """Put a learner into the state of a checkpoint that `check_fits` has passed. `contents` is not changed.

    Args:
        contents, state, core, changes: The contents of the checkpoint, and the learner.
        before: The present state, if the caller has gathered it already: memory holds it once then.

    Raises:
        CheckpointError: A callback refused its state. The learner is in its earlier state again.
    """
    before = gather(state, core, changes, Packer()) if before is None else before
    try:
        _apply(contents, state, core, changes)
    except BaseException:
        _apply(before, state, core, changes)
        raise


def _apply(contents: Mapping[str, Any], state: LearnerState, core: TorchCore, changes: Changes) -> None:
    packer = Packer()
    with core.own_modes():  # these changes come first, so that a module's own ``load_state_dict`` can overrule them
        changes.load_state_dict(contents.get("structure"))
    # The models come first: an optimizer casts its state to their dtype and device, and callbacks may look at them.
    load_models(contents.get("trained", contents["model"]), core)
    _load_module(state.lossfn, contents["loss module"])
    for name, optimizer in by_name(state.optimizer).items():
        changes.groups.arrange(name, contents["optimizer"][name])
        saved = packer.copy(contents["optimizer"][name]["state"], "optimizer")
        # A checkpoint of the CPU says that the optimizer is not fused, and on a device the learner's is.
        for there, here in zip(saved.get("param_groups", ()), optimizer.param_groups, strict=False):
            there |= {option: here[option] for option in IMPLEMENTATION if option in here}
        optimizer.load_state_dict(_spread_state(saved, optimizer))
    core.load_state_dict(contents["core"])
    if core.groups.open:  # its gradients belong to the parameters that were replaced
        core.discard()
    if contents["group"] is not None:
        core.groups.load_state_dict(contents["group"]["state"])
        params = (param for module in core.modules for param in module.parameters())
        unsent = core.replica.unsent
        for param, gradient in zip(params, contents["group"]["gradients"], strict=True):
            if unsent is None or not unsent.put(param, gradient):
                param.grad = None if gradient is None else gradient.to(param.device, copy=True)
    phases = {repr(phase): phase for phase in state.data}
    state.cbstate.__saved__.clear()
    for name in [name for name in state.cbstate if name not in contents["cbstate"]]:
        if not _is_written(state, name):
            delattr(state.cbstate, name)
    for name, packed in contents["cbstate"].items():
        state.cbstate.__put__(name, packer.copy(packed, f"cbstate.{name}"), phases)
    state.arrivals.load_state_dict(contents.get("arrivals"), phases, [each.name for each in state.callbacks], packer)
    state.updates = contents["updates"] if "updates" in contents else _counted_updates(state)
    load_callbacks(contents, state.callbacks)


def _spread_state(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the saved state of an optimizer with this rank's part of what belongs to a sharded parameter."""
    state = dict(saved["state"])
    for group, there in zip(optimizer.param_groups, saved["param_groups"], strict=False):
        for param, number in zip(group["params"], there["params"], strict=False):
            if number in state:
                state[number] = {name: shard_like(value, param) for name, value in state[number].items()}
    return {**saved, "state": state}


def _counted_updates(state: LearnerState) -> int:
    """Return the updates that a `Recorder` has counted, because early checkpoints lack the number; 0 without one."""
    history = vars(state.cbstate).get("history")
    return sum(counts.updates for counts in history.values()) if isinstance(history, CountsMap) else 0


def load_callbacks(contents: Mapping[str, Any], callbacks: Iterable[Callback], *, of_weights: bool = False) -> None:
    """Load the state of callbacks from a checkpoint; a callback that it lacks keeps its state.

    Args:
        contents: The contents of the checkpoint.
        callbacks: The callbacks.
        of_weights: Whether the learner gets the weights of the checkpoint and stays at its own number of epochs. Then
            conditions keep their state.

    Raises:
        CheckpointError: A callback refused its state.
    """
    packer, run = Packer(), contents.get("run", {})
    for callback in callbacks:
        if callback.name in contents["callbacks"]:
            _load_callback(callback, packer.copy(contents["callbacks"][callback.name], callback.name), of_weights)
            if "here" in run:  # read from a file, and no copy of the earlier state
                callback.moved(run["folder"], run["here"])


def load_models(saved: Mapping[str, Mapping[str, Any]], core: TorchCore) -> None:
    """Load the saved state of each model.

    Args:
        saved: The state of each model by the name of the model.
        core: The core that holds the models.
    """
    for name, model in core.models.items():
        _load_module(model, saved[name])


def without_callback(contents: Mapping[str, Any], state: LearnerState) -> list[str]:
    """Return the names under which a checkpoint has the state of a callback and the learner has no callback."""
    names = {callback.name for callback in state.callbacks}
    return [name for name, saved in contents["callbacks"].items() if saved["state"] and name not in names]


def _is_written(state: LearnerState, name: str) -> bool:
    """Tell whether a callback writes an entry of `cbstate`. Such an entry stays even if the checkpoint lacks it."""
    return name in getattr(state.callbacks, "written", ())


def _load_module(module: Any, saved: Mapping[str, Any]) -> None:
    if isinstance(module, torch.nn.Module):
        module.load_state_dict(
            {key: shard_like(saved[key.replace(_COMPILED, "")], each) for key, each in module.state_dict().items()}
        )


def _load_callback(callback: Callback, saved: Mapping[str, Any], of_weights: bool) -> None:
    conditions = () if of_weights else callback.conditions
    try:
        callback.load_state_dict(saved["state"])
        if [type(condition).__name__ for condition in conditions] == [each["type"] for each in saved["conditions"]]:
            for condition, each in zip(conditions, saved["conditions"], strict=True):
                condition.load_state_dict(each["state"])
        if (recording := recording_of(callback)) is not None and not of_weights and "recording" in saved:
            recording.load_state_dict(saved["recording"])
    except Exception as error:
        raise CheckpointError(
            f"{callback.name} refuses its state in the checkpoint: {type(error).__name__}: {error}. Make it with the "
            f"arguments that it had in the run of the checkpoint, or leave it out. Nothing has been changed."
        ) from error
