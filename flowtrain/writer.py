"""The writer: checkpoints go to the disk on a thread of their own, one at a time.

The training thread hands over a staged checkpoint that nobody else holds, and goes on. It waits only if the one before
is still being written. What fails is raised on the training thread: before its next batch, or when it waits.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flowtrain.checkpointfile import POINTERS, replace, target
from flowtrain.errors import CheckpointError
from flowtrain.requests import CheckpointRequest

__all__ = ["Writer"]


class Writer:
    """Writes checkpoints.

    Args:
        urgent: Gets what the training thread is to do before its next batch: raise what went wrong.

    Attributes:
        reached: Called, on the writing thread, at each named point of a write. A test stops there.
    """

    def __init__(self, urgent: list[Callable[[], None]]) -> None:
        self.reached: Callable[[str], None] = lambda point: None
        self._urgent = urgent
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None

    def submit(self, contents: dict[str, Any], request: CheckpointRequest) -> None:
        """Begin to write a checkpoint; the one before is finished first.

        Where ``contents["finite"]`` is false no pointer will name it.

        Raises:
            CheckpointError: The one before could not be written.
        """
        self.wait()
        job = partial(self._write, contents, request)
        self._thread = threading.Thread(target=job, name="flowtrain-checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            CheckpointError: The last checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write(self, contents: dict[str, Any], request: CheckpointRequest) -> None:
        path = Path(request.path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, partial(_save, contents), self.reached, "checkpoint")
            if request.weights:
                tensors = _weights(contents["model"])
                beside = path.with_suffix(".safetensors")
                replace(beside, lambda file: _save_weights(tensors, file), self.reached, "weights")
            if contents["finite"]:
                for pointer in POINTERS if request.best else POINTERS[:1]:
                    replace(path.with_name(pointer), lambda file: _put(file, path.name), self.reached, pointer)
            else:
                self._urgent.append(partial(_warn, path))
            _remove(path.parent, request.remove)
            self.reached("removed")
        except BaseException as error:
            kept = target(path.parent, "latest")
            still = f"The last one that is complete is {path.parent / kept}." if kept else "There is none before it."
            failure = CheckpointError(
                f"The checkpoint {path} could not be written: {_cause(error)}. {still} Make room, or choose another "
                f"folder, and go on with fit(..., resume=...)."
            )
            failure.__cause__ = error
            self._failure = failure
            self._urgent.append(self._raise)


def _put(file: Any, name: str) -> None:
    file.write(name.encode() + b"\n")


def _save(contents: dict[str, Any], file: Any) -> None:
    torch.save(contents, file)


def _weights(model: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the tensors of all models by name, none of which shares its memory with another: safetensors asks that."""
    return {
        f"{name}.{key}" if name else key: value.contiguous().clone()
        for name, state in model.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def _save_weights(tensors: dict[str, torch.Tensor], file: Any) -> None:
    from safetensors.torch import save  # an extra; who asks for it has it

    file.write(save(tensors))


def _remove(folder: Path, names: tuple[str, ...]) -> None:
    """Remove what is not wanted any more, except what a pointer names."""
    kept = {target(folder, pointer) for pointer in POINTERS}
    for name in names:
        if name not in kept and os.path.basename(name) == name:
            (folder / name).unlink(missing_ok=True)
            (folder / name).with_suffix(".safetensors").unlink(missing_ok=True)


def _warn(path: Path) -> None:
    kept = target(path.parent, "latest")
    warnings.warn(
        f"The checkpoint {path} holds values that are not finite (a parameter that is trained, or the last loss), so "
        f"it does not become the latest; that is {kept or 'none'}.",
        RuntimeWarning,
        stacklevel=2,
    )


def _cause(error: BaseException) -> str:
    """Say what went wrong, by what the operating system said, which torch covers with errors of its own."""
    at: BaseException | None = error
    while at is not None:
        if isinstance(at, OSError):
            return str(at)
        at = at.__cause__ or at.__context__
    return f"{type(error).__name__}: {error}"
