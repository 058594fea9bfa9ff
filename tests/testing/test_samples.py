"""Samples: one of each kind, so that the contract of backends leaves none out."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowtrain.logging import loggables
from flowtrain.testing.samples import rounded, samples, single


def test_one_of_each_kind(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    kinds = [type(sample).__name__ for sample in samples(tmp_path)]
    assert sorted(kinds) == sorted(set(loggables.__all__) - {"Group", "Loggable"})


def test_numbers_as_a_sink_with_single_precision_keeps_them() -> None:
    assert single(0.5) == 0.5
    assert single(0.1) != 0.1
    assert rounded([(1, 0.1)]) == [(1, single(0.1))]
