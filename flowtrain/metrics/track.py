"""Tracked values: entries of the batch state, or values computed from them, recorded as metrics are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Literal

from flowtrain.callback.access import Access, Read, declare
from flowtrain.callback.phases import AbstractTrainingPhase, Phase
from flowtrain.errors import MissingStateError, UsageError
from flowtrain.errors.arguments import is_a
from flowtrain.metrics.metric import Metric

__all__ = ["Track"]


class Track(Metric):
    """A value of the batch state: ``Metrics(accuracy, Track("batch.kl"))``, or short ``Metrics(accuracy, "batch.kl")``.

    It is a number or a mapping from names to numbers, read when the batch ends, and recorded as a metric is: a value
    for each batch, and the mean of the epoch, weighted by the size of the batch. A batch without the value is left out.

    Args:
        what: The path of an entry, as ``"batch.kl"``; or a function of the batch state, which is called without
            gradients and returns the value, or ``None`` for no value. An entry that the batch lacks is ``None``.
        name: The name in ``cbstate`` and in logs; by default that of the entry or the function, in the form ``Kl``.
        phase: The phases in which the value is recorded, subclasses included.
        access: The access of a function, as ``{"batch.real": Read()}``; the whole batch by default, for which the norm
            of the gradients is computed too.
        mode: ``"min"`` or ``"max"``, as for `Metric`.
        weight: The weight of a batch in the mean of an epoch, as for `Metric`.
        labels: The names of the numbers in the value, as for `Metric`.

    Raises:
        UsageError: `what` is neither such a path nor a function, or an argument does not fit.
        MissingStateError: At the end of the first training epoch, or epoch of `phase`: no batch had the value.

    >>> Track("batch.grad_norm"), Track(lambda batch: batch.real - batch.fake, name="Gap")
    (Track(GradNorm), Track(Gap))
    """

    of_batch = True

    def __init__(
        self,
        what: str | Callable[[Any], Any],
        name: str | None = None,
        phase: type[Phase] = Phase,
        *,
        access: Access | None = None,
        mode: Literal["min", "max"] | None = None,
        weight: Callable[[Any, Any], Any] | None = None,
        labels: Sequence[str] | None = None,
    ) -> None:
        self.path = what if isinstance(what, str) else ""
        root, _, entry = self.path.partition(".")
        if self.path and not (root == "batch" and entry.isidentifier() and entry[0] != "_"):
            raise UsageError(
                f"Track({what!r}): a path is that of an entry of the batch, such as 'batch.kl'. For a part of an entry "
                f"or a value computed from it write Track(lambda batch: batch.outputs['kl'], name='KL')."
            )
        if not self.path and (not callable(what) or is_a(what, type) or hasattr(what, "compute")):
            raise UsageError(
                f"Track({what!r}) takes the path of an entry, such as 'batch.kl', or a function of the batch. A metric "
                f"of (outputs, targets) or of torchmetrics goes into Metrics directly."
            )
        if self.path and access is not None:
            raise UsageError(f"Track({what!r}, access=...): the path says what is read. Leave access out.")
        self.access: Access = {self.path or "batch": Read(optional=True)}
        if access is not None:
            declared = declare(access, "Track(access=...)")
            if not is_a(access, Mapping) or any(path[0] != "batch" or not is_a(kind, Read) for path, kind in declared):
                raise UsageError(
                    f"Track(access={access!r}): the function gets the batch, and reads it. Write access="
                    f"{{'batch.real': Read()}}, or leave it out to read the whole batch."
                )
            self.access = access
        read: Any = attrgetter(entry) if self.path else what
        if self.path and name is None:
            name = "".join(part[:1].upper() + part[1:] for part in entry.split("_"))
        super().__init__(read, name, phase, mode=mode, weight=weight, labels=labels)

    def check_recorded(self, phase: Phase, recorded: Iterable[Iterable[str]]) -> None:
        """Check, after an epoch with complete batches, that the value is there in some phase.

        Args:
            phase: The phase of the epoch.
            recorded: The names of the series that each phase has recorded.

        Raises:
            MissingStateError: No phase has recorded it, and this one should have: it trains, or the user has named it.
        """
        if not isinstance(phase, AbstractTrainingPhase if self.phase is Phase else self.phase):
            return
        if self.path and self.path.partition(".")[2] in (phase.provides or ()):
            return  # a group of gradients that is longer than the epoch leaves its batches without ``grad_norm``
        if any(name.partition(".")[0] == self.name for names in recorded for name in names):
            return
        raise MissingStateError(
            self.path or "batch",
            f"Metrics tracks {self.path or self.name}, and no batch of this epoch of {phase!r} had it when it ended. "
            f"The step of a phase or a callback puts it there, as batch.kl = ...; if another phase has it, write "
            f"Track({repr(self.path) if self.path else 'f'}, phase=OtherPhase).",
        )
