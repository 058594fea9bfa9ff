"""Weights & Biases: records are entries in the history of a run, offline or online.

The exit code of the W&B run is the outcome of training: 0, 1 after an error, 255 after an interrupt, as in W&B itself.

W&B cannot remove records. A run that is resumed from a checkpoint gets a new W&B run, whose configuration has under
``flowtrain`` the id of the earlier W&B run and the number of its records that count. The W&B runs of one run share a
W&B group, unless the user names another group.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from flowtrain.errors import LoggingError
from flowtrain.logging.backend import (
    Figure,
    File,
    Group,
    Histogram,
    Image,
    Loggable,
    LoggerBackend,
    Outcome,
    Run,
    Settings,
    Text,
    Value,
)
from flowtrain.logging.distribution import distribution
from flowtrain.logging.extras import needed
from flowtrain.logging.files import not_open, read_file, unwritable
from flowtrain.logging.names import Names, readable
from flowtrain.logging.pictures import figure_png, image_png
from flowtrain.logging.values import number, refused, settings

__all__ = ["WandbBackend"]

_EXIT_CODES = {"finished": 0, "failed": 1, "killed": 255}


class WandbBackend(LoggerBackend):
    """Log to Weights & Biases (https://docs.wandb.ai). Needs ``flowtrain[wandb]``.

    The key is the group and the name: ``Step/TrainingPhase/Loss``. W&B counts its own steps, so each entry also has
    the step of its group as ``Step/TrainingPhase/step``, which charts use as their axis.

    W&B uses a name as the path of a file too. Therefore names of more than 180 bytes are cut, control characters and
    the parts ``.`` and ``..`` become ``_``, and the name ``step`` becomes ``step_2``. See `flowtrain.logging.names`.

    A process of W&B writes the files. The last records are in the files a moment after `close`, at the latest when
    this process has ended: wait for its end before ``wandb sync``.

    Args:
        project: The project.
        run_name: The name of the W&B run; W&B invents a name by default.
        folder: The folder in which W&B keeps its files; the working directory by default.
        mode: ``"online"``, ``"offline"`` (``wandb sync`` uploads it later), or ``None`` for W&B's own setting.
        entity: The user or team that owns the project; W&B's own setting by default.
        group: The W&B group of the run; by default one for each run of flowtrain and the runs that resume it.
        tags: The tags of the run, each of 1 to 64 characters.

    Raises:
        LoggingError: `tags` is no list of such texts.
    """

    accepts = (Value, Image, Text, Histogram, Figure, File, Settings)

    def __init__(
        self,
        project: str,
        run_name: str | None = None,
        folder: str | os.PathLike[str] | None = None,
        mode: str | None = None,
        *,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        if not _are_tags(tags):
            raise LoggingError(
                f"WandbBackend(tags={tags!r}): tags is a list of texts, each of 1 to 64 characters: "
                f"tags=['baseline', 'v2']."
            )
        self.entity, self.group, self.tags = entity, group, tuple(tags)
        self.project = project
        self.run_name = run_name
        self.folder = os.path.abspath(os.fspath(folder) if folder is not None else ".")
        self.mode = mode
        self._run: Any = None
        self._run_id = ""  # the id of flowtrain's run
        self._silent = False
        self._count = 0  # records in the W&B run
        self._groups: set[str] = set()  # groups whose axis is defined
        self._names = Names(r"[\x00-\x1f\x7f]", 180)
        self._names.restore({"": "step"})  # so that no name becomes "step", which is the name of the axis
        self._outcome: Outcome = "finished"

    @property
    def sink(self) -> str:
        """The folder, the project, after the entity if it is given, and the name of the run."""
        owner = f"{self.entity}/" if self.entity else ""
        return f"wandb:{self.folder}:{owner}{self.project}:{self.run_name or ''}"

    def open(self, run: Run) -> None:
        """Begin a W&B run."""
        self.close()
        self._silent, self._run_id = run.rank != 0, run.id
        if not self._silent:
            self._begin()

    def encode(self, loggable: Loggable, name: str, step: int, group: Group) -> bytes:
        """Return the entry for the history, as JSON."""
        record: dict[str, Any] = {"group": "/".join(group), "name": name, "step": step}
        if isinstance(loggable, Value):
            record["value"] = repr(number(loggable.value))
        elif isinstance(loggable, Settings):
            record["settings"] = settings(loggable.values)
        elif isinstance(loggable, Text):
            record["text"] = readable(str(loggable.text))
        elif isinstance(loggable, Histogram):
            counted = distribution(loggable)
            record["histogram"] = [counted.counts, counted.edges]
        elif isinstance(loggable, (Image, Figure)):
            png = image_png(loggable) if isinstance(loggable, Image) else figure_png(loggable)
            record["image"] = base64.b64encode(png).decode()
        elif isinstance(loggable, File):
            record["file"] = os.path.basename(os.fspath(loggable.path))
            record["content"] = base64.b64encode(read_file(loggable)).decode()
        else:
            raise refused(self, loggable)
        return json.dumps(record).encode()

    def write(self, record: bytes) -> None:
        """Give the record to W&B."""
        if self._run is None:
            if self._silent:
                return
            raise not_open(self)
        entry = json.loads(record)
        entry["group"], entry["name"] = self._names.of(entry["group"]), self._names.of(entry["name"])
        with self._explained(f"take {entry['group']}/{entry['name']}"):
            if "settings" in entry:
                self._run.config.update(entry["settings"], allow_val_change=True)
            elif "content" in entry:
                self._keep(entry)
            else:
                self._log(entry)
        self._count += 1

    def flush(self) -> Any:
        """Return the id of the W&B run, and how many records it has. W&B writes them to its files by itself."""
        return None if self._run is None else {"run": self._run.id, "records": self._count}

    def restore(self, position: Any) -> None:
        """Continue after a position: in its W&B run if that is still open and has no later records, or in a new one."""
        if self._run is None or position is None or position == self.flush():
            return
        if self._count:
            self.close()
            self._begin()
        continues = {"continues": position["run"], "records": position["records"]}
        with self._explained(f"continue run {position['run']}"):
            self._run.config.update({"flowtrain": continues})

    def ended(self, outcome: Outcome) -> None:
        """Note how the run has ended, for the exit code of the W&B run."""
        self._outcome = outcome

    def close(self) -> None:
        """End the W&B run, which brings its records to the disk."""
        run, self._run = self._run, None
        outcome, self._outcome = self._outcome, "finished"
        # When Python exits, W&B ends its run itself, perhaps before this call.
        if run is not None and not getattr(run, "_atexit_cleanup_called", False):
            with self._explained("end the run"):
                run.finish(exit_code=_EXIT_CODES[outcome])

    def _begin(self) -> None:
        wandb = needed("wandb", "WandbBackend", "wandb")
        try:
            os.makedirs(os.path.join(self.folder, "wandb"), exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        quiet = wandb.Settings(silent=True, console="off")
        with self._explained("be opened"):
            self._run = wandb.init(
                entity=self.entity,
                project=self.project,
                name=self.run_name,
                group=self.group or self._run_id,
                tags=self.tags or None,  # so that W&B's own setting counts
                dir=self.folder,
                mode=self.mode,
                reinit="create_new",
                settings=quiet,
            )
        self._count, self._groups = 0, set()

    def _log(self, entry: dict[str, Any]) -> None:
        wandb = needed("wandb", "WandbBackend", "wandb")
        group = entry["group"]
        if group not in self._groups:
            self._groups.add(group)
            self._run.define_metric(f"{group}/step")
            self._run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        if "value" in entry:
            value: Any = float(entry["value"])
        elif "histogram" in entry:
            counts, edges = entry["histogram"]
            value = wandb.Histogram(np_histogram=(counts, edges))
        elif "image" in entry:
            with tempfile.NamedTemporaryFile(suffix=".png") as file:
                file.write(base64.b64decode(entry["image"]))
                file.flush()
                self._run.log({f"{group}/{entry['name']}": wandb.Image(file.name), f"{group}/step": entry["step"]})
            return
        else:
            value = entry["text"]
        self._run.log({f"{group}/{entry['name']}": value, f"{group}/step": entry["step"]})

    def _keep(self, entry: dict[str, Any]) -> None:
        """Write a logged file into the folder of the W&B run, from which W&B uploads it when the run ends."""
        folder = os.path.join(self._run.dir, entry["group"], entry["name"], str(entry["step"]))
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, entry["file"])
        with open(path, "wb") as file:
            file.write(base64.b64decode(entry["content"]))
        self._run.save(path, base_path=self._run.dir, policy="end")

    @contextmanager
    def _explained(self, what: str) -> Generator[None]:
        try:
            yield
        except LoggingError:
            raise
        except Exception as error:  # W&B raises its own errors, those of its service, and those of the network
            raise LoggingError(f"{self!r} could not {what}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_run": None}  # a copy in another process encodes and never writes

    def __repr__(self) -> str:
        return f"WandbBackend({self.project!r}, folder={self.folder!r})"


def _are_tags(tags: object) -> bool:
    if isinstance(tags, str) or not isinstance(tags, Sequence):
        return False
    return all(isinstance(tag, str) and 1 <= len(tag) <= 64 for tag in tags)
