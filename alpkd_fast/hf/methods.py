"""The methods by name: which layer map, scale and form of the residual each one stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layer_maps import LayerTable, make_layer_map


@dataclass(frozen=True)
class Method:
    """What a method's name fixes, where the configuration does not say otherwise.

    layer_map: a kind of :func:`alpkd_fast.make_layer_map`; None for no loss on hidden states.
    scale: of the attention; None leaves it to the configuration.
    normalize: compare L2-normalised rows.
    drops_last_layer: leave the student's last layer out, as PKD does.
    """

    layer_map: str | None
    about: str
    scale: float | None = None
    normalize: bool = False
    drops_last_layer: bool = False


METHODS = {
    "kd": Method(None, "logits alone"),
    "pkd-skip": Method("skip", "PKD-skip: every k-th teacher layer", normalize=True, drops_last_layer=True),
    "pkd-last": Method("last", "PKD-last: the last teacher layers", normalize=True, drops_last_layer=True),
    "rail": Method("random", "RAIL-KD: teacher layers drawn anew each epoch", normalize=True),
    "alp": Method("all", "ALP-KD: attention over every teacher layer"),
    "alp-no": Method("no-overlap", "ALP-NO: attention inside one bucket of teacher layers"),
    "alp-po": Method("partial-overlap", "ALP-PO: buckets that reach one layer over each border"),
    "prefix": Method("prefix", "attention over all buckets so far"),
    "uniform": Method("all", "the plain average of all teacher layers", scale=0.0),
}


def epoch_layer_map(
    layer_map: str | list[list[int]], m: int, n: int, drop_last: bool, seed: int, epoch: int
) -> LayerTable:
    """Return the layer map of an epoch, one row per student layer that takes part.

    A map by name is made for m layers, then ``drop_last`` leaves its last row out; a list is one row per
    layer that takes part. A random map is the (epoch + 1)-th draw of a generator with this seed, so that
    every rank and every resumed run draws the same maps.
    """
    if not isinstance(layer_map, str):
        return tuple(tuple(layers) for layers in layer_map)
    if layer_map == "random":
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epoch):
            make_layer_map("random", m, n, generator)
        table = make_layer_map("random", m, n, generator)
    else:
        table = make_layer_map(layer_map, m, n)
    return table[:-1] if drop_last else table
