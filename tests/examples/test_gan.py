"""Two examples: a GAN, which needs a step of its own, and a second validation set, which does not.

A phase owns its step. To run the usual step on other data, subclass a phase with an empty body. To run another step,
override ``step``: `run_batch` opens a batch, `forward` is the context of a forward pass, `backward` and `update` do
what their names say and fire their events, so that callbacks work in the new phase as in any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import mse_loss

from flowtrain import (
    AbstractTrainingPhase,
    AbstractValidationPhase,
    Access,
    BatchEnd,
    Callback,
    CoreError,
    EpochEnd,
    Event,
    Learner,
    LearnerView,
    MissingStateError,
    Phase,
    Read,
    StepContext,
    TorchCore,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import Metrics
from tests.support.fired import OODPhase
from tests.support.untyped import untyped

ADAM = partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.999))
LATENT = 2


# --- a GAN


class GANPhase(AbstractTrainingPhase):
    """Train a discriminator, then a generator, on each batch of real samples.

    The loader gives tensors of shape ``(batch, features)``. Each of the two updates has its own `BackwardBegin`,
    `BackwardEnd`, `UpdateBegin` and `UpdateEnd`.
    """

    def step(self, learner: StepContext, raw: Tensor) -> None:
        gen, disc = learner.model.gen, learner.model.disc
        with learner.run_batch(self, real=raw) as batch:
            noise = torch.randn(len(batch.real), LATENT, device=batch.real.device)
            with learner.forward():
                batch.fake = gen(noise)
                # Detached from the generator, which this loss must not train.
                scores = disc(torch.cat([batch.real, batch.fake.detach()]))
                batch.disc_loss = learner.lossfn(scores, self.labels(len(noise), scores))
            learner.backward(self, batch.disc_loss)
            learner.update(self, "disc")
            with learner.forward():
                # The generator is trained to make samples that the discriminator takes for real ones.
                scores = disc(batch.fake)
                batch.gen_loss = learner.lossfn(scores, torch.ones_like(scores))
            learner.backward(self, batch.gen_loss)
            learner.update(self, "gen")
            batch.loss = (batch.disc_loss + batch.gen_loss).detach()

    def labels(self, count: int, like: Tensor) -> Tensor:
        return torch.cat([like.new_ones(count, 1), like.new_zeros(count, 1)])


class Balance(Callback):
    """Keeps both losses of every batch: callbacks work in a user's phase as in any other."""

    def __init__(self) -> None:
        self.losses: list[tuple[float, float]] = []

    def state_access(self) -> Access:
        return {"batch.gen_loss": Read(), "batch.disc_loss": Read()}

    @on(BatchEnd, GANPhase)
    def keep(self, event: BatchEnd, phase: GANPhase, learner: LearnerView) -> None:
        self.losses.append((learner.batch.gen_loss.item(), learner.batch.disc_loss.item()))


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "gen": nn.Sequential(nn.Linear(LATENT, 8), nn.ReLU(), nn.Linear(8, 3)),
        "disc": nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(8, 1)),
    }


def real_samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, generator=generator) + 2 for _ in range(5)]


def train_gan_by_hand(models: dict[str, nn.Module], epochs: int) -> list[tuple[float, float]]:
    gen, disc = models["gen"].train(), models["disc"].train()
    optimizers = {name: ADAM(model.parameters()) for name, model in models.items()}
    losses: list[tuple[float, float]] = []
    for _ in range(epochs):
        for real in real_samples():
            fake = gen(torch.randn(len(real), LATENT))
            optimizers["disc"].zero_grad()
            labels = torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])
            disc_loss = bce(disc(torch.cat([real, fake.detach()])), labels)
            disc_loss.backward()
            optimizers["disc"].step()
            optimizers["gen"].zero_grad()
            scores = disc(fake)
            gen_loss = bce(scores, torch.ones_like(scores))
            gen_loss.backward()
            optimizers["gen"].step()
            losses.append((gen_loss.item(), disc_loss.item()))
    return losses


