"""The trainings of `bench.bench_lanes` in other libraries, which log in place with the same backend.

Lightning (https://lightning.ai) and ignite (https://pytorch-ignite.ai) are no requirements of flowtrain:
``pip install lightning pytorch-ignite``. Each library has a callback at the end of a batch, in its own idiom. All of
their output and their checkpoints are off.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["Logs", "ignite_fit", "lightning_fit"]

Logs = Callable[[torch.nn.Module, torch.Tensor, int], None]
"""A function of a model, a loss and a step that logs them."""

Batches = Sequence[tuple[torch.Tensor, torch.Tensor]]


def lightning_fit(model: torch.nn.Module, data: Batches, logs: Logs | None, **options: Any) -> Callable[[], object]:
    """Return a function that trains for one epoch in Lightning; `options` are arguments of its trainer."""
    lightning: Any = import_module("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # each fit would print the hardware
    warnings.filterwarnings("ignore", module="lightning")  # and a warning of its own code

    class Module(lightning.LightningModule):  # type: ignore[misc]  # an optional peer is untyped
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            inputs, targets = batch
            return F.cross_entropy(self.model(inputs), targets)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class Logger(lightning.Callback):  # type: ignore[misc]  # an optional peer is untyped
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            if logs is not None:
                logs(model, outputs["loss"], trainer.global_step)

    module = Module()

    def fit() -> None:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"callbacks": [Logger()], **options},
        )
        trainer.fit(module, _Loader(data))

    return fit


class _Loader(Iterable[Any]):
    """A loader of batches in memory, because Lightning would treat a list as several loaders."""

    def __init__(self, data: Batches) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


def ignite_fit(model: torch.nn.Module, data: Batches, logs: Logs | None) -> Callable[[], object]:
    """Return a function that trains for one epoch in ignite."""
    engine: Any = import_module("ignite.engine")

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def update(running: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs, targets = batch
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def log(running: Any) -> None:
        if logs is not None:
            logs(model, running.state.output, running.state.iteration)

    trainer = engine.Engine(update)
    trainer.add_event_handler(engine.Events.ITERATION_COMPLETED, log)

    def fit() -> None:
        trainer.run(data, max_epochs=1)

    return fit
