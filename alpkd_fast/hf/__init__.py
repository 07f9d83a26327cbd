"""Distillation with Hugging Face transformers (extra ``[hf]``).

The names below load transformers when they are first used, so that the tables of methods and tasks
can be read without it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DistillationConfig
    from .students import student_from_teacher
    from .trainer import DistillationTrainer

__all__ = ["DistillationConfig", "DistillationTrainer", "student_from_teacher"]

_ROOMS = {"DistillationConfig": "config", "DistillationTrainer": "trainer", "student_from_teacher": "students"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
