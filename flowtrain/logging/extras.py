"""Optional packages, which a backend needs and which flowtrain does not install: they are imported at their first use.

So flowtrain imports without them, and a missing package is an error that names the extra to install.
"""

from __future__ import annotations

import importlib
from typing import Any

from flowtrain.errors import LoggingError

__all__ = ["needed"]


def needed(module: str, backend: str, extra: str) -> Any:
    """Import a module that a backend needs, and return it.

    Args:
        module: The module, such as ``"mlflow"``.
        backend: The type of the backend, for the message.
        extra: The extra of flowtrain that installs the module.

    Raises:
        LoggingError: The module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LoggingError(
            f"{backend} needs {module.split('.')[0]}, which cannot be imported ({error}). Install it: "
            f"pip install 'flowtrain[{extra}]'"
        ) from error