def test_a_gan_trains_as_one_written_by_hand() -> None:
    by_hand = networks()
    torch.manual_seed(7)
    losses = train_gan_by_hand(by_hand, epochs=3)

    models, balance = networks(), Balance()
    torch.manual_seed(7)
    learner = Learner(
        models,
        bce,
        data={GANPhase: real_samples()},
        optimizer={"gen": ADAM, "disc": ADAM},
        callbacks=[balance],
        default_callbacks="quiet",
        core=TorchCore(device="cpu"),
    )
    learner.fit(3)

    for name, model in models.items():
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, by_hand[name].state_dict()[key]), f"{name}.{key} differs"
    assert balance.losses == losses
    assert learner.model.gen is models["gen"]
    # The default callbacks have no code for GANs, and still count and record every batch.
    counts = learner.cbstate.history[GANPhase]
    assert (counts.epochs, counts.steps, counts.updates) == (3, 15, 30)
    steps = [value for _, value in learner.cbstate.metrics_step[GANPhase]["Loss"]]
    assert steps == pytest.approx([sum(pair) for pair in losses])


def test_the_events_of_a_gan_step() -> None:
    fired: list[str] = []

    class Watch(Callback):
        @on(Event, GANPhase)
        def note(self, event: Event, phase: GANPhase, learner: LearnerView) -> None:
            fired.append(type(event).__name__)

    learner = Learner(
        networks(), bce, optimizer={"gen": ADAM, "disc": ADAM}, callbacks=[Watch()], default_callbacks=False,
        core=TorchCore(device="cpu"),
    )  # fmt: skip
    batch = learner.step(GANPhase, real_samples()[0])
    one_update = ["BackwardBegin", "BackwardEnd", "UpdateBegin", "UpdateEnd"]
    assert fired == ["BatchBegin", *one_update, *one_update, "BatchEnd"]
    assert list(vars(batch)) == ["real", "fake", "disc_loss", "grads", "gen_loss", "loss"]


class GeneratorFirst(GANPhase):
    """Trains the generator first. Its loss leaves gradients in the discriminator, which must be dropped."""

    def step(self, learner: StepContext, raw: Tensor) -> None:
        gen, disc = learner.model.gen, learner.model.disc
        with learner.run_batch(self, real=raw) as batch:
            fake = gen(torch.randn(len(raw), LATENT))
            scores = disc(fake)
            learner.backward(self, learner.lossfn(scores, torch.ones_like(scores)))
            learner.update(self, "gen")
            learner.optimizer.disc.zero_grad()
            scores = disc(torch.cat([raw, fake.detach()]))
            batch.loss = learner.lossfn(scores, self.labels(len(raw), scores))
            learner.backward(self, batch.loss)
            learner.update(self, "disc")


@pytest.mark.cpu_only("the step draws its noise on the CPU")
def test_the_generator_first() -> None:
    by_hand = networks()
    optimizers = {name: ADAM(model.parameters()) for name, model in by_hand.items()}
    torch.manual_seed(7)
    for real in real_samples():
        optimizers["gen"].zero_grad()
        fake = by_hand["gen"](torch.randn(len(real), LATENT))
        scores = by_hand["disc"](fake)
        bce(scores, torch.ones_like(scores)).backward()
        optimizers["gen"].step()
        optimizers["disc"].zero_grad()
        scores = by_hand["disc"](torch.cat([real, fake.detach()]))
        bce(scores, torch.cat([torch.ones(len(real), 1), torch.zeros(len(real), 1)])).backward()
        optimizers["disc"].step()

    models = networks()
    torch.manual_seed(7)
    data = {GeneratorFirst: real_samples()}
    Learner(
        models, bce, data=data, optimizer={"gen": ADAM, "disc": ADAM}, default_callbacks=False,
        core=TorchCore(device="cpu"),
    ).fit(1)  # fmt: skip
    for name, model in models.items():
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, by_hand[name].state_dict()[key]), f"{name}.{key} differs"


def test_the_phases_of_the_library_run_one_model() -> None:
    with pytest.raises(CoreError, match=r"TrainingPhase runs one model, and the learner has gen, disc\. Write a phase"):
        Learner(networks(), bce, data=real_samples(), default_callbacks=False)
    learner = Learner(networks(), bce, default_callbacks=False, core=TorchCore(device="cpu"))
    with pytest.raises(CoreError, match="ValidationPhase runs one model"):
        learner.step(ValidationPhase, None)


