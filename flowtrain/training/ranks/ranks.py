"""The loop on one of several ranks: the sync points between the parts of a fit.

`flowtrain.training.ranks.sync_points` says which sync points there are and what ranks tell each other there.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Final, NamedTuple

import torch

from flowtrain.callback.phases import AbstractValidationPhase, Phase
from flowtrain.core.settings import text_of
from flowtrain.core.torch_core import TorchCore
from flowtrain.core.world import World
from flowtrain.data.rank_batches import fingerprint
from flowtrain.errors import (
    CancelBatchException,
    CancelEpochException,
    CheckpointError,
    DivergedError,
    RankError,
)
from flowtrain.graph.plan_texts import Description, first_difference
from flowtrain.graph.registry import Callbacks
from flowtrain.state.by_phase import PhaseMap
from flowtrain.state.encoding import Packer
from flowtrain.state.learner_state import LearnerState, by_name
from flowtrain.training.checkpoint.rank_checkpoints import RankParts, check_shapes
from flowtrain.training.checkpoint.reading import own_version
from flowtrain.training.dispatch import Dispatch
from flowtrain.training.failures import Failures
from flowtrain.training.ranks.batch_sync import BatchSync
from flowtrain.training.ranks.batches import RankBatches
from flowtrain.training.ranks.sync_points import FIT_END, SyncPoints
from flowtrain.training.scopes import Scopes

__all__ = ["Ranks"]


class _Begun(NamedTuple):
    """The beginning of a fit on one rank: its number of updates, if it is known, and what all ranks must have alike."""

    updates: int | None
    models: Description
    callbacks: Description
    optimizers: Description
    data: Description
    versions: str


_ALIKE: Final = {
    "models": "Make, freeze (requires_grad_(False)) and change the same model on every rank.",
    "callbacks": 'Give the learner the same callbacks, in the same order, on every rank; with ranks = "main" one of '
    "them runs on the main rank only.",
    "optimizers": "They would make different updates. Make the same optimizer on every rank, and change it on all of "
    "them.",
    "data": "flowtrain gives each rank its share of one dataset. Pass the same dataset and sampler on every rank; or, "
    "for data of each rank's own, a list of batches, an IterableDataset, or a sampler of your own.",
}
"""What must be the same on all ranks that begin a fit, by the attribute of `_Begun`, with what to write otherwise."""


class Ranks:
    """The other ranks, as the loop on one of them sees them: a `flowtrain.training.together.Together`.

    Args:
        world: The ranks.
        state: The state of the learner.
        core: The core of the learner.
        scopes: The open scopes.
        dispatch: Fires events.

    Attributes:
        sync: Synchronises the batches.
        parts: The parts of the checkpoints.
    """

    def __init__(self, world: World, state: LearnerState, core: TorchCore, scopes: Scopes, dispatch: Dispatch) -> None:
        replica = core.replica
        self._points = SyncPoints(world, replica)
        self.sync = BatchSync(self._points, replica, state, core, scopes, dispatch)
        self.parts = RankParts(world, replica, state)
        self._batches = RankBatches(self._points, self.sync, self.parts, core)
        self._world, self._replica, self._state, self._core, self._scopes = world, replica, state, core, scopes
        self._save: Callable[[], None] = lambda: None  # takes the checkpoints for an interrupt

    def begin(self, step: Phase | None = None) -> None:
        """Forget the sync points of the last call, and wrap the model if a step of training follows."""
        self._points.reset()
        if step is not None and self.sync.uses_replica(step):
            self._replica.prepare()

    def begin_fit(self, save: Callable[[], None]) -> Callable[[Callable[[], None]], None]:
        """Begin a fit, and return the function by which the ranks are told of a signal."""
        self._points.reset()
        self._batches.begin_fit()
        self._save = save
        return self._points.hold

    def divide(self, data: PhaseMap[Any]) -> PhaseMap[Any]:
        """Return the shares of this rank."""
        return self._batches.divide(data)

    def agree(self, value: Any) -> Any:
        """Exchange the values of all ranks, and return that of the main rank."""
        return self._world.exchange(value)[0]

    def plan(self, updates: Callable[[], int | None]) -> int | None:
        """Compare the plans of all ranks, and return the number of updates that all of them make.

        Raises:
            RankError: The ranks have different versions, models, callbacks, optimizers, or data.
        """

        def own() -> _Begun:
            """Return the beginning of the fit on this rank."""
            state = self._state
            models, optimizers = _models(self._core.models), _optimizers(state.optimizer)
            return _Begun(
                updates(), models, state.callbacks.describe(), optimizers, self._batches.describe(), _versions()
            )

        # All is compared before the first event, since ranks with other callbacks would wait in other exchanges.
        found = self._points.share("the plan of the fit", own)
        for number, each in enumerate(found):
            if each.versions != found[0].versions:
                raise RankError(
                    f"Rank {number} has {each.versions}, and the main rank has {found[0].versions}. Install the same "
                    f"versions everywhere: others may compute, order and save in another way."
                )
        for name, remedy in _ALIKE.items() if found else ():
            difference = first_difference([getattr(each, name) for each in found])
            if difference:
                raise RankError(f"The ranks have different {name}: {difference}. {remedy}")
        # An epoch ends on all ranks with the shortest loader, so the smallest number is that of all.
        counts = [each.updates for each in found if each.updates is not None]
        return min(counts) if counts and len(counts) == len(found) else None

    # --- sync points

    def resumed(self, failures: Failures) -> None:
        """Meet after a checkpoint was read. It replaces all that were loaded before, so these may differ."""
        self.parts.loaded()
        self._meet("the checkpoint to resume from", failures)
        self._see_signal(failures)

    def fit_begun(self, failures: Failures) -> None:
        """Meet after `FitBegin`, and end the fit if a signal has come to any rank."""
        self._meet("FitBegin", failures)
        self._see_signal(failures)

    def epoch_begun(self, failures: Failures) -> None:
        """Meet after `EpochBegin`, and compare the checkpoints that the ranks have loaded."""
        # The phase is told too: a rank that evaluates would wait at the end of its epoch for one that trains.
        found = self._meet(f"EpochBegin of {self._scopes.phase!r}", failures, self.parts.loaded())
        if _differing(found):
            failures.add(_loaded(found))
        self._see_signal(failures)

    def batches_ended(self, failures: Failures) -> None:
        """Meet after the last batch. A late cancel still discards the gradients of a group that is open."""
        self._meet("the end of the batches", failures)
        if failures and failures.only(CancelBatchException, CancelEpochException):
            failures.drop()
            if self._core.groups.open:
                self._core.discard()
        self._see_signal(failures)

    def epoch_ended(self, failures: Failures) -> None:
        """Meet after `EpochEnd`, and compare the fingerprints of the shared state."""
        found = self._meet("EpochEnd", failures, {} if failures else self._fingerprints())
        paths = _differing(found)
        if paths:
            failures.add(_diverged(paths, found))
        self._see_signal(failures)

    def broke_off(self, failures: Failures) -> None:
        """Meet after a failure. After a cancel or an interrupt the buffers of all ranks are made equal."""
        self._meet("a failure that ends its epochs", failures)
        self._see_signal(failures)
        if not self._points.failed:
            with failures:
                check_shapes(self._world.exchange(self.parts.shapes()))
                self._replica.share_buffers()

    def fit_ended(self, failures: Failures) -> None:
        """Meet after `FitEnd`, and interrupt this rank too if a signal has come to another one."""
        points = self._points
        self._meet(FIT_END, failures)
        known = points.failed or any(isinstance(failure, KeyboardInterrupt) for failure in failures)
        if points.interrupted and not points.signalled and not known:
            failures.add(KeyboardInterrupt("training was interrupted on another rank, after its last epoch"))

    def _meet(self, name: str, failures: Failures, value: Mapping[str, str] | None = None) -> list[Mapping[str, str]]:
        """Meet at a sync point, and return the texts by path that each rank gives there; see `SyncPoints.meet`."""
        if failures.first is not None and not self._points.fit_ends:  # the other ranks may have begun a checkpoint
            failures.attempt(self.parts.miss, failures.first)
        return self._points.meet(name, failures, value or {})

    def _see_signal(self, failures: Failures) -> None:
        """End the fit if a signal has come to any rank."""
        if self._points.interrupted and not self._points.fit_ends:
            failures.add(self._points.interrupt(self._save))

    def _fingerprints(self) -> dict[str, str]:
        """Return fingerprints by path of the state that must be the same on all ranks.

        These are the entries of ``cbstate``; on request also the parameters and buffers, after an epoch of training.
        """
        # A value is compared together with its name, since values without a text, such as an empty tensor, have no
        # fingerprint of their own.
        callbacks: Callbacks = self._state.callbacks
        found: dict[str, str] = {}
        if self._core.settings.check_params and torch.is_grad_enabled():
            for root, model in self._core.models.items():
                for name, tensor in (*model.named_parameters(root), *model.named_buffers(root)):
                    found[f"model.{name}"] = fingerprint((name, tensor))
        for name in self._state.cbstate if callbacks.shared is not None else ():
            if callbacks.shared is not None and not callbacks.shared.why_local(("cbstate", name)):
                with suppress(CheckpointError):  # an object that no checkpoint can hold cannot be compared either
                    packed = Packer().pack(getattr(self._state.cbstate, name), f"cbstate.{name}")
                    found[f"cbstate.{name}"] = fingerprint((name, packed))
        return found

    def merge(self, phase: Phase, failures: Failures) -> None:
        """Exchange the measurements of all ranks, which each callback merges; share the buffers after training."""
        states: dict[str, Any] = {}
        if not failures:
            with failures:
                states = {callback.name: callback.rank_state() for callback in self._state.callbacks}
        found = self._points.meet("the merging of what ranks measured", failures, (states, self.parts.shapes()))
        if not found:
            return
        with failures:
            check_shapes([shapes for _, shapes in found])
            if not isinstance(phase, AbstractValidationPhase):
                self._replica.share_buffers()
            for callback in self._state.callbacks:
                callback.merge_ranks([each.get(callback.name) for each, _ in found])

    # --- batches

    def batches(
        self, phase: Phase, source: Iterable[Any], done: int, total: int | None, *, announced: bool
    ) -> AbstractContextManager[Iterable[Any]]:
        """Return the batches of this rank: of training until the ranks end together, or of an evaluation."""
        self.sync.check_step(phase)
        if not isinstance(phase, AbstractValidationPhase):
            total = total if announced else None
            return nullcontext(self._until_interrupt(self._batches.training(phase, source, done, total)))
        left = None if total is None or self._replica.forward_is_collective else total - done
        return self._batches.evaluation(phase, self._core.feed(source, left))

    def _until_interrupt(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of an epoch of training until all ranks know of a signal to one of them."""
        for raw in batches:
            yield raw
            del raw  # otherwise the batch would stay in memory while the next one is loaded
            if self._points.interrupted:
                raise self._points.interrupt(self._save)

    def after_sync(self, phase: Phase) -> AbstractContextManager[None]:
        """Return a context that keeps a failure at the end of a training batch for the next sync point."""
        return nullcontext() if isinstance(phase, AbstractValidationPhase) else self._batches.after_sync(phase)

    @contextmanager
    def predicting(self, phase: Phase, inputs: Iterable[Any]) -> Generator[Iterable[Any]]:
        """Give the inputs. All ranks predict if the model is sharded, each with inputs of its own."""
        if not self._replica.forward_is_collective:
            yield inputs
            return
        self._points.reset()
        self._points.share("predict", lambda: None)  # a rank that does something else would make this one wait
        with self._batches.evaluation(phase, inputs) as given:
            yield given


