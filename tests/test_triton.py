"""What only the Triton backend has: layer addresses, launches, in-place scaling, the ahead-of-time check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from common import SCALED_ROWS, both_sides

import alpkd_fast
from alpkd_fast import alp_loss
from alpkd_fast.problem import POOLINGS

pytest.importorskip("triton")
from alpkd_fast.kernels.layers import as_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    alpkd_fast.backends()["triton"] is not None, reason=f"triton: {alpkd_fast.backends()['triton']}"
)
DEVICE = "cpu" if INTERPRETED else "cuda"


def addresses(rows, inner_rows: int, layers: int, positions: int) -> list[list[int]]:
    """Where the kernels look for every row, in bytes."""
    itemsize = rows.tensors[0].element_size()
    found = []
    for k in range(layers):
        base = rows.tensors[k].data_ptr() if len(rows.tensors) > 1 else rows.tensors[0].data_ptr()
        base += k * rows.layer_stride * itemsize if len(rows.tensors) == 1 else 0
        outer, inner = (x[k] if len(x) > 1 else x[0] for x in (rows.outer, rows.inner))
        if rows.two_strides:
            found.append(
                [base + (r // inner_rows * outer + r % inner_rows * inner) * itemsize for r in range(positions)]
            )
        else:
            found.append([base + r * inner * itemsize for r in range(positions)])
    return found


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param([torch.zeros(3, 4, 8) for _ in range(3)], id="separate"),
        pytest.param(list(torch.zeros(3, 3, 4, 8).unbind(0)), id="stacked"),
        pytest.param(list(torch.zeros(3, 4, 3, 8).unbind(2)), id="stacked-inside"),
        pytest.param([h[:, :4] for h in torch.zeros(3, 3, 6, 8)], id="two-strides"),
        pytest.param([torch.zeros(3, 4, 8), torch.zeros(3, 6, 8)[:, :4], torch.zeros(3, 4, 9)[..., :8]], id="mixed"),
        pytest.param([torch.zeros(3, 1, 8).expand(3, 4, 8)], id="repeated-rows"),
        pytest.param([torch.zeros(3, 5, 8)[:, 0]] * 2, id="same-layer-twice"),
    ],
)
def test_rows_are_found_without_a_copy(layers):
    (rows,), inner_rows = as_rows(layers)
    lead = layers[0].shape[:-1]
    indices = list(product(*map(range, lead)))
    want = [[h[index].data_ptr() for index in indices] for h in layers]
    assert addresses(rows, inner_rows, len(layers), lead.numel()) == want


def test_stacked_layers_go_in_as_one_pointer():
    (rows,), _ = as_rows(list(torch.zeros(5, 3, 8).unbind(0)))
    assert len(rows.tensors) == 1
    assert rows.layer_stride == 24


@pytest.mark.parametrize(
    "layer", [torch.zeros(3, 4, 16)[..., ::2], torch.zeros(3, 2, 5, 4, 8)[:, :, 1:4, 1:]], ids=["columns", "3-strides"]
)
def test_rows_that_need_it_are_copied(layer):
    (rows,), _ = as_rows([layer])
    assert rows.tensors[0].is_contiguous()


@pytest.mark.parametrize(("offset", "alignment"), [(0, 16), (4, 8), (1, 2)])
def test_alignment_is_that_of_the_rows(offset, alignment):
    layer = torch.zeros(4 * 8 + 8, dtype=torch.bfloat16)[offset : offset + 32].view(4, 8)
    assert as_rows([layer])[0][0].alignment == alignment


@needs_triton
def test_gradients_are_scaled_in_place_only_where_the_graph_is_freed():
    student, teacher = both_sides(2, 3, (4,), 16, device=DEVICE)
    loss = alp_loss(student, teacher, backend="triton")
    first = torch.autograd.grad(2 * loss, student, retain_graph=True)
    second = torch.autograd.grad(2 * loss, student, retain_graph=True)
    third = torch.autograd.grad(loss, student)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, 2 * c)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_scale_gradients(dtype):
    values = [torch.randn(5, 7, dtype=torch.float64).to(DEVICE, dtype) for _ in range(3)]
    factor = torch.tensor(0.3, dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
    got = [v.clone() for v in values]
    torch.ops.alpkd_fast.scale_gradients_triton(got, factor, torch.ones_like(factor))
    for g, v in zip(got, values, strict=True):
        assert torch.equal(g, (v.to(factor.dtype) * factor).to(dtype))


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("D", [37, 40, 5000])
@pytest.mark.parametrize(("pooling", "weights", "positions"), SCALED_ROWS)
def test_only_compared_rows_are_scaled(dtype, D, pooling, weights, positions):
    values = [torch.randn(2, 3, 5, D, dtype=torch.float64).to(DEVICE, dtype) for _ in range(3)]
    factors = torch.tensor([0.3, 0.7], dtype=torch.promote_types(dtype, torch.float32), device=DEVICE)
    weights = None if weights is None else weights.to(DEVICE)
    got = [v.clone() for v in values]
    torch.ops.alpkd_fast.scale_gradients_triton(got, *factors, POOLINGS.index(pooling), weights)
    for g, v in zip(got, values, strict=True):
        v.view(6, 5, D)[range(6), positions] *= factors.prod()
        assert torch.equal(g, v)


SCALING = """
import re, torch
from alpkd_fast.kernels import check
from alpkd_fast.kernels.launch import scale_gradients

