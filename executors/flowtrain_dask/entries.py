"""A batch of events as one blob of bytes, and back: dask sees neither the events nor the user's types in them."""

from __future__ import annotations

from collections.abc import Sequence

from flowtrain_dask.pickling import dumps, loads
from flowtrain_dask.work import Entry

__all__ = ["dump_entries", "load_entries"]


def dump_entries(entries: Sequence[Entry]) -> bytes:
    """Return events as bytes."""
    return dumps([tuple(entry) for entry in entries])


def load_entries(blob: bytes) -> list[Entry]:
    """Return the events of `dump_entries`."""
    return [Entry(*each) for each in loads(blob)]
