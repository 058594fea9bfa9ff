"""The decision which callbacks are deferred, which of them share a lane, and where each lane runs.

A deferrable callback stays in place in three cases:

- It exchanges values with other ranks, which all ranks do in the serial order, on the training thread.
- A callback in place must run after it, because it names it in ``run_after`` or shares a resource with it. A callback
  that stays for this reason can be the reason for another one, so `decide` repeats the question until nothing changes.
- It may draw random numbers, and its lane would be a thread of this process. Python, numpy and torch have one generator
  for all threads, from which training draws at the same time. In place, and in another process, a handler has random
  numbers of its own (`flowtrain.state.random_numbers`).

Deferred callbacks that are joined by ``run_after`` or a resource share a lane, which keeps their order.

The second half of the module prepares lanes: `validate` checks the callbacks and the cluster before training, and
`job_of` and `transport_of` make the parts of a lane.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from flowtrain.callback.access import Declaration, Path, Read
from flowtrain.callback.callback import Callback, draws_own
from flowtrain.errors import CallbackError, ExecutorError, is_a, is_positive, nearest
from flowtrain.graph.held_backends import LIVE, is_learner, names_in, reachable
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import owner_of
from flowtrain.state.by_phase import kind_of_series
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain_dask.lanes.lane import OnError
from flowtrain_dask.lanes.limits import Limits, check_droppable
from flowtrain_dask.lanes.transport import OnLoss, ThreadTransport, Transport
from flowtrain_dask.lanes.work import Job, LaneHandler
from flowtrain_dask.snapshots.copiers import check_copies

__all__ = [
    "Defer",
    "Deferral",
    "Options",
    "check_choice",
    "check_holds_no_state",
    "check_options",
    "decide",
    "job_of",
    "lane_handlers_of",
    "may_draw",
    "name_of",
    "stays_here",
    "transport_of",
    "validate",
    "why_here",
]


@dataclass(frozen=True)
class Deferral:
    """The decision which callbacks are deferred.

    Attributes:
        lanes: The deferred callbacks of each lane, in list order.
        kept: For each deferrable callback that stays in place, the reason by its name.
        drawing: For each deferrable callback that may draw random numbers, the evidence by its name.
    """

    lanes: tuple[tuple[Node, ...], ...] = ()
    kept: dict[str, str] | None = None
    drawing: dict[str, str] = field(default_factory=dict)

    def why_kept(self, node: Node) -> str:
        """Return why a deferrable callback runs in place; empty if it is deferred or not deferrable."""
        return (self.kept or {}).get(node.name, "")


def decide(nodes: Sequence[Node], state: LearnerState | None = None, *, threads: bool = True) -> Deferral:
    """Decide which callbacks are deferred.

    Args:
        nodes: All callbacks.
        state: The state of the learner, with the modules that callbacks read.
        threads: Whether all lanes are threads of this process. Otherwise only those are that cannot leave it.
    """
    kept: dict[str, str] = {}
    lanes: tuple[tuple[Node, ...], ...] = ()
    deferred = [node for node in nodes if node.callback.deferrable]
    drawing = {node.name: what for node in deferred if (what := may_draw(node, state))}
    while True:
        ids = {id(node) for node in deferred}
        in_place = [node for node in nodes if id(node) not in ids]
        found = {node.name: why for node in deferred if (why := _needed_in_place(node, in_place))}
        if not found:
            # Draws come last, because they depend on the lanes: one callback that cannot leave this process keeps all
            # callbacks of its lane in a thread.
            lanes = _lanes(deferred)
            here = [node for lane in lanes if threads or any(map(stays_here, lane)) for node in lane]
            found = {node.name: _DRAWS.format(drawing[node.name]) for node in here if node.name in drawing}
        if not found:
            return Deferral(lanes, kept, drawing)
        kept |= found
        deferred = [node for node in deferred if node.name not in found]


_DRAWS = "it may draw random numbers ({}), and a thread would take them from training; see stochastic"


def stays_here(node: Node) -> str:
    """Return why a deferred callback cannot leave this process; empty if it can."""
    for path, kind in node.union:
        if isinstance(kind, Read) and kind.full:
            return f"it declares Read(full=True) on {'.'.join(path)!r}"
    return ""


def check_holds_no_state(callback: Callback, name: str, state: LearnerState) -> None:
    """Check that no attribute of a deferred callback is the learner, a view or a part of the learner's state.

    Raises:
        CallbackError: An attribute is one of these. The callback would read it on its lane while training changes it.
    """
    parts = (state.model, state.optimizer, state.optimizers, state.data, state.params, state.cbstate)
    live = {id(part) for part in (state, *parts) if part is not None}
    # A callback may have modules and tensors of its own, so those of the learner are recognised one by one.
    if isinstance(state.model, torch.nn.Module):
        live |= {id(part) for part in (*state.model.modules(), *state.model.parameters())}
    for attribute, value in vars(callback).items():
        held = (one for one in reachable(value) if id(one) in live or isinstance(one, LIVE) or is_learner(one))
        if (found := next(held, None)) is not None:
            raise CallbackError(
                f"{name} is deferred and keeps {type(found).__name__} in its attribute {attribute!r}: training goes on "
                f"changing that while the callback reads it. Declare what its handlers read, and read it from their "
                f"`learner`; or set deferrable = False."
            )


def may_draw(node: Node, state: LearnerState | None = None) -> str:
    """Return the evidence that a callback draws random numbers; empty if there is none, or it says that it draws none.

    The promise behind this is rule 19: deferring a callback changes no result of training. All threads of a process
    share the generators, so a callback that draws on a thread would change the numbers that training draws. A user need
    not know this, so a declaration alone would not keep the promise, and an error after a draw would come too late. So
    the names in the code of the callback are looked up: code that names ``randperm`` may draw, and the callback stays
    in place, slower and exact. A name too many costs time, never a result.

    This looks at the user's code that the callback holds or names, and at the modules that it reads or holds. It does
    not look into installed packages: for these a callback says ``stochastic = True``.
    """
    callback = node.callback
    if not draws_own(callback):
        return ""
    if callback.stochastic:
        return "stochastic = True"
    read = {path[0] for path, _ in node.union}
    parts = [getattr(state, root) for root in ("model", "lossfn") if root in read and state is not None]
    models = [model for part in parts for model in by_name(part).values()]
    return _drawn_in([type(callback), callback, *models])


_DRAWING = frozenset(
    (
        "DataLoader", "RandomSampler", "WeightedRandomSampler", "default_generator", "manual_seed", "random_split",
        "seed", "fork_rng", "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "random",
        "random_", "random_sample", "normal", "normal_", "uniform", "uniform_", "bernoulli", "bernoulli_", "binomial",
        "multinomial", "poisson", "exponential", "exponential_", "geometric", "geometric_", "cauchy_", "log_normal_",
        "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "native_dropout",
        "gumbel_softmax", "rrelu", "rsample", "sample", "randrange", "randbytes", "getrandbits", "choice", "choices",
        "shuffle", "permutation", "permuted", "gauss", "normalvariate", "standard_normal", "triangular", "beta",
        "gamma", "betavariate", "expovariate", "gammavariate", "lognormvariate", "paretovariate", "vonmisesvariate",
        "weibullvariate", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_", "trunc_normal_",
        "orthogonal_", "reset_parameters", "scaled_dot_product_attention",
    )
)  # fmt: skip
"""Names of functions that draw from the generators of the process."""

_NOT_USERS = frozenset({"flowtrain", "flowtrain_dask", "numpy", "torch", *sys.stdlib_module_names}) - {"__main__"}
"""Top-level modules that are not the user's code, wherever they are installed."""


