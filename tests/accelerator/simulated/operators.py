"""Operators: each one of ATen becomes a piece of work that computes with the kernel of the CPU.

One function, `Operators.call`, stands for the kernels of all operators that torch does not make of others. It decides
by the schema of an operator what it does to memory:

- a view gives the same storage with other sizes, at once;
- a result is given memory as large as the ``meta`` device says, and is computed later;
- what is changed in place, or given as ``out=``, is written later;
- where sizes or values depend on the contents of tensors, the host waits, and it is counted.

Random numbers are drawn in the order of the host: an operator gets a seed when it is submitted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as tree

from tests.accelerator.simulated.tensors import DEVICE, Tensors, is_simulated

__all__ = ["Operators"]

aten = torch.ops.aten


def _native_dropout(
    inputs: Tensor, p: float, train: bool | None, *, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    if train is False:
        return inputs.clone(), torch.ones_like(inputs, dtype=torch.bool)
    noise = torch.empty_like(inputs).bernoulli_(1 - p, generator=generator)  # as the CPU draws it, and rounds it
    return inputs * (noise if p == 1 else noise / (1 - p)), noise.bool()


def _native_dropout_backward(grad: Tensor, mask: Tensor, scale: float) -> Tensor:
    noise = mask.to(grad.dtype)
    return grad * (noise / (1 / scale) if scale else noise)


_KERNELS: dict[str, Callable[..., Any]] = {
    "aten::native_dropout": _native_dropout,
    "aten::native_dropout_backward": _native_dropout_backward,
}
"""Operators that the CPU computes otherwise, without a generator of its own and with other roundings."""

_WRITTEN_TOO = {"aten::native_batch_norm": ("running_mean", "running_var")}
"""Arguments that an operator changes though its schema does not say so."""


class Operators:
    """The kernels of the device.

    Args:
        tensors: Makes the tensors.

    Attributes:
        generator: The random numbers of the device.
        draws: The random numbers that all operators draw from while they run; without it each gets a seed from the
            generator when it is submitted, so that the order in which they run changes nothing.
        refuses_the_cpu: Whether a tensor of the CPU among those of the device is an error, as it is on every device.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.generator = torch.Generator()
        self.draws: torch.Generator | None = None
        self.refuses_the_cpu = True
        self._tensors = tensors
        self._machine = tensors.machine

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        """Do what an operator does."""
        schema, leaves = op._schema, _tensors_in((args, kwargs))
        if self.refuses_the_cpu and any(each.is_cpu and each.dim() for each in leaves):
            raise RuntimeError(f"{schema.name}: its tensors are on {DEVICE} and on the CPU; move them to one device.")
        first = schema.returns[0].alias_info if schema.returns else None
        if first is not None and not first.is_write:
            return self._view(op, leaves, args, kwargs)
        if torch.Tag.nondeterministic_seeded in op.tags:
            kwargs = {**kwargs, "generator": self._drawn(schema)}
        named = dict(zip((each.name for each in schema.arguments), args, strict=False)) | kwargs
        written = [
            (each.name, tensor)
            for each in schema.arguments
            if each.alias_info is not None and each.alias_info.is_write
            for tensor in _tensors_in(named.get(each.name))
        ]
        kernel = _KERNELS.get(schema.name, op)
        if written:
            outs = [each.name for each in schema.arguments if each.is_out and is_simulated(named.get(each.name))]
            self._write(kernel, schema.name, args, kwargs, leaves, [tensor for _, tensor in written], outs)
            if len(schema.returns) < 2:
                return written[0][1] if schema.returns else None
            return tuple(tensor for _, tensor in written[-len(schema.returns) :])
        also = [named[name] for name in _WRITTEN_TOO.get(schema.name, ()) if is_simulated(named.get(name))]
        return self._compute(kernel, schema.name, args, kwargs, leaves, also)

    def convolution(self, *args: Any) -> Any:
        """Stand for ``aten::convolution_overrideable``, which is the convolution of devices outside of torch."""
        return self.call(aten.convolution.default, *args)

    def convolution_backward(self, grad: Tensor, inputs: Tensor, weight: Tensor, *args: Any) -> Any:
        """Stand for ``aten::convolution_backward_overrideable``."""
        _, _, _, transposed, _, groups, _ = args
        bias = [weight.shape[1] * groups if transposed else weight.shape[0]]
        return self.call(aten.convolution_backward.default, grad, inputs, weight, bias, *args)

    def _drawn(self, schema: Any) -> torch.Generator:
        """Return random numbers for one operator, seeded from those of the device."""
        if schema.name not in _KERNELS and not any(each.name == "generator" for each in schema.arguments):
            raise NotImplementedError(f"{schema.name}: the simulated device has no random numbers for it.")
        if self.draws is not None:
            return self.draws
        seed = int(torch.randint(2**62, (), generator=self.generator, device="cpu"))
        return torch.Generator().manual_seed(seed)

    def _view(self, op: Any, leaves: list[Tensor], args: Any, kwargs: Any) -> Any:
        base = next(each for each in leaves if is_simulated(each))
        on_host = op(*self._host(args), **self._host(kwargs))

        def alias(view: Tensor) -> Tensor:
            """Return a tensor of the device with the sizes and strides of a view."""
            if view.dtype != base.dtype:
                raise NotImplementedError(f"{op}: the simulated device has no views as another dtype.")
            return aten.as_strided_(aten.alias(base), view.size(), view.stride(), view.storage_offset())  # type: ignore[no-any-return]  # a tensor

        return tree.tree_map_only(Tensor, alias, on_host)

    def _write(
        self, kernel: Any, name: str, args: Any, kwargs: Any, leaves: list[Tensor], written: list[Tensor],
        outs: list[str],
    ) -> None:  # fmt: skip
        """Submit an operator that writes into its arguments; `outs` are those that it only writes."""
        if outs:  # the kernel gives them their sizes
            planned = _on_meta(kwargs)
            try:
                kernel(*_on_meta(args), **planned)
            except NotImplementedError:
                self._write_at_once(kernel, name, args, kwargs, leaves, outs)
                return
            for out in outs:
                if kwargs[out].size() != planned[out].size():
                    kwargs[out].data = self._tensors.empty_like(planned[out])
        host_args, host_kwargs = self._host(args), self._host(kwargs)

        def run() -> None:
            # The kernel may resize an `out`, and a view of the machine's memory must stay where it is.
            fresh = {out: torch.empty(0, dtype=host_kwargs[out].dtype) for out in outs}
            kernel(*host_args, **{**host_kwargs, **fresh})
            for out in outs:
                host_kwargs[out].copy_(fresh[out])

        only_read = [each for each in leaves if not any(each is other for other in written)]
        self._submit(name, run, only_read, written)

    def _write_at_once(
        self, kernel: Any, name: str, args: Any, kwargs: Any, leaves: list[Tensor], outs: list[str]
    ) -> None:
        """Compute an operator with ``out=`` now, since the sizes of its results depend on values."""
        self._machine.wait(self._submit(name, None, leaves, ()), "value")
        fresh = {out: torch.empty(0, dtype=kwargs[out].dtype) for out in outs}
        kernel(*self._host(args), **{**self._host(kwargs), **fresh})
        for out in outs:
            kwargs[out].data = self._upload(fresh[out])

    def _compute(
        self, kernel: Any, name: str, args: Any, kwargs: Any, leaves: list[Tensor], written: list[Tensor]
    ) -> Any:
        """Submit an operator that gives new tensors."""
        try:
            plan = kernel(*_on_meta(args), **_on_meta(kwargs))
        except (NotImplementedError, RuntimeError):
            plan = None  # the sizes depend on values; or the call is wrong, and the CPU says so below
        host_args, host_kwargs = self._host(args), self._host(kwargs)
        if not _tensors_in(plan):
            self._machine.wait(self._submit(name, None, leaves, ()), "value")
            return tree.tree_map_only(Tensor, self._upload, kernel(*host_args, **host_kwargs))
        made = tree.tree_map_only(Tensor, self._tensors.empty_like, plan)
        targets = [self._tensors.on_host(each) if isinstance(each, Tensor) else None for each in tree.tree_leaves(made)]

        def run() -> None:
            for target, result in zip(targets, tree.tree_leaves(kernel(*host_args, **host_kwargs)), strict=True):
                # Batch norm gives no statistics in eval mode, and no gradient that is not needed; `meta` gives both.
                if target is not None and result is not None and result.numel():
                    target.copy_(result)

        self._submit(name, run, leaves, [*_tensors_in(made), *written])
        return made

    def _upload(self, value: Tensor) -> Tensor:
        """Return a result that the host has computed as a tensor of the device."""
        made = self._tensors.empty_like(value)
        target, value = self._tensors.on_host(made), value.clone()
        self._submit("upload", lambda: target.copy_(value), (), [made])
        return made

    def _submit(self, name: str, run: Callable[[], object] | None, reads: Any, writes: Any) -> Any:
        read = [self._tensors.block(each).uses for each in reads if is_simulated(each)]
        written = [self._tensors.block(each).uses for each in writes if is_simulated(each)]
        return self._machine.submit(name.removeprefix("aten::"), run, read, written)

    def _host(self, value: Any) -> Any:
        """Return arguments with the tensors of the device as the CPU sees them, and others as they are now."""

        def one(leaf: Any) -> Any:
            if is_simulated(leaf):
                return self._tensors.on_host(leaf)
            if isinstance(leaf, torch.device):
                return torch.device("cpu")
            return leaf.clone() if isinstance(leaf, Tensor) else leaf

        return tree.tree_map(one, value)


def _on_meta(value: Any) -> Any:
    """Return arguments with the tensors on the ``meta`` device, where a call gives sizes and nothing else."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")
        if isinstance(leaf, torch.Generator):
            return None
        return torch.device("meta") if isinstance(leaf, torch.device) else leaf

    return tree.tree_map(one, value)


def _tensors_in(value: Any) -> list[Tensor]:
    return [each for each in tree.tree_leaves(value) if isinstance(each, Tensor)]
