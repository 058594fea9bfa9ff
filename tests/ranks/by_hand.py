"""Trainings on several ranks as they are written by hand with DDP, with which those of flowtrain are compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from flowtrain.testing.values import values_in
from tests.support.ranks import rank

__all__ = ["Batches", "classes", "differing", "points", "train", "train_gan", "trained"]

Batches = Sequence[tuple[Tensor, Tensor]]


def classes(count: int = 8, of_rank: int | None = None, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of a rank, by default of this one: inputs of shape ``(size, 12)``, and one of 4 classes."""
    random = torch.Generator().manual_seed(100 + (rank() if of_rank is None else of_rank))
    return [
        (torch.randn(size, 12, generator=random), torch.randint(4, (size,), generator=random)) for _ in range(count)
    ]


def points(count: int = 6) -> list[Tensor]:
    """Return the batches of this rank for a GAN, of shape ``(6, 2)``."""
    random = torch.Generator().manual_seed(200 + rank())
    return [torch.randn(6, 2, generator=random) for _ in range(count)]


def train(
    model: nn.Module,
    make_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    epochs: Iterable[Batches],
    accumulate: int = 1,
    clip: float | None = None,
) -> Optimizer:
    """Train a model with DDP and cross entropy.

    Args:
        model: The model.
        make_optimizer: Makes the optimizer of the parameters.
        epochs: The batches of this rank for each epoch.
        accumulate: The number of batches in an update. The gradients of a shorter group at the end of an epoch are
            divided by its own length.
        clip: The largest norm of the gradients.
    """
    model.train()
    parallel, optimizer = DistributedDataParallel(model), make_optimizer(model.parameters())
    for batches in epochs:
        for first in range(0, len(batches), accumulate):
            group = batches[first : first + accumulate]
            optimizer.zero_grad()
            for inputs, targets in group:
                last = targets is group[-1][1]
                with nullcontext() if last else parallel.no_sync():
                    loss = cross_entropy(parallel(inputs), targets)
                    (loss / accumulate).backward()
            if len(group) < accumulate:
                for param in model.parameters():
                    if param.grad is not None:
                        param.grad.mul_(accumulate / len(group))
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return optimizer


def train_gan(
    gen: nn.Module, disc: nn.Module, make_optimizer: Callable[[Any], Optimizer], epochs: Iterable[Sequence[Tensor]]
) -> dict[str, Optimizer]:
    """Train a generator and a discriminator, whose gradients are averaged one by one before each update."""
    optimizers = {name: make_optimizer(each.parameters()) for name, each in (("gen", gen), ("disc", disc))}
    lossfn, ones, zeros = binary_cross_entropy_with_logits, torch.ones(6, 1), torch.zeros(6, 1)
    for real in (batch for batches in epochs for batch in batches):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        fake = gen(torch.randn(6, 8))
        (lossfn(disc(real), ones) + lossfn(disc(fake.detach()), zeros)).backward()
        _average(disc)
        optimizers["disc"].step()
        lossfn(disc(fake), ones).backward()
        _average(gen)
        optimizers["gen"].step()
    return optimizers


def _average(model: nn.Module) -> None:
    for param in model.parameters():
        assert param.grad is not None
        dist.all_reduce(param.grad)
        param.grad.div_(dist.get_world_size())


def trained(model: Any, optimizer: Any) -> dict[str, Any]:
    """Return what training has changed: parameters, buffers, and the state of the optimizer, by path and as bits."""
    found = {"params": dict(model.named_parameters()), "buffers": dict(model.named_buffers())}
    found["optimizer"] = optimizer.state_dict()["state"]
    return {path: leaf.bits for path, leaf in values_in(found, "")}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the paths whose values differ, or exist on one side only."""
    return sorted(path for path in {*one, *other} if one.get(path, ...) != other.get(path, ...))