def _drawn_in(waiting: list[Any]) -> str:
    """Return the first function or module that draws, among everything that the values lead to.

    A function draws if its code names a function of `_DRAWING`, a module if its type is known to draw.
    """
    seen: dict[int, Any] = {}
    while waiting:
        for one in reachable(waiting.pop(0)):
            if id(one) in seen:
                continue
            seen[id(one)] = one
            kind = one if isinstance(one, type) else type(one)
            if issubclass(kind, torch.nn.Module) and one is not kind:
                rate = getattr(one, "dropout", None)  # recurrent layers and attention have a rate of dropout
                if "Dropout" in kind.__name__ or kind.__name__ == "RReLU" or (isinstance(rate, float) and rate):
                    return kind.__name__
            elif isinstance(one, FunctionType) and _is_users(one.__module__):
                names = {*names_in(one.__code__)}
                if drawing := names & _DRAWING:
                    return f"{min(drawing)} in {one.__qualname__}"
                waiting += _globals_of(one, names)
            # The attributes of a class of the user count as well: its methods may draw.
            if id(kind) not in seen or one is kind:
                waiting += [each for base in kind.__mro__ if _is_users(base.__module__) for each in vars(base).values()]
                seen[id(kind)] = kind
    return ""


def _globals_of(function: FunctionType, names: set[str]) -> list[Any]:
    """Return the global objects that a function names, including those that it reaches through a module."""
    found = [function.__globals__[name] for name in names & function.__globals__.keys()]
    modules = [each for each in found if isinstance(each, ModuleType) and _is_users(each.__name__)]
    inside = [vars(module)[name] for module in modules for name in names & vars(module).keys()]
    return [each for each in (*found, *inside) if not isinstance(each, ModuleType)]


