"""Random numbers of their own for deferrable callbacks, so that a consumer that draws never changes training.

Python's, numpy's and torch's generators are global to a process. A logger that draws from them moves them on, and the
dropout and the shuffling that come after it draw other numbers: training depends on who logs. So each call of a
deferrable handler runs in `own_numbers`: the generators are seeded for it, and afterwards they are put back to where
training left them. The seed is made of the seed of the run, the name of the callback and the number of the event
(`Draws`), so a handler draws the same wherever it runs, and again when a resumed run comes to the same event.
"""

from __future__ import annotations

import ctypes
import random
import sys
import threading
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch

__all__ = ["Draws", "own_numbers"]

_NUMPY_BYTES = 2500
"""The size of numpy's ``MT19937`` state: 624 words and the position among them."""

_drawing = threading.RLock()
"""Held while the generators of the process belong to one handler: a worker may process several lanes at once."""


class Draws:
    """The seeds of one learner's deferrable callbacks."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._counts: dict[str, int] = {}

    @property
    def seed(self) -> int:
        """The seed of the run: what torch was seeded with when this was first asked for, or that of a checkpoint."""
        if self._seed is None:
            self._seed = torch.initial_seed()  # draws nothing
        return self._seed

    def next(self, name: str) -> int:
        """Count an event of a callback, and return the seed that its handler has for it: 64 bits."""
        number = self._counts[name] = self._counts.get(name, 0) + 1
        return _mixed(self.seed, name, number)

    def before_training(self, name: str) -> int:
        """Return the seed for the `setup` of a callback; no event is counted, and the seed of the run may still change.

        A learner may be built before the user seeds torch.
        """
        return _mixed(torch.initial_seed() if self._seed is None else self._seed, name, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the seed of the run and how many events each callback has had."""
        return {"seed": self.seed, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._seed = state["seed"]
        self._counts = dict(state["counts"])


def _mixed(seed: int, name: str, number: int) -> int:
    return int.from_bytes(blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest(), "big")


class own_numbers:  # noqa: N801  # a context manager that is read as a phrase
    """Seed the generators of the process for a block, and put them back after it.

    These are Python's, numpy's if it is imported, torch's on the CPU, and those of CUDA if it is in use. Costs about 25
    microseconds. It is no use in a thread beside training, whose draws would be put back too.

    Args:
        seed: The seed, of 64 bits.
    """

    __slots__ = ("_cuda", "_numpy", "_python", "_seed", "_torch")

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        _drawing.acquire()
        seed = self._seed
        self._python = random.getstate()
        self._torch = torch.default_generator.get_state()
        self._numpy = _Numpy.of_process()
        self._cuda = []
        if torch.cuda.is_initialized():
            self._cuda = [(each, each.get_state()) for each in torch.cuda.default_generators]
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        for generator, _ in self._cuda:
            generator.manual_seed(seed)
        if self._numpy is not None:
            self._numpy.seed(seed & 0xFFFFFFFF)

    def __exit__(self, *failure: object) -> None:
        try:
            if self._numpy is not None:
                self._numpy.put_back()
            for generator, state in self._cuda:
                generator.set_state(state)
            torch.default_generator.set_state(self._torch)
            random.setstate(self._python)
        finally:
            _drawing.release()


class _Numpy:
    """The state of numpy's global generator, to be put back.

    ``get_state`` and ``set_state`` take 35 microseconds each, so they are left out where that can be: numpy gives the
    address of the memory of its usual generator, and what lies outside of it is the second of two normal numbers,
    which is there only after the generator was moved on. `_plain` is a memory that is known to be without one.
    """

    _plain: bytes = b""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._generator = generator = module.get_bit_generator()
        self._memory = b""
        self._full: Any = None
        if type(generator) is module.MT19937:
            self._address: int = generator.ctypes.state_address
            self._memory = ctypes.string_at(self._address, _NUMPY_BYTES)
        if not self._memory or self._memory != _Numpy._plain:
            full = module.get_state(legacy=False)
            if not self._memory or full["has_gauss"]:
                self._full = full
            else:
                _Numpy._plain = self._memory

    @classmethod
    def of_process(cls) -> _Numpy | None:
        """Return the state of now; ``None`` if numpy is not imported."""
        module = getattr(sys.modules.get("numpy"), "random", None)
        return None if module is None else cls(module)

    def seed(self, seed: int) -> None:
        """Seed the generator."""
        self._module.seed(seed)

    def put_back(self) -> None:
        """Put the state back."""
        if self._module.get_bit_generator() is not self._generator:
            self._module.set_bit_generator(self._generator)  # the handler has put another one in its place
        if self._full is not None:
            self._module.set_state(self._full)
            return
        self._module.seed(0)  # forgets a normal number that the handler has left
        ctypes.memmove(self._address, self._memory, _NUMPY_BYTES)
