"""Training gives the losses of loops that are written by hand, and the recorded ones: three fits, batch by batch.

The losses were recorded with the version of 2026-11-29 and torch 2.13, before the modules of flowtrain became packages;
`main` prints today's. They are computed and compared in double precision: a change of the loop, of a callback or of an
executor that changes training exceeds the tolerance, and the rounding of another processor does not. Another version of
torch may draw other numbers, so with it only the two loops are compared with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    BatchEnd,
    Callback,
    Learner,
    Phase,
    Read,
    TorchCore,
    on,
)
from flowtrain.callbacks import EMA, Checkpointer, Recorder, Scheduler
from flowtrain.callbacks.schedules import one_cycle
from flowtrain.state.hyperparameters import LearningRate

CLASSIFIER = """
    0x1.003912c950e3ep+0 0x1.0d742a3f4f49fp+0 0x1.1598101bf8ad0p+0 0x1.11f2a96571f97p+0 0x1.11df75f6ce6f6p+0
    0x1.226d21315182ap+0 0x1.2db90d2ba849bp+0 0x1.0c59a83aa0716p+0 0x1.00135042e2403p+0 0x1.eb15946258acap-1
    0x1.10bd34a76b074p+0 0x1.0172b941c715ap+0 0x1.9e89feaf58751p-1 0x1.7628fe484198dp-1 0x1.93ebd79fd96b5p-1
    0x1.7c1b2dca7b8a0p-1 0x1.67ef37661a1b6p-1 0x1.b08b4a868b220p-1 0x1.e0130d60ea581p-1 0x1.e241b05fd0ffap-1
    0x1.b5bc04de5d9cdp-1 0x1.8fe26c90f1fcdp-1 0x1.e81b5b9428d9ep-1 0x1.9e1fb634a9cb8p-1 0x1.36d3478eb190fp-1
    0x1.d17da6e17eec2p-2 0x1.184ab0c98903dp-1 0x1.68a011858f417p-1 0x1.964d7b7cd1702p-1 0x1.045ff5dd5d026p-1
    0x1.737b2dddbac29p-1 0x1.b578072ecc1bfp-1 0x1.7aeffa02f6a6fp-1 0x1.46bd0fe32070bp-1 0x1.b8de0c6aec7a9p-1
    0x1.4e4a8f17eab9ep-1
"""
GAN = """
    0x1.7102b2cc5cdcap+0 0x1.6f57375594036p+0 0x1.65f21dc36dcd5p+0 0x1.90047ad6f2d28p+0 0x1.647369b534690p+0
    0x1.4fff86910ce68p+0 0x1.5fc68c159ed34p+0 0x1.5f877fa750cd5p+0 0x1.5fc1f4f3350c4p+0 0x1.873b33d5768cep+0
    0x1.5eb50d970d920p+0 0x1.51533475e2e10p+0
"""


class Losses(Callback):
    """Collects the loss of each batch, also in validation, and raises after some number of batches."""

    def __init__(self, fails_after: int | None = None) -> None:
        self.fails_after = fails_after
        self.values: list[float] = []

    def state_access(self) -> Access:
        return {"batch.loss": Read()}

    @on(BatchEnd)
    def collect(self, event: BatchEnd, phase: Phase, learner: Any) -> None:
        self.values.append(learner.batch.loss.item())
        if len(self.values) == self.fails_after:
            raise RuntimeError(f"after batch {self.fails_after}")

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.values = list(state["values"])


def images() -> Any:
    """Return 48 noisy images of 12 pixels, each with the class that says which third of the pixels is brighter."""
    random = torch.Generator().manual_seed(1)
    classes = torch.randint(3, (48,), generator=random)
    pixels = one_hot(classes, 3).repeat_interleave(4, dim=1) + torch.randn(48, 12, generator=random)
    return list(zip(pixels, classes.tolist(), strict=True))


def loaders() -> tuple[Any, Any]:
    """Return the loaders for training and validation, of 6 batches each."""
    loader: Any = partial(torch.utils.data.DataLoader[Any], images(), batch_size=8)
    return loader(shuffle=True), loader()


def seeded_classifier() -> nn.Sequential:
    """Return a network with dropout and batch norm, and leave the random numbers of torch in a known state."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, 3))


def classifier(losses: Losses, *callbacks: Callback, **options: Any) -> Learner:
    """Return a learner with momentum, accumulation, clipping, a schedule and averaged weights."""
    return Learner(
        seeded_classifier(),
        nn.CrossEntropyLoss(),
        data=loaders(),
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        callbacks=[Recorder(), Scheduler({LearningRate: one_cycle(0.2)}), EMA(0.9), losses, *callbacks],
        core=TorchCore(clip_grad_norm=1.0, accumulate=2),
        default_callbacks=False,
        **options,
    )


