"""TensorBoard: event files, written with TensorBoard's own messages and framing.

A run has one event file, whose name ends with the id of the run. The file is a sequence of framed ``Event`` messages
(https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto). `encode` frames the
record, not `write`: the checksum of a picture takes a while in Python, and a deferred handler computes it outside of
the training thread.
"""

from __future__ import annotations

import glob
import io
import os
import struct
import time
from collections.abc import Sequence
from typing import Any

from flowtrain.errors import LoggingError
from flowtrain.logging.backend import Figure, Group, Histogram, Image, Loggable, Run, Settings, Text, Value
from flowtrain.logging.distribution import distribution
from flowtrain.logging.extras import needed
from flowtrain.logging.files import AppendingFile, FileBackend, unwritable
from flowtrain.logging.pictures import figure_png, image_png
from flowtrain.logging.values import flat, number, refused, settings

__all__ = ["TensorBoardBackend"]

_HEADER = struct.Struct("<QI")  # the length of a message, and the checksum of that length
_FOOTER = 4  # the checksum of the message
_PNG_SIZE = struct.Struct(">II")  # the width and height of a PNG, which are at byte 16
_COLOUR_CHANNELS = {0: 1, 2: 3, 6: 4}  # the number of channels by PNG's colour type, which is at byte 25


class TensorBoardBackend(FileBackend):
    """Write event files for TensorBoard: ``tensorboard --logdir runs``.

    The tag is the group and the name: ``Step/TrainingPhase/Loss``. `Settings` become a text, and the hyperparameters of
    the run in the HPARAMS tab. The backend does not take `File`. Needs ``flowtrain[tensorboard]``.

    Args:
        path: The folder of the run, such as ``"runs/a"``; it is made when training begins.
    """

    accepts = (Value, Image, Text, Histogram, Figure, Settings)

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._name = ""

    def encode(self, loggable: Loggable, name: str, step: int, group: Group) -> bytes:
        """Return a framed ``Event``."""
        if not isinstance(loggable, self.accepts):
            raise refused(self, loggable)
        protos = needed("tensorboard.compat.proto.event_pb2", "TensorBoardBackend", "tensorboard")
        summary = _summary(loggable, "/".join((*group, name)))
        return _framed(protos.Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self) -> Any:
        """Bring the event file to the disk; return its name and its size in bytes."""
        size = super().flush()
        return None if size is None else {"file": self._name, "size": size}

    def restore(self, position: Any) -> None:
        """Remove the events that were written after a position.

        Raises:
            LoggingError: The event file of the position is missing, or is shorter than at the position.
        """
        if self._file is None or position is None:
            return
        if position["file"] != self._name:
            raise LoggingError(
                f"{self.path} does not have the event file {position['file']} that the checkpoint continues. Put it "
                f"back, or log this run to another folder."
            )
        super().restore(position["size"])

    def _open_file(self, run: Run) -> AppendingFile:
        protos = needed("tensorboard.compat.proto.event_pb2", "TensorBoardBackend", "tensorboard")
        pattern = f"events.out.tfevents.*.{glob.escape(run.id)}"
        found = sorted(glob.glob(os.path.join(glob.escape(self.path), pattern)))
        now = time.time()
        path = found[-1] if found else os.path.join(self.path, f"events.out.tfevents.{int(now):010d}.{run.id}")
        if os.path.isfile(self.path):
            raise unwritable(self.path, NotADirectoryError(20, "it is a file, and event files go into a folder"))
        file = AppendingFile(path, _whole_events)
        self._name = os.path.basename(path)
        if not file.size:
            file.append(_framed(protos.Event(wall_time=now, file_version="brain.Event:2")))
        return file

    def _append_all(self, file: AppendingFile, records: Sequence[bytes]) -> None:
        file.append_all(records)


def _summary(loggable: Loggable, tag: str) -> Any:
    protos = needed("tensorboard.compat.proto.summary_pb2", "TensorBoardBackend", "tensorboard")
    if isinstance(loggable, Value):
        return protos.Summary(value=[protos.Summary.Value(tag=tag, simple_value=number(loggable.value))])
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
        tensor=tensors.TensorProto(dtype="DT_STRING", string_val=[str(text).encode()], tensor_shape=shape),
    )


def _hparams(protos: Any, values: dict[str, Any]) -> Any:
    """Return the message by which TensorBoard shows the settings as hyperparameters of the run."""
    hparams = needed("tensorboard.plugins.hparams.plugin_data_pb2", "TensorBoardBackend", "tensorboard")
    session = hparams.SessionStartInfo()
    for name, value in values.items():
        if isinstance(value, bool):
            session.hparams[name].bool_value = value
        elif isinstance(value, (int, float)):
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