def test_a_misspelt_optimizer_is_named() -> None:
    class Misspelt(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self):
                learner.update(self, "dsic")

    learner = Learner(
        networks(), bce, optimizer={"gen": ADAM, "disc": ADAM}, default_callbacks=False, core=TorchCore(device="cpu")
    )
    text = r"update\(name='dsic'\): there is no such optimizer; the learner has 'gen', 'disc'\."
    with pytest.raises(CoreError, match=text):
        learner.step(Misspelt, None)


def test_a_missing_model_is_named() -> None:
    learner = Learner(networks(), bce, default_callbacks=False, core=TorchCore(device="cpu"))
    with pytest.raises(AttributeError, match=r"no model 'dics'; the learner has: gen, disc\. Did you mean 'disc'\?"):
        _ = learner.model.dics
    with pytest.raises(AttributeError, match=r"model\.gen cannot be replaced; pass the models to Learner"):
        learner.model.gen = nn.Identity()


# --- a second validation set


def line(slope: float, offset: float = 0.0) -> list[tuple[Tensor, Tensor]]:
    inputs = torch.linspace(-1, 1, 8).reshape(4, 2, 1)
    return [(x, slope * x + offset) for x in inputs]


def test_a_second_validation_set_is_a_phase_without_a_body() -> None:
    torch.manual_seed(0)
    learner = Learner(
        nn.Linear(1, 1),
        mse_loss,
        data={TrainingPhase: line(2), ValidationPhase: line(2), OODPhase: line(2, offset=1)},
        optimizer=partial(torch.optim.SGD, lr=0.3),
        callbacks=[Metrics(mean_error)],
        default_callbacks="quiet",
        core=TorchCore(device="cpu"),
    )
    learner.fit(20)

    epochs = learner.cbstate.metrics_epoch
    assert epochs[ValidationPhase]["Loss"].last()[1] == pytest.approx(0, abs=1e-4)
    assert epochs[OODPhase]["Loss"].last() == (20, pytest.approx(1, abs=1e-3))
    assert epochs[OODPhase]["MeanError"].last()[1] == pytest.approx(1, abs=1e-3)
    assert learner.cbstate.history[OODPhase].steps == 80
    assert [repr(phase) for phase in learner.data] == ["TrainingPhase", "ValidationPhase", "OODPhase"]
    # The phase runs alone, or together with all phases that do not train:
    learner.epoch(OODPhase)
    learner.validate()
    history = learner.cbstate.history
    assert [history[phase].epochs for phase in (TrainingPhase, ValidationPhase, OODPhase)] == [20, 21, 22]


def mean_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (targets - outputs).mean()


def test_a_handler_for_validation_in_general_hears_of_both() -> None:
    heard: list[str] = []

    class Report(Callback):
        @on(EpochEnd, AbstractValidationPhase)
        def any_validation(self, event: EpochEnd, phase: AbstractValidationPhase, learner: LearnerView) -> None:
            heard.append(f"any: {phase!r}, gradients {torch.is_grad_enabled()}")

        @on(EpochEnd, OODPhase)
        def ours(self, event: EpochEnd, phase: OODPhase, learner: LearnerView) -> None:
            heard.append(f"ours: {phase!r}")

    data: dict[type[Phase], Any] = {TrainingPhase: line(2), ValidationPhase: line(2), OODPhase: line(3)}
    learner = Learner(
        nn.Linear(1, 1), mse_loss, data=data, callbacks=[Report()], default_callbacks=False,
        core=TorchCore(device="cpu"),
    )  # fmt: skip
    learner.fit(1)
    assert heard == ["any: ValidationPhase, gradients False", "ours: OODPhase"]


# --- other data, and events of one's own