def _models(models: Mapping[str, torch.nn.Module]) -> Description:
    """Return the parameters of all models as lines that the ranks compare."""
    named = (pair for root, model in models.items() for pair in model.named_parameters(root))
    return [
        (f"model.{name}", f"shape {tuple(param.shape)}, {'trained' if param.requires_grad else 'frozen'}")
        for name, param in named
    ]


def _optimizers(optimizers: Any) -> Description:
    """Return the parameter groups of all optimizers as lines that the ranks compare."""
    found: Description = []
    for name, optimizer in by_name(optimizers).items():
        for number, group in enumerate(optimizer.param_groups):
            where = f"group {number} of optimizer {name!r}" if name else f"group {number} of the optimizer"
            values = [f"{key}={text_of(value)}" for key, value in group.items() if key != "params"]
            texts = [type(optimizer).__name__, f"{len(group['params'])} parameters", *values]
            found += [(where, text) for text in texts]
    return found


def _versions() -> str:
    """Return the versions that must be the same on all ranks."""
    return f"flowtrain {own_version()} and torch {torch.__version__}"


def _differing(found: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the paths whose texts are not the same on all ranks, from the texts of each rank by path."""
    paths = {path for each in found for path in each}
    return sorted(path for path in paths if any(each.get(path) != found[0].get(path) for each in found))


def _loaded(found: Sequence[Mapping[str, str]]) -> RankError:
    """Return the error for ranks that have not loaded the same checkpoints, from the texts of each rank by path."""
    shown = "; ".join(f"rank {rank}: {each.get('load', 'nothing')}" for rank, each in enumerate(found))
    return RankError(
        f"The ranks have not loaded the same checkpoints since their last epoch, so their models differ: {shown}. All "
        f"ranks must call learner.load with the same file: do not put the call under `if rank == 0`."
    )


def _diverged(paths: Sequence[str], found: Sequence[Mapping[str, str]]) -> DivergedError:
    """Return the error for shared state that is not the same on all ranks.

    Args:
        paths: The paths that differ.
        found: For each rank a fingerprint by path.
    """
    ranks = [rank for rank, each in enumerate(found) if any(each.get(path) != found[0].get(path) for path in paths)]
    return DivergedError(
        tuple(paths),
        f"{', '.join(paths)} must be the same on all ranks, and differs on rank {', '.join(map(str, ranks))} from the "
        f"main rank. A callback that writes it uses what only its own rank has: the clock, random numbers, the rank, "
        f"an attribute that it fills from batches. Declare what it reads, with Read(reduce='mean') for a value of all "
        f"ranks, or let the main rank write it: Write(broadcast=True).",
    )
