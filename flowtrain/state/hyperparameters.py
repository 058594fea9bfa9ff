"""Hyperparameters: what a schedule can set, each as a small class.

=================  ================================================================================
`LearningRate`     ``lr`` of the parameter groups of the optimizer
`Momentum`         ``momentum``, or the first of ``betas`` where the optimizer has those
`WeightDecay`      ``weight_decay``
`HyperParameter`   the base of these: subclass it for another entry of the parameter groups
`Setting`          the base of all: subclass it for a value of your own, in ``cbstate``
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
from flowtrain.errors import UsageError, is_a, nearest, whole_number

__all__ = ["HyperParameter", "LearningRate", "Momentum", "Setting", "WeightDecay"]


class Setting:
    """A value that a schedule sets before each update.

    Attributes:
        minimum: The smallest value that means something; ``None`` if any finite number does.
    """

    minimum: ClassVar[float | None] = None

    @property
    def name(self) -> str:
        """Its name in ``cbstate.hyperparams``, and in messages."""
        return type(self).__name__

    def overlaps(self, other: Setting) -> bool:
        """Tell whether setting the other sets this one too."""
        return self.name == other.name

    def access(self) -> Access:
        """Return what `set` and `prepare` touch."""
        raise NotImplementedError(f"{type(self).__name__} does not define access()")

    def set(self, learner: LearnerView, value: float) -> None:
        """Set the value."""
        raise NotImplementedError(f"{type(self).__name__} does not define set(learner, value)")

    def prepare(self, learner: LearnerView, value: float) -> None:
        """Get ready when the learner is built; `value` is that of the first update.

        Here it is set, so that what others read is there.
        """
        self.set(learner, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


@dataclass(frozen=True, repr=False)
class HyperParameter(Setting):
    """A hyperparameter of an optimizer: one entry of its parameter groups.

    Two of the same type, optimizer and group are equal.

    Args:
        optimizer: The optimizer's name, where the learner has several.
        group: The position of one parameter group; without it, the value is set in every group, and these must agree
            when the learner is built.

    Attributes:
        key: The entry of a parameter group.

    >>> LearningRate("gen", group=1).name
    'LearningRate.gen.1'
    """

    optimizer: str = ""
    group: int | None = None

    key: ClassVar[str] = ""
    minimum: ClassVar[float | None] = 0.0

    def __post_init__(self) -> None:
        what = type(self).__name__
        if not is_a(self.optimizer, str) or "." in self.optimizer:
            raise UsageError(f"{what}({self.optimizer!r}) takes the name of an optimizer, as {what}('gen').")
        if self.group is not None:
            group = whole_number(f"{what}(): group, the position of a parameter group,", self.group, least=0)
            object.__setattr__(self, "group", group)

    @property
    def name(self) -> str:
        """The type's name; then the optimizer's and the group's, each after a dot, where they are given."""
        parts = [type(self).__name__, self.optimizer, "" if self.group is None else str(self.group)]
        return ".".join(part for part in parts if part)

    def overlaps(self, other: Setting) -> bool:
        """Tell whether the two are the same entry of a parameter group that they share."""
        if not isinstance(other, HyperParameter) or (self.key, self.optimizer) != (other.key, other.optimizer):
            return False
        return self.group is None or other.group is None or self.group == other.group

    def access(self) -> Access:
        """Return ``optimizer.hyperparams``, or that of the optimizer's name."""
        return {f"optimizer.{self.optimizer}.hyperparams" if self.optimizer else "optimizer.hyperparams": Write()}

    def read(self, group: Mapping[str, Any]) -> float:
        """Return the value in one parameter group."""
        return float(group[self.key])

    def write(self, group: MutableMapping[str, Any], value: float) -> None:
        """Set the value in one parameter group. A tensor, as compiled optimizers keep, is filled."""
        old = group[self.key]
        if isinstance(old, torch.Tensor):
            old.fill_(value)
        else:
            group[self.key] = value

    def set(self, learner: LearnerView, value: float) -> None:
        """Set the value in the parameter groups."""
        for group in self._groups(learner):
            self.write(group, value)

    def prepare(self, learner: LearnerView, value: float) -> None:
        """Check that the parameter groups have this hyperparameter, and that those that will share a value agree.

        Raises:
            UsageError: They do not.
        """
        found: list[float] = []
        for group in self._groups(learner):
            try:
                found.append(self.read(group))
            except KeyError as error:
                raise UsageError(
                    f"{self!r}: the parameter groups of the optimizer have no {error}.{nearest(self.key, group)} "
                    f"They have: {', '.join(group)}."
                ) from None
        if any(other != found[0] for other in found):
            raise UsageError(
                f"{self!r} would give all parameter groups one value, and now they have {', '.join(map(str, found))}. "
                f"Name the group: {{{type(self).__name__}(group=0): ..., {type(self).__name__}(group=1): ...}}."
            )

    def _groups(self, learner: LearnerView) -> Iterator[MutableMapping[str, Any]]:
        optimizer = learner.optimizer
        groups = (getattr(optimizer, self.optimizer) if self.optimizer else optimizer).hyperparams
        if self.group is None:
            yield from groups
        elif self.group < len(groups):
            yield groups[self.group]
        else:
            raise UsageError(f"{self!r}: the optimizer has {len(groups)} parameter groups, counted from 0.")

    def __repr__(self) -> str:
        given = [repr(self.optimizer)] if self.optimizer else []
        given += [f"group={self.group}"] if self.group is not None else []
        return f"{type(self).__name__}({', '.join(given)})"


class LearningRate(HyperParameter):
    """The learning rate."""

    key = "lr"


class Momentum(HyperParameter):
    """The momentum; of an optimizer with ``betas``, such as Adam, the first of them."""

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