def _is_users(module: str) -> bool:
    """Tell whether a module is the user's own code, and not part of an installed package."""
    if module.partition(".")[0] in _NOT_USERS:
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def _needed_in_place(node: Node, in_place: Sequence[Node]) -> str:
    """Return why a callback must stay in place because of other ranks or callbacks; empty if it need not."""
    if node.exchanges:
        return "it exchanges values with other ranks"
    for other in in_place:
        if _runs_after(other, node):
            return f"{other.name} runs in place, after it"
        shared = _resources(node) & _resources(other)
        if shared:
            return f"{other.name} runs in place and shares {'.'.join(min(shared))}"
    return ""


def _lanes(deferred: Sequence[Node]) -> tuple[tuple[Node, ...], ...]:
    lanes: list[list[Node]] = []
    for node in deferred:  # a callback that is joined with several lanes makes one of them
        joined = [lane for lane in lanes if any(_joined(node, other) for other in lane)]
        lanes = [lane for lane in lanes if lane not in joined]
        lanes.append(sorted([node, *(other for lane in joined for other in lane)], key=lambda one: one.position))
    return tuple(tuple(lane) for lane in sorted(lanes, key=lambda lane: lane[0].position))


def _joined(one: Node, other: Node) -> bool:
    return _runs_after(one, other) or _runs_after(other, one) or bool(_resources(one) & _resources(other))


def _runs_after(later: Node, earlier: Node) -> bool:
    return any(isinstance(earlier.callback, kind) for kind in later.callback.run_after())


def _resources(node: Node) -> set[Path]:
    return {path[:2] for path, _ in node.union if path[0] == "resource"}


if TYPE_CHECKING:  # distributed takes most of a second to import, and threads do without it
    from flowtrain_dask.cluster.connect import Connection


@dataclass(frozen=True)
class Options:
    """How deferred callbacks are run; see `DaskExecutor`."""

    limits: Limits = field(default_factory=Limits)
    on_error: OnError = "raise"
    on_cluster_loss: OnLoss = "local"
    drain_timeout: float = 30.0


_LONGEST = 604_800
"""The largest `drain_timeout` in seconds, since dask cannot wait for an infinite time."""


Defer: TypeAlias = Literal["auto", "always", "never"]
"""Which deferrable callbacks are deferred; see `flowtrain_dask.executor.DaskExecutor`."""


