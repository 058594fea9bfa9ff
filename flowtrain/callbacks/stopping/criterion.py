"""Criteria: when training should stop, judged from one value an epoch; and how several make one.

A criterion knows nothing of a learner. It is fed the value of each epoch, and answers with the reason to stop or with
``None``. `flowtrain.callbacks.stopping` has the criteria that people use, `flowtrain.callbacks.EarlyStopping` feeds
them. A criterion of one's own says what it remembers, and judges::

    class Flat(Criterion):
        "Stop when the value stays the same for two epochs."

        initial = {"before": None}

        def judge(self, loss, training):
            before, self.before = self.before, loss
            return f"the value stays {self.shown(loss)}" if loss == before else None
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, Literal

from flowtrain.errors import CheckpointError, UsageError, is_a, is_positive, whole_number

__all__ = [
    "Criterion",
    "Disjunction",
    "Mode",
    "Never",
    "Warmup",
    "check_positive",
    "direction",
    "several",
]

Mode = Literal["min", "max"]


def direction(call: str, monitor: str, mode: Mode | None, callbacks: Iterable[Any]) -> Mode:
    """Return whether small values of a metric are good, or large ones.

    Args:
        call: What watches it, as a call that is open: ``"EarlyStopping(..."``.
        monitor: The name of the metric, or of one of its values.
        mode: What the user said, if anything.
        callbacks: All of the learner; those that record metrics say what they know of them.

    Raises:
        UsageError: Nobody knows.
    """
    metric = monitor.partition(".")[0]  # of one with several values, such as "F1.cat"
    known: Mode | None = "min" if monitor == "Loss" else None
    for callback in callbacks:
        modes = callback.metric_modes()
        known = modes.get(monitor, modes.get(metric, known))
    if mode is not None or known is not None:
        return mode or known or "min"
    raise UsageError(
        f"{call}, monitor={monitor!r}) does not know whether large values of {monitor} are good or small ones. Write "
        f'{call}, monitor={monitor!r}, mode="max") if large ones are, or mode="min" if small ones are; or say it where '
        f'the metric is made: Metric(f, name={metric!r}, mode="max").'
    )


def several(monitor: str, series: Iterable[str]) -> str:
    """Say, for a message, which values a metric has that is recorded as several series."""
    names = [name for name in series if name.startswith(f"{monitor}.")]
    return f"; {monitor} has several values: {', '.join(names)}. Write monitor={names[0]!r}" if names else ""


class Criterion:
    """Base of the criteria: subclass it, say in `initial` what it remembers, and override `judge`.

    Attributes:
        initial: What it remembers, as attributes by name, each with its first value. This is what `state_dict` holds.
        needs_training: Whether it judges by the values of training too.
    """

    initial: ClassVar[Mapping[str, Any]] = {}
    needs_training: bool = False
    _sign = 1.0

    def __init__(self) -> None:
        Criterion.reset(self)

    def begin(self, mode: Mode = "min") -> None:
        """Learn that a fit begins, and whether small values are good or large ones. Without it small ones are."""
        self._sign = -1.0 if mode == "max" else 1.0

    def update(self, value: float, training: Sequence[float] = ()) -> str | None:
        """Take in the value of an epoch; return why to stop, beginning with the criterion, or ``None``.

        Args:
            value: The value that is watched.
            training: The values of training since the last call, one for each epoch, oldest first.
        """
        why = self.judge(self._sign * value, [self._sign * each for each in training])
        return None if why is None else f"{self!r}: {why}"

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        """Return why to stop, or ``None``. Override this.

        Args:
            loss: The value, negated where large ones are good: the smaller the better.
            training: The values of training, in the same way.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define judge(loss, training)")

    def shown(self, loss: float) -> str:
        """Return a loss as `judge` gets it as text, with the sign of the value that it was."""
        return f"{self._sign * loss:.6g}"

    def reset(self) -> None:
        """Forget all values."""
        for name, value in self.initial.items():
            setattr(self, name, deepcopy(value))

    def state_dict(self) -> dict[str, Any]:
        """Return what `update` needs to go on from here, as plain values."""
        return {name: deepcopy(getattr(self, name)) for name in self.initial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            CheckpointError: It is the state of another type of criterion.
        """
        if set(state) != set(self.initial):
            raise CheckpointError(
                f"{self!r} remembers {_listed(self.initial)}, and got a state with {_listed(state)}. "
                f"Go on with the criterion that the state was taken from, or leave the state out."
            )
        for name, value in state.items():
            setattr(self, name, deepcopy(value))

    def parts(self) -> Iterator[Criterion]:
        """Yield this criterion and those inside it."""
        yield self

    def __or__(self, other: Criterion) -> Disjunction:
        """``a | b`` is ``Disjunction(a, b)``."""
        return Disjunction(self, other)


class Never(Criterion):
    """Never stop."""

    def judge(self, loss: float, training: Sequence[float]) -> str | None:
        return None

    def __repr__(self) -> str:
        return "Never()"


class _Several(Criterion):
    """Criteria inside another: what all of them are told, they are told."""

    def __init__(self, criteria: Sequence[Criterion]) -> None:
        for criterion in criteria:
            if not is_a(criterion, Criterion):
                made = f" Write {criterion.__name__}(...), an instance." if isinstance(criterion, type) else ""
                raise UsageError(
                    f"{criterion!r} is no criterion. flowtrain.callbacks.stopping has some, such as Patience(5) or "
                    f"GL(2).{made}"
                )
        self.criteria = tuple(criteria)
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
        super().begin(mode)
        for criterion in self.criteria:
            criterion.begin(mode)

    def reset(self) -> None:
        super().reset()
        for criterion in self.criteria:
            criterion.reset()

    def parts(self) -> Iterator[Criterion]:
        yield self
        for criterion in self.criteria:
            yield from criterion.parts()

    def state_dict(self) -> dict[str, Any]:
        inside = [{"type": type(each).__name__, "state": each.state_dict()} for each in self.criteria]
        return {**super().state_dict(), "criteria": inside}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            CheckpointError: It is the state of other criteria.
        """
        inside = state.get("criteria", [])
        there, ours = [each["type"] for each in inside], [type(each).__name__ for each in self.criteria]
        if there != ours:
            raise CheckpointError(
                f"{self!r} has the criteria {_listed(ours)}, and got the state of {_listed(there)}. "
                f"Go on with the criteria that the state was taken from, or leave the state out."
            )
        super().load_state_dict({name: value for name, value in state.items() if name != "criteria"})
        for criterion, each in zip(self.criteria, inside, strict=True):
            criterion.load_state_dict(each["state"])


class Disjunction(_Several):
    """Stop when any of several criteria stops. Each is fed every value; ``a | b`` means the same.

    Source: ``Disjunction`` of EarlyStopping.jl (https://github.com/JuliaAI/EarlyStopping.jl).

    Raises:
        UsageError: Something that is no criterion, or nothing at all.
    """

    def __init__(self, *criteria: Criterion) -> None:
        if not criteria:
            raise UsageError("Disjunction() has no criterion. Write Disjunction(Patience(5), InvalidValue()).")
        super().__init__(criteria)

    def update(self, value: float, training: Sequence[float] = ()) -> str | None:
        """Feed all of them; return the reasons of those that stop."""
        reasons = [criterion.update(value, training) for criterion in self.criteria]
        return "; ".join(reason for reason in reasons if reason is not None) or None

    def __repr__(self) -> str:
        return f"Disjunction({', '.join(map(repr, self.criteria))})"


class Warmup(_Several):
    """Let the first `n` values pass, and feed a criterion those that follow.

    Source: ``Warmup`` of EarlyStopping.jl (https://github.com/JuliaAI/EarlyStopping.jl).

    Args:
        criterion: The criterion; it never sees the first `n` values, nor the values of training up to them.
        n: How many values are not looked at.

    Raises:
        UsageError: That is no criterion, or `n` is no whole number, or below 1.
    """

    initial: ClassVar[Mapping[str, Any]] = {"count": 0}
    count: int

    def __init__(self, criterion: Criterion, n: int = 1) -> None:
        self.n = whole_number("Warmup(): n", n)
        super().__init__([criterion])

    def update(self, value: float, training: Sequence[float] = ()) -> str | None:
        """Feed the criterion, if the first values are over."""
        self.count += 1
        return None if self.count <= self.n else self.criteria[0].update(value, training)

    def __repr__(self) -> str:
        return f"Warmup({self.criteria[0]!r}, {self.n})"


def check_positive(what: str, name: str, value: float) -> float:
    """Return `value`.

    Raises:
        UsageError: It is no number above zero.
    """
    if not is_positive(value):
        raise UsageError(f"{what}({name}={value!r}): {name} is a number above zero.")
    return value


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "nothing"
