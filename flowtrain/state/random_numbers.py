"""The seed of a program, and random numbers for deferrable callbacks, which draw without changing training.

`seed_everything` is for users: it seeds all generators before training. All else here is for deferrable callbacks.

The generators of Python, numpy and torch are global to a process. If a logger drew from them, the dropout and the
shuffling that come after it would draw other numbers, and training would depend on who logs. So each call of a
deferrable handler runs within `own_numbers`, which seeds the generators for the handler and afterwards restores the
state in which training left them. The seed is made from the seed of the run, the name of the callback and the number of
the event (`CallbackSeeds`). So a handler draws the same numbers wherever it runs, and draws them again when a resumed
run comes to the same event.
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
from collections.abc import Mapping
from hashlib import blake2b
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch

from flowtrain.errors import UsageError
from flowtrain.errors.arguments import is_whole
from flowtrain.state import accelerator

__all__ = ["CallbackSeeds", "own_numbers", "seed_everything"]

_NUMPY_BYTES = 2500
"""The size of numpy's ``MT19937`` state: 624 words and the position among them."""


def seed_everything(seed: int, *, deterministic: bool | Literal["warn"] = False) -> int:
    """Seed the generators of Python, of NumPy if it is installed, and of torch on the CPU and on all devices.

    Call it before the model is made. Workers of a data loader get seeds that the loader draws from torch. A run with
    the same seed has the same result on the same machine and number of threads if every operation is deterministic.

    Args:
        seed: The seed, from 0 to 2**32 - 1.
        deterministic: Whether torch uses deterministic algorithms only, from now on: an operation that has none raises
            an error, or with ``"warn"`` a warning. This may be slower. ``False`` leaves torch's setting as it is.

    Returns:
        The seed.

    Raises:
        UsageError: `seed` is no whole number in this range, or `deterministic` is another value.

    >>> seed_everything(7)
    7
    >>> first = torch.rand(2)
    >>> torch.equal(first, torch.rand(2)), seed_everything(7), torch.equal(first, torch.rand(2))
    (False, 7, True)
    """
    if not is_whole(seed) or not 0 <= seed < 2**32:
        raise UsageError(f"seed_everything({seed!r}): the seed is a whole number from 0 to 2**32 - 1, such as 42.")
    if deterministic not in (True, False, "warn"):
        raise UsageError(f"seed_everything(deterministic={deterministic!r}): deterministic is True, False or 'warn'.")
    seed = int(seed)  # NumPy's integers too
    random.seed(seed)
    torch.manual_seed(seed)
    if find_spec("numpy") is not None:  # also if it is not imported yet: the program may draw from it later
        import_module("numpy").random.seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS needs to be deterministic
        torch.backends.cudnn.benchmark = False  # a benchmark may choose another algorithm in each run
        torch.use_deterministic_algorithms(True, warn_only=deterministic == "warn")
    return seed


class CallbackSeeds:
    """Makes the seeds for the deferrable callbacks of one learner."""

    def __init__(self) -> None:
        self._seed: int | None = None
        self._counts: dict[str, int] = {}

    @property
    def seed(self) -> int:
        """The seed of the run: torch's seed at the first call, or the seed in the checkpoint that was loaded."""
        if self._seed is None:
            self._seed = torch.initial_seed()  # draws no number
        return self._seed

    def next(self, name: str) -> int:
        """Count an event of a callback, and return the seed of 64 bits for its handler."""
        number = self._counts[name] = self._counts.get(name, 0) + 1
        return _mixed(self.seed, name, number)

    def before_training(self, name: str) -> int:
        """Return the seed for the `setup` of a callback, without counting an event.

        This does not fix the seed of the run, because a user may seed torch after building the learner.
        """
        return _mixed(torch.initial_seed() if self._seed is None else self._seed, name, 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the seed of the run, and the number of events of each callback."""
        return {"seed": self.seed, "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore the state that `state_dict` returned; ``None``, as early checkpoints have it, changes nothing."""
        if state is not None:
            self._seed = state["seed"]
            self._counts = dict(state["counts"])


def _mixed(seed: int, name: str, number: int) -> int:
    """Return a seed of 64 bits that depends on all three arguments, the same in every process."""
    return int.from_bytes(blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest(), "big")


class own_numbers:  # noqa: N801  # a context manager that is read as a phrase
    """Seed the generators of the process for a block, and restore their states after it.

    These are the generators of Python, of numpy if it is imported, of torch on the CPU, and of the accelerator if it is
    in use. This costs about 25 microseconds. It must not be used in a thread beside training, because it would undo the
    draws that training makes meanwhile.

    Args:
        seed: The seed, of 64 bits.
    """

    __slots__ = ("_devices", "_numpy", "_python", "_seed", "_torch")

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __enter__(self) -> None:
        self._python = random.getstate()
        self._torch = torch.default_generator.get_state()
        self._numpy = _Numpy.of_process()
        self._devices = accelerator.random_states()
        try:
            self._set_seed(self._seed)
        except BaseException:  # an interrupt: `__exit__` will not be called
            self._put_back()
            raise

    def __exit__(self, *failure: object) -> None:
        try:
            self._put_back()
        except BaseException:  # an interrupt in the middle: restoring twice does no harm
            self._put_back()
            raise

    def _set_seed(self, seed: int) -> None:
        """Seed all generators."""
        random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if self._devices:
            accelerator.seed(seed)
        if self._numpy is not None:
            self._numpy.seed(seed & 0xFFFFFFFF)  # numpy takes 32 bits only

    def _put_back(self) -> None:
        """Restore the states of all generators."""
        if self._numpy is not None:
            self._numpy.put_back()
        accelerator.set_random_states(self._devices)
        torch.default_generator.set_state(self._torch)
        random.setstate(self._python)


class _Numpy:
    """The state of numpy's global generator, and the way to restore it.

    ``get_state`` and ``set_state`` of numpy take 35 microseconds each, so they are avoided. numpy gives the address of
    the memory of its usual generator, which a copy saves. Only one part of the state lies elsewhere: normal numbers are
    made in pairs, and the second number of a pair may be waiting. `_plain` is the last memory that was found to have no
    number waiting; as long as the memory is the same, `get_state` need not be asked again.
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
        """Return the present state; ``None`` if numpy is not imported."""
        module = getattr(sys.modules.get("numpy"), "random", None)
        return None if module is None else cls(module)

    def seed(self, seed: int) -> None:
        """Seed the generator."""
        self._module.seed(seed)

    def put_back(self) -> None:
        """Restore the state."""
        if self._module.get_bit_generator() is not self._generator:
            self._module.set_bit_generator(self._generator)  # the handler has replaced the generator itself
        if self._full is not None:
            self._module.set_state(self._full)
            return
        self._module.seed(0)  # drops a normal number that the handler has left waiting
        ctypes.memmove(self._address, self._memory, _NUMPY_BYTES)
