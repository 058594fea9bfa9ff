"""MLflow: values are metrics of a run, settings are its parameters, all other loggables are its artifacts.

The status of the MLflow run is the outcome of training: FINISHED, FAILED after an error, KILLED after an interrupt.

MLflow cannot remove records. A run that is resumed from a checkpoint continues its MLflow run if that has no later
records; otherwise a new MLflow run gets the parameters, the metrics up to the checkpoint, and a tag with the id of the
earlier run.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from flowtrain.errors import LoggingError
from flowtrain.errors.arguments import is_a
from flowtrain.logging.backend import (
    Figure,
    File,
    Group,
    Image,
    Loggable,
    LoggerBackend,
    Outcome,
    Run,
    Settings,
    Text,
    Value,
)
from flowtrain.logging.extras import needed
from flowtrain.logging.files import not_open, read_file
from flowtrain.logging.names import Names
from flowtrain.logging.pictures import figure_png, image_png
from flowtrain.logging.values import flat, real, refused, settings

__all__ = ["MLflowBackend"]

_RUN = "flowtrain.run"
_CONTINUES = "flowtrain.continues"
_FORBIDDEN, _LONGEST = r"[^\w\-. :/]", 250  # characters that a key of a metric or parameter cannot have; its length
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
_BATCH = 500  # the number of metrics in one request; MLflow takes at most 1000
_PATIENCE = 5.0  # the seconds after which a metric is sent, when the next one is written


class MLflowBackend(LoggerBackend):
    """Log to MLflow (https://mlflow.org/docs/latest/ml/tracking/). Needs ``flowtrain[mlflow]``.

    The key of a metric is the group and the name: ``Step/TrainingPhase/Loss``. Metrics are sent in batches: when
    500 are waiting, when one is written five seconds after the oldest, and at every `flush`. An image, a text, a
    figure or a file is an artifact of that path.

    A key of MLflow has letters, digits and ``_-.: /``, and at most 250 characters. Other names are changed: ``mAP@50``
    is logged as ``mAP_50``, or as ``mAP_50_2`` if ``mAP_50`` was logged before. See `flowtrain.logging.names`.

    Args:
        experiment: The experiment, which is made if it does not exist.
        run_name: The name of the MLflow run; MLflow invents a name by default.
        tracking_uri: The place where MLflow keeps its runs; MLflow's own setting by default.
        tags: The tags of the run: texts by name. ``{"mlflow.note.content": "..."}`` is the description of the run.

    Raises:
        LoggingError: `tags` is no such mapping, or has a tag of flowtrain's own.
    """

    accepts = (Value, Image, Text, Figure, File, Settings)

    def __init__(
        self,
        experiment: str,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        *,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        self.tags = _checked(tags)
        self.experiment = experiment
        self.run_name = run_name
        self.tracking_uri = tracking_uri
        self.run_id = ""  # the id of the MLflow run
        self._client: Any = None
        self._silent = False
        self._waiting: list[Any] = []  # metrics that have not been sent
        self._oldest = 0.0  # when the first of them was written
        self._counts: Counter[str] = Counter()  # by key: how many values MLflow has
        self._names = Names(_FORBIDDEN, _LONGEST)
        self._settings = Names(_FORBIDDEN, _LONGEST)
        self._outcome: Outcome = "finished"
        self._before = ""  # the status of the MLflow run before it was opened

    @property
    def sink(self) -> str:
        """The tracking URI, the experiment and the name of the run."""
        return f"mlflow:{self.tracking_uri or ''}:{self.experiment}:{self.run_name or ''}"

    def open(self, run: Run) -> None:
        """Continue the MLflow run that has a tag with the id of this run, or begin a new one."""
        self.close()
        self._silent = run.rank != 0
        if self._silent:
            return
        mlflow = needed("mlflow", "MLflowBackend", "mlflow")
        with self._explained("be opened"):
            client = mlflow.tracking.MlflowClient(tracking_uri=self.tracking_uri)
            experiment = client.get_experiment_by_name(self.experiment)
            number = client.create_experiment(self.experiment) if experiment is None else experiment.experiment_id
            mine = f"tags.`{_RUN}` = '{run.id}'"
            found = client.search_runs([number], mine, order_by=["attributes.start_time DESC"], max_results=1)
            if found:
                self.run_id, self._before = found[0].info.run_id, found[0].info.status
                client.update_run(self.run_id, status="RUNNING")
                for name, text in self.tags.items():
                    client.set_tag(self.run_id, name, text)
            else:
                tags = {**self.tags, _RUN: run.id}
                self.run_id = client.create_run(number, tags=tags, run_name=self.run_name).info.run_id
                self._before = "RUNNING"
            keys = client.get_run(self.run_id).data.metrics
            self._counts = Counter({key: len(client.get_metric_history(self.run_id, key)) for key in keys})
            self._client = client

    def encode(self, loggable: Loggable, name: str, step: int, group: Group) -> bytes:
        """Return the metric, parameters or artifact to send, as JSON."""
        record: dict[str, Any] = {"key": "/".join((*group, name)), "step": step, "time": int(time.time() * 1000)}
        if isinstance(loggable, Value):
            record["value"] = repr(real(loggable.value))
        elif isinstance(loggable, Settings):
            record["settings"] = {key: str(value) for key, value in flat(settings(loggable.values)).items()}
        elif isinstance(loggable, Text):
            record |= _artifact(str(loggable.text).encode(errors="replace"), step, ".md")
        elif isinstance(loggable, (Image, Figure)):
            png = image_png(loggable) if isinstance(loggable, Image) else figure_png(loggable)
            record |= _artifact(png, step, ".png")
        elif isinstance(loggable, File):
            record |= _artifact(read_file(loggable), step, os.path.splitext(os.fspath(loggable.path))[1])
        else:
            raise refused(self, loggable)
        return json.dumps(record).encode()

    def write(self, record: bytes) -> None:
        """Send the record, or keep it until enough metrics are waiting."""
        if self._client is None:
            if self._silent:
                return
            raise not_open(self)
        sent = json.loads(record)
        sent["key"] = self._names.of(sent["key"])
        entities = needed("mlflow.entities", "MLflowBackend", "mlflow")
        if "value" in sent:
            now = time.monotonic()
            self._oldest = self._oldest if self._waiting else now
            self._waiting.append(entities.Metric(sent["key"], float(sent["value"]), sent["time"], sent["step"]))
            if len(self._waiting) >= _BATCH or now - self._oldest >= _PATIENCE:
                self._send()
        elif "settings" in sent:
            parameters = [entities.Param(self._settings.of(key), value) for key, value in sent["settings"].items()]
            with self._explained("take the settings"):
                self._client.log_batch(self.run_id, params=parameters)
        else:
            with self._explained(f"take {sent['key']}"), tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, sent["file"])
                with open(path, "wb") as file:
                    file.write(base64.b64decode(sent["content"]))
                self._client.log_artifact(self.run_id, path, sent["key"])

    def flush(self) -> Any:
        """Send the waiting metrics; return the id of the MLflow run, and how many values each metric has."""
        if self._client is None:
            return None
        self._send()
        names = {"names": self._names.given, "settings": self._settings.given}
        return {"run": self.run_id, "metrics": dict(self._counts), **names}

    def restore(self, position: Any) -> None:
        """Continue after a position: in its MLflow run, or in a new one with a copy of the records up to it.

        Raises:
            LoggingError: The MLflow run has fewer values than at the position, or MLflow fails.
        """
        if self._client is None or position is None:
            return
        self._names.restore(position.get("names", {}))  # early checkpoints lack this entry and the next
        self._settings.restore(position.get("settings", {}))
        self._waiting.clear()  # `flush` sends all waiting metrics, so these came after the position
        if position["run"] == self.run_id and position["metrics"] == dict(self._counts):
            return
        entities = needed("mlflow.entities", "MLflowBackend", "mlflow")
        client, old = self._client, position["run"]
        with self._explained(f"continue run {old}"):
            known = client.get_run(old)
            kept = {key: self._history(old, key, count) for key, count in position["metrics"].items()}
            tags = {**self.tags, _RUN: known.data.tags.get(_RUN, ""), _CONTINUES: old}
            new = client.create_run(known.info.experiment_id, tags=tags, run_name=known.info.run_name)
            client.set_tag(self.run_id, _RUN, "")
            # A run whose status is still RUNNING was killed without a chance to set its status.
            client.set_terminated(self.run_id, status="KILLED" if self._before == "RUNNING" else self._before)
            self.run_id, self._counts = new.info.run_id, Counter()
            client.log_batch(self.run_id, params=[entities.Param(*each) for each in known.data.params.items()])
            self._waiting = [metric for metrics in kept.values() for metric in metrics]
            self._send()

    def ended(self, outcome: Outcome) -> None:
        """Note how the run has ended, for the status of the MLflow run."""
        self._outcome = outcome

    def close(self) -> None:
        """Send the waiting metrics, and end the MLflow run."""
        outcome, self._outcome = self._outcome, "finished"
        if self._client is None:
            return
        try:
            try:
                self._send()
            except LoggingError:
                with suppress(Exception):  # the error of sending explains more than one of this call would
                    self._client.set_terminated(self.run_id, status=_STATUS[outcome])
                raise
            with self._explained("end the run"):
                self._client.set_terminated(self.run_id, status=_STATUS[outcome])
        finally:
            self._client = None

    def _history(self, run: str, key: str, count: int) -> Sequence[Any]:
        metrics: Sequence[Any] = self._client.get_metric_history(run, key)
        if len(metrics) < count:
            raise LoggingError(
                f"MLflow's run {run} has {len(metrics)} values of {key}, and had {count} when the checkpoint was made. "
                f"Log this run under another name."
            )
        return metrics[:count]

    def _send(self) -> None:
        while self._waiting:
            sent = self._waiting[:_BATCH]
            with self._explained(f"take {len(sent)} values, the first one {sent[0].key}"):
                self._client.log_batch(self.run_id, metrics=sent)
            del self._waiting[:_BATCH]
            self._counts.update(metric.key for metric in sent)

    @contextmanager
    def _explained(self, what: str) -> Generator[None]:
        try:
            yield
        except LoggingError:
            raise
        except Exception as error:  # MLflow raises its own errors, those of its stores, and those of the network
            raise LoggingError(f"{self!r} could not {what}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_client": None, "_waiting": []}  # a copy in another process encodes and never writes

    def __repr__(self) -> str:
        where = f", tracking_uri={self.tracking_uri!r}" if self.tracking_uri else ""
        return f"MLflowBackend({self.experiment!r}{where})"


def _checked(tags: object) -> dict[str, str]:
    """Return the tags of the user.

    Raises:
        LoggingError: They are no mapping from names to texts, or one of them is a tag of flowtrain's own.
    """
    if tags is None:
        return {}
    if not isinstance(tags, Mapping) or not all(is_a(part, str) and part for pair in tags.items() for part in pair):
        raise LoggingError(f"MLflowBackend(tags={tags!r}): tags is a mapping of texts: tags={{'dataset': 'v2'}}.")
    for name in (_RUN, _CONTINUES):
        if name in tags:
            raise LoggingError(
                f"MLflowBackend(tags={dict(tags)!r}): {name!r} is set by flowtrain, which finds its runs by it. "
                f"Give the tag another name."
            )
    return dict(tags)


def _artifact(content: bytes, step: int, suffix: str) -> dict[str, str]:
    return {"file": f"{step}{suffix}", "content": base64.b64encode(content).decode()}
