"""Attention over depth by the kernels of flash-linear-attention and Liger-Kernel, where they are installed.

They normalise the layers and score them against one learned query for all rows; ALP scores plain layers against
every student row. So they are no rivals for the loss. Their rows show what m passes of such a kernel over the n
teacher layers cost: the attention part alone, forward and backward.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from . import measure
from .cases import DTYPES, LOSS, make_inputs

EPS = 1e-6


def fla(query, layers, weight):
    return importlib.import_module("fla.ops.attnres").fused_attnres(query, layers, weight, EPS)


def liger(query, layers, weight):
    function = importlib.import_module("liger_kernel.ops.attn_res").LigerAttnResFunction
    return function.apply(torch.stack(layers), query, weight, EPS)


def in_float64(query, layers, weight):
    t = torch.stack(layers).double()
    keys = t * (t.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()
    return ((keys @ query.double()).softmax(0)[..., None] * t).sum(0)


@pytest.mark.loss
@pytest.mark.parametrize(("name", "module"), [("fla", "fla.ops.attnres"), ("liger", "liger_kernel.ops.attn_res")])
def test_depth_attention(name, module, record, done):
    if record.device.type != "cuda":
        pytest.skip("these kernels need a GPU")
    pytest.importorskip(module)
    kernel = {"fla": fla, "liger": liger}[name]
    done(suite="loss", case="bert-base-6", kind="part", provider=f"{name} (attention only)")
    case, dtype = LOSS["bert-base-6"].on(record.device), DTYPES["bf16"]
    inputs = make_inputs(case, dtype, record.device, measure.cache_bytes(record.device))
    query = torch.randn(case.D, device=record.device).mul(case.D**-0.5).to(dtype).requires_grad_()
    weight = torch.ones(case.D, device=record.device, dtype=dtype)
    layers = inputs[0].teacher
    error = (kernel(query, layers, weight).double() - in_float64(query, layers, weight)).norm()
    error = float(error / in_float64(query, layers, weight).norm())
    assert error < 8 * torch.finfo(dtype).eps  # roundings of the keys, the scores, the weights and the output

    def call(k):
        given = inputs[k % len(inputs)].teacher
        outputs = [kernel(query, given, weight) for _ in range(case.m)]
        return torch.autograd.grad(outputs, query, outputs)

    times = measure.take_turns({name: call}, record.device, record.seconds, record.rounds)
    median, iqr = measure.median_iqr(times[name][0])
    record.rows.append(record.row(
        case, "bf16", "forward+backward", provider=f"{name} (attention only)", kind="part", error=error,
        rounds=len(times[name][0]), median_s=median, iqr_s=iqr, wall_s=measure.median_iqr(times[name][1])[0],
        extra_bytes=measure.extra_bytes(call, record.device), launches=measure.kernel_launches(call, record.device),
    ))  # fmt: skip
