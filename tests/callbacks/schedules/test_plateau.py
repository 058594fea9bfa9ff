"""`reduce_on_plateau` compared with torch's ReduceLROnPlateau."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowtrain import Phase, UsageError
from flowtrain.callbacks.schedules.plateau import reduce_on_plateau
from tests.support.examples import examples


@settings(max_examples=examples(200))
@given(
    metrics=st.lists(st.sampled_from([-1.0, 0.0, 0.5, 0.99, 1.0, 1.02, 2.0, math.nan, math.inf]), max_size=40),
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(0, 3),
    cooldown=st.integers(0, 3),
    relative=st.booleans(),
    minimum=st.sampled_from([0.0, 0.01]),
)
def test_it_is_torchs(
    metrics: list[float], mode: Literal["min", "max"], patience: int, cooldown: int, relative: bool, minimum: float
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, 0.3, patience, 0.01, "rel" if relative else "abs", cooldown, minimum
    )
    schedule = reduce_on_plateau(
        0.5, mode=mode, factor=0.3, patience=patience, threshold=0.01, relative=relative, cooldown=cooldown,
        minimum=minimum,
    )  # fmt: skip
    plateau = schedule.begin()
    for metric in metrics:
        theirs.step(metric)
        plateau = schedule.after(plateau, metric)
        assert plateau.value == optimizer.param_groups[0]["lr"]
        assert (plateau.best, plateau.bad) == (theirs.best, theirs.num_bad_epochs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 1.0}, "reduce_on_plateau(factor=1.0): factor is above 0 and below 1, such as 0.1."),
        ({"patience": -1}, "reduce_on_plateau(): patience is a whole number, at least 0, got -1."),
        (
            {"mode": "least"},
            "reduce_on_plateau(mode='least'): mode is 'min' if small values of Loss are good, otherwise 'max'.",
        ),
        ({"phase": 3}, "reduce_on_plateau(phase=3) is no phase type. Write phase=ValidationPhase."),
        ({"monitor": "a."}, "reduce_on_plateau(monitor='a.'): monitor is the name of a metric, such as 'Loss'."),
        ({"threshold": -1}, "reduce_on_plateau(threshold=-1): threshold is at least 0, such as 1e-4."),
        ({"value": math.nan}, "reduce_on_plateau(value=nan): value is a finite number, such as 0.1."),
    ],
)
def test_arguments_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"value": 0.1, **options}
    with pytest.raises(UsageError) as caught:
        reduce_on_plateau(**given)
    assert str(caught.value) == message


def test_its_text_names_the_metric() -> None:
    assert repr(reduce_on_plateau(0.1, phase=Phase)) == "reduce_on_plateau(0.1, monitor='Loss')"
