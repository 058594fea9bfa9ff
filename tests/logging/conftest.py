"""Fixtures for the tests of logging."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let MLflow keep runs in a folder, without a database and without telemetry."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
