"""Trainings that are run on the CPU and on the simulated device, and must come to the same values to the bit.

`train` builds a learner from a `Training`, fits it, and returns everything that training has left behind as plain
numbers. The model, the data and the optimizer are the same on every device; the optimizer is fused on all of them, as
it is by default on an accelerator.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    Learner,
    LearnerView,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    on,
)
from flowtrain.callbacks import EMA, Metrics, ProgressBar, SmoothLoss
from flowtrain.metrics import accuracy
from flowtrain_dask import DaskExecutor

__all__ = ["TRAININGS", "Training", "learner_of", "outcome", "sums_of", "train"]

EPOCHS = 2
BATCHES = 4
SIZE = 16


class Net(nn.Module):
    """A small network with a normalisation that keeps statistics, for batches of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 24), nn.BatchNorm1d(24), nn.ReLU())
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found


class Images(nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.conv(x.reshape(-1, 5, 2, 2))).mean((2, 3)))
        return found


class Named(NamedTuple):
    """A batch whose inputs are in a dict in a named tuple."""

    inputs: dict[str, Tensor]
    labels: Tensor


class Unpacking(Net):
    """A network that takes its inputs out of a dict."""

    def forward(self, x: Any) -> Tensor:
        return super().forward(x["left"] + x["right"])


def loss_in_float32(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross entropy, computed in float32 whatever autocast does, which differs between devices."""
    return nn.functional.cross_entropy(outputs.float(), targets)


def batches(seed: int = 1, count: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    """Return the same batches every time, on the CPU."""
    numbers = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(SIZE, 20, generator=numbers), torch.randint(3, (SIZE,), generator=numbers)) for _ in range(count)
    ]


def pinning() -> Any:
    """Return a loader that pins its batches."""
    x, y = (torch.cat(each) for each in zip(*batches(), strict=True))
    dataset = torch.utils.data.TensorDataset(x, y)
    return torch.utils.data.DataLoader(dataset, batch_size=SIZE, pin_memory=True)


def nested() -> list[Named]:
    """Return batches of tensors in containers."""
    return [Named({"left": x / 2, "right": x / 3}, y) for x, y in batches()]


def with_nan() -> list[tuple[Tensor, Tensor]]:
    """Return batches, the second of which gives a loss that is NaN."""
    found = batches()
    found[1][0].fill_(float("nan"))
    return found


class Deferred(Callback):
    """Keeps sums over what it reads, later, on copies."""

    deferrable = True

    def __init__(self) -> None:
        self.sums: list[list[float]] = []

    def state_access(self) -> Access:
        return {"batch.loss": Read(), "batch.outputs": Read(), "batch.grads": Read(), "params": Read()}

    @on(BatchEnd, TrainingPhase)
    def add(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        """Add to the sums."""
        self.sums.append(
            [
                float(learner.batch.loss),
                learner.batch.outputs.double().sum().item(),
                sum(each.double().sum().item() for each in learner.batch.grads.values()),
                sum(each.double().sum().item() for each in learner.params.values()),
            ]
        )


def sums_of(learner: Learner) -> Any:
    """Return what `Deferred` has found."""
    found = learner.get_callback("Deferred")
    assert isinstance(found, Deferred)
    return found.sums


def averages_of(learner: Learner) -> Any:
    """Return what `EMA` has found."""
    found = learner.get_callback("EMA")
    assert isinstance(found, EMA)
    return {name: each.tolist() for name, each in found.averages.items()}


@dataclass(frozen=True)
class Training:
    """One way to train.

    Attributes:
        core: What the core is told.
        data: Makes the batches of the training.
        model: Makes the model.
        callbacks: Make the callbacks beside the default ones.
        executor: Makes the executor.
        more: What else is compared.
    """

    core: dict[str, Any] = field(default_factory=dict)
    data: Callable[[], Any] = batches
    model: Callable[[], nn.Module] = Net
    callbacks: Sequence[Callable[[], Callback]] = ()
    executor: Callable[[], Any] = lambda: "serial"
    more: Callable[[Learner], Any] = lambda learner: None


TRAININGS: dict[str, Training] = {
    "the defaults": Training(),
    "without prefetch": Training({"prefetch": False}),
    "without lag": Training({"lag": 0}),
    "a long lag": Training({"lag": 3}),
    "pinned batches": Training(data=pinning),
    "pinned, without prefetch": Training({"prefetch": False}, data=pinning),
    "nested batches": Training(data=nested, model=Unpacking),
    "accumulation": Training({"accumulate": 3}),
    "clipping": Training({"clip_grad_norm": 0.1, "clip_grad_value": 0.05}),
    "bf16": Training({"precision": "bf16"}),
    "fp16": Training({"precision": "fp16", "init_scale": 2.0**20}, more=lambda learner: learner.core.skipped),
    "fp16, accumulated and clipped": Training({"precision": "fp16", "accumulate": 2, "clip_grad_norm": 0.1}),
    "channels last": Training({"channels_last": True}, model=Images),
    "metrics": Training(callbacks=(lambda: Metrics(accuracy), SmoothLoss)),
    "a progress bar": Training(callbacks=(lambda: ProgressBar(redraw=0.0, report=0.0),)),
    "EMA": Training(callbacks=(lambda: EMA(0.8, buffers=True),), more=averages_of),
    "deferred callbacks": Training(
        callbacks=(Deferred,), executor=partial(DaskExecutor, defer="always", parallel="never"), more=sums_of
    ),
    "deferred and accumulated": Training(
        {"accumulate": 2},
        callbacks=(Deferred,),
        executor=partial(DaskExecutor, defer="always", parallel="always"),
        more=sums_of,
    ),
    "NaN guard": Training(data=with_nan, more=lambda learner: (str(learner.stopped), learner.core.finite())),
}


def learner_of(training: Training, device: str, callbacks: Iterable[Callback] = (), **core: Any) -> Learner:
    """Return a learner for a training, on a device, seeded."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"lag": 2, **training.core, **core}
    data = training.data()
    return Learner(
        training.model(),
        loss_in_float32,
        data=(data, [data[0]] if isinstance(data, list) else data),
        optimizer=partial(torch.optim.AdamW, lr=0.01, fused=True),
        callbacks=[*(make() for make in training.callbacks), *callbacks],
        default_callbacks="quiet",
        executor=training.executor(),
        core=TorchCore(device, **options),
    )


def outcome(learner: Learner, more: Any = None) -> dict[str, str]:
    """Return everything that a training has left behind: the text of each value, by its name."""
    found: dict[str, Any] = {f"model {name}": each for name, each in learner.model.state_dict().items()}
    for number, state in enumerate(learner.optimizer.state.values()):
        found |= {f"optimizer {number} {name}": each for name, each in state.items()}
    for kind in ("metrics_step", "metrics_epoch"):
        for phase, series in getattr(learner.cbstate, kind).items():
            found |= {f"{kind} {phase} {name}": list(values) for name, values in series.items()}
    found["more"] = more
    return {name: repr(each.tolist() if isinstance(each, Tensor) else each) for name, each in found.items()}


def train(name: str, device: str, epochs: int = EPOCHS) -> dict[str, str]:
    """Train, and return what is left behind: numbers as text, by where they are; so NaN is equal to NaN."""
    training = TRAININGS[name]
    with learner_of(training, device) as learner, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The loss was NaN", RuntimeWarning)
        learner.fit(epochs)
        return outcome(learner, training.more(learner))
