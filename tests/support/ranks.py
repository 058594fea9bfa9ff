"""Functions of tests that run on several ranks: real processes with the environment variables that torchrun sets.

`Ranks` starts them in milliseconds: a process that has imported torch and flowtrain (`tests.support.programs`) forks a
launcher, and the launcher forks the ranks, serves the store at which they meet, as the agent of torchrun does, and
waits for them. Unlike torchrun it does not end the other ranks when one fails, because the tests must see that they end
by themselves.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import importlib
import json
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, Never, ParamSpec, TypeVar

import pytest
import torch
from packaging.version import Version
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is documented there
from torch.distributed.fsdp import FSDPModule

from tests.support.programs import Programs

__all__ = ["CAN_SHARD", "Failure", "Outcome", "Ranks", "needs_sharding", "of_complex", "rank", "returned", "send"]

P = ParamSpec("P")
T = TypeVar("T")

CAN_SHARD = hasattr(FSDPModule, "reset_iter_state")
"""Whether flowtrain trains with ``parallel="fsdp"``, which it refuses with an old torch."""

needs_sharding = pytest.mark.skipif(not CAN_SHARD, reason="this torch cannot leave a sharded batch")
"""A mark of tests that train with ``parallel="fsdp"``."""

_PREPARED = (
    "pytest", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor",
    "torch.nn.parallel", "tests.support.ranks",
)  # fmt: skip
"""Modules that are imported before ranks are forked: `torch._dynamo` is imported by the first DDP, in seconds, and
others by the first batch of a sharded model."""


@dataclass(frozen=True)
class Failure:
    """An exception that a rank has raised, as text, since not every exception can be pickled."""

    kind: str
    text: str
    notes: tuple[str, ...]
    trace: str
    cause: Failure | None

    @classmethod
    def of(cls, failure: BaseException) -> Failure:
        """Describe an exception."""
        notes = tuple(getattr(failure, "__notes__", ()))
        cause = None if failure.__cause__ is None else cls.of(failure.__cause__)
        return cls(type(failure).__name__, str(failure), notes, "".join(traceback.format_exception(failure)), cause)


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """How one rank has ended.

    Attributes:
        rank: The number of the rank.
        value: The value that the function has returned, or ``None``.
        error: The exception that the function has raised, or ``None``.
        code: The exit code of the process; the negative number of the signal that ended it.
        seconds: The time from the start of the ranks to the end of this one.
        out: The standard output.
        err: The standard error output. If the time ran out it ends with the stack of each thread.
        timed_out: Whether the rank was killed because the time ran out.
    """

    rank: int
    value: T | None
    error: Failure | None
    code: int
    seconds: float
    out: str
    err: str
    timed_out: bool

    @property
    def ended(self) -> str:
        """How the rank has ended, in a few words: ``"returned"``, the type of its exception, or its signal."""
        if self.timed_out:
            return "timed out"
        if self.code < 0 and self.error is None:
            return signal.Signals(-self.code).name
        return self.error.kind if self.error else "returned" if self.code == 0 else f"exit code {self.code}"

    def __str__(self) -> str:
        shown = [f"rank {self.rank}: {self.ended}, exit code {self.code}, after {self.seconds:.2f} s"]
        if self.error or self.code:
            shown += [self.out[-2000:], self.error.trace if self.error and not self.timed_out else self.err[-4000:]]
        return "\n".join(filter(None, shown))


class Ranks:
    """Runs functions of test modules on several ranks, one launch after the other."""

    def __init__(self) -> None:
        self._programs = Programs(*_PREPARED)

    def close(self) -> None:
        """End the process that forks."""
        self._programs.close()

    def run(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> list[Outcome[T]]:
        """Run a function of a module on 2 ranks for at most 20 seconds; `run_on` chooses both."""
        return self.run_on(2, 20, function, *arguments, **options)

    def run_on(
        self, size: int, seconds: float, function: Callable[P, T], *arguments: P.args, **options: P.kwargs
    ) -> list[Outcome[T]]:
        """Run a function on each of several ranks, and return how each rank has ended, in the order of the ranks.

        A rank that is suspended while all others have ended is killed.

        Args:
            size: The number of ranks.
            seconds: The time after which the ranks that still run are killed.
            function: A function at the top of a module.
            arguments: Its arguments, which can be pickled, as its result can.
            options: Its keyword arguments.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            work = (function.__module__, function.__qualname__, arguments, options, size, seconds)
            (folder / "work").write_bytes(pickle.dumps(work))
            done = self._programs.run(_LAUNCHER, str(folder), seconds=int(seconds) + 20)
            assert done.returncode == 0, f"the launcher failed with {done.returncode}:\n{done.stdout}{done.stderr}"
            ended: list[tuple[int, float, bool]] = json.loads((folder / "ended").read_text())
            return [_read(folder, number, *how) for number, how in enumerate(ended)]

    def values(self, function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> list[T]:
        """Run a function as `run` does, and return the values of all ranks, which must all return."""
        return returned(self.run(function, *arguments, **options))


def returned(outcomes: Sequence[Outcome[T]]) -> list[T]:
    """Return the values of ranks that have all returned; fail with what each rank did otherwise."""
    assert all(outcome.ended == "returned" for outcome in outcomes), "\n" + "\n".join(map(str, outcomes))
    return [outcome.value for outcome in outcomes]  # type: ignore[misc]  # `T` may be `None` itself


def of_complex(outcomes: Sequence[Outcome[T]]) -> list[T]:
    """Return the values of ranks that train complex parameters; skip the test if an old torch cannot send them."""
    texts = [outcome.error.text for outcome in outcomes if outcome.error is not None]
    if Version(torch.__version__) < Version("2.13") and any("sends no complex numbers" in text for text in texts):
        assert [outcome.ended for outcome in outcomes] == ["CoreError"] * len(outcomes)
        pytest.skip(texts[0])
    return returned(outcomes)


def rank() -> int:
    """Return the number of this rank, in a function that `Ranks` runs."""
    return int(os.environ["RANK"])


def send(number: signal.Signals, *ranks: int) -> None:
    """Send a signal to ranks, in a function that `Ranks` runs; this rank may be among them."""
    for each in sorted(ranks, key=lambda each: each == rank()):  # this one last, as the signal may end it at once
        os.kill(_pids[each], number)


# --- in the launcher and its ranks

_LAUNCHER = "import sys; from tests.support.ranks import launch; launch(sys.argv[1])"

_pids: list[int] = []  # the process ids of the ranks


def launch(place: str) -> None:
    """Fork the ranks and wait for them. The launcher and the ranks exit here."""
    folder = Path(place)
    module, name, arguments, options, size, seconds = pickle.loads((folder / "work").read_bytes())
    function = getattr(importlib.import_module(module), name)
    gc.freeze()  # so that no collection in a rank writes to, and so copies, the memory that it shares with the others
    gates = [os.pipe() for _ in range(size)]
    for number, (gate, _) in enumerate(gates):
        pid = os.fork()
        if not pid:
            _begin_rank(folder, number, size, gate, seconds)
            _run_rank(folder / f"{number}.result", function, arguments, options)
        _pids.append(pid)
    # The store has a thread of its own, so it is made only when the ranks have been forked.
    store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=seconds), wait_for_workers=False)
    for _, gate in gates:
        os.write(gate, json.dumps([store.port, _pids]).encode())
    (folder / "ended").write_text(json.dumps(_wait(seconds)))
    os._exit(0)  # nothing in this process is worth the time that an interpreter takes to exit


