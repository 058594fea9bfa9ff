"""Events that wait in lanes when a checkpoint is taken: they are in the checkpoint, and a fit that resumes has them.

After an interrupt there may be no time to process them all. Each lane then stands still, and `saved` returns its events
as plain values, with the state that its callbacks have before them. `finish` has the events processed in the fit that
resumes, in their order and before any other: in the lanes of the callbacks, wherever these run now, and in place where
a callback is not deferred any more, as under the serial executor.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from flowtrain.callback.events import Event
from flowtrain.callback.handler import Handler
from flowtrain.callback.phases import Phase
from flowtrain.data.tensor_bytes import tensor_bytes
from flowtrain.errors import CheckpointError
from flowtrain.graph.executor import Site
from flowtrain.graph.nodes import Node
from flowtrain.logging.records import deliver
from flowtrain.state.arrivals import Arrivals
from flowtrain_dask.deferred.policy import Deferral
from flowtrain_dask.deferred.preparing import job_of
from flowtrain_dask.lanes.lane import Lane
from flowtrain_dask.lanes.work import Entry, Job, run_entries

__all__ = ["finish", "saved"]

_logger = logging.getLogger("flowtrain")

_PutBack = Callable[[Node, Handler, Entry, bool], bool]
"""Puts an event into a lane, with whether its records are written; ``False`` if the callback runs in place."""


def saved(lanes: Iterable[Lane], limit: float) -> dict[str, dict[str, Any]]:
    """Return the events of the lanes that were flushed in vain, by the names of the lanes, which stand still then.

    Events that cannot be in a checkpoint get the time that they would have had without it; then a line in the log
    tells how many are left.

    Args:
        lanes: The lanes.
        limit: The most seconds to wait for the event that is at work in a lane.
    """
    found: dict[str, dict[str, Any]] = {}
    for lane in lanes:
        why, own = f"a handler has not returned for {limit:g} s", None
        if lane.given_up and lane.pause(limit):
            own, why = _saved(lane)
            if own is None:
                lane.flush(limit)
        if own is None and lane.given_up and not lane.over and (left := lane.report().pending):
            text = "flowtrain: %d events of lane %s are not in the checkpoint, and a fit that resumes lacks them: %s"
            _logger.warning(text, left, lane.name, why)
        if own is not None and own["count"]:
            found[lane.name] = own
        lane.note_saved(*(0, 0) if own is None else (own["count"], own["events"].nbytes))
    return found


def _saved(lane: Lane) -> tuple[dict[str, Any] | None, str]:
    """Return the events that wait in a lane, which stands still, as plain values; or else why that is not possible."""
    try:
        from flowtrain_dask.cluster.codec import dump_entries
        from flowtrain_dask.cluster.plain_pickling import PlainPickler
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed: pip install 'flowtrain[dask]'"
    entries, recorded = lane.unprocessed()
    try:
        # The process that resumes has a torch state of its own, under which it processes the events.
        blob = bytes(dump_entries([entry._replace(torch=None) for entry in entries], PlainPickler))
    except Exception as error:  # objects of the user define how they pickle, so anything may be raised
        return None, f"{type(error).__name__}: {error}"
    found = {
        "handlers": [_name(each.name, each.handler) for each in lane.job.handlers],
        "count": len(entries),
        "recorded": recorded,
        "events": torch.frombuffer(bytearray(blob), dtype=torch.uint8),
    }
    return found, ""


def finish(waiting: Mapping[str, Mapping[str, Any]], site: Site, first: Mapping[str, int], put_back: _PutBack) -> None:
    """Process the events that waited when a checkpoint was taken, or put them back into their lanes.

    Args:
        waiting: The result of `saved`.
        site: The loop of the learner, whose callbacks have the state of the checkpoint.
        first: For each lane the number of events before these, for `flowtrain.logging.identity`.
        put_back: Puts an event into a lane.

    Raises:
        CheckpointError: The events cannot be read, because a type is not defined. Nothing has been processed.
        Exception: A handler failed.
    """
    handlers = {_name(node.name, each): (node, each) for node in site.nodes for _, each in node.handlers}
    loaded = {lane: _load(lane, each) for lane, each in waiting.items()}
    _warn_of_missing(waiting, loaded, handlers)
    for lane, entries in loaded.items():
        jobs: dict[Node, Job] = {}
        for number, entry in enumerate(entries):
            if (found := handlers.get(waiting[lane]["handlers"][entry.handler])) is None:
                continue
            node, handler = found
            recorded = number < waiting[lane]["recorded"]
            if put_back(node, handler, entry, recorded):
                continue
            if node not in jobs:
                jobs[node] = job_of([node], Deferral(), site.run.id)
            job, position = jobs[node], [each for _, each in node.handlers].index(handler)
            here = entry._replace(handler=position, sequence=first.get(lane, 0) + number)
            _run(node, job, here, lane, recorded, site.state.arrivals)


def _run(node: Node, job: Job, entry: Entry, lane: str, recorded: bool, arrivals: Arrivals) -> None:
    """Run a handler in place; write its records unless they are written already, and keep its late writes."""
    result = run_entries([node.callback], job, [entry], job.run, lane, seeded=True)
    if not recorded:
        deliver(node.backends, ((position, data) for _, _, position, data in result.records))
    if result.failure is not None:
        raise result.failure[1]
    if entry.number is not None:
        arrivals.fill(entry.number, result.changes[entry.sequence])


def _load(lane: str, waiting: Mapping[str, Any]) -> Sequence[Entry]:
    from flowtrain_dask.cluster.codec import decode
    from flowtrain_dask.cluster.plain_pickling import loads

    try:
        return _entries(decode(tensor_bytes(waiting["events"]), loads), len(waiting["handlers"]))
    except Exception as error:  # a file of others may have any instructions in any order
        raise CheckpointError(
            f"The checkpoint has {waiting['count']:,} events that waited in lane {lane}, and they cannot be read: "
            f"{error}. Import the modules of your events, phases and data types before fit(resume=...). A file of "
            f"others that names something else may want to run code."
        ) from error


def _entries(rows: Any, handlers: int) -> Sequence[Entry]:
    """Return events from the rows of a file of others, in which only the types are checked that no handler gets.

    Raises:
        ValueError: They are no events.
    """
    saved = Entry._fields.index("torch")  # the fields before this one are in the file
    if type(rows) is not list or any(type(row) is not tuple or len(row) < saved for row in rows):
        raise ValueError("they are no events")
    entries = [Entry(*row[:saved]) for row in rows]
    for each in entries:
        numbers = each.sequence, each.handler, each.nbytes, each.total, each.seed or 0, each.number or 0
        if any(type(number) is not int for number in numbers) or not 0 <= each.handler < handlers:
            raise ValueError("they are no events")
        event, phase = cast("tuple[type, type]", (type(each.event), type(each.phase)))
        if not issubclass(event, Event) or not issubclass(phase, Phase):
            raise ValueError("they are no events")
    return entries


def _warn_of_missing(
    waiting: Mapping[str, Mapping[str, Any]], loaded: Mapping[str, Sequence[Entry]], handlers: Mapping[str, Any]
) -> None:
    """Warn of events whose handler the learner does not have."""

    def missing() -> Iterator[str]:
        """Yield the name of the handler of each such event."""
        for lane, entries in loaded.items():
            for entry in entries:
                if (name := waiting[lane]["handlers"][entry.handler]) not in handlers:
                    yield name

    if names := list(missing()):
        wanted = ", ".join(sorted({name.partition(" ")[0] for name in names}))
        warnings.warn(
            f"The checkpoint has {len(names):,} events that waited for {wanted}, which the learner does not have: they "
            f"are not processed.",
            UserWarning,
            stacklevel=2,
        )


def _name(callback: str, handler: Handler) -> str:
    """Return the name of a handler, which is the same in a learner that is built again."""
    return f"{callback}.{handler.attribute} ({handler.event_type.__name__}, {handler.phase_type.__name__})"
