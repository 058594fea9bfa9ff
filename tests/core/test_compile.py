"""Compilation of the model, or of the model with its loss: names in `state_dict`, and copies of results."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flowtrain import (
    CoreError,
    Learner,
    TorchCore,
    TrainingPhase,
    Write,
)
from flowtrain.callback.events import BatchEnd, LossBegin
from flowtrain.callbacks import CustomCallback
from flowtrain.core.compile import Compiled, has_graphs, original

Pairs = list[tuple[Tensor, Tensor]]


class Net(nn.Sequential):
    """A small network."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(*sizes: int) -> Pairs:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator)) for size in sizes
    ]


class Counted:
    """A loss function that counts its calls outside of a compiled graph."""

    eager = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.eager += 1
        return cross_entropy(outputs, targets)


pytestmark = [
    pytest.mark.cpu_only("torch.compile cannot trace a device that is written in Python"),
    pytest.mark.usefixtures("forget_compilations"),
]


def trained(compile: Any, *callbacks: Any, lossfn: Any = cross_entropy, **options: Any) -> Learner:  # noqa: A002
    learner = Learner(
        options.pop("model", None) or Net(),
        lossfn,
        data=(batches(5, 5, 5), batches(4)),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        callbacks=callbacks,
        default_callbacks="quiet",
        core=TorchCore("cpu", compile=compile, **options),
    )
    learner.fit(2)
    return learner


