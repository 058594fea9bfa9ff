"""Train a classifier, and use its best weights in plain torch: ``python -m flowtrain.examples.classifier``.

Interrupt the program and run it again: it continues where it was.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from flowtrain import Learner, load_weights
from flowtrain.callbacks import Checkpointer, Metrics
from flowtrain.metrics import accuracy

__all__ = ["classify", "make_model", "train"]


def make_model() -> nn.Module:
    """Return a network from ``(batch, 2)`` to two scores for each point."""
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 2))


def train(folder: str = "runs/classifier", epochs: int = 10) -> None:
    """Train, from the beginning or from the latest checkpoint in the folder."""
    torch.manual_seed(0)
    points = torch.rand(512, 2) * 2 - 1
    parts = random_split(TensorDataset(points, (points.prod(1) > 0).long()), [384, 128])
    with Learner(
        make_model(),
        nn.functional.cross_entropy,
        data=(DataLoader(parts[0], 16, shuffle=True), DataLoader(parts[1], 128)),
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        callbacks=[Metrics(accuracy), Checkpointer(folder, monitor="Accuracy")],
    ) as learner:
        learner.fit(epochs, resume="auto")


def classify(points: torch.Tensor, folder: str = "runs/classifier") -> torch.Tensor:
    """Return the classes of points of shape ``(batch, 2)``, by the best weights in the folder."""
    model = make_model().eval()
    model.load_state_dict(load_weights(folder, "best"))
    return model(points).argmax(1)  # type: ignore[no-any-return]  # a tensor


if __name__ == "__main__":
    train()
    print(classify(torch.tensor([[0.5, 0.5], [-0.5, 0.5], [-0.5, -0.5]])))
