"""The state of one batch, and the read-only twin of a batch that holds containers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowtrain.errors import MissingStateError, nearest
from flowtrain.state.readonly import PLAIN, readonly

__all__ = ["BatchState", "ReadOnlyBatch"]


class BatchState:
    """What is known about one batch: ``inputs``, ``outputs``, ``loss`` and whatever a phase or callback adds."""

    if TYPE_CHECKING:  # at run time plain attributes, which are the fastest

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MissingStateError(
            f"batch.{name}",
            f"batch.{name} does not exist (yet). This batch has: {', '.join(vars(self)) or 'nothing'}."
            f"{nearest(name, vars(self))}",
        )

    def __repr__(self) -> str:
        return f"BatchState({', '.join(vars(self))})"


class ReadOnlyBatch:
    """The twin of a batch that holds containers; a batch of plain tensors needs none."""

    __slots__ = ("_batch", "_twins")

    def __init__(self, batch: BatchState) -> None:
        self._batch = batch
        self._twins: dict[str, tuple[Any, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._batch, name)
        if type(value) in PLAIN:
            return value
        original, twin = self._twins.get(name, (None, None))
        if original is not value:
            twin = readonly(value, f"batch.{name}")
            self._twins[name] = (value, twin)
        return twin
