"""The view: what a handler gets as ``learner``, and what it may ask of the loop.

This is the class that handlers are typed with. `flowtrain.state.views` compiles a subclass for each declaration, which
gives what is declared and refuses everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from flowtrain.callback.events import Event
from flowtrain.errors import UsageError, is_a

__all__ = ["CheckpointRequest", "LearnerView"]


class LearnerView:
    """What a handler gets as `learner`: the state that it declares, and `fire`.

    The attributes are ``model``, ``lossfn``, ``optimizer``, ``data``, ``params``, ``batch``, ``cbstate`` and
    ``callbacks``. One that is not declared raises `ProtectedException`.
    """

    __slots__ = ("_owner", "_state")

    _owner: Any  # the callback that it belongs to, for messages

    _state: Any  # what the declared attributes are read from

    if TYPE_CHECKING:
        model: Any
        lossfn: Any
        optimizer: Any
        data: Any
        params: Any
        batch: Any
        cbstate: Any
        callbacks: Any

    updates = property(
        attrgetter("_state.updates"),
        doc="How many updates of optimizers the learner has made. A deferred handler has none: training has gone on.",
    )

    @property
    def lag(self) -> int:
        """After how many batches values of the device are to be read; 0 where reading does not wait for anything."""
        return getattr(self._state, "lag", 0)  # a frozen copy of a state holds values that were read

    def fire(self, event: Event) -> None:
        """Fire an event, in the current phase, when the current event has ended.

        The events that several handlers ask for are fired in serial order of who asked, first in, first out. They
        are dropped if the current event raises.
        """
        if not is_a(event, Event):
            raise UsageError(f"fire() takes an event, got {event!r}. Write learner.fire(MyEvent()).")
        self._state.fired.append((self._owner.callback, event))

    def request_checkpoint(
        self,
        path: str | PathLike[str],
        *,
        best: bool = False,
        remove: Iterable[str] = (),
        weights: bool = False,
        on_interrupt: bool = False,
        judged: bool = False,
        decide: Callable[[bool], tuple[bool, Iterable[str]]] | None = None,
    ) -> None:
        """Ask the loop for a checkpoint; it takes one when the current event has ended and no batch is open.

        The request is dropped if the event raises an error. `flowtrain.callbacks.Checkpointer` keeps a folder of them.

        Args:
            path: The file to write; ``latest`` beside it will name it, if the parameters that are trained and the last
                loss are finite.
            best: Let ``best``, beside it, name it too.
            remove: Names of files beside it to remove once it is there; what ``latest`` or ``best`` names stays. If it
                is not finite, nothing is removed.
            weights: Write the weights of the model also as safetensors, beside it.
            on_interrupt: Not now, but when an interrupt ends this fit.
            judged: Hold as the model the weights that evaluation uses (those of `flowtrain.callbacks.EMA`, say), and
                those that are trained beside it.
            decide: Called when it is taken, with whether it is finite; returns ``(best, remove)``, in place of both.
        """
        if not is_a(path, (str, PathLike)):
            raise UsageError(f"request_checkpoint() takes the path of a file, got {path!r}.")
        request = CheckpointRequest(fspath(path), best, tuple(remove), weights, on_interrupt, judged, decide)
        self._state.requests.append((self._owner.callback, request))

    def __repr__(self) -> str:
        return f"LearnerView of {self._owner.callback}"


@dataclass(frozen=True)
class CheckpointRequest:
    """What a handler asks for: a checkpoint, when the current event has ended.

    Attributes:
        path: The file to write.
        best: Let ``best``, beside the file, name it.
        remove: Files in the same folder that are not wanted any more, by name; what ``latest`` and ``best`` name stays.
        weights: Write the model's weights also as safetensors, beside the file.
        on_interrupt: Not now, but when an interrupt ends the fit.
        judged: Hold as the model what epochs of evaluation are judged by, where a callback has changed that for them.
        decide: Called when the checkpoint is taken, before the state of callbacks is, with whether the parameters that
            are trained and the last loss are finite; returns what counts in place of `best` and `remove`.
    """

    path: str
    best: bool = False
    remove: tuple[str, ...] = ()
    weights: bool = False
    on_interrupt: bool = False
    judged: bool = False
    decide: Callable[[bool], tuple[bool, Iterable[str]]] | None = None
