"""Missing packages: the error names the package, the feature that needs it, and the install command."""

from __future__ import annotations

import json
import sys

import pytest

from flowtrain.errors import LoggingError
from flowtrain.logging.extras import needed


def test_what_is_there_is_imported() -> None:
    assert needed("json", "JsonBackend", "json") is json


def test_what_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mlflow", "mlflow.tracking"):  # another test may have imported the second one
        monkeypatch.setitem(sys.modules, name, None)  # this makes the import fail as if the package were missing
    with pytest.raises(
        LoggingError, match=r"^MLflowBackend needs mlflow, which cannot be imported \(.*\)\. "
    ) as caught:
        needed("mlflow.tracking", "MLflowBackend", "mlflow")
    assert str(caught.value).endswith("pip install 'flowtrain[mlflow]'")
    assert isinstance(caught.value.__cause__, ImportError)