class Reconstruct(TrainingPhase):
    """Train an autoencoder: the loader gives inputs, which are the targets too."""

    def split(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        return raw, raw


def test_data_that_is_no_pair_needs_another_split() -> None:
    learner = Learner(
        nn.Linear(3, 3), mse_loss, data={Reconstruct: real_samples()}, default_callbacks="quiet",
        core=TorchCore(device="cpu"), optimizer=partial(torch.optim.Adam, lr=0.1),
    )  # fmt: skip
    learner.fit(30)
    losses = [value for _, value in learner.cbstate.metrics_epoch[Reconstruct]["Loss"]]
    assert losses[-1] < losses[0] / 10


@dataclass(frozen=True)
class Improved(Event):
    """An event for the best loss of an epoch so far. Handlers read its fields without a declaration."""

    loss: float
    before: float


class FindBest(Callback):
    """Fires `Improved` when the loss of an epoch is lower than all before."""

    def state_access(self) -> Access:
        return {"cbstate.metrics_epoch": Read(), "cbstate.best": Write()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.best = float("inf")

    @on(EpochEnd, TrainingPhase)
    def compare(self, event: EpochEnd, phase: TrainingPhase, learner: LearnerView) -> None:
        _, loss = learner.cbstate.metrics_epoch[phase]["Loss"].last()
        if loss < learner.cbstate.best:
            learner.fire(Improved(loss, before=learner.cbstate.best))
            learner.cbstate.best = loss


class Celebrate(Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[Improved, str]] = []

    @on(Improved)
    def cheer(self, event: Improved, phase: Phase, learner: LearnerView) -> None:
        self.seen.append((event, repr(phase)))


def test_an_event_of_ones_own() -> None:
    celebrate = Celebrate()
    learner = Learner(
        nn.Linear(1, 1), mse_loss, data=line(2), callbacks=[celebrate, FindBest()], default_callbacks="quiet",
        core=TorchCore(device="cpu"), optimizer=partial(torch.optim.SGD, lr=0.3),
    )  # fmt: skip
    learner.fit(3)
    losses = [value for _, value in learner.cbstate.metrics_epoch[TrainingPhase]["Loss"]]
    assert celebrate.seen == [
        (Improved(loss, before), "TrainingPhase")
        for loss, before in zip(losses, [float("inf"), *losses[:2]], strict=True)
    ]
    assert learner.cbstate.best == losses[-1]
    with pytest.raises(AttributeError, match="cannot assign to field 'loss'"):
        untyped(celebrate.seen[0][0]).loss = 0.0


class Augmented(Event):
    """An event that a user's step fires, at which callbacks may change the batch."""


class AugmentedPhase(TrainingPhase):
    """Lets callbacks change the inputs before the model gets them."""

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
            learner.fire(Augmented(), self)
            batch.outputs = learner.model(batch.inputs)
            batch.loss = learner.lossfn(batch.outputs, batch.targets)
            learner.backward(self, batch.loss)
            learner.update(self)


def test_a_step_that_fires_an_event_of_its_own() -> None:
    class Double(Callback):
        def state_access(self) -> Access:
            return {"batch.inputs": Write()}

        @on(Augmented, AugmentedPhase)
        def double(self, event: Augmented, phase: AugmentedPhase, learner: LearnerView) -> None:
            learner.batch.inputs = learner.batch.inputs * 2

    learner = Learner(
        nn.Linear(1, 1), mse_loss, callbacks=[Double()], default_callbacks=False, core=TorchCore(device="cpu")
    )
    x, y = line(2)[0]
    batch = learner.step(AugmentedPhase, (x, y))
    assert torch.equal(batch.inputs, 2 * x)


def test_a_phase_that_says_nothing_of_its_state_is_checked_when_it_is_read() -> None:
    class Peek(Callback):
        def state_access(self) -> Access:
            return {"batch.reel": Read()}

        @on(BatchEnd, GANPhase)
        def peek(self, event: BatchEnd, phase: GANPhase, learner: LearnerView) -> None:
            _ = learner.batch.reel

    learner = Learner(
        networks(), bce, optimizer={"gen": ADAM, "disc": ADAM}, callbacks=[Peek()], default_callbacks=False,
        core=TorchCore(device="cpu"),
    )  # fmt: skip
    with pytest.raises(MissingStateError, match=r"batch\.reel .*Did you mean 'real'\?"):
        learner.step(GANPhase, real_samples()[0])
