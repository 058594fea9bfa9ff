"""Random sets of callbacks, in real processes: those that the build accepts keep all ranks equal, the others do not.

One pair of processes trains with many sets, one after the other. After each event both note the state that is shared:
the parameter, the learning rate, and the shared entries of ``cbstate``. The notes of accepted sets are equal. Refused
sets run without the checks that have refused them, and their notes differ.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import mse_loss

from flowtrain import (
    AbstractTrainingPhase,
    Access,
    BackwardBegin,
    BackwardEnd,
    BatchBegin,
    BatchEnd,
    Callback,
    EpochBegin,
    EpochEnd,
    Event,
    Learner,
    LearnerView,
    NoConflict,
    Phase,
    Read,
    Resolution,
    TorchCore,
    TrainingPhase,
    UpdateBegin,
    UpdateEnd,
    Write,
    on,
)
from flowtrain.callback.handler import Handler
from flowtrain.errors import MissingStateError, RankError
from flowtrain.graph import registry, shared_state
from flowtrain.testing import TinyModel
from tests.ranks.alone import Alone, fit
from tests.support.ranks import Ranks, rank, returned

ENTRIES = ("a", "b", "c")
LOSS = "batch.loss"
PATHS = [LOSS, *(f"cbstate.{name}" for name in ENTRIES), "optimizer.hyperparams", "params"]
EVENTS: list[type[Event]] = [BackwardEnd, UpdateBegin, UpdateEnd, BatchEnd, EpochBegin, EpochEnd]


def drawn(seed: int) -> list[tuple[Access, Any, type[Event]]]:
    """Return for each callback of a random set its access, where it runs, and its event."""
    draw = random.Random(seed)
    found: list[tuple[Access, Any, type[Event]]] = []
    for _ in range(draw.randint(1, 4)):
        event = draw.choice(EVENTS)
        paths = [path for path in draw.sample(PATHS, draw.randint(1, 4)) if path != LOSS or event is not EpochBegin]
        access: dict[str, Read | Write] = {}
        for path in paths:
            if draw.random() < 0.5:
                access[path] = Write(broadcast=path != LOSS and draw.random() < 0.5)
            elif path.startswith(("batch", "cbstate")):
                access[path] = draw.choice([Read(), Read(reduce="mean"), Read(reduce="max"), Read(gather=True)])
            else:
                access[path] = Read()
        found.append((access, draw.choice([None, None, "main", "every"]), event))
    return found


class Random(Callback):
    """Writes a number, made of all that it declares to read, to all that it declares to write."""

    def __init__(self, number: int, access: Access, where: Any, event: type[Event]) -> None:
        self.name, self.number, self.access, self.ranks, self.event = f"Random{number}", number, access, where, event

    def state_access(self) -> Access:
        return self.access

    def handlers(self) -> Iterator[tuple[type, Handler]]:
        yield type(self), Handler(self.event, TrainingPhase, None, "Random", "change")

    def resolve_conflict(self, other: Callback) -> Resolution | None:
        return NoConflict()

    def setup(self, learner: LearnerView) -> None:
        for path, kind in self.access.items():
            if path.startswith("cbstate") and isinstance(kind, Write):
                setattr(learner.cbstate, path.partition(".")[2], 0.5)

    def change(self, event: Event, phase: Phase, learner: Any) -> None:
        found = 0.1 * self.number
        for path in sorted(self.access):
            root, _, name = path.partition(".")
            found *= 0.7
            if path == "params":
                found += float(learner.params["coeff"].detach())
            elif path == "optimizer.hyperparams":
                found += learner.optimizer.hyperparams[0]["lr"]
            else:
                found += number(getattr(getattr(learner, root), name))
        for path in sorted(path for path, kind in self.access.items() if isinstance(kind, Write)):
            root, _, name = path.partition(".")
            if path == "params":
                learner.params["coeff"].data.fill_(found % 1)
            elif path == "optimizer.hyperparams":
                learner.optimizer.hyperparams[0]["lr"] = found % 0.1
            else:
                setattr(getattr(learner, root), name, torch.tensor(found) if root == "batch" else found % 1)


def number(value: Any) -> float:
    """Return one number for a value, or for the values of all ranks."""
    return sum((place + 1) * number(each) for place, each in enumerate(value)) if type(value) is list else float(value)


class Notes(Callback):
    """Notes the shared state after each event, without declaring that it looks at it."""

    ranks = "every"
    may_cancel = False

    def __init__(self) -> None:
        self.learner: Any = None
        self.found: list[tuple[Any, ...]] = []

    @on(Event, AbstractTrainingPhase)
    def note(self, event: Event, phase: Phase, learner: LearnerView) -> None:
        state = self.learner.state
        local = self.learner.callbacks.shared.local if self.learner.callbacks.shared is not None else ()
        entries = {name: vars(state.cbstate).get(name) for name in ENTRIES if name not in local}
        rate = state.optimizer.param_groups[0]["lr"]
        self.found.append((type(event).__name__, state.model.coeff.item(), rate, entries))


def train(seed: int) -> tuple[str, list[tuple[Any, ...]]]:
    """Train with one set; return why it was refused or has failed, or an empty text, and the notes."""
    made = torch.Generator().manual_seed(rank())
    data = [(x, 3 * x) for x in torch.randn(3, 4, 1, generator=made)]
    first: dict[str, Read | Write] = {f"cbstate.{name}": Write() for name in ENTRIES}  # so that reads have a writer
    callbacks = [Random(number, *sketch) for number, sketch in enumerate(drawn(seed), 1)]
    notes = Notes()
    try:
        learner = Learner(
            TinyModel(), mse_loss, data=data, core=TorchCore(device="cpu"), optimizer=partial(torch.optim.SGD, lr=0.05),
            callbacks=[Random(0, first, "every", BackwardBegin), *callbacks, notes], default_callbacks=False,
        )  # fmt: skip
    except (RankError, MissingStateError) as error:
        return f"refused: {error}", []
    notes.learner = learner
    with learner:
        try:
            learner.fit(2)
        except Exception as error:
            return f"{type(error).__name__}: {error}", notes.found
    return "", notes.found


def checked(seeds: range) -> list[tuple[str, list[tuple[Any, ...]]]]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    return [train(seed) for seed in seeds]


def unchecked(seeds: list[int]) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Train with sets as if nothing had refused them."""
    patch = pytest.MonkeyPatch()
    for name in ("_check_main", "_check_sources"):
        patch.setattr(shared_state, name, lambda *arguments: None)
    dist.init_process_group("gloo", timeout=timedelta(seconds=10))
    return [train(seed) for seed in seeds]


