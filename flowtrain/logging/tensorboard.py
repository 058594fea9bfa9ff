"""TensorBoard: event files, written with TensorBoard's own messages and framing.

TensorBoard draws one chart for each tag, with a line for each run, and a run is a folder. So the records of each phase
go into a folder of their own, and training and validation of one metric meet in one chart. A folder has one event file,
whose name ends with the id of the run. The file is a sequence of framed ``Event`` messages
(https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto). `encode` frames the
record, not `write`: the checksum of a picture takes a while in Python, and a deferred handler computes it outside of
the training thread. A record is the name of the folder, an end of line, and the framed message.
"""

from __future__ import annotations

import glob
import io
import os
import struct
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from itertools import groupby
from typing import Any
from urllib.parse import quote, unquote

from flowtrain.errors import LoggingError
from flowtrain.errors.arguments import switch
from flowtrain.logging.backend import (
    Figure,
    Group,
    Histogram,
    Image,
    Loggable,
    LoggerBackend,
    Run,
    Settings,
    Text,
    Value,
)
from flowtrain.logging.distribution import distribution
from flowtrain.logging.extras import needed
from flowtrain.logging.files import AppendingFile, given_path, impossible, not_open, of_rank, unwritable, warn_of_others
from flowtrain.logging.pictures import figure_png, image_png
from flowtrain.logging.values import flat, real, refused, settings

__all__ = ["TensorBoardBackend"]

_HEADER = struct.Struct("<QI")  # the length of a message, and the checksum of that length
_FOOTER = 4  # the checksum of the message
_PNG_SIZE = struct.Struct(">II")  # the width and height of a PNG, which are at byte 16
_LARGE = 1 << 1023  # whole numbers below this have a float; TensorBoard shows larger ones as texts
_COLOUR_CHANNELS = {0: 1, 2: 3, 6: 4}  # the number of channels by PNG's colour type, which is at byte 25


