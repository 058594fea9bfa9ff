"""Optional packages, which flowtrain does not install: they are imported at their first use, as by a backend.

So flowtrain imports without them, and a missing package is an error that names the extra to install.
"""

from __future__ import annotations

import importlib
from typing import Any

from flowtrain.errors import FlowtrainError, LoggingError

__all__ = ["needed"]


def needed(module: str, user: str, extra: str, error: type[FlowtrainError] = LoggingError) -> Any:
    """Import a module that a backend or a method needs, and return it.

    Args:
        module: The module, such as ``"mlflow"``.
        user: The type of the backend, or the method, for the message.
        extra: The extra of flowtrain that installs the module.
        error: The type of the error to raise.

    Raises:
        FlowtrainError: The module cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as failure:
        raise error(
            f"{user} needs {module.split('.')[0]}, which cannot be imported ({failure}). Install it: "
            f"pip install 'flowtrain[{extra}]'"
        ) from failure
