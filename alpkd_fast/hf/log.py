"""StepLog: what is logged, summed on the device until a log is due."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class StepLog:
    """The means of one logged interval; each batch adds its share of its global batch.

    A group of batches that the data's end cuts short makes no optimizer step: its gradient is added to the next
    group's. So its losses belong to the next step too, as in the Trainer's own "loss", while a mean over rows is over
    the rows of both groups.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._of_groups: set[str] = set()
        self._steps = self._groups = 0

    def __bool__(self) -> bool:
        return bool(self._sums)

    def begin(self, batches: int, wanted: int) -> None:
        """Count a group of batches: 0 of them, where the data has ended ahead of the last step, are none."""
        self._groups += batches > 0
        self._steps += batches == wanted

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add to a mean over optimizer steps."""
        self._sums[name] = self._sums[name] + value.detach() if name in self._sums else value.detach()

    def add_mean(self, name: str, value: Tensor) -> None:
        """Add to a mean over groups of batches."""
        self._of_groups.add(name)
        self.add_loss(name, value)

    def means(self, reduce: Callable[..., Any]) -> dict[str, Tensor]:
        """Return the means over all ranks, on the CPU: the only place that waits for the device."""
        flat = torch.cat([value.float().flatten() for value in self._sums.values()])
        parts = reduce(flat, "sum").cpu().split([value.numel() for value in self._sums.values()])
        return {
            name: part.view(value.shape) / (self._groups if name in self._of_groups else self._steps)
            for part, (name, value) in zip(parts, self._sums.items(), strict=True)
        }
