"""Decide which callbacks are deferred, and which of them share a lane.

A deferrable callback stays in place in three cases:

- It exchanges values with other ranks, which all ranks do in the serial order, on the training thread.
- A callback in place must run after it, because it names it in ``run_after`` or shares a resource with it. A callback
  that stays for this reason can be the reason for another one, so `decide` repeats the question until nothing changes.
- It may draw random numbers, and its lane would be a thread of this process. Python, numpy and torch have one generator
  for all threads, from which training draws at the same time. In place, and in another process, a handler has random
  numbers of its own (`flowtrain.state.random_numbers`).

Deferred callbacks that are joined by ``run_after`` or a resource share a lane, which keeps their order.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from flowtrain.callback.access import Path, Read, lags_of
from flowtrain.callback.callback import draws_own
from flowtrain.graph.held_backends import names_in, reachable
from flowtrain.graph.nodes import Node
from flowtrain.state.learner_state import LearnerState, by_name

__all__ = ["Deferral", "decide", "may_draw", "name_of", "stays_here", "why_here"]


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
        several = state is not None and state.world_size > 1
        found = {node.name: why for node in deferred if (why := _needed_in_place(node, in_place, several=several))}
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


def name_of(nodes: Sequence[Node]) -> str:
    """Return the name of a lane of these callbacks."""
    return "+".join(node.name for node in nodes)


def why_here(nodes: Sequence[Node]) -> str:
    """Return why the callbacks of a lane cannot leave this process; empty if they can."""
    return next((f"{node.name}: {why}" for node in nodes if (why := stays_here(node))), "")


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
        "DataLoader", "RandomSampler", "SubsetRandomSampler", "WeightedRandomSampler", "alpha_dropout",
        "alpha_dropout_", "bernoulli", "bernoulli_", "beta", "betavariate", "binomial", "cauchy_", "chisquare",
        "choice", "choices", "default_generator", "dirichlet", "dropout", "dropout1d", "dropout2d", "dropout3d",
        "dropout_", "exponential", "exponential_", "expovariate", "feature_alpha_dropout", "feature_alpha_dropout_",
        "feature_dropout", "feature_dropout_", "fork_rng", "fractional_max_pool2d",
        "fractional_max_pool2d_with_indices", "fractional_max_pool3d", "fractional_max_pool3d_with_indices", "gamma",
        "gammavariate", "gauss", "geometric", "geometric_", "getrandbits", "gumbel", "gumbel_softmax",
        "hypergeometric", "kaiming_normal", "kaiming_normal_", "kaiming_uniform", "kaiming_uniform_", "laplace",
        "lobpcg", "log_normal_", "logistic", "lognormal", "lognormvariate", "logseries", "manual_seed",
        "multi_head_attention_forward", "multinomial", "multivariate_normal", "native_dropout", "negative_binomial",
        "noncentral_chisquare", "noncentral_f", "normal", "normal_", "normalvariate", "orthogonal_", "pareto",
        "paretovariate", "pca_lowrank", "permutation", "permuted", "poisson", "rand", "rand_like", "randbytes",
        "randint", "randint_like", "randn", "randn_like", "random", "random_", "random_integers", "random_sample",
        "random_split", "randperm", "randrange", "ranf", "rayleigh", "reset_parameters", "rrelu", "rrelu_",
        "rrelu_with_noise", "rrelu_with_noise_", "rsample", "sample", "sample_n", "scaled_dot_product_attention",
        "seed", "shuffle", "sparse_", "standard_cauchy", "standard_exponential", "standard_gamma", "standard_normal",
        "standard_t", "svd_lowrank", "triangular", "trunc_normal_", "uniform", "uniform_", "vonmises",
        "vonmisesvariate", "wald", "weibull", "weibullvariate", "xavier_normal", "xavier_normal_", "xavier_uniform",
        "xavier_uniform_", "zipf",
        "set_rng_state", "numpy.random",  # in the code of a function that imports it
    )
)  # fmt: skip
"""Names of functions that draw from the generators of the process. Those of NumPy with a common name, such as ``f`` and
``bytes``, are not among them: `_draws` knows these by the generator that they belong to."""

_python = getattr(random.random, "__self__", None)

_DRAWING_MODULES = ("Dropout", "RReLU", "FractionalMaxPool")
"""Parts of the names of modules of torch that draw. Those with a rate of dropout are known by their rate."""

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
                if any(part in kind.__name__ for part in _DRAWING_MODULES) or (isinstance(rate, float) and rate):
                    return kind.__name__
            elif what := _draws(one):
                return what
            elif isinstance(one, FunctionType) and _is_users(one.__module__):
                names = {*names_in(one.__code__)}
                if drawing := names & (_DRAWING | _made_at_random()):
                    return f"{min(drawing)} in {one.__qualname__}"
                found = _globals_of(one, names)
                # A function has another name here where it was imported ``as`` that.
                if what := next((what for each in found if (what := _draws(each))), ""):
                    return f"{what} in {one.__qualname__}"
                waiting += [each for each in found if not isinstance(each, ModuleType)]
            # The attributes of a class of the user count as well: its methods may draw.
            if id(kind) not in seen or one is kind:
                waiting += [each for base in kind.__mro__ if _is_users(base.__module__) for each in vars(base).values()]
                seen[id(kind)] = kind
    return ""


def _globals_of(function: FunctionType, names: set[str]) -> list[Any]:
    """Return the global objects that a function names, including those that it reaches through a module of the user."""
    found = [function.__globals__[name] for name in names & function.__globals__.keys()]
    modules = [each for each in found if isinstance(each, ModuleType) and _is_users(each.__name__)]
    inside = [vars(module)[name] for module in modules for name in names & vars(module).keys()]
    return [*found, *inside]


def _draws(value: Any) -> str:
    """Return the name of a function or module of another package that draws from the generators of the process."""
    if isinstance(value, ModuleType):
        return value.__name__ if value.__name__ in ("random", "numpy.random") else ""
    if not isinstance(value, (FunctionType, BuiltinFunctionType, MethodType)):
        return ""
    owner, name = getattr(value, "__self__", None), value.__name__
    # The functions of Python's and NumPy's modules are methods of a generator that has no public name.
    if owner is not None and any(owner is each for each in (_python, _numpy())):
        return name
    return name if name in _DRAWING and not _is_users(value.__module__ or "torch") else ""


def _numpy() -> object:
    """Return the generator behind the functions of ``numpy.random``; ``None`` if NumPy is not imported."""
    return getattr(sys.modules.get("numpy.random.mtrand"), "_rand", None)


@cache
def _made_at_random() -> frozenset[str]:
    """Return the names of the modules of torch that draw their first parameters: a handler that makes one draws."""
    drawing = set()
    for name, kind in vars(torch.nn).items():
        for method in ("reset_parameters", "_reset_parameters"):
            code = getattr(getattr(kind, method, None), "__code__", None)
            if isinstance(kind, type) and code is not None and {*names_in(code)} & _DRAWING:
                drawing.add(name)
    return frozenset(drawing)


def _is_users(module: str) -> bool:
    """Tell whether a module is the user's own code, and not part of an installed package."""
    if module.partition(".")[0] in _NOT_USERS:
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def _needed_in_place(node: Node, in_place: Sequence[Node], *, several: bool) -> str:
    """Return why a callback must stay in place because of other ranks or callbacks; empty if it need not."""
    if node.exchanges:
        return "it exchanges values with other ranks"
    if several and lags_of(node.union):
        return "it writes with a lag, which each of several ranks does itself"
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
