"""Criteria: whether training should stop, judged from one value of each epoch; and criteria that combine others.

A criterion is independent of learners. It is given the value of each epoch, and returns the reason to stop or ``None``.
`flowtrain.callbacks.stopping` has the usual criteria, `flowtrain.callbacks.EarlyStopping` gives them the values. A
user's criterion names its state in ``initial``, and judges a value in ``judge``::

    class Flat(Criterion):
        "Stop when the value stays the same for two epochs."

        initial = {"before": None}

        def judge(self, loss, training):
            before, self.before = self.before, loss
            return f"the value stays {self.shown(loss)}" if loss == before else None
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar

from flowtrain.callbacks.monitoring import Mode
from flowtrain.errors import CheckpointError, UsageError
from flowtrain.errors.arguments import is_a, is_positive, whole_number

__all__ = [
    "Criterion",
    "Disjunction",
    "Never",
    "Warmup",
    "check_positive",
]


class Criterion:
    """Base of the criteria. A subclass names its state in `initial` and overrides `judge`.

    Attributes:
        initial: The attributes that are the state of the criterion, with their first values. `state_dict` holds them.
        needs_training: Whether `judge` uses the values of the training phase.
    """

    initial: ClassVar[Mapping[str, Any]] = {}
    needs_training: bool = False
    # A value of which large is good is negated once, in `update`, so that every `judge` deals with losses.
    _sign = 1.0

    def __init__(self) -> None:
        Criterion.reset(self)  # not an override, which may use attributes that a constructor sets later

    def begin(self, mode: Mode = "min") -> None:
        """Note that a fit begins, and whether small values are good (``"min"``, the default) or large ones."""
        self._sign = -1.0 if mode == "max" else 1.0

    def update(self, value: float, training: Sequence[float] = ()) -> str | None:
        """Judge the value of an epoch; return the reason to stop, which begins with the criterion, or ``None``.

        Args:
            value: The watched value.
            training: The values of the training phase since the last call, one for each epoch, oldest first.
        """
        why = self.judge(self._sign * value, [self._sign * each for each in training])
        return None if why is None else f"{self!r}: {why}"

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        """Return the reason to stop, or ``None``. Subclasses override this.

        Args:
            loss: The value, negated if large values are good, so that smaller is better.
            training: The values of the training phase, negated in the same way.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define judge(loss, training). Define it: it returns the reason to stop as "
            f"a text, or None."
        )

    def shown(self, loss: float) -> str:
        """Return the text of a loss that `judge` was given, with the sign of the user's value."""
        return f"{self._sign * loss:.6g}"

    def reset(self) -> None:
        """Forget all values."""
        for name, value in self.initial.items():
            setattr(self, name, deepcopy(value))  # otherwise all instances would share one list

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain values."""
        return {name: deepcopy(getattr(self, name)) for name in self.initial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            CheckpointError: `state` is of a criterion of another type.
        """
        if set(state) != set(self.initial):
            raise CheckpointError(
                f"{self!r} remembers {_listed(self.initial)}, and got a state with {_listed(state)}. "
                f"Go on with the criterion that the state was taken from, or leave the state out."
            )
        for name, value in state.items():
            setattr(self, name, deepcopy(value))

    def parts(self) -> Iterator[Criterion]:
        """Yield this criterion, and the criteria that it combines."""
        yield self

    def __or__(self, other: Criterion) -> Disjunction:
        """``a | b`` is ``Disjunction(a, b)``."""
        return Disjunction(self, other)


class Never(Criterion):
    """Never stop."""

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        """Return ``None``."""
        return None

    def __repr__(self) -> str:
        return "Never()"


