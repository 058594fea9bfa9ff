"""Streams and events, as `torch.Stream` and `torch.Event` for the machine.

Those of torch do nothing for a device that is written in Python (https://github.com/pytorch/pytorch/issues/195458), so
`backend.install` puts these in their place. The objects are still torch's: operators take them.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from tests.accelerator.simulated.machine import Machine, Work
from tests.accelerator.simulated.tensors import DEVICE, KIND

__all__ = ["Event", "Stream", "current_stream", "set_stream"]

_ids = itertools.count(1)


class Stream(torch.Stream):
    """A stream of the machine. Each one that is made with a device, or without anything, is a new one."""

    machine: Machine

    def __new__(cls, device: Any = None, priority: int = 0, **known: int) -> Stream:
        """Make a stream; `known` are the three numbers by which torch names one that exists."""
        if not known:
            if device is not None and torch.device(device).type != DEVICE:
                raise RuntimeError(f"There are no streams of {device} here; the accelerator is {DEVICE}.")
            known = {"stream_id": next(_ids), "device_index": 0, "device_type": KIND}
        return super().__new__(cls, **known)

    def query(self) -> bool:
        """Tell whether all work of the stream is done."""
        return self.machine.is_idle(self.stream_id)

    def synchronize(self) -> None:
        """Let the host wait for all work of the stream."""
        self.machine.wait(self.machine.submit("mark", stream=self.stream_id), "stream")

    def wait_event(self, event: torch.Event) -> None:
        """Let what the stream gets from now on wait for an event."""
        assert isinstance(event, Event)
        if event.work is not None:
            self.machine.submit("wait", stream=self.stream_id, after=event.work)

    def wait_stream(self, other: torch.Stream) -> None:
        """Let what the stream gets from now on wait for what another one has got."""
        self.wait_event(other.record_event())

    def record_event(self, event: torch.Event | None = None) -> torch.Event:
        """Note where the stream is; return the event."""
        event = Event() if event is None else event
        event.record(self)
        return event


class Event(torch.Event):
    """A place in a stream."""

    work: Work | None

    def __new__(cls, device: Any = None, **options: Any) -> Event:
        """Make an event that nobody has recorded, and nobody waits for."""
        made = super().__new__(cls, DEVICE)
        made.work = None
        return made

    def record(self, stream: torch.Stream | None = None) -> None:
        """Note where a stream is; the current one, if not given."""
        self.work = Stream.machine.submit("mark", stream=None if stream is None else stream.stream_id)

    def wait(self, stream: torch.Stream | None = None) -> None:
        """Let a stream wait for the event; the current one, if not given."""
        (current_stream() if stream is None else stream).wait_event(self)

    def query(self) -> bool:
        """Tell whether all work before the event is done."""
        return self.work is None or self.work.done

    def synchronize(self) -> None:
        """Let the host wait for all work before the event."""
        if self.work is not None:
            Stream.machine.wait(self.work, "event")


def current_stream(index: int | None = None) -> Stream:
    """Return the current stream of this thread."""
    return Stream(stream_id=Stream.machine.current_stream, device_index=0, device_type=KIND)


def set_stream(stream: torch.Stream) -> None:
    """Make a stream the current one of this thread."""
    Stream.machine.current_stream = stream.stream_id
