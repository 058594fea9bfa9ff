"""The learning-rate finder: the rates that it suggests, and that it leaves the learner unchanged."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import (
    Access,
    BatchBegin,
    Callback,
    Learner,
    LearnerView,
    LearningRateSweep,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    Write,
    find_learning_rate,
    on,
)
from flowtrain.callbacks import EMA, LearningRate, Scheduler, one_cycle
from flowtrain.testing import TinyModel, tiny_batches, tiny_learner
from flowtrain.testing.values import values_in


def plain_sweep(rates: list[float], accumulate: int = 1) -> list[float]:
    """Return the loss at each update of a hand-written loop with these rates."""
    model = TinyModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = iter(tiny_batches(n_batches=16) * 100)
    losses: list[float] = []
    for rate in rates:
        optimizer.zero_grad()
        group: list[float] = []
        for _ in range(accumulate):
            x, y = next(batches)
            loss = torch.nn.functional.mse_loss(model(x), y)
            (loss / accumulate).backward()
            group.append(loss.item())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(sum(group) / accumulate)
    return losses


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_a_loop_with_growing_rates(accumulate: int) -> None:
    learner = tiny_learner(core=TorchCore(device="cpu", accumulate=accumulate))
    sweep = find_learning_rate(learner, start=1e-3, end=0.1, updates=21, smoothing=0.5)
    assert sweep.rates == pytest.approx([1e-3 * 100 ** (n / 20) for n in range(21)], rel=1e-12)
    assert list(sweep.losses) == plain_sweep(list(sweep.rates), accumulate)
    assert not sweep.diverged
    weights = [[0.5**age for age in reversed(range(n))] for n in range(1, 22)]
    expected = [
        sum(w * x for w, x in zip(each, sweep.losses, strict=False)) / sum(each)
        for each in weights
    ]  # fmt: skip
    assert list(sweep.smoothed) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "value"), [("smoothing", "x"), ("divergence", None), ("divergence", 1)])
def test_numbers_of_a_sweep_are_checked(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^find_learning_rate\({name}={value!r}\): "):
        find_learning_rate(tiny_learner(), **{name: value})


def test_it_stops_where_the_loss_has_grown_too_far() -> None:
    sweep = find_learning_rate(tiny_learner(), start=1e-3, end=1e3, smoothing=0.0, divergence=5.0)
    assert sweep.diverged
    assert len(sweep.rates) < 100
    assert sweep.losses[-1] > 5 * min(sweep.losses)
    assert all(after <= 5 * min(sweep.losses[: n + 1]) for n, after in enumerate(sweep.losses[:-1]))


class Doubles(Callback):
    """Changes the data, as a callback for augmentation does."""

    def __init__(self) -> None:
        self.calls = 0

    def state_access(self) -> Access:
        return {"batch.targets": Write()}

    @on(BatchBegin, TrainingPhase)
    def double(self, event: BatchBegin, phase: TrainingPhase, learner: LearnerView) -> None:
        self.calls += 1
        learner.batch.targets = 2 * learner.batch.targets


def test_callbacks_that_shape_training_take_part_and_schedulers_do_not() -> None:
    doubles = Doubles()
    learner = tiny_learner(doubles, EMA(), Scheduler({LearningRate: one_cycle(100.0)}))
    sweep = find_learning_rate(learner, start=1e-3, end=0.01, updates=5)
    assert sweep.losses[0] == pytest.approx(4 * plain_sweep([1e-3])[0])
    assert list(sweep.rates) == pytest.approx([1e-3 * 10 ** (n / 4) for n in range(5)])
    assert doubles.calls == 0
    assert len(learner.cbstate.hyperparams["LearningRate"]) == 0


def test_the_learner_does_not_change() -> None:
    def make() -> Learner:
        torch.manual_seed(3)
        inputs = torch.randn(24, 1)
        dataset = torch.utils.data.TensorDataset(inputs, 3 * inputs)
        generator = torch.Generator().manual_seed(5)
        loader: Any = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True, generator=generator)
        model = torch.nn.Sequential(
            torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(), torch.nn.Linear(4, 1)
        )
        optimizer = partial(torch.optim.AdamW, lr=0.01)
        return tiny_learner(EMA(), model=model, optimizer=optimizer, data=(loader, loader))

    with torch.random.fork_rng():
        one = make()
        one.fit(1)
        python = random.getstate()
        before = dict(
            values_in([one.model, one.optimizer.state_dict(), dict(vars(one.cbstate)), torch.get_rng_state()], "")
        )
        sweep = find_learning_rate(one, updates=30)
        after = dict(
            values_in([one.model, one.optimizer.state_dict(), dict(vars(one.cbstate)), torch.get_rng_state()], "")
        )
        assert before == after
        assert random.getstate() == python
        one.fit(1)
        other = make()
        other.fit(2)
        assert list(one.cbstate.metrics_step[TrainingPhase]["Loss"]) == list(
            other.cbstate.metrics_step[TrainingPhase]["Loss"]
        )
        assert len(sweep.rates) > 20  # the finder has trained


def test_several_optimizers() -> None:
    class Step(TrainingPhase):
        def step(self, learner: Any, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
                output = learner.model.one(batch.inputs) + learner.model.two(batch.inputs)
                batch.loss = learner.lossfn(output, batch.targets)
                learner.backward(self, batch.loss)
                learner.update(self, "one")
                learner.update(self, "two")

    sgd = partial(torch.optim.SGD, lr=0.1)
    learner = tiny_learner(
        model={"one": TinyModel(), "two": TinyModel()},
        optimizer={"one": sgd, "two": partial(torch.optim.SGD, lr=0.0)},
        data={Step: tiny_batches()},
    )
    sweep = find_learning_rate(learner, optimizer="one", start=1e-3, end=0.1, updates=21)
    assert list(sweep.losses) == plain_sweep(list(sweep.rates))  # the other optimizer does not train


VALLEY = LearningRateSweep(
    rates=[10.0**n for n in range(-6, 2)],
    losses=[4.0] * 8,
    smoothed=[4.0, 4.1, 3.9, 3.0, 1.0, 0.5, 0.6, 9.0],
    diverged=True,
)


def test_suggestions() -> None:
    assert VALLEY.steepest == 1e-3  # the loss falls from 3.9 to 1.0 around this rate
    assert VALLEY.valley == 1e-3  # the losses are 4.1, 3.9, 3.0, 1.0, 0.5: the third is the middle one
    assert VALLEY.minimum == 1e-2  # a tenth of the best rate, 0.1


def test_what_has_not_settled_is_not_looked_at() -> None:
    sweep = LearningRateSweep(
        [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.0] * 7, [99.0, 9.0, 8.0, 7.9, 6.0, 5.9, 7.0], True, 2
    )
    assert sweep.steepest == 4.0
    assert sweep.valley == 4.0
    sweep = LearningRateSweep([1.0, 2.0, 3.0], [1.0] * 3, [9.0, 1.0, 2.0], True, 1)
    with pytest.raises(UsageError):
        _ = sweep.minimum


@pytest.mark.parametrize("name", ["steepest", "valley", "minimum"])
def test_a_loss_that_does_not_fall(name: str) -> None:
    sweep = LearningRateSweep([0.1, 0.2, 0.4], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0], False)
    with pytest.raises(UsageError) as caught:
        getattr(sweep, name)
    assert str(caught.value) == (
        f"There is no {name} learning rate: over 3 updates with rates from 0.1 to 0.4 the loss did not fall. Look at "
        f"plot(); sweep over lower rates, or with more updates."
    )


def test_plot_shows_losses_and_suggestions(tmp_path: Path) -> None:
    figure = VALLEY.plot(to=tmp_path / "new" / "sweep.png")
    [axes] = figure.axes
    losses, smoothed, *suggestions = axes.lines
    assert list(losses.get_xdata()) == VALLEY.rates
    assert list(losses.get_ydata()) == VALLEY.losses
    assert list(smoothed.get_ydata()) == VALLEY.smoothed
    assert [line.get_xdata()[0] for line in suggestions] == [1e-3, 1e-3, 1e-2]
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()][2:] == [
        "steepest: 0.001", "valley: 0.001", "minimum: 0.01",
    ]  # fmt: skip
    assert (tmp_path / "new" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    flat = LearningRateSweep([0.1, 0.2], [1.0, 2.0], [1.0, 2.0], False)
    assert len(flat.plot().axes[0].lines) == 2


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"is not installed: pip install 'flowtrain\[plot\]'"):
        VALLEY.plot()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: find_learning_rate(tiny_learner(), start=1.0, end=0.1),
            "find_learning_rate(start=1.0, end=0.1): 0 < start < end, as 1e-7 and 10.0.",
        ),
        (
            lambda: find_learning_rate(tiny_learner(), updates=1),
            "find_learning_rate(): updates is a whole number, at least 2, got 1.",
        ),
        (
            lambda: find_learning_rate(tiny_learner(), smoothing=1.0),
            "find_learning_rate(smoothing=1.0): smoothing is at least 0 and below 1, such as 0.9.",
        ),
        (
            lambda: find_learning_rate(tiny_learner(), divergence=1.0),
            "find_learning_rate(divergence=1.0): divergence is a number above 1.",
        ),
        (
            lambda: find_learning_rate(tiny_learner(data={ValidationPhase: tiny_batches()})),
            "find_learning_rate() needs data to train on. Pass data=(train_loader, valid_loader) to Learner.",
        ),
        (
            lambda: find_learning_rate(tiny_learner(data=iter(tiny_batches()))),
            "The data for TrainingPhase is an iterator: the sweep would use it up. Pass a list, a DataLoader, or "
            "anything that can be iterated again.",
        ),
        (
            lambda: find_learning_rate(tiny_learner(data=[(torch.full((2, 1), float("nan")), torch.ones(2, 1))])),
            "find_learning_rate(): the loss of the first update, with the rate 1e-07, is not finite. Look for NaN in "
            "the data and in the model's parameters.",
        ),
    ],
)
def test_what_means_nothing(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        make()
    assert str(caught.value) == message