def check_options(defer: object, resources: Mapping[str, float], options: Options) -> Defer:
    """Check the arguments of an executor that say how callbacks are deferred.

    Returns:
        Which callbacks are deferred: with `resources`, which only some workers have, ``"auto"`` is ``"always"``.

    Raises:
        ExecutorError: An argument has a wrong value; the text says what to write.
    """
    choices: dict[object, Defer] = {"auto": "auto", "always": "always", "never": "never"}
    if isinstance(defer, bool):
        chosen: Defer | None = "always" if defer else "never"
    else:
        chosen = choices.get(defer) if isinstance(defer, str) else None
    if chosen is None:
        raise ExecutorError(
            f"DaskExecutor(defer={defer!r}): defer is 'auto', where cost decides which callbacks are deferred, "
            f"'always' or 'never'.{nearest(str(defer), [*map(str, choices)])} Write DaskExecutor(defer=\"auto\")."
        )
    if not is_a(options.limits, Limits):
        raise ExecutorError(
            f"DaskExecutor(limits={options.limits!r}) is no Limits. Write DaskExecutor(limits=Limits(pending=1000)), "
            f"with `from flowtrain_dask import Limits`."
        )
    for name, amount in resources.items():
        if not is_a(name, str) or not is_positive(amount):
            raise ExecutorError(
                f"DaskExecutor(resources={dict(resources)!r}): resources are positive numbers by name. Write "
                f'DaskExecutor(address, resources={{"flowtrain": 1}}), and start the worker with '
                f"`dask worker ADDRESS --resources flowtrain=1`."
            )
    if not is_positive(options.drain_timeout) or options.drain_timeout > _LONGEST:
        raise ExecutorError(
            f"DaskExecutor(drain_timeout={options.drain_timeout!r}): it is a positive number of seconds, such as 30.0, "
            f"and at most {_LONGEST:,}, a week."
        )
    check_choice("on_error", options.on_error, ("raise", "warn"))
    check_choice("on_cluster_loss", options.on_cluster_loss, ("local", "raise"))
    return "always" if chosen == "auto" and resources else chosen


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check an argument that is one of several words.

    Raises:
        ExecutorError: The value is none of the words.
    """
    if value not in choices:
        raise ExecutorError(
            f"{name}={value!r} is none of {', '.join(map(repr, choices))}.{nearest(str(value), choices)}"
        )


def validate(deferral: Deferral, state: LearnerState, options: Options, connection: Connection | None) -> None:
    """Check that callbacks can be deferred, and that a worker can run those that leave this process.

    Raises:
        FlowtrainError: A callback cannot be deferred; the text names it and says what to do.
    """
    for nodes in deferral.lanes:
        for node in nodes:
            check_holds_no_state(node.callback, node.name, state)
            check_droppable(node.callback, _reads_series(node.union, state), options.limits)
            for _, handler in node.handlers:
                try:
                    check_copies(node.access[handler], state)
                except Exception as error:
                    error.add_note(f"{node.name} is deferred: its handlers see copies. See {node.name}.deferrable.")
                    raise
        if connection is not None and not why_here(nodes):
            transport = transport_of(job_of(nodes, deferral, "check"), nodes, options, connection)
            transport.open(options.drain_timeout)  # has a worker do a first task: pickling and versions are tried
            transport.close()


def job_of(nodes: Sequence[Node], deferral: Deferral, run: str, first: int = 0) -> Job:
    """Return the job of a lane of these callbacks."""
    names, backends = tuple(node.name for node in nodes), tuple(node.backends for node in nodes)
    draws = "; ".join(f"{name}: {what}" for name in names if (what := deferral.drawing.get(name)))
    return Job(name_of(nodes), run, names, backends, lane_handlers_of(nodes), first=first, draws=draws)


def lane_handlers_of(nodes: Sequence[Node]) -> tuple[LaneHandler, ...]:
    """Return the handlers of a lane of these callbacks."""
    return tuple(
        LaneHandler(number, node.name, handler, node.access[handler], owner_of(node, handler))
        for number, node in enumerate(nodes)
        for _, handler in node.handlers
    )


def transport_of(job: Job, nodes: Sequence[Node], options: Options, connection: Connection | None) -> Transport:
    """Return the transport of a lane: the cluster's, if there is a cluster and all callbacks can leave this process."""
    callbacks = [node.callback for node in nodes]
    if connection is None or why_here(nodes):
        return ThreadTransport(job, callbacks)
    from flowtrain_dask.cluster.transport import ClusterTransport

    return ClusterTransport(job, callbacks, connection, options.on_cluster_loss)


def name_of(nodes: Sequence[Node]) -> str:
    """Return the name of a lane of these callbacks."""
    return "+".join(node.name for node in nodes)


def why_here(nodes: Sequence[Node]) -> str:
    """Return why the callbacks of a lane cannot leave this process; empty if they can."""
    return next((f"{node.name}: {why}" for node in nodes if (why := stays_here(node))), "")


def _reads_series(declaration: Declaration, state: LearnerState) -> bool:
    entries = vars(state.cbstate)
    paths = [path for path, _ in declaration if path[0] == "cbstate"]
    found = [each for path in paths for each in (entries.values() if len(path) == 1 else [entries.get(path[1])])]
    return any(kind_of_series(each) is not None for each in found)
