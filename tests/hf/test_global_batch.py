"""Gradients and losses do not depend on how a global batch is cut into accumulation steps and ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from one_step import CASES, GLOBAL_BATCH, one_step

# Sums of a few hundred fp32 terms in another order: rounding of the largest partial sum, with room for a few layers.
RELATIVE = 64 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {case: one_step(case, GLOBAL_BATCH, 1, folder, teacher_batch_size=None) for case in CASES}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, here / "one_step.py", folder], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


def assert_same(actual, expected):
    (gradients, logged), (whole_gradients, whole_logged) = actual, expected
    assert set(gradients) == set(whole_gradients)
    largest: dict[str, float] = {}
    for name, gradient in whole_gradients.items():
        module = name.rpartition(".")[0]
        largest[module] = max(largest.get(module, 0.0), gradient.abs().max().item())
    for name, gradient in whole_gradients.items():
        assert torch.isfinite(gradient).all(), name
        # A key's bias has the gradient 0, as a sum of terms of the size of its weight's gradient that cancel.
        allowed = RELATIVE * largest[name.rpartition(".")[0]]
        worst = (gradients[name] - gradient).abs().max().item()
        assert worst <= allowed, f"{name}: {worst} > {allowed}"
    for name in ("loss", "ce", "kd", "alp"):
        assert logged[name] == pytest.approx(whole_logged[name], rel=RELATIVE, abs=1e-6), name
    layers = [name for name in whole_logged if name.startswith(("alp_layer", "alp_entropy"))]
    assert layers
    for name in layers:
        assert logged[name] == pytest.approx(whole_logged[name], rel=RELATIVE, abs=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_accumulation_is_one_large_batch(case, whole, tmp_path):
    assert_same(one_step(case, GLOBAL_BATCH // 4, 4, tmp_path), whole[case])


@pytest.mark.parametrize("case", CASES)
def test_teacher_in_parts_is_one_large_batch(case, whole, tmp_path):
    """Parts of 3, 3 and 2; in "half-padding" the last one has nothing but padding."""
    assert_same(one_step(case, GLOBAL_BATCH, 1, tmp_path, teacher_batch_size=3), whole[case])


def test_compiled_models_are_the_plain_ones(whole, tmp_path):
    """The capture and the loss are traced with the model; four batches of different lengths run through it. What the
    compiler makes of the graphs is tested with the loss, and would take minutes here."""
    torch._dynamo.reset()
    case = "teacher-in-parts"
    assert_same(one_step(case, GLOBAL_BATCH // 4, 4, tmp_path, torch_compile_backend="aot_eager"), whole[case])


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_are_one_large_batch(case, whole, two_ranks):
    """With accumulation, uneven lengths, φ; in "half-padding" one rank has nothing but padding."""
    assert_same(two_ranks[case], whole[case])


@pytest.mark.parametrize("case", [case for case in CASES if "hidden_size" in CASES[case]])
def test_projection_gets_a_gradient(case, whole):
    gradients, _ = whole[case]
    assert gradients["alp_loss.proj_weight"].abs().max() > 0
    assert gradients["alp_loss.proj_bias"].abs().max() > 0
    assert ("alp_loss.log_scale" in gradients) == ("learn_scale" in CASES[case])
