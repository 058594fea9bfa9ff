"""Stopping criteria: whether training should end, judged from one value of each epoch.

====================  ==============================================================  ===========
criterion             stops when                                                      in Prechelt
====================  ==============================================================  ===========
`GL`                  the value is worse than the best by some percent                GL_alpha
`PQ`                  GL is large, compared with the progress of training             PQ_alpha
`UP`                  the value has become worse some times in a row                  UP_s
`Patience`            there was no improvement for some epochs
`NumberSinceBest`     the best value is some epochs old
`NumberLimit`         some number of values have been given
`Threshold`           the value is good enough
`TimeLimit`           some time has passed
`InvalidValue`        a value is NaN or infinite
`Never`               never
`Disjunction`         any of several criteria stops
`Warmup`              another criterion stops, which does not see the first values
====================  ==============================================================  ===========

A criterion is given one value of each epoch (`Criterion.update`), by `flowtrain.callbacks.EarlyStopping` or by a
user's own loop. "Worse" means larger, or smaller after ``Criterion.begin("max")``. NaN is worse than every number: it
is never a best value or an improvement, even if it is the first value.

Sources: L. Prechelt, "Early Stopping - But When?", in Neural Networks: Tricks of the Trade, 1998
(https://doi.org/10.1007/3-540-49430-8_3), and https://github.com/JuliaAI/EarlyStopping.jl. Prechelt looks at the
validation set after *strips* of k epochs, EarlyStopping.jl and these criteria after each; strips are
``throttle(EarlyStopping(UP(3)), EpochEnd, every=k)``.

`criterion` has the base class and the criteria that combine others, `prechelt` the criteria of Prechelt's paper, and
`criteria` the other ones.
"""

from __future__ import annotations

from flowtrain.callbacks.stopping.criteria import (
    InvalidValue,
    NumberLimit,
    NumberSinceBest,
    Patience,
    Threshold,
    TimeLimit,
)
from flowtrain.callbacks.stopping.criterion import Criterion, Disjunction, Never, Warmup
from flowtrain.callbacks.stopping.prechelt import GL, PQ, UP

__all__ = [
    "GL",
    "PQ",
    "UP",
    "Criterion",
    "Disjunction",
    "InvalidValue",
    "Never",
    "NumberLimit",
    "NumberSinceBest",
    "Patience",
    "Threshold",
    "TimeLimit",
    "Warmup",
]
