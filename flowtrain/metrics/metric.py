"""A metric: a function of outputs and targets, or a torchmetrics object, with a name and the phases it is computed in.

A function gives a value for each batch. A torchmetrics object accumulates batches and gives a value at the end of the
epoch (`flowtrain.metrics.running`). `values_of` makes single numbers with names of a value.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import torch

from flowtrain.callback.phases import Phase
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, is_type
from flowtrain.errors.describing import describe
from flowtrain.metrics.running import Accumulator, Running

__all__ = ["Metric", "check_weight", "values_of"]

_MOST = 2000
"""A value with more numbers than this, and without labels, is not taken for one number for each class."""


class Metric:
    """A metric with a name, for some phases.

    The value of a metric is one number, or several numbers with names: a mapping, or one number for each class. Each
    number becomes a series, named by the metric and the key or the number of the class: ``"F1.cat"``, ``"F1.0"``.

    Args:
        f: A function of ``(outputs, targets)`` that returns a number or a mapping from names to numbers; or a
            torchmetrics object.
        name: The name in ``cbstate`` and in logs; by default the name of the function in the form ``TopAccuracy``. The
            values of a torchmetrics collection keep the names of its members.
        phase: The phases in which the metric is computed, subclasses included.
        mode: ``"min"`` if small values are good, ``"max"`` if large values are, for callbacks that watch the metric.
            The metrics of `flowtrain.metrics` and torchmetrics objects have it as their attribute ``higher_is_better``.
        weight: For a function, a function of ``(outputs, targets)`` that returns the weight of a batch in the mean of
            an epoch, such as the number of tokens that are no padding; by default the weight of `Metrics`.
        on_step: For a torchmetrics object, whether to record a value of each batch too; it is NaN if the object has no
            value for a single batch. That costs a second update and a computation for each batch. A function always
            has a value for each batch.
        labels: The names of the classes, if the value is one number for each class.

    Raises:
        UsageError: `f` is no metric, has no usable name, an argument is out of its range or does not fit `f`, or `f`
            is known to compute another value than numbers with names, such as a confusion matrix.

    >>> from flowtrain.metrics import top_k_accuracy
    >>> Metric(top_k_accuracy(3))
    Metric(Top3Accuracy)
    >>> values_of(Metric(lambda outputs, targets: {"low": 0.1, "high": 0.9}, name="Range"), {"low": 0.1, "high": 0.9})
    {'Range.low': 0.1, 'Range.high': 0.9}
    """

    of_batch = False
    """Whether `f` is a function of the batch state, as for a `Track`."""

    def __init__(
        self,
        f: Callable[..., Any] | Accumulator,
        name: str | None = None,
        phase: type[Phase] = Phase,
        *,
        mode: Literal["min", "max"] | None = None,
        weight: Callable[[Any, Any], Any] | None = None,
        on_step: bool | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.accumulates = isinstance(f, Accumulator) and not isinstance(f, type)
        if not (callable(f) or self.accumulates) or is_a(f, type):
            made = f" Write {f.__name__}(), an instance." if isinstance(f, type) else " Write Metrics(accuracy)."
            if is_a(f, Mapping):
                made = " Write Metrics(Metric(f, name='A'), Metric(g, name='B')) for functions with names."
            if is_a(f, str) and str(f).isidentifier():
                made = f" Write Metrics({f}), the function itself; flowtrain.metrics has some. Or Metrics('batch.{f}')."
            raise UsageError(f"{f!r} is no metric: a metric is a function of (outputs, targets).{made}")
        if not is_type(phase, Phase):
            raise UsageError(f"Metric(phase={phase!r}) is no phase type. Write Metric(f, phase=ValidationPhase).")
        if mode not in ("min", "max", None):
            raise UsageError(f'Metric(mode={mode!r}): mode is "min" if small values are good, "max" if large ones are.')
        self.mode: Literal["min", "max"] | None = mode
        self.f: Any = f
        self.phase = phase
        self.name = name if name is not None else _name(f)
        for each in self.names:
            if not is_a(each, str) or not each or "." in each or each == "<lambda>":
                raise UsageError(f"The metric {f!r} needs a name without dots. Write Metric(f, name='MyMetric').")
        self.weight = weight
        self.on_step = bool(on_step) if self.accumulates else True
        self.labels = None if labels is None else list(labels)
        self.plain = not self.accumulates and labels is None
        self._check(on_step)
        if self.accumulates:
            self._check_shape()

    @property
    def names(self) -> list[str]:
        """The names of the metric, with which the names of its values begin: several for a torchmetrics collection."""
        return [*self.f.keys()] if self.accumulates and hasattr(self.f, "keys") else [self.name]

    @property
    def modes(self) -> dict[str, Literal["min", "max"]]:
        """Whether small or large values are good, by the names in `names`, as far as the metric says it."""
        if self.mode is not None:
            return dict.fromkeys(self.names, self.mode)
        parts = self.f.items() if self.accumulates and hasattr(self.f, "items") else [(self.name, self.f)]
        known = {name: _higher_is_better(f) for name, f in parts}
        return {name: "max" if higher else "min" for name, higher in known.items() if higher is not None}

    def _check(self, on_step: object) -> None:
        """Check that the arguments fit the metric.

        Raises:
            UsageError: An argument does not fit the metric.
        """
        if self.weight is not None and not callable(self.weight):
            raise UsageError(
                f"Metric({self.name}, weight={self.weight!r}): weight is a function of (outputs, targets) that returns "
                f"what a batch counts, such as lambda outputs, targets: (targets != -100).sum()."
            )
        if self.weight is not None and self.accumulates:
            raise UsageError(
                f"Metric({self.name}, weight=...): {type(self.f).__name__} accumulates, and gives batches their weight "
                f"itself. Leave weight out."
            )
        if on_step is False and not self.accumulates:
            raise UsageError(
                f"Metric({self.name}, on_step=False): a function has a value for each batch, and the value of an epoch "
                f"is their mean. Leave on_step out."
            )
        if self.labels is not None and not all(is_a(label, str) and label for label in self.labels):
            raise UsageError(f"Metric({self.name}, labels={self.labels!r}): labels are the names of the classes.")

    def _check_shape(self) -> None:
        """Refuse a torchmetrics object that is known to compute a curve or a matrix.

        The annotation of ``compute`` tells a curve. A matrix is found by computing the value of a clone without a
        batch.

        Raises:
            UsageError: The value is no number, and not one number for each class.
        """
        if not isinstance(self.f, torch.nn.Module):
            return
        f: Any = self.f
        for name, member in f.items() if hasattr(f, "keys") else [(self.name, f)]:
            if _is_tuple(type(member)):
                raise UsageError(f"The metric {name} is a tuple, such as a curve{_take(self)}")
        state = torch.get_rng_state()
        try:
            running = Running(self.f, self.name)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchmetrics warns that `compute` comes before `update`
                value = running.compute()
        except Exception:  # many have no value without a batch, and are checked at the end of an epoch
            return
        finally:
            torch.set_rng_state(state)
        values_of(self, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"


def values_of(metric: Metric, value: Any) -> dict[str, Any]:
    """Return the single numbers that the value of a metric consists of, by name.

    Raises:
        UsageError: The value is a matrix, has more or fewer numbers than labels, or is no number.
    """
    if metric.plain and type(value) is torch.Tensor and value.numel() == 1 and not value.is_complex():
        return {metric.name: value}  # the usual case, in every batch: a shortcut with the result of the code below
    if isinstance(value, Mapping) and hasattr(metric.f, "keys"):  # the members of a collection have their own names
        return {name: item for key, each in value.items() for name, item in _spread(metric, str(key), each)}
    return dict(_spread(metric, metric.name, value))


def _spread(metric: Metric, name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, number)`` for a value: one pair for a number, one for each key of a mapping or each class.

    Raises:
        UsageError: As for `values_of`.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _spread(metric, f"{name}.{key}", item)
        return
    if isinstance(value, torch.Tensor):
        shape = tuple(value.shape)
    else:
        shape = tuple(getattr(value, "shape", ()))
        if metric.labels is not None and isinstance(value, Sequence) and not isinstance(value, str):
            shape = (len(value),)
    if len(shape) == 1 and (metric.labels is not None or (metric.accumulates and shape != (1,))):
        if metric.labels is None and shape[0] > _MOST:
            raise UsageError(
                f"The metric {name} has {shape[0]} values, each of which would be a series. If they are one for each "
                f"sample reduce them, as with reduction='elementwise_mean'; if one for each class give Metric(f, "
                f"labels=[...])."
            )
        labels = range(shape[0]) if metric.labels is None else metric.labels
        if len(labels) != shape[0]:
            raise UsageError(
                f"The metric {name} has {shape[0]} values, and {len(labels)} labels: {', '.join(map(str, labels))}. "
                f"Give one for each value."
            )
        for label, item in zip(labels, value, strict=True):
            yield from _spread(metric, f"{name}.{label}", item)
    elif isinstance(value, torch.Tensor) and value.numel() == 1:
        if value.is_complex():
            raise UsageError(
                f"The metric {name} returned a {describe(value)}; a metric is a real number. Return its .abs(), .real "
                f"or .imag."
            )
        yield name, value
    elif math.prod(shape) != 1:
        raise UsageError(f"The metric {name} {_shaped(metric, shape)}")
    elif isinstance(value, float):
        yield name, value
    elif metric.accumulates and isinstance(value, (tuple, list)):
        raise UsageError(f"The metric {name} has a value that is a {describe(value)}{_take(metric)}")
    else:
        try:  # an array of one element is no number for Python, and its item is
            single: Any = cast(Any, value).item() if hasattr(value, "item") else value
            number = float(single)
        except (TypeError, ValueError, OverflowError):
            raise UsageError(
                f"The metric {name} returned {value!r:.200}; a metric is one number, a tensor with one element, or a "
                f"mapping from names to such. For the numbers of classes give their names: Metric(f, labels=[...])."
            ) from None
        yield name, value if isinstance(value, int) else number


def _shaped(metric: Metric, shape: tuple[int, ...]) -> str:
    """Return the end of the message for a value of a shape that cannot be a series: the shape and the remedy."""
    what = f"returned a tensor of shape {shape}; a metric is one number"
    if len(shape) == 1:
        return f"{what}. Reduce it, as with .mean(); for one number for each class give Metric(f, labels=[...])."
    if metric.accumulates:
        return f"has a value of shape {shape}{_take(metric)}"
    return f"{what}. Reduce it, as with .mean(), or return a mapping from names to numbers."


def _take(metric: Metric) -> str:
    """Return the remedy for a torchmetrics object that computes a curve, a matrix, or another structure."""
    return (
        f"; a metric is one number, or one for each class. Take the numbers from it that you want to follow, in a "
        f"subclass: class Mine({type(metric.f).__name__}) with a compute(self) that returns a number or a mapping from "
        f"names to numbers. To log it whole use LogVisualization."
    )


def _is_tuple(kind: type) -> bool:
    """Tell whether the annotation of ``compute`` says that it returns a tuple, as for curves."""
    try:
        hint = get_type_hints(kind.compute)["return"]  # type: ignore[attr-defined]  # an accumulator has it
    except Exception:  # no annotation, or one that cannot be evaluated
        return False
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return all(get_origin(each) is tuple or each is tuple for each in kinds)


def check_weight(weight: Any, what: str) -> Any:
    """Return the weight of a batch in a mean: a number, or a tensor with one element on a device, which is not read.

    Args:
        weight: The weight that a function has returned.
        what: The function, for messages.

    Raises:
        UsageError: `weight` is no number, negative, infinite or NaN.
    """
    if isinstance(weight, torch.Tensor) and weight.numel() == 1:
        if not weight.is_cpu:
            return weight.detach()
        weight = weight.item()
    elif not isinstance(weight, (int, float)) and hasattr(weight, "item") and getattr(weight, "shape", None) == ():
        weight = weight.item()  # a numpy number, which is no subclass of int or float
    if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise UsageError(
            f"{what} returned {weight!r:.200}; what a batch counts in the mean of an epoch is a number, at least 0."
        )
    return weight


def _higher_is_better(f: Any) -> bool | None:
    own: bool | None = getattr(getattr(f, "func", f), "higher_is_better", None)
    wrapped = getattr(f, "metric", None)  # a wrapper, such as ClasswiseWrapper, has its metric here
    return own if own is not None or wrapped is None else _higher_is_better(wrapped)


def _name(f: Any) -> str:
    inner = getattr(f, "func", f)  # a functools.partial
    name = str(getattr(inner, "__name__", type(f).__name__))
    if "_" not in name and name[:1].isupper():
        return name
    return "".join(part[:1].upper() + part[1:] for part in name.split("_"))
