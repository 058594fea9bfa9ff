"""A learner that is closed and dropped is freed at once; one that is only dropped is freed by the garbage collector."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flowtrain import (
    BatchEnd,
    Callback,
    CancelFittingException,
    EpochEnd,
    ExecutorError,
    FitBegin,
    Learner,
    LearnerView,
    LoggingError,
    Phase,
    Read,
    TorchCore,
    TrainingPhase,
    UsageError,
    ValidationPhase,
    Write,
    on,
)
from flowtrain.callbacks import (
    CustomCallback,
    LogMetrics,
    LogVisualization,
    Timer,
    throttle,
)
from flowtrain.logging import CsvBackend, JsonlBackend, TensorBoardBackend, Value
from flowtrain.testing import TinyModel, tiny_batches, tiny_learner
from flowtrain_dask import DaskExecutor
from tests.support.bundled import KINDS, case_of
from tests.support.logs import log_records, log_steps
from tests.support.waiting import wait_for

EXECUTORS: dict[str, Callable[[], Any]] = {
    "serial": lambda: "serial",
    "dask": DaskExecutor,
    "always": partial(DaskExecutor, defer="always", parallel="always", workers=2),
}


pytestmark = pytest.mark.usefixtures("freeze_what_is_there")


@contextmanager
def without_collector() -> Generator[None]:
    """Turn the garbage collector off, so that only reference counts free objects."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def watched(learner: Learner) -> dict[str, Any]:
    """Return weak references to the objects of a learner that are large or hold an open file."""
    optimizer = learner.optimizer
    parts = {"learner": learner, "model": learner.model, "optimizer": optimizer, "core": learner.core}
    parts |= {"executor": learner.executor, "data": learner.data}
    parts |= {f"parameter {name}": parameter for name, parameter in learner.params.items()}
    parts |= {callback.name: callback for callback in learner.callbacks}
    return {name: weakref.ref(part) for name, part in parts.items()}


def alive(references: dict[str, Any]) -> list[str]:
    return [name for name, reference in references.items() if reference() is not None]


