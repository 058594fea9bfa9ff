"""LogTraces: the newest value of each trace that has grown."""

from __future__ import annotations

from pathlib import Path

from flowtrain import BackwardEnd, EpochEnd, Read, TrainingPhase
from flowtrain.callbacks import LogTraces, Traces
from flowtrain.logging import JsonlBackend
from flowtrain.testing import tiny_learner
from tests.support.logs import log_records


def test_the_log_is_the_trace_whatever_its_event(tmp_path: Path) -> None:
    backend = JsonlBackend(tmp_path / "log")
    traces = [
        Traces({"Loss": lambda learner: learner.batch.loss}, TrainingPhase),
        Traces({"Grad": lambda learner: learner.batch.grads["coeff"]}, TrainingPhase, BackwardEnd),
        Traces({"Last": lambda learner: learner.batch.loss}, TrainingPhase, EpochEnd),
        Traces({"Inputs": lambda learner: learner.batch.inputs}, TrainingPhase, EpochEnd),
    ]
    callback = LogTraces(backend)
    with tiny_learner(callback, *traces, n_batches=3) as learner:
        learner.fit(2)
    records = log_records(tmp_path / "log")
    history = learner.cbstate.tracehistory[TrainingPhase]
    for name in ("Loss", "Grad", "Last"):
        assert [(each["step"], each["value"]) for each in records if each["name"] == name] == list(history[name])
    assert [sum(each["value"]["counts"]) for each in records if each["name"] == "Inputs"] == [8, 8]
    assert {each["group"] for each in records} == {"Step/TrainingPhase"}
    assert callback.state_access().keys() == {"cbstate.tracehistory"}
    assert callback.state_access()["cbstate.tracehistory"] == Read()
    assert callback.state_dict()["seen"]["Step/TrainingPhase/Loss"] == 6
