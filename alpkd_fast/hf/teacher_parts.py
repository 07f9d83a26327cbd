"""The frozen teacher on a part of the batch at a time, so that its hidden states are there for that part alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .teacher_cache import Outputs

Inputs = dict[str, Any]
Rows = list[Tensor] | None  # one tensor per layer, or None where hidden states are not used


def run_in_parts(
    run: Callable[[Inputs], Outputs],
    inputs: Inputs,
    batch: int,
    size: int | None,
    use: Callable[[Rows, slice], None],
) -> Tensor | None:
    """Run the teacher on ``size`` of the ``batch`` sequences at a time; return the logits (batch, ...) of all, or None.

    Args:
        run: returns the teacher's logits and rows for inputs. size: None for the whole batch.
        use: gets each part's rows and where in the batch the part lies. Unless it keeps them, they are freed before
            the next part is run.
    """
    if size is None or size >= batch:
        logits, rows = run(inputs)
        use(rows, slice(0, batch))
        return logits
    whole: Tensor | None = None
    for start in range(0, batch, size):
        part = slice(start, start + size)
        logits, rows = run(_cut(inputs, part, batch))
        use(rows, part)
        del rows
        if logits is None:
            continue
        if whole is None:  # torch.cat after the last part would hold all logits twice
            whole = logits.new_empty(batch, *logits.shape[1:])
        whole[part] = logits
    return whole


def whole_outputs(run: Callable[[Inputs], Outputs], inputs: Inputs, batch: int, size: int | None) -> Outputs:
    """Return the teacher's logits and rows of the whole batch, run in parts."""
    parts: list[Rows] = []
    logits = run_in_parts(run, inputs, batch, size, lambda rows, _: parts.append(rows))
    if len(parts) == 1:
        return logits, parts[0]
    layers = [rows for rows in parts if rows is not None]
    return logits, [torch.cat(part) for part in zip(*layers, strict=True)] if layers else None


def _cut(inputs: Inputs, part: slice, batch: int) -> Inputs:
    """The part of every input that has one entry per sequence; the others as they are."""
    return {
        name: value[part] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch else value
        for name, value in inputs.items()
    }