def assert_close(one: nn.Module, other: nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_model_and_loss_as_one_graph_train_the_same(precision: Any) -> None:
    lossfn = Counted()
    learner = trained({"loss": True, "backend": "aot_eager"}, lossfn=lossfn, precision=precision)
    expected = trained(False, precision=precision)
    rtol, atol = (1e-5, 1e-6) if precision == "fp32" else (0.05, 0.02)
    for name, tensor in learner.model.state_dict().items():
        torch.testing.assert_close(tensor, expected.model.state_dict()[name], rtol=rtol, atol=atol)
    assert lossfn.eager == 0
    assert learner.cbstate.metrics_epoch[TrainingPhase]["Loss"].last()[1] == pytest.approx(
        expected.cbstate.metrics_epoch[TrainingPhase]["Loss"].last()[1], rel=0.02
    )


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("entry", ["outputs", "targets"])
def test_what_a_handler_of_loss_begin_writes_counts(entry: str, in_place: bool) -> None:
    """A loss that was compiled with the outputs is computed again if a handler of LossBegin changes them."""

    def change(view: Any) -> None:
        value = getattr(view.batch, entry)
        if in_place:
            value.data.zero_()
            torch.Tensor.add_(value.detach(), 0)
        else:
            setattr(view.batch, entry, torch.zeros_like(value) if entry == "targets" else value * 0.5)

    def writer() -> CustomCallback:
        return CustomCallback(change, LossBegin, TrainingPhase, {f"batch.{entry}": Write()})

    lossfn = Counted()
    learner = trained({"loss": True, "backend": "eager"}, writer(), lossfn=lossfn)
    assert_close(learner.model, trained(False, writer()).model)
    assert lossfn.eager == 6


def test_names_never_begin_with_the_wrapper() -> None:
    inner = Net()
    compiled = torch.compile(inner, backend="eager")
    assert original(compiled) is inner
    assert original(inner) is inner
    for model in (compiled, Net()):
        learner = trained(False if model is compiled else {"backend": "eager"}, model=model)
        assert learner.model is model
        names = [*learner.core.models[""].state_dict(), *learner.params, *learner.core.grads]
        assert not [name for name in names if "_orig_mod" in name]
        assert set(learner.params) == set(Net().state_dict())
    assert_close(inner, trained(False).model)


def test_results_in_the_same_memory_are_copied_for_who_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs write every result into the same memory; here `Static` does so without CUDA."""
    begun: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    monkeypatch.setattr(torch, "compile", static)
    kept: list[tuple[Tensor, Tensor]] = []
    access = {"batch.outputs": Write(), "batch.loss": Write()}
    for wanted in ({"mode": "reduce-overhead"}, {"mode": "max-autotune", "loss": True}):
        kept.clear()
        keep = CustomCallback(
            lambda view: kept.append((view.batch.outputs, view.batch.loss)), BatchEnd, TrainingPhase, access
        )
        learner = trained(wanted, keep)
        seen = list(learner.cbstate.metrics_step[TrainingPhase]["Loss"])
        assert len({outputs.data_ptr() for outputs, _ in kept}) == len(kept) == 6
        assert [loss.item() for _, loss in kept] == [value for _, value in seen]
        assert len({value for _, value in seen}) == 6
    assert len(begun) == 2 * 8, "each batch, validation too, begins a step"


def static(function: Any, **options: Any) -> Static:
    """Return the function as a stand-in for `torch.compile` would."""
    return Static(function)


class Static:
    """Returns each result of a function in the same memory, with its graph."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.memory: dict[Any, Tensor] = {}

    def __call__(self, *args: Any) -> Any:
        made = self.function(*args)
        return tuple(map(self._same, made)) if isinstance(made, tuple) else self._same(made)

    def _same(self, value: Tensor) -> Tensor:
        memory = self.memory.setdefault((value.shape, value.requires_grad), torch.empty_like(value))

        class Same(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, tensor: Tensor) -> Tensor:
                memory.data.copy_(tensor)
                return memory.data.view_as(memory)

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                return grads[0]

        return Same.apply(value)  # type: ignore[no-untyped-call,no-any-return]  # torch's


@pytest.mark.parametrize(
    ("wanted", "graphs"),
    [
        (True, False),
        ("loss", False),
        ({"mode": "max-autotune-no-cudagraphs"}, False),
        ({"mode": "reduce-overhead"}, True),
        ({"mode": "max-autotune"}, True),
        ({"options": {"triton.cudagraphs": True}}, True),
    ],
)
def test_which_ways_record_graphs(wanted: Any, graphs: bool) -> None:
    assert has_graphs(wanted) is graphs


def test_nothing_of_a_batch_is_kept() -> None:
    [(inputs, targets)] = batches(5)
    made = Compiled({"": Net()}, cross_entropy, {"loss": True, "backend": "eager"}, lambda: targets)
    outputs = made.model(inputs)
    loss = made.lossfn(outputs, targets)
    loss.backward()
    gone = weakref.ref(outputs)
    del outputs, loss
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("loss", [True, False])
def test_cuda_graphs_do_not_change_what_callbacks_keep(loss: bool) -> None:
    kept: list[Tensor] = []
    access = {"batch.outputs": Write()}
    results = []
    for wanted in (False, {"mode": "reduce-overhead", "loss": loss}):
        kept.clear()
        keep = CustomCallback(lambda view: kept.append(view.batch.outputs), BatchEnd, TrainingPhase, access)
        learner = Learner(
            Net(), cross_entropy, data=batches(*[5] * 8), callbacks=[keep], default_callbacks="quiet",
            core=TorchCore("cuda", compile=wanted),
        )  # fmt: skip
        learner.fit(2)
        results.append([outputs.detach().cpu() for outputs in kept])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-3, atol=1e-3)


def test_a_compilation_that_is_refused_leaves_the_core_free() -> None:
    core = TorchCore(device="cpu", compile={"mode": "fast"})
    for _ in range(2):  # the second attempt fails with the same error, not because the core is in use
        with pytest.raises(RuntimeError, match="Unrecognized mode=fast"):
            Learner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, core=core, default_callbacks=False)


def test_compile_is_for_one_model() -> None:
    with pytest.raises(CoreError, match=r"there are several: gen, disc. Pass them compiled: torch.compile\(model\)"):
        Learner({"gen": Net(), "disc": Net()}, cross_entropy, core=TorchCore("cpu", compile=True))


def test_targets_that_were_made_in_inference_mode() -> None:
    """Such tensors have no version counter. Torch lets no backward pass use them, so they are evaluated."""
    with torch.inference_mode():
        targets = torch.randint(3, (4,))
    inputs = torch.randn(4, 6)
    core = TorchCore("cpu", compile={"loss": True, "backend": "eager"})
    learner = Learner(model := Net(), cross_entropy, default_callbacks="quiet", core=core)
    found = learner.evaluate([(inputs, targets)])["Loss"]
    assert found == pytest.approx(cross_entropy(model(inputs), targets.clone()).item())