class _Combination(Criterion):
    """A criterion that combines others: `begin`, `reset` and the state pass on to each of them."""

    def __init__(self, criteria: Sequence[Criterion]) -> None:
        for criterion in criteria:
            if not is_a(criterion, Criterion):
                made = f" Write {criterion.__name__}(...), an instance." if isinstance(criterion, type) else ""
                raise UsageError(
                    f"{criterion!r} is no criterion. flowtrain.callbacks.stopping has some, such as Patience(5) or "
                    f"GL(2).{made}"
                )
        self.criteria = tuple(criteria)
        # Parts are compared by identity: two equal criteria have two states, one object would count each epoch twice.
        inside = [part for criterion in criteria for part in criterion.parts()]
        for part in inside:
            if sum(part is other for other in inside) > 1:
                raise UsageError(
                    f"{part!r} is in {type(self).__name__} twice, as one object that would take in each value twice. "
                    f"Make another one."
                )
        self.needs_training = any(criterion.needs_training for criterion in criteria)
        super().__init__()

    def begin(self, mode: Mode = "min") -> None:
        """Tell each criterion that a fit begins."""
        super().begin(mode)
        for criterion in self.criteria:
            criterion.begin(mode)

    def reset(self) -> None:
        """Reset each criterion too."""
        super().reset()
        for criterion in self.criteria:
            criterion.reset()

    def parts(self) -> Iterator[Criterion]:
        """Yield this criterion, and the criteria that it combines."""
        yield self
        for criterion in self.criteria:
            yield from criterion.parts()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with the type and the state of each criterion."""
        inside = [{"type": type(each).__name__, "state": each.state_dict()} for each in self.criteria]
        return {**super().state_dict(), "criteria": inside}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned.

        Raises:
            CheckpointError: `state` is of criteria of other types.
        """
        inside = state.get("criteria", [])
        # All types are compared before any state is loaded, so that a refusal leaves every criterion as it was.
        saved, ours = [each["type"] for each in inside], [type(each).__name__ for each in self.criteria]
        if saved != ours:
            raise CheckpointError(
                f"{self!r} has the criteria {_listed(ours)}, and got the state of {_listed(saved)}. "
                f"Go on with the criteria that the state was taken from, or leave the state out."
            )
        super().load_state_dict({name: value for name, value in state.items() if name != "criteria"})
        for criterion, each in zip(self.criteria, inside, strict=True):
            criterion.load_state_dict(each["state"])


class Disjunction(_Combination):
    """Stop when any of several criteria stops. Each criterion is given every value; ``a | b`` is the same.

    Source: ``Disjunction`` of EarlyStopping.jl (https://github.com/JuliaAI/EarlyStopping.jl).

    Raises:
        UsageError: There is no argument, an argument is no criterion, or one criterion is given twice.
    """

    def __init__(self, *criteria: Criterion) -> None:
        if not criteria:
            raise UsageError("Disjunction() has no criterion. Write Disjunction(Patience(5), InvalidValue()).")
        super().__init__(criteria)

    def update(self, value: float, training: Sequence[float] = ()) -> str | None:
        """Give the value to each criterion; return the reasons of all that stop, joined."""
        # All criteria are updated, also after one that stops, so that their states do not depend on their order.
        reasons = [criterion.update(value, training) for criterion in self.criteria]
        return "; ".join(reason for reason in reasons if reason is not None) or None

    def __repr__(self) -> str:
        return f"Disjunction({', '.join(map(repr, self.criteria))})"


class Warmup(_Combination):
    """Leave out the first `n` values, and give the later ones to a criterion.

    Source: ``Warmup`` of EarlyStopping.jl (https://github.com/JuliaAI/EarlyStopping.jl).

    Args:
        criterion: The criterion. It never sees the first `n` values, nor the values of the training phase up to them.
        n: The number of values that are left out.

    Raises:
        UsageError: `criterion` is no criterion, or `n` is no whole number, or below 1.
    """

    initial: ClassVar[Mapping[str, Any]] = {"count": 0}
    count: int

    def __init__(self, criterion: Criterion, n: int = 1) -> None:
        self.n = whole_number("Warmup(): n", n)
        super().__init__([criterion])

    def update(self, value: float, training: Sequence[float] = ()) -> str | None:
        """Give the value to the criterion, unless it is one of the first `n`."""
        # The values of the training phase up to these epochs are dropped as well.
        self.count += 1
        return None if self.count <= self.n else self.criteria[0].update(value, training)

    def __repr__(self) -> str:
        return f"Warmup({self.criteria[0]!r}, {self.n})"


def check_positive(what: str, name: str, value: float, example: str) -> float:
    """Return an argument that is a positive number.

    Args:
        what: The name of the class, for the message.
        name: The name of the argument.
        value: The argument.
        example: A usual value, for the message.

    Raises:
        UsageError: `value` is no number above zero.
    """
    if not is_positive(value):
        raise UsageError(f"{what}({name}={value!r}): {name} is a number above zero, such as {example}.")
    return value


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "nothing"