def found(kernel, binary):
    print(kernel, *sorted(set(re.findall(r"(?:ld|st)[.]global[.](\\S*)", binary.asm["ptx"]))))

with check.compiling_for(check.targets(["sm_90"])["sm_90"], 0, found):
    for dtype in (torch.bfloat16, torch.float32):
        for pooling in range(4):
            scale_gradients([torch.zeros(3, 5, 768, dtype=dtype)] * 2, torch.ones(()), None, pooling)
"""


def test_gradients_are_scaled_in_vectors_of_16_bytes():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", SCALING], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["scale_kernel b32 v4.b32"] * 8  # b32: the factor


@needs_triton
@pytest.mark.parametrize(("m", "n"), [(65, 2), (1, 129)])
def test_too_many_layers_are_refused(m, n):
    student, teacher = both_sides(m, n, (2,), 16, device=DEVICE)
    with pytest.raises(RuntimeError, match="at most 64 student and 128 teacher layers"):
        alp_loss(student, teacher, backend="triton")


def test_a_card_with_little_shared_memory_takes_fewer_layers():
    from alpkd_fast.backends.triton import most_layers

    assert most_layers(227 * 1024) == (64, 128)
    assert most_layers(163 * 1024) == (32, 64)


TUNING = """
from triton.runtime import JITFunction, driver
from alpkd_fast.kernels import check, tune
from alpkd_fast.kernels.launch import alp

timed, ran = [], []

class Driver(check._Driver):
    def get_benchmarker(self):
        def benchmark(call, quantiles):
            timed.append(call)
            return [1 / len(timed)] * 3  # the last is the fastest
        return benchmark

driver.set_active(Driver(check.targets(["sm_80"])["sm_80"], 0))
JITFunction.run = lambda self, *args, **kwargs: ran.append((self.fn.__name__, kwargs))
for dtypes in ("bf16-bf16", "f16-f16", "f32-bf16"):
    counts = []
    for _ in range(2):
        tune.tuned_kernel.cache_clear()  # as in another process
        alp(*check.arguments_of(check.Variant(12, 6, 768, dtypes)))
        counts.append(len(timed))
        timed.clear()
    tuned = [tuple(k[x] for x in tune.TUNED) for name, k in ran if name == "alp_kernel"]
    print(dtypes, counts[0] > 2, counts[1], tuned[0] == tuned[1])
    ran.clear()
"""


def test_tuning_is_kept_on_disk(tmp_path):
    """Launches to Triton's own autotuner, with the card and the times made up: the second process times nothing, and
    another dtype is another problem."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"ALPKD_FAST_AUTOTUNE": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", TUNING], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{dtypes} True 0 True" for dtypes in ("bf16-bf16", "f16-f16", "f32-bf16")]
    assert len(list(tmp_path.glob("*/alp_kernel.autotune.json"))) == 3


def test_tuning_keeps_the_heuristics_limit_of_registers():
    from alpkd_fast.kernels.heuristics import Config
    from alpkd_fast.kernels.tune import tuned_kernel

    heuristic = Config(split=4, width=64, warps=4, unroll=3, max_registers=168)
    first, *others = [config.all_kwargs() for config in tuned_kernel(heuristic, 768).configs]
    wanted = heuristic.arguments()
    assert {name: first[name] for name in wanted} == wanted
    assert not any("maxnreg" in c for c in others)


def check(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "alpkd_fast.kernels.check", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_ahead_of_time_check_of_a_kernel_of_the_speed_table(tmp_path):
    done = check("--table", "--match", "n12-m2-D768-bf16", "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [f["kernel"] for f in figures] == ["alp_kernel", "finish_kernel", "scale_kernel"]
    kernel = figures[0]
    assert set(kernel["loads"]) == {"128"}
    assert any(name.startswith("HMMA") for name in kernel["matrix"])


def test_ahead_of_time_check_leaves_out_what_the_backend_refuses():
    done = check("--all", "--target", "sm_80", "--match", "n128-m64")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("refused by the backend") == 2
    assert "0 kernels, 0 problems" in done.stdout


def test_ahead_of_time_check_fails_where_the_budget_is_exceeded():
    from alpkd_fast.kernels.check import OTHERS, TABLE, Compiled
    from alpkd_fast.kernels.cubin import Report

    spilling = Report(255, 8, 2, 0, {"128": 4, "32": 1}, {}, 100)
    table = Compiled(TABLE[0], "alp_kernel", "sm_90", spilling)
    assert [p.split(": ")[1].split(",")[0] for p in table.problems({})] == [
        "8 spilled_bytes", "2 local_accesses", "1 narrow_loads",
    ]  # fmt: skip
    other = Compiled(OTHERS[0], "alp_kernel", "sm_90", spilling)
    assert "no entry" in other.problems({})[0]
    large = Compiled(TABLE[0], "alp_kernel", "sm_80", Report(255, 0, 0, 192 * 1024, {}, {}, 100))
    assert "196608 B of shared memory, the card has 166912" in large.problems({})[0]
    budget = {other.key: {"spilled_bytes": 8, "local_accesses": 1, "narrow_loads": 1}}
    assert [p.split(": ")[1] for p in other.problems(budget)] == ["2 local_accesses, allowed are 1"]
