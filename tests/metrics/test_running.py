"""Running: a torchmetrics object that accumulates, is saved, and is merged with those of other ranks."""

from __future__ import annotations

import warnings

import torch

from flowtrain.metrics.running import Running
from tests.support.accelerator import DEVICE, needs_accelerator

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing torchmetrics warns about what it finds installed
    import torchmetrics
    from torchmetrics import classification, regression


def test_a_torchmetrics_object_goes_on_where_another_was() -> None:
    metric = torchmetrics.MeanMetric()
    first, second = Running(metric, "Mean"), Running(metric, "Mean")
    first.update(torch.tensor(1.0), torch.tensor(1.0))
    first.update(torch.tensor(2.0), torch.tensor(1.0))
    second.load_state_dict(*first.state_dict())
    second.update(torch.tensor(6.0), torch.tensor(1.0))
    assert second.compute() == 3.0
    assert (second.updates, second.total.update_count) == (3, 3)


def test_what_a_checkpoint_of_the_first_format_holds() -> None:
    metric = torchmetrics.MeanMetric()
    second = Running(metric, "Mean")
    second.load_state_dict([({"mean_value": torch.tensor(3.0), "weight": torch.tensor(2.0)}, [2])], 2)
    second.update(torch.tensor(6.0), torch.tensor(1.0))
    assert (second.compute(), second.updates, second.total.update_count) == (3.0, 3, 3)


def test_its_state_is_on_the_device_of_what_it_is_given_also_after_a_resume() -> None:
    """The meta device stands for an accelerator: it computes nothing, but torch checks that devices agree."""
    metric, batch = regression.MeanSquaredError(), torch.zeros(3, device="meta")
    first = Running(metric, "Error", on_step=True)
    first.update(batch, batch)
    assert first.total.sum_squared_error.device.type == "meta"
    on_cpu = Running(metric, "Error", on_step=True)
    on_cpu.update(torch.zeros(3), torch.zeros(3))
    second = Running(metric, "Error", on_step=True)
    second.load_state_dict(*on_cpu.state_dict())
    second.update(batch, batch)
    assert second.value_of(batch, batch).device.type == second.total.sum_squared_error.device.type == "meta"


@needs_accelerator
def test_a_rank_without_a_batch_takes_the_device_of_the_others() -> None:
    batch = torch.zeros(3, device=DEVICE)
    first, second = Running(regression.MeanSquaredError(), "Error"), Running(regression.MeanSquaredError(), "Error")
    first.update(batch, batch)
    state = first.rank_state()
    second.merge_ranks([None, state, state])
    assert (second.updates, second.total.update_count) == (2, 2)
    assert second.total.sum_squared_error.device.type == torch.device(DEVICE).type


def test_without_any_batch_there_is_nothing_to_merge() -> None:
    running = Running(torchmetrics.MeanMetric(), "Mean")
    assert running.rank_state() is None
    running.merge_ranks([None, None])
    assert running.updates == 0


def test_a_state_that_is_one_tensor_of_all_values_is_joined() -> None:
    """Lists of values become one tensor where an object has been synchronised by hand, or is written so."""

    class Joined(torchmetrics.Metric):
        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("seen", default=torch.zeros(0), dist_reduce_fx="cat")

        def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
            self.seen: torch.Tensor = torch.cat([self.seen, outputs])

        def compute(self) -> torch.Tensor:
            return self.seen.sum()

    ranks = [Running(Joined(), "Joined") for _ in range(2)]
    ranks[0].update(torch.tensor([1.0, 2.0]), torch.zeros(2))
    ranks[1].update(torch.tensor([4.0]), torch.zeros(1))
    states = [rank.rank_state() for rank in ranks]
    for rank in ranks:
        rank.merge_ranks(states)
        assert rank.total.seen.tolist() == [1.0, 2.0, 4.0]
        assert rank.compute() == 7.0


def test_members_of_a_collection_that_share_their_state() -> None:
    def make() -> Running:
        members = [classification.MulticlassPrecision(3), classification.MulticlassRecall(3)]
        return Running(torchmetrics.MetricCollection(members), "Both")

    outputs, targets = torch.eye(3), torch.tensor([0, 1, 1])
    whole, ranks = make(), [make(), make(), make()]
    for each in (whole, ranks[0], ranks[0], ranks[2]):
        each.update(outputs, targets)
    whole.update(outputs, targets)
    whole.update(outputs, targets)
    states = [rank.rank_state() for rank in ranks]
    for rank in ranks:
        rank.merge_ranks(states)
        assert rank.compute() == whole.compute()
        rank.reset()
        rank.update(outputs, targets)  # the next epoch
        alone = make()
        alone.update(outputs, targets)
        assert rank.compute() == alone.compute()
