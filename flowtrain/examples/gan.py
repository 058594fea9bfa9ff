"""Train a GAN, two networks with an optimizer each: ``python -m flowtrain.examples.gan``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader

from flowtrain import AbstractTrainingPhase, Learner, StepContext

__all__ = ["GANPhase", "main"]


class GANPhase(AbstractTrainingPhase):
    """Train the discriminator on real and fake samples, then the generator to deceive it."""

    def step(self, learner: StepContext, raw: Tensor) -> None:
        """Run one batch of real samples, of shape ``(batch, 2)``."""
        lossfn, gen, disc = learner.lossfn, learner.model.gen, learner.model.disc
        with learner.run_batch(self, real=raw) as batch:
            ones, zeros = torch.ones(len(raw), 1).to(batch.real), torch.zeros(len(raw), 1).to(batch.real)
            with learner.forward():
                fake = gen(torch.randn(len(raw), 8).to(batch.real))
                batch.disc_loss = lossfn(disc(batch.real), ones) + lossfn(disc(fake.detach()), zeros)
            learner.backward(self, batch.disc_loss)
            learner.update(self, "disc")
            with learner.forward():
                batch.loss = lossfn(disc(fake), ones)
            learner.backward(self, batch.loss)
            learner.update(self, "gen")


def main(epochs: int = 30) -> Tensor:
    """Train on points of a circle, and return 1,000 points of the generator."""
    torch.manual_seed(0)
    angles = torch.rand(2048) * 2 * torch.pi
    points: Any = torch.stack([angles.cos(), angles.sin()], 1)  # of shape (2048, 2), a dataset as it is
    adam = partial(torch.optim.Adam, lr=2e-3, betas=(0.5, 0.999))
    models = {
        "gen": nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)),
        "disc": nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)),
    }
    learner = Learner(
        models,
        binary_cross_entropy_with_logits,
        data={GANPhase: DataLoader(points, 64, shuffle=True)},
        optimizer={"gen": adam, "disc": adam},
    )
    learner.fit(epochs)
    with torch.no_grad():
        return models["gen"].cpu()(torch.randn(1000, 8))  # type: ignore[no-any-return]  # a tensor


if __name__ == "__main__":
    print(f"The points lie on a circle of radius {main().norm(dim=1).mean():.1f}.")
