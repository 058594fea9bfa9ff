"""Timeline: who runs when in a fit, and who waits for whom, as a file for Perfetto and Chrome."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

from flowtrain.callback.callback import Callback
from flowtrain.diagnostics.trace_file import TraceWriter, join
from flowtrain.errors import CallbackError, LoggingError, UsageError
from flowtrain.errors.arguments import is_a, whole_number
from flowtrain.graph.clock import Clock, Mark
from flowtrain.logging.records import identity
from flowtrain.state.device_values import watched_waits
from flowtrain.training.checkpoint.reading import own_version
from flowtrain.training.loop import Loop

__all__ = ["Timeline", "timing"]

_logger = logging.getLogger("flowtrain")

_WAIT = Mark("waits for the device", "device")


class Timeline(Callback):
    """Write a timeline of each fit: a file of trace events, for https://ui.perfetto.dev or ``chrome://tracing``.

    For each batch it shows the wait for its data and the forward pass, the loss, the backward pass and the update; each
    handler with its event; the handlers that an executor runs on other threads, in lanes and on the workers of a
    cluster, there on the clock of this process; snapshots for lanes; the waits of training for a lane, a flush or the
    device, each with its cause; and checkpoints, both the time for which training was held up and that of the writer.
    The reads of a device that handlers make themselves are not in it: `Learner.audit_syncs` finds these.

    A file is never overwritten: if it exists, the first of ``name-2.json``, ``name-3.json`` and so on is written, which
    the log says. So a fit that resumes has a file of its own too. Of several ranks each writes one, with
    ``-rank-1`` and so on in the name; with ``timeline.ranks = "main"`` the main rank alone does. A run that is killed
    leaves a whole file, without the last tenth of a second. A file that cannot be written is reported once in the log,
    and training continues.

    Reads and writes no state, and has no handler, so it runs after no other callback. Costs about 0.5 us for each
    handler and 1 us for each part of a batch where they run, and 0.3 us for each of them on a thread beside training; a
    process of its own formats them. Without a timeline nothing is timed. After the fit ``learner.callbacks.draw`` shows
    the times of handlers. ``learner.fit(..., timeline="timeline.json")`` is the same for one fit.

    Args:
        path: The file.
        limit: The most bytes of a file. Later times are left out, and the last event of the file tells how many.

    Raises:
        UsageError: `path` is no path, or `limit` is no positive whole number.

    Attributes:
        files: The files that this callback has written, in their order.

    >>> import tempfile
    >>> from flowtrain.testing import tiny_learner
    >>> timeline = Timeline(Path(tempfile.mkdtemp()) / "timeline.json")
    >>> history = tiny_learner(timeline).fit(1)
    >>> [path.name for path in timeline.files]
    ['timeline.json']
    """

    audited = False
    may_cancel = False
    ranks: Literal["every", "main"] | None = "every"

    def __init__(self, path: str | os.PathLike[str], *, limit: int = 256 << 20) -> None:
        if not is_a(path, (str, os.PathLike)) or not os.fspath(path):
            raise UsageError(f"Timeline(path={path!r}): path is a file to write, such as 'runs/timeline.json'.")
        self.path = Path(path)
        self.limit = whole_number("Timeline(): limit, in bytes,", limit)
        self.files: list[Path] = []

    def check_callbacks(self, callbacks: Sequence[Callback]) -> None:
        """Refuse a second timeline, which would time the same once more."""
        if len([each for each in callbacks if isinstance(each, Timeline)]) > 1:
            raise CallbackError("The learner has two Timelines, and one has all there is to see. Give it one.")

    def join(self, *others: str | os.PathLike[str], to: str | os.PathLike[str]) -> None:
        """Write one file that has the last file of this callback and other traces, on one clock.

        Args:
            others: Files of `Profiler` or of ``torch.profiler``, and timelines of other ranks. The clocks of several
                machines are taken to be equal.
            to: The file to write; an existing one is replaced.

        Raises:
            UsageError: There is no file yet, a file cannot be read, or `to` cannot be written.
        """
        if not self.files:
            raise UsageError("join() needs a timeline, and this callback has written none: call learner.fit first.")
        join([self.files[-1], *others], to)


def timing(loop: Loop, timeline: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
    """Return a context for a fit, which writes a timeline if one is wanted.

    Args:
        loop: The loop of the learner.
        timeline: The argument of `Learner.fit`; ``None`` for the `Timeline` among the callbacks, if there is one.

    Raises:
        UsageError: `timeline` is no path.
    """
    chosen = next((each for each in loop.state.callbacks if isinstance(each, Timeline)), None)
    if timeline is not None:
        if not is_a(timeline, (str, os.PathLike)):
            raise UsageError(f"fit(timeline={timeline!r}): timeline is a file to write, as fit(10, timeline='a.json').")
        chosen = Timeline(timeline)
    writes = chosen is not None and identity() is None  # a dry run writes no files
    if chosen is None or not writes or (loop.state.rank and chosen.ranks == "main"):
        return nullcontext()
    return _writing(loop, chosen)


@contextmanager
def _writing(loop: Loop, chosen: Timeline) -> Generator[None]:
    """Give a context in which a timeline is written."""
    scopes = loop.scopes
    clock = Clock(lambda: (scopes.epoch_number, scopes.batch_number))
    try:
        writer = _open(chosen, clock, loop)
    except (OSError, ValueError, LoggingError) as error:  # a path with a null character is a ValueError
        cause = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else error
        _logger.warning(
            "flowtrain: the timeline %s cannot be written: %s. Training runs without it. Choose another path.",
            chosen.path,
            cause,
        )
        yield
        return
    loop.time(clock)
    try:
        with watched_waits(partial(clock.add, _WAIT)), clock.span("fit", "fit"):
            yield
    finally:
        loop.time(None)
        writer.close()
        chosen.files.append(writer.path)


def _open(timeline: Timeline, clock: Clock, loop: Loop) -> TraceWriter:
    """Open the file of a timeline, and say so in the log if it has another name, since the first one exists."""
    rank, path = loop.state.rank, timeline.path
    if rank:
        path = path.with_name(f"{path.stem}-rank-{rank}{path.suffix}")
    about = {"flowtrain": own_version(), "run": loop.sinks.run.id}
    writer = TraceWriter(clock, path, rank, timeline.limit, about)
    if writer.path != path and path not in timeline.files:  # a file of an earlier fit of this learner is expected
        _logger.warning("flowtrain: %s exists and is kept: the timeline of this fit is %s", path, writer.path)
    return writer
