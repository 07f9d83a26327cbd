"""One clear message where a library of the extra ``[hf]`` is missing."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A library of the extra is not installed; the message holds the pip command."""


def require(name: str, purpose: str) -> ModuleType:
    """Import and return the module ``name``; raise MissingExtraError with the remedy where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'{purpose} needs {error.name}, which is not installed: pip install "alpkd-fast[hf]"'
        ) from error
