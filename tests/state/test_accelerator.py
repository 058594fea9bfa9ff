"""Functions for the accelerator if there is none, or one of an unusual kind; `tests/accelerator` has a usual one."""

from __future__ import annotations

import pytest
import torch

from flowtrain.state import accelerator as here
from flowtrain.state.accelerator import (
    accelerator,
    accelerator_kind,
    current_stream,
    has_streams,
    random_states,
    seed,
    set_random_states,
)

without = pytest.mark.skipif(accelerator() is not None, reason="there is an accelerator")


def test_the_cpu_has_no_streams() -> None:
    assert not has_streams(torch.device("cpu"))
    assert not has_streams(torch.device("meta"))


@without
def test_without_an_accelerator() -> None:
    assert accelerator() is None
    assert current_stream() is None
    assert random_states() == []
    set_random_states([torch.zeros(16, dtype=torch.uint8)])  # a state from a machine with an accelerator
    seed(1)


@without
def test_a_torch_that_raises_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(check_available: bool = False) -> None:
        """Raise the error that torch 2.6 raises."""
        raise RuntimeError("Cannot access accelerator device when none is available.")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", raises)
    assert accelerator_kind() is None
    assert current_stream() is None
    assert random_states() == []
    assert not has_streams(torch.device("cuda"))


@without
@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_build_for_an_accelerator_that_is_not_there(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A build of torch for CUDA names the accelerator, even without a driver; every further call of it fails."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    assert accelerator_kind() == kind
    assert accelerator() is None
    assert current_stream() is None
    assert random_states() == []
    set_random_states([torch.zeros(16, dtype=torch.uint8)])
    seed(1)
    probe = vars(here)["_has_streams"].__wrapped__
    assert probe(kind) is False
