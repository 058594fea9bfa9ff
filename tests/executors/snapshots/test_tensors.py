"""Rule 21: copies of tensors, each kind as what it is, detached and in its strides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from flowtrain_dask.snapshots.copiers import COPIERS
from flowtrain_dask.snapshots.copying import Copying, Refused
from flowtrain_dask.snapshots.pool import Pool
from flowtrain_dask.snapshots.tensors import compressed_indices, copy_tensor, copy_tensors
from tests.support.copies import copied, tensor

QUANTISED = pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex32,
          torch.float8_e4m3fn, torch.int8, torch.uint8, torch.uint16, torch.int64, torch.bool)  # fmt: skip


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype(dtype: torch.dtype) -> None:
    source = torch.arange(600).remainder(2).to(dtype)
    expected = source.clone()
    found = copied(source)
    source.zero_()
    assert found.dtype == dtype
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


SHAPES: dict[str, Callable[[], torch.Tensor]] = {
    "0-d": lambda: torch.tensor(3.0),
    "empty": lambda: torch.zeros(0, 3),
    "transposed": lambda: tensor().view(20, 20).t(),
    "channels last": lambda: tensor().view(1, 4, 10, 10).contiguous(memory_format=torch.channels_last),
    "every other": lambda: tensor()[::2],
    "every fifth": lambda: tensor()[::5],
    "expanded": lambda: tensor().view(20, 1, 20).expand(20, 7, 20),
    "overlapping": lambda: tensor().unfold(0, 30, 1),
    "conjugate": lambda: torch.complex(tensor(), tensor()).conj(),
    "negative": lambda: torch.complex(tensor(), tensor()).conj().imag,
}


@pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
def test_tensors_of_every_shape_in_their_strides(make: Callable[[], torch.Tensor]) -> None:
    source, expected = make(), make()
    found = copied(source)
    base = source if source._base is None else source._base
    base.detach().zero_()
    assert torch.equal(found, expected)
    if make not in (SHAPES["every fifth"], SHAPES["overlapping"]):
        assert found.stride() == expected.stride()
    assert found.untyped_storage().nbytes() <= 2 * expected.nbytes + 128


@QUANTISED
@pytest.mark.parametrize("channels", [False, True])
def test_quantised_tensors(channels: bool) -> None:
    if channels:
        scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([0, 1])
        source = torch.quantize_per_channel(torch.randn(2, 9), scales, zeros, 0, torch.qint8)
    else:
        source = torch.quantize_per_tensor(torch.randn(20), 0.1, 3, torch.quint8)
    found, expected = copied(source), source.int_repr().clone()
    source.copy_(torch.zeros(source.shape))
    assert torch.equal(found.int_repr(), expected)
    assert found.qscheme() == source.qscheme()


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state", "ignore:Sparse invariant checks are")
@pytest.mark.parametrize("layout", ["coo", "uncoalesced", "csr", "csc", "bsr"])
def test_sparse_tensors(layout: str) -> None:
    dense = torch.eye(4) * torch.arange(4.0)
    source = {
        "coo": lambda: dense.to_sparse(),
        "uncoalesced": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([1.0, 2.0]), (3,)),
        "csr": lambda: dense.to_sparse_csr(),
        "csc": lambda: dense.to_sparse_csc(),
        "bsr": lambda: dense.to_sparse_bsr((2, 2)),
    }[layout]()
    expected = source.to_dense()
    found = copied(source)
    (source._values() if source.layout is torch.sparse_coo else source.values()).zero_()
    assert found.layout is source.layout
    assert torch.equal(found.to_dense(), expected)


def test_copies_are_detached() -> None:
    """Rule 21: a held graph keeps a batch's memory."""
    weight = nn.Parameter(tensor())
    found = copied({"weight": weight, "loss": (weight * 2).sum()})
    assert type(found["weight"]) is torch.Tensor
    assert found["loss"].grad_fn is None
    assert not found["weight"].requires_grad


def test_where_elements_are_shown_many_times_each_is_copied_once() -> None:
    copying = Copying(COPIERS, Pool(1 << 20))
    source = tensor().view(20, 1, 20).expand(20, 1000, 20)
    found = copy_tensor(source, copying)
    assert torch.equal(found, source)
    assert copying.nbytes == found.untyped_storage().nbytes() == 1600


def test_a_dry_run_takes_no_memory() -> None:
    source, pool = tensor(), Pool(1 << 20)
    assert copy_tensor(source, Copying(COPIERS, pool, dry=True)).data_ptr() == source.data_ptr()
    named = copy_tensors({"a": source, "b": tensor()}, Copying(COPIERS, pool, dry=True))
    assert named["a"].data_ptr() == source.data_ptr()
    assert pool.nbytes == 0


