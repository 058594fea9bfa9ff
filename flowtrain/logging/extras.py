"""Packages that a backend needs and that are not installed with flowtrain: imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any

from flowtrain.errors import LoggingError

__all__ = ["needed"]


def needed(module: str, backend: str, extra: str) -> Any:
    """Import a module that a backend needs.

    Args:
        module: The module, such as ``"mlflow"``.
        backend: The backend's type, for the message.
        extra: The extra of flowtrain that has it.

    Raises:
        LoggingError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LoggingError(
            f"{backend} needs {module.split('.')[0]}, which cannot be imported ({error}). Install it: "
            f"pip install 'flowtrain[{extra}]'"
        ) from error
