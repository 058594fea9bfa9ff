"""Distil a teacher into a student with few labels, by two loaders: ``python -m flowtrain.examples.distillation``."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from flowtrain import Learner, StepContext, TrainingPhase, ValidationPhase
from flowtrain.callbacks import Metrics
from flowtrain.data import CombinedLoader
from flowtrain.metrics import accuracy, mean_squared_error

__all__ = ["Distil", "main"]


class Distil(TrainingPhase):
    """Fit the labels of a few samples, and for many more the scores of the teacher, which the loss function holds."""

    def step(self, learner: StepContext, raw: dict[str, list[torch.Tensor]]) -> None:
        """Run one batch of each loader."""
        (inputs, targets), (more, _) = raw["labelled"], raw["unlabelled"]
        with learner.run_batch(self, inputs=inputs, targets=targets, more=more) as batch:
            with learner.forward():
                soft = mean_squared_error(learner.model(batch.more), learner.lossfn.teacher(batch.more))
                batch.loss = learner.lossfn(learner.model(batch.inputs), batch.targets) + soft
            learner.backward(self, batch.loss)
            learner.update(self)


def main(epochs: int = 20) -> Learner:
    """Train a teacher on 992 labels, distil it with 32 labels, and return the learner of the student."""
    torch.manual_seed(0)
    points = torch.rand(1536, 2) * 2 - 1
    parts = random_split(TensorDataset(points, (points.prod(1) > 0).long()), [32, 992, 512])
    few, many, valid = (DataLoader(part, 32, shuffle=True) for part in parts)
    teacher, student = (nn.Sequential(nn.Linear(2, n), nn.ReLU(), nn.Linear(n, 2)) for n in (128, 32))
    lossfn = nn.CrossEntropyLoss()
    Learner(teacher, lossfn, data=many, default_callbacks="quiet").fit(epochs)
    lossfn.teacher = teacher.requires_grad_(False).eval()
    both = CombinedLoader({"labelled": few, "unlabelled": many}, mode="max_size_cycle")
    learner = Learner(student, lossfn, data={Distil: both, ValidationPhase: valid}, callbacks=[Metrics(accuracy)])
    learner.fit(epochs)
    return learner


if __name__ == "__main__":
    main()
