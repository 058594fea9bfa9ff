"""The runner of functions on several ranks: it gives values, exceptions, exit codes, signals and time-outs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import Ranks, rank, returned, send


def add(own: int) -> tuple[int, list[float]]:
    dist.init_process_group("gloo")
    total = torch.tensor([float(own * (rank() + 1))])
    dist.all_reduce(total)
    print("rank", rank())
    return dist.get_world_size(), total.tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_meet(size: int, ranks: Ranks) -> None:
    outcomes = ranks.run_on(size, 20, add, 5)
    assert returned(outcomes) == [(size, [5.0 * size * (size + 1) / 2])] * size
    assert [outcome.out for outcome in outcomes] == [f"rank {number}\n" for number in range(size)]


def fail_alone() -> int:
    if rank() == 1:
        failure = ValueError("only here")
        failure.add_note("a note")
        raise failure from KeyError("cause")
    return 7


def test_an_error_is_that_of_its_rank(ranks: Ranks) -> None:
    zero, one = ranks.run(fail_alone)
    assert (zero.ended, zero.value, zero.code) == ("returned", 7, 0)
    assert (one.ended, one.code, one.value) == ("ValueError", 1, None)
    assert one.error is not None
    assert one.error.cause is not None
    assert (one.error.text, one.error.notes, one.error.cause.kind) == ("only here", ("a note",), "KeyError")
    assert "only here" in one.err
    with pytest.raises(AssertionError, match="rank 1: ValueError, exit code 1"):
        returned([zero, one])


def get(number: signal.Signals, *targets: int) -> int:
    dist.init_process_group("gloo")
    dist.barrier()
    if rank() == 0:
        send(number, *targets)
    time.sleep(0.2)
    return rank()


def test_a_signal_reaches_the_ranks_that_it_is_sent_to(ranks: Ranks) -> None:
    assert [outcome.ended for outcome in ranks.run(get, signal.SIGKILL, 1)] == ["returned", "SIGKILL"]
    assert [outcome.ended for outcome in ranks.run(get, signal.SIGINT, 0, 1)] == ["KeyboardInterrupt"] * 2


def test_a_rank_that_is_suspended_is_killed_after_the_others(ranks: Ranks) -> None:
    zero, one = ranks.run(get, signal.SIGSTOP, 1)
    assert (zero.ended, one.ended, one.timed_out) == ("returned", "SIGKILL", False)


def hang() -> int:
    if rank() == 1:
        time.sleep(60)
    return os.getpid()


def test_a_rank_that_hangs_is_killed_and_shows_where(ranks: Ranks) -> None:
    zero, one = ranks.run_on(2, 1, hang)
    assert (zero.ended, one.ended, one.code) == ("returned", "timed out", -signal.SIGKILL)
    assert "in hang" in one.err


def test_torchrun_sets_the_same_variables(ranks: Ranks) -> None:
    names = sorted(ranks.run(variables)[0].value or ())
    source = "import os; print(*os.environ)"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "--no-python"]
    done = subprocess.run([*command, sys.executable, "-c", source], capture_output=True, text=True, timeout=120)
    assert set(names) <= set(done.stdout.split()), done.stderr


def variables() -> list[str]:
    """Return the variables by which a program knows its rank."""
    known = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return [name for name in os.environ if name in known or name.startswith("TORCHELASTIC_")]
