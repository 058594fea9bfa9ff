"""How the events of a batch get to a worker: they are sent, or left in memory for a worker on the same machine.

Large snapshots lie in parcels from the beginning and stay there. What else is large in a batch is put into a parcel of
the lane's own. A worker that says that it cannot find them, since it is on another machine, gets everything sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from flowtrain_dask.cluster.codec import Encoded
from flowtrain_dask.cluster.entries import dump_entries
from flowtrain_dask.lanes.work import Entry
from flowtrain_dask.snapshots.parcels import Parcel, Ticket, possible

__all__ = ["LEFT", "SENT", "Shipment", "Shipping"]

SENT, LEFT = 8 << 20, 128 << 20
"""Bytes of a batch that is sent, which is in memory several times on its way, and of one that is left there."""

_WORTH = 256 << 10
"""Bytes of a batch, without what is in parcels, from which on they are put into one and not sent."""

_SPARE = 72 << 20
"""Bytes of memory that are kept between two batches, at most."""

_AGAIN = 100
"""After so many batches that were sent, it is tried again whether a worker finds memory."""


class Shipment(NamedTuple):
    """A batch on its way.

    Attributes:
        events: The events, see `flowtrain_dask.cluster.entries.dump_entries`: all of them, or their head.
        buffers: Where the rest is; ``None``: it is in `events`.
        parcels: Where the snapshots are that were in parcels before.
    """

    events: bytes
    buffers: Ticket | None
    parcels: tuple[Ticket, ...]


class Shipping:
    """Packs the batches of one lane, one after the other.

    Attributes:
        near: Whether workers are taken to be on this machine.
        largest: How many bytes of events should be in a batch.
    """

    def __init__(self) -> None:
        self.near = possible()
        self.largest = LEFT if self.near else SENT
        self._sent = 0  # batches since a worker was far
        self._packed: dict[tuple[int, int], Shipment] = {}  # until it has arrived: by its first event, and how many
        self._filled: list[Parcel] = []
        self._lent: list[Parcel] = []  # of snapshots: kept open until a worker has read them
        self._spare: Parcel | None = None

    def pack(self, entries: Sequence[Entry]) -> Shipment:
        """Return events as a worker gets them; they must not change until `arrived`. Another attempt gets the same."""
        key = (entries[0].sequence if entries else -1, len(entries))
        found = self._packed.get(key)
        if found is None:
            events = dump_entries(entries, share=self.near)
            buffers = self._fill(events)
            self._lent += events.parcels
            tickets = tuple(parcel.ticket for parcel in events.parcels)
            found = Shipment(bytes(events) if buffers is None else events.head, buffers, tickets)
            self._packed[key] = found
        return found

    def arrived(self) -> None:
        """Say that nobody needs what was packed any more."""
        for parcel in self._filled:
            if self._spare is None and parcel.size <= _SPARE:  # to fill one again takes half the time
                self._spare = parcel
            else:
                parcel.close()
        self._filled, self._lent = [], []
        self._packed.clear()
        if not self.near:
            self._sent += 1
            if self._sent >= _AGAIN and possible():
                self.near, self.largest = True, LEFT

    def take_for_far(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Send everything for a while, since a worker does not find it; return what of the entries is sent at once."""
        self.near = False
        self.largest = SENT
        self._sent = 0
        self._drop_spare()
        sizes = accumulate(entry.nbytes for entry in entries)
        return entries[: max(1, sum(size <= SENT for size in sizes))]

    def close(self) -> None:
        """Give back all memory."""
        self.arrived()
        self._drop_spare()

    def _fill(self, events: Encoded) -> Ticket | None:
        """Put events where a worker on this machine finds them; ``None`` where that cannot be, or is not worth it."""
        if not self.near or events.nbytes < _WORTH:
            return None
        try:
            parcel = self._spare or Parcel()
            self._spare = None
            self._filled.append(parcel)
            try:
                ticket = parcel.fill(events.buffers)
            except BlockingIOError:  # a worker that was taken for lost is still at it
                self._filled[-1] = parcel = Parcel()
                ticket = parcel.fill(events.buffers)
            self.largest = LEFT
            return ticket
        except OSError:  # no memory, or too many open files: then they are sent
            self.largest = SENT
            return None

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._spare.close()
            self._spare = None
