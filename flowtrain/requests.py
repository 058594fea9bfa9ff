"""What a handler asks of the loop beyond firing an event: to take a checkpoint.

A request travels in the same queue as the events that handlers fire, so it costs nothing where there is none. It is no
event: no handler ever sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flowtrain.events import Event

__all__ = ["CheckpointRequest"]


@dataclass(frozen=True)
class CheckpointRequest(Event):
    """Take a checkpoint when the current event has ended.

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
