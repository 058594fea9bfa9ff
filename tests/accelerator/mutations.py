"""Mistakes in the synchronisation of flowtrain, one at a time, to prove that the simulated device sees them.

A mutation replaces some text in one function. The function stays the object that it is, with other code, so all
references to it have the mistake, and lose it again.
"""

from __future__ import annotations
import __future__ as future

import inspect
import textwrap
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import CodeType
from typing import Any, Literal, NamedTuple

from flowtrain.callbacks import Metrics, ProgressBar, SmoothLoss, StopOnNaNLoss
from flowtrain.core.optimizers import clip_gradients
from flowtrain.core.precision import NaNGuard, Scaling
from flowtrain.core.prefetch import BatchMover, StreamTransfer
from flowtrain.core.torch_core import TorchCore
from flowtrain.state.accelerator import on_stream
from flowtrain.state.device_values import Lagged, Reading, Unread
from flowtrain_dask.snapshots import pool, tensors
from flowtrain_dask.snapshots.taker import Snapshot

__all__ = ["MUTATIONS", "Mutation", "Seen", "mutated"]

Seen = Literal["race", "values", "waits"]
"""How a mistake shows: as a race, in the values that training leaves behind, or in the waits of the host."""


class Mutation(NamedTuple):
    """One mistake.

    Attributes:
        name: The name of the mistake.
        function: The function that has the mistake.
        right: The text that is replaced; it occurs once.
        wrong: The text that replaces it.
        seen: The way in which the mistake shows.
        training: The training in which it shows.
    """

    name: str
    function: Callable[..., Any]
    right: str
    wrong: str
    seen: Seen
    training: str = "the defaults"


_from_accelerator: Callable[..., Any] = vars(tensors)["_from_accelerator"]
_send: Callable[..., Any] = vars(Reading)["_send"]
_place: Callable[..., Any] = vars(BatchMover)["_send"]
_is_unused: Callable[..., Any] = vars(pool)["_Memory"].is_unused

START, FINISH = StreamTransfer.start, StreamTransfer.finish
DEFERRED = "deferred callbacks"