class TensorBoardBackend(LoggerBackend):
    """Write event files for TensorBoard: ``tensorboard --logdir runs``.

    Each phase is a run of TensorBoard, the folder ``TrainingPhase`` or ``ValidationPhase`` in `path`. The tag is the
    rest of the group and the name, ``Epoch/Loss``, so that one chart shows the loss of all phases. A group of other
    than two parts is written into `path` itself, with all its parts in the tag. `Settings` become a text, and the
    hyperparameters of the run in the HPARAMS tab. The backend does not take `File`. Needs ``flowtrain[tensorboard]``.

    Args:
        path: The folder of the run, such as ``"runs/a"``; it is made when training begins. With ``{rank}`` in it, as in
            ``"runs/a-{rank}"``, each rank of a training writes into a folder of its own.
        by_phase: ``False`` writes all records into `path` itself, with the phase in the tag, such as
            ``Epoch/TrainingPhase/Loss``. A resumed run that has begun so continues so in any case.
        append: Whether the folder may have event files of another run, whose curves TensorBoard joins with these.
            Otherwise a fit begins with a warning of them, also one that resumes.

    Raises:
        LoggingError: `path` is no path, or `append` is not ``True`` or ``False``.
        UsageError: `by_phase` is not ``True`` or ``False``.
    """

    accepts = (Value, Image, Text, Histogram, Figure, Settings)

    def __init__(self, path: str | os.PathLike[str], *, by_phase: bool = True, append: bool = False) -> None:
        self._given = given_path("TensorBoardBackend", path)
        self.path = of_rank(self._given)
        self.per_rank = self.path != self._given
        self.by_phase = switch("TensorBoardBackend", "by_phase", by_phase)
        self.append = switch("TensorBoardBackend", "append", append, LoggingError)
        self._opened = ""  # the id of the run that the backend was last opened for
        self._run: Run | None = None  # the run that the backend is open for
        self._continues_flat = ""  # the id of a resumed run that has the phase in the tags
        self._files: dict[str, AppendingFile] = {}  # the open files by the name of their folder in `path`

    @property
    def sink(self) -> str:
        """The folder without symbolic links. It is the same on every rank, so a ``{rank}`` in it stays."""
        return os.path.realpath(self._given)

    def encode(self, loggable: Loggable, name: str, step: int, group: Group) -> bytes:
        """Return the name of a folder and a framed ``Event``."""
        if not isinstance(loggable, self.accepts):
            raise refused(self, loggable)
        protos = needed("tensorboard.compat.proto.event_pb2", "TensorBoardBackend", "tensorboard")
        folder, prefix = _place(group) if self.by_phase else ("", "/".join(group))
        event = protos.Event(wall_time=time.time(), step=step, summary=_summary(loggable, f"{prefix}/{name}"))
        return b"%b\n%b" % (folder.encode(), _framed(event))

    def open(self, run: Run) -> None:
        """Open the files of the run, or find out that files can be made. Records in the files are kept."""
        self.close()
        self._run = run = replace(run, rank=0) if self.per_rank else run
        if run.rank != 0:
            return
        needed("tensorboard.compat.proto.event_pb2", "TensorBoardBackend", "tensorboard")
        self._try_folder()
        if not self.append and run.id != self._opened:
            self._warn_of_others(run)
        self._opened = run.id
        for folder in self._folders():
            self._file_of(folder)

    def write(self, record: bytes) -> None:
        """Append a record to the file of its phase."""
        self._append([record])

    def write_all(self, records: Sequence[bytes]) -> None:
        """Append records."""
        if type(self).write is not TensorBoardBackend.write:  # a user's subclass may override `write`
            super().write_all(records)
        else:
            self._append(records)

    def _append(self, records: Sequence[bytes]) -> None:
        if self._run is None:
            raise not_open(self)
        if self._run.rank != 0:
            return
        for folder, group in groupby((record.partition(b"\n") for record in records), key=lambda parts: parts[0]):
            name, framed = folder.decode(), [each[2] for each in group]
            if name and self._continues_flat == self._run.id:
                name, framed = "", [_flattened(each, name) for each in framed]
            self._file_of(name).append_all(framed)

    def flush(self) -> Any:
        """Bring the event files to the disk; return their sizes in bytes, and where the phase is."""
        if self._run is None or self._run.rank != 0:
            return None
        by_phase = self.by_phase and self._continues_flat != self._run.id
        return {"sizes": {self._name(file): file.sync() for file in self._files.values()}, "by_phase": by_phase}

    def check(self, position: Any) -> None:
        """Check that the event files reach to a position.

        Raises:
            LoggingError: An event file of the position is missing, or is shorter than at the position.
        """
        if self._run is None or self._run.rank != 0 or position is None:
            return
        if type(position) is not dict:
            raise impossible(self.path, position)
        sizes, by_phase = _sizes(position)
        if type(sizes) is not dict or type(by_phase) is not bool:
            raise impossible(self.path, position)
        missing = sizes.keys() - {self._name(file) for file in self._files.values()}
        if missing:
            raise LoggingError(
                f"{self.path} does not have the event file {min(missing)} that the checkpoint continues. Put it "
                f"back, or log this run to another folder."
            )
        for file in self._files.values():
            if self._name(file) in sizes:
                file.check(sizes[self._name(file)])

    def restore(self, position: Any) -> None:
        """Remove the events that were written after a position.

        Raises:
            LoggingError: As for `check`.
        """
        self.check(position)
        if self._run is None or self._run.rank != 0 or position is None:
            return
        sizes, by_phase = _sizes(position)
        for folder, file in list(self._files.items()):
            if self._name(file) in sizes:
                file.truncate(sizes[self._name(file)])
            else:  # the phase has logged its first record after the checkpoint
                self._files.pop(folder).close()
                os.unlink(file.path)
        self._continues_flat = "" if by_phase else self._run.id

    def close(self) -> None:
        """Close the files."""
        files, self._files, self._run = self._files, {}, None
        with ExitStack() as stack:  # closes all of them, whatever each of them raises
            for file in files.values():
                stack.enter_context(file)

    def _try_folder(self) -> None:
        if os.path.isfile(self.path):
            raise unwritable(self.path, NotADirectoryError(20, "it is a file, and event files go into a folder"))
        try:
            os.makedirs(self.path, exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise unwritable(self.path, error) from error

    def _folders(self) -> list[str]:
        """Return the folders that have an event file of the run."""
        inside = glob.glob(os.path.join(glob.escape(self.path), "*", ""))
        return [each for each in ("", *(os.path.basename(path[:-1]) for path in sorted(inside))) if self._found(each)]

    def _event_files(self) -> list[str]:
        """Return the paths of the event files of all runs that were logged to this folder."""
        here = os.path.join(glob.escape(self.path), "events.out.tfevents.*")
        inside = glob.glob(os.path.join(glob.escape(self.path), "*", "events.out.tfevents.*"))
        return glob.glob(here) + [
            path for path in inside if path.endswith(f".{os.path.basename(os.path.dirname(path))}")
        ]

    def _warn_of_others(self, run: Run) -> None:
        """Warn of event files of other runs, whose curves TensorBoard joins with those of this run."""
        others = [each for each in self._event_files() if f".{run.id}." not in f"{os.path.basename(each)}."]
        files = f"{len(others)} event file{'s' * (len(others) > 1)}"
        if others and run.resumed:
            warnings.warn(
                f"{self.path} has {files} of another run beside those of the run that this fit resumes, and "
                f"TensorBoard joins their curves: {os.path.relpath(others[0], self.path)}. Move the files that you do "
                f"not want to see to another folder, or write {type(self).__name__}(..., append=True).",
                UserWarning,
                stacklevel=3,
            )
        elif others:
            warn_of_others(self, files)

    def _found(self, folder: str) -> list[str]:
        """Return the paths of the event files of the run in one of its folders."""
        place = glob.escape(os.path.join(self.path, folder))
        return sorted(glob.glob(os.path.join(place, f"events.out.tfevents.*.{glob.escape(self._end(folder))}")))

    def _end(self, folder: str) -> str:
        """Return the end of the name of an event file.

        It has the name of the folder, so that the file of a phase is not taken for one of another backend, whose path
        is that folder.
        """
        assert self._run is not None
        return f"{self._run.id}.{folder}" if folder else self._run.id

    def _file_of(self, folder: str) -> AppendingFile:
        """Return the event file in a folder, which is opened, or made, at the first call."""
        file = self._files.get(folder)
        if file is None:
            found, now = self._found(folder), time.time()
            new = os.path.join(self.path, folder, f"events.out.tfevents.{int(now):010d}.{self._end(folder)}")
            file = AppendingFile(found[-1] if found else new, _whole_events)
            self._files[folder] = file
            if not file.size:
                protos = needed("tensorboard.compat.proto.event_pb2", "TensorBoardBackend", "tensorboard")
                file.append(_framed(protos.Event(wall_time=now, file_version="brain.Event:2")))
        return file

    def _name(self, file: AppendingFile) -> str:
        return os.path.relpath(file.path, self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": {}, "_run": None}  # a copy in another process encodes and never writes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"


@lru_cache
def _place(group: Group) -> tuple[str, str]:
    """Return the folder of a group, and the beginning of the tags in it: for a group of two parts, the second part.

    Characters that a name of a folder cannot have are written as in an address, ``%2F``.
    """
    if len(group) != 2 or "/" in group[0]:
        return "", "/".join(group)
    folder = quote(group[1], safe=" #+,=@[]()")
    return (f"%2E{folder[1:]}" if folder.startswith(".") else folder), group[0]


def _sizes(position: dict[str, Any]) -> tuple[Any, Any]:
    """Return the sizes of the event files at a position, and whether each phase has a folder of its own."""
    if "file" in position:  # early checkpoints have one file, with the phase in the tags
        return {position["file"]: position.get("size")}, False
    return position.get("sizes"), position.get("by_phase")


def _flattened(framed: bytes, folder: str) -> bytes:
    """Return a framed event with its phase in the tags, for a log that has begun so."""
    protos = needed("tensorboard.compat.proto.event_pb2", "TensorBoardBackend", "tensorboard")
    event = protos.Event.FromString(framed[_HEADER.size : -_FOOTER])
    for value in event.summary.value:
        if not value.tag.startswith("_hparams_/"):
            first, _, rest = value.tag.partition("/")
            value.tag = f"{first}/{unquote(folder)}/{rest}"
    return _framed(event)


def _summary(loggable: Loggable, tag: str) -> Any:
    protos = needed("tensorboard.compat.proto.summary_pb2", "TensorBoardBackend", "tensorboard")
    if isinstance(loggable, Value):
        return protos.Summary(value=[protos.Summary.Value(tag=tag, simple_value=real(loggable.value))])
    if isinstance(loggable, (Image, Figure)):
        return protos.Summary(value=[protos.Summary.Value(tag=tag, image=_image(protos, loggable))])
    if isinstance(loggable, Histogram):
        return protos.Summary(value=[protos.Summary.Value(tag=tag, histo=_histogram(protos, loggable))])
    if isinstance(loggable, Text):
        return protos.Summary(value=[_text(protos, tag, loggable.text)])
    assert isinstance(loggable, Settings)
    values = flat(settings(loggable.values))
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    table = "\n".join(["| setting | value |", "| --- | --- |", *rows])
    return protos.Summary(value=[_text(protos, tag, table), _hparams(protos, values)])


def _image(protos: Any, loggable: Image | Figure) -> Any:
    png = image_png(loggable) if isinstance(loggable, Image) else figure_png(loggable)
    width, height = _PNG_SIZE.unpack_from(png, 16)
    channels = _COLOUR_CHANNELS.get(png[25], 3)
    return protos.Summary.Image(height=height, width=width, colorspace=channels, encoded_image_string=png)


def _histogram(protos: Any, loggable: Histogram) -> Any:
    counted = distribution(loggable)
    # A message has only the upper limit of each bin: TensorBoard lets the first bin begin at the smallest value.
    return protos.HistogramProto(
        min=counted.low,
        max=counted.high,
        num=sum(counted.counts),
        sum=counted.total,
        sum_squares=counted.squares,
        bucket_limit=counted.edges[1:],
        bucket=counted.counts,
    )


def _text(protos: Any, tag: str, text: str) -> Any:
    tensors = needed("tensorboard.compat.proto.tensor_pb2", "TensorBoardBackend", "tensorboard")
    shapes = needed("tensorboard.compat.proto.tensor_shape_pb2", "TensorBoardBackend", "tensorboard")
    shape = shapes.TensorShapeProto(dim=[shapes.TensorShapeProto.Dim(size=1)])
    plugin = protos.SummaryMetadata.PluginData(plugin_name="text", content=b"")
    return protos.Summary.Value(
        tag=tag,
        metadata=protos.SummaryMetadata(plugin_data=plugin),
        tensor=tensors.TensorProto(
            dtype="DT_STRING", string_val=[str(text).encode(errors="replace")], tensor_shape=shape
        ),
    )


def _hparams(protos: Any, values: dict[str, Any]) -> Any:
    """Return the message by which TensorBoard shows the settings as hyperparameters of the run."""
    hparams = needed("tensorboard.plugins.hparams.plugin_data_pb2", "TensorBoardBackend", "tensorboard")
    session = hparams.SessionStartInfo()
    for name, value in values.items():
        if isinstance(value, bool):
            session.hparams[name].bool_value = value
        elif isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGE):
            session.hparams[name].number_value = value
        else:
            session.hparams[name].string_value = _cell(value)
    content = hparams.HParamsPluginData(session_start_info=session, version=0).SerializeToString()
    plugin = protos.SummaryMetadata.PluginData(plugin_name="hparams", content=content)
    metadata = protos.SummaryMetadata(plugin_data=plugin)
    return protos.Summary.Value(tag="_hparams_/session_start_info", metadata=metadata)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _framed(event: Any) -> bytes:
    writers = needed("tensorboard.summary.writer.record_writer", "TensorBoardBackend", "tensorboard")
    buffer = io.BytesIO()
    writers.RecordWriter(buffer).write(event.SerializeToString())
    return buffer.getvalue()


def _whole_events(descriptor: int) -> int:
    """Return the number of bytes of an event file that are whole events, from its beginning."""
    size, place = os.fstat(descriptor).st_size, 0
    while place + _HEADER.size <= size:
        length, _ = _HEADER.unpack(os.pread(descriptor, _HEADER.size, place))
        after = place + _HEADER.size + length + _FOOTER
        if after > size:
            break
        place = after
    return place
