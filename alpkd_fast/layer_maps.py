"""Layer maps: which teacher layers each student layer may attend to.

A layer map is kept as a tuple of m ascending tuples of teacher indices, or ``None`` where every
student layer may attend to every teacher layer (no table to check, store or hand to a kernel).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from torch import Tensor

LayerTable = tuple[tuple[int, ...], ...]

_WORD = 62  # layers that an integer holds as bits

KINDS = ("all", "no-overlap", "partial-overlap", "prefix", "skip", "last", "random")


def make_layer_map(kind: str, m: int, n: int, generator: torch.Generator | None = None) -> LayerTable:
    """Make the table of a named layer map.

    Args:
        kind: ``"all"`` (ALP-KD), ``"no-overlap"`` (ALP-NO: contiguous buckets), ``"partial-overlap"``
            (ALP-PO: buckets that reach one layer over each border), ``"prefix"`` (the union of the
            buckets so far), ``"skip"`` (PKD-skip: the last layer of each bucket), ``"last"`` (PKD-last:
            the last m layers) or ``"random"`` (RAIL-KD: m of n layers drawn without replacement, in
            ascending order).
        m: Number of student layers, at least 1.
        n: Number of teacher layers, at least 1, and at least m for every kind but ``"all"``.
        generator: Source of randomness for ``"random"``; the default generator without it.

    Returns:
        A tuple of m ascending tuples of teacher indices, all counted from 0.

    Raises:
        ValueError: An unknown kind, m or n below 1, or m > n where the kind needs m <= n.

    Source: Passban et al. 2021 (arXiv 2012.14022), section 3; Sun et al. 2019 (PKD); Haidar et al.
    2022 (RAIL-KD).
    """
    if kind not in KINDS:
        raise ValueError(f"layer_map: unknown kind {kind!r}; known kinds are {', '.join(KINDS)}")
    if m < 1 or n < 1:
        raise ValueError(f"layer_map {kind!r}: m and n must be at least 1, got m={m}, n={n}; pass at least one layer")
    if kind == "all":
        return (tuple(range(n)),) * m
    if m > n:
        raise ValueError(
            f"layer_map {kind!r} needs at most as many student layers as teacher layers, got m={m} student and "
            f'n={n} teacher layers; use layer_map="all", which has no such limit'
        )
    if kind == "random":
        picks = torch.randperm(n, generator=generator)[:m].sort().values.tolist()
        return tuple((j,) for j in picks)
    cut = [i * n // m for i in range(m + 1)]  # bucket i is layers cut[i] … cut[i+1]-1
    if kind == "no-overlap":
        return tuple(tuple(range(cut[i], cut[i + 1])) for i in range(m))
    if kind == "partial-overlap":
        return tuple(tuple(range(max(cut[i] - 1, 0), min(cut[i + 1] + 1, n))) for i in range(m))
    if kind == "prefix":
        return tuple(tuple(range(cut[i + 1])) for i in range(m))
    if kind == "skip":
        return tuple((cut[i + 1] - 1,) for i in range(m))
    return tuple((n - m + i,) for i in range(m))  # "last"


def parse_layer_map(layer_map: str | Tensor | Sequence[Sequence[int]], m: int, n: int) -> LayerTable | None:
    """Turn a user's ``layer_map`` into a checked table, or ``None`` where everything is allowed."""
    if isinstance(layer_map, str):
        if layer_map == "all":
            return None
        if layer_map == "random":
            raise ValueError(
                'layer_map="random" would draw a new map at every call; draw it once (RAIL-KD: once per epoch) with '
                'make_layer_map("random", m, n, generator) and pass the table'
            )
        return make_layer_map(layer_map, m, n)
    table = _from_mask(layer_map, m, n) if isinstance(layer_map, Tensor) else _from_indices(layer_map, m, n)
    for i, layers in enumerate(table):
        if not layers:
            raise ValueError(
                f"layer_map: student layer {i} may attend to no teacher layer; allow at least one, or leave the "
                "student layer out of student_hidden_states"
            )
    return None if all(len(layers) == n for layers in table) else table


def _from_mask(layer_map: Tensor, m: int, n: int) -> LayerTable:
    if layer_map.dtype != torch.bool or layer_map.device.type != "cpu":
        raise ValueError(
            f"layer_map: a tensor must be bool and on the CPU, got {layer_map.dtype} on {layer_map.device}; "
            "use layer_map.bool().cpu()"
        )
    if tuple(layer_map.shape) != (m, n):
        raise ValueError(
            f"layer_map: got shape {tuple(layer_map.shape)}, but {m} student and {n} teacher layers need ({m}, {n}); "
            "None entries of the hidden states do not count"
        )
    return tuple(tuple(j for j, allowed in enumerate(row) if allowed) for row in layer_map.tolist())


class _BoolError(TypeError):
    """A bool where an index should be."""


def _index(j: int) -> int:
    if str(getattr(j, "dtype", type(j).__name__)).endswith("bool"):  # Python's, numpy's and torch's: True is no layer 1
        raise _BoolError
    return index(j)


def _from_indices(layer_map: Sequence[Sequence[int]], m: int, n: int) -> LayerTable:
    try:
        rows = [[_index(j) for j in layers] for layers in layer_map]
    except _BoolError:
        raise TypeError(
            f"layer_map: got {layer_map!r}, which holds bools; a nested sequence holds teacher indices such as "
            "[(0, 1), (2, 3)], and a table of bools is a tensor: pass torch.tensor(layer_map)"
        ) from None
    except TypeError:
        raise TypeError(
            f"layer_map: got {layer_map!r}; pass one of {', '.join(k for k in KINDS if k != 'random')}, a bool tensor "
            "(m, n), or a sequence of m sequences of teacher indices such as [(0, 1), (2, 3)]"
        ) from None
    if len(rows) != m:
        raise ValueError(
            f"layer_map: got {len(rows)} rows for {m} student layers; pass one sequence of teacher indices per "
            "student layer"
        )
    for i, layers in enumerate(rows):
        for j in layers:
            if not 0 <= j < n:
                raise ValueError(
                    f"layer_map: student layer {i} names teacher layer {j}, but {n} teacher layers are counted "
                    f"0 to {n - 1}; None entries of the hidden states do not count"
                )
    return tuple(tuple(sorted(set(layers))) for layers in rows)


def counts_and_layers(table: LayerTable | None) -> tuple[list[int], list[int]]:
    """The table as the operators take it: the number of teacher layers per student layer, and all of them in a row;
    nothing for None."""
    if table is None:
        return [], []
    return [len(layers) for layers in table], [j for layers in table for j in layers]


def allowed_on_device(table: LayerTable, n: int, device: torch.device) -> Tensor:
    """The table as (m, n) bool, made on the device: a copy from the host would wait for it, and end the capture of a
    CUDA graph."""
    columns = torch.arange(n, device=device)
    rows = [torch.zeros(n, dtype=torch.bool, device=device) for _ in table]
    for i, layers in enumerate(table):
        for start in range(0, n, _WORD):
            word = sum(1 << (j - start) for j in layers if start <= j < start + _WORD)
            bits = torch.bitwise_right_shift(word, (columns - start).clamp(0, _WORD - 1)) & 1
            rows[i] |= (bits != 0) & (columns >= start) & (columns < start + _WORD)
    return torch.stack(rows)
