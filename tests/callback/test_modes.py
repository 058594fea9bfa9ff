"""Modes of modules: eval mode stays, a mode that a handler sets stays set, and a fit puts all other modes back."""

from __future__ import annotations

from collections.abc import Callable as Function
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain import (
    Access,
    BatchEnd,
    Callback,
    EpochBegin,
    EpochEnd,
    Event,
    FitBegin,
    Learner,
    LearnerView,
    Phase,
    TrainingPhase,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callback.modes import Modes
from flowtrain.callback.phases import AbstractTrainingPhase, StepContext
from flowtrain.callbacks import SanityCheck
from flowtrain.diagnostics.lr_finder import find_learning_rate
from flowtrain.testing import tiny_learner
from tests.support.interrupts import interrupted

T, V = TrainingPhase, ValidationPhase
WOKEN = r"^The model is in eval mode, and is trained in train mode, since not all parameters are frozen\. Call "


def tuned() -> Any:
    """Return a model with a backbone, which has batch normalisation and dropout, and a head."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    return nn.Sequential(backbone, nn.Linear(3, 1))


def modes(*modules: nn.Module) -> list[bool]:
    return [each.training for module in modules for each in module.modules()]


class Look(Callback):
    """Notes the modes of some modules at each event of a type, and can call a function at the n-th event of a phase."""

    def __init__(
        self, *modules: nn.Module, event: type[Event] = EpochEnd, at: tuple[type[Phase], int] = (Phase, 0),
        do: Function[[Any], object] = lambda model: None,
    ) -> None:  # fmt: skip
        self.modules, self.event, self.at, self.do = modules, event, (at[0](), at[1]), do
        self.seen: list[tuple[str, list[bool]]] = []
        self.count = 0

    def state_access(self) -> Access:
        return {"model": Write()}

    @on(Event)
    def look(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        if isinstance(event, self.event):
            self.count += phase is self.at[0]
            if (phase, self.count) == self.at:
                self.do(learner.model)
        if isinstance(event, (BatchEnd, EpochBegin)):
            return
        if isinstance(event, EpochEnd):
            self.seen.append((repr(phase)[0], modes(*self.modules)))


def test_a_submodule_in_eval_mode_stays_there() -> None:
    model = tuned()
    backbone, head = model[0].requires_grad_(False).eval(), model[1]
    before = [buffer.clone() for buffer in backbone.buffers()]
    look = Look(model)
    learner = tiny_learner(look, SanityCheck(), model=model, n_batches=3)
    learner.fit(2)
    assert look.seen == [("T", [True, False, False, False, False, True]), ("V", [False] * 6)] * 2
    assert all(torch.equal(one, other) for one, other in zip(before, backbone.buffers(), strict=True))
    assert modes(model) == [True, False, False, False, False, True]
    assert not torch.equal(head.weight, tuned()[1].weight)


def test_batch_normalisation_alone_and_a_head_alone() -> None:
    """After ``model.eval(); head.train()`` only the head trains, although the model itself is in eval mode."""
    model = tuned()
    model[0][1].eval()
    tiny_learner(look := Look(model), model=model, n_batches=1).fit(1)
    assert look.seen[0] == ("T", [True, True, True, False, True, True])
    model.eval()[1].train()
    tiny_learner(look := Look(model), model=model, n_batches=1).fit(1)
    assert look.seen[0] == ("T", [False] * 5 + [True])
    assert modes(model) == [False] * 5 + [True]


def test_a_whole_model_in_eval_mode_is_trained_in_train_mode_and_says_so_once() -> None:
    model = tuned().eval()
    model[0].requires_grad_(False)
    learner = tiny_learner(look := Look(model), model=model, n_batches=1)
    with pytest.warns(UserWarning, match=WOKEN) as caught:
        learner.fit(2)
    assert len(caught) == 1
    learner.fit(1)
    learner.step(TrainingPhase, (torch.ones(2, 1), torch.ones(2, 1)))
    assert look.seen == [("T", [True] * 6), ("V", [False] * 6)] * 3
    assert modes(model) == [False] * 6, "the fit restores the modes"


def test_what_runs_on_copies_says_nothing() -> None:
    learner = tiny_learner(look := Look(), model=tuned().eval(), n_batches=2)
    learner.suggest_access(look)
    learner.audit_syncs()
    find_learning_rate(learner, updates=2)
    with pytest.warns(UserWarning, match=WOKEN):
        learner.fit(1)


class Distil(nn.Module):
    """A loss: the mean squared error to the targets, and to the outputs of a teacher too."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(outputs, targets) + nn.functional.mse_loss(outputs, self.teacher(targets))


def test_a_frozen_teacher_in_the_loss_function_stays_in_eval_mode() -> None:
    teacher = tuned().requires_grad_(False).eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model = tuned()
    learner = tiny_learner(look := Look(model, teacher), model=model, lossfn=Distil(teacher), n_batches=3)
    learner.fit(1)
    assert look.seen == [("T", [True] * 6 + [False] * 6), ("V", [False] * 12)]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert modes(teacher) == [False] * 6


class TeacherPhase(AbstractTrainingPhase):
    """A phase that trains the student on the outputs of the teacher."""

    def step(self, learner: StepContext, raw: Any) -> None:
        with learner.run_batch(self, x=raw[0]) as batch:
            with torch.no_grad():
                wanted = learner.model.teacher(batch.x)
            learner.backward(self, (learner.model.student(batch.x) - wanted).square().mean(), "student")
            learner.update(self, "student")


def distilling(**models: nn.Module) -> tuple[Learner, Look]:
    look = Look(*models.values())
    optimizer = {"student": partial(torch.optim.SGD, lr=0.01)}
    data = {TeacherPhase: [(torch.randn(4, 1), torch.zeros(4, 1))] * 2}
    return tiny_learner(look, model=models, data=data, optimizer=optimizer, default_callbacks=False), look


def test_one_of_several_models_stays_in_eval_mode() -> None:
    student, teacher = tuned(), tuned().requires_grad_(False).eval()
    learner, look = distilling(student=student, teacher=teacher)
    learner.fit(1)
    assert look.seen == [("T", [True] * 6 + [False] * 6)]
    assert modes(student, teacher) == [True] * 6 + [False] * 6
    learner, look = distilling(student=tuned().eval(), teacher=teacher)
    with pytest.warns(UserWarning, match=r"^model 'student' is in eval mode, and is trained in train mode"):
        learner.fit(1)
    assert look.seen == [("T", [True] * 6 + [False] * 6)]


def test_a_model_that_overrides_train_is_asked() -> None:
    class Stays(nn.Sequential):
        """A model whose own `train` keeps its batch normalisation in eval mode."""

        def train(self, mode: bool = True) -> Stays:
            super().train(mode)
            self.get_submodule("0.1").eval()
            return self

    model: Any = Stays(*tuned())
    tiny_learner(look := Look(model), model=model, n_batches=1).fit(1)
    assert look.seen[0] == ("T", [True, True, True, False, True, True])


# --- modes that a handler sets


def unfreeze(model: Any) -> None:
    model[0].requires_grad_(True).train()


@pytest.mark.parametrize("event", [EpochBegin, BatchEnd, EpochEnd])
@pytest.mark.parametrize("phase", [TrainingPhase, ValidationPhase])
def test_unfrozen_in_the_second_epoch_and_from_then_on(event: type[Event], phase: type[Phase]) -> None:
    model = tuned()
    model[0].requires_grad_(False).eval()
    look = Look(model[0], event=event, at=(phase, 2), do=unfreeze)
    learner = tiny_learner(look, model=model, n_batches=1)
    learner.fit(4)
    training = [seen for name, seen in look.seen if name == "T"]
    second = phase is TrainingPhase  # EpochBegin, BatchEnd, EpochEnd: all before `Look` runs
    assert training == [[False] * 4, [second] * 4, [True] * 4, [True] * 4]
    assert [seen for name, seen in look.seen if name == "V"][2:] == [[False] * 4] * 2
    assert modes(model) == [True] * 6
    assert model[0][0].weight.grad is not None


def test_frozen_in_the_second_epoch_and_from_then_on() -> None:
    model = tuned()
    look = Look(model[0][1], event=EpochEnd, at=(TrainingPhase, 2), do=lambda model: model[0][1].eval())
    tiny_learner(look, model=model, n_batches=1).fit(3)
    assert [seen for name, seen in look.seen if name == "T"] == [[True], [False], [False]]
    assert modes(model) == [True, True, True, False, True, True]


def test_set_at_the_beginning_of_the_fit_and_between_fits() -> None:
    model = tuned()
    look = Look(model[0][1], event=FitBegin, at=(Phase, 1), do=lambda model: model[0].eval())
    learner = tiny_learner(look, model=model, n_batches=1)
    learner.fit(1)
    model[0].train()
    learner.fit(1)
    assert [seen for name, seen in look.seen if name == "T"] == [[False], [True]]


def test_direct_calls() -> None:
    model = tuned()
    model[0][1].eval()
    learner = tiny_learner(look := Look(model), model=model, n_batches=1)
    batch = (torch.ones(4, 1), torch.ones(4, 1))
    before = model[0][1].running_mean.clone()
    learner.step(T, batch)
    learner.step(V, batch)
    learner.epoch(T)
    learner.validate()
    assert torch.equal(model[0][1].running_mean, before)
    assert [seen for _, seen in look.seen] == [[True, True, True, False, True, True], [False] * 6]
    assert modes(model) == [True, True, True, False, True, True]


def test_modes_are_back_after_an_error() -> None:
    class Fails(Callback):
        @on(EpochEnd)
        def fail(self, event: EpochEnd, phase: Phase, learner: LearnerView) -> None:
            raise ZeroDivisionError

    model = tuned()
    model[0][1].eval()
    learner = tiny_learner(Fails(), model=model, n_batches=1)
    with pytest.raises(ZeroDivisionError):
        learner.fit(1)
    assert modes(model) == [True, True, True, False, True, True]
    assert learner.core.modes is None


def test_a_phase_with_a_mode_of_its_own() -> None:
    class AsItIs(TrainingPhase):
        """A training phase that leaves the modes of all modules unchanged."""

        def mode(self, modules: Any) -> AbstractContextManager[None]:
            return nullcontext()

    model = tuned().eval()
    look = Look(model, event=EpochEnd, at=(AsItIs, 1), do=unfreeze)
    tiny_learner(look, model=model, data={AsItIs: [(torch.ones(2, 1), torch.ones(2, 1))]}).fit(2)
    assert [seen for _, seen in look.seen] == [[False, True, True, True, True, False]] * 2
    assert modes(model) == [False, True, True, True, True, False]


def test_own_modes_within_a_phase() -> None:
    model = tuned()
    model[0].eval()
    kept = Modes([model], training=False)
    kept.begin()
    model[1].train()
    model[0][0].train()
    assert list(kept.own().values()) == [True, False, True, False, False, True]
    kept.end()
    assert modes(model) == [True, False, True, False, False, True]


def test_an_interrupt_while_the_modes_are_set_does_not_lose_the_own_ones() -> None:
    model = tuned()
    model[0].eval()
    before, begun = modes(model), list[Modes]()

    def begin() -> None:
        begun.append(Modes([model], training=False))
        begun[-1].begin()

    for raised in interrupted(begin, "callback/phases.py", "nn/modules/module.py"):
        assert raised
        for kept in begun:
            kept.end()
        begun.clear()
        assert modes(model) == before
    begun[-1].end()


def test_the_modes_of_the_phase_come_back_after_an_error_within_own_modes() -> None:
    seen: list[bool] = []

    class Fails(Callback):
        @on(BatchEnd, ValidationPhase)
        def fail(self, event: BatchEnd, phase: ValidationPhase, learner: LearnerView) -> None:
            core = learner_of_test.core
            with suppress(ValueError), core.own_modes():
                seen.append(learner_of_test.model.training)
                raise ValueError
            seen.append(learner_of_test.model.training)

    learner_of_test = tiny_learner(Fails(), n_batches=1)
    learner_of_test.model.train()
    learner_of_test.validate()
    assert seen == [True, False]
    assert learner_of_test.model.training
