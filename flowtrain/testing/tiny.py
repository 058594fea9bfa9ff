"""A learner for tests that is built in a millisecond, and a stand-in for the loop.

::

    def test_counts_batches():
        counter = Counter()
        learner = tiny_learner(counter, n_batches=4)
        learner.fit(2)
        assert counter.seen == 8
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from flowtrain.callback.callback import Callback
from flowtrain.callback.events import Event
from flowtrain.callback.phases import Phase
from flowtrain.callback.view import CheckpointRequest
from flowtrain.core.torch_core import TorchCore
from flowtrain.diagnostics.suggest_access import Recording, record
from flowtrain.graph.clock import Clock
from flowtrain.graph.executor import Mailbox, Runner
from flowtrain.graph.nodes import Node
from flowtrain.graph.plan import Failed, Plan
from flowtrain.learner import Learner
from flowtrain.logging.backend import Run
from flowtrain.state.learner_state import LearnerState

__all__ = ["TinyModel", "TinySite", "record_access", "tiny_batches", "tiny_learner"]


class TinyModel(torch.nn.Module):
    """The model ``y = coeff * x`` with one parameter, which starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.coeff = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``coeff * x``; both have the shape of `x`."""
        return self.coeff * x


def tiny_batches(
    coeff: float = 3.0, n_batches: int = 16, batch_size: int = 8
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return pairs of ``(x, coeff * x)``, each of shape ``(batch_size, 1)``, with the same numbers at every call.

    >>> x, y = tiny_batches(coeff=2.0)[0]
    >>> torch.equal(y, 2 * x)
    True
    """
    generator = torch.Generator().manual_seed(0)  # a separate one, so that a test's own seed is not disturbed
    inputs = [torch.randn(batch_size, 1, generator=generator) for _ in range(n_batches)]
    return [(x, coeff * x) for x in inputs]


def tiny_learner(
    *callbacks: Callback, coeff: float = 3.0, n_batches: int = 16, batch_size: int = 8, **learner_kwargs: Any
) -> Learner:
    """Return a learner that fits ``y = coeff * x`` on the CPU, without output, with the same result every time.

    Args:
        callbacks: The callbacks, before the default ones that do not print.
        coeff: The value that training brings the one parameter to.
        n_batches: The number of batches in an epoch, for training and for validation.
        batch_size: The number of samples in a batch.
        learner_kwargs: Arguments of `Learner`, which replace the ones that are chosen here.

    >>> learner = tiny_learner()
    >>> history = learner.fit(2)
    >>> round(learner.model.coeff.item(), 2)
    3.0
    """
    batches = tiny_batches(coeff, n_batches, batch_size)
    chosen: dict[str, Any] = {
        "data": (batches, batches),
        "optimizer": partial(torch.optim.SGD, lr=0.1),
        "callbacks": callbacks,
        "default_callbacks": "quiet",
        **learner_kwargs,
    }
    chosen.setdefault("core", TorchCore(device="cpu"))  # the same result on a machine with a GPU
    model = chosen.pop("model", None) or TinyModel()
    return Learner(model, chosen.pop("lossfn", torch.nn.functional.mse_loss), **chosen)


def record_access(callback: Callback, *others: Callback, **learner_kwargs: Any) -> Recording:
    """Run a copy of a callback in a `tiny_learner` for one batch of each phase; print and return the access it needs.

    Args:
        callback: The callback, which need not declare any access yet.
        others: Callbacks that write the state that it reads.
        learner_kwargs: Arguments of `tiny_learner`.

    >>> from flowtrain import EpochEnd, LearnerView, on
    >>> class Printer(Callback):
    ...     @on(EpochEnd)
    ...     def show(self, event, phase, learner: LearnerView) -> None:
    ...         self.last = float(learner.batch.loss)
    >>> found = record_access(Printer())
    Printer needs, for all handlers together:
    <BLANKLINE>
        def state_access(self) -> Access:
            return {"batch.loss": Read()}
    <BLANKLINE>
    """
    learner = tiny_learner(*others, **learner_kwargs)
    found = record(learner, callback, "record_access()")
    learner.set_callbacks(())  # frees `others` for another learner, since only copies of them have run
    print(found)
    return found


class TinySite:
    """A stand-in for the loop in tests of executors: a `flowtrain.graph.executor.Site` that records the calls.

    Attributes:
        failures: The failures that `fail` was given, each with the name of the callback.
        drained: The content of `fired` at each call of `drain`.
        swapped: The runners that `swap` was given.
    """

    def __init__(self) -> None:
        self.state = LearnerState()
        self.nodes: Sequence[Node] = ()
        self.run = Run("tiny")
        self.open_sinks = object()
        self.mailbox = Mailbox()
        self.clock: Clock | None = None
        self.failures: list[tuple[str, BaseException]] = []
        self.drained: list[list[tuple[str, Event]]] = []
        self.swapped: list[Runner] = []

    @property
    def fired(self) -> list[tuple[str, Event]]:
        """The events that handlers have fired through views of `state`."""
        return self.state.fired

    @property
    def requests(self) -> list[tuple[str, CheckpointRequest]]:
        """The checkpoints that handlers have requested through views of `state`."""
        return self.state.requests

    def drain(self, phase: Phase) -> None:
        """Record the content of `fired`, and empty `fired` and `requests`."""
        self.drained.append(list(self.fired))
        self.fired.clear()
        self.requests.clear()

    def fail(self, plan: Plan, event: Event, phase: Phase, failures: Sequence[Failed]) -> None:
        """Record the failures instead of raising them."""
        self.failures += [(planned.node.name, failure) for planned, failure in failures]

    def runner(self, event_type: type[Event], phase_type: type[Phase]) -> Runner | None:
        """Return ``None``: tests get their runners from the executor."""
        return None

    def swap(self, plan: Plan, runner: Runner) -> None:
        """Record the runner."""
        self.swapped.append(runner)
