"""Hyperparameters: the values that a schedule can set, each as a small class.

=================  ================================================================================
`LearningRate`     ``lr`` of the parameter groups of the optimizer
`Momentum`         ``momentum``, or the first of ``betas`` if the optimizer has ``betas``
`WeightDecay`      ``weight_decay``
`HyperParameter`   the base of these three: subclass it for another entry of the parameter groups
`Setting`          the base of all: subclass it for a value elsewhere, such as in ``cbstate``
=================  ================================================================================

::

    class Epsilon(HyperParameter):
        key = "eps"

    class TeacherForcing(Setting):
        def access(self) -> Access:
            return {"cbstate.teacher_forcing": Write()}

        def set(self, learner: LearnerView, value: float) -> None:
            learner.cbstate.teacher_forcing = value
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from flowtrain.callback.access import Access, Write
from flowtrain.callback.view import LearnerView
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a, whole_number
from flowtrain.errors.describing import nearest

__all__ = ["HyperParameter", "LearningRate", "Momentum", "Setting", "WeightDecay"]


class Setting:
    """A value that a schedule sets before each update.

    Attributes:
        minimum: The smallest value that is allowed; ``None`` if every finite number is.
    """

    minimum: ClassVar[float | None] = None

    @property
    def name(self) -> str:
        """The name of the setting in ``cbstate.hyperparams`` and in messages."""
        return type(self).__name__

    def overlaps(self, other: Setting) -> bool:
        """Tell whether two settings change the same value, so that only one schedule may have either."""
        return self.name == other.name

    def access(self) -> Access:
        """Return the access declaration of `set` and `prepare`."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define access(). Define it: it returns the access of set(), such as "
            f'{{"optimizer.hyperparams": Write()}}.'
        )

    def set(self, learner: LearnerView, value: float) -> None:
        """Set the value. Called before each update.

        Args:
            learner: A view that allows the access of `access`.
            value: The value of the schedule for the coming update.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define set(learner, value). Define it: it changes the setting to the "
            f"value."
        )

    def prepare(self, learner: LearnerView, value: float) -> None:
        """Prepare the setting when the learner is built. The base class sets the value, so that others can read it.

        Args:
            learner: A view that allows the access of `access`.
            value: The value for the first update.
        """
        self.set(learner, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@dataclass(frozen=True, repr=False)
class HyperParameter(Setting):
    """A hyperparameter of an optimizer: one entry of its parameter groups.

    Two hyperparameters with the same type, optimizer and group are equal.

    Args:
        optimizer: The name of the optimizer, if the learner has several.
        group: The position of one parameter group, from 0. Without it the value is set in all groups, which must have
            the same value when the learner is built.

    Attributes:
        key: The name of the entry of a parameter group.

    Raises:
        UsageError: `optimizer` is no name, or `group` no position.

    >>> LearningRate("gen", group=1).name
    'LearningRate.gen.1'
    """

    optimizer: str = ""
    group: int | None = None

    key: ClassVar[str] = ""
    minimum: ClassVar[float | None] = 0.0

    def __post_init__(self) -> None:
        what = type(self).__name__
        if not is_a(self.optimizer, str) or "." in self.optimizer:  # the name becomes one part of a path
            raise UsageError(f"{what}({self.optimizer!r}) takes the name of an optimizer, as {what}('gen').")
        if self.group is not None:
            group = whole_number(f"{what}(): group, the position of a parameter group,", self.group, least=0)
            object.__setattr__(self, "group", group)

    @property
    def name(self) -> str:
        """The name of the type, then the optimizer and the group where they are given, joined by dots."""
        parts = [type(self).__name__, self.optimizer, "" if self.group is None else str(self.group)]
        return ".".join(part for part in parts if part)

    def overlaps(self, other: Setting) -> bool:
        """Tell whether the two hyperparameters are the same entry of at least one common parameter group."""
        if not isinstance(other, HyperParameter) or (self.key, self.optimizer) != (other.key, other.optimizer):
            return False
        # Without a group all groups are meant, so the two have at least one in common.
        return self.group is None or other.group is None or self.group == other.group

    def access(self) -> Access:
        """Return `Write` on the hyperparameters of the optimizer."""
        return {f"optimizer.{self.optimizer}.hyperparams" if self.optimizer else "optimizer.hyperparams": Write()}

    def read(self, group: Mapping[str, Any]) -> float:
        """Return the value in one parameter group."""
        return float(group[self.key])

    def write(self, group: MutableMapping[str, Any], value: float) -> None:
        """Set the value in one parameter group. A tensor, as compiled optimizers have, is filled and not replaced."""
        old = group[self.key]
        if isinstance(old, torch.Tensor):
            old.fill_(value)
        else:
            group[self.key] = value

    def set(self, learner: LearnerView, value: float) -> None:
        """Set the value in all parameter groups, or in the one that was given."""
        for group in self._groups(learner):
            self.write(group, value)

    def prepare(self, learner: LearnerView, value: float) -> None:
        """Check that the parameter groups have this hyperparameter, and that groups which will share a value agree.

        Raises:
            UsageError: A group does not have it, the groups have different values, or the group does not exist.
        """
        values: list[float] = []
        for group in self._groups(learner):
            try:
                values.append(self.read(group))
            except KeyError as error:  # the user's `read` may look up another key than `key`
                raise UsageError(
                    f"{self!r}: the parameter groups of the optimizer have no {error}.{nearest(self.key, group)} "
                    f"They have: {', '.join(group)}. Use an optimizer that has it, or another hyperparameter."
                ) from None
        # One schedule would make the groups equal, and so silently undo a choice of the user.
        if any(value != values[0] for value in values):
            raise UsageError(
                f"{self!r} would give all parameter groups one value, and now they have {', '.join(map(str, values))}. "
                f"Name the group: {{{type(self).__name__}(group=0): ..., {type(self).__name__}(group=1): ...}}."
            )

    def _groups(self, learner: LearnerView) -> Iterator[MutableMapping[str, Any]]:
        """Yield the parameter groups in which the value is set."""
        optimizer = learner.optimizer
        # Looked up at each update: loading a state into an optimizer replaces its groups.
        groups = (getattr(optimizer, self.optimizer) if self.optimizer else optimizer).hyperparams
        if self.group is None:
            yield from groups
        elif self.group < len(groups):
            yield groups[self.group]
        else:
            raise UsageError(
                f"{self!r}: the optimizer has {len(groups)} parameter groups, counted from 0. "
                f"Write group={len(groups) - 1} or less."
            )

    def __repr__(self) -> str:
        given = [repr(self.optimizer)] if self.optimizer else []
        given += [f"group={self.group}"] if self.group is not None else []
        return f"{type(self).__name__}({', '.join(given)})"


class LearningRate(HyperParameter):
    """The learning rate."""

    key = "lr"


class Momentum(HyperParameter):
    """The momentum. For an optimizer with ``betas``, such as Adam, this is the first of the betas."""

    key = "momentum"

    def read(self, group: Mapping[str, Any]) -> float:
        """Return the momentum in one parameter group."""
        return float(group["betas"][0] if "betas" in group else group[self.key])

    def write(self, group: MutableMapping[str, Any], value: float) -> None:
        """Set the momentum in one parameter group."""
        if "betas" in group:
            group["betas"] = (value, *group["betas"][1:])
        else:
            super().write(group, value)


class WeightDecay(HyperParameter):
    """The weight decay."""

    key = "weight_decay"
