"""The state of one batch, and its read-only twin.

A new `BatchState` is made for each batch. A handler that only reads gets the batch itself while its entries are plain
tensors and numbers, and a `ReadOnlyBatch` as soon as one of them is a container, which could be changed in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowtrain.errors import MissingStateError
from flowtrain.errors.describing import nearest
from flowtrain.state.readonly import UNPROTECTED, itself, readonly

__all__ = ["BatchState", "ReadOnlyBatch"]


class BatchState:
    """The entries of one batch as attributes: ``inputs``, ``outputs``, ``loss``, and those that callbacks add."""

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
    """The read-only twin of a batch that has containers among its entries."""

    __slots__ = ("_batch", "_twins")

    def __init__(self, batch: BatchState) -> None:
        self._batch = batch
        self._twins: dict[str, tuple[Any, Any]] = {}  # by name: the container, and its twin

    def __reduce__(self) -> tuple[Any, ...]:
        return itself, (self._batch,)  # a copy or a pickle is one of the batch

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._batch, name)
        if type(value) in UNPROTECTED:
            return value
        container, twin = self._twins.get(name, (None, None))
        if container is not value:  # read for the first time, or replaced since
            twin = readonly(value, f"batch.{name}")
            self._twins[name] = (value, twin)
        return twin
