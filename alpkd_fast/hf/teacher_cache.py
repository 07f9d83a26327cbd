"""TeacherCache: a frozen teacher's outputs for rows that it has seen before."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

ROW_COLUMN = "row"  # the training data's column of row numbers

# Logits (B, classes); pooled rows, one (B, D) per layer. None for what is not used.
Outputs = tuple[Tensor | None, list[Tensor] | None]


class TeacherCache:
    """Keeps, per row of the training data, the teacher's logits and pooled hidden states.

    For data whose tokens never change and for pooled rows ("cls", "mean", "last"): a row costs
    4 · (classes + n · D) bytes of the CPU's memory, 37 KB for 12 layers of 768. Several trainers with the same teacher
    and data may share one. What comes back was computed beside other rows than asked for, so it may differ in the last
    bits.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, dict[int, tuple[Tensor | None, Tensor | None]]] = {}

    def get(self, kind: Hashable, numbers: Tensor, compute: Callable[[], Outputs]) -> Outputs:
        """Return the outputs for rows ``numbers`` (B,), on their device; ``compute`` gives those of the whole batch."""
        kept = self._kept.setdefault(kind, {})
        ids = numbers.tolist()
        if not all(i in kept for i in ids):
            logits, layers = compute()
            # The rows of all the data may be more than an accelerator holds.
            host = None if logits is None else logits.cpu()
            stacked = None if layers is None else torch.stack(layers, dim=1).cpu()  # (B, n, D)
            for at, i in enumerate(ids):
                kept[i] = _row(host, at), _row(stacked, at)
            return logits, layers
        rows, states = ([row for row in part if row is not None] for part in zip(*(kept[i] for i in ids), strict=True))
        return (
            torch.stack(rows).to(numbers.device, non_blocking=True) if rows else None,
            list(torch.stack(states, dim=1).to(numbers.device, non_blocking=True).unbind(0)) if states else None,
        )


def _row(tensor: Tensor | None, at: int) -> Tensor | None:
    return None if tensor is None else tensor[at].clone()  # a view would keep the whole batch
