"""Rule 14 as tests: a handler sees the training thread's state of torch, and its context variables."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar

import torch

from flowtrain.callback.events import Event
from flowtrain.callback.phases import TrainingPhase
from flowtrain.callback.view import LearnerView
from flowtrain.testing.probes import KINDS, ContractBase, Ping, Probe

__all__ = ["TorchPromises"]

_mark: ContextVar[str] = ContextVar("flowtrain.testing.mark", default="unset")


class TorchPromises(ContractBase):
    """What an executor promises about the threads that it runs handlers on."""

    def test_rule_14_grad_mode(self) -> None:
        """Rule 14: handlers record gradients where the training thread does, and not where it does not."""
        self._sees(torch.no_grad, torch.is_grad_enabled)

    def test_rule_14_inference_mode(self) -> None:
        """Rule 14: also inference mode, and what it makes of grad mode."""
        self._sees(torch.inference_mode, lambda: (torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        self._sees(lambda: _both(torch.inference_mode(), torch.enable_grad()), torch.is_grad_enabled)

    def test_rule_14_autocast(self) -> None:
        """Rule 14: autocast on or off, its dtype, and its cache."""

        def look() -> object:
            """Return what autocast is set to on this thread."""
            cpu = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
            return *cpu, torch.is_autocast_cache_enabled()

        self._sees(lambda: torch.autocast("cpu", dtype=torch.bfloat16), look)
        self._sees(lambda: torch.autocast("cpu", dtype=torch.float16, cache_enabled=False), look)

    def test_rule_14_default_device_and_dtype(self) -> None:
        """Rule 14: what ``torch.zeros(())`` makes."""
        self._sees(lambda: torch.device("meta"), lambda: torch.zeros(()).device)
        self._sees(lambda: _default_dtype(torch.float64), lambda: torch.zeros(()).dtype)

    def test_rule_14_threads_within_an_operation(self) -> None:
        """Rule 14: the number of intra-op threads, without which a sum differs in its last bits."""
        self._sees(lambda: _intra_op_threads(torch.get_num_threads() + 1), torch.get_num_threads)
        self._sees(lambda: _intra_op_threads(1), torch.get_num_threads)

    def test_rule_14_cuda_device_and_stream(self) -> None:
        """Rule 14: the current CUDA stream, where there is CUDA."""
        if torch.cuda.is_available():
            self._sees(lambda: torch.cuda.stream(torch.cuda.Stream()), lambda: torch.cuda.current_stream())

    def test_rule_14_context_variables(self) -> None:
        """Rule 14: context variables have the values that they have on the training thread."""
        self._sees(lambda: _marked("set"), _mark.get)

    def _sees(self, enter: Callable[[], AbstractContextManager[object]], look: Callable[[], object]) -> None:
        """Fire inside of a context and outside of it, in turns; the handlers, spread if they are, must see the same."""
        trace, seen = self.trace(), dict[str, object]()
        names = [kind.__name__ for kind in KINDS[:4]]

        def note(probe: Probe, event: Event, learner: LearnerView) -> None:
            """Wait for the others, so that no thread takes two, and look."""
            trace.wait_for_start(*names)
            seen[probe.name] = look()

        with self.learner(*(kind(trace, note) for kind in KINDS[:4])) as learner:
            for number in range(self.rounds + 1):
                inside = number % 2 == 1
                trace.clear()
                with enter() if inside else nullcontext():
                    wanted = look()
                    learner.fire(Ping(), TrainingPhase())
                    assert look() == wanted, (
                        f"the training thread had {wanted!r} before the event, and {look()!r} after"
                    )
                where = f"{'inside' if inside else 'outside'} of the context, in round {number + 1}"
                for name in names:
                    assert seen[name] == wanted, (
                        f"{name} saw {seen[name]!r} {where}; the training thread has {wanted!r}"
                    )


@contextmanager
def _both(*contexts: AbstractContextManager[object]) -> Generator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _intra_op_threads(number: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _marked(value: str) -> Generator[None]:
    token = _mark.set(value)
    try:
        yield
    finally:
        _mark.reset(token)
