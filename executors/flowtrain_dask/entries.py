"""A batch of events as one blob of bytes, and back: dask sees neither the events nor the user's types in them."""

from __future__ import annotations

from collections.abc import Sequence

from flowtrain_dask.codec import decode, encode
from flowtrain_dask.work import Entry, opened

__all__ = ["dump_entries", "load_entries"]


def dump_entries(entries: Sequence[Entry]) -> bytes:
    """Return events as bytes."""
    return encode([(one.sequence, one.duty, one.event, one.phase, opened(one.payload), one.nbytes) for one in entries])


def load_entries(blob: bytes) -> list[Entry]:
    """Return the events of `dump_entries`."""
    return [Entry(*each) for each in decode(blob)]
