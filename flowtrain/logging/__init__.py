"""Logging: the backends, and the loggables that callbacks give them.

========================  ======================================  ==============  =====================================
backend                   sink                                    needs           on resume, later records
========================  ======================================  ==============  =====================================
`JsonlBackend`            a file of JSON lines, files beside it   no package      are removed
`CsvBackend`              a table, one row for each step          no package      are removed
`TensorBoardBackend`      an event file in each phase's folder    tensorboard     are removed
`MLflowBackend`           a run of MLflow                         mlflow          stay; a new run copies earlier ones
`WandbBackend`            a run of Weights & Biases               wandb           stay; a new run names the earlier run
========================  ======================================  ==============  =====================================

The loggables are `Value`, `Image`, `Text`, `Histogram`, `Figure`, `File` and `Settings`. A user's backend is a subclass
of `LoggerBackend`, and `flowtrain.testing.BackendContract` tests it.

`backend` has the loggables and the base class of backends, and `records` the way of a record to its backend; `jsonl`,
`csv`, `tensorboard`, `mlflow` and `wandb` each have one backend. These share `files` (records appended to a file, or a
file that is replaced), `values` (plain values of what users log), `names` (the names that a tracker takes), `pictures`
(images and figures as PNG) and `distribution` (the bins of a histogram). `extras` imports an optional package at its
first use.
"""

from __future__ import annotations

from flowtrain.logging.backend import (
    Figure,
    File,
    Histogram,
    Image,
    Loggable,
    LoggerBackend,
    Outcome,
    Run,
    Settings,
    Text,
    Value,
)
from flowtrain.logging.csv import CsvBackend
from flowtrain.logging.jsonl import JsonlBackend
from flowtrain.logging.mlflow import MLflowBackend
from flowtrain.logging.records import identity, log
from flowtrain.logging.tensorboard import TensorBoardBackend
from flowtrain.logging.wandb import WandbBackend

__all__ = [
    "CsvBackend",
    "Figure",
    "File",
    "Histogram",
    "Image",
    "JsonlBackend",
    "Loggable",
    "LoggerBackend",
    "MLflowBackend",
    "Outcome",
    "Run",
    "Settings",
    "TensorBoardBackend",
    "Text",
    "Value",
    "WandbBackend",
    "identity",
    "log",
]
