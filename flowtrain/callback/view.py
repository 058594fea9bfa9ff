"""The view: the object that a handler gets as ``learner``.

`LearnerView` is the class that handlers are annotated with, and it has the requests that a handler may make to the
loop. `flowtrain.state.views` compiles a subclass for each declaration; the subclass shows the declared paths and
refuses all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowtrain.callback.access import granted
from flowtrain.callback.events import Event
from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_a

__all__ = ["NO_REQUEST", "POINTERS", "Arrived", "CheckpointRequest", "LearnerView"]

POINTERS = ("latest", "best")
"""The names of the files that name a checkpoint of their folder."""


class Arrived(NamedTuple):
    """The event that a value belongs to which was written with ``Write(lag=...)`` and has arrived.

    Attributes:
        number: The number of the event, among those of its type and phase, from 1.
        updates: How many updates the learner had made at the event.
    """

    number: int
    updates: int


class LearnerView:
    """The object that a handler gets as ``learner``: it shows the state that the handler declares.

    The attributes are ``model``, ``lossfn``, ``optimizer``, ``data``, ``params``, ``batch``, ``cbstate`` and
    ``callbacks``. An attribute that is not declared raises `ProtectedException`.
    """

    __slots__ = ("_owner", "_state")

    _owner: Any  # the `Owner`: the callback and its declaration, for messages

    _state: Any  # the `LearnerState`, or a frozen copy of it, from which the declared attributes are read

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
        doc="The number of updates that the learner has made. A deferred handler cannot read it: training is ahead.",
    )

    @property
    def lag(self) -> int:
        """The number of batches after which to read values of the device; 0 where reading waits for nothing."""
        return getattr(self._state, "lag", 0)  # a snapshot has no lag: its values are on the host already

    @property
    def rank(self) -> int:
        """The number of this process among those that train together, from 0; 0 in a training of one process."""
        return getattr(self._state, "rank", 0)  # deferred handlers run for the main rank

    @property
    def world_size(self) -> int:
        """The number of processes that train together; 1 in a training of one process."""
        return getattr(self._state, "world_size", 1)

    def arrival(self, path: str) -> Arrived | None:
        """Return the event that the value at a path belongs to, which a callback has written with a lag.

        Args:
            path: The path as the writer declares it, such as ``"cbstate.scores"``.

        Returns:
            The event; ``None`` if nothing has arrived there yet.

        Raises:
            ProtectedException: The handler does not declare the path.
            UsageError: The callback is deferrable. Its handlers may run when another value has arrived: the writer can
                put the number into the value.
        """
        owner = self._owner
        if owner.consumes:
            raise UsageError(
                f"{owner.callback} calls learner.arrival({path!r}), but it is deferrable: when its handler runs, "
                f"another value may have arrived. Let the callback that writes {path} put the number of its event into "
                f"the value."
            )
        keys = tuple(path.split("."))
        if granted(owner.declaration, keys) is None:
            owner.refuse("Read", keys)
        found: Arrived | None = self._state.arrivals.arrived.get(path)
        return found

    def fire(self, event: Event) -> None:
        """Fire an event in the current phase, as soon as the current event has ended.

        Events that several handlers fire run in the serial order of these handlers, first in, first out. They are
        dropped if the current event raises.

        Raises:
            UsageError: `event` is no event, or the callback is deferrable.
        """
        if not is_a(event, Event):
            raise UsageError(f"fire() takes an event, got {event!r}. Write learner.fire(MyEvent()).")
        self._ask("fire", self._state.fired, event)

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
        """Ask the loop for a checkpoint, which it takes when the current event has ended and no batch is open.

        The request is dropped if the event raises an error. Several processes refuse it unless the class says
        `Callback.may_checkpoint`, and all of them must request the same checkpoint. `flowtrain.callbacks.Checkpointer`
        keeps a folder of checkpoints. A checkpoint counts as *finite* if the parameters that are trained and the last
        loss are finite.

        Args:
            path: The file to write. If the checkpoint is finite, the file ``latest`` in its folder names it.
            best: Whether the file ``best`` in the folder names the checkpoint too.
            remove: The names of files in the folder to remove once the checkpoint is written. A file that ``latest`` or
                ``best`` names stays, and nothing is removed if the checkpoint is not finite.
            weights: Whether to write the weights of the model as safetensors too, beside the checkpoint.
            on_interrupt: Whether to take the checkpoint when an interrupt ends this fit, and not now.
            judged: Whether the checkpoint holds as the model the weights that evaluation uses (those of
                `flowtrain.callbacks.EMA`, for example), and the trained weights beside them.
            decide: A function that is called when the checkpoint is taken, with whether it is finite. It returns
                ``(best, remove)``, which replace the two arguments.

        Raises:
            UsageError: `path` is no path, or names a file that is written beside the checkpoint, or the callback is
                deferrable.
        """
        if not is_a(path, (str, PathLike)):
            raise UsageError(
                f"request_checkpoint() takes the path of a file, got {path!r}. "
                f'Write learner.request_checkpoint("checkpoints/mine.pt").'
            )
        file = Path(path)
        if file.name.lower() in POINTERS or (weights and file.suffix == ".safetensors"):
            what = "its weights" if file.suffix else "the name of a checkpoint"
            raise UsageError(
                f"request_checkpoint({str(path)!r}): flowtrain writes the file {file.name} itself, with {what}, and "
                f"would overwrite the checkpoint. Choose another name, such as {str(file.with_name('mine.ckpt'))!r}."
            )
        request = CheckpointRequest(fspath(path), best, tuple(remove), weights, on_interrupt, judged, decide)
        self._ask("request_checkpoint", self._state.requests, request)

    def request_weights(self, path: str | PathLike[str]) -> None:
        """Ask the loop to load the weights of a checkpoint into the model when this fit has ended.

        They are loaded after `FitEnd`, when the files of all checkpoints are complete; nothing is loaded if an error or
        an interrupt ended the fit. The optimizer, the metrics and the counters stay as they are. If evaluations use
        other weights than the trained ones (`flowtrain.callbacks.EMA`), the model has these until training continues.

        Args:
            path: As for `Learner.load`: a checkpoint, a folder, or the file ``best`` of a folder.

        Raises:
            UsageError: `path` is no path, or the callback is deferrable.
        """
        if not is_a(path, (str, PathLike)):
            raise UsageError(
                f"request_weights() takes the path of a checkpoint, got {path!r}. "
                f'Write learner.request_weights("checkpoints/best").'
            )
        self._ask("request_weights", self._state.requests, CheckpointRequest(fspath(path), loads=True))

    def _ask(self, method: str, queue: list[tuple[str, Any]], item: object) -> None:
        """Put an event or a request into a queue of the loop, unless the callback is deferrable."""
        owner = self._owner
        # Refused in place too, so that a program does not depend on where the callback runs.
        if owner.consumes:
            raise UsageError(
                f"{owner.callback} calls learner.{method}({item!r}), but it is deferrable: it may run after the event, "
                f"perhaps in another process, when training has gone on. Set deferrable = False on the callback."
            )
        queue.append((owner.callback, item))

    def __repr__(self) -> str:
        return f"LearnerView of {self._owner.callback}"


@dataclass(frozen=True)
class CheckpointRequest:
    """The arguments of a request for a checkpoint or for weights, until the loop has carried it out.

    Attributes:
        path: The file to write or to load from.
        best: Whether ``best`` in the folder of the file names the checkpoint.
        remove: The names of files in the folder to remove.
        weights: Whether to write the weights of the model as safetensors too.
        on_interrupt: Whether to take the checkpoint when an interrupt ends the fit, and not now.
        judged: Whether the checkpoint holds the weights that evaluation uses as the model.
        decide: Returns ``(best, remove)``. It is called before the state of the callbacks is taken, so that a callback
            can note in its state what it has decided.
        loads: Whether the weights of the checkpoint are to be loaded when the fit has ended; nothing is written then.
    """

    path: str
    best: bool = False
    remove: tuple[str, ...] = ()
    weights: bool = False
    on_interrupt: bool = False
    judged: bool = False
    decide: Callable[[bool], tuple[bool, Iterable[str]]] | None = None
    loads: bool = False

    def decided(self, finite: bool) -> CheckpointRequest:
        """Return the request with its callback's decision which files to remove, and whether this is the best.

        A checkpoint with values that are not finite is never the best, and replaces no other.
        """
        best, remove = self.best and finite, self.remove if finite else ()
        if self.decide is not None:
            best, unwanted = self.decide(finite)
            remove = tuple(unwanted)
        return replace(self, best=best, remove=remove)


NO_REQUEST = CheckpointRequest("")
"""Stands among the requests for a handler that may request a checkpoint and has run: there ranks compare requests."""