def open_files(folder: Path) -> list[str]:
    """Return the files below a folder that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the descriptor of the listing itself
            continue
        if path.startswith(str(folder)):
            found.append(path)
    return sorted(found)


def threads_of_flowtrain() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("flowtrain")]


def several_files(folder: Path) -> list[Callback]:
    """Return loggers that write several files, one of them throttled."""
    log, table = JsonlBackend(folder / "log.jsonl"), CsvBackend(folder / "a.csv")
    return [throttle(LogMetrics(log, table), BatchEnd, every=2), LogMetrics(TensorBoardBackend(folder / "board"))]


MAKERS: dict[str, Callable[[Path], Sequence[Callback]]] = {
    "several files": several_files,
    **{kind.__name__: case_of(kind).make for kind in KINDS},
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("executor", ["serial", "dask"])
def test_closed_and_dropped_is_gone(
    name: str, executor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with without_collector():
        learner = tiny_learner(*MAKERS[name](tmp_path), executor=EXECUTORS[executor](), n_batches=6)
        learner.fit(2)
        references = watched(learner)
        learner.close()
        del learner
        assert alive(references) == []
        assert open_files(tmp_path) == []
        assert threads_of_flowtrain() == []


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("way", ["unused", "fit", "with", "failed", "failed with", "cancelled", "interrupted", "step"])
def test_gone_however_it_was_used(way: str, executor: str) -> None:
    class Ends(Callback):
        """Ends the fit in the way that the test gives."""

        @on(BatchEnd, TrainingPhase)
        def end(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
            if way.startswith("failed"):
                raise ValueError("broken")
            if way == "cancelled":
                raise CancelFittingException("enough")
            if way == "interrupted":
                raise KeyboardInterrupt

    def use(learner: Learner) -> None:
        if way == "step":
            learner.step(TrainingPhase, learner.data[TrainingPhase][0])
            learner.epoch(ValidationPhase)
            learner.validate()
        elif way != "unused":
            learner.fit(1)

    def run(executor: Any, references: dict[str, Any]) -> None:
        learner = tiny_learner(Ends(), Other(), executor=executor)
        references |= watched(learner)
        if "with" in way:
            with learner:
                use(learner)
            return
        with suppress(ValueError, KeyboardInterrupt):
            use(learner)
        learner.callbacks.explain()
        learner.close()
        assert (type(learner.stopped) is ValueError) == (way == "failed")

    with without_collector():
        references: dict[str, Any] = {}
        with suppress(ValueError):
            run(EXECUTORS[executor](), references)
        assert len(references) > 6
        assert alive(references) == []


class Other(Callback):
    """A callback that is independent of the others, so that an executor can run it at the same time."""

    def state_access(self) -> Any:
        return {"cbstate.other": Write(), "batch.outputs": Read(), "optimizer.hyperparams": Read(), "data": Read()}

    def setup(self, learner: LearnerView) -> None:
        learner.cbstate.other = torch.zeros(3)

    @on(BatchEnd)
    def act(self, event: BatchEnd, phase: Phase, learner: LearnerView) -> None:
        learner.cbstate.other = learner.batch.outputs.detach()
        assert learner.optimizer.hyperparams
        assert len(learner.data) == 2


def test_a_failure_in_a_with_block_leaves_nothing_when_it_is_handled() -> None:
    with without_collector():
        references: dict[str, Any] = {}

        def run() -> None:
            with tiny_learner(CustomCallback(broken, BatchEnd)) as learner:
                references.update(watched(learner))
                learner.fit(1)

        with suppress(ValueError):
            run()
        assert alive(references) == []


def broken(learner: LearnerView) -> None:
    raise ValueError("broken")


@pytest.mark.parametrize(
    "options",
    [
        {"core": partial(TorchCore, accumulate=3, clip_grad_norm=1.0)},
        {"core": partial(TorchCore, precision="bf16")},
        {"core": partial(TorchCore, precision="fp16", device="cpu")},
        {"core": partial(TorchCore, lag=2)},
        {"strict": lambda: True},
        {"lossfn": torch.nn.MSELoss},
        {"optimizer": lambda: partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
    ],
    ids=", ".join,
)
def test_gone_with_every_core(options: dict[str, Callable[[], Any]]) -> None:
    with without_collector():
        learner = tiny_learner(Other(), **{name: make() for name, make in options.items()})
        learner.fit(1)
        references = watched(learner)
        learner.close()
        del learner
        assert alive(references) == []


def test_what_the_user_still_has_keeps_nothing_else() -> None:
    """A core, an executor, a view, a callback or a state that outlives the learner does not refer to the model."""
    with without_collector():
        core, executor, other = TorchCore(), DaskExecutor(), Other()
        views: list[LearnerView] = []
        keep = CustomCallback(views.append, FitBegin, access={"model": Read(), "data": Read()})
        learner = tiny_learner(other, keep, core=core, executor=executor)
        learner.fit(1)
        kept = [learner.cbstate.history, learner.state, learner.loop]
        references = {name: each for name, each in watched(learner).items() if name in ("learner", "model", "data")}
        learner.close()
        del learner
        assert alive(references) == []
        assert (len(views), len(kept)) == (1, 3)
    with pytest.raises(Exception, match="belongs to another learner"):
        tiny_learner(core=core)


def test_a_closed_learner_can_be_read() -> None:
    learner = tiny_learner(Other(), executor="dask")
    learner.fit(1)
    explained, written = learner.callbacks.explain(), repr(learner)
    learner.close()
    learner.close()
    assert learner.callbacks.explain() != ""
    assert [line for line in learner.callbacks.explain().split("\n") if "Other" in line] == [
        line for line in explained.split("\n") if "Other" in line
    ]
    assert repr(learner) == written
    assert isinstance(learner.model, TinyModel)
    assert learner.cbstate.history[TrainingPhase].epochs == 1
    assert learner.get_callback(Other) is next(iter(learner.callbacks))
    assert set(learner.params) == {"coeff"}
    text = r"on a closed learner: its executor has given back all it held\. Make a new one\."
    for do in (lambda: learner.fit(1), lambda: learner.add_callback(Timer()), lambda: learner.remove_callback(Other)):
        with pytest.raises(ExecutorError, match=text):
            do()
    with pytest.raises(ExecutorError, match="The learner is closed, so it runs no handlers of BatchEnd: its executor"):
        learner.fire(BatchEnd(), TrainingPhase())


def test_the_exception_that_ended_a_fit_stays_without_its_frames() -> None:
    learner = tiny_learner(CustomCallback(broken, BatchEnd), CustomCallback(broken, BatchEnd))
    with pytest.raises(ValueError, match="broken") as caught:
        learner.fit(1)
    assert learner.stopped is caught.value
    learner.close()
    kept: Any = learner.stopped
    assert caught.value.__traceback__ is not None
    assert (type(kept), str(kept), kept.__notes__) == (ValueError, "broken", caught.value.__notes__)
    assert [type(other) for other in kept.others] == [ValueError]
    assert kept.__traceback__ is kept.others[0].__traceback__ is None


def test_close_in_a_handler_is_refused() -> None:
    found: list[Learner] = []
    learner = tiny_learner(CustomCallback(lambda view: found[0].close(), BatchEnd))
    found.append(learner)
    with pytest.raises(UsageError, match=r"^close\(\) was called inside fit, from a handler or a step\."):
        learner.fit(1)
    learner.close()


# --- dropped, and not closed


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("way", ["fit", "failed"])
def test_dropped_is_gone_when_the_collector_comes_files_and_all(way: str, executor: str, tmp_path: Path) -> None:
    backends = [JsonlBackend(tmp_path / "a.jsonl"), CsvBackend(tmp_path / "a.csv"), TensorBoardBackend(tmp_path / "b")]
    wrong = [CustomCallback(broken, EpochEnd, ValidationPhase)] if way == "failed" else []
    learner = tiny_learner(LogMetrics(*backends), *wrong, executor=EXECUTORS[executor](), n_batches=5)
    with suppress(ValueError):
        learner.fit(1)
    assert len(open_files(tmp_path)) == 4  # TensorBoard has a file for each of the two phases
    references = watched(learner)
    del learner, wrong
    gc.collect()
    assert alive(references) == []
    assert open_files(tmp_path) == []
    wait_for(lambda: threads_of_flowtrain() == [])
    lines = log_records(tmp_path / "a.jsonl")
    steps = [line["step"] for line in lines if line["group"] == "Step/TrainingPhase"]
    assert steps == [1, 2, 3, 4, 5]


def test_what_waits_in_a_lane_is_written_before_its_file_is_closed(tmp_path: Path) -> None:
    """The dropped learner's lane still has records: its file is closed after the last one is written."""
    go = threading.Event()
    backend = JsonlBackend(tmp_path / "log.jsonl")
    waits = LogVisualization(partial(value_when, go), backend, every=1, phase_type=TrainingPhase)
    learner = tiny_learner(waits, executor=DaskExecutor(defer="always"), n_batches=4)
    learner.loop.sinks.open()
    for raw in learner.data[TrainingPhase]:
        learner.step(TrainingPhase, raw)
    del learner
    gc.collect()
    assert len(open_files(tmp_path)) == 1
    go.set()
    wait_for(lambda: open_files(tmp_path) == [])
    assert log_steps(tmp_path / "log.jsonl") == [1, 2, 3, 4]


