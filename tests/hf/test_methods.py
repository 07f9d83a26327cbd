"""Methods by name: their layer maps, and what the configuration refuses."""

from __future__ import annotations

import pytest
import torch

from alpkd_fast import make_layer_map
from alpkd_fast.hf import DistillationConfig
from alpkd_fast.hf.methods import METHODS, epoch_layer_map


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("pkd-skip", ((1,), (3,), (5,), (7,), (9,))),  # the PKD paper's 2, 4, 6, 8, 10 counted from 1
        ("pkd-last", ((6,), (7,), (8,), (9,), (10,))),
        ("alp", (tuple(range(12)),) * 6),
        ("alp-no", tuple((2 * i, 2 * i + 1) for i in range(6))),
        ("uniform", (tuple(range(12)),) * 6),
    ],
)
def test_maps_of_twelve_to_six(method, expected):
    config = DistillationConfig(method=method)
    assert epoch_layer_map(config.resolved_layer_map, 6, 12, config.drops_last_layer, 0, epoch=0) == expected


def test_random_maps_depend_on_seed_and_epoch_alone():
    maps = [epoch_layer_map("random", 4, 12, False, seed=5, epoch=epoch) for epoch in range(4)]
    generator = torch.Generator().manual_seed(5)
    assert maps == [make_layer_map("random", 4, 12, generator) for _ in range(4)]
    assert len(set(maps)) > 1
    assert maps != [epoch_layer_map("random", 4, 12, False, seed=6, epoch=epoch) for epoch in range(4)]


def test_options_of_each_method():
    forms = {name: DistillationConfig(method=name).loss_options for name in METHODS}
    assert [name for name, form in forms.items() if form["normalize"]] == ["pkd-skip", "pkd-last", "rail"]
    assert [name for name, form in forms.items() if form["scale"] is not None] == ["uniform"]
    assert [name for name in METHODS if not DistillationConfig(method=name).uses_hidden_states] == ["kd"]
    assert not DistillationConfig(method="pkd-skip", normalize=False).loss_options["normalize"]
    assert not DistillationConfig(method="pkd-skip", drop_last_layer=False).drops_last_layer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "pkd"}, "method: got 'pkd'; allowed are kd, pkd-skip"),
        ({"pooling": "max"}, "pooling: got 'max'; allowed are token"),
        ({"layer_map": "even"}, "layer_map: got 'even'; allowed are all"),
        ({"method": "kd", "layer_map": "all"}, "layer_map: method 'kd' uses no hidden states"),
        ({"projection": "yes"}, "projection: got 'yes'; allowed are auto"),
        ({"temperature": 0}, "temperature must be finite and > 0, got 0"),
        ({"kd_weight": -1}, "kd_weight must be finite and >= 0, got -1"),
        ({"scale": -1.0}, "scale must be finite and >= 0"),
        ({"method": "uniform", "scale": 1.0}, "method 'uniform' fixes it to 0"),
        ({"method": "uniform", "learn_scale": True}, "learn_scale: method 'uniform' fixes the scale to 0"),
        ({"projected_side": "both"}, "projected_side: got 'both'; allowed are teacher, student"),
        ({"teacher_batch_size": 0}, "teacher_batch_size: got 0; allowed are whole numbers >= 1, and None for"),
        ({"teacher_batch_size": 2.5}, "teacher_batch_size: got 2.5; allowed"),
        ({"teacher_batch_size": True}, "teacher_batch_size: got True; allowed"),
        ({"method": "kd", "ce_weight": 0, "kd_weight": 0}, "leave no loss"),
    ],
)
def test_configuration_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        DistillationConfig(**options)
