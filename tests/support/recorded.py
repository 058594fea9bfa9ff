"""Callbacks to record. They log what they are given, so that the logs of training and replay can be compared."""

from __future__ import annotations

import enum
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from flowtrain import Access, BatchEnd, Callback, EpochEnd, LearnerView, Phase, Read, TrainingPhase, UpdateBegin, on
from flowtrain.logging import JsonlBackend, Text
from flowtrain.logging.records import log
from tests.support.logs import log_fields


class Everything(Callback):
    """Log all declared values as texts, a random number, and how many events there were."""

    deferrable = True
    stochastic = True

    def __init__(self, path: Path, access: Access) -> None:
        self.backend = JsonlBackend(path)
        self._access = access
        self.access_argument = access
        self.count = 0

    def state_access(self) -> Access:
        return self._access

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "ones": torch.ones(self.count % 3)}

    def load_state_dict(self, state: Any) -> None:
        assert len(state["ones"]) == state["count"] % 3
        self.count = state["count"]

    @on(BatchEnd)
    def at_batch(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        self.show(learner, phase, "batch")

    @on(EpochEnd)
    def at_epoch(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
        self.show(learner, phase, "epoch")

    def show(self, learner: LearnerView, phase: Phase, name: str) -> None:
        self.count += 1
        texts = [f"{path}={shown(looked_up(learner, str(path), phase))}" for path in self._access]
        log(self.backend, Text("\n".join([*texts, shown(torch.rand(2))])), name, self.count, ("Step", repr(phase)))


class Updates(Callback):
    """Log the gradients and the flag of the event before each update."""

    deferrable = True

    def __init__(self, path: Path) -> None:
        self.backend = JsonlBackend(path)

    @on(UpdateBegin, access={"batch.grads": Read(), "cbstate.history": Read()})
    def before(self, event: UpdateBegin, phase: Phase, learner: LearnerView) -> None:
        text = f"{event.in_batch} {shown(learner.batch.grads)}"
        log(self.backend, Text(text), "update", learner.cbstate.history[phase].steps, ("Step", repr(phase)))


def looked_up(learner: Any, path: str, phase: Phase) -> Any:
    """Return the value of a path, as a handler reads it; a path below a map by phase leaves out the phase."""
    for name in path.split("."):
        learner = getattr(learner[phase] if name == "Norm" else learner, name)
    return learner


def shown(value: Any) -> str:
    """Return a text that is the same only for equal values: every bit of a tensor counts."""
    if isinstance(value, torch.nn.Module) or hasattr(value, "state_dict"):
        return f"{shown(value.state_dict())} {value.training}"
    if isinstance(value, torch.Tensor):
        data = bytes(value.detach().cpu().resolve_conj().contiguous().reshape(-1).view(torch.uint8).tolist())
        return f"{tuple(value.shape)} {value.dtype} {zlib.crc32(data)}"
    if hasattr(value, "dtype") and hasattr(value, "tobytes"):
        return f"{value.shape} {value.dtype} {zlib.crc32(value.tobytes())}"
    if hasattr(value, "items"):
        return "{" + ", ".join(f"{key!r}: {shown(each)}" for key, each in value.items()) + "}"
    if isinstance(value, (list, tuple)) or (hasattr(value, "__getitem__") and not isinstance(value, (str, bytes))):
        return f"[{', '.join(map(shown, value))}]"
    return repr(value)


def texts(path: Path) -> list[tuple[Any, ...]]:
    """Return the records of a log without their times."""
    return log_fields(path, "group", "name", "step", "value")


class Color(enum.Enum):
    RED = 1


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Point:
    x: Any
    y: Any = 0


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None), max_size=5), st.binary(),
    st.sampled_from([Color.RED, TrainingPhase(), torch.float32]),
    st.lists(st.floats(width=32), max_size=4).map(torch.tensor),
)  # fmt: skip
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.tuples(inner, inner).map(lambda two: Pair(*two)), st.builds(Point, inner, inner), st.tuples(inner),
    ),
    max_leaves=8,
)  # fmt: skip
