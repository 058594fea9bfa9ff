"""A batch of events as one blob of bytes, and back: dask sees neither the events nor the user's types in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from flowtrain.callback.access import Path
from flowtrain_dask.cluster.codec import Encoded, decode
from flowtrain_dask.lanes.work import Entry, opened
from flowtrain_dask.snapshots.marks import Lengths, Marked, Packing, unpacked

__all__ = ["dump_entries", "load_entries"]


_Marks: TypeAlias = "list[tuple[Path, tuple[int, Lengths, Lengths]]]"


def dump_entries(entries: Sequence[Entry]) -> Encoded:
    """Return events as bytes; the series that they show are in it once for all of them."""
    packing = Packing()
    rows = []
    for sequence, duty, event, phase, payload, nbytes, seed in entries:
        copies, marks = _split(opened(payload), packing)
        rows.append((sequence, duty, event, phase, copies, nbytes, seed, marks))
    return Encoded((rows, packing.packed()))


def load_entries(blob: bytes | memoryview) -> list[Entry]:
    """Return the events of `dump_entries`; see `flowtrain_dask.cluster.codec.decode`."""
    rows, packed = decode(blob)
    sources = unpacked(packed)
    entries = []
    for sequence, duty, event, phase, payload, nbytes, seed, marks in rows:
        for path, (place, before, lengths) in marks:
            payload[path] = Marked(sources[place], before, lengths)
        entries.append(Entry(sequence, duty, event, phase, payload, nbytes, seed))
    return entries


def _split(payload: Any, packing: Packing) -> tuple[Any, _Marks]:
    """Return what of a payload travels as it is, and what stands for its marked series."""
    marks: _Marks = []
    if isinstance(payload, dict):
        marks = [(path, packing.add(value)) for path, value in payload.items() if type(value) is Marked]
        if marks:
            payload = {path: value for path, value in payload.items() if type(value) is not Marked}
    return payload, marks
