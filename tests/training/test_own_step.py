"""The parts of a step of one's own: `run_batch`, `backward` and `update`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowtrain import (
    AbstractTrainingPhase,
    BatchBegin,
    CoreError,
    Learner,
    Phase,
    StepContext,
    TrainingPhase,
    UsageError,
)
from flowtrain.testing import tiny_batches
from tests.support.fired import Raise, Watch, short, watched

# --- run_batch


def test_a_step_may_catch_what_a_batch_raises() -> None:
    """Rule 16 holds for a step that goes on after an exception: the batch that raised was closed."""

    class Halves(AbstractTrainingPhase):
        """Try the whole batch; where it does not fit, train on its halves."""

        def step(self, learner: StepContext, raw: Any) -> None:
            try:
                self.train(learner, raw)
            except MemoryError:
                for half in zip(*(tensor.chunk(2) for tensor in raw), strict=True):
                    self.train(learner, half)

        def train(self, learner: StepContext, pair: Any) -> None:
            with learner.run_batch(self, inputs=pair[0], targets=pair[1]) as batch:
                if len(batch.inputs) > 4:
                    raise MemoryError
                loss = learner.lossfn(learner.model(batch.inputs), batch.targets)
                learner.backward(self, loss)
                learner.update(self)

    watch, learner = watched(data={Halves: tiny_batches(n_batches=1)})
    learner.fit(1)
    assert short(watch.names) == "F( E( B( Bx B( B) B( B) E) F)"


def test_a_failing_batch_begin_can_be_caught_too() -> None:
    class Careless(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            try:
                with learner.run_batch(self, inputs=raw):
                    raise AssertionError("the body is not entered")
            except ValueError:
                with learner.run_batch(self, inputs=raw):
                    pass

    watch, learner = watched(Raise(BatchBegin, ValueError("no")), data={Careless: [1]})
    learner.fit(1)
    assert short(watch.names) == "F( E( B( Bx B( B) E) F)"


def test_a_batch_inside_a_batch_is_refused() -> None:
    class Nested(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self), learner.run_batch(self):
                pass

    watch, learner = watched(data={Nested: [1]})
    with pytest.raises(UsageError, match=r"run_batch\(Nested\) was called inside an open batch. Leave that one first"):
        learner.fit(1)
    assert short(watch.names) == "F( E( B( Bx Ex F)"


# --- backward and update


@pytest.mark.parametrize("what", ["backward", "update"])
def test_backward_and_update_need_a_batch(what: str) -> None:
    class Outside(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            loss = learner.model(raw).sum()
            learner.backward(self, loss) if what == "backward" else learner.update(self)

    _, learner = watched(data={Outside: [torch.ones(1)]})
    with pytest.raises(UsageError, match=rf"{what}\(\) needs an open batch. Call it inside `with learner.run_batch"):
        learner.fit(1)


def test_backward_takes_one_number() -> None:
    class Wrong(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self):
                learner.backward(self, learner.model(raw))

    _, learner = watched(data={Wrong: [torch.ones(2)]})
    with pytest.raises(CoreError, match=r"backward\(Wrong, loss\) takes a tensor with one element, got tensor\("):
        learner.fit(1)


def test_update_of_an_optimizer_that_is_not_there() -> None:
    class Wrong(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self):
                learner.update(self, "gen")

    _, learner = watched(data={Wrong: [1]})
    with pytest.raises(CoreError, match="there is no such optimizer; the learner has one without a name"):
        learner.fit(1)


def test_gradients_of_steps_without_update_add_up() -> None:
    """A group of gradients ends with an update, also where a phase decides by itself when to update."""

    class EverySecond(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, inputs=raw[0], targets=raw[1]) as batch:
                learner.backward(self, learner.lossfn(learner.model(batch.inputs), batch.targets))
                learner.cbstate.seen = getattr(learner.cbstate, "seen", 0) + 1
                if learner.cbstate.seen % 2 == 0:
                    learner.update(self)

    data = tiny_batches(n_batches=2)
    _, learner = watched(data={EverySecond: data})
    learner.fit(1)
    coeff = torch.zeros((), requires_grad=True)
    for x, y in data:
        torch.nn.functional.mse_loss(coeff * x, y).backward()
    assert coeff.grad is not None
    assert torch.equal(learner.model.coeff.detach(), -0.1 * coeff.grad)


def test_a_backward_pass_for_an_optimizer_that_is_not_there() -> None:
    class Wrong(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, x=raw) as batch:
                learner.backward(self, learner.model(batch.x).sum(), "gen")

    learner = Learner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, default_callbacks=False)
    with pytest.raises(CoreError, match=r"backward\(name='gen'\): there is no such optimizer"):
        learner.step(Wrong, torch.ones(2, 1))


# --- what a step gets


def test_a_step_gets_what_its_context_documents() -> None:
    seen: dict[str, Any] = {}

    class Looks(AbstractTrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            with learner.run_batch(self, x=raw):
                names = [name for name, value in vars(StepContext).items() if isinstance(value, property)]
                seen.update({name: getattr(learner, name) for name in names})

    _, learner = watched(data={Looks: [torch.ones(2)]})
    learner.fit(1)
    assert {*seen} == {"model", "lossfn", "optimizer", "params", "data", "batch", "cbstate"}
    for name, value in seen.items():
        assert value is getattr(learner, name) or value == getattr(learner, name), name


def test_a_step_that_asks_for_something_else_is_told_what_there_is() -> None:
    class Asks(AbstractTrainingPhase):
        def step(self, learner: Any, raw: Any) -> None:
            learner.get_callback(Watch)

    _, learner = watched(data={Asks: [1]})
    with pytest.raises(AttributeError) as caught:
        learner.fit(1)
    assert str(caught.value) == (
        "A step's learner has no 'get_callback'. It has model, lossfn, optimizer, params, data, batch, cbstate, and "
        "the methods run_batch, forward, backward, update and fire. Other objects that a step needs go into cbstate, "
        "by a callback's setup."
    )


def test_a_bundled_step_that_is_called_by_a_step_of_ones_own_is_the_bundled_one() -> None:
    """The fast form runs where a step is inherited, and where it is called with ``super()``: one training."""

    class Calls(TrainingPhase):
        def step(self, learner: StepContext, raw: Any) -> None:
            super().step(learner, raw)

    def trained(phase: type[Phase]) -> tuple[list[str], torch.Tensor]:
        watch, learner = watched(data={phase: tiny_batches(n_batches=3)})
        learner.fit(2)
        return watch.names, learner.model.coeff.detach()

    (inherited, one), (called, other) = trained(TrainingPhase), trained(Calls)
    assert inherited == called
    assert torch.equal(one, other)
