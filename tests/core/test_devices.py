"""Devices: which device is used, and how batches get there."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from flowtrain import CoreError, Learner, TorchCore
from flowtrain.core.devices import find_device, to_device

META = torch.device("meta")


class Pair(NamedTuple):
    left: Any
    right: Any


def test_nested_data_goes_to_the_device_and_keeps_its_shape() -> None:
    raw: Any = (
        torch.zeros(2),
        [torch.zeros(3), "text", None],
        {"a": torch.zeros(1), "b": (torch.ones(1), 7)},
        Pair(torch.zeros(4), 2.5),
        OrderedDict(z=torch.zeros(1), y=[torch.zeros(1)]),
    )
    placed = to_device(raw, META)
    assert [type(item) for item in placed] == [Tensor, list, dict, Pair, OrderedDict]
    tensors = [placed[0], placed[1][0], placed[2]["a"], placed[2]["b"][0], placed[3].left, placed[4]["z"]]
    assert {tensor.device.type for tensor in [*tensors, placed[4]["y"][0]]} == {"meta"}
    assert placed[1][1:] == ["text", None]
    assert placed[2]["b"][1] == 7
    assert placed[3].right == 2.5
    assert list(placed[4]) == ["z", "y"]
    assert raw[0].device.type == raw[2]["a"].device.type == "cpu", "the data of the loader is not moved"


def test_objects_that_know_how_to_move_are_asked() -> None:
    class Graph:
        def __init__(self, nodes: Tensor) -> None:
            self.nodes = nodes

        def to(self, device: torch.device) -> Graph:
            return Graph(self.nodes.to(device))

    assert to_device([Graph(torch.zeros(2))], META)[0].nodes.device.type == "meta"
    module = nn.Linear(1, 1)
    assert to_device({"helper": module}, META)["helper"] is module
    assert module.weight.device.type == "cpu", "modules in the data are not moved"
    packed = to_device(pack_sequence([torch.zeros(2), torch.zeros(1)]), META)
    assert isinstance(packed, PackedSequence)
    assert (packed.data.device.type, packed.batch_sizes.device.type) == ("meta", "cpu")


def test_auto_is_the_first_accelerator_or_the_cpu() -> None:
    expected = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert find_device("auto", []) == expected
    assert find_device("auto", [nn.Linear(1, 1, device="meta")]) == expected, (
        "nothing can be trained on the meta device"
    )
    core = TorchCore()
    Learner(nn.Linear(1, 1), mse_loss, default_callbacks=False, core=core)
    assert core.device == expected
    assert repr(core).startswith(f"TorchCore(device={str(expected)!r}, precision='fp32', accumulate=1")


def test_a_model_without_values() -> None:
    with pytest.raises(CoreError, match=r"^Sequential has tensors on the meta device") as raised:
        Learner(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1, device="meta")), mse_loss, default_callbacks=False)
    assert "values: 1.weight, 1.bias, 1.running_mean, 1.running_var, 1.num_batches_tracked. Make" in str(raised.value)
    assert "to_empty(device='" in str(raised.value)


NOT_THERE = ["quux", "hpu", "cuda:99", "meta", None, 2.5]


@pytest.mark.parametrize(
    "device", [*NOT_THERE, pytest.param("privateuseone", marks=pytest.mark.cpu_only("it is the simulated device"))]
)
def test_a_device_that_is_not_there(device: Any) -> None:
    with pytest.raises(CoreError, match=r"^device=.* cannot be used: ") as raised:
        find_device(device, [nn.Linear(1, 1)])
    assert repr(device) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert "This process has: 'cpu'" in str(raised.value)
    assert str(raised.value).endswith(
        "Write one of these, or leave device= out. Another one needs its driver, and a build of torch for it "
        f"(https://pytorch.org/get-started/locally/; this is {torch.__version__})."
    )
    assert raised.value.__cause__ is not None