@pytest.mark.parametrize("seeds", [range(100), range(100, 200)], ids=["0-99", "100-199"])
def test_accepted_sets_keep_the_ranks_equal_and_refused_ones_do_not(seeds: range, ranks: Ranks) -> None:
    zero, one = returned(ranks.run_on(2, 120, checked, seeds))
    refused = [seed for seed, (why, _) in zip(seeds, zero, strict=True) if why.startswith("refused")]
    for seed, main, other in zip(seeds, zero, one, strict=True):
        assert main == other, f"seed {seed}: {drawn(seed)}"
        assert not main[0] or seed in refused, f"seed {seed}: {main[0]}"
    assert 15 <= len(refused) <= 50
    zero, one = returned(ranks.run_on(2, 120, unchecked, refused))
    for seed, main, other in zip(refused, zero, one, strict=True):
        assert main != other, f"seed {seed}: {drawn(seed)}"


def exchange_early(check: bool) -> str:
    """Exchange a value before the backward pass, in a batch that the second rank cancels."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    if not check:
        pytest.MonkeyPatch().setattr(registry, "check_exchange_events", lambda *arguments: None)
    access: Access = {LOSS: Read(reduce="mean"), "cbstate.a": Write()}
    end = fit(Random(1, access, "every", BackwardBegin), Alone(BatchBegin, TrainingPhase, "batch", 2))
    return "" if end.error is None else f"{end.error.kind}: {end.error.text}"


def test_an_exchange_where_one_rank_may_be_missing_is_refused_and_would_wait_for_ever(ranks: Ranks) -> None:
    for outcome in ranks.run_on(2, 20, exchange_early, True):
        assert outcome.ended == "RankError"
    waited, _ = returned(ranks.run_on(2, 20, exchange_early, False))
    assert waited.startswith("RemoteError: rank 0 of 2 waits for another rank that has ended, or stands still")
