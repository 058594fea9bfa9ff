"""Every operator gives on the simulated device, under every schedule, what it gives on the CPU, to the bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.accelerator.simulated.machine import SCHEDULES, Machine, Schedule


def _given(device: str) -> dict[str, Tensor]:
    numbers = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(6, 4, generator=numbers).to(device),
        "y": torch.randn(6, 4, generator=numbers).to(device),
        "image": torch.randn(2, 3, 8, 8, generator=numbers).to(device),
        "weight": torch.randn(5, 3, 3, 3, generator=numbers).to(device),
        "index": torch.randint(4, (6,), generator=numbers).to(device),
    }


def _in_place(x: Tensor, y: Tensor) -> Tensor:
    x = x.clone()
    x.add_(y).mul_(2)[1:3].zero_()
    x[:, 0] = 7.0
    x.t()[2].copy_(x.t()[0])
    return x


def _several(x: Tensor, y: Tensor) -> list[Tensor]:
    mine = [x.clone(), y.clone()]
    torch.ops.aten._foreach_add_.List(mine, [y, x], alpha=2)
    return [*mine, *torch.ops.aten._foreach_norm.Scalar(mine)]


def _out(x: Tensor, y: Tensor) -> Tensor:
    found = torch.empty(0, device=x.device)
    torch.add(x, y, out=found)
    return torch.abs(found, out=found)


def _gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the gradients of the parameters of a module, whose input needs none."""
    return list(torch.autograd.grad(module(x).pow(3).sum(), list(module.parameters())))


OPERATORS: dict[str, Callable[..., Any]] = {
    "arithmetic": lambda x, y: x * 2 + y / 3 - 1,
    "matrix product": lambda x, y: x @ y.t(),
    "views": lambda x, y: (x.view(4, 6)[1:, ::2], x.t().reshape(-1), y.unsqueeze(1).expand(6, 3, 4), *x.split(2)),
    "in place": _in_place,
    "several tensors": _several,
    "out": _out,
    "reductions": lambda x: (x.sum(), x.mean(1), x.amax(), x.var(0), x.argmax(1), *x.max(1)),
    "another dtype": lambda x: (x.double(), x.to(torch.bfloat16).float(), x.int(), x > 0),
    "numbers of the host": lambda x: x.sum() * 2.0 + torch.tensor(3.0),
    "where and masks": lambda x, y: (torch.where(x > 0, x, y), x[x > 0], (x > 0).nonzero(), x.unique()),
    "indices": lambda x, index: (x.gather(1, index[:, None]), x[index], nn.functional.one_hot(index)),
    "losses": lambda x, index: (nn.functional.cross_entropy(x, index), nn.functional.mse_loss(x, x * 2)),
    "convolution": lambda image, weight: nn.functional.conv2d(image, weight, padding=1),
    "batch norm": lambda image: nn.functional.batch_norm(image, None, None, training=True),
    "gradients of batch norm alone": lambda x: _gradients(nn.BatchNorm1d(4, device=x.device), x),
    "layer norm": lambda x: nn.functional.layer_norm(x, (4,)),
    "pooling": lambda image: (nn.functional.max_pool2d(image, 2), nn.functional.avg_pool2d(image, 2)),
    "joining": lambda x, y: (torch.cat([x, y]), torch.stack([x, y], 1)),
    "values": lambda x: (x.tolist(), x[0, 0].item(), float(x.sum()), torch.equal(x, x), bool((x > 0).all())),
    "making": lambda x: (torch.arange(5, device=x.device), torch.eye(3, device=x.device), torch.ones_like(x)),
    "sorting": lambda x: (*x.sort(1), *x.topk(2), x.cumsum(0)),
}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.tolist()
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("schedule", ["eager", "lazy", 1])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(machine: Machine, schedule: Schedule, name: str) -> None:
    function = OPERATORS[name]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    found: list[Any] = []
    machine.begin(schedule)
    for device in ("cpu", "sim"):
        given = _given(device)
        found.append(_plain(function(*(given[each] for each in names))))
    assert found[0] == found[1]


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_results_for_tensors_of_other_sizes(device: str) -> None:
    one, large, small = torch.ones(1, device=device), torch.zeros(4, device=device), torch.zeros(1, device=device)
    with pytest.warns(UserWarning, match="An output with one or more elements was resized"):
        torch.add(one, one, out=large)
    with pytest.warns(UserWarning, match="An output with one or more elements was resized"):
        torch.add(large.new_ones(3), one, out=small)
    assert (large.tolist(), small.tolist()) == ([2], [2, 2, 2])


@pytest.mark.parametrize("device", ["cpu", "sim"])
def test_tensors_that_are_resized(device: str) -> None:
    part = torch.arange(4.0, device=device)[2:]
    assert part.resize_(1).tolist() == [2]
    assert part.resize_(2).tolist() == [2, 3]
    assert torch.empty(0, device=device).resize_(2, 3).shape == (2, 3)
    image = torch.zeros(16, device=device).resize_((1, 2, 2, 2), memory_format=torch.channels_last)
    assert image.is_contiguous(memory_format=torch.channels_last)


def test_no_storage_in_use_is_enlarged() -> None:
    with pytest.raises(NotImplementedError, match="enlarges no storage that is in use"):
        torch.ones(2, device="sim").resize_(4)


def test_tensors_of_two_devices() -> None:
    with pytest.raises(RuntimeError, match="at least two devices, sim:0 and cpu"):
        torch.add(torch.ones(3, device="sim"), torch.ones(3))
    with pytest.raises(RuntimeError, match=r"aten::where: its tensors are on sim and on the CPU; move them to one dev"):
        torch.where(torch.ones(3, device="sim") > 0, torch.ones(3), torch.ones(3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))
        return found


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_training_in_plain_torch(machine: Machine, schedule: Schedule, dtype: torch.dtype | None) -> None:
    results: list[Any] = []
    machine.begin(schedule)
    for device in ("cpu", "sim"):
        torch.manual_seed(0)
        model = Net()
        data = [(torch.randn(6, 3, 5, 5), torch.randint(3, (6,))) for _ in range(4)]
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16, init_scale=256.0)
        for x, target in data:
            optimizer.zero_grad()
            with torch.autocast(device, dtype, enabled=dtype is not None):
                outputs = model(x.to(device, non_blocking=True)).float()
            loss = nn.functional.cross_entropy(outputs, target.to(device))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        results.append([each.tolist() for each in model.state_dict().values()])
    assert results[0] == results[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_random_numbers_do_not_depend_on_the_schedule(machine: Machine, schedule: Schedule) -> None:
    found: list[Any] = []
    for each in ("eager", schedule):
        machine.begin(each)
        torch.manual_seed(3)
        x = torch.ones(100, device="sim")
        found.append([nn.functional.dropout(x).tolist(), torch.randn(3, device="sim").tolist()])
        state = torch.get_device_module("sim").get_rng_state()
        first = torch.rand(3, device="sim")
        torch.get_device_module("sim").set_rng_state(state)
        assert torch.equal(first, torch.rand(3, device="sim"))
    assert found[0] == found[1]
    assert set(found[0][0]) == {0.0, 2.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_copies_of_modules_and_files(machine: Machine, schedule: Schedule) -> None:
    machine.begin(schedule)
    model = Net().to("sim")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for each in model.parameters():
            each.add_(1)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine - 1, other) or torch.allclose(mine - 1, other)
        assert mine.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
    file = io.BytesIO()
    torch.save({name: each.cpu() for name, each in model.state_dict().items()}, file)
    file.seek(0)
    model.load_state_dict(torch.load(file))
