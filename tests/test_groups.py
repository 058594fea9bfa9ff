"""Accumulation groups: when one is due, what a short one is multiplied with, and whose gradients are zeroed when."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flowtrain.groups import Groups

Params = dict[str, nn.Parameter]


def groups_of(size: int, *names: str) -> tuple[Groups, Params]:
    """Groups of one optimizer for each name, each with one parameter."""
    params = {name: nn.Parameter(torch.ones(1)) for name in names}
    return Groups({name: torch.optim.SGD([param], lr=1.0) for name, param in params.items()}, size), params


def backward(params: Params) -> None:
    for param in params.values():
        param.grad = torch.ones(1) if param.grad is None else param.grad + 1


def grads(params: Params) -> list[float | None]:
    return [None if param.grad is None else param.grad.item() for param in params.values()]


@settings(deadline=None)
@given(size=st.integers(1, 6), total=st.integers(1, 20))
def test_every_group_is_full_but_the_last(size: int, total: int) -> None:
    """Each update has the gradients of its own group, in full, also where the last group is shorter."""
    groups, params = groups_of(size, "")
    updates = []
    for number in range(1, total + 1):
        groups.last_batch = number == total
        groups.begin()
        backward(params)
        names = groups.due()
        if names:
            [gradient] = grads(params)
            updates.append((number, gradient, groups.share("")))
            groups.end(names)
        assert groups.open == (not names)
    whole, rest = divmod(total, size)
    expected = [(size * (each + 1), float(size), 1.0) for each in range(whole)]
    assert updates == [*expected, *([(total, float(rest), size / rest)] if rest else [])]


def test_a_group_of_each_optimizer() -> None:
    groups, params = groups_of(2, "gen", "disc")
    groups.begin()
    backward(params)
    assert groups.due("disc") == []
    groups.begin()  # neither begins anew: the gradients add up
    backward(params)
    assert grads(params) == [2.0, 2.0]
    assert groups.due() == ["disc"]
    groups.end(["disc"])
    assert groups.open
    groups.begin()
    assert grads(params) == [2.0, None]


def test_spent_gradients_are_dropped_once() -> None:
    """A second backward pass in a batch must not add to what the optimizer has stepped with."""
    groups, params = groups_of(1, "gen", "disc")
    groups.begin()
    backward(params)
    groups.end(groups.due("disc"))
    groups.drop_spent()
    assert grads(params) == [1.0, None]
    backward(params)
    groups.drop_spent()
    assert grads(params) == [2.0, 1.0]


@pytest.mark.parametrize("before", [1, 2])
def test_what_is_discarded_counts_no_more(before: int) -> None:
    groups, params = groups_of(3, "")
    for _ in range(before):
        groups.begin()
        backward(params)
        assert groups.due() == []
    groups.discard()
    assert not groups.open
    assert grads(params) == [None]
    for due in ([], [], [""]):
        groups.begin()
        backward(params)
        assert groups.due() == due
    assert grads(params) == [3.0]