def classifier_by_hand(epochs: int = 3) -> list[float]:
    """Return the losses of the same training in plain torch."""
    model, (training, validation) = seeded_classifier(), loaders()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    updates = epochs * len(training) // 2
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=updates, cycle_momentum=False)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    losses: list[float] = []
    for _ in range(epochs):
        model.train()
        for number, (inputs, targets) in enumerate(training, start=1):
            loss = cross_entropy(model(inputs), targets)
            losses.append(loss.item())
            (loss / 2).backward()
            if number % 2 == 0:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                averaged.update_parameters(model)
                if schedule.last_epoch + 1 < updates:
                    schedule.step()
        model.eval()
        weights: dict[str, Tensor] = dict(averaged.module.named_parameters())
        with torch.no_grad():
            for inputs, targets in validation:
                losses.append(cross_entropy(functional_call(model, weights, (inputs,)), targets).item())
    return losses


class GANPhase(AbstractTrainingPhase):
    """Updates a discriminator and then a generator with each batch."""

    def step(self, learner: Any, raw: Tensor) -> None:
        gen, disc = learner.model.gen, learner.model.disc
        with learner.run_batch(self, real=raw) as batch:
            with learner.forward():
                fake = gen(torch.randn(len(batch.real), 2))
                scores = disc(torch.cat([batch.real, fake.detach()]))
                disc_loss = learner.lossfn(scores, torch.cat([torch.ones(8, 1), torch.zeros(8, 1)]))
            learner.backward(self, disc_loss)
            learner.update(self, "disc")
            with learner.forward():
                gen_loss = learner.lossfn(disc(fake), torch.ones(8, 1))
            learner.backward(self, gen_loss)
            learner.update(self, "gen")
            batch.loss = (disc_loss + gen_loss).detach()


def seeded_gan() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """Return a generator, a discriminator and 6 batches, and leave the random numbers of torch in a known state."""
    torch.manual_seed(3)
    gen, disc = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 4)), nn.Linear(4, 1)
    return gen, disc, list(torch.randn(48, 4).split(8))


def gan(losses: Losses, **options: Any) -> Learner:
    """Return a learner that trains two models with two optimizers in a step of its own."""
    gen, disc, batches = seeded_gan()
    adam = partial(torch.optim.Adam, lr=0.01)
    return Learner(
        {"gen": gen, "disc": disc},
        binary_cross_entropy_with_logits,
        data={GANPhase: batches},
        optimizer={"gen": adam, "disc": adam},
        callbacks=[Recorder(), losses],
        default_callbacks=False,
        **options,
    )


def gan_by_hand(epochs: int = 2) -> list[float]:
    """Return the losses of the same training in plain torch."""
    gen, disc, batches = seeded_gan()
    of_gen, of_disc = (torch.optim.Adam(model.parameters(), lr=0.01) for model in (gen, disc))
    losses: list[float] = []
    for real in batches * epochs:
        of_gen.zero_grad()
        of_disc.zero_grad()
        fake = gen(torch.randn(8, 2))
        wanted = torch.cat([torch.ones(8, 1), torch.zeros(8, 1)])
        disc_loss = binary_cross_entropy_with_logits(disc(torch.cat([real, fake.detach()])), wanted)
        disc_loss.backward()
        of_disc.step()
        gen_loss = binary_cross_entropy_with_logits(disc(fake), torch.ones(8, 1))
        gen_loss.backward()
        of_gen.step()
        losses.append((disc_loss + gen_loss).item())
    return losses


@contextmanager
def double() -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    with double():
        yield


def near(losses: Iterable[float]) -> Any:
    return pytest.approx(list(losses), rel=1e-9)


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="recorded with torch 2.13")
@pytest.mark.parametrize(("by_hand", "recorded"), [(classifier_by_hand, CLASSIFIER), (gan_by_hand, GAN)])
def test_the_loops_by_hand_give_the_recorded_losses(by_hand: Callable[[], list[float]], recorded: str) -> None:
    assert by_hand() == near(float.fromhex(number) for number in recorded.split())


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_a_classifier_trains_as_by_hand(executor: str) -> None:
    losses = Losses()
    with classifier(losses, executor=executor) as learner:
        learner.fit(3)
    assert losses.values == near(classifier_by_hand())


@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_a_resumed_fit_trains_as_by_hand(tmp_path: Path, executor: str) -> None:
    checkpointer = partial(Checkpointer, tmp_path, every_steps=3, monitor=None)
    killed = classifier(Losses(5), checkpointer(), executor=executor)
    with killed, pytest.raises(RuntimeError, match="after batch 5"):
        killed.fit(3)
    resumed = Losses()
    with classifier(resumed, checkpointer(), executor=executor) as learner:
        learner.fit(3, resume=tmp_path)
    assert resumed.values == near(classifier_by_hand())


@pytest.mark.cpu_only("the step draws its noise on the CPU")
@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_two_models_train_as_by_hand(executor: str) -> None:
    losses = Losses()
    with gan(losses, executor=executor) as learner:
        learner.fit(2)
    assert losses.values == near(gan_by_hand())


def main() -> None:
    """Print the losses."""
    with double():
        for make, epochs in ((classifier, 3), (gan, 2)):
            losses = Losses()
            make(losses).fit(epochs)
            print(make.__name__, *(value.hex() for value in losses.values), sep="\n")


if __name__ == "__main__":
    main()