def _wait(seconds: float) -> list[tuple[int, float, bool]]:
    """Wait until all ranks have ended; return the exit code and the time of each, and whether the time ran out.

    The processes are collected only at the end, so that no other process can get the id of a rank while another rank
    may still send it a signal.
    """
    start, ends, killed = time.monotonic(), dict[int, float](), set[int]()
    peek = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT
    while len(ends) < len(_pids):
        suspended = set[int]()
        for pid in set(_pids) - set(ends):
            found = os.waitid(os.P_PID, pid, peek)
            if found is not None and found.si_code == os.CLD_STOPPED:
                suspended.add(pid)
            elif found is not None:
                ends[pid] = time.monotonic() - start
        running = set(_pids) - set(ends)
        late = running - killed if time.monotonic() - start > seconds else set[int]()
        killed |= late
        for pid in late | (suspended if suspended == running else set()):
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), ends[pid], pid in killed) for pid in _pids]


def _begin_rank(folder: Path, number: int, size: int, gate: int, seconds: float) -> None:
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{number}.{name}", os.O_WRONLY | os.O_CREAT), stream)
    faulthandler.dump_traceback_later(max(seconds - 0.5, seconds / 2), file=2)
    port, pids = json.loads(os.read(gate, 4096))
    _pids[:] = pids
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
        TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    torch.set_num_threads(1)


def _run_rank(
    result: Path, function: Callable[..., object], arguments: Sequence[Any], options: dict[str, Any]
) -> Never:
    try:
        value = function(*arguments, **options)
    except BaseException as failure:
        result.write_bytes(pickle.dumps((None, Failure.of(failure))))
        _exit(failure)
    result.write_bytes(pickle.dumps((value, None)))
    _exit(None)


def _exit(failure: BaseException | None) -> Never:
    """Exit as an interpreter does, but leave the objects of all modules alone, which it frees for half a second."""
    code = 0 if failure is None else 1
    if isinstance(failure, SystemExit):
        code = failure.code if isinstance(failure.code, int) else int(failure.code is not None)
    elif failure is not None:
        sys.excepthook(type(failure), failure, failure.__traceback__)
    vars(threading)["_shutdown"]()  # waits for threads
    vars(atexit)["_run_exitfuncs"]()
    sys.stdout.flush()
    sys.stderr.flush()
    if isinstance(failure, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def _read(folder: Path, number: int, code: int, seconds: float, timed_out: bool) -> Outcome[Any]:
    result = folder / f"{number}.result"
    value, error = pickle.loads(result.read_bytes()) if result.exists() else (None, None)
    out, err = ((folder / f"{number}.{name}").read_text() for name in ("out", "err"))
    return Outcome(number, value, error, code, seconds, out, err, timed_out)