def value_when(go: threading.Event, learner: LearnerView) -> Value:
    go.wait(30)
    return Value(1.0)


def test_a_backend_is_one_learner_s_while_it_is_open(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log.jsonl", append=True)
    first = tiny_learner(LogMetrics(backend), n_batches=1)
    second = tiny_learner(LogMetrics(backend), n_batches=1)
    first.fit(1)
    with pytest.raises(LoggingError) as caught:
        second.fit(1)
    assert str(caught.value) == (
        f"JsonlBackend({str(tmp_path / 'log.jsonl')!r}) is open for another learner, and the records of the two would "
        f"be mixed. Close that one first: write `with Learner(...) as learner:`, or learner.close(). Or make a backend "
        f"for each learner."
    )
    first.fit(1)  # the refused attempt has not changed this learner
    first.close()
    second.fit(1)
    second.close()
    third = tiny_learner(LogMetrics(backend), n_batches=1)
    third.fit(1)
    third.remove_callback(LogMetrics)
    fourth = tiny_learner(LogMetrics(backend), n_batches=1)
    fourth.fit(1)
    del fourth  # the dropped learner was never closed; the next learner detects that
    fifth = tiny_learner(LogMetrics(backend), data=tiny_batches(n_batches=1))
    fifth.epoch(TrainingPhase)
    fifth.close()
    lines = log_records(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines if line["group"] == "Step/TrainingPhase"] == [1, 2, 1, 1, 1, 1]
