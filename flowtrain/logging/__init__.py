"""Logging: backends, and what can be logged.

========================  ======================================  ====================  =============================
backend                   sink                                    needs                 takes back on resume
========================  ======================================  ====================  =============================
`JsonlBackend`            a file of JSON lines, files beside it   nothing               yes
`CsvBackend`              a table, one row for each step          nothing               yes
`TensorBoardBackend`      an event file in a folder               tensorboard           yes
`MLflowBackend`           a run of MLflow                         mlflow                by a new run with a copy
`WandbBackend`            a run of Weights & Biases               wandb                 by a new run that names its
                                                                                        predecessor
========================  ======================================  ====================  =============================

Callbacks log what is here as loggables: `Value`, `Image`, `Text`, `Histogram`, `Figure`, `File`, `Settings`. A backend
of your own is a `LoggerBackend`, and `flowtrain.testing.BackendContract` tests it.
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
    identity,
    log,
)
from flowtrain.logging.csv import CsvBackend
from flowtrain.logging.jsonl import JsonlBackend
from flowtrain.logging.mlflow import MLflowBackend
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