def test_what_has_no_elements_to_copy_stays_on_its_device() -> None:
    found = copy_tensor(torch.ones(2, 3, device="meta", requires_grad=True), Copying(COPIERS, Pool(0)))
    assert (found.device.type, found.shape, found.requires_grad) == ("meta", (2, 3), False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)]), r"\(nested\)"),
        (lambda: torch.zeros(2, 2).to_mkldnn(), r"\(torch\._mkldnn\)"),
    ],
    ids=["nested", "mkldnn"],
)
def test_kinds_that_cannot_be_copied_are_refused_with_what_to_read(make: Callable[[], Any], kind: str) -> None:
    with pytest.raises(Refused, match=f"tensors of this kind {kind} cannot be copied") as caught:
        copy_tensor(make(), Copying(COPIERS, Pool(0)))
    assert caught.value.remedy == "Read a dense tensor made from it"


def test_tensors_by_name_lie_in_one_piece_of_memory() -> None:
    sources = {"a": nn.Parameter(tensor()), "b": tensor(300).double(), "c": tensor(7).view(7, 1)}
    expected = {name: source.detach().clone() for name, source in sources.items()}
    pool = Pool(1 << 20)
    copying = Copying(COPIERS, pool)
    found = copy_tensors(sources, copying)
    with torch.no_grad():
        for source in sources.values():
            source.zero_()
    assert list(found) == ["a", "b", "c"]
    for name, copy in found.items():
        assert torch.equal(copy, expected[name])
        assert type(copy) is torch.Tensor
        assert not copy.requires_grad
    low, high = (pick(copy.data_ptr() for copy in found.values()) for pick in (min, max))
    assert high - low < pool.nbytes
    assert copying.nbytes == sum(source.nbytes for source in sources.values())


def test_a_tensor_that_was_copied_by_name_is_the_same_copy_elsewhere() -> None:
    source, copying = tensor(), Copying(COPIERS, Pool(1 << 20))
    found = copy_tensors({"a": source}, copying)
    assert copying.copy([source])[0] is found["a"]


def test_one_tensor_of_another_kind_lets_each_be_copied_as_what_it_is() -> None:
    sources = {"plain": tensor(), "sparse": torch.eye(3).to_sparse(), "transposed": tensor().view(20, 20).t()}
    expected = {name: source.to_dense().clone() for name, source in sources.items()}
    found = copy_tensors(sources, Copying(COPIERS, Pool(1 << 20)))
    sources["plain"].zero_()
    sources["sparse"]._values().zero_()
    sources["transposed"].zero_()
    assert found["sparse"].layout is torch.sparse_coo
    assert found["transposed"].stride() == (1, 20)
    assert all(torch.equal(found[name].to_dense(), expected[name]) for name in sources)


class Own(torch.Tensor):
    """A type that may hold more than its elements."""


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_a_sparse_tensor_by_name_is_copied_and_other_kinds_are_refused() -> None:
    sparse = torch.eye(4).to_sparse_csr()
    found = copy_tensors({"a": torch.ones(2), "b": sparse}, Copying(COPIERS, Pool(0)))
    sparse.values().zero_()
    assert torch.equal(found["b"].to_dense(), torch.eye(4))
    with pytest.raises(Refused, match="tensors of this kind"):
        copy_tensors({"a": torch.ones(2), "b": torch.ones(3, 3).to_mkldnn()}, Copying(COPIERS, Pool(0)))


def test_a_tensor_by_name_that_cannot_be_copied_is_named() -> None:
    with pytest.raises(Refused, match="a subclass of Tensor may hold more") as caught:
        copy_tensors({"fine": tensor(), "bad": tensor().as_subclass(Own)}, Copying(COPIERS, Pool(0)))
    assert caught.value.where == ["['bad']"]


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state")
@pytest.mark.parametrize(
    ("layout", "rows_first"),
    [(torch.sparse_csr, True), (torch.sparse_csc, False), (torch.sparse_bsr, True), (torch.sparse_bsc, False)],
    ids=str,
)
def test_the_compressed_indices_come_first(layout: torch.layout, rows_first: bool) -> None:
    dense = torch.zeros(4, 2)
    dense[0] = dense[1] = 1.0
    blocks = (1, 1) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    source = dense.to_sparse(layout=layout, blocksize=blocks)
    compressed, plain = compressed_indices(source)
    assert compressed.tolist() == ([0, 2, 4, 4, 4] if rows_first else [0, 2, 4])
    assert plain.tolist() == [0, 1, 0, 1]
