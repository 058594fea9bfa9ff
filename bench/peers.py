"""The same work in other libraries, each in its own idiom and in the fastest ordinary configuration of it.

``pip install -e ".[dask,peers,plot]"`` installs them; none is a requirement of flowtrain. All of them get
the same batches, which are in memory, and the same network, loss, optimizer and functions at the end of a batch. Their
checkpoints, sanity checks and summaries are off, and so are their logs and bars where the work has none. Each function
imports its library when it is called, and returns a function that trains for all epochs of the work.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

import torch
from torch.nn.functional import cross_entropy

from flowtrain.metrics import accuracy

__all__ = ["PEERS", "AtEnd", "Batches", "Made", "Work", "ignite", "lightning"]

Batches: TypeAlias = list[tuple[torch.Tensor, torch.Tensor]]
AtEnd: TypeAlias = Callable[[torch.nn.Module, torch.Tensor, int], object]
"""A function of the model, the loss and the number of the batch, which is called at the end of each training batch."""


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


@dataclass(frozen=True)
class Work:
    """A training.

    Attributes:
        model: A function that makes the model; its output has a number for each class.
        train: The batches of training, whose targets are numbers of classes.
        valid: The batches of validation.
        optimizer: A function of the parameters.
        epochs: The number of epochs.
        recorded: Whether the loss of each batch is recorded, and a bar is shown.
        accuracy: Whether loss and accuracy are computed for each batch, and their means for each epoch.
        at_end: The functions at the end of each training batch.
    """

    model: Callable[[], torch.nn.Module]
    train: Batches
    valid: Batches | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] = _sgd
    epochs: int = 1
    recorded: bool = False
    accuracy: bool = False
    at_end: Sequence[AtEnd] = ()

    @property
    def batches(self) -> int:
        """The number of batches in all epochs."""
        return self.epochs * (len(self.train) + len(self.valid or ()))


Made: TypeAlias = Callable[[], object]
"""A function that trains for all epochs of a work."""


def lightning(work: Work, **options: Any) -> Made:
    """Lightning: a `LightningModule` with `self.log`; `options` are arguments of the trainer.

    A work without anything to record or call uses ``barebones=True``, the mode for measuring the loop alone.
    """
    library: Any = import_module("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # each fit would print the hardware
    warnings.filterwarnings("ignore", module="lightning")  # and a warning of its own code
    logs = work.recorded or work.accuracy

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = work.model()

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return self._step(batch, "train")

        def validation_step(self, batch: Any, number: int) -> torch.Tensor:
            return self._step(batch, "valid")

        def _step(self, batch: Any, name: str) -> torch.Tensor:
            inputs, targets = batch
            outputs = self.model(inputs)
            loss = cross_entropy(outputs, targets)
            if logs:
                self.log(f"{name}_loss", loss, on_step=True, on_epoch=work.accuracy, prog_bar=work.recorded,
                         batch_size=len(inputs))  # fmt: skip
            if work.accuracy:
                self.log(f"{name}_accuracy", accuracy(outputs, targets), on_step=True, on_epoch=True,
                         batch_size=len(inputs))  # fmt: skip
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return work.optimizer(self.parameters())

    class AtBatchEnd(library.Callback):
        def __init__(self, function: AtEnd) -> None:
            self.function = function

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int) -> None:
            self.function(module.model, outputs["loss"], trainer.global_step)

    chosen: dict[str, Any] = {"max_epochs": work.epochs, "accelerator": "cpu", "callbacks": []}
    if logs or work.at_end:
        chosen |= {"logger": False, "enable_checkpointing": False, "enable_model_summary": False,
                   "enable_progress_bar": work.recorded, "num_sanity_val_steps": 0}  # fmt: skip
    else:
        chosen["barebones"] = True
    module = Module()
    # A list of batches would be several loaders.
    loaders = [_Loader(work.train), *([_Loader(work.valid)] if work.valid else [])]

    def fit() -> None:
        callbacks = [AtBatchEnd(each) for each in work.at_end]
        library.Trainer(**{**chosen, "callbacks": callbacks, **options}).fit(module, *loaders)

    return fit


class _Loader:
    """A loader of batches in memory."""

    def __init__(self, data: Batches) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


def ignite(work: Work) -> Made:
    """Ignite: an `Engine` with a function for a batch, metrics attached to it, and `ProgressBar`."""
    engine: Any = import_module("ignite.engine")
    events = engine.Events
    model = work.model()
    optimizer = work.optimizer(model.parameters())
    losses: list[float] = []

    def update(running: Any, batch: Any) -> Any:
        inputs, targets = batch
        model.train()
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = cross_entropy(outputs, targets)
        loss.backward()
        optimizer.step()
        return (outputs.detach(), targets, loss.item()) if work.accuracy else loss.detach()

    def evaluate(running: Any, batch: Any) -> Any:
        inputs, targets = batch
        model.eval()
        with torch.no_grad():
            outputs = model(inputs)
        return outputs, targets, cross_entropy(outputs, targets).item()

    trainer, evaluator = engine.Engine(update), engine.Engine(evaluate)
    if work.recorded:
        handlers: Any = import_module("ignite.handlers.tqdm_logger")
        trainer.add_event_handler(events.ITERATION_COMPLETED, lambda here: losses.append(here.state.output.item()))
        handlers.ProgressBar().attach(trainer, output_transform=lambda loss: {"loss": loss})
    if work.accuracy:
        metrics: Any = import_module("ignite.metrics")
        for each in (trainer, evaluator):
            metrics.Accuracy(output_transform=lambda output: output[:2]).attach(each, "accuracy")
            metrics.Average(output_transform=lambda output: output[2]).attach(each, "loss")
            each.add_event_handler(events.ITERATION_COMPLETED, lambda running: losses.append(running.state.output[2]))
    if work.valid:
        trainer.add_event_handler(events.EPOCH_COMPLETED, lambda: evaluator.run(work.valid))
    for function in work.at_end:
        trainer.add_event_handler(
            events.ITERATION_COMPLETED,
            lambda running, function=function: function(model, running.state.output, running.state.iteration),
        )
    return lambda: trainer.run(work.train, max_epochs=work.epochs)


def keras(work: Work) -> Made:
    """Keras with torch as its backend: layers of Keras, ``compile`` and ``fit`` on tensors."""
    os.environ["KERAS_BACKEND"] = "torch"
    library: Any = import_module("keras")
    layers: Any = work.model()
    made = [each for each in layers if isinstance(each, torch.nn.Linear)]
    dense = [library.layers.Dense(each.out_features, activation="relu" if each is not made[-1] else None)
             for each in made]  # fmt: skip
    model = library.Sequential([library.Input((made[0].in_features,)), *dense])
    optimizer = work.optimizer([torch.nn.Parameter(torch.zeros(1))])  # for its kind and its learning rate
    kind = {"SGD": library.optimizers.SGD, "AdamW": library.optimizers.AdamW}[type(optimizer).__name__]
    model.compile(
        optimizer=kind(optimizer.param_groups[0]["lr"]),
        loss=library.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["sparse_categorical_accuracy"] if work.accuracy else [],
    )

    class AtBatchEnd(library.callbacks.Callback):
        def __init__(self, function: Callable[[Any, Any], object]) -> None:
            super().__init__()
            self.function = function

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.function(batch, logs)

    losses: list[float] = []

    def calls(function: AtEnd) -> Any:
        return AtBatchEnd(lambda batch, logs: function(model, torch.tensor(logs["loss"]), batch))

    callbacks = list(map(calls, work.at_end))
    if work.recorded or work.accuracy:
        callbacks.append(AtBatchEnd(lambda batch, logs: losses.append(logs["loss"])))
    inputs, targets = (torch.cat(column) for column in zip(*work.train, strict=True))
    valid = tuple(torch.cat(column) for column in zip(*work.valid, strict=True)) if work.valid else None

    options = {"batch_size": len(work.train[0][0]), "shuffle": False, "verbose": 1 if work.recorded else 0}
    return lambda: model.fit(inputs, targets, epochs=work.epochs, validation_data=valid, callbacks=callbacks, **options)


def skorch(work: Work) -> Made:
    """Skorch: a `NeuralNet` on batches in memory; without its scores where nothing is recorded."""
    library: Any = import_module("skorch")
    kinds: Any = import_module("skorch.callbacks")
    helper: Any = import_module("skorch.helper")

    class Data(torch.utils.data.Dataset[Any]):
        def __init__(self, data: Batches) -> None:
            self.data = data

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, place: int) -> Any:
            return self.data[place]

    class AtBatchEnd(kinds.Callback):
        def __init__(self, function: AtEnd) -> None:
            self.function, self.count = function, 0

        def on_batch_end(self, net: Any, batch: Any = None, training: bool = False, **more: Any) -> None:
            if training:
                self.count += 1
                self.function(net.module_, more["loss"], self.count)

    class Scores(kinds.Callback):
        """Records the accuracy of each batch in the history, of which skorch makes the means of epochs."""

        def on_batch_end(self, net: Any, batch: Any = None, training: bool = False, **more: Any) -> None:
            net.history.record_batch("accuracy", accuracy(more["y_pred"], batch[1]).item())

    callbacks: list[Any] = [AtBatchEnd(each) for each in work.at_end]
    callbacks += [Scores()] * work.accuracy
    callbacks += [kinds.ProgressBar()] * work.recorded
    scores = ("train_loss", "valid_loss", "epoch_timer") if not (work.recorded or work.accuracy) else ()
    off = {f"callbacks__{name}": None for name in ("print_log", *scores)}
    group = work.optimizer([torch.nn.Parameter(torch.zeros(1))])
    net = library.NeuralNet(
        work.model(), torch.nn.CrossEntropyLoss, optimizer=type(group), lr=group.param_groups[0]["lr"],
        max_epochs=work.epochs, callbacks=callbacks, iterator_train=_iterator, iterator_valid=_iterator,
        train_split=helper.predefined_split(Data(work.valid)) if work.valid else None, verbose=0,
        **off,
    )  # fmt: skip
    net.initialize()
    data = Data(work.train)

    return lambda: net.partial_fit(data, None)


def _iterator(dataset: Any, **options: Any) -> _Loader:
    return _Loader(dataset.data)  # skorch makes one for all epochs


def torchtnt(work: Work) -> Made:
    """TorchTNT: a unit with `train_step` and `eval_step`, and its callbacks."""
    framework: Any = import_module("torchtnt.framework")
    kinds: Any = import_module("torchtnt.framework.callbacks")
    losses: list[float] = []
    accuracies: list[float] = []

    class Unit(framework.TrainUnit, framework.EvalUnit):
        def __init__(self) -> None:
            super().__init__()
            self.module = work.model()
            self.optimizer = work.optimizer(self.module.parameters())
            self.loss = torch.zeros(())

        def train_step(self, state: Any, batch: Any) -> None:
            inputs, targets = batch
            self.optimizer.zero_grad()
            outputs = self.module(inputs)
            self.loss = cross_entropy(outputs, targets)
            self.loss.backward()
            self.optimizer.step()
            self._record(outputs, targets)

        def eval_step(self, state: Any, batch: Any) -> None:
            inputs, targets = batch
            outputs = self.module(inputs)
            self.loss = cross_entropy(outputs, targets)
            self._record(outputs, targets)

        def _record(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
            if work.recorded or work.accuracy:
                losses.append(self.loss.item())
            if work.accuracy:
                accuracies.append(accuracy(outputs, targets).item())

    class AtBatchEnd(framework.callback.Callback):
        def __init__(self, function: AtEnd) -> None:
            self.function = function

        def on_train_step_end(self, state: Any, unit: Any) -> None:
            self.function(unit.module, unit.loss, unit.train_progress.num_steps_completed)

    logging.getLogger("torchtnt").setLevel(logging.ERROR)
    unit = Unit()
    bar = [kinds.TQDMProgressBar()] if work.recorded else []
    callbacks = [*(AtBatchEnd(each) for each in work.at_end), *bar]

    def fit() -> None:
        unit.train_progress = type(unit.train_progress)()  # or the epochs of the fit before would count
        if work.valid:
            framework.fit(unit, work.train, work.valid, max_epochs=work.epochs, callbacks=callbacks)
        else:
            framework.train(unit, work.train, max_epochs=work.epochs, callbacks=callbacks)

    return fit


def fastai(work: Work) -> Made:
    """Fastai: a `Learner` with a torch optimizer; without its recorder where nothing is recorded."""
    library: Any = import_module("fastai.learner")
    loaders: Any = import_module("fastai.data.core")
    optimizer: Any = import_module("fastai.optimizer")
    progress: Any = import_module("fastai.callback.progress")
    accuracies: list[float] = []

    class AtBatchEnd(library.Callback):
        def __init__(self, function: AtEnd) -> None:
            self.function = function

        def after_batch(self) -> None:
            if self.learn.training:
                self.function(self.learn.model, self.learn.loss, self.learn.train_iter)

    class Accuracies(library.Callback):
        def after_batch(self) -> None:
            accuracies.append(accuracy(self.learn.pred, self.learn.y).item())

    def opt(params: Any, lr: float, **options: Any) -> Any:
        return optimizer.OptimWrapper(params, opt=lambda groups: work.optimizer(groups))

    callbacks = [*(AtBatchEnd(each) for each in work.at_end), *([Accuracies()] if work.accuracy else [])]
    learner = library.Learner(
        loaders.DataLoaders(_Loader(work.train), _Loader(work.valid or [])), work.model(), cross_entropy, opt_func=opt,
        lr=work.optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"], cbs=callbacks,
        metrics=[accuracy] if work.accuracy else None,
    )  # fmt: skip
    if not work.recorded:
        learner.remove_cbs(progress.ProgressCallback)
    if not (work.recorded or work.accuracy):
        learner.remove_cbs(library.Recorder)

    def fit() -> None:
        with learner.no_logging():
            learner.fit(work.epochs)

    return fit


PEERS: dict[str, tuple[str, Callable[[Work], Made]]] = {
    "Lightning": ("lightning", lightning),
    "ignite": ("pytorch-ignite", ignite),
    "Keras": ("keras", keras),
    "skorch": ("skorch", skorch),
    "TorchTNT": ("torchtnt", torchtnt),
    "fastai": ("fastai", fastai),
}
"""The name of each library, the package whose version is printed, and the function that makes its training."""