MUTATIONS = (
    # Prefetch: a batch goes up on a side stream.
    Mutation("a step that does not wait for its batch", FINISH, "current.wait_event(event)", "pass", "race"),
    Mutation("a step that does not record its use", FINISH, "tensor.record_stream(current)", "pass", "race"),
    Mutation(
        "a step that records the wrong stream", FINISH, "record_stream(current)", "record_stream(self._stream)", "race"
    ),
    Mutation("a host that waits for a batch", FINISH, "current.wait_event(event)", "event.synchronize()", "waits"),
    Mutation("an event that was not recorded", START, "self._stream.record_event()", "torch.Event()", "race"),
    Mutation(
        "an event of another stream for a batch",
        START,
        "self._stream.record_event()",
        "torch.Stream(self._device).record_event()",
        "race",
    ),
    Mutation("a batch in pageable memory", START, "tensor = tensor.pin_memory()", "pass", "waits"),
    Mutation("a batch whose copy blocks", START, "non_blocking=True", "non_blocking=False", "waits"),
    Mutation(
        "one pinned buffer for all batches",
        START,
        "tensor = tensor.pin_memory()",
        "tensor = self.__dict__.setdefault(tensor.dtype, tensor.pin_memory()).copy_(tensor)",
        "values",
    ),
    Mutation(
        "a batch that is placed with a wait",
        _place,
        "non_blocking=True",
        "non_blocking=False",
        "waits",
        "pinned, without prefetch",
    ),
    # Numbers that come down late.
    Mutation("a number that is not waited for", Reading.numbers, "done.synchronize()", "pass", "values"),
    Mutation("a number that is read at once", Lagged.push, "> self.lag", "> 0", "waits"),
    Mutation("a number in pageable memory", _send, "pin_memory=True", "pin_memory=False", "waits"),
    Mutation("a number whose copy blocks", _send, "non_blocking=True", "non_blocking=False", "waits"),
    Mutation(
        "an event before the copy of a number",
        _send,
        "host.copy_(source, non_blocking=True)",
        "self._done.append(torch.accelerator.current_stream().record_event()); host.copy_(source, non_blocking=True); "
        "return host",
        "values",
    ),
    Mutation(
        "an event of another stream for a number",
        _send,
        "torch.accelerator.current_stream(source.device)",
        "torch.Stream(source.device)",
        "values",
    ),
    Mutation(
        "a number that another stream copies before it is computed",
        _send,
        "host.copy_(source, non_blocking=True)",
        "main = torch.accelerator.current_stream(); torch.accelerator.set_stream(torch.Stream(source.device)); "
        "host.copy_(source, non_blocking=True); torch.accelerator.set_stream(main)",
        "race",
    ),
    Mutation(
        "one pinned buffer for all numbers",
        _send,
        "torch.empty(source.shape, dtype=source.dtype, pin_memory=True)",
        "vars(Reading._send).setdefault(source.shape, torch.empty(source.shape, dtype=source.dtype, pin_memory=True))",
        "values",
        "NaN guard",
    ),
    Mutation(
        "a host that waits for the whole device",
        Reading.numbers,
        "done.synchronize()",
        "torch.accelerator.synchronize()",
        "waits",
    ),
    Mutation("a series that is read at every value", Unread.add, ">= CHUNK", ">= 1", "waits"),
    # Snapshots of deferred callbacks: cloned, then copied down on a side stream.
    Mutation(
        "a snapshot that does not wait for training",
        _from_accelerator,
        "stream.wait_stream(torch.accelerator.current_stream(device))",
        "pass",
        "race",
        DEFERRED,
    ),
    Mutation("a snapshot of what training changes", _from_accelerator, "source.clone()", "source", "race", DEFERRED),
    Mutation(
        "a snapshot whose clone is not recorded",
        _from_accelerator,
        "kept.record_stream(stream)",
        "pass",
        "race",
        DEFERRED,
    ),
    Mutation("a snapshot that is read at once", Snapshot.ready, "event.synchronize()", "pass", "values", DEFERRED),
    Mutation(
        "a snapshot whose copy blocks", _from_accelerator, "non_blocking=True", "non_blocking=False", "waits", DEFERRED
    ),
    Mutation("a snapshot in pageable memory", _from_accelerator, "pinned=True", "pinned=False", "waits", DEFERRED),
    Mutation(
        "a snapshot without an event",
        _from_accelerator,
        "copying.events.append(stream.record_event())",
        "pass",
        "values",
        DEFERRED,
    ),
    Mutation(
        "an event of another stream for a snapshot",
        _from_accelerator,
        "stream.record_event()",
        "torch.accelerator.current_stream(device).record_event()",
        "values",
        DEFERRED,
    ),
    Mutation(
        "pinned memory that two snapshots get",
        _is_unused,
        "sys.getrefcount(self.buffer) <= self._idle",
        "True",
        "values",
        DEFERRED,
    ),
    # Callbacks that read a number at once.
    Mutation("a metric that reads the loss", Metrics.record, "else loss.detach()", "else loss.item()", "waits"),
    Mutation(
        "an average that reads the loss",
        SmoothLoss.smooth,
        "value = loss.detach()",
        "value = torch.tensor(loss.item())",
        "waits",
        "metrics",
    ),
    Mutation(
        "a guard that reads the loss",
        StopOnNaNLoss.check,
        "if loss is None:",
        "if loss is None or loss != loss:",
        "waits",
    ),
    Mutation(
        "a bar that reads the loss",
        vars(ProgressBar)["_update_values"],
        "if tensors:",
        "if tensors and tensors[0] == tensors[0]:",
        "waits",
        "a progress bar",
    ),
    # Scopes, and what the device decides by itself.
    Mutation(
        "a scope that leaves its stream current", on_stream, "torch.accelerator.set_stream(there)", "pass", "race"
    ),
    Mutation(
        "a NaN that the host looks for",
        NaNGuard.see,
        "value != value",
        "value.new_tensor(bool(value != value))",
        "waits",
    ),
    Mutation("a NaN that nobody looks for", NaNGuard.see, "value != value", "value > value", "values", "NaN guard"),
    Mutation(
        "a norm that the host reads",
        clip_gradients,
        "if value_limit is not None:",
        "if norm is not None and float(norm) >= 0 and value_limit is not None:",
        "waits",
        "clipping",
    ),
    Mutation(
        "a skipped update that the host counts",
        Scaling.unscale,
        "infinite.detach()",
        "infinite.item()",
        "waits",
        "fp16",
    ),
    Mutation(
        "a scale that the host reads",
        TorchCore.step,
        "self.groups.end(names)",
        "self.groups.end(names); self._scaling and self._scaling._scaler.get_scale()",
        "waits",
        "fp16",
    ),
)


@contextmanager
def mutated(mutation: Mutation) -> Generator[None]:
    """Have a mistake in flowtrain."""
    function: Any = inspect.unwrap(mutation.function)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutation.right) == 1, f"{mutation.name}: {mutation.right!r} is not once in {function.__name__}"
    text = source.replace(mutation.right, mutation.wrong)
    flags = future.annotations.compiler_flag
    module = compile(text, inspect.getsourcefile(function) or "", "exec", flags, dont_inherit=True)
    [code] = [each for each in module.co_consts if isinstance(each, CodeType) and each.co_name == function.__name__]
    attributes = dict(vars(function))
    before, function.__code__ = function.__code__, code
    try:
        yield
    finally:
        function.__code__ = before
        vars(function).clear()  # a mutation may keep something there
        vars(function).update(attributes)
